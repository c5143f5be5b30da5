"""Fixtures: the engine on the small world, and distributions planted by hand."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_data, tiny_net

import tuneforge as tf
from tuneforge.plugin import registry

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: tests run on every core at once

MEMORY = "/dev/shm"
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    # Much of the time went into waiting for the disk at each fsync. No test loses by it: a killed process cannot show a
    # missing fsync, and test_disk_full.py, where one fails, puts itself between the code and any disk.
    # The compiler's cache is kept beyond the tests, so it does not belong in memory.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
    os.environ["TMPDIR"] = MEMORY
    tempfile.tempdir = None


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep cached features of module fixtures, which are made before a test has its own cache, out of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEFORGE_CACHE", str(tmp_path_factory.mktemp("shared-cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of one test are never found by another, and never in the user's folder."""
    monkeypatch.setenv("TUNEFORGE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tune(tmp_path: Path) -> Callable[..., tf.Result]:
    """Run the engine on the small world: `tune([Phase(...)], seed=1)`."""
    number = iter(range(1000))

    def run(strategy: Any, **given: Any) -> tf.Result:
        given = {"data": tiny_data(), "model": tiny_net(), "batch_size": 16, "page": False, **given}
        return tf.Engine(strategy=strategy, out=tmp_path / f"run{next(number)}", **given).run()

    return run


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a distribution by hand: `plant("bad-pkg", {"tuneforge.evaluate": {"x": "bad:X"}}, bad="...")`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    planted: list[str] = []

    def add(distribution: str, entries: dict[str, dict[str, str]], **modules: str) -> None:
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [
            f"[{group}]\n" + "\n".join(f"{name} = {target}" for name, target in named.items())
            for group, named in entries.items()
        ]
        (info / "entry_points.txt").write_text("\n\n".join(lines) + "\n")
        for name, source in modules.items():
            (site / f"{name}.py").write_text(source)
            planted.append(name)
        registry.clear_cache()

    yield add
    registry.clear_cache()
    for name in planted:
        sys.modules.pop(name, None)
