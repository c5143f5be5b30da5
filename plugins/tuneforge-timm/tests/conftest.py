"""Fixtures: runs of the engine on small images, and safetensors files of random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_images import make_data

import tuneforge as tf
from tuneforge.exporting import save_tensors

torch.set_num_threads(1)


@pytest.fixture
def tune(tmp_path: Path) -> Callable[..., tf.Result]:
    """Run the engine on small images: `tune("resnet10t", 32)`; `lines` receives the log."""
    number = iter(range(1000))

    def run(
        arch: str, side: int, /, *, weights: str = "none", lines: list[str] | None = None, **given: Any
    ) -> tf.Result:
        settings: dict[str, Any] = {
            "data": make_data(side),
            "model": tf.use("timm", arch=arch, weights=weights),
            "batch_size": 6,
            "page": False,
            "out": tmp_path / f"run{next(number)}",
        }
        return tf.Engine(**{**settings, **given}, log=(lines.append if lines is not None else None)).run()

    return run


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save random weights of a network: `weights_file("resnet10t", num_classes=0)`."""
    saved: dict[Any, Path] = {}

    def save(arch: str, *, labels: tuple[str, ...] = (), **arguments: Any) -> Path:
        key = (arch, labels, *sorted(arguments.items()))
        if key not in saved:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                state = timm.create_model(arch, **arguments).state_dict()
            saved[key] = tmp_path_factory.mktemp(arch) / "weights.safetensors"
            save_tensors(state, saved[key], metadata={"labels": list(labels)})
        return saved[key]

    return save


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide what the machine has cached, and forbid downloads."""
    import huggingface_hub.constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
