"""`tuneforge predict`: predictions of a finished run for files."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("things", nargs=-1, required=True, metavar="FILE|DIR...")
@click.option("--csv", "as_csv", is_flag=True, help="Print a CSV with every probability.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@click.option("--device", default="auto", show_default=True, help="Device to compute on.")
def predict(run_dir: Path, things: tuple[str, ...], as_csv: bool, as_json: bool, device: str) -> int:
    """Predict with a finished run for files, directories of files or, for tables, a CSV file or a row in JSON.

    Inputs that cannot be read are reported, and the exit code is 65; the other inputs are predicted.
    """
    from tuneforge.engine.session.predictor import load
    from tuneforge.errors import DataError

    predictor = load(run_dir, device_name=device)
    writer = None
    failed = 0
    num_inputs = 0
    for name, raw in _read_inputs(things, rows=predictor.inputs.tabular):
        num_inputs += 1
        try:
            prediction = next(predictor.predict([raw]))
        except DataError as error:
            failed += 1
            click.echo(f"error: {name}: " + "\n".join(error.format_lines()), err=True)
            continue
        if as_json:
            click.echo(json.dumps({"input": name, **prediction}))
        elif as_csv:
            row = {"input": name, **_flatten(prediction)}
            if writer is None:
                writer = csv.DictWriter(sys.stdout, fieldnames=list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
        else:
            click.echo(f"{name}: {_format_prediction(prediction)}")
    if not num_inputs:
        raise DataError(
            "there is nothing to predict",
            where=" ".join(things),
            why="neither a file nor a row was found",
            fix="check the path",
        )
    return DataError.exit_code if failed else 0


def _read_inputs(arguments: tuple[str, ...], *, rows: bool) -> Iterator[tuple[str, Any]]:
    """Yield each input with its name: files, files of directories in sorted order, rows of a CSV file or of JSON."""
    from tuneforge.errors import DataError

    for thing in arguments:
        path = Path(thing)
        if thing.lstrip().startswith("{"):
            yield thing, json.loads(thing)
        elif path.is_dir():
            yield from ((str(each), each) for each in sorted(path.rglob("*")) if each.is_file())
        elif rows and path.suffix == ".csv" and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                yield from ((f"{path}:{number}", row) for number, row in enumerate(csv.DictReader(file), start=2))
        elif path.is_file():
            yield thing, path
        else:
            raise DataError(f"there is no file or directory '{thing}'", where="FILE|DIR", fix="check the path")


def _format_prediction(prediction: dict[str, Any]) -> str:
    if prediction.get("probability") is not None:
        return f"{prediction['class']} ({100 * prediction['probability']:.1f} %)"
    if "value" in prediction:
        return f"{prediction['value']} {prediction.get('unit') or ''}".strip()
    return ", ".join(f"{key} {value}" for key, value in prediction.items() if not isinstance(value, dict))


def _flatten(prediction: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in prediction.items():
        nested = value if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": item for name, item in nested.items()} or {key: value}
    return flat
