"""The command `tuneforge data`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuneforge.plugin import ExitCode, FiniteFloatRange, json_option

if TYPE_CHECKING:
    from tuneforge_datacheck.check import Findings

ISSUES_FILE, REPORT_FILE, CLEANED_FILE = "issues.json", "issues.html", "cleaned.csv"
_FIXES = ("files", "duplicates", "labels")


@click.group()
def data() -> None:
    """Find issues of image data before training."""


@data.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="DIR|CSV")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data-check"),
    show_default=True,
    help="Directory for issues.json, issues.html and, with --fix, cleaned.csv.",
)
@click.option("--show-all", is_flag=True, help="Print a line for every file, including those without issues.")
@click.option(
    "--fix",
    is_flag=False,
    flag_value="all",
    metavar="[all|files,duplicates,labels]",
    help="Write cleaned.csv, which lists the files to train on; no file is changed. Without a value: all.",
)
@click.option(
    "--undo", is_flag=True, help="Remove cleaned.csv and move back the files that a run has quarantined; no check."
)
@click.option(
    "--run", type=click.Path(path_type=Path), help="Check labels with the features of this finished run's model."
)
@click.option(
    "--near-duplicates/--no-near-duplicates", default=True, help="Compare every image with every other. [default: on]"
)
@click.option("--image", default="path", show_default=True, help="CSV: column of image paths.")
@click.option("--label", default="label", show_default=True, help="CSV: column of class names.")
@click.option("--split", default="split", show_default=True, help="CSV: column of splits (train, val or test).")
@click.option("--root", type=click.Path(path_type=Path), help="CSV: directory that relative paths start from.")
@click.option(
    "--memory-mb",
    type=click.IntRange(64, 2**20),
    default=300,
    show_default=True,
    help="Memory limit for opening a file, in MB.",
)
@click.option(
    "--timeout-s",
    type=FiniteFloatRange(min=0.1),
    default=4.0,
    show_default=True,
    help="Time limit for opening a file, in seconds.",
)
@json_option("Print the content of issues.json.")
def check(
    path: Path,
    out: Path,
    show_all: bool,
    fix: str | None,
    undo: bool,
    run: Path | None,
    near_duplicates: bool,
    image: str,
    label: str,
    split: str,
    root: Path | None,
    memory_mb: int,
    timeout_s: float,
    as_json: bool,
) -> int:
    """Check every image of DIR or of a CSV file and print a line for each issue.

    DIR contains one folder per class, or folders train, val and test of them. The check finds unusable files,
    duplicates and near-duplicates within and across splits, classes that differ between splits, and label issues.
    The exit code is 65 if files should be excluded and --fix was not given.

    \b
    tuneforge data check photos
    tuneforge data check photos --fix
    tuneforge run --data image-csv --data.path data-check/cleaned.csv
    """
    from tuneforge import UsageError
    from tuneforge_datacheck.check import check_images
    from tuneforge_datacheck.files import CsvColumns

    if undo:
        _undo(path, out, root)
        return ExitCode.OK
    fixes = _parse_fixes(fix)
    if out.resolve().is_relative_to(path.resolve()):
        raise UsageError(
            f"'{out}' is inside the data",
            where="--out",
            why="the next check would list the files in it",
            fix="name another directory",
        )
    _prepare_output_dir(out)
    findings = check_images(
        path,
        columns=CsvColumns(image, label, split, root),
        run=run,
        memory_mb=memory_mb,
        timeout_s=timeout_s,
        near_duplicates=near_duplicates,
        log=lambda text: click.echo(text, err=True),
    )
    _write_files(findings, out, fixes, memory_mb, timeout_s)
    if as_json:
        click.echo(json.dumps(findings.to_dict()))
    else:
        _print(findings, out, show_all=show_all, fixes=fixes)
    has_exclusions = any(issue.action == "exclude" for issue in findings.issues)
    return ExitCode.BAD_DATA if has_exclusions and not fixes else ExitCode.OK


def _parse_fixes(text: str | None) -> list[str]:
    from tuneforge import UsageError
    from tuneforge.errors import suggest_name

    if text is None:
        return []
    fixes = list(_FIXES) if text == "all" else [each.strip() for each in text.split(",")]
    for each in fixes:
        if each not in _FIXES:
            raise UsageError(f"there is no fix '{each}'", where="--fix", fix=suggest_name(each, [*_FIXES, "all"]))
    return fixes


def _write_files(findings: Findings, out: Path, fixes: list[str], memory_mb: int, timeout_s: float) -> None:
    from tuneforge.exporting import atomic_write, write_json
    from tuneforge_datacheck.check import to_cleaned_csv
    from tuneforge_datacheck.report import render_report

    write_json(out / ISSUES_FILE, findings.to_dict())
    html = render_report(findings, memory_mb=memory_mb, timeout_s=timeout_s)
    atomic_write(out / REPORT_FILE, html.encode(errors="backslashreplace"))
    if fixes:
        atomic_write(out / CLEANED_FILE, to_cleaned_csv(findings, fixes).encode(errors="surrogateescape"))


def _prepare_output_dir(out: Path) -> None:
    """Create the directory; the content of another one is not overwritten."""
    from tuneforge import FolderError

    if out.exists() and any(out.iterdir()) and not (out / ISSUES_FILE).exists():
        raise FolderError(
            f"'{out}' contains other files",
            where="--out",
            why="it is neither empty nor the output of a check",
            fix="name another directory",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"cannot create '{out}'", where="--out", why=error.strerror or "") from None


def _print(findings: Findings, out: Path, *, show_all: bool, fixes: list[str]) -> None:
    from tuneforge_datacheck.check import select_remaining
    from tuneforge_datacheck.report import format_issue

    for issue in findings.issues:
        click.echo(format_issue(issue))
    if show_all:
        with_issues = {issue.path for issue in findings.issues}
        for file in findings.usable:
            if file.id not in with_issues:
                click.echo(f"{file.id}: ok")
    for note in findings.notes:
        click.echo(f"note: {note}")
    num_files = len(findings.files)
    click.echo(f"{len(findings.usable):,} of {num_files:,} files can be used; {len(findings.issues):,} issues")
    remaining = select_remaining(findings, fixes or _FIXES)
    click.echo(f"files to train on after fixing {', '.join(fixes or _FIXES)}: {len(remaining):,} of {num_files:,}")
    click.echo(f"report: {shlex.quote(str(out / REPORT_FILE))}")
    if fixes:
        cleaned, issues = (shlex.quote(str(out / name)) for name in (CLEANED_FILE, ISSUES_FILE))
        click.echo(f"next: tuneforge run --data image-csv --data.path {cleaned} --data.checked {issues}")


def _undo(path: Path, out: Path, root: Path | None) -> None:
    from tuneforge import DataError
    from tuneforge.errors import escape_name
    from tuneforge_datacheck.quarantine import restore_quarantined_files

    if not path.exists():
        raise DataError("there is no such file or folder", where=str(path), fix="check the path")
    if (out / CLEANED_FILE).exists():
        (out / CLEANED_FILE).unlink()
        click.echo(f"removed {out / CLEANED_FILE}")
    for name in restore_quarantined_files(root or (path if path.is_dir() else path.parent)):
        click.echo(f"moved back: {escape_name(name)}")
