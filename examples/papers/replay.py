"""New classes without the old ones forgotten: tuning on new samples alone, `lwf`, and `replay` of a few old samples.

A network learns the digits 0 to 6, then 7, 8 and 9 (Robins 1995; Li and Hoiem 2016, arXiv 1606.09282). Claim: without
old samples the old classes are forgotten; some replayed old samples keep them; distilled answers keep some of them.
Validation holds new samples only where nothing old is kept, so every way ends on its last epoch.
"""

from __future__ import annotations

from typing import Any

import attrs
import click
import numpy as np
import torch
from figures import difference, say_table
from worlds import Kind, network, tuned, world

import tuneforge as tf

NUM_OLD = 7


def only(split: tf.Split, *, old: bool) -> tf.Split:
    """The samples of the old classes, or of the new ones."""
    return split.take(((split.targets < NUM_OLD) == old).nonzero().flatten())


def joined(first: tf.Split, second: tf.Split) -> tf.Split:
    """Both, one after the other."""
    pictures = torch.cat([split.fetch(torch.arange(len(split))) for split in (first, second)])
    return tf.Split(pictures, torch.cat([first.targets, second.targets]))


def recalls(seed: int, *, per_class: int, kept: int, epochs: int) -> dict[str, tuple[float, float]]:
    """Mean recall of old and of new classes, by way."""
    _, whole = world(Kind("", "hand", "hand"), seed, per_class)
    model = tf.Model.of(network(seed), head="head", labels=whole.targets.labels)
    old, new = only(whole.train, old=True), only(whole.train, old=False)
    first = tuned(model, attrs.evolve(whole, train=old), tf.use("full", epochs=2 * epochs, lr=3e-3), seed=seed).model
    model = attrs.evolve(first, kept=whole.targets.labels[:NUM_OLD])
    few = old.take(torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))[:kept])
    mixed = attrs.evolve(whole, train=joined(few, new), pools={"old": torch.arange(kept)})
    rest: dict[str, Any] = {"epochs": epochs, "lr": 3e-3, "restore_best": False}
    ways = {
        "new samples alone": (attrs.evolve(whole, train=new), tf.use("full", **rest)),
        "`l2-sp`": (attrs.evolve(whole, train=new), tf.use("l2-sp", **rest)),
        "`lwf`": (attrs.evolve(whole, train=new), tf.use("lwf", **rest)),
        "`replay`": (mixed, tf.use("replay", **rest)),
    }
    found = {}
    for name, (data, strategy) in ways.items():
        rows = list(tuned(model, data, strategy, seed=seed).report["splits"]["test"]["per_class"].values())
        found[name] = tuple(
            float(np.mean([row["recall"] for row in part])) for part in (rows[:NUM_OLD], rows[NUM_OLD:])
        )
    return found  # type: ignore[return-value]  # pairs


@click.command()
@click.option("--seeds", default=6, show_default=True)
@click.option("--per-class", default=30, show_default=True)
@click.option("--kept", default=14, show_default=True, help="Old samples that `replay` still has.")
@click.option("--epochs", default=20, show_default=True)
def main(seeds: int, per_class: int, kept: int, epochs: int) -> None:
    """Print recall of old and new classes, and what each way keeps over new samples alone."""
    torch.set_num_threads(1)
    runs = [recalls(seed, per_class=per_class, kept=kept, epochs=epochs) for seed in range(seeds)]

    def line(name: str) -> list[str]:
        old, new = (100 * np.mean([run[name][place] for run in runs]) for place in (0, 1))
        gain = [run[name][0] - run["new samples alone"][0] for run in runs]
        return [name, f"{old:.1f}", f"{new:.1f}", "" if name == "new samples alone" else difference(gain)]

    say_table(("tuned on", "recall, old", "recall, new", "old, over new samples alone"), map(line, runs[0]))


if __name__ == "__main__":
    main()
