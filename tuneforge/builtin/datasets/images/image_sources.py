"""Sources of pictures: files or arrays that become stored pictures when asked, or all at once.

Shapes: b pictures in a batch, n in all, c channels, h and w pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import parent_process
from pathlib import Path

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import DataError
from tuneforge.builtin.datasets.images.image_inputs import Images, name_of
from tuneforge.builtin.datasets.images.sample_names import chosen

_SMALL_FILE = 16_384  # bytes
_AT_ONCE = 1024  # pictures
_STAND_INS = 8
_GREY = 128


@attrs.frozen(eq=False)
class PictureFiles:
    """A source that decodes files when they are asked for.

    Args:
        inputs: How they are decoded; every picture must come out at the same size.
        paths: One a sample.
    """

    inputs: Images
    paths: Sequence[str | Path]

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, rows: Tensor) -> Tensor:
        """Stored pictures of `rows` (b,), uint8 (b, c, h, w).

        Raises:
            DataError: Some cannot be decoded; the first is named, the others are counted.
        """
        paths = chosen(self.paths, rows.numpy())
        shape = self.inputs.shape or tuple(self.inputs.decode(paths[0]).shape)
        out = torch.empty(len(paths), *shape, dtype=torch.uint8)

        def fill(place: int) -> None:
            path = paths[place]
            stored = self.inputs.decode(path)
            if stored.shape != shape:
                raise DataError(
                    f"{name_of(path)} is a {self.inputs.text(stored)}, others are {shape[2]}x{shape[1]}",
                    fix="let the operations give one size, such as 'resize 32x32'",
                )
            out[place] = stored

        _for_each(fill, len(paths), num_threads=_num_threads(paths))
        return out

    def chosen(self, rows: Tensor) -> PictureFiles:
        """The source of `rows` only."""
        return PictureFiles(self.inputs, chosen(self.paths, rows.numpy()))

    def check(self) -> None:
        """Look at every file's header.

        Raises:
            DataError: Some are no pictures; the first is named, the others are counted.
        """
        _for_each(lambda place: self.inputs.check(self.paths[place]), len(self.paths), num_threads=1)

    def fingerprint(self) -> str:
        """SHA-256 over how files are decoded, and each one's path, size and time of change.

        Raises:
            DataError: A file has gone.
        """
        digest = hashlib.sha256(self.inputs.recipe.encode())
        for path in self.paths:
            try:
                status = os.stat(path)
            except OSError as error:
                why = error.strerror or str(error)
                raise DataError(f"cannot read {name_of(path)}", why=why, fix="restore the file") from None
            digest.update(os.fsencode(os.path.abspath(path)) + b"\0")
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


@attrs.frozen(eq=False)
class StandIns:
    """Files of which one that can no longer be read does not end the run: another of its class stands in for it.

    It is the next one of the class in the split's order that can be read, or a grey picture where the split has no
    other of the class; so which one it is depends on the files alone, never on a worker, the order of the epoch or
    where a run was resumed. Each is recorded, a line the first time that a process meets it.

    Args:
        pictures: The files.
        codes: The class of each, int64 (n,).
        ids: A stable name of each.
        split: Name of the split, for the record.
        record: Where stand-ins are written down, one JSON object a line.
    """

    pictures: PictureFiles
    codes: NDArray[np.int64]
    ids: Sequence[str]
    split: str
    record: Path
    _told: set[int] = attrs.field(factory=set, init=False)

    def __len__(self) -> int:
        return len(self.pictures)

    def fetch(self, rows: Tensor) -> Tensor:
        """Stored pictures of `rows` (b,), uint8 (b, c, h, w).

        Raises:
            DataError: One cannot be read, nor can the next eight of its class: that is not one file, but the disk.
        """
        try:
            return self.pictures.fetch(rows)
        except DataError:
            return torch.cat([self._one(row) for row in rows.tolist()])

    def fingerprint(self) -> str | None:
        """That of the files; None where some are gone or stood in for, so that nothing of theirs is shared."""
        if any(line["split"] == self.split for line in stand_ins(self.record)):
            return None
        try:
            return self.pictures.fingerprint()
        except DataError:
            return None

    def _one(self, row: int) -> Tensor:
        try:
            return self.pictures.fetch(torch.tensor([row]))
        except DataError as error:
            failure = error
        others = self._next_of_class(row)
        for candidate in others:
            with contextlib.suppress(DataError):
                stored = self.pictures.fetch(torch.tensor([candidate]))
                self._tell(row, self.ids[candidate], failure)
                return stored
        if not others and self.pictures.inputs.shape is not None:
            self._tell(row, "a grey picture", failure)
            return torch.full((1, *self.pictures.inputs.shape), _GREY, dtype=torch.uint8)
        raise DataError(
            f"{failure.what}, nor the next {_STAND_INS} pictures of its class",
            where=failure.where,
            why=failure.why,
            fix="see that the disk is there, restore the files, and go on with: tuneforge resume",
        )

    def _next_of_class(self, row: int) -> list[int]:
        same = np.flatnonzero(self.codes == self.codes[row])
        after = np.roll(same, -1 - int(np.searchsorted(same, row)))
        return [int(each) for each in after[:_STAND_INS] if each != row]

    def _tell(self, row: int, stand_in: str, failure: DataError) -> None:
        if row in self._told:
            return
        self._told.add(row)
        line = {"split": self.split, "id": self.ids[row], "why": failure.why, "stand_in": stand_in}
        with (
            contextlib.suppress(FileNotFoundError),  # a rank on another machine, which has no folder of the run
            self.record.open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(line) + "\n")  # one short write, so that processes can share the file


def stand_ins(record: Path) -> list[dict[str, str]]:
    """What `StandIns` wrote down, each picture once, in order."""
    if not record.exists():
        return []
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return list({(line["split"], line["id"]): line for line in reversed(lines)}.values())[::-1]


@attrs.frozen(eq=False)
class PictureArrays:
    """A source that holds pictures as they were before the operations, and applies them when asked.

    Args:
        inputs: The operations.
        pictures_nchw: uint8.
        rows: Which of them; by default all.
    """

    inputs: Images
    pictures_nchw: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pictures_nchw if self.rows is None else self.rows)

    def fetch(self, rows: Tensor) -> Tensor:
        """Stored pictures of `rows` (b,), uint8 (b, c, h, w)."""
        return self.inputs.prepared(self.pictures_nchw.index_select(0, self._own(rows)))

    def chosen(self, rows: Tensor) -> PictureArrays:
        """The source of `rows` only; nothing is copied."""
        return PictureArrays(self.inputs, self.pictures_nchw, self._own(rows))

    def fingerprint(self) -> str:
        """SHA-256 over the operations and the pictures."""
        digest = hashlib.sha256(self.inputs.recipe.encode())
        for rows in torch.split(torch.arange(len(self)), _AT_ONCE):
            digest.update(self.pictures_nchw.index_select(0, self._own(rows)).numpy().data)
        return digest.hexdigest()

    def _own(self, rows: Tensor) -> Tensor:
        return rows if self.rows is None else self.rows[rows]


def _num_threads(paths: Sequence[str | Path]) -> int:
    """Threads that decode: PIL lets go of Python's lock, but small files cost more Python than decoding.

    With files of 1 kB, threads took three times as long as none (2 cores). A process that decodes ahead is one of many.
    """
    if parent_process() is not None:
        return 1
    some = [os.path.getsize(path) for path in paths[:8] if os.path.exists(path)]
    return min(16, os.cpu_count() or 1) if sum(some) > _SMALL_FILE * len(some) else 1


def _for_each(act: Callable[[int], None], count: int, *, num_threads: int) -> None:
    """Act on every place, all of them.

    Raises:
        DataError: The first of those that were raised, with the number of the others.
    """
    failures: list[tuple[int, DataError]] = []

    def guarded(place: int) -> None:
        try:
            act(place)
        except DataError as error:
            failures.append((place, error))

    with contextlib.ExitStack() as stack:
        every = stack.enter_context(ThreadPoolExecutor(num_threads)).map if num_threads > 1 else map
        for start in range(0, count, _AT_ONCE):  # an executor holds an object for each place that it is given
            for _ in every(guarded, range(start, min(start + _AT_ONCE, count))):
                pass
    if failures:
        raise _first_of(failures)


def _first_of(failures: list[tuple[int, DataError]]) -> DataError:
    _, first = min(failures, key=lambda failure: failure[0])
    others = len(failures) - 1
    what = first.what if not others else f"{first.what}, and {others:,} more fail"
    return DataError(what, where=first.where, why=first.why, fix=first.fix)
