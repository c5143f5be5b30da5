"""The page of a check: one file that needs nothing else, with pictures of what was found."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import jinja2

from tuneforge.builtin.datasets.images.scan import inspect_image, render_preview
from tuneforge.errors import escape_name
from tuneforge.sandbox import Sandbox
from tuneforge_datacheck.check import Findings
from tuneforge_datacheck.issues import Issue, count_by_class

MAX_SHOWN = 60
"""Issues of each kind that the page shows with pictures; `issues.json` has all of them."""

_TITLES = {
    "unusable": "Files that cannot be used",
    "leak": "Copies across splits",
    "conflicting labels": "The same picture with two labels",
    "label issue": "Labels that are likely wrong",
    "exact duplicate": "The same file twice",
    "near-duplicate": "Nearly the same picture",
    "class": "Classes",
    "not used": "Files that a run does not use",
}
_ABOUT = {
    "leak": "A model is tested on what it has learnt from, so its test figures are too good.",
    "label issue": "Other pictures that look like these are labelled otherwise. Look before you leave them out.",
    "near-duplicate": "Harmless within training; a division of the data could put them on both sides.",
}


def render_report(findings: Findings, *, memory_mb: int, timeout_s: float) -> str:
    """The HTML; pictures are decoded in a process with limits, and everything that is shown is escaped.

    Args:
        findings: Of a check.
        memory_mb: Memory of that process, in MB.
        timeout_s: Time for a picture.
    """
    by_kind = {kind: [issue for issue in findings.issues if issue.kind == kind] for kind in _TITLES}
    shown_issues = {kind: issues[:MAX_SHOWN] for kind, issues in by_kind.items() if issues}
    named = {each for issues in shown_issues.values() for issue in issues for each in (issue.path, *issue.related[:1])}
    with Sandbox(
        f"{inspect_image.__module__}:{inspect_image.__name__}", memory_mb=memory_mb, timeout_s=timeout_s
    ) as process:
        thumbnails = _render_thumbnails(process, findings, named)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        root=escape_name(findings.root),
        files=len(findings.files),
        usable=len(findings.usable),
        notes=findings.notes,
        sections=[
            (kind, _TITLES[kind], _ABOUT.get(kind, ""), issues, len(by_kind[kind]))
            for kind, issues in shown_issues.items()
        ],
        thumbnails=thumbnails,
        classes=_count_classes(findings),
        splits=[split or "all" for split in count_by_class(findings.usable)],
    )
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", html)


def format_issue(issue: Issue) -> str:
    """One line for a terminal: the file or class, the reason, the advice."""
    place = issue.path or "class '{}'{}".format(issue.label, f" of {issue.split}" if issue.split else "")
    score = "" if issue.score is None else f" ({100 * issue.score:.0f} %)"
    advice = "" if issue.action == "none" else f"; {issue.action}"
    return f"{place}: {issue.why}{score}{advice}"


def _render_thumbnails(process: Sandbox, findings: Findings, ids: Iterable[str]) -> dict[str, str]:
    names = {file.id: file.name for file in findings.usable}
    wanted = {each: names[each] for each in sorted(ids) if each in names}
    made = ((each, render_preview(process, os.path.join(findings.root, name))) for each, name in wanted.items())
    return {each: png for each, png in made if png is not None}


def _count_classes(findings: Findings) -> list[tuple[str, list[int]]]:
    """Each class with its number of pictures in every split."""
    counts = count_by_class(findings.usable)
    labels = sorted({label for by_label in counts.values() for label in by_label})
    return [(label, [by_label.get(label, 0) for by_label in counts.values()]) for label in labels]
