"""`tuneforge data`: what is wrong with data, before anything is trained on it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuneforge.cli.parameter_types import Within

if TYPE_CHECKING:
    from tuneforge.check.check import Findings

ISSUES, PAGE, CLEANED = "issues.json", "issues.html", "cleaned.csv"
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
@click.option("--seconds", type=Within(min=0.1), default=4.0, show_default=True, help="Time to look at a file.")
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
    from tuneforge.check import check as story
    from tuneforge.check.files import Columns
    from tuneforge.errors import DataError, UsageError

    if undo:
        _undo(path, out, root)
        return 0
    kinds = _kinds(fix)
    if out.resolve().is_relative_to(path.resolve()):
        raise UsageError(
            f"'{out}' lies among the pictures", where="--out", why="they would be checked next time", fix="name another"
        )
    _require_own(out)
    columns = Columns(image, label, split, root)
    findings = story.check(
        path,
        columns=columns,
        run=run,
        memory_mb=memory_mb,
        seconds=seconds,
        near=near,
        say=lambda text: click.echo(text, err=True),
    )
    _write(findings, out, kinds, memory_mb, seconds)
    if as_json:
        click.echo(json.dumps(findings.plain()))
    else:
        _print(findings, out, every=every, kinds=kinds)
    advised = any(issue.action == "leave out" for issue in findings.issues)
    return DataError.exit_code if advised and not kinds else 0


def _kinds(fix: str | None) -> list[str]:
    from tuneforge.errors import UsageError, close_match

    if fix is None:
        return []
    asked = list(_FIXES) if fix == "all" else [each.strip() for each in fix.split(",")]
    for each in asked:
        if each not in _FIXES:
            raise UsageError(f"there is no fix '{each}'", where="--fix", fix=close_match(each, [*_FIXES, "all"]))
    return asked


def _write(findings: Findings, out: Path, kinds: list[str], memory_mb: int, seconds: float) -> None:
    """The files of the check."""
    from tuneforge.check.check import cleaned
    from tuneforge.check.page import page_of
    from tuneforge.engine.storage.run_dir import write_json, write_whole

    write_json(out / ISSUES, findings.plain())
    write_whole(out / PAGE, page_of(findings, memory_mb=memory_mb, seconds=seconds).encode(errors="backslashreplace"))
    if kinds:
        write_whole(out / CLEANED, cleaned(findings, kinds).encode(errors="surrogateescape"))


def _require_own(out: Path) -> None:
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
        from tuneforge.engine.storage.run_dir import unwritten

        raise unwritten(out, error) from None


def _print(findings: Findings, out: Path, *, every: bool, kinds: list[str]) -> None:
    from tuneforge.check.check import left
    from tuneforge.check.page import line_of

    for issue in findings.issues:
        click.echo(line_of(issue))
    if every:
        wrong = {issue.path for issue in findings.issues}
        for file in findings.fine:
            if file.id not in wrong:
                click.echo(f"{file.id}: fine")
    for note in findings.notes:
        click.echo(f"note: {note}")
    click.echo(f"{len(findings.fine):,} of {len(findings.files):,} files can be used; {len(findings.issues):,} issues")
    remain = left(findings, kinds or _FIXES)
    advice = f"advice on {', '.join(kinds)}" if kinds else "advice"
    click.echo(f"left after the {advice}: {len(remain):,} of {len(findings.files):,}")
    click.echo(f"page: {shlex.quote(str(out / PAGE))}")
    if kinds:
        place = shlex.quote(str(out / CLEANED))
        click.echo(f"next: tuneforge run --data image-csv --data.path {place} --data.checked {out / ISSUES}")


def _undo(path: Path, out: Path, root: Path | None) -> None:
    from tuneforge.builtin.datasets.images.file_check import release
    from tuneforge.builtin.datasets.images.sample_names import shown
    from tuneforge.errors import DataError

    if not path.exists():
        raise DataError("there is no such file or folder", where=str(path), fix="check the path")
    if (out / CLEANED).exists():
        (out / CLEANED).unlink()
        click.echo(f"removed {out / CLEANED}")
    for name in release(root or (path if path.is_dir() else path.parent)):
        click.echo(f"back in its place: {shown(name)}")
