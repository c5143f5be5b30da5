"""`tuneforge models`: list the models of a registry, show a version, roll back to an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.plugin import json_option

if TYPE_CHECKING:
    from tuneforge_serve.registry.model_registry import ModelRegistry

_REGISTRY_OPTION = click.option(
    "--registry",
    default="models",
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the model registry.",
)
_JSON_OPTION = json_option("Print JSON.")


@click.group()
def models() -> None:
    """List the models of a registry, show a version, or roll back to an earlier one."""


@models.command("list")
@_REGISTRY_OPTION
@_JSON_OPTION
def list_(registry: Path, as_json: bool) -> None:
    """List every version: name, number, whether it is the champion, formats, test metrics, and run."""
    from tuneforge_serve.registry.model_registry import list_models
    from tuneforge_serve.text_table import format_table

    rows = [row for each in list_models(registry) for row in _list_versions(each)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    header = ("NAME", "VERSION", "CHAMPION", "FORMATS", "TEST METRICS", "RUN")
    table = [
        (
            row["name"], str(row["version"]), "yes" if row["champion"] else "", ", ".join(row["formats"]),
            "  ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items()), row["run"],
        )
        for row in rows
    ]  # fmt: skip
    click.echo(format_table(header, table))


@models.command()
@click.argument("name")
@click.argument("version", type=int, required=False)
@_REGISTRY_OPTION
@_JSON_OPTION
def show(name: str, version: int | None, registry: Path, as_json: bool) -> None:
    """Show a version (by default the champion) and the event log of the model."""
    from tuneforge.exporting import BUNDLE, MODEL_CARD, read_json, verify_manifest
    from tuneforge_serve.registry.model_registry import find_model

    model = find_model(registry, name)
    version_dir = model.version_dir(version)
    verify_manifest(version_dir)
    record, number = read_json(version_dir / BUNDLE), int(version_dir.name)
    if as_json:
        click.echo(json.dumps({"champion": model.champion, "version": number, **record, "log": model.read_events()}))
        return
    click.echo(f"{name} {number}{' (champion)' if number == model.champion else ''}")
    click.echo(f"run:      {record['run']['run_dir']}, exported {record['created']}")
    click.echo(f"formats:  {', '.join(record['formats'])}")
    click.echo(f"classes:  {', '.join(record['labels']) or 'none, the model predicts numbers'}")
    click.echo(f"test:     {'  '.join(f'{key} {value:.4f}' for key, value in _primary_metrics(record).items())}")
    click.echo(f"card:     {version_dir / MODEL_CARD}")
    click.echo("log:")
    for event in model.read_events():
        click.echo(f"  {_format_event(event)}")


@models.command()
@click.argument("name")
@click.option("--version", type=int, help="Version to roll back to. [default: the previous champion]")
@_REGISTRY_OPTION
@_JSON_OPTION
def rollback(name: str, version: int | None, registry: Path, as_json: bool) -> None:
    """Make an earlier version the champion again, after checking it against its reference outputs."""
    from tuneforge_serve.registry.model_registry import find_model

    model = find_model(registry, name)
    previous = model.champion
    number = model.rollback(version)
    if as_json:
        click.echo(json.dumps({"name": name, "version": number, "previous": previous}))
        return
    click.echo(f"done: version {number} is the champion of {name}; the previous champion is version {previous}")


def _list_versions(model: ModelRegistry) -> list[dict[str, Any]]:
    from tuneforge.exporting import BUNDLE, read_json

    rows = []
    for number in model.versions():
        record = read_json(model.version_dir(number) / BUNDLE)
        rows.append(
            {
                "name": model.name, "version": number, "champion": number == model.champion,
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
    replaced = "" if previous is None else f", champion before: {previous}"
    version = f" {event['version']}" if "version" in event else ""
    reason = f": {event['decision']['reason']}" if "decision" in event else ""
    run = f" ({event['run']})" if "run" in event else ""
    return f"{event['time']}  {event['event']}{version}{replaced}{run}{reason}"
