"""Sources of images: files or arrays, decoded on demand.

Shapes: b images in a batch, n in all, c channels, h and w pixels.
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
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.builtin.datasets.images.replacements import read_replacements
from tuneforge.builtin.datasets.images.sample_names import describe_raw, select_items

_SMALL_FILE = 16_384  # bytes
_CHUNK_SIZE = 1024  # images
_MAX_REPLACEMENTS = 8
_GRAY_LEVEL = 128


@attrs.frozen(eq=False)
class ImageFileSource:
    """A source that decodes files on demand.

    Args:
        inputs: Decodes the files; every image must have the same size afterwards.
        paths: One path per sample.
    """

    inputs: ImageInputs
    paths: Sequence[str | Path]

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, indices: Tensor) -> Tensor:
        """Return the decoded images of `indices` (b,), uint8 (b, c, h, w).

        Raises:
            DataError: Files cannot be decoded; the message names the first and counts the others.
        """
        paths = select_items(self.paths, indices.numpy())
        shape = self.inputs.shape or tuple(self.inputs.decode(paths[0]).shape)
        out = torch.empty(len(paths), *shape, dtype=torch.uint8)

        def fill(place: int) -> None:
            path = paths[place]
            stored = self.inputs.decode(path)
            if stored.shape != shape:
                raise DataError(
                    f"{describe_raw(path)} is a {self.inputs.render_text(stored)}, others are {shape[2]}x{shape[1]}",
                    fix="use operations with a fixed output size, such as 'resize 32x32'",
                )
            out[place] = stored

        _for_each(fill, len(paths), num_threads=_choose_num_threads(paths))
        return out

    def select(self, rows: Tensor) -> ImageFileSource:
        """Return the source of `rows`."""
        return ImageFileSource(self.inputs, select_items(self.paths, rows.numpy()))

    def check_files(self) -> None:
        """Check the header of every file.

        Raises:
            DataError: Files are not images; the message names the first and counts the others.
        """
        _for_each(lambda place: self.inputs.check_file(self.paths[place]), len(self.paths), num_threads=1)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the decoding options and of the path, size and modification time of each file.

        Raises:
            DataError: A file no longer exists.
        """
        digest = hashlib.sha256(self.inputs.decoding_fingerprint.encode())
        for path in self.paths:
            try:
                status = os.stat(path)
            except OSError as error:
                why = error.strerror or str(error)
                raise DataError(f"cannot read {describe_raw(path)}", why=why, fix="restore the file") from None
            digest.update(os.fsencode(os.path.abspath(path)) + b"\0")
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


@attrs.frozen(eq=False)
class ReplacingImageSource:
    """A source that replaces a file that can no longer be read by another image of the same class.

    The replacement is the next readable image of the class in the order of the split, or a gray image if the split has
    no other of the class. It depends only on the files, not on workers, the order of the epoch or a resumed run. Each
    process records a replacement once.

    Args:
        source: The files.
        class_indices: Class of each file, int64 (n,).
        ids: Stable id of each file.
        split: Name of the split, for the record.
        record_path: File to which replacements are appended as JSON lines.
    """

    source: ImageFileSource
    class_indices: NDArray[np.int64]
    ids: Sequence[str]
    split: str
    record_path: Path
    _recorded_rows: set[int] = attrs.field(factory=set, init=False)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def paths(self) -> Sequence[str | Path]:
        """The file of each sample."""
        return self.source.paths

    def fetch(self, indices: Tensor) -> Tensor:
        """Return the decoded images of `indices` (b,), uint8 (b, c, h, w).

        Raises:
            DataError: A file and the next eight of its class cannot be read, which points to the disk.
        """
        try:
            return self.source.fetch(indices)
        except DataError:
            return torch.cat([self._fetch_or_replace(row) for row in indices.tolist()])

    def fingerprint(self) -> str | None:
        """Return that of the files; None if some are missing or replaced, so that no cache is shared."""
        if any(line["split"] == self.split for line in read_replacements(self.record_path)):
            return None
        try:
            return self.source.fingerprint()
        except DataError:
            return None

    def _fetch_or_replace(self, row: int) -> Tensor:
        try:
            return self.source.fetch(torch.tensor([row]))
        except DataError as error:
            failure = error
        others = self._find_next_of_class(row)
        for candidate in others:
            with contextlib.suppress(DataError):
                stored = self.source.fetch(torch.tensor([candidate]))
                self._record_replacement(row, self.ids[candidate], failure)
                return stored
        if not others and self.source.inputs.shape is not None:
            self._record_replacement(row, "a gray image", failure)
            return torch.full((1, *self.source.inputs.shape), _GRAY_LEVEL, dtype=torch.uint8)
        raise DataError(
            f"{failure.what}, nor the next {_MAX_REPLACEMENTS} images of its class",
            where=failure.where,
            why=failure.why,
            fix="check the disk, restore the files, and continue with: tuneforge resume",
        )

    def _find_next_of_class(self, row: int) -> list[int]:
        same = np.flatnonzero(self.class_indices == self.class_indices[row])
        after = np.roll(same, -1 - int(np.searchsorted(same, row)))
        return [int(each) for each in after[:_MAX_REPLACEMENTS] if each != row]

    def _record_replacement(self, row: int, replacement: str, failure: DataError) -> None:
        if row in self._recorded_rows:
            return
        self._recorded_rows.add(row)
        line = {"split": self.split, "id": self.ids[row], "why": failure.why, "replacement": replacement}
        with (
            contextlib.suppress(FileNotFoundError),  # a rank on another machine has no run directory
            self.record_path.open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(line) + "\n")  # one short write, so that processes can share the file


