"""`tuneforge models`: what a store holds, who is champion and why, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tuneforge.ship.champion.store import Store

_STORE = click.option(
    "--store", default="models", show_default=True, type=click.Path(path_type=Path), metavar="DIR", help="The store."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def models() -> None:
    """List the models of a store, show one, and go back to an earlier version."""


@models.command("list")
@_STORE
@_JSON
def list_(store: Path, as_json: bool) -> None:
    """List every version: name, number, whether it is the champion, its test figures, the run it came from."""
    from tuneforge.ship.champion.store import stores_in

    rows = [row for each in stores_in(store) for row in _rows(each)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    header = ("NAME", "VERSION", "CHAMPION", "FORMS", "TEST FIGURES", "RUN")
    table: list[tuple[str, ...]] = [
        (
            row["name"], str(row["version"]), "yes" if row["champion"] else "", ", ".join(row["formats"]),
            "  ".join(f"{name} {value:.4f}" for name, value in row["figures"].items()), row["run"],
        )
        for row in rows
    ]  # fmt: skip
    _print(header, table)


@models.command()
@click.argument("name")
@click.argument("version", type=int, required=False)
@_STORE
@_JSON
def show(name: str, version: int | None, store: Path, as_json: bool) -> None:
    """Show a version (the champion by default) and the log of its name."""
    from tuneforge.engine.storage.run_dir import read_json
    from tuneforge.exporting import atomic_dir as sealed
    from tuneforge.exporting.bundle import BUNDLE, CARD
    from tuneforge.ship.champion.store import store_of

    found = store_of(store, name)
    folder = found.folder(version)
    sealed.verify(folder)
    record = read_json(folder / BUNDLE)
    if as_json:
        click.echo(json.dumps({"champion": found.champion, "version": int(folder.name), **record, "log": found.log()}))
        return
    click.echo(f"{name} {folder.name}{' (champion)' if int(folder.name) == found.champion else ''}")
    click.echo(f"run:      {record['run']['folder']}, exported {record['created']}")
    click.echo(f"forms:    {', '.join(record['formats'])}")
    click.echo(f"classes:  {', '.join(record['labels']) or 'none, it answers with numbers'}")
    click.echo(f"test:     {'  '.join(f'{key} {value:.4f}' for key, value in _headline(record).items())}")
    click.echo(f"card:     {folder / CARD}")
    click.echo("log:")
    for line in found.log():
        click.echo(f"  {_line(line)}")


@models.command()
@click.argument("name")
@click.option("--to", type=int, metavar="VERSION", help="Which version. [default: the champion before this one]")
@_STORE
@_JSON
def rollback(name: str, to: int | None, store: Path, as_json: bool) -> None:
    """Make an earlier version the champion again, once it has answered its recorded test inputs as before."""
    from tuneforge.ship.champion.store import store_of

    found = store_of(store, name)
    before = found.champion
    number = found.rollback(to)
    if as_json:
        click.echo(json.dumps({"name": name, "version": number, "before": before}))
        return
    click.echo(f"done: version {number} is the champion of {name}; version {before} was")


def _rows(store: Store) -> list[dict[str, Any]]:
    from tuneforge.engine.storage.run_dir import read_json
    from tuneforge.exporting.bundle import BUNDLE

    rows = []
    for number in store.versions():
        record = read_json(store.folder(number) / BUNDLE)
        rows.append(
            {
                "name": store.name, "version": number, "champion": number == store.champion,
                "formats": list(record["formats"]), "figures": _headline(record), "run": record["run"]["folder"],
                "created": record["created"],
            }
        )  # fmt: skip
    return rows


def _headline(record: dict[str, Any]) -> dict[str, float]:
    test = record["figures"]["test"]
    return {name: test[name] for name in record["headline"] if test.get(name) is not None}


def _line(line: dict[str, Any]) -> str:
    against = f" over {line['against']}" if line.get("against") is not None else ""
    version = f" {line['version']}" if "version" in line else ""
    reason = f": {line['verdict']['reason']}" if "verdict" in line else ""
    run = f" ({line['run']})" if "run" in line else ""
    return f"{line['time']}  {line['event']}{version}{against}{run}{reason}"


def _print(header: tuple[str, ...], table: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in (header, *table)) for column in range(len(header))]
    for row in (header, *table):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
