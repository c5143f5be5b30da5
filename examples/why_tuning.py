"""Pretrained against randomly initialized weights: five labels per class, the same budget, paired over seeds.

Nothing is selected on validation: both end on the weights of the last epoch. Prints test accuracy of both for each
seed, the paired mean of the difference and its 95 % interval (Student's t).
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from scipy import stats

import tuneforge as tf


def accuracy(seed: int, *, pretrained: bool, per_class: int, epochs: int) -> float:
    """Return the test accuracy on the real digits after training every layer for `epochs`."""
    with TemporaryDirectory() as folder:
        result = tf.Engine(
            data=tf.use("digits", other_share=0.0, per_class=per_class),
            model=tf.use("digit-cnn", pretrained=pretrained),
            strategy=tf.use("full", epochs=epochs, lr=1e-3, restore_best=False),
            batch_size=10,
            seed=seed,
            page=False,
            out=Path(folder) / "run",
        ).run()
    return float(result.report["splits"]["test"]["accuracy"])


@click.command()
@click.option("--seeds", default=12, show_default=True)
@click.option("--per-class", default=5, show_default=True)
@click.option("--epochs", default=20, show_default=True)
def main(seeds: int, per_class: int, epochs: int) -> None:
    """Run both for each seed."""
    pairs = []
    for seed in range(seeds):
        pair = [accuracy(seed, pretrained=flag, per_class=per_class, epochs=epochs) for flag in (True, False)]
        pairs.append(pair)
        click.echo(f"seed {seed:>2}: pretrained {pair[0]:.4f}  from scratch {pair[1]:.4f}")
    both = np.array(pairs)
    difference = both[:, 0] - both[:, 1]
    low, high = stats.t.interval(0.95, len(difference) - 1, loc=difference.mean(), scale=stats.sem(difference))
    click.echo(f"mean: pretrained {both[:, 0].mean():.4f}, from scratch {both[:, 1].mean():.4f}")
    click.echo(
        f"paired difference {difference.mean():+.4f}, 95 % interval {low:+.4f} to {high:+.4f} over {seeds} seeds"
    )


if __name__ == "__main__":
    main()