@attrs.frozen(eq=False)
class ImageArraySource:
    """A source of images in memory, to which operations are applied on demand.

    Args:
        inputs: The operations.
        images_nchw: Images before the operations, uint8.
        rows: Rows of the images that belong to the source; default: all.
    """

    inputs: ImageInputs
    images_nchw: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images_nchw if self.rows is None else self.rows)

    def fetch(self, indices: Tensor) -> Tensor:
        """Return the decoded images of `indices` (b,), uint8 (b, c, h, w)."""
        return self.inputs.apply_ops(self.images_nchw.index_select(0, self._to_source_rows(indices)))

    def select(self, rows: Tensor) -> ImageArraySource:
        """Return the source of `rows`, without a copy."""
        return ImageArraySource(self.inputs, self.images_nchw, self._to_source_rows(rows))

    def fingerprint(self) -> str:
        """Return a SHA-256 of the operations and the images."""
        digest = hashlib.sha256(self.inputs.decoding_fingerprint.encode())
        for rows in torch.split(torch.arange(len(self)), _CHUNK_SIZE):
            digest.update(self.images_nchw.index_select(0, self._to_source_rows(rows)).numpy().data)
        return digest.hexdigest()

    def _to_source_rows(self, rows: Tensor) -> Tensor:
        return rows if self.rows is None else self.rows[rows]


def _choose_num_threads(paths: Sequence[str | Path]) -> int:
    """Return the number of decoding threads.

    PIL releases the GIL, but with files of 1 kB threads took three times as long as none (2 cores). A worker process
    uses one thread, because there are several of them.
    """
    if parent_process() is not None:
        return 1
    some = [os.path.getsize(path) for path in paths[:8] if os.path.exists(path)]
    return min(16, os.cpu_count() or 1) if sum(some) > _SMALL_FILE * len(some) else 1


def _for_each(act: Callable[[int], None], count: int, *, num_threads: int) -> None:
    """Call `act` for each index below `count`, even if some calls fail.

    Raises:
        DataError: The first error by index, with the number of the others.
    """
    failures: list[tuple[int, DataError]] = []

    def guarded(place: int) -> None:
        try:
            act(place)
        except DataError as error:
            failures.append((place, error))

    with contextlib.ExitStack() as stack:
        every = stack.enter_context(ThreadPoolExecutor(num_threads)).map if num_threads > 1 else map
        for start in range(0, count, _CHUNK_SIZE):  # in chunks, because an executor holds an object per submitted call
            for _ in every(guarded, range(start, min(start + _CHUNK_SIZE, count))):
                pass
    if failures:
        raise _merge_failures(failures)


def _merge_failures(failures: list[tuple[int, DataError]]) -> DataError:
    _, first = min(failures, key=lambda failure: failure[0])
    others = len(failures) - 1
    what = first.what if not others else f"{first.what}, and {others:,} more fail"
    return DataError(what, where=first.where, why=first.why, fix=first.fix)
