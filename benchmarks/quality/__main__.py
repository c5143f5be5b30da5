"""Accuracy on real tasks with few labels: tuneforge's default run against what a user would do instead.

python benchmarks/quality --prepare --data ROOT     # once: read the samples, compute features
python benchmarks/quality --estimate                # CPU hours of what has no result yet
python benchmarks/quality                           # run it; a stopped run goes on
python benchmarks/quality --table                   # the tables, from the results there are
"""

import importlib.metadata
import subprocess
import time
from functools import partial
from pathlib import Path

import click
import costs
import own_methods
import peer_methods
import records
import store
import tables
import torch
from sklearn.metrics import accuracy_score, f1_score
from splits import Cell
from tasks import CELLS, NUM_SPLITS, TASKS, cells

METHODS = {name: method for name, (method, _) in peer_methods.PEERS.items()}
METHODS |= {
    own_methods.DEFAULT: own_methods.tuneforge_default,
    **{
        f"{own_methods.DEFAULT}:{name}": partial(own_methods.tuneforge_default, strategy=name)
        for name in own_methods.STRATEGIES
    },
}
CELL_OF = {str(cell): cell for cell in CELLS}


def version_of(method: str) -> str:
    """Return the version of a peer's library; of tuneforge, the commit."""
    if method in peer_methods.PEERS:
        return importlib.metadata.version(peer_methods.PEERS[method][1])
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run_one(cell: Cell, split: int, method: str, tensors: store.TaskTensors) -> records.Record:
    """Train and test once; a failure becomes a record too."""
    job = peer_methods.Job(tensors, tensors.rows(cell, split), seed=split)
    torch.manual_seed(split)
    began, error, accuracy, macro_f1 = time.process_time(), "", None, None
    try:
        found = METHODS[method](job)
    except Exception as raised:  # noqa: BLE001 - whatever a library raises becomes a record
        error = f"{type(raised).__name__}: {raised}"[:500]
    else:
        truth = tensors.labels[job.rows.test]
        accuracy, macro_f1 = float(accuracy_score(truth, found)), float(f1_score(truth, found, average="macro"))
    seconds = round(time.process_time() - began, 2)
    return records.Record(str(cell), split, method, accuracy, macro_f1, seconds, version_of(method), error)


def keys(half: str, methods: tuple[str, ...], only: tuple[str, ...], num_splits: int) -> list[records.Key]:
    """Return what is to be run: the first split of every cell, then the second."""
    chosen = [cell for cell in cells(half) if not only or cell.task in only or str(cell) in only]
    return [(str(cell), split, method) for split in range(num_splits) for method in methods for cell in chosen]


@click.command()
@click.option("--data", "root", type=click.Path(path_type=Path, exists=True), default=Path("/"), show_default=True)
@click.option("--prepare", is_flag=True, help="Read the samples and compute features; then stop.")
@click.option("--estimate", is_flag=True, help="Print CPU hours of what has no result yet; then stop.")
@click.option("--table", is_flag=True, help="Print the tables of the results there are; then stop.")
@click.option("--half", type=click.Choice(["choosing", "reporting", "all"]), default="all", show_default=True)
@click.option("--methods", default=",".join(m for m in METHODS if ":" not in m), show_default=True)
@click.option("--only", default="", help="Only these tasks or cells, separated by commas.")
@click.option("--splits", "num_splits", type=click.IntRange(1, NUM_SPLITS), default=NUM_SPLITS, show_default=True)
@click.option("--hours", default=10.0, show_default=True, help="CPU hours at most; a longer estimate is refused.")
@click.option("--out", type=click.Path(path_type=Path), help="File of results; default: in the cache folder.")
def main(
    root: Path, prepare: bool, estimate: bool, table: bool, half: str, methods: str, only: str,
    num_splits: int, hours: float, out: Path | None,
) -> None:  # fmt: skip
    """Run what has no result yet, or print what there is."""
    peer_methods.silence()
    out = out or store.cache_folder() / "results.jsonl"
    chosen = tuple(filter(None, only.split(",")))
    if prepare:
        for task in TASKS.values():
            click.echo(store.prepare(task, root))
        return
    if table:
        found = {key: record for key, record in records.read(out).items() if record.split < num_splits}
        click.echo(tables.render(found, half))
        return
    done = records.read(out)
    wanted = list(records.pending(keys(half, tuple(methods.split(",")), chosen, num_splits), done))
    expected = costs.estimate(wanted, done)
    click.echo(f"{len(wanted)} runs without a result, about {expected / 3600:.2f} CPU hours")
    if expected > 3600 * hours:
        raise click.ClickException(f"that is more than --hours {hours:g}; choose fewer --methods, --splits, or --only")
    if estimate:
        return
    tensors = {name: store.load(name) for name in {CELL_OF[cell].task for cell, _, _ in wanted}}
    for cell, split, method in wanted:
        record = run_one(CELL_OF[cell], split, method, tensors[CELL_OF[cell].task])
        records.append(out, record)
        click.echo(f"{cell} {split} {method} {record.error or f'{record.accuracy:.3f}'} {record.seconds:.1f} s")


if __name__ == "__main__":
    main()
