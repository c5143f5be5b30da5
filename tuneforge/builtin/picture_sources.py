"""Sources of pictures: files or arrays that become stored pictures when asked, or all at once.

Shapes: b pictures in a batch, n in all, c channels, h and w pixels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from tuneforge import DataError
from tuneforge.builtin.images import Images, name_of

_SMALL_FILE = 16_384  # bytes


@attrs.frozen(eq=False)
class PictureFiles:
    """A source that decodes files when they are asked for.

    Args:
        inputs: How they are decoded; every picture must come out at the same size.
        paths: One a sample.
    """

    inputs: Images
    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, rows: Tensor) -> Tensor:
        """Stored pictures of `rows` (b,), uint8 (b, c, h, w).

        Raises:
            DataError: Some cannot be decoded; the first is named, the others are counted.
        """
        paths = [self.paths[row] for row in rows.tolist()]
        shape = self.inputs.shape or tuple(self.inputs.decode(paths[0]).shape)
        out = torch.empty(len(paths), *shape, dtype=torch.uint8)

        def fill(place: int) -> None:
            stored = self.inputs.decode(paths[place])
            if stored.shape != shape:
                raise DataError(
                    f"{name_of(paths[place])} is a {self.inputs.text(stored)}, others are {shape[2]}x{shape[1]}",
                    fix="let the operations give one size, such as 'resize 32x32'",
                )
            out[place] = stored

        _for_each(fill, range(len(paths)), num_threads=_num_threads(paths))
        return out

    def chosen(self, rows: Tensor) -> PictureFiles:
        """The source of `rows` only."""
        return PictureFiles(self.inputs, [self.paths[row] for row in rows.tolist()])

    def check(self) -> None:
        """Look at every file's header.

        Raises:
            DataError: Some are no pictures; the first is named, the others are counted.
        """
        _for_each(lambda place: self.inputs.check(self.paths[place]), range(len(self.paths)), num_threads=1)


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

    def _own(self, rows: Tensor) -> Tensor:
        return rows if self.rows is None else self.rows[rows]


def _num_threads(paths: Sequence[Path]) -> int:
    """Threads that decode: PIL lets go of Python's lock, but small files cost more Python than decoding.

    With files of 1 kB, threads took three times as long as none (2 cores).
    """
    large = sum(path.stat().st_size for path in paths[:8] if path.exists()) > _SMALL_FILE * min(8, len(paths))
    return min(16, os.cpu_count() or 1) if large and get_worker_info() is None else 1


def _for_each(act: Callable[[int], None], places: Sequence[int], *, num_threads: int) -> None:
    """Act on every place, all of them.

    Raises:
        DataError: The first of those that were raised, with the number of the others.
    """
    failures: dict[int, DataError] = {}

    def guarded(place: int) -> None:
        try:
            act(place)
        except DataError as error:
            failures[place] = error

    with contextlib.ExitStack() as stack:
        every = stack.enter_context(ThreadPoolExecutor(num_threads)).map if num_threads > 1 else map
        for _ in every(guarded, places):
            pass
    if failures:
        raise _first_of([failures[place] for place in sorted(failures)])


def _first_of(failures: list[DataError]) -> DataError:
    first, others = failures[0], len(failures) - 1
    what = first.what if not others else f"{first.what}, and {others:,} more fail"
    return DataError(what, where=first.where, why=first.why, fix=first.fix)
