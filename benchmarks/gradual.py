"""Gradual unfreezing of the whole digit CNN with and without the feature cache: six phases of E epochs each.

    python benchmarks/gradual.py --runs 5

The cut moves with every phase; features are cached where that pays. Times are those of all phases together; the
differences are between the two runs at their end: of the validation metrics, and of the logits on all images. The
pretrained network that ships is fine-tuned on 1,437 + 360 handwritten digits.
"""

import statistics

import click
import torch
from common import print_machine, print_table, shown
from ours import Done, empty_cache, tuned
from work import Work, digits

import tuneforge as tf
from tuneforge.sklearn import data_from_arrays

RUNS = {"auto": "cached", "off": "uncached"}


def unfreeze(work: Work, cache: str, epochs: int, seed: int) -> Done:
    """Run the strategy `gradual-unfreeze`."""
    (x, y), (x_val, y_val) = work.train, work.val
    data = data_from_arrays(x, y, x_val=x_val, y_val=y_val, x_test=x_val[:2], y_test=y_val[:2])
    strategy = tf.use("gradual-unfreeze", group_epochs=epochs, epochs=epochs)
    with empty_cache() as folder:
        return tuned(folder / "run", data=data, model="digit-cnn", strategy=strategy, cache=cache, seed=seed)


def differences(work: Work, one: Done, other: Done) -> tuple[float, float]:
    """Return the largest difference of the validation metrics, and of the logits."""
    metrics = [done.result.report["splits"]["val"] for done in (one, other)]
    numbers = [{name: each for name, each in split.items() if isinstance(each, float)} for split in metrics]
    logits = []
    for done in (one, other):
        with torch.inference_mode():
            parts = done.result.model.module.eval()(work.train[0]), done.result.model.module(work.val[0])
        logits.append(torch.cat(parts))
    return max(abs(numbers[0][name] - numbers[1][name]) for name in numbers[0]), float(
        (logits[0] - logits[1]).abs().max()
    )


def compared(work: Work, epochs: int, runs: int) -> tuple[str, ...]:
    """Return a row: both runs in turn, with the ratio of medians and the largest differences of any pair."""
    seconds: dict[str, list[float]] = {cache: [] for cache in RUNS}
    apart = []
    for turn in range(runs):
        pair = {cache: unfreeze(work, cache, epochs, seed=turn) for cache in sorted(RUNS, reverse=turn % 2 == 1)}
        for cache, done in pair.items():
            seconds[cache].append(done.steps_s)
        apart.append(differences(work, pair["auto"], pair["off"]))
    faster = statistics.median(seconds["off"]) / statistics.median(seconds["auto"])
    metrics, logits = (max(column) for column in zip(*apart, strict=True))
    times = [" ".join(shown(seconds[cache])) for cache in RUNS]
    return str(epochs), *times, f"{faster:.2f}", f"{metrics:.1e}", f"{logits:.1e}"


@click.command()
@click.option("--runs", default=5, show_default=True)
@click.option("--epochs", type=int, multiple=True, default=(1, 3, 5), show_default=True, help="Of each phase.")
@click.option("--samples", type=int, default=None, help="Of the training images only so many.")
def main(runs: int, epochs: tuple[int, ...], samples: int | None) -> None:
    """Print a row for each number of epochs."""
    work = digits(frozen=False).cut(samples, None)
    unfreeze(work.cut(64, None), "auto", 2, seed=0)
    print_machine(runs, f"gradual-unfreeze, digit CNN, {len(work.train[0]):,} + {len(work.val[0]):,} digits")
    heads = ("epochs a phase", *(f"{name}, seconds" for name in RUNS.values()), "times faster")
    rows = [compared(work, each, runs) for each in epochs]
    print_table((*heads, "largest difference of a metric", "of a logit"), rows)


if __name__ == "__main__":
    main()
