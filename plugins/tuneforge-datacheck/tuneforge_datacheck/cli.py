"""`tuneforge data`: what is wrong with data, before anything is trained on it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuneforge.plugin.parameter_types import FiniteFloatRange

if TYPE_CHECKING:
    from tuneforge_datacheck.check import Findings

ISSUES, REPORT, CLEANED_CSV = "issues.json", "issues.html", "cleaned.csv"
_FIXES = ("files", "copies", "labels")


@click.group()
def data() -> None:
    """Find what is wrong with pictures before anything is trained on them."""


@data.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="DIR|CSV")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data-check"),
    show_default=True,
    help="Folder for issues.json, issues.html and, with --fix, cleaned.csv.",
)
@click.option("--all", "every", is_flag=True, help="Print a line for every file, also those that are fine.")
@click.option(
    "--fix",
    is_flag=False,
    flag_value="all",
    metavar="[all|files,copies,labels]",
    help="Write a cleaned list that a run can use; no file is touched. Alone: all that is advised.",
)
@click.option(
    "--undo", is_flag=True, help="Take the cleaned list back, and files that a run has quarantined; no check."
)
@click.option(
    "--run", type=click.Path(path_type=Path), help="Judge labels by the features of this finished run's model."
)
@click.option("--near/--no-near", default=True, help="Compare every picture with every other for near copies.")
@click.option("--image", default="path", show_default=True, help="CSV: column of the pictures' paths.")
@click.option("--label", default="label", show_default=True, help="CSV: column of the class names.")
@click.option("--split", default="split", show_default=True, help="CSV: column that says train, val or test.")
@click.option("--root", type=click.Path(path_type=Path), help="CSV: folder that relative paths start from.")
@click.option(
    "--memory-mb", type=click.IntRange(64, 2**20), default=300, show_default=True, help="Memory to look at a file."
)
@click.option(
    "--seconds", type=FiniteFloatRange(min=0.1), default=4.0, show_default=True, help="Time to look at a file."
)
@click.option("--json", "as_json", is_flag=True, help="Print issues.json.")
def check(
    path: Path,
    out: Path,
    every: bool,
    fix: str | None,
    undo: bool,
    run: Path | None,
    near: bool,
    image: str,
    label: str,
    split: str,
    root: Path | None,
    memory_mb: int,
    seconds: float,
    as_json: bool,
) -> int:
    """Look at every file of DIR (a folder a class, or train, val and test of them) or of a CSV: a line for each issue.

    Found are files that cannot be used, copies, exact and near, across splits and within, classes that differ between
    splits, and labels that are likely wrong. Exits 65 where something should be left out and no list was written.

    \b
    tuneforge data check photos
    tuneforge data check photos --fix
    tuneforge run --data image-csv --data.path data-check/cleaned.csv
    """
    from tuneforge.errors import DataError, UsageError
    from tuneforge_datacheck import check as story
    from tuneforge_datacheck.files import CsvColumns

    if undo:
        _undo(path, out, root)
        return 0
    kinds = _parse_fixes(fix)
    if out.resolve().is_relative_to(path.resolve()):
        raise UsageError(
            f"'{out}' lies among the pictures", where="--out", why="they would be checked next time", fix="name another"
        )
    _prepare_output_dir(out)
    columns = CsvColumns(image, label, split, root)
    findings = story.check_images(
        path,
        columns=columns,
        run=run,
        memory_mb=memory_mb,
        timeout_s=seconds,
        near_duplicates=near,
        log=lambda text: click.echo(text, err=True),
    )
    _write(findings, out, kinds, memory_mb, seconds)
    if as_json:
        click.echo(json.dumps(findings.to_dict()))
    else:
        _print(findings, out, show_all=every, kinds=kinds)
    advised = any(issue.action == "exclude" for issue in findings.issues)
    return DataError.exit_code if advised and not kinds else 0


def _parse_fixes(text: str | None) -> list[str]:
    from tuneforge.errors import UsageError, suggest_name

    if text is None:
        return []
    fixes = list(_FIXES) if text == "all" else [each.strip() for each in text.split(",")]
    for each in fixes:
        if each not in _FIXES:
            raise UsageError(f"there is no fix '{each}'", where="--fix", fix=suggest_name(each, [*_FIXES, "all"]))
    return fixes


def _write(findings: Findings, out: Path, kinds: list[str], memory_mb: int, timeout_s: float) -> None:
    """The files of the check."""
    from tuneforge.engine.storage.run_dir import atomic_write, write_json
    from tuneforge_datacheck.check import to_cleaned_csv
    from tuneforge_datacheck.report import render_report

    write_json(out / ISSUES, findings.to_dict())
    atomic_write(
        out / REPORT,
        render_report(findings, memory_mb=memory_mb, timeout_s=timeout_s).encode(errors="backslashreplace"),
    )
    if kinds:
        atomic_write(out / CLEANED_CSV, to_cleaned_csv(findings, kinds).encode(errors="surrogateescape"))


def _prepare_output_dir(out: Path) -> None:
    """Make the folder; another one's content is not written over."""
    from tuneforge.errors import FolderError

    if out.exists() and any(out.iterdir()) and not (out / ISSUES).exists():
        raise FolderError(
            f"'{out}' holds something else",
            where="--out",
            why="it is neither empty nor the folder of a check",
            fix="name another folder",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        from tuneforge.engine.storage.run_dir import write_error

        raise write_error(out, error) from None


def _print(findings: Findings, out: Path, *, show_all: bool, kinds: list[str]) -> None:
    from tuneforge_datacheck.check import select_remaining
    from tuneforge_datacheck.report import format_issue

    for issue in findings.issues:
        click.echo(format_issue(issue))
    if show_all:
        wrong = {issue.path for issue in findings.issues}
        for file in findings.usable:
            if file.id not in wrong:
                click.echo(f"{file.id}: fine")
    for note in findings.notes:
        click.echo(f"note: {note}")
    click.echo(
        f"{len(findings.usable):,} of {len(findings.files):,} files can be used; {len(findings.issues):,} issues"
    )
    remain = select_remaining(findings, kinds or _FIXES)
    advice = f"advice on {', '.join(kinds)}" if kinds else "advice"
    click.echo(f"left after the {advice}: {len(remain):,} of {len(findings.files):,}")
    click.echo(f"page: {shlex.quote(str(out / REPORT))}")
    if kinds:
        cleaned = shlex.quote(str(out / CLEANED_CSV))
        click.echo(f"next: tuneforge run --data image-csv --data.path {cleaned} --data.checked {out / ISSUES}")


def _undo(path: Path, out: Path, root: Path | None) -> None:
    from tuneforge.builtin.datasets.images.file_check import restore_quarantined_files
    from tuneforge.errors import DataError, escape_name

    if not path.exists():
        raise DataError("there is no such file or folder", where=str(path), fix="check the path")
    if (out / CLEANED_CSV).exists():
        (out / CLEANED_CSV).unlink()
        click.echo(f"removed {out / CLEANED_CSV}")
    for name in restore_quarantined_files(root or (path if path.is_dir() else path.parent)):
        click.echo(f"back in its place: {escape_name(name)}")
