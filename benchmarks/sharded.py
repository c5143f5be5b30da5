"""Memory per rank and seconds per step with and without `--shard`.

    python benchmarks/sharded.py --ranks 2 --megabytes 200

Residual blocks of two linear layers, float32, AdamW, every layer trained, gloo on the CPU, one thread per rank. Peaks
are of resident memory, less that of the process before it built the model. The checkpoint is written by rank 0, which
holds the full state for that time.
"""

import itertools
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from memory import peak_mb
from torch import nn

import tuneforge as tf

WIDTH, BLOCK_MB = 1024, 16.8
STEPS, BATCH = 4, 32
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
"""Makes glibc return large blocks. Otherwise it keeps them, in pieces, and the gathers of FSDP2 make many."""


class Block(nn.Module):
    """A residual block: (batch, WIDTH) -> (batch, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        return x + self.back(nn.functional.gelu(self.wide(x)))


@tf.component(api=1)
class StepMonitor:
    """Records when each step ended, and the peak of memory before and after the checkpoint."""

    before: float = tf.option(help="Memory of the process at the start, in MB.")

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run: tf.Run) -> object:
        """Record the time after the step."""
        result = yield
        held = run.state(self)
        held.setdefault("ended", []).append(time.perf_counter())
        held["peak"] = peak_mb(resource.RUSAGE_SELF)
        tensors = [*run.model.module.parameters()]
        tensors += [each for kept in run.optimization.optimizer.state.values() for each in kept.values()]
        parts = [each.to_local() if hasattr(each, "to_local") else each for each in tensors]
        held["resident"] = sum(each.numel() * each.element_size() for each in parts) / 1e6
        return result

    @tf.hookimpl
    def evaluation_started(self, run: tf.Run) -> None:
        """Record the peak; the first evaluation comes after the checkpoint of the last step."""
        run.state(self).setdefault("saved", peak_mb(resource.RUSAGE_SELF))

    @tf.hookimpl
    def run_ended(self, run: tf.Run) -> None:
        """Print the measurements as JSON."""
        held = run.state(self)
        ended = held["ended"]
        seconds = statistics.median(later - sooner for sooner, later in itertools.pairwise(ended))
        measurements = {"resident": held["resident"], "seconds": seconds}
        measurements |= {name: held[name] - self.before for name in ("peak", "saved")}
        click.echo(json.dumps(measurements))


def work(blocks: int, shard: bool) -> None:
    """Run one rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = peak_mb(resource.RUSAGE_SELF)
    model = tf.Model.from_module(
        nn.Sequential(*(Block() for _ in range(blocks)), nn.Linear(WIDTH, 2)), head=str(blocks)
    )
    samples = BATCH * STEPS * 2
    with tempfile.TemporaryDirectory() as folder:
        tf.Engine(
            data=(torch.randn(samples, WIDTH), torch.arange(samples) % 2),
            model=model,
            strategy=[tf.Phase("all", steps=STEPS, lr=1e-4)],
            callbacks=[StepMonitor(before=before)],
            batch_size=BATCH,
            checkpoint_steps=STEPS,
            checkpoint_s=1e9,
            shard=shard,
            page=False,
            out=Path(folder) / "run" if os.environ.get("RANK", "0") == "0" else None,
        ).run()


def measured(ranks: int, blocks: int, *, shard: bool) -> list[dict[str, float]]:
    """Return what each rank measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        __file__,
        "--work",
        "--megabytes",
        str(blocks * BLOCK_MB),
        "--shard" if shard else "--whole",
    ]
    meet = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        **GIVEN_BACK,
    }
    children = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": "0"}
        )
        for rank in range(ranks)
    ]
    measurements = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise click.ClickException("a rank failed")
    return [json.loads(text.splitlines()[-1]) for text in measurements]


def row(name: str, measurements: list[dict[str, float]]) -> list[str]:
    """Return a row of the table: the rank with the largest memory, and rank 0 for the peak of a checkpoint."""
    most = [max(each[key] for each in measurements) for key in ("resident", "peak")]
    return [name, *(f"{each:,.0f}" for each in (*most, measurements[0]["saved"])), f"{measurements[0]['seconds']:.2f}"]


@click.command()
@click.option("--ranks", default=2, show_default=True, help="Processes.")
@click.option("--megabytes", default=200.0, show_default=True, help="Approximate size of the weights.")
@click.option("--work", "works", is_flag=True, hidden=True)
@click.option("--shard/--whole", hidden=True)
def main(ranks: int, megabytes: float, works: bool, shard: bool) -> None:
    """Print memory and time of one process, and of several ranks without and with `--shard`."""
    blocks = max(1, round(megabytes / BLOCK_MB))
    if works:
        work(blocks, shard)
        return
    from common import print_table

    click.echo(f"{blocks * BLOCK_MB:,.0f} MB of weights, AdamW, torch {torch.__version__}, {os.cpu_count()} cores\n")
    ways = {
        "one process": (1, False),
        f"{ranks} ranks, whole": (ranks, False),
        f"{ranks} ranks, --shard": (ranks, True),
    }
    print_table(
        [
            "",
            "weights and optimizer state, MB per rank",
            "peak in training, MB per rank",
            "peak of rank 0 with a checkpoint, MB",
            "s per step",
        ],
        [row(name, measured(count, blocks, shard=parts)) for name, (count, parts) in ways.items()],
    )


if __name__ == "__main__":
    main()
