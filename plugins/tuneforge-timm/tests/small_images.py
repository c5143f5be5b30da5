"""Small images of noise around the index of their class."""

from __future__ import annotations

from typing import Any

import numpy as np

from tuneforge.sklearn import data_from_arrays


def make_data(side: int, count: int = 24, names: tuple[str, ...] = ("0", "1", "2"), channels: int = 3) -> Any:
    """Return images (count, channels, side, side) of three classes, split."""
    classes = np.arange(count) % 3
    noise = np.random.default_rng(0).normal(size=(count, channels, side, side))
    images = (noise + classes[:, None, None, None]).astype("float32")
    return data_from_arrays(images, np.array(names)[classes], val=0.25, test=0.25)
