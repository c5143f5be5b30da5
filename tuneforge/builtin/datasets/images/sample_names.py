"""Names of files and samples: sequences of many names in little memory, and names as printable text."""

from __future__ import annotations

import os
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import attrs
import numpy as np
from numpy.typing import NDArray

from tuneforge.errors import escape_name

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """A sequence that creates its items on demand; slices are lazy too."""

    @abstractmethod
    def at(self, place: int) -> T:
        """Return the item at an index from 0."""

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...
    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        """Return an item, or a sequence for a slice."""
        if isinstance(place, slice):
            return SequenceSubset(self, np.arange(*place.indices(len(self))))
        return self.at(range(len(self))[place])


@attrs.frozen(eq=False)
class SequenceSubset(LazySequence[T]):
    """Some items of another sequence.

    Args:
        members: The other sequence.
        rows: Indices into it (n,).
    """

    members: Sequence[T]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, place: int) -> T:
        """Return the item at an index into `rows`."""
        return self.members[int(self.rows[place])]


@attrs.frozen(eq=False)
class PackedStrings(LazySequence[str]):
    """Strings in one buffer: a list of 100,000 paths takes 40 MB, their characters 2 MB.

    Args:
        buffer: All strings, concatenated, in UTF-8.
        ends: End of each in the buffer.
    """

    buffer: bytearray = attrs.field(factory=bytearray)
    ends: array[int] = attrs.field(factory=lambda: array("q"))

    def append(self, name: str) -> None:
        """Append a string."""
        self.buffer.extend(name.encode(errors="surrogateescape"))
        self.ends.append(len(self.buffer))

    def __len__(self) -> int:
        return len(self.ends)

    def at(self, place: int) -> str:
        """Return the string at an index."""
        start = self.ends[place - 1] if place else 0
        return self.buffer[start : self.ends[place]].decode(errors="surrogateescape")


@attrs.frozen(eq=False)
class LazyPaths(LazySequence[str]):
    """Paths of names in a folder; as text, because `Path` interns the parts of every path."""

    root: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def at(self, place: int) -> str:
        """Return the path at an index."""
        return os.path.join(self.root, self.names[place])


@attrs.frozen(eq=False)
class EscapedNames(LazySequence[str]):
    """Names as printable text."""

    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def at(self, place: int) -> str:
        """Return the text at an index."""
        return escape_name(self.names[place])


def select_items(members: Sequence[T], rows: NDArray[np.int64]) -> SequenceSubset[T]:
    """Return the items at `rows` (n,), in that order, without nesting subsets."""
    return (
        SequenceSubset(members.members, members.rows[rows])
        if isinstance(members, SequenceSubset)
        else SequenceSubset(members, rows)
    )


def describe_raw(raw: Any) -> str:
    """Return how messages refer to an image."""
    return f"'{escape_name(raw)}'" if isinstance(raw, (str, Path)) else "the image"
