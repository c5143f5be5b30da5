"""How the benchmarks measure time, compare and print.

Entries take turns in one process, so that whatever slows the machine slows all of them; a short warm-up round is not
counted.
"""

import gc
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import click
import torch
from scipy import stats
from work import Network, Work

Entry = Callable[[Work, Network], Mapping[str, float] | None]
"""Does the work with a new network. Returns seconds by row of the table; or None, and the call itself is timed."""

Times = dict[str, list[float]]
"""Seconds of each run, by row of the table."""

PEERS = ("lightning", "finetuning-scheduler", "fastai", "skorch", "accelerate")


def once(name: str, entry: Entry, work: Work, seed: int) -> Mapping[str, float]:
    """Return the seconds of one run, by row; building the network is not counted."""
    torch.manual_seed(seed)
    network = work.build()
    gc.collect()
    began = time.perf_counter()
    own = entry(work, network)
    return {name: time.perf_counter() - began} if own is None else own


def in_turns(work: Work, entries: Mapping[str, Entry], runs: int) -> Times:
    """Return the seconds of every entry, `runs` times in turn; each round begins with another one."""
    warm_up = work.cut(2 * work.batch, 2)
    times: Times = {row: [] for name, entry in entries.items() for row in once(name, entry, warm_up, seed=0)}
    names = list(entries)
    for turn in range(runs):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for row, seconds in once(name, entries[name], work, seed=turn).items():
                times[row].append(seconds)
    return times


def in_pairs(work: Work, one: Entry, other: Entry, runs: int) -> list[tuple[float, float]]:
    """Return the seconds of two entries, back to back, in alternating order; of several rows the first counts."""
    for entry in (one, other):
        once("", entry, work.cut(2 * work.batch, 2), seed=0)
    pairs = []
    for turn in range(runs):
        found = {}
        for place in (0, 1) if turn % 2 == 0 else (1, 0):
            found[place] = next(iter(once("", (one, other)[place], work, seed=turn).values()))
        pairs.append((found[0], found[1]))
    return pairs


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and the bounds of its 95 % interval (Student's t); NaN bounds for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def print_machine(runs: int, work: str) -> None:
    """Print what was measured, where and with which versions."""
    versions = {"torch": torch.__version__}
    for name in PEERS:
        if importlib.util.find_spec(name.replace("-", "_")):
            versions[name] = importlib.metadata.version(name)
    click.echo(f"{work}; {runs} interleaved runs, median [min .. max]")
    click.echo(
        f"{os.cpu_count()} cores of {_processor()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {', '.join(f'{name} {each}' for name, each in versions.items())}\n"
    )


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table whose columns line up."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        click.echo("| " + " | ".join(each.ljust(width) for each, width in zip(line, widths, strict=True)) + " |")
    click.echo()


def print_ratios(times: Times, base: str, head: str) -> None:
    """Print a row for each entry: median, spread, and the ratio of medians to the row `base`."""
    base_s = statistics.median(times[base])
    rows = [(name, *shown(seconds), f"{statistics.median(seconds) / base_s:.2f}") for name, seconds in times.items()]
    print_table(("entry", "seconds", "spread", head), rows)


def shown(seconds: Sequence[float]) -> tuple[str, str]:
    """Return median and spread as text."""
    return f"{statistics.median(seconds):.3f}", f"[{min(seconds):.3f} .. {max(seconds):.3f}]"


def _processor() -> str:
    """Return the processor's name, where the system reports it, and its vector instructions."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]} ({torch.backends.cpu.get_cpu_capability()})"
