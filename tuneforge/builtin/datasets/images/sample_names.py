"""Names of files and classes: as text that any terminal or page can hold, and many of them in little memory."""

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
    """A sequence whose members are made when they are asked for; a slice is one too."""

    @abstractmethod
    def at(self, place: int) -> T:
        """The member at a place from 0 on."""

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...
    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        """One member, or a sequence of those of a slice."""
        if isinstance(place, slice):
            return SequenceSubset(self, np.arange(*place.indices(len(self))))
        return self.at(range(len(self))[place])


@attrs.frozen(eq=False)
class SequenceSubset(LazySequence[T]):
    """Some members of another sequence.

    Args:
        members: The other sequence.
        rows: Their places in it (n,).
    """

    members: Sequence[T]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, place: int) -> T:
        """The member at a place among those chosen."""
        return self.members[int(self.rows[place])]


@attrs.frozen(eq=False)
class PackedStrings(LazySequence[str]):
    """Names in one piece of memory: a list of 100,000 paths takes 40 MB, their letters 2 MB.

    Args:
        buffer: All names, one after the other, in UTF-8.
        ends: Where each ends.
    """

    buffer: bytearray = attrs.field(factory=bytearray)
    ends: array[int] = attrs.field(factory=lambda: array("q"))

    def append(self, name: str) -> None:
        """Add a name."""
        self.buffer.extend(name.encode(errors="surrogateescape"))
        self.ends.append(len(self.buffer))

    def __len__(self) -> int:
        return len(self.ends)

    def at(self, place: int) -> str:
        """The name at a place."""
        start = self.ends[place - 1] if place else 0
        return self.buffer[start : self.ends[place]].decode(errors="surrogateescape")


@attrs.frozen(eq=False)
class LazyPaths(LazySequence[str]):
    """The files that names below a folder mean; as text, because `Path` keeps the parts of every path in a table."""

    root: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def at(self, place: int) -> str:
        """The path at a place."""
        return os.path.join(self.root, self.names[place])


@attrs.frozen(eq=False)
class EscapedNames(LazySequence[str]):
    """Names as text that can be printed."""

    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def at(self, place: int) -> str:
        """The text at a place."""
        return escape_name(self.names[place])


def select_items(members: Sequence[T], rows: NDArray[np.int64]) -> SequenceSubset[T]:
    """The members at `rows` (n,), in that order; chosen ones are not chosen from twice."""
    return (
        SequenceSubset(members.members, members.rows[rows])
        if isinstance(members, SequenceSubset)
        else SequenceSubset(members, rows)
    )


def describe_raw(raw: Any) -> str:
    """What messages call a raw picture."""
    return f"'{escape_name(raw)}'" if isinstance(raw, (str, Path)) else "the picture"
