"""Accuracy and time of bf16 and of a compiled forward pass, over seeds.

    python benchmarks/precision.py --seeds 5

Each seed is a whole run on the digits that ship with the package (real data, 11 classes), the settings in turn; the
split is the same for all, so accuracies are paired. Time is that of the epochs, compilation included.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from common import interval, print_machine, print_table, shown

import tuneforge as tf
from tuneforge.plugin import StrategySteps

SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "compiled": {"compile": True},
    "bf16 and compiled": {"precision": "bf16", "compile": True},
}


def run(settings: dict[str, Any], seed: int, epochs: int) -> tuple[float, float, float]:
    """Return test accuracy and macro F1 of one run, and its seconds from the first phase to the last."""
    marks = []

    def strategy(task: tf.TaskInfo) -> StrategySteps:
        marks.append(time.perf_counter())
        yield tf.Phase("head", train="head", epochs=1, lr=2e-3)
        yield tf.Phase("all", train="all", epochs=epochs, lr=1e-3, layer_decay=0.5, schedule="cosine")
        marks.append(time.perf_counter())

    with TemporaryDirectory() as folder:
        given = {"seed": seed, "data_seed": 0, "cache": "memory", "page": False, "out": Path(folder) / "run"}
        test = tf.Engine(strategy=strategy, **given, **settings).run().report["splits"]["test"]
    return test["accuracy"], test["f1_macro"], marks[1] - marks[0]


@click.command()
@click.option("--seeds", default=5, show_default=True)
@click.option("--epochs", default=4, show_default=True)
@click.option("--only", default=",".join(SETTINGS), help="Settings, the first of which the others are paired with.")
def main(seeds: int, epochs: int, only: str) -> None:
    """Print accuracy, F1 and time of each setting, and the paired difference to the first."""
    chosen = only.split(",")
    print_machine(seeds, f"digits, head 1 epoch and all {epochs} epochs")
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in chosen}
    for seed in range(seeds):
        for name in chosen:
            found[name].append(run(SETTINGS[name], seed, epochs))
    rows = []
    for name, values in found.items():
        accuracy, f1, seconds = (list(column) for column in zip(*values, strict=True))
        pairs = zip(accuracy, (each[0] for each in found[chosen[0]]), strict=True)
        mean, low, high = interval([own - plain for own, plain in pairs])
        paired = "" if name == chosen[0] else f"{100 * mean:+.2f} [{100 * low:+.2f} .. {100 * high:+.2f}]"
        rows.append((name, f"{interval(accuracy)[0]:.4f}", paired, f"{interval(f1)[0]:.4f}", *shown(seconds)))
    print_table(("setting", "accuracy", f"points to {chosen[0]} (95 %)", "macro F1", "seconds", "spread"), rows)


if __name__ == "__main__":
    main()
