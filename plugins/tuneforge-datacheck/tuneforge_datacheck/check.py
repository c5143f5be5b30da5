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

from tuneforge.builtin.datasets.images.scan import MEMORY_MB, TIMEOUT_S, ScanResult, scan
from tuneforge.errors import escape_name
from tuneforge_datacheck.files import CsvColumns, DataFile, find_empty_classes, list_files
from tuneforge_datacheck.issues import (
    FIXES,
    SPLIT_PRIORITY,
    Issue,
    count_by_class,
    find_class_issues,
    find_duplicate_issues,
    make_file_issue,
)
from tuneforge_datacheck.label_issues import MIN_SKILL, extract_run_features, find_label_issues, pixel_features
from tuneforge_datacheck.near_duplicates import DuplicatePair, connected_components, find_near_duplicates

MIN_COMPARED_SIDE = 48
"""Least side, in pixels, of pictures that are compared for near copies: smaller ones look alike too easily."""

MIN_DUPLICATE_SIDE = 32
"""The same of a picture that is compared with larger ones: copies are often made smaller."""


@attrs.frozen
class Findings:
    """What a check found.

    Args:
        root: What names start from.
        files: Every entry.
        usable: Those that can be used.
        issues: What is wrong, in the order of files, then classes.
        duplicates: Sets of files that show the same picture, by their ids.
        notes: Sentences on how it was judged.
    """

    root: Path
    files: Sequence[DataFile]
    usable: Sequence[DataFile]
    issues: Sequence[Issue]
    duplicates: Sequence[Sequence[str]]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """The content of `issues.json`."""
        return {
            "version": 1,
            "root": escape_name(self.root.resolve()),
            "files": len(self.files),
            "usable": len(self.usable),
            "classes": {split or "all": dict(counts) for split, counts in count_by_class(self.usable).items()},
            "notes": list(self.notes),
            "duplicates": [list(members) for members in self.duplicates],
            "issues": [attrs.asdict(issue) for issue in self.issues],
        }


def check_images(
    path: Path,
    *,
    columns: CsvColumns | None = None,
    run: Path | None = None,
    memory_mb: int = MEMORY_MB,
    timeout_s: float = TIMEOUT_S,
    near_duplicates: bool = True,
    log: Callable[[str], None] = lambda text: None,
) -> Findings:
    """Check a folder or a CSV file of pictures; nothing is changed.

    Args:
        path: The folder or the file.
        columns: Of the CSV file.
        run: A finished run, whose model's features the labels are judged by; None: by small pictures.
        memory_mb: Memory for looking at a file, in MB.
        timeout_s: Time for looking at a file.
        near_duplicates: Compare every picture with every other for near copies.
        log: Where sentences on the progress go.

    Raises:
        DataError: There is nothing at the path, or it is neither.
        FolderError: The run is not one that is finished.
    """
    root, files = list_files(path, columns)
    candidates = [file for file in files if not file.unused_reason]
    log(f"looking at {len(candidates):,} of {len(files):,} files")
    results = scan(
        [os.path.join(root, file.name) for file in candidates],
        thumbnails=True,
        memory_mb=memory_mb,
        timeout_s=timeout_s,
    )
    scan_by_name = dict(zip((file.name for file in candidates), results, strict=True))
    issues = [make_file_issue(file, "not used", file.unused_reason, "exclude") for file in files if file.unused_reason]
    issues += [
        make_file_issue(file, "unusable", scan_by_name[file.name].why, "exclude")
        for file in candidates
        if scan_by_name[file.name].why
    ]
    usable = [file for file in candidates if not scan_by_name[file.name].why]
    scans = [scan_by_name[file.name] for file in usable]
    log(f"comparing {len(usable):,} pictures")
    copied, sets = _find_duplicates(usable, scans, near_duplicates=near_duplicates)
    log("judging labels")
    doubted, notes = _check_labels(root, usable, scans, run)
    issues += [*copied, *doubted]
    place = {file.id: number for number, file in enumerate(files)}
    issues.sort(key=lambda issue: place[issue.path])
    issues += find_class_issues(usable, find_empty_classes(path, usable))
    return Findings(root, files, usable, issues, sets, notes)


