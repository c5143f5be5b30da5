"""A world of three clouds that can turn, as rows of a table: a small one to tune on, serve and poison."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from bundles import kept
from tuneforge_serve.feedback.request_log import RequestLog
from tuneforge_serve.registry.model_registry import ModelRegistry

import tuneforge as tf

FIELDS = 6


def cloud(
    count: int, *, seed: int, shift: float = 0.0, apart: float = 5.0, height: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a table (count, 6) and their classes: three clouds on a ring, turned by `shift`, lifted by `height`."""
    generator = np.random.default_rng(seed)
    codes = np.arange(count) % 3
    angles = 2 * math.pi * codes / 3 + shift
    centres = apart * np.stack([np.cos(angles), np.sin(angles), *[np.zeros(count)] * (FIELDS - 2)], 1)
    centres[:, 2] = height
    return centres + generator.normal(size=(count, FIELDS)), codes


def rows_of(values: np.ndarray) -> list[dict[str, float]]:
    return [{f"x{place}": round(float(each), 4) for place, each in enumerate(row)} for row in values]


def base_run(folder: Path, *, count: int = 900, apart: float = 5.0) -> tf.Result:
    """A run on a table of three classes."""
    values, codes = cloud(count, seed=0, apart=apart)
    lines = [",".join([*(f"x{place}" for place in range(FIELDS)), "kind"])]
    lines += [
        ",".join([*map(str, row.values()), "abc"[code]]) for row, code in zip(rows_of(values), codes, strict=True)
    ]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return tf.Engine(
        data=tf.use("table-csv", path=str(folder / "table.csv"), target="kind"),
        model="mlp",
        strategy=tf.use("full", epochs=4, lr=1e-2),
        out=folder / "run",
        page=False,
    ).run()


def ask(store: ModelRegistry, records: RequestLog, values: np.ndarray, labels: list[str], *, start: int = 0) -> None:
    """Keep rows with the champion's answers, and label the first of them."""
    kept(store, records, rows_of(values), labels, start=start)


def right(folder: Path, values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Which rows a run, or a version, answers right."""
    found = tf.load(folder).predict(rows_of(values))
    return np.array([each["class"] == "abc"[code] for each, code in zip(found, codes, strict=True)])
