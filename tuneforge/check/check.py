"""The check of picture data, as a story: list every file, look at each, compare them, doubt the labels, advise."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from tuneforge.builtin.datasets.images.sample_names import shown
from tuneforge.builtin.datasets.images.scan import MEMORY_MB, SECONDS, Verdict, scan
from tuneforge.check.copies import Copy, near_copies, sets_of
from tuneforge.check.files import Columns, File, empty_classes, files_of
from tuneforge.check.issues import FIXES, KEPT_FIRST, Issue, counted, of_classes, of_copies, of_file
from tuneforge.check.labels import LEAST_SKILL, doubts, features_of_run, pixels

SMALLEST_COMPARED = 48
"""Least side, in pixels, of pictures that are compared for near copies: smaller ones look alike too easily."""

SMALLEST_COPY = 32
"""The same of a picture that is compared with larger ones: copies are often made smaller."""


@attrs.frozen
class Findings:
    """What a check found.

    Args:
        root: What names start from.
        files: Every entry.
        fine: Those that can be used.
        issues: What is wrong, in the order of files, then classes.
        copies: Sets of files that show the same picture, by their ids.
        notes: Sentences on how it was judged.
    """

    root: Path
    files: Sequence[File]
    fine: Sequence[File]
    issues: Sequence[Issue]
    copies: Sequence[Sequence[str]]
    notes: Sequence[str]

    def plain(self) -> dict[str, Any]:
        """The content of `issues.json`."""
        return {
            "version": 1,
            "root": shown(self.root.resolve()),
            "files": len(self.files),
            "fine": len(self.fine),
            "classes": {split or "all": dict(counts) for split, counts in counted(self.fine).items()},
            "notes": list(self.notes),
            "copies": [list(members) for members in self.copies],
            "issues": [attrs.asdict(issue) for issue in self.issues],
        }


def check(
    path: Path,
    *,
    columns: Columns | None = None,
    run: Path | None = None,
    memory_mb: int = MEMORY_MB,
    seconds: float = SECONDS,
    near: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Findings:
    """Check a folder or a CSV file of pictures; nothing is changed.

    Args:
        path: The folder or the file.
        columns: Of the CSV file.
        run: A finished run, whose model's features the labels are judged by; None: by small pictures.
        memory_mb: Memory for looking at a file, in MB.
        seconds: Time for looking at a file.
        near: Compare every picture with every other for near copies.
        say: Where sentences on the progress go.

    Raises:
        DataError: There is nothing at the path, or it is neither.
        FolderError: The run is not one that is finished.
    """
    root, files = files_of(path, columns)
    looked_at = [file for file in files if not file.unused]
    say(f"looking at {len(looked_at):,} of {len(files):,} files")
    verdicts = scan(
        [os.path.join(root, file.name) for file in looked_at], small=True, memory_mb=memory_mb, seconds=seconds
    )
    seen = dict(zip((file.name for file in looked_at), verdicts, strict=True))
    issues = [of_file(file, "not used", file.unused, "leave out") for file in files if file.unused]
    issues += [of_file(file, "unusable", seen[file.name].why, "leave out") for file in looked_at if seen[file.name].why]
    fine = [file for file in looked_at if not seen[file.name].why]
    views = [seen[file.name] for file in fine]
    say(f"comparing {len(fine):,} pictures")
    copied, sets = _copies(fine, views, near=near)
    say("judging labels")
    doubted, notes = _doubted(root, fine, views, run)
    issues += [*copied, *doubted]
    place = {file.id: number for number, file in enumerate(files)}
    issues.sort(key=lambda issue: place[issue.path])
    issues += of_classes(fine, empty_classes(path, fine))
    return Findings(root, files, fine, issues, sets, notes)


def cleaned(findings: Findings, kinds: Sequence[str]) -> str:
    """A CSV file for `--data image-csv`, of what is left without the files that are advised to be left out.

    Args:
        findings: Of a check.
        kinds: Which advice is followed: of `FIXES`.
    """
    divided = any(file.split for file in findings.fine)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", *(["split"] if divided else [])])
    root = findings.root.resolve()
    for file in left(findings, kinds):
        writer.writerow([os.path.join(root, file.name), file.label, *([file.split] if divided else [])])
    return text.getvalue()


def left(findings: Findings, kinds: Sequence[str] = tuple(FIXES)) -> list[File]:
    """The files that remain once the advice is followed.

    Args:
        findings: Of a check.
        kinds: Which advice: of `FIXES`.
    """
    followed = {kind for name in kinds for kind in FIXES[name]}
    gone = {issue.path for issue in findings.issues if issue.action == "leave out" and issue.kind in followed}
    return [file for file in findings.fine if file.id not in gone]


def _copies(fine: Sequence[File], views: Sequence[Verdict], *, near: bool) -> tuple[list[Issue], list[list[str]]]:
    """Issues of copies, and the sets of files that show the same picture."""
    by_digest: dict[str, list[int]] = {}
    for place in sorted(range(len(fine)), key=lambda place: KEPT_FIRST[fine[place].split]):
        by_digest.setdefault(views[place].digest, []).append(place)
    copies = [Copy(kept, each, 1.0, exact=True) for kept, *others in by_digest.values() for each in others]
    side = [min(view.size) for view in views]
    single = sorted(kept for kept, *_ in by_digest.values() if near and side[kept] >= SMALLEST_COPY)
    if len(single) > 1 and max(side[place] for place in single) >= SMALLEST_COMPARED:
        found = near_copies(_stacked(views, single, "grey_yx"), _stacked(views, single, "colour_yxc"))
        placed = [attrs.evolve(each, first=single[each.first], second=single[each.second]) for each in found]
        copies += [each for each in placed if max(side[each.first], side[each.second]) >= SMALLEST_COMPARED]
    issues: list[Issue] = []
    sets = sets_of([(each.first, each.second) for each in copies])
    number = {place: number for number, members in enumerate(sets) for place in members}
    joins: list[list[Copy]] = [[] for _ in sets]
    for each in copies:
        joins[number[each.first]].append(each)
    for members, joined in zip(sets, joins, strict=True):
        issues += of_copies({place: fine[place] for place in members}, joined)
    return issues, [[fine[place].id for place in members] for members in sets]


def _doubted(
    root: Path, fine: Sequence[File], views: Sequence[Verdict], run: Path | None
) -> tuple[list[Issue], list[str]]:
    """Issues of labels that are likely wrong, and how they were judged."""
    names = sorted({file.label for file in fine})
    codes = np.array([names.index(file.label) for file in fine], dtype=np.int64)
    if len(names) < 2:
        return [], ["labels were not judged: there is only one class"]
    if run is None:
        by, features = "small pictures", pixels(_stacked(views, range(len(views)), "colour_yxc"))
    else:
        by, features = f"the features of {run}", features_of_run(run, [os.path.join(root, file.name) for file in fine])
    found = doubts(features, codes)
    if found is None:
        return [], ["labels were not judged: fewer than two classes have enough pictures"]
    agreed = f"{found.judged:,} labels were judged by {by}, which agree with {100 * found.accuracy:.1f} % of them"
    if found.skill < LEAST_SKILL:
        return [], [f"{agreed}: too few to doubt any; give a finished run's features with --run"]
    issues = []
    for row, code, margin in zip(found.rows, found.suggested, found.margins, strict=True):
        file = fine[row]
        action: Any = "look at it" if file.split in ("val", "test") else "leave out"
        why = f"it looks like '{names[code]}'"
        issues.append(of_file(file, "wrong label", why, action, score=round(float(margin), 4)))
    return issues, [agreed]


def _stacked(views: Sequence[Verdict], places: Sequence[int], name: str) -> NDArray[np.uint8]:
    return np.stack([getattr(views[place], name) for place in places]) if places else np.zeros((0, 1, 1, 1), np.uint8)
