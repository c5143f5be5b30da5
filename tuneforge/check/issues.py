"""What a check found, as plain data: one issue a file, and what is advised about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import attrs

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

_KEPT_FIRST = {"test": 0, "val": 1, "train": 2, "": 2}


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


def of_copies(members: Sequence[File], *, exact: bool, likeness: float) -> Iterator[Issue]:
    """Issues of files that show the same picture; those of the test are kept, then those of validation.

    Args:
        members: Two or more.
        exact: Their bytes are the same.
        likeness: Of the least alike pair that joins them, 0 to 1.
    """
    ordered = sorted(members, key=lambda file: _KEPT_FIRST[file.split])
    first, *rest = ordered
    score = None if exact else likeness
    if len({file.label for file in members}) > 1:
        names = " and ".join(f"'{label}'" for label in sorted({file.label for file in members}))
        for file in ordered:
            leaks = file.split != first.split
            action: Action = "leave out" if leaks or (exact and file.split in ("", "train")) else "look at it"
            others = tuple(other.id for other in ordered if other is not file)
            why = f"the same picture is labelled {names}"
            yield of_file(file, "two labels", why, action, others=others, score=score)
        return
    for file in rest:
        beside = "the same bytes as" if exact else "nearly the same picture as"
        why = f"it has {beside} '{first.id}'" if exact else f"it is {beside} '{first.id}'"
        if file.split != first.split:
            yield of_file(
                file, "leak", f"{why}, which is in {first.split}", "leave out", others=(first.id,), score=score
            )
        elif exact:
            yield of_file(file, "same bytes", why, "leave out", others=(first.id,))
        else:
            advised: Action = "leave out" if not file.split else "none"  # a division could put them on both sides
            yield of_file(file, "near copy", why, advised, others=(first.id,), score=score)


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
