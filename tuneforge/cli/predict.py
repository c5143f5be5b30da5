"""`tuneforge predict`: predictions of a finished run for files."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tuneforge.engine.data.dataset import Inputs


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
    num_inputs = num_failed = 0
    for name, raw in _read_inputs(things, predictor.inputs):
        num_inputs += 1
        try:
            if isinstance(raw, DataError):
                raise raw
            prediction = next(predictor.predict([raw]))
        except DataError as error:
            num_failed += 1
            click.echo(f"error: {name}: " + "\n".join(error.format_lines()), err=True)
            continue
        if as_json:
            click.echo(json.dumps({"input": name, **prediction}))
        elif as_csv:
            unseen = {"unseen": _format_unseen(prediction)} if predictor.inputs.tabular else {}
            row = {"input": name, **_flatten({**prediction, **unseen})}
            if writer is None:
                writer = csv.DictWriter(sys.stdout, fieldnames=list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
        else:
            click.echo(f"{name}: {_format_prediction(prediction)}")
    if not num_inputs:
        raise DataError(
            "there is nothing to predict", where=" ".join(things), why="no file was found", fix="check the path"
        )
    return DataError.exit_code if num_failed else 0


def _read_inputs(arguments: tuple[str, ...], inputs: Inputs) -> Iterator[tuple[str, Any]]:
    """Yield each input with its name, a `DataError` in place of one that cannot be read.

    Inputs are files, files of directories in sorted order, rows of a table, or a row in JSON.
    """
    from tuneforge.errors import DataError
    from tuneforge.plugin.table_file import parse_json

    for thing in arguments:
        path = Path(thing)
        try:
            if thing.lstrip()[:1] in ("{", "["):
                yield thing, parse_json(thing, "")
            elif path.is_dir():
                for each in sorted(path.rglob("*")):
                    if each.is_file():
                        yield from inputs.read_file(each)
            elif path.exists():
                yield from inputs.read_file(path)
            else:
                raise DataError(f"there is no file or directory '{thing}'", where="FILE|DIR", fix="check the path")
        except DataError as error:
            yield thing, error


def _format_prediction(prediction: dict[str, Any]) -> str:
    unseen = _format_unseen(prediction)
    suffix = f" [not in the training data: {unseen}]" if unseen else ""
    if prediction.get("probability") is not None:
        return f"{prediction['class']} ({100 * prediction['probability']:.1f} %){suffix}"
    if "value" in prediction:
        return f"{prediction['value']} {prediction.get('unit') or ''}".strip() + suffix
    return ", ".join(f"{key} {value}" for key, value in prediction.items() if not isinstance(value, dict)) + suffix


def _format_unseen(prediction: dict[str, Any]) -> str:
    """Return the values of a row that the training data does not have."""
    return ", ".join(f"{column} '{value}'" for column, value in prediction.get("unseen", {}).items())


def _flatten(prediction: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in prediction.items():
        nested = value if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": item for name, item in nested.items()} or {key: value}
    return flat
