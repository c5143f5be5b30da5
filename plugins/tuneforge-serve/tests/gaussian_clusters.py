"""Three Gaussian clusters as table rows, which can be rotated and lifted: data to train on, log and poison."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tuneforge_serve import ModelRegistry, RequestLog
from tuneforge_serve.feedback.monitoring import compute_features
from tuneforge_serve.feedback.request_log import LoggedRequest

import tuneforge as tf

NUM_FEATURES = 6


def sample_clusters(
    count: int, *, seed: int, angle: float = 0.0, distance: float = 5.0, height: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return features (count, 6) and classes: three clusters on a ring, rotated by `angle` and lifted by `height`."""
    rng = np.random.default_rng(seed)
    classes = np.arange(count) % 3
    angles = 2 * math.pi * classes / 3 + angle
    centers = distance * np.stack([np.cos(angles), np.sin(angles), *[np.zeros(count)] * (NUM_FEATURES - 2)], 1)
    centers[:, 2] = height
    return centers + rng.normal(size=(count, NUM_FEATURES)), classes


def to_rows(values: np.ndarray) -> list[dict[str, float]]:
    """Return features as table rows."""
    return [{f"x{index}": round(float(each), 4) for index, each in enumerate(row)} for row in values]


def train_base_run(directory: Path, *, count: int = 900, distance: float = 5.0) -> tf.Result:
    """Train on a table of the three clusters."""
    values, classes = sample_clusters(count, seed=0, distance=distance)
    lines = [",".join([*(f"x{index}" for index in range(NUM_FEATURES)), "kind"])]
    lines += [
        ",".join([*map(str, row.values()), "abc"[code]]) for row, code in zip(to_rows(values), classes, strict=True)
    ]
    (directory / "table.csv").write_text("\n".join(lines) + "\n")
    return tf.Engine(
        data=tf.use("table-csv", path=str(directory / "table.csv"), target="kind"),
        model="mlp",
        strategy=tf.use("full", epochs=4, lr=1e-2),
        out=directory / "run",
        page=False,
    ).run()


def log_requests(
    registry: ModelRegistry, request_log: RequestLog, raws: Sequence[Any], labels: Sequence[str], *, start: int = 0
) -> None:
    """Log raw inputs (rows, or bytes of images) with the champion's predictions, and label the first of them."""
    champion = tf.load(registry.version_dir())
    features = compute_features(torch.stack([champion.inputs.decode(raw) for raw in raws]))
    request_log.append([
        LoggedRequest(
            f"r{start + row}", str(registry.champion), raw if isinstance(raw, bytes) else json.dumps(raw).encode(),
            "image/png" if isinstance(raw, bytes) else "application/json", prediction, features=features[row],
        )
        for row, (raw, prediction) in enumerate(zip(raws, champion.predict(raws), strict=True))
    ])  # fmt: skip
    for row, name in enumerate(labels):
        request_log.label(f"r{start + row}", name)


def log_clusters(
    registry: ModelRegistry, request_log: RequestLog, values: np.ndarray, labels: list[str], *, start: int = 0
) -> None:
    """Log features as table rows, and label the first of them."""
    log_requests(registry, request_log, to_rows(values), labels, start=start)


def is_correct(directory: Path, values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return for each sample whether the prediction of a run or a version is correct."""
    predictions = tf.load(directory).predict(to_rows(values))
    return np.array([each["class"] == "abc"[code] for each, code in zip(predictions, classes, strict=True)])
