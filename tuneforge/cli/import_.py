"""`tuneforge import`: convert weight files of torch.save to safetensors."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from tuneforge.plugin.parameter_types import FiniteFloatRange


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE.safetensors", help="Output file. [default: next to FILE]"
)
@click.option("--key", help="Key of the state dict in FILE. [default: the usual ones, such as state_dict]")
@click.option(
    "--max-mb",
    type=click.IntRange(1, 2**20),
    default=4096,
    show_default=True,
    help="Memory for the tensors.",
)
@click.option(
    "--timeout-s", type=FiniteFloatRange(min=1), default=120.0, show_default=True, help="Time limit for reading, in s."
)
@click.option("--force", is_flag=True, help="Overwrite an existing output file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def import_(
    path: Path, out: Path | None, key: str | None, max_mb: int, timeout_s: float, force: bool, as_json: bool
) -> None:
    """Convert FILE, weights written by torch.save, to safetensors without executing anything in it.

    FILE is read in a sandbox: a process with limits on memory and time, without network, that may write one file. It
    uses torch's unpickler that builds nothing but tensors. The exit code is 77 if FILE asks for anything else, and 65
    if it is corrupt or of another format.

    \b
    tuneforge import resnet18.pth
    tuneforge run --model torchvision --model.arch resnet18 --model.weights resnet18.safetensors
    """
    from tuneforge.convert.weights import convert_weights

    output = out or (path.with_suffix(".safetensors") if path.name else path / "weights.safetensors")
    converted = convert_weights(path, output, key=key, max_mb=max_mb, timeout_s=timeout_s, overwrite=force)
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
        click.echo(f"  {name} shares its storage with {kept}, which is written once")
    if converted.skipped_names:
        click.echo(f"  skipped, because they are not tensors: {', '.join(converted.skipped_names[:10])}")
    click.echo(f"next: {_suggest_use(converted.path)}")


def _suggest_use(path: Path) -> str:
    """Return what to do with a file of weights, from the names of its tensors."""
    from tuneforge.builtin.models.torchvision_models import find_arch
    from tuneforge.engine.storage.safetensors_io import load_tensors

    arch = find_arch(load_tensors(path)[0])
    if arch is None:
        return (
            "load it into a network of your own, for example in a function that --model module:function names; "
            "only the file of a network of torchvision fits --model torchvision"
        )
    return f"tuneforge run --model torchvision --model.arch {arch} --model.weights {shlex.quote(str(path))} ..."
