"""Peak memory of a run on a folder of images that are decoded on demand, by the number of files.

    python benchmarks/memory.py --sizes 1000,10000,100000

The images are 32x32, in ten classes; most are hard links to a few hundred files. Each run is a process of its own: a
small network, 50 steps, evaluation of all splits. `one folder` is split by the run, so that validation and test grow
too; in `three folders` only training grows. Prints the peak of resident memory, of the run and, with `--num-workers`,
of the largest worker process (which shares pages with the run).
"""

import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

CLASSES, DISTINCT = 10, 300


def make(root: Path, count: int, *, pixels: Path) -> None:
    """Make one folder per class, `count` images in all, linked to the files in `pixels`."""
    for number in range(count):
        folder = root / f"class {number % CLASSES}"
        if number < CLASSES:
            folder.mkdir(parents=True)
        os.link(pixels / f"{number % DISTINCT}.bmp", folder / f"{number:07}.bmp")


def make_pixels(folder: Path) -> None:
    """Write the distinct images."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    chance = np.random.default_rng(0)
    for number in range(DISTINCT):
        Image.fromarray(chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.bmp")


def peak_mb(whose: int) -> float:
    """Return the peak of resident memory so far, of this process or of its largest child."""
    status = Path("/proc/self/status")
    if whose == resource.RUSAGE_SELF and status.exists():  # getrusage would count what was there before exec
        (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(kilobytes) / 1024
    return resource.getrusage(whose).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def measure(folder: Path, workers: int) -> None:
    """Execute the run in this process, and print its peak and that of its largest child, in MB."""
    import torch

    import tuneforge as tf

    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(CLASSES)
    )
    network(torch.zeros(1, 3, 32, 32))
    data = tf.use("image-folder", path=str(folder), size=32, memory_mb=0)
    plan = [tf.Phase("all", steps=50, lr=0.01)]
    with tempfile.TemporaryDirectory() as out:
        tf.Engine(
            data=data,
            model=tf.Model.from_module(network, head="3"),
            strategy=plan,
            num_workers=workers,
            page=False,
            out=Path(out) / "run",
        ).run()
    click.echo(f"{peak_mb(resource.RUSAGE_SELF):.1f} {peak_mb(resource.RUSAGE_CHILDREN):.1f}")


def rows(sizes: list[int], workers: int, temporary: Path) -> Iterator[list[str]]:
    """Return a row of the table for each folder."""
    make_pixels(temporary / "pixels")
    for count in sizes:
        for layout, parts in {
            "one folder": {"": count},
            "three folders": {"train": count, "val": 500, "test": 500},
        }.items():
            root = temporary / f"{layout} {count}"
            for name, size in parts.items():
                make(root / name, size, pixels=temporary / "pixels")
            command = [sys.executable, __file__, "--measured", str(root), "--num-workers", str(workers)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            yield [layout, f"{count:,}", *done.stdout.split()[: 2 if workers else 1]]


@click.command()
@click.option("--sizes", default="1000,10000,100000", show_default=True, help="Numbers of files.")
@click.option("--num-workers", default=0, show_default=True, help="Processes that decode.")
@click.option("--measured", type=click.Path(path_type=Path), hidden=True)
def main(sizes: str, num_workers: int, measured: Path | None) -> None:
    """Print the peak for each number of files, and each layout of the folders."""
    if measured is not None:
        measure(measured, num_workers)
        return
    from common import print_table

    click.echo(f"{platform.platform()}, Python {platform.python_version()}, {num_workers} processes that decode\n")
    heads = ["layout", "files", "peak MB", *(["peak MB of a process that decodes"] if num_workers else [])]
    with tempfile.TemporaryDirectory() as temporary:
        print_table(heads, rows([int(size) for size in sizes.split(",")], num_workers, Path(temporary)))


if __name__ == "__main__":
    main()
