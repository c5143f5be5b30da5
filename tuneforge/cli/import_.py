"""`tuneforge import`: foreign weights as safetensors."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from tuneforge.plugin.parameter_types import FiniteFloatRange


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.safetensors", help="Default: beside FILE.")
@click.option("--key", help="Where the weights are in FILE. [default: the usual names, such as state_dict]")
@click.option(
    "--max-mb", type=click.IntRange(1, 2**20), default=4096, show_default=True, help="Most memory for the tensors."
)
@click.option(
    "--seconds", type=FiniteFloatRange(min=1), default=120.0, show_default=True, help="Time that reading may take."
)
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
    from tuneforge.convert.weights import convert_weights

    output = out or (path.with_suffix(".safetensors") if path.name else path / "weights.safetensors")
    converted = convert_weights(path, output, key=key, max_mb=max_mb, timeout_s=seconds, overwrite=force)
    if as_json:
        content = {
            "path": str(converted.path),
            "num_tensors": converted.num_tensors,
            "num_bytes": converted.num_bytes,
            "state_dict_key": converted.state_dict_key,
            "shared_tensors": converted.shared_tensors,
            "skipped_names": list(converted.skipped_names),
        }
        click.echo(json.dumps(content))
        return
    under = f", found under '{converted.state_dict_key}'" if converted.state_dict_key else ""
    click.echo(f"{converted.path}: {converted.num_tensors:,} tensors, {converted.num_bytes / 2**20:.1f} MB{under}")
    for name, kept in sorted(converted.shared_tensors.items()):
        click.echo(f"  {name} is {kept}, kept once")
    if converted.skipped_names:
        click.echo(f"  left out, because they are no tensors: {', '.join(converted.skipped_names[:10])}")
    click.echo(f"next: tuneforge run --model torchvision --model.weights {shlex.quote(str(converted.path))} ...")
