"""Render the result of a check: a self-contained HTML report with thumbnails, and one line per issue for terminals."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2

from tuneforge.errors import escape_name
from tuneforge.plugin import scan_images
from tuneforge_datacheck.check import Findings
from tuneforge_datacheck.issues import Issue, count_by_class

MAX_SHOWN = 60
"""Maximum number of issues of each kind in the report; `issues.json` lists all of them."""

_TITLES = {
    "unusable": "Unusable files",
    "leak": "Duplicates across splits",
    "conflicting labels": "Duplicates with different labels",
    "label issue": "Label issues",
    "exact duplicate": "Exact duplicates",
    "near-duplicate": "Near-duplicates",
    "class": "Class issues",
    "not used": "Files that a run does not use",
}
_DESCRIPTIONS = {
    "leak": "The training split contains these validation or test images, so metrics on them are too optimistic.",
    "label issue": "A model that was fitted on the other images predicts another class. Review the images before you "
    "exclude them.",
    "near-duplicate": "Near-duplicates within one split are harmless; a random split could separate them.",
}


def render_report(findings: Findings, *, memory_mb: int, timeout_s: float) -> str:
    """Return the HTML report; images are decoded in sandboxed processes and all text is escaped.

    Args:
        findings: Result of a check.
        memory_mb: Memory limit of the processes that decode images, in MB.
        timeout_s: Time limit for each image, in seconds.
    """
    by_kind = {kind: [issue for issue in findings.issues if issue.kind == kind] for kind in _TITLES}
    shown_issues = {kind: issues[:MAX_SHOWN] for kind, issues in by_kind.items() if issues}
    ids = {each for issues in shown_issues.values() for issue in issues for each in (issue.path, *issue.related[:1])}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        root=escape_name(findings.root),
        num_files=len(findings.files),
        num_usable=len(findings.usable),
        notes=findings.notes,
        sections=[
            (kind, _TITLES[kind], _DESCRIPTIONS.get(kind, ""), issues, len(by_kind[kind]))
            for kind, issues in shown_issues.items()
        ],
        thumbnails=_render_thumbnails(findings, ids, memory_mb=memory_mb, timeout_s=timeout_s),
        classes=_count_classes(findings),
        splits=[split or "all" for split in _count_by_split(findings)],
    )
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", html)


def format_issue(issue: Issue) -> str:
    """Return one line: the file or class, the reason and the suggested action."""
    subject = issue.path or "class '{}'{}".format(issue.label, f" of {issue.split}" if issue.split else "")
    score = "" if issue.score is None else f" ({100 * issue.score:.0f} %)"
    action = "" if issue.action == "none" else f"; {issue.action}"
    return f"{subject}: {issue.why}{score}{action}"


def _render_thumbnails(findings: Findings, ids: Iterable[str], *, memory_mb: int, timeout_s: float) -> dict[str, str]:
    """Return a PNG in base64 for each of the usable files among `ids`."""
    names = {file.id: file.name for file in findings.usable}
    shown = [each for each in sorted(ids) if each in names]
    paths = [os.path.join(findings.root, names[each]) for each in shown]
    scans = scan_images(paths, preview=True, memory_mb=memory_mb, timeout_s=timeout_s)
    return {each: scan.preview for each, scan in zip(shown, scans, strict=True) if scan.preview is not None}


def _count_by_split(findings: Findings) -> dict[str, Mapping[str, int]]:
    """Count images by split, in the order train, val, test, and class."""
    counts = count_by_class(findings.usable)
    return {split: counts[split] for split in ("", "train", "val", "test") if split in counts}


def _count_classes(findings: Findings) -> list[tuple[str, list[int]]]:
    """Return each class with its number of images in every split."""
    counts = _count_by_split(findings)
    labels = sorted({label for by_label in counts.values() for label in by_label})
    return [(label, [by_label.get(label, 0) for by_label in counts.values()]) for label in labels]
