"""An estimate of a run that is too large for one machine: unit costs measured here, and sums of them.

    python benchmarks/scale.py --samples 100000000 --ranks 1000

Prints the table of docs/distributed.md. Measured: the order of samples, their names, the fingerprint of a split, and a
checkpoint. Assumed, by flags: size of the model, time of a sample, bandwidth and latency of the network.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from tuneforge import Split
from tuneforge.engine.data.sampler import EpochSampler
from tuneforge.exporting import save_tensors

RUNS = 5
DAY_S = 86_400


def median_s(work: Callable[[], object]) -> float:
    """Return the median seconds of a few runs."""
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def order_s_per_sample(samples: int) -> float:
    """Return the seconds to find a sample by its position, in blocks of 16,384 from the middle of an epoch."""
    order, block = EpochSampler(samples, seed=0, epoch=3), 2**14
    return median_s(lambda: order.indices(samples // 2, samples // 2 + block)) / block


def names_bytes_per_sample(count: int = 100_000) -> float:
    """Return the memory of a path as the name of a sample."""
    names = [f"train/class-{number % 1000:04d}/image-{number:09d}.jpg" for number in range(count)]
    return (sys.getsizeof(names) + sum(map(sys.getsizeof, names))) / count


def fingerprint_s_per_sample(count: int = 100_000) -> float:
    """Return the seconds to hash names and targets of a split."""
    split = Split(torch.zeros(count, 1), torch.zeros(count, dtype=torch.int64), ids=[f"{n:012d}" for n in range(count)])
    return median_s(split.fingerprint) / count


def checkpoint_s_per_byte(megabytes: int = 64) -> float:
    """Return the seconds to write and flush a byte of a checkpoint."""
    tensors = {"weight": torch.rand(megabytes * 2**18)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.safetensors"
        return median_s(lambda: save_tensors(tensors, path, metadata={})) / (megabytes * 2**20)


@click.command()
@click.option("--samples", default=10**8)
@click.option("--ranks", default=1000)
@click.option("--batch", default=32, help="Samples per rank and step.")
@click.option("--parameters", default=25_600_000, help="Parameters of the model; the default is resnet50.")
@click.option("--features", default=2048, help="Cached features per sample.")
@click.option("--sample-ms", default=1.2, help="Forward and backward pass of a sample on one accelerator.")
@click.option("--network-gb-s", default=25.0, help="All-reduce bandwidth of a rank.")
@click.option("--latency-us", default=40.0, help="Latency of the smallest all-reduce over all ranks.")
def main(
    samples: int, ranks: int, batch: int, parameters: int, features: int, sample_ms: float, network_gb_s: float,
    latency_us: float,
) -> None:  # fmt: skip
    """Print the cost of an epoch and of a checkpoint."""
    order, names = order_s_per_sample(samples), names_bytes_per_sample()
    hashing, writing = fingerprint_s_per_sample(), checkpoint_s_per_byte()
    steps = samples / (ranks * batch)
    compute_s = batch * sample_ms / 1000
    sum_s = 2 * parameters * 4 / (network_gb_s * 1e9)
    state_gb = 3 * parameters * 4 / 1e9
    rows = [
        ("steps per epoch", f"{steps:,.0f}"),
        ("forward and backward pass of a step", f"{1000 * compute_s:,.1f} ms"),
        ("sum of the gradients of a step, not overlapped", f"{1000 * sum_s:,.1f} ms"),
        ("two reductions of flags per step", f"{2 * latency_us / 1000:,.2f} ms"),
        ("order of a rank's part of a batch", f"{1e6 * order * batch:,.0f} µs"),
        ("an epoch", f"{steps * (compute_s + sum_s + 2 * latency_us / 1e6 + order * batch) / 60:,.1f} min"),
        ("state of the sampler, at any size", "3 integers"),
        ("targets, on each rank", f"{samples * 8 / 1e9:,.1f} GB"),
        ("names of samples, on each rank", f"{samples * names / 1e9:,.1f} GB"),
        ("fingerprint of the split, at the start", f"{samples * hashing / 60:,.1f} min"),
        ("a checkpoint: weights and two moments", f"{state_gb:,.2f} GB, {state_gb * 1e9 * writing:,.1f} s by rank 0"),
        ("metrics", "one line per epoch"),
        ("cached features of the frozen backbone", f"{samples * features * 4 / 1e9:,.0f} GB"),
        (
            "  one forward pass to compute them, shared by all",
            f"{samples * sample_ms / 3 / 1000 / ranks / 60:,.1f} min",
        ),
    ]
    click.echo(
        f"{samples:,} samples, {ranks:,} ranks of {batch}, {parameters:,} parameters\n\n| what | cost |\n| --- | --- |"
    )
    for what, cost in rows:
        click.echo(f"| {what} | {cost} |")
    click.echo(
        f"\nmeasured here: order {1e9 * order:,.0f} ns per sample, name {names:,.0f} bytes, fingerprint "
        f"{1e6 * hashing:,.2f} µs per sample, checkpoint {1e-6 / writing:,.0f} MB/s"
    )


if __name__ == "__main__":
    main()
