"""Issues as plain data: one per file or class, with the suggested action."""

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
    "duplicates": ("exact duplicate", "near-duplicate", "leak", "conflicting labels"),
    "labels": ("label issue",),
}
"""Values of `--fix`, and the kinds of issue whose files each excludes."""

MIN_CLASS_SIZE = 5
"""A class with fewer images is reported: it is too small to be split and to have its labels checked."""

SPLIT_PRIORITY = {"test": 0, "val": 1, "train": 2, "": 2}
"""Of duplicates in several splits, those in the split with the lowest number are kept."""


@attrs.frozen
class Issue:
    """One issue of a file or of a class.

    Args:
        kind: Kind of issue.
        path: Printable name of the file; empty for an issue of a class.
        split: Split of the file or class; empty if the data has no splits yet.
        label: Class of the file, or the class itself.
        why: The reason, in words that complete "because ...".
        action: Suggested action.
        related: Printable names of further files that are concerned.
        score: Similarity of near-duplicates or confidence of a label issue, 0 to 1; None if the issue is certain.
    """

    kind: Kind
    path: str
    split: str
    label: str
    why: str
    action: Action
    related: tuple[str, ...] = ()
    score: float | None = None


def make_file_issue(
    file: DataFile,
    kind: Kind,
    why: str,
    action: Action,
    *,
    related: tuple[str, ...] = (),
    score: float | None = None,
) -> Issue:
    """Return an issue of one file; arguments are those of `Issue`."""
    return Issue(kind, file.id, file.split, file.label, why, action, related, score)


def find_duplicate_issues(members: Mapping[int, DataFile], pairs: Sequence[DuplicatePair]) -> Iterator[Issue]:
    """Yield the issues of one group of files that show the same image.

    Files in the test split are kept, then those in the validation split. Each issue names the most similar file of
    those that stay. Pairs join in chains whose ends can be less similar; a file that pairs with none of these names
    its neighbor in the chain too.

    Args:
        members: Two or more files by index.
        pairs: The pairs of duplicates that connect them.
    """
    ordered = sorted(members, key=lambda index: SPLIT_PRIORITY[members[index].split])
    if len({file.label for file in members.values()}) > 1:
        yield from _find_conflicting_labels(ordered, members, pairs)
        return
    first = members[ordered[0]]
    staying = {ordered[0]}
    for index in ordered[1:]:
        file = members[index]
        kept = {each for each in staying if SPLIT_PRIORITY[members[each].split] < SPLIT_PRIORITY[file.split]}
        nearest, pair = _most_similar(index, pairs, kept or (() if file.split else staying))
        if pair.exact and not kept:
            nearest, pair = _most_similar(index, [each for each in pairs if each.exact], staying)
        other = members[nearest]
        why = f"it is an exact duplicate of '{other.id}'" if pair.exact else f"it nearly equals '{other.id}'"
        related: tuple[str, ...] = (other.id,)
        action: Action = "exclude"
        if kept:
            kind: Kind = "leak"
        elif pair.exact:
            kind = "exact duplicate"
        else:
            kind = "near-duplicate"
            action = "exclude" if not file.split else "none"  # a later split could separate the two
        if action == "none":
            staying.add(index)
        elif nearest not in (kept or staying):
            where = f" in {first.split}" if kept else ""
            why, related = f"{why}, which is connected by near-duplicates to '{first.id}'{where}", (other.id, first.id)
        elif kept:
            why = f"{why}, which is in {other.split}"
        yield make_file_issue(file, kind, why, action, related=related, score=None if pair.exact else pair.correlation)


def _find_conflicting_labels(
    ordered: Sequence[int], members: Mapping[int, DataFile], pairs: Sequence[DuplicatePair]
) -> Iterator[Issue]:
    """Yield the issues of files that show the same image with different labels; the most similar is named first."""
    labels = " and ".join(f"'{label}'" for label in sorted({file.label for file in members.values()}))
    all_exact = all(pair.exact for pair in pairs)
    for index in ordered:
        file = members[index]
        nearest, pair = _most_similar(index, pairs)
        leaks = file.split != members[ordered[0]].split
        action: Action = "exclude" if leaks or (all_exact and file.split in ("", "train")) else "review"
        others = (nearest, *(each for each in ordered if each not in (index, nearest)))
        yield make_file_issue(
            file,
            "conflicting labels",
            f"the same image has the labels {labels}",
            action,
            related=tuple(members[each].id for each in others),
            score=None if pair.exact else pair.correlation,
        )


def _most_similar(
    index: int, pairs: Sequence[DuplicatePair], preferred: Container[int] = ()
) -> tuple[int, DuplicatePair]:
    """Return the most similar file that `index` pairs with, one of `preferred` if there is any, and their pair."""
    candidates = [
        (pair.second if pair.first == index else pair.first, pair)
        for pair in pairs
        if index in (pair.first, pair.second)
    ]
    return max(candidates, key=lambda each: (each[0] in preferred, each[1].exact, each[1].correlation))


def find_class_issues(files: Sequence[DataFile], empty: Sequence[tuple[str, str]]) -> Iterator[Issue]:
    """Yield the issues of classes that are empty, small, or not in every split.

    Args:
        files: The usable files.
        empty: Split and label of the class folders without a usable file.
    """
    counts = count_by_class(files)
    for split, label in empty:
        yield Issue("class", "", split, label, "its folder contains no usable image", "review")
    train_labels = counts.get("train") or counts.get("") or {}
    for split, by_label in counts.items():
        for label, count in sorted(by_label.items()):
            if split in ("", "train") and count < MIN_CLASS_SIZE:
                yield Issue("class", "", split, label, f"it has {count} image{'s' * (count > 1)}", "review")
            elif label not in train_labels:
                yield Issue("class", "", split, label, f"it occurs in {split} but not in train", "review")
        if split not in ("", "train"):
            for label in sorted(set(train_labels) - set(by_label)):
                yield Issue("class", "", split, label, f"it occurs in train but not in {split}", "review")


def count_by_class(files: Sequence[DataFile]) -> Mapping[str, Mapping[str, int]]:
    """Count images by split and class."""
    counts: dict[str, Counter[str]] = {}
    for file in files:
        counts.setdefault(file.split, Counter())[file.label] += 1
    return counts