def to_cleaned_csv(findings: Findings, kinds: Sequence[str]) -> str:
    """A CSV file for `--data image-csv`, of what is left without the files that are advised to be left out.

    Args:
        findings: Of a check.
        kinds: Which advice is followed: of `FIXES`.
    """
    divided = any(file.split for file in findings.usable)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", *(["split"] if divided else [])])
    root = findings.root.resolve()
    for file in select_remaining(findings, kinds):
        writer.writerow([os.path.join(root, file.name), file.label, *([file.split] if divided else [])])
    return text.getvalue()


def select_remaining(findings: Findings, kinds: Sequence[str] = tuple(FIXES)) -> list[DataFile]:
    """The files that remain once the advice is followed.

    Args:
        findings: Of a check.
        kinds: Which advice: of `FIXES`.
    """
    selected = {kind for name in kinds for kind in FIXES[name]}
    excluded = {issue.path for issue in findings.issues if issue.action == "exclude" and issue.kind in selected}
    return [file for file in findings.usable if file.id not in excluded]


def _find_duplicates(
    usable: Sequence[DataFile], scans: Sequence[ScanResult], *, near_duplicates: bool
) -> tuple[list[Issue], list[list[str]]]:
    """Issues of copies, and the sets of files that show the same picture."""
    by_digest: dict[str, list[int]] = {}
    for place in sorted(range(len(usable)), key=lambda place: SPLIT_PRIORITY[usable[place].split]):
        by_digest.setdefault(scans[place].digest, []).append(place)
    pairs = [DuplicatePair(kept, each, 1.0, exact=True) for kept, *others in by_digest.values() for each in others]
    side = [min(view.size) for view in scans]
    single = sorted(kept for kept, *_ in by_digest.values() if near_duplicates and side[kept] >= MIN_DUPLICATE_SIDE)
    if len(single) > 1 and max(side[place] for place in single) >= MIN_COMPARED_SIDE:
        found = find_near_duplicates(
            _stack_thumbnails(scans, single, "gray_hw"), _stack_thumbnails(scans, single, "color_hwc")
        )
        placed = [attrs.evolve(each, first=single[each.first], second=single[each.second]) for each in found]
        pairs += [each for each in placed if max(side[each.first], side[each.second]) >= MIN_COMPARED_SIDE]
    issues: list[Issue] = []
    sets = connected_components([(each.first, each.second) for each in pairs])
    number = {place: number for number, members in enumerate(sets) for place in members}
    joins: list[list[DuplicatePair]] = [[] for _ in sets]
    for each in pairs:
        joins[number[each.first]].append(each)
    for members, joined in zip(sets, joins, strict=True):
        issues += find_duplicate_issues({place: usable[place] for place in members}, joined)
    return issues, [[usable[place].id for place in members] for members in sets]


def _check_labels(
    root: Path, usable: Sequence[DataFile], scans: Sequence[ScanResult], run: Path | None
) -> tuple[list[Issue], list[str]]:
    """Issues of labels that are likely wrong, and how they were judged."""
    names = sorted({file.label for file in usable})
    codes = np.array([names.index(file.label) for file in usable], dtype=np.int64)
    if len(names) < 2:
        return [], ["labels were not judged: there is only one class"]
    if run is None:
        by, features = "small pictures", pixel_features(_stack_thumbnails(scans, range(len(scans)), "color_hwc"))
    else:
        by, features = (
            f"the features of {run}",
            extract_run_features(run, [os.path.join(root, file.name) for file in usable]),
        )
    found = find_label_issues(features, codes)
    if found is None:
        return [], ["labels were not judged: fewer than two classes have enough pictures"]
    agreed = f"{found.num_judged:,} labels were judged by {by}, which agree with {100 * found.accuracy:.1f} % of them"
    if found.skill < MIN_SKILL:
        return [], [f"{agreed}: too few to doubt any; give a finished run's features with --run"]
    issues = []
    for row, code, margin in zip(found.rows, found.suggested_codes, found.margins, strict=True):
        file = usable[row]
        action: Any = "review" if file.split in ("val", "test") else "exclude"
        why = f"it looks like '{names[code]}'"
        issues.append(make_file_issue(file, "label issue", why, action, score=round(float(margin), 4)))
    return issues, [agreed]


def _stack_thumbnails(scans: Sequence[ScanResult], indices: Sequence[int], name: str) -> NDArray[np.uint8]:
    return np.stack([getattr(scans[index], name) for index in indices]) if indices else np.zeros((0, 1, 1, 1), np.uint8)
