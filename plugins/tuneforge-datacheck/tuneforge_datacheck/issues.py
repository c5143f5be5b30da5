"""What a check found, as plain data: one issue a file, and what is advised about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Literal

import attrs

from tuneforge_datacheck.files import DataFile
from tuneforge_datacheck.near_duplicates import DuplicatePair

Kind = Literal[
    "unusable", "not used", "exact duplicate", "near-duplicate", "leak", "conflicting labels", "label issue", "class"
]
Action = Literal["exclude", "review", "none"]

FIXES: dict[str, tuple[str, ...]] = {
    "files": ("unusable", "not used"),
    "copies": ("exact duplicate", "near-duplicate", "leak", "conflicting labels"),
    "labels": ("label issue",),
}
"""What `--fix` can be told to leave out, and the kinds of issue that each means."""

MIN_CLASS_SIZE = 5
"""Pictures under which a class is too small to be divided and judged."""

SPLIT_PRIORITY = {"test": 0, "val": 1, "train": 2, "": 2}
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
        related: Further files that it concerns.
        score: How sure it is, 0 to 1; None where there is no doubt.
    """

    kind: Kind
    path: str
    split: str
    label: str
    why: str
    action: Action
    related: tuple[str, ...] = ()
    score: float | None = None


def make_file_issue(file: DataFile, kind: Kind, why: str, action: Action, **more: object) -> Issue:
    """An issue of one file."""
    return Issue(kind, file.id, file.split, file.label, why, action, **more)  # type: ignore[arg-type]  # related, score


def find_duplicate_issues(members: Mapping[int, DataFile], pairs: Sequence[DuplicatePair]) -> Iterator[Issue]:
    """Issues of files that show the same picture; those of the test are kept, then those of validation.

    Each is named beside the one that it is most like, because pairs join in chains whose ends may be less alike: beside
    one whose split is kept, where it is like one.

    Args:
        members: Two or more, by their places.
        pairs: The pairs that join them.
    """
    ordered = sorted(members, key=lambda place: SPLIT_PRIORITY[members[place].split])
    if len({file.label for file in members.values()}) > 1:
        yield from _find_conflicting_labels(ordered, members, pairs)
        return
    first = members[ordered[0]]
    for place in ordered[1:]:
        file = members[place]
        kept = {each for each, other in members.items() if SPLIT_PRIORITY[other.split] < SPLIT_PRIORITY[file.split]}
        nearest, pair = _most_similar(place, pairs, kept)
        other = members[nearest]
        named = (
            f"it has the same bytes as '{other.id}'" if pair.exact else f"it is nearly the same picture as '{other.id}'"
        )
        score = None if pair.exact else pair.correlation
        if nearest in kept:
            why = f"{named}, which is in {other.split}"
            yield make_file_issue(file, "leak", why, "exclude", related=(other.id,), score=score)
        elif kept:
            why = f"{named}, and through it as '{first.id}', which is in {first.split}"
            yield make_file_issue(file, "leak", why, "exclude", related=(other.id, first.id), score=score)
        elif pair.exact:
            yield make_file_issue(file, "exact duplicate", named, "exclude", related=(other.id,))
        else:
            advised: Action = "exclude" if not file.split else "none"  # a division could put them on both sides
            yield make_file_issue(file, "near-duplicate", named, advised, related=(other.id,), score=score)


def _find_conflicting_labels(
    ordered: Sequence[int], members: Mapping[int, DataFile], pairs: Sequence[DuplicatePair]
) -> Iterator[Issue]:
    """Issues of files that show the same picture under several labels, the nearest named first."""
    names = " and ".join(f"'{label}'" for label in sorted({file.label for file in members.values()}))
    same = all(each.exact for each in pairs)
    for place in ordered:
        file = members[place]
        nearest, pair = _most_similar(place, pairs)
        leaks = file.split != members[ordered[0]].split
        action: Action = "exclude" if leaks or (same and file.split in ("", "train")) else "review"
        others = (nearest, *(each for each in ordered if each not in (place, nearest)))
        yield make_file_issue(
            file,
            "conflicting labels",
            f"the same picture is labelled {names}",
            action,
            related=tuple(members[each].id for each in others),
            score=None if pair.exact else pair.correlation,
        )


def _most_similar(
    place: int, copies: Sequence[DuplicatePair], preferred: Container[int] = ()
) -> tuple[int, DuplicatePair]:
    """The file that one is most like, of those preferred where it is like any; and how much."""
    pairs = [
        (each.second if each.first == place else each.first, each)
        for each in copies
        if place in (each.first, each.second)
    ]
    return max(pairs, key=lambda pair: (pair[0] in preferred, pair[1].exact, pair[1].correlation))


def find_class_issues(files: Sequence[DataFile], empty: Sequence[tuple[str, str]]) -> Iterator[Issue]:
    """Issues of whole classes: empty, tiny, or not in every split."""
    counts = count_by_class(files)
    for split, label in empty:
        yield Issue("class", "", split, label, "its folder holds no picture that can be used", "review")
    learnt = counts.get("train") or counts.get("") or {}
    for split, by_label in counts.items():
        for label, count in sorted(by_label.items()):
            if split in ("", "train") and count < MIN_CLASS_SIZE:
                yield Issue("class", "", split, label, f"it has {count} picture{'s' * (count > 1)}", "review")
            elif label not in learnt:
                yield Issue("class", "", split, label, f"{split} has it, train has not", "review")
        if split not in ("", "train"):
            for label in sorted(set(learnt) - set(by_label)):
                yield Issue("class", "", split, label, f"train has it, {split} has not", "review")


def count_by_class(files: Sequence[DataFile]) -> Mapping[str, Mapping[str, int]]:
    """Pictures by split and class."""
    counts: dict[str, Counter[str]] = {}
    for file in files:
        counts.setdefault(file.split, Counter())[file.label] += 1
    return counts
