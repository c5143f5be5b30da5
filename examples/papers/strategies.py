"""`adaptive` and `auto` against every fixed strategy and every single block, on held-out shifts.

Neither kinds nor seeds were used to develop the two (see `shifts.py`). Every strategy gets the same samples: 10 labels
per class where the seed is even, 20 where it is odd, a third of them for validation; fixed ones get 20 epochs, which is
at least their default, and their default learning rates. A block is trained as `auto` trains it: 20 epochs at 1e-2 with
a cosine schedule, best epoch. Seeds are the unit of all intervals and tests: a seed's value is its mean over the kinds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from shifts import HELD_OUT, KINDS, fine_tune, make_domain
from tables import difference, interval, print_table

import tuneforge as tf

BLOCKS = ("conv1", "conv2", "conv3", "conv4", "head")
FIXED = ("full", "head-only", "freeze-then-unfreeze", "gradual-unfreeze", "layer-decay", "lp-ft", "l2-sp", "wise-ft",
         "bias-only")  # fmt: skip
DECIDING = ("adaptive", "auto")


def candidates(epochs: int) -> dict[str, Any]:
    """Return every candidate; `norm-only` is missing, because the network has no normalization layers."""
    fixed = {name: tf.use(name, epochs=epochs) for name in FIXED}
    fixed["gradual-unfreeze"] = tf.use("gradual-unfreeze", epochs=max(1, epochs - len(BLOCKS) + 1))
    deciding = {
        "adaptive": tf.use("adaptive", epochs=max(1, epochs // 2)),
        "auto": tf.use("auto", epochs=epochs),
    }
    schedule = tf.use("cosine", warmup=0.1)
    blocks = {
        name: [tf.Phase("block", train=name, epochs=epochs, lr=1e-2, schedule=schedule, restore_best=True)]
        for name in BLOCKS
    }
    return {**deciding, **fixed, **blocks}


class BeforeAll:
    """Measures test accuracy before `auto` unfreezes all layers: that of its block alone, averaged with the start."""

    def __init__(self, data: tf.Data) -> None:
        self.data, self.accuracy = data, float("nan")

    @tf.hookimpl
    def phase_started(self, run: tf.Run) -> None:
        """Measure before the phase over all layers."""
        if run.phase is not None and run.phase.name == "all":
            test = self.data.test
            with torch.no_grad():
                predictions = run.model.module(self.data.inputs.preprocess(test.fetch(torch.arange(len(test))))).argmax(
                    1
                )
            self.accuracy = float((predictions == test.targets).double().mean())


def row_of(kind: str, seed: int, epochs: int) -> dict[str, Any]:
    """Return test accuracy and epochs of every candidate on one target domain."""
    model, data = make_domain(kind, seed, per_class=10 if seed % 2 == 0 else 20)
    row: dict[str, Any] = {"kind": kind, "seed": seed, "accuracy": {}, "epochs": {}}
    for name, strategy in candidates(epochs).items():
        before = BeforeAll(data)
        result = fine_tune(model, data, strategy, seed=seed, callbacks=[before] if name == "auto" else [])
        row["accuracy"][name] = result.report["splits"]["test"]["accuracy"]
        row["epochs"][name] = sum(getattr(each, "epochs", 0) for _, each in result.strategy_steps)
        if name == "auto":
            row["accuracy"]["auto's block"] = before.accuracy
    return row


def by_seed(rows: Iterable[dict[str, Any]], figure: Callable[[dict[str, Any]], float]) -> list[float]:
    """Return the mean of a value over the kinds, for each seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(figure(row))
    return [float(np.mean(each)) for each in found.values()]


def print_strategies(rows: list[dict[str, Any]]) -> None:
    """Print the accuracy of every strategy, by level, and how far `adaptive` lies above it."""
    levels = list(dict.fromkeys(KINDS[row["kind"]].level for row in rows))

    def line(name: str) -> list[str]:
        def mean(chosen: list[dict[str, Any]]) -> str:
            return f"{100 * np.mean([row['accuracy'][name] for row in chosen]):.1f}"

        def above(row: dict[str, Any]) -> float:
            return float(row["accuracy"]["adaptive"] - row["accuracy"][name])

        parts = [mean([row for row in rows if KINDS[row["kind"]].level == level]) for level in levels]
        epochs = f"{np.mean([row['epochs'][name] for row in rows]):.0f}"
        return [name, mean(rows), *parts, epochs, "" if name == "adaptive" else difference(by_seed(rows, above))]

    names = sorted((*DECIDING, *FIXED), key=lambda name: -np.mean([row["accuracy"][name] for row in rows]))
    print_table(("strategy", "accuracy", *levels, "epochs", "`adaptive` above it"), map(line, names))


def print_regret(rows: list[dict[str, Any]]) -> None:
    """Print how far `auto` and each block are below the best single block of each target domain, and of each kind."""
    kinds = {row["kind"] for row in rows}
    mean = {
        kind: {name: np.mean([r["accuracy"][name] for r in rows if r["kind"] == kind]) for name in BLOCKS}
        for kind in kinds
    }
    best_of = {kind: max(BLOCKS, key=lambda name, kind=kind: mean[kind][name]) for kind in kinds}

    def line(name: str) -> list[str]:
        of_domain = by_seed(rows, lambda r: max(r["accuracy"][b] for b in BLOCKS) - r["accuracy"][name])
        of_kind = by_seed(rows, lambda r: r["accuracy"][best_of[r["kind"]]] - r["accuracy"][name])
        texts = [
            "{:.1f} ({:.1f} to {:.1f})".format(*(100 * each for each in interval(v))) for v in (of_domain, of_kind)
        ]
        return [f"always {name}" if name in BLOCKS else name, *texts]

    print_table(
        ("", "below the best block of each target domain", "below the best block of each kind"),
        map(line, ("auto", "auto's block", *BLOCKS)),
    )


@click.command()
@click.option("--seeds", default="200-210", show_default=True, help="First seed and last seed plus one.")
@click.option("--kinds", default=",".join(HELD_OUT), show_default=True)
@click.option("--epochs", default=20, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="A JSON lines file that a later call continues.")
def main(seeds: str, kinds: str, epochs: int, out: Path | None) -> None:
    """Run every candidate on every target domain, then print both tables."""
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    done = {(row["kind"], row["seed"]) for row in rows}
    for seed in range(*map(int, seeds.split("-"))):
        for kind in kinds.split(","):
            if (kind, seed) not in done:
                rows.append(row_of(kind, seed, epochs))
                click.echo(f"{kind}, seed {seed}: {json.dumps(rows[-1]['accuracy'])}", err=True)
                if out:
                    with out.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    print_strategies(rows)
    click.echo("")
    print_regret(rows)


if __name__ == "__main__":
    main()
