"""`tuneforge models`: what a store holds, who is champion and why, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tuneforge_serve.registry.model_registry import ModelRegistry

_REGISTRY_OPTION = click.option(
    "--store", default="models", show_default=True, type=click.Path(path_type=Path), metavar="DIR", help="The store."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def models() -> None:
    """List the models of a store, show one, and go back to an earlier version."""


@models.command("list")
@_REGISTRY_OPTION
@_JSON
def list_(store: Path, as_json: bool) -> None:
    """List every version: name, number, whether it is the champion, its test figures, the run it came from."""
    from tuneforge_serve.registry.model_registry import list_models

    rows = [row for each in list_models(store) for row in _list_versions(each)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    header = ("NAME", "VERSION", "CHAMPION", "FORMS", "TEST FIGURES", "RUN")
    table: list[tuple[str, ...]] = [
        (
            row["name"], str(row["version"]), "yes" if row["champion"] else "", ", ".join(row["formats"]),
            "  ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items()), row["run"],
        )
        for row in rows
    ]  # fmt: skip
    _print(header, table)


@models.command()
@click.argument("name")
@click.argument("version", type=int, required=False)
@_REGISTRY_OPTION
@_JSON
def show(name: str, version: int | None, store: Path, as_json: bool) -> None:
    """Show a version (the champion by default) and the log of its name."""
    from tuneforge.engine.storage.run_dir import read_json
    from tuneforge.exporting.atomic_dir import verify_manifest
    from tuneforge.exporting.bundle import BUNDLE, MODEL_CARD
    from tuneforge_serve.registry.model_registry import find_model

    registry = find_model(store, name)
    version_dir = registry.version_dir(version)
    verify_manifest(version_dir)
    record = read_json(version_dir / BUNDLE)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "champion": registry.champion,
                    "version": int(version_dir.name),
                    **record,
                    "log": registry.read_events(),
                }
            )
        )
        return
    click.echo(f"{name} {version_dir.name}{' (champion)' if int(version_dir.name) == registry.champion else ''}")
    click.echo(f"run:      {record['run']['run_dir']}, exported {record['created']}")
    click.echo(f"forms:    {', '.join(record['formats'])}")
    click.echo(f"classes:  {', '.join(record['labels']) or 'none, it answers with numbers'}")
    click.echo(f"test:     {'  '.join(f'{key} {value:.4f}' for key, value in _primary_metrics(record).items())}")
    click.echo(f"card:     {version_dir / MODEL_CARD}")
    click.echo("log:")
    for event in registry.read_events():
        click.echo(f"  {_format_event(event)}")


@models.command()
@click.argument("name")
@click.option("--to", type=int, metavar="VERSION", help="Which version. [default: the champion before this one]")
@_REGISTRY_OPTION
@_JSON
def rollback(name: str, to: int | None, store: Path, as_json: bool) -> None:
    """Make an earlier version the champion again, once it has answered its recorded test inputs as before."""
    from tuneforge_serve.registry.model_registry import find_model

    registry = find_model(store, name)
    previous = registry.champion
    number = registry.rollback(to)
    if as_json:
        click.echo(json.dumps({"name": name, "version": number, "previous": previous}))
        return
    click.echo(f"done: version {number} is the champion of {name}; version {previous} was")


def _list_versions(registry: ModelRegistry) -> list[dict[str, Any]]:
    from tuneforge.engine.storage.run_dir import read_json
    from tuneforge.exporting.bundle import BUNDLE

    rows = []
    for number in registry.versions():
        record = read_json(registry.version_dir(number) / BUNDLE)
        rows.append(
            {
                "name": registry.name, "version": number, "champion": number == registry.champion,
                "formats": list(record["formats"]), "metrics": _primary_metrics(record),
                "run": record["run"]["run_dir"], "created": record["created"],
            }
        )  # fmt: skip
    return rows


def _primary_metrics(record: dict[str, Any]) -> dict[str, float]:
    test = record["metrics"]["test"]
    return {name: test[name] for name in record["primary_metrics"] if test.get(name) is not None}


def _format_event(event: dict[str, Any]) -> str:
    previous = event.get("previous_champion")
    over = "" if previous is None else f" over {previous}"
    version = f" {event['version']}" if "version" in event else ""
    reason = f": {event['decision']['reason']}" if "decision" in event else ""
    run = f" ({event['run']})" if "run" in event else ""
    return f"{event['time']}  {event['event']}{version}{over}{run}{reason}"


def _print(header: tuple[str, ...], table: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in (header, *table)) for column in range(len(header))]
    for row in (header, *table):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
