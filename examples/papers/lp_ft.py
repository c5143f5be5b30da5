"""LP-FT's two-layer theorem (Kumar et al. 2022, arXiv 2202.10054), on synthetic data.

y = v* B* x with B* orthonormal (5, 40). The network v B x comes with features B near B*, and learns from 100 samples
whose x lie in a subspace of 20 dimensions; then it is tested on x of all 40. Claim: full fine-tuning from a random head
distorts the features, so its error out of distribution is the largest; a linear probe keeps them; LP-FT, which starts
from the probe's head, has the smallest error.
"""

from __future__ import annotations

import math

import click
import torch
from shifts import fine_tune
from tables import difference, interval, print_table
from torch import Tensor, nn

import tuneforge as tf
from tuneforge.plugin import StrategyStep
from tuneforge.sklearn import data_from_arrays

DIMENSIONS, SUBSPACE, FEATURES = 40, 20, 5


def problem(seed: int, *, samples: int, noise: float) -> tuple[tf.Model, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a network with good features and a random head, samples (x, y) in the subspace, and samples of all x."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    true_features = torch.linalg.qr(normal(DIMENSIONS, FEATURES))[0].T
    true_head = normal(FEATURES)
    subspace = torch.linalg.qr(normal(DIMENSIONS, SUBSPACE))[0]
    inside, outside = normal(samples, SUBSPACE) @ subspace.T, normal(1000, DIMENSIONS)
    network = nn.Sequential(nn.Linear(DIMENSIONS, FEATURES, bias=False), nn.Linear(FEATURES, 1))
    with torch.no_grad():
        network[0].weight.copy_(true_features + noise / math.sqrt(DIMENSIONS) * normal(FEATURES, DIMENSIONS))
        network[1].weight.copy_(normal(1, FEATURES))
        network[1].bias.zero_()

    def with_targets(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x @ true_features.T @ true_head

    return tf.Model.from_module(network, head="1"), with_targets(inside), with_targets(outside)


def errors(seed: int, *, samples: int, noise: float, epochs: int) -> dict[str, tuple[float, float]]:
    """Return the root mean squared error of each method, inside the subspace (on validation) and outside."""
    model, (x, y), (x_out, y_out) = problem(seed, samples=samples, noise=noise)
    cut = samples // 5
    data = data_from_arrays(x[cut:], y[cut:], x_val=x[:cut], y_val=y[:cut], x_test=x_out, y_test=y_out)
    probe = tf.HeadFit("probe", l2=1e-6)
    descent = tf.Phase("all", epochs=epochs, lr=0.01, optimizer=tf.use("sgd", momentum=0.9), weight_decay=0.0)
    methods: dict[str, list[StrategyStep]] = {"full": [descent], "probe": [probe], "lp-ft": [probe, descent]}
    found = {}
    for name, steps in methods.items():
        splits = fine_tune(model, data, steps, seed=seed, batch_size=samples).report["splits"]
        found[name] = (splits["val"]["rmse"], splits["test"]["rmse"])
    return found


@click.command()
@click.option("--seeds", default=10, show_default=True)
@click.option("--samples", default=100, show_default=True)
@click.option("--noise", default=0.3, show_default=True, help="Distance of the initial features from the true ones.")
@click.option("--epochs", default=200, show_default=True, help="Steps of gradient descent.")
def main(seeds: int, samples: int, noise: float, epochs: int) -> None:
    """Print both errors of each method, and the paired differences outside."""
    torch.set_num_threads(1)
    runs = [errors(seed, samples=samples, noise=noise, epochs=epochs) for seed in range(seeds)]

    def line(name: str) -> list[str]:
        texts = ["{:.3f} ({:.3f} to {:.3f})".format(*interval([run[name][place] for run in runs])) for place in (0, 1)]
        above = [run[name][1] - run["lp-ft"][1] for run in runs]
        return [name, *texts, "" if name == "lp-ft" else difference(above, scale=1.0, digits=3)]

    print_table(
        ("method", "error inside", "error outside", "above `lp-ft` outside"), map(line, ("full", "probe", "lp-ft"))
    )


if __name__ == "__main__":
    main()
