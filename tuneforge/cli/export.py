"""`tuneforge export`: a finished run leaves as a bundle, once it is proved to answer as before."""

from __future__ import annotations

import json
from pathlib import Path

import click

_DEFAULT = ("onnx",)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--to", multiple=True, metavar="FORMAT", help="onnx, safetensors or another; repeatable. [default: onnx]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The bundle. [default: bundles/RUN]")
@click.option("--name", default="", help="Of the model; by default the run's.")
@click.option(
    "--pictures", type=click.Path(path_type=Path), metavar="DIR", help="Also write the test split's pictures as files."
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
def export(
    folder: Path, to: tuple[str, ...], out: Path | None, name: str, pictures: Path | None, as_json: bool
) -> None:
    """Write a finished run as a bundle: model, contracts, figures, provenance and a model card.

    The model is opened again and compared with the tuned one on the real test split, at batch sizes 1, 2, 7 and 16.
    Where a class differs or a probability is off by more than 1e-4, nothing is written.
    """
    from tuneforge.engine.storage.run_dir import read_json
    from tuneforge.exporting.bundle import BUNDLE, MODEL_CARD
    from tuneforge.exporting.exporter import export as exported

    def log(text: str) -> None:
        click.echo(text, err=as_json)

    bundle_dir = exported(folder, to=to or _DEFAULT, out=out, name=name, image_dir=pictures, log=log)
    if as_json:
        record = read_json(bundle_dir / BUNDLE)
        click.echo(json.dumps({"directory": str(bundle_dir), "name": record["name"], "formats": record["formats"]}))
        return
    click.echo(f"card: {bundle_dir / MODEL_CARD}")
    click.echo(f"done: {bundle_dir}")
