"""The server preprocesses files of any size as the offline evaluation does."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import tuneforge as tf


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Digits as images of many sizes and formats, in folders."""
    folder = tmp_path_factory.mktemp("photos")
    digits, rng = load_digits(), np.random.default_rng(0)
    for label in range(3):
        for number, row in enumerate(np.flatnonzero(digits.target == label)[:24]):
            split = ("train", "val", "test")[number % 3]
            class_dir = folder / split / f"class{label}"
            class_dir.mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray((digits.images[row] * 255 / 16).astype(np.uint8))
            image = pixels.resize(tuple(map(int, rng.integers(20, 90, 2)))).convert(("L", "RGB")[number % 2])
            image.save(class_dir / f"{number}{('.png', '.jpg', '.bmp')[number // 3 % 3]}")
    return folder


def test_served_predictions_of_the_test_split_equal_the_offline_ones(serving, photos, tmp_path):
    data = tf.use("image-folder", path=photos, size=32)
    result = tf.Engine(
        data=data,
        model=tf.use("torchvision", arch="squeezenet1_1", weights="none"),
        strategy=[tf.HeadFit("head", l2=1e-3)],
        page=False,
        out=tmp_path / "run",
    ).run()
    files = sorted((photos / "test").rglob("*.*"))
    offline = list(tf.predict(result.run_dir, files))
    with serving(result.run_dir) as server:
        online = [server.request("POST", "/predict", each.read_bytes()).json for each in files]
    assert [each["class"] for each in online] == [each["class"] for each in offline]
    for ours, theirs in zip(online, offline, strict=True):
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    correct = Counter(answer["class"] == file.parent.name for answer, file in zip(online, files, strict=True))
    assert correct[True] / len(files) == result.report["splits"]["test"]["accuracy"]
    assert len(files) == 24
