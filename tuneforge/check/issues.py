"""What a check found, as plain data: one issue a file, and what is advised about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Literal

import attrs

from tuneforge.check.copies import Copy
from tuneforge.check.files import File

Kind = Literal["unusable", "not used", "same bytes", "near copy", "leak", "two labels", "wrong label", "class"]
Action = Literal["leave out", "look at it", "none"]

FIXES: dict[str, tuple[str, ...]] = {
    "files": ("unusable", "not used"),
    "copies": ("same bytes", "near copy", "leak", "two labels"),
    "labels": ("wrong label",),
}
"""What `--fix` can be told to leave out, and the kinds of issue that each means."""

TINY = 5
"""Pictures under which a class is too small to be divided and judged."""

KEPT_FIRST = {"test": 0, "val": 1, "train": 2, "": 2}
"""Of copies in several splits, which split keeps its own."""


@attrs.frozen
class Issue:
    """One thing that is wrong.

    Args:
        kind: Of issue.
        path: The file, as printable text; empty where a whole class is meant.
        split: Of it; empty where the data is not divided.
        label: Of it.
        why: Completes "because ...".
        action: What is advised.
        others: Further files that it concerns.
        score: How sure it is, 0 to 1; None where there is no doubt.
    """

    kind: Kind
    path: str
    split: str
    label: str
    why: str
    action: Action
    others: tuple[str, ...] = ()
    score: float | None = None


def of_file(file: File, kind: Kind, why: str, action: Action, **more: object) -> Issue:
    """An issue of one file."""
    return Issue(kind, file.id, file.split, file.label, why, action, **more)  # type: ignore[arg-type]  # others, score


def of_copies(members: Mapping[int, File], copies: Sequence[Copy]) -> Iterator[Issue]:
    """Issues of files that show the same picture; those of the test are kept, then those of validation.

    Each is named beside the one that it is most like, because pairs join in chains whose ends may be less alike: beside
    one whose split is kept, where it is like one.

    Args:
        members: Two or more, by their places.
        copies: The pairs that join them.
    """
    ordered = sorted(members, key=lambda place: KEPT_FIRST[members[place].split])
    if len({file.label for file in members.values()}) > 1:
        yield from _of_labels(ordered, members, copies)
        return
    first = members[ordered[0]]
    for place in ordered[1:]:
        file = members[place]
        kept = {each for each, other in members.items() if KEPT_FIRST[other.split] < KEPT_FIRST[file.split]}
        nearest, copy = _nearest(place, copies, kept)
        other = members[nearest]
        named = (
            f"it has the same bytes as '{other.id}'" if copy.exact else f"it is nearly the same picture as '{other.id}'"
        )
        score = None if copy.exact else copy.likeness
        if nearest in kept:
            why = f"{named}, which is in {other.split}"
            yield of_file(file, "leak", why, "leave out", others=(other.id,), score=score)
        elif kept:
            why = f"{named}, and through it as '{first.id}', which is in {first.split}"
            yield of_file(file, "leak", why, "leave out", others=(other.id, first.id), score=score)
        elif copy.exact:
            yield of_file(file, "same bytes", named, "leave out", others=(other.id,))
        else:
            advised: Action = "leave out" if not file.split else "none"  # a division could put them on both sides
            yield of_file(file, "near copy", named, advised, others=(other.id,), score=score)


def _of_labels(ordered: Sequence[int], members: Mapping[int, File], copies: Sequence[Copy]) -> Iterator[Issue]:
    """Issues of files that show the same picture under several labels, the nearest named first."""
    names = " and ".join(f"'{label}'" for label in sorted({file.label for file in members.values()}))
    same = all(copy.exact for copy in copies)
    for place in ordered:
        file = members[place]
        nearest, copy = _nearest(place, copies)
        leaks = file.split != members[ordered[0]].split
        action: Action = "leave out" if leaks or (same and file.split in ("", "train")) else "look at it"
        others = (nearest, *(each for each in ordered if each not in (place, nearest)))
        yield of_file(
            file,
            "two labels",
            f"the same picture is labelled {names}",
            action,
            others=tuple(members[each].id for each in others),
            score=None if copy.exact else copy.likeness,
        )


def _nearest(place: int, copies: Sequence[Copy], preferred: Container[int] = ()) -> tuple[int, Copy]:
    """The file that one is most like, of those preferred where it is like any; and how much."""
    pairs = [
        (each.second if each.first == place else each.first, each)
        for each in copies
        if place in (each.first, each.second)
    ]
    return max(pairs, key=lambda pair: (pair[0] in preferred, pair[1].exact, pair[1].likeness))


def of_classes(files: Sequence[File], empty: Sequence[tuple[str, str]]) -> Iterator[Issue]:
    """Issues of whole classes: empty, tiny, or not in every split."""
    counts = counted(files)
    for split, label in empty:
        yield Issue("class", "", split, label, "its folder holds no picture that can be used", "look at it")
    learnt = counts.get("train") or counts.get("") or {}
    for split, by_label in counts.items():
        for label, count in sorted(by_label.items()):
            if split in ("", "train") and count < TINY:
                yield Issue("class", "", split, label, f"it has {count} picture{'s' * (count > 1)}", "look at it")
            elif label not in learnt:
                yield Issue("class", "", split, label, f"{split} has it, train has not", "look at it")
        if split not in ("", "train"):
            for label in sorted(set(learnt) - set(by_label)):
                yield Issue("class", "", split, label, f"train has it, {split} has not", "look at it")


def counted(files: Sequence[File]) -> Mapping[str, Mapping[str, int]]:
    """Pictures by split and class."""
    counts: dict[str, Counter[str]] = {}
    for file in files:
        counts.setdefault(file.split, Counter())[file.label] += 1
    return counts
