"""What a frozen phase costs beside one look at the data: digit CNN, 1,437 + 360 digits, 5 epochs, batch 32.

    python examples/benchmarks/frozen_phase.py --runs 7

Entries are interleaved in one process. `one look` is an inference pass over all images at its best setting
(channels-last, batches of 64); `by hand` is that look and the same head steps on its features; `tuneforge` is the phase
as a run does it, hooks, metrics, proof and log included, timed from the phase's start to its end.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import tuneforge as tf
from tuneforge.builtin.arrays import Tensors
from tuneforge.builtin.digit_cnn import DigitNet
from tuneforge.builtin.targets import Classes

EPOCHS, BATCH = 5, 32


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 3, 32, 32) and labels (1797,)."""
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return F.interpolate(small, 32, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels)


def look(network: DigitNet, images: torch.Tensor) -> torch.Tensor:
    """Features (n, 512) of all images."""
    body = torch.nn.Sequential(*(each for name, each in network.named_children() if name != "head"))
    body.to(memory_format=torch.channels_last).eval()
    caught = []
    with torch.inference_mode():
        for part in images.split(64):
            features = part.contiguous(memory_format=torch.channels_last)
            for conv in body:
                features = F.max_pool2d(F.relu(conv(features)), 2)
            caught.append(features.flatten(1))
    return torch.cat(caught)


def by_hand(network: DigitNet, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One look, then the head alone on its features, with validation."""
    features = look(network, images).clone()
    optimizer = torch.optim.SGD(network.head.parameters(), lr=0.01, momentum=0.9)
    for _ in range(EPOCHS):
        for rows in torch.randperm(1437).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network.head(features[rows]), labels[rows]).backward()
            optimizer.step()
        with torch.inference_mode():
            (network.head(features[1437:]).argmax(1) == labels[1437:]).float().mean().item()


def ours(images: torch.Tensor, labels: torch.Tensor, cache: str) -> float:
    """Seconds of the phase, from the strategy's question to its answer."""
    cut = [slice(0, 1437), slice(1437, None), slice(1437, 1439)]
    train, val, test = (tf.Split(images[each], labels[each]) for each in cut)
    data = tf.Data(train, val, test, inputs=Tensors(), targets=Classes(names=tuple("0123456789")))
    marks = []

    def strategy(brief: tf.Brief) -> tf.Steps:
        marks.append(time.perf_counter())
        yield tf.Phase("head", train="head", epochs=EPOCHS, lr=0.01)
        marks.append(time.perf_counter())

    with TemporaryDirectory() as folder:
        optimizer, out = tf.use("sgd", momentum=0.9), Path(folder) / "run"
        network = tf.Model.of(DigitNet(10), head="head")
        tf.Engine(
            data=data, model=network, strategy=strategy, optimizer=optimizer, cache=cache, page=False, out=out
        ).run()
    return marks[1] - marks[0]


def timed(work: Callable[..., object], *arguments: object) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


@click.command()
@click.option("--runs", default=7, show_default=True)
def main(runs: int) -> None:
    """Print median, spread and the ratio to one look."""
    images, labels = digits()
    seconds: dict[str, list[float]] = {
        name: [] for name in ("one look", "by hand", "tuneforge", "tuneforge, --cache off")
    }
    for turn in range(runs + 1):
        row = (
            timed(look, DigitNet(10), images),
            timed(by_hand, DigitNet(10), images, labels),
            ours(images, labels, "auto"),
            ours(images, labels, "off"),
        )
        for name, value in zip(seconds, row, strict=True):
            seconds[name] += [value] if turn else []
    base = statistics.median(seconds["one look"])
    click.echo(
        f"{runs} interleaved runs, {os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()}), "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        click.echo(
            f"{name:24} {median:6.3f} s  [{min(values):.3f} .. {max(values):.3f}]  {median / base:5.2f} x one look"
        )


if __name__ == "__main__":
    main()
