"""New classes without forgetting old ones: new samples alone, `lwf`, and `replay` of a few old samples.

A network learns the digits 0 to 6, then 7, 8 and 9 (Robins 1995; Li and Hoiem 2016, arXiv 1606.09282). Claim: without
old samples the old classes are forgotten; some replayed old samples keep them; distilled predictions keep old
classes apart from one another, which is what Li and Hoiem measure: they tell the model which task a sample belongs to.
Every method ends on its last epoch, so validation selects nothing.
"""

from __future__ import annotations

from typing import Any

import attrs
import click
import numpy as np
import torch
from shifts import Kind, fine_tune, make_domain, network
from tables import difference, print_table

import tuneforge as tf

NUM_OLD = 7
ALONE = "new samples alone"


def only(split: tf.Split, *, old: bool) -> tf.Split:
    """Return the samples of the old classes, or of the new ones."""
    return split.subset(((split.targets < NUM_OLD) == old).nonzero().flatten())


def joined(first: tf.Split, second: tf.Split) -> tf.Split:
    """Return both splits as one."""
    images = torch.cat([split.fetch(torch.arange(len(split))) for split in (first, second)])
    return tf.Split(images, torch.cat([first.targets, second.targets]))


def recalls(seed: int, *, per_class: int, kept: int, epochs: int) -> dict[str, tuple[float, float, float]]:
    """Return `mean_recalls` of each method."""
    _, whole = make_domain(Kind("", "hand", "hand"), seed, per_class)
    model = tf.Model.from_module(network(seed), head="head", labels=whole.targets.labels)
    old, new = only(whole.train, old=True), only(whole.train, old=False)
    first = fine_tune(
        model, attrs.evolve(whole, train=old), tf.use("full", epochs=2 * epochs, lr=3e-3), seed=seed
    ).model
    model = attrs.evolve(first, pretrained_labels=whole.targets.labels[:NUM_OLD])
    few = old.subset(torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))[:kept])
    mixed = attrs.evolve(whole, train=joined(few, new), sample_groups={"old": torch.arange(kept)})
    rest: dict[str, Any] = {"epochs": epochs, "lr": 3e-3, "restore_best": False}
    methods = {
        ALONE: (attrs.evolve(whole, train=new), tf.use("full", **rest)),
        "`l2-sp`": (attrs.evolve(whole, train=new), tf.use("l2-sp", **rest)),
        "`lwf`": (attrs.evolve(whole, train=new), tf.use("lwf", **rest)),
        "`replay`": (mixed, tf.use("replay", **rest)),
    }
    return {
        name: mean_recalls(fine_tune(model, data, strategy, seed=seed), whole)
        for name, (data, strategy) in methods.items()
    }


def mean_recalls(result: tf.Result, data: tf.Data) -> tuple[float, float, float]:
    """Return the mean recall of the old classes, the same among old classes only, and that of the new classes."""
    rows = list(result.report["splits"]["test"]["per_class"].values())
    old, new = (float(np.mean([row["recall"] for row in part])) for part in (rows[:NUM_OLD], rows[NUM_OLD:]))
    known = only(data.test, old=True)
    with torch.no_grad():
        predictions = result.model.module(data.inputs.preprocess(known.fetch(torch.arange(len(known)))))[
            :, :NUM_OLD
        ].argmax(1)
    among = [float((predictions == known.targets)[known.targets == place].double().mean()) for place in range(NUM_OLD)]
    return old, float(np.mean(among)), new


@click.command()
@click.option("--seeds", default=6, show_default=True)
@click.option("--per-class", default=30, show_default=True)
@click.option("--kept", default=14, show_default=True, help="Old samples that `replay` still has.")
@click.option("--epochs", default=20, show_default=True)
def main(seeds: int, per_class: int, kept: int, epochs: int) -> None:
    """Print recall of old and new classes, and the difference of each method to new samples alone."""
    torch.set_num_threads(1)
    runs = [recalls(seed, per_class=per_class, kept=kept, epochs=epochs) for seed in range(seeds)]

    def line(name: str) -> list[str]:
        means = [f"{100 * np.mean([run[name][place] for run in runs]):.1f}" for place in range(3)]
        gains = [[run[name][place] - run[ALONE][place] for run in runs] for place in (0, 1)]
        return [name, *means, *("" if name == ALONE else difference(gain) for gain in gains)]

    head = ("fine-tuned on", "recall, old", "old among old", "recall, new")
    print_table((*head, f"old, over {ALONE}", f"old among old, over {ALONE}"), map(line, runs[0]))


if __name__ == "__main__":
    main()
