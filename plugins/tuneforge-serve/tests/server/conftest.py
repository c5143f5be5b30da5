"""Small tuned models to be served, and a store whose versions answer differently."""

from __future__ import annotations

import shutil
from pathlib import Path

import attrs
import numpy as np
import pytest
from bundles import digits

import tuneforge as tf
from tuneforge.engine.storage.run_dir import write_json
from tuneforge.exporting.bundle import CHAMPION
from tuneforge.exporting.exporter import export


def make_table(path: Path, *, seed: int, rows: int = 120) -> Path:
    """Rows of two numbers and a word; the class follows from them."""
    rng = np.random.default_rng(seed)
    lines = ["size,weight,colour,kind"]
    for _ in range(rows):
        size, weight = rng.normal(size=2)
        colour = ("red", "blue")[int(rng.integers(2))]
        kind = "apple" if size + 2 * (colour == "red") > weight + 1 else "plum"
        lines.append(f"{size:.3f},{weight:.3f},{colour},{kind}")
    path.write_text("\n".join(lines) + "\n")
    return path


def tune_table(folder: Path, *, seed: int) -> Path:
    """A finished run on such rows."""
    data = tf.use("table-csv", path=make_table(folder.parent / f"{folder.name}.csv", seed=7), target="kind")
    strategy = tf.use("full", epochs=3, lr=1e-2)
    return tf.Engine(data=data, model="mlp", strategy=strategy, seed=seed, page=False, out=folder).run().run_dir


@pytest.fixture(scope="session")
def table_run(tmp_path_factory) -> Path:
    return tune_table(tmp_path_factory.mktemp("table") / "fruit", seed=1)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """A digit network whose head was solved on a few real digits; good enough to read a clear one."""
    return digits(tmp_path_factory.mktemp("digits") / "digits", tf.HeadFit("head"), per_class=60).run_dir


@pytest.fixture(scope="session")
def bundles(tmp_path_factory, table_run) -> list[Path]:
    """Two bundles that answer differently."""
    folder = tmp_path_factory.mktemp("bundles")
    runs = [table_run, tune_table(folder / "other", seed=2)]
    return [export(run, to=("safetensors",), out=folder / f"bundle{n}", name="fruit") for n, run in enumerate(runs)]


@attrs.define(eq=False)
class Store:
    """A store as `promote` leaves it: numbered versions, and a pointer that is replaced whole."""

    path: Path
    bundles: list[Path]
    count: int = 0

    def add(self, name: str = "fruit") -> Path:
        """The next version, without the pointer: the two bundles in turn."""
        self.count += 1
        return Path(shutil.copytree(self.bundles[self.count % 2], self.path / name / str(self.count)))

    def point(self, version: int | None = None, name: str = "fruit") -> None:
        write_json(self.path / name / CHAMPION, {"version": self.count if version is None else version})


@pytest.fixture
def store(tmp_path, bundles) -> Store:
    (tmp_path / "store" / "fruit").mkdir(parents=True)
    made = Store(tmp_path / "store", bundles)
    made.add()
    made.point()
    return made
