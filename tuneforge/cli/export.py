"""`tuneforge export`: write a finished run as a bundle whose outputs were compared with the run's."""

from __future__ import annotations

import json
from pathlib import Path

import click

_DEFAULT = ("onnx",)


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "--format",
    "formats",
    multiple=True,
    metavar="FORMAT",
    help="Export format: onnx, safetensors or that of a plugin. Repeatable. [default: onnx]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Directory of the bundle. [default: bundles/RUN]"
)
@click.option("--name", default="", help="Name of the model. [default: that of the run]")
@click.option(
    "--images", type=click.Path(path_type=Path), metavar="DIR", help="Also write the images of the test split as files."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output at the end.")
def export(
    run_dir: Path, formats: tuple[str, ...], out: Path | None, name: str, images: Path | None, as_json: bool
) -> None:
    """Write a finished run as a bundle: model, preprocessing, labels, metrics, provenance and a model card.

    The exported model is compared with the fine-tuned one on the test split, at batch sizes 1, 2, 7 and 16. If a
    predicted class differs, or a probability differs by more than 1e-4, nothing is written.
    """
    from tuneforge.engine.storage.run_files import read_json
    from tuneforge.exporting.bundle import BUNDLE, MODEL_CARD
    from tuneforge.exporting.exporter import export as exported

    def log(text: str) -> None:
        click.echo(text, err=as_json)

    bundle_dir = exported(run_dir, to=formats or _DEFAULT, out=out, name=name, image_dir=images, log=log)
    if as_json:
        record = read_json(bundle_dir / BUNDLE)
        click.echo(json.dumps({"directory": str(bundle_dir), "name": record["name"], "formats": record["formats"]}))
        return
    click.echo(f"model card: {bundle_dir / MODEL_CARD}")
    click.echo(f"done: {bundle_dir}")
