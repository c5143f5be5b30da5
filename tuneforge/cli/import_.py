"""`tuneforge import`: foreign weights as safetensors."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from tuneforge.cli.parameter_types import Within


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.safetensors", help="Default: beside FILE.")
@click.option("--key", help="Where the weights are in FILE. [default: the usual names, such as state_dict]")
@click.option(
    "--max-mb", type=click.IntRange(1, 2**20), default=4096, show_default=True, help="Most memory for the tensors."
)
@click.option("--seconds", type=Within(min=1), default=120.0, show_default=True, help="Time that reading may take.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def import_(
    path: Path, out: Path | None, key: str | None, max_mb: int, seconds: float, force: bool, as_json: bool
) -> None:
    """Make FILE, weights that torch.save has written, into safetensors, without running what is in it.

    FILE is read in a process with limits on memory and time, which may write one file and reach no network, by torch's
    reader that makes nothing but tensors. Exits 77 where it asks for more than that, 65 where it is broken or is
    something else.

    \b
    tuneforge import resnet18.pth
    tuneforge run --model torchvision --model.arch resnet18 --model.weights resnet18.safetensors
    """
    from tuneforge.convert.weights import import_weights

    place = out or (path.with_suffix(".safetensors") if path.name else path / "weights.safetensors")
    made = import_weights(path, place, key=key, max_mb=max_mb, seconds=seconds, replace=force)
    if as_json:
        told = {"path": str(made.path), "tensors": made.tensors, "bytes": made.bytes, "under": made.under}
        click.echo(json.dumps({**told, "same": made.same, "left_out": list(made.left_out)}))
        return
    under = f", found under '{made.under}'" if made.under else ""
    click.echo(f"{made.path}: {made.tensors:,} tensors, {made.bytes / 2**20:.1f} MB{under}")
    for name, kept in sorted(made.same.items()):
        click.echo(f"  {name} is {kept}, kept once")
    if made.left_out:
        click.echo(f"  left out, because they are no tensors: {', '.join(made.left_out[:10])}")
    click.echo(f"next: tuneforge run --model torchvision --model.weights {shlex.quote(str(made.path))} ...")
