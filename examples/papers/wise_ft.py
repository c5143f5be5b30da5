"""WiSE-FT's curve (Wortsman et al. 2022, arXiv 2109.01903): weights interpolated between before and after.

A network that knows upright digits is fine-tuned on digits rotated by 60 degrees. Claim: on digits rotated by 30
degrees, which neither end has seen, some interpolation beats both ends, and the halfway one does without selection.
"""

from __future__ import annotations

import attrs
import click
import numpy as np
import torch
from shifts import Kind, fine_tune, make_domain
from tables import difference, print_table
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

import tuneforge as tf

TENTHS = tuple(tenth / 10 for tenth in range(11))


def rotate(degrees: float) -> Kind:
    """Return the kind of shift that rotates handwritten digits."""

    def shift(images: Tensor, classes: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return VF.rotate(images, degrees), classes

    return Kind("input", "hand", "hand", shift)


def curve(model: tf.Model, data: tf.Data, seen: tf.Split, *, epochs: int, seed: int) -> list[float]:
    """Return the accuracy on a split for each weight; the split selects nothing, as the last epoch is kept."""
    schedule = tf.use("cosine", warmup=0.1)
    steps = [
        tf.Phase("all", epochs=epochs, lr=1e-3, schedule=schedule),
        tf.WeightAverage("interpolated", snapshots=("start", "all"), weights=TENTHS),
    ]
    result = fine_tune(model, attrs.evolve(data, val=seen), steps, seed=seed).strategy_steps[-1][1]
    return [entry["val"]["accuracy"] for entry in result.history]


@click.command()
@click.option("--seeds", default=6, show_default=True)
@click.option("--per-class", default=20, show_default=True)
@click.option("--epochs", default=20, show_default=True)
def main(seeds: int, per_class: int, epochs: int) -> None:
    """Print the curve at each angle, and how far the halfway interpolation is above the better end."""
    torch.set_num_threads(1)
    found: dict[int, list[list[float]]] = {0: [], 30: [], 60: []}
    for seed in range(seeds):
        model, data = make_domain(rotate(60), seed, per_class)
        for degrees, runs in found.items():
            seen = make_domain(rotate(degrees), seed, per_class)[1].test
            runs.append(curve(model, data, seen, epochs=epochs, seed=seed))

    def line(degrees: int) -> list[str]:
        runs = np.array(found[degrees])
        gain = runs[:, 5] - np.maximum(runs[:, 0], runs[:, -1])
        return [f"{degrees}", *(f"{100 * each:.1f}" for each in runs.mean(0)), difference(gain.tolist())]

    print_table(("rotated by", *map(str, TENTHS), "0.5 over the better end"), map(line, found))


if __name__ == "__main__":
    main()
