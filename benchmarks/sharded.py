"""What `--shard` saves: memory of a rank and seconds of a step, for ranks that hold a model whole and in parts.

    python benchmarks/sharded.py --ranks 2 --megabytes 200

Residual blocks of two linear layers, float32, AdamW, every layer trained, gloo on the CPU, a thread a rank. Peaks are
of resident memory, less what the process held before it made the model. The checkpoint is written by rank 0, which
holds all that it writes for that time.
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
"""Tells glibc to give large blocks back. It keeps them otherwise, in pieces, and the gathers of FSDP2 make many."""


class Block(nn.Module):
    """A residual block: (batch, WIDTH) -> (batch, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output."""
        return x + self.back(nn.functional.gelu(self.wide(x)))


@tf.component(api=1)
class Readings:
    """Notes when each step ended, and the peak of memory before and after the checkpoint."""

    before: float = tf.option(help="MB that the process held at first.")

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run: tf.Run) -> object:
        """After the step."""
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
        """The first comes after the checkpoint of the last step."""
        run.state(self).setdefault("saved", peak_mb(resource.RUSAGE_SELF))

    @tf.hookimpl
    def run_ended(self, run: tf.Run) -> None:
        """Say it all, as JSON."""
        held = run.state(self)
        ended = held["ended"]
        seconds = statistics.median(later - sooner for sooner, later in itertools.pairwise(ended))
        said = {"resident": held["resident"], "seconds": seconds}
        said |= {name: held[name] - self.before for name in ("peak", "saved")}
        click.echo(json.dumps(said))


def work(blocks: int, shard: bool) -> None:
    """What one rank does."""
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
            callbacks=[Readings(before=before)],
            batch_size=BATCH,
            checkpoint_steps=STEPS,
            checkpoint_s=1e9,
            shard=shard,
            page=False,
            out=Path(folder) / "run" if os.environ.get("RANK", "0") == "0" else None,
        ).run()


def measured(ranks: int, blocks: int, *, shard: bool) -> list[dict[str, float]]:
    """What each rank says."""
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
    said = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise click.ClickException("a rank failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def row(name: str, said: list[dict[str, float]]) -> list[str]:
    """A row of the table: the rank that holds most, and the first for what it holds while it saves."""
    most = [max(each[key] for each in said) for key in ("resident", "peak")]
    return [name, *(f"{each:,.0f}" for each in (*most, said[0]["saved"])), f"{said[0]['seconds']:.2f}"]


@click.command()
@click.option("--ranks", default=2, show_default=True, help="Processes.")
@click.option("--megabytes", default=200.0, show_default=True, help="Of weights, about.")
@click.option("--work", "works", is_flag=True, hidden=True)
@click.option("--shard/--whole", hidden=True)
def main(ranks: int, megabytes: float, works: bool, shard: bool) -> None:
    """Print memory and time of one process, of ranks that hold the whole model, and of ranks that hold parts."""
    blocks = max(1, round(megabytes / BLOCK_MB))
    if works:
        work(blocks, shard)
        return
    from common import say_table

    click.echo(f"{blocks * BLOCK_MB:,.0f} MB of weights, AdamW, torch {torch.__version__}, {os.cpu_count()} cores\n")
    ways = {
        "one process": (1, False),
        f"{ranks} ranks, whole": (ranks, False),
        f"{ranks} ranks, --shard": (ranks, True),
    }
    say_table(
        [
            "",
            "weights and moments, MB a rank",
            "peak in training, MB a rank",
            "peak of rank 0 with a checkpoint, MB",
            "s a step",
        ],
        [row(name, measured(count, blocks, shard=parts)) for name, (count, parts) in ways.items()],
    )


if __name__ == "__main__":
    main()
