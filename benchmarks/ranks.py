"""Throughput of 2 ranks with a thread each against 1 process with 2 threads, every layer training, batch 32.

    python benchmarks/ranks.py --runs 5

The digit CNN on 1,437 digits at 3x32x32, and resnet18 on 256 synthetic images at 3x64x64. Each run is a process of its
own, or two that torchrun starts and gloo joins; they take turns. The epochs after the first are counted, each with its
validation, its freeze check and its line in the log.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import attrs
import click
import torch
from common import print_machine, print_table
from ours import on_work
from work import Work, digits, resnet_network

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@attrs.frozen
class Way:
    """How a run is started.

    Args:
        threads: Threads of each process.
        launcher: Arguments of the interpreter before the script.
    """

    threads: int
    launcher: tuple[str, ...] = ()


WAYS: Mapping[str, Way] = {
    "1 process, 2 threads": Way(2),
    "2 ranks, 1 thread each": Way(1, TORCHRUN),
    "1 process, 1 thread": Way(1),
}
BASE = next(iter(WAYS))


def images() -> Work:
    """Return resnet18 with random weights on 256 and 64 synthetic images at 3x64x64."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(320, 3, 64, 64, generator=generator), torch.randint(0, 10, (320,), generator=generator)
    return Work(resnet_network, (x[:256], y[:256]), (x[256:], y[256:]), frozen=False)


WORKS: Mapping[str, Callable[[], Work]] = {"digit CNN": lambda: digits(frozen=False), "resnet18 at 64x64": images}


def samples_per_s(name: str, way: Way, samples: int | None, epochs: int) -> float:
    """Return the training samples per second of one run, in processes of its own."""
    shared = {"OMP_NUM_THREADS": str(way.threads), "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    with TemporaryDirectory() as folder:
        command = [sys.executable, *way.launcher, __file__, "--inside", name, "--folder", folder]
        command += ["--epochs", str(epochs), *(["--samples", str(samples)] if samples else [])]
        environment = {**os.environ, **shared, "TUNEFORGE_CACHE": str(Path(folder) / "cache")}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return float((Path(folder) / "samples-per-s").read_text())


def inside(work: Work, folder: Path) -> None:
    """Execute one run, as one process or as a rank of several; rank 0 writes the result."""
    torch.manual_seed(0)
    done = on_work(work, work.build(), folder / "run")
    if os.environ.get("RANK", "0") == "0":
        (folder / "samples-per-s").write_text(str(len(work.train[0]) / done.further_epoch_s))


def in_turns(name: str, runs: int, samples: int | None, epochs: int) -> Mapping[str, list[float]]:
    """Return the samples per second of every way, `runs` times in turn; each round begins with another one."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    names = list(WAYS)
    for turn in range(runs):
        first = turn % len(names)
        for way in names[first:] + names[:first]:
            rates[way].append(samples_per_s(name, WAYS[way], samples, epochs))
    return rates


@click.command()
@click.option("--runs", default=5, show_default=True)
@click.option("--epochs", default=4, show_default=True)
@click.option("--samples", type=int, default=None, help="Number of training images; all by default.")
@click.option("--inside", "name", hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(runs: int, epochs: int, samples: int | None, name: str | None, folder: Path | None) -> None:
    """Print a table for each network."""
    if name is not None and folder is not None:
        inside(WORKS[name]().cut(samples, epochs), folder)
        return
    print_machine(runs, f"every layer, batch 32, {epochs} epochs of which the first is not counted")
    for each in WORKS:
        rates = in_turns(each, runs, samples, epochs)
        base = statistics.median(rates[BASE])
        rows = [
            (way, f"{statistics.median(found):.0f}", f"[{min(found):.0f} .. {max(found):.0f}]",
             f"{statistics.median(found) / base:.2f}")
            for way, found in rates.items()
        ]  # fmt: skip
        print_table((each, "samples per second", "spread", f"to {BASE}"), rows)


if __name__ == "__main__":
    main()
