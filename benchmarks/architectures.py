"""The feature cache on and off with twelve architectures of torchvision: the difference of the logits at the end.

    python benchmarks/architectures.py

Both runs take the same phases, `freeze-then-unfreeze` with 2 + 1 epochs on 64 synthetic images, from the same random
weights. For comparison: the difference between two batch sizes of one forward pass of the final model, 64 and 16 or 64
and 1, because features differ in their last bits with the batch size, with or without a cache.
"""

import click
import torch
from common import print_machine, print_table
from ours import empty_cache, tuned
from torch import Tensor, nn

import tuneforge as tf
from tuneforge.sklearn import data_from_arrays

SIDES = {
    "resnet18": 32, "mobilenet_v3_small": 32, "efficientnet_b0": 32, "convnext_tiny": 32, "swin_t": 32,
    "densenet121": 32, "regnet_y_400mf": 32, "googlenet": 32, "squeezenet1_1": 32, "shufflenet_v2_x0_5": 32,
    "mnasnet0_5": 32, "vit_b_16": 32,
}  # fmt: skip
"""Pixels: the least that each takes, or 32, where five halvings leave one value."""


def made(count: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random images (count, 3, side, side) and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator), torch.arange(count) % 3


def logits(module: nn.Module, images: Tensor, batch: int) -> Tensor:
    """Return the logits (n, k), computed in batches of the given size."""
    module.eval()
    with torch.no_grad():
        return torch.cat([module(part) for part in images.split(batch)])


def largest(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two outputs."""
    return float((one - other).abs().max())


def compared(arch: str, count: int) -> tuple[str, ...]:
    """Return a row: both runs of an architecture."""
    side = SIDES[arch]
    (x, y), (x_val, y_val), (x_test, y_test) = (made(each, side, seed) for seed, each in enumerate((count, 32, 64)))
    data = {"x_val": x_val, "y_val": y_val, "x_test": x_test, "y_test": y_test}
    strategy = tf.use("freeze-then-unfreeze", head_epochs=2, epochs=1)
    ends, phases, said = [], [], []
    for cache in ("auto", "off"):
        with empty_cache() as folder:
            done = tuned(
                folder / "run", data=data_from_arrays(x, y, **data),
                model=tf.use("torchvision", arch=arch, weights="none"), strategy=strategy, cache=cache, log=said.append,
            )  # fmt: skip
        ends.append(done.result.model.module)
        phases.append([step for step, _ in done.result.strategy_steps])
    cached = next(line.strip() for line in said if line.strip().startswith("feature cache: o"))
    final = [logits(end, x_test, 64) for end in ends]
    apart = largest(*final)
    sizes = max(largest(final[1], logits(ends[1], x_test, batch)) for batch in (16, 1))
    same, within = ("yes" if each else "no" for each in (phases[0] == phases[1], apart <= sizes))
    kept = "yes" if cached.startswith("feature cache: on") else cached.replace("feature cache: off", "no")
    return arch, str(side), kept, same, f"{apart:.1e}", f"{sizes:.1e}", within


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SIDES)), help="Some of them; repeatable.")
@click.option("--samples", default=64, show_default=True, help="Training images.")
def main(only: tuple[str, ...], samples: int) -> None:
    """Print a row for each architecture."""
    print_machine(1, f"cache on against cache off, 2 + 1 epochs on {samples} made images, logits of 64 others")
    heads = ("architecture", "pixels", "cached", "same phases", "largest difference", "of two batch sizes", "within")
    print_table(heads, [compared(arch, samples) for arch in only or SIDES])


if __name__ == "__main__":
    main()
