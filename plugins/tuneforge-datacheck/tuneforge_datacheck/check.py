"""Check image data: list the files, open each in a sandbox, find duplicates, check the labels, suggest actions."""

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

from tuneforge.errors import escape_name
from tuneforge.plugin import ImageScan, scan_images
from tuneforge_datacheck.files import CsvColumns, DataFile, find_empty_classes, list_files
from tuneforge_datacheck.issues import (
    FIXES,
    SPLIT_PRIORITY,
    Action,
    Issue,
    count_by_class,
    find_class_issues,
    find_duplicate_issues,
    make_file_issue,
)
from tuneforge_datacheck.label_issues import MIN_SKILL, extract_run_features, find_label_issues, pixel_features
from tuneforge_datacheck.near_duplicates import DuplicatePair, connected_components, find_near_duplicates

MEMORY_MB = 300
"""Default memory limit of the processes that open files, in MB."""

TIMEOUT_S = 4.0
"""Default time limit for each file, in seconds."""

MIN_COMPARED_SIDE = 48
"""Minimum side, in pixels, of the larger image of near-duplicates; smaller images resemble one another too easily."""

MIN_DUPLICATE_SIDE = 32
"""Minimum side, in pixels, of the smaller image of near-duplicates, which is often a reduced version."""


@attrs.frozen
class Findings:
    """The result of a check.

    Args:
        root: Directory that names are relative to.
        files: All files.
        usable: The files that can be used.
        issues: Issues of files in the order of files, then issues of classes.
        duplicates: Groups of files that show the same image, by printable name.
        notes: Sentences on how the labels were checked.
    """

    root: Path
    files: Sequence[DataFile]
    usable: Sequence[DataFile]
    issues: Sequence[Issue]
    duplicates: Sequence[Sequence[str]]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `issues.json`."""
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
    """Check the images of a folder or a CSV file; no file is changed.

    Args:
        path: The folder or the CSV file.
        columns: Names of the columns of the CSV file.
        run: Run directory of a finished run, whose model computes the features that labels are checked with; None for
            the pixels of thumbnails.
        memory_mb: Memory limit of the processes that open files, in MB.
        timeout_s: Time limit for each file, in seconds.
        near_duplicates: Compare every image with every other to find near-duplicates.
        log: Called with a line on the progress.

    Raises:
        DataError: Nothing exists at the path, or it is neither a folder nor a CSV file.
        FolderError: `run` is not the directory of a finished run.
    """
    root, files = list_files(path, columns)
    candidates = [file for file in files if not file.unused_reason]
    log(f"opening {len(candidates):,} of {len(files):,} files")
    results = scan_images(
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
    log(f"comparing {len(usable):,} images")
    duplicate_issues, groups = _find_duplicates(usable, scans, near_duplicates=near_duplicates)
    log("checking labels")
    label_issues, notes = _check_labels(root, usable, scans, run)
    issues += [*duplicate_issues, *label_issues]
    position = {file.id: number for number, file in enumerate(files)}
    issues.sort(key=lambda issue: position[issue.path])
    issues += find_class_issues(usable, find_empty_classes(path, usable))
    return Findings(root, files, usable, issues, groups, notes)


def to_cleaned_csv(findings: Findings, fixes: Sequence[str]) -> str:
    """Return a CSV file for `--data image-csv` that lists the usable files without those to exclude.

    Args:
        findings: Result of a check.
        fixes: Keys of `FIXES`: which suggestions are followed.
    """
    has_splits = any(file.split for file in findings.usable)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", *(["split"] if has_splits else [])])
    root = findings.root.resolve()
    for file in select_remaining(findings, fixes):
        writer.writerow([os.path.join(root, file.name), file.label, *([file.split] if has_splits else [])])
    return text.getvalue()


def select_remaining(findings: Findings, fixes: Sequence[str] = tuple(FIXES)) -> list[DataFile]:
    """Return the usable files without those whose issues suggest to exclude them.

    Args:
        findings: Result of a check.
        fixes: Keys of `FIXES`: which suggestions are followed.
    """
    kinds = {kind for fix in fixes for kind in FIXES[fix]}
    excluded = {issue.path for issue in findings.issues if issue.action == "exclude" and issue.kind in kinds}
    return [file for file in findings.usable if file.id not in excluded]


def _find_duplicates(
    usable: Sequence[DataFile], scans: Sequence[ImageScan], *, near_duplicates: bool
) -> tuple[list[Issue], list[list[str]]]:
    """Return the issues of duplicates and near-duplicates, and the groups of files that show the same image."""
    by_digest: dict[str, list[int]] = {}
    for index in sorted(range(len(usable)), key=lambda index: SPLIT_PRIORITY[usable[index].split]):
        by_digest.setdefault(scans[index].digest, []).append(index)
    pairs = [DuplicatePair(first, each, 1.0, exact=True) for first, *others in by_digest.values() for each in others]
    side = [min(scan.size) for scan in scans]
    distinct = sorted(
        first for first, *_ in by_digest.values() if near_duplicates and side[first] >= MIN_DUPLICATE_SIDE
    )
    if len(distinct) > 1 and max(side[index] for index in distinct) >= MIN_COMPARED_SIDE:
        near = find_near_duplicates(
            _stack_thumbnails(scans, distinct, "gray_hw"), _stack_thumbnails(scans, distinct, "color_hwc")
        )
        near = [attrs.evolve(pair, first=distinct[pair.first], second=distinct[pair.second]) for pair in near]
        pairs += [pair for pair in near if max(side[pair.first], side[pair.second]) >= MIN_COMPARED_SIDE]
    issues: list[Issue] = []
    groups = connected_components([(pair.first, pair.second) for pair in pairs])
    group_of = {index: number for number, members in enumerate(groups) for index in members}
    pairs_by_group: list[list[DuplicatePair]] = [[] for _ in groups]
    for pair in pairs:
        pairs_by_group[group_of[pair.first]].append(pair)
    for members, own_pairs in zip(groups, pairs_by_group, strict=True):
        issues += find_duplicate_issues({index: usable[index] for index in members}, own_pairs)
    return issues, [[usable[index].id for index in members] for members in groups]


def _check_labels(
    root: Path, usable: Sequence[DataFile], scans: Sequence[ImageScan], run: Path | None
) -> tuple[list[Issue], list[str]]:
    """Return the label issues, and sentences on how the labels were checked."""
    classes = sorted({file.label for file in usable})
    class_index = {label: index for index, label in enumerate(classes)}
    labels = np.array([class_index[file.label] for file in usable], dtype=np.int64)
    if len(classes) < 2:
        return [], ["labels were not checked: there is only one class"]
    if run is None:
        source, features = "pixels", pixel_features(_stack_thumbnails(scans, range(len(scans)), "color_hwc"))
    else:
        source = f"the features of {run}"
        features = extract_run_features(run, [os.path.join(root, file.name) for file in usable])
    result = find_label_issues(features, labels)
    if result is None:
        return [], ["labels were not checked: fewer than two classes have enough images"]
    note = (
        f"{result.num_checked:,} labels were checked: cross-validated predictions from {source} have an accuracy of "
        f"{100 * result.accuracy:.1f} %"
    )
    if result.skill < MIN_SKILL:
        return [], [f"{note}, which is too low to report label issues; use the features of a finished run with --run"]
    issues = []
    for row, suggested, margin in zip(result.rows, result.suggested_classes, result.margins, strict=True):
        file = usable[row]
        action: Action = "review" if file.split in ("val", "test") else "exclude"
        why = f"it is predicted as '{classes[suggested]}'"
        issues.append(make_file_issue(file, "label issue", why, action, score=round(float(margin), 4)))
    return issues, [note]


def _stack_thumbnails(scans: Sequence[ImageScan], indices: Sequence[int], name: str) -> NDArray[np.uint8]:
    return np.stack([getattr(scans[index], name) for index in indices]) if indices else np.zeros((0, 1, 1, 1), np.uint8)
