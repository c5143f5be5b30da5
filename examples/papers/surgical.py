"""Surgical fine-tuning (Lee et al. 2023, arXiv 2210.11466): which block for which shift?

Claim: the first block for a shift of the inputs, one in the middle for a shift of the features, the last for a shift of
the outputs. One block at a time is trained, 20 epochs at 1e-2 with a cosine schedule, best epoch.
"""

from __future__ import annotations

import click
import numpy as np
import torch
from shifts import KINDS, fine_tune, make_domain
from tables import difference, print_table

import tuneforge as tf

BLOCKS = ("conv1", "conv2", "conv3", "conv4", "head")
CLAIMED = {"input": "conv1", "feature": "conv3", "output": "head"}
CHOSEN = ("noise", "rotated", "thick pen", "small letters", "9 - y", "permuted")


def accuracy(model: tf.Model, data: tf.Data, block: str, *, epochs: int, seed: int) -> float:
    """Return the test accuracy after training one block."""
    schedule = tf.use("cosine", warmup=0.1)
    steps = [tf.Phase("block", train=block, epochs=epochs, lr=1e-2, schedule=schedule, restore_best=True)]
    return float(fine_tune(model, data, steps, seed=seed).report["splits"]["test"]["accuracy"])


@click.command()
@click.option("--seeds", default=5, show_default=True)
@click.option("--kinds", default=",".join(CHOSEN), show_default=True)
@click.option("--per-class", default=10, show_default=True, help="Labels per class; a third are for validation.")
@click.option("--epochs", default=20, show_default=True)
def main(seeds: int, kinds: str, per_class: int, epochs: int) -> None:
    """Print test accuracy of every block by kind, and the claimed block against the best of the others."""
    torch.set_num_threads(1)
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds.split(",")}
    for seed in range(seeds):
        for kind, runs in found.items():
            model, data = make_domain(kind, seed, per_class)
            runs.append([accuracy(model, data, block, epochs=epochs, seed=seed) for block in BLOCKS])

    def line(kind: str) -> list[str]:
        runs = np.array(found[kind])
        claimed = BLOCKS.index(CLAIMED[KINDS[kind].level])
        means = runs.mean(0)
        rival = max((place for place in range(len(BLOCKS)) if place != claimed), key=lambda place: means[place])
        above = difference((runs[:, claimed] - runs[:, rival]).tolist())
        texts = [f"**{100 * mean:.1f}**" if mean == means.max() else f"{100 * mean:.1f}" for mean in means]
        return [f"{kind} ({KINDS[kind].level})", *texts, f"{BLOCKS[claimed]} over {BLOCKS[rival]}: {above}"]

    print_table(("shift", *BLOCKS, "claimed block over the best other"), map(line, found))


if __name__ == "__main__":
    main()
