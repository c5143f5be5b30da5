"""Images are prepared as timm prepares them for the evaluation of the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFilter
from timm.data import create_transform, resolve_data_config
from tuneforge_timm import Timm
from tuneforge_timm.networks import find_pretrained_config
from tuneforge_timm.preprocessing import describe_preprocessing

import tuneforge as tf

WEIGHTS = (
    "tf_efficientnet_lite0.in1k", "tf_efficientnet_lite2.in1k", "resnet18.a1_in1k", "vit_base_patch16_clip_224.openai",
    "vit_base_patch16_siglip_224.webli", "inception_v3.tf_in1k", "regnety_032.ra_in1k", "volo_d4_448.sail_in1k",
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 blurred random images of many sizes and aspect ratios, in two classes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(100):
        height, width = rng.integers(40, 260, 2)
        pixels = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((int(width), int(height))).filter(ImageFilter.GaussianBlur(1))
        path = folder / "ab"[number % 2] / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return folder


def tune(photos: Path, out: Path, weights: str, lines: list[str] | None = None, **options: object) -> tf.Result:
    return tf.Engine(
        data=tf.use("image-folder", path=str(photos), **options),
        model=tf.use("timm", arch="tf_efficientnet_lite0", weights=weights),
        strategy=[],
        page=False,
        out=out,
        log=None if lines is None else lines.append,
    ).run()


def test_the_run_feeds_what_timm_feeds(photos, tmp_path):
    lines: list[str] = []
    result = tune(photos, tmp_path / "run", "DEFAULT", lines)
    inputs = tf.load(result.run_dir).inputs
    config = find_pretrained_config("tf_efficientnet_lite0")
    transform = create_transform(**resolve_data_config(pretrained_cfg=config.to_dict()))
    for path in sorted(photos.rglob("*.png")):
        prepared = inputs.preprocess(inputs.decode(path)[None])[0]
        with Image.open(path) as image:
            difference = (prepared - transform(image)) * torch.tensor(config.std)[:, None, None]
        assert difference.abs().max() <= 1 / 255
    assert any(
        "images as the weights tf_efficientnet_lite0.in1k expect them: 224x224 pixels, resized to 256" in line
        for line in lines
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_size_crop_and_normalization_are_those_of_the_data_config(name):
    config = find_pretrained_config(name)
    preprocessing = describe_preprocessing(config)
    resize, crop, *_, normalize = create_transform(**resolve_data_config(pretrained_cfg=config.to_dict())).transforms
    assert preprocessing.size == tuple(crop.size)
    assert preprocessing.resize == (resize.size if isinstance(resize.size, int) else min(resize.size))
    assert preprocessing.interpolation == resize.interpolation.value
    assert preprocessing.mean == pytest.approx(normalize.mean.tolist())
    assert preprocessing.std == pytest.approx(normalize.std.tolist())
    assert preprocessing.name == name


def test_every_data_config_of_timm_is_described():
    for name in timm.list_pretrained():
        preprocessing = describe_preprocessing(find_pretrained_config(name))
        assert min(preprocessing.size) / 1.2 < preprocessing.resize < 2 * min(preprocessing.size), name


def test_another_size_is_used_and_noted(photos, tmp_path):
    lines: list[str] = []
    inputs = tf.load(tune(photos, tmp_path / "run", "DEFAULT", lines, size=64).run_dir).inputs
    assert inputs.ops == ("resize 73 bicubic", "center-crop 64")
    assert any("224x224 pixels instead of 64x64 (--data.size 224)" in line for line in lines)


def test_random_weights_expect_nothing(photos, tmp_path):
    inputs = tf.load(tune(photos, tmp_path / "run", "none").run_dir).inputs
    assert inputs.size == (32, 32)


def test_missing_weights_are_an_error_before_data_is_read(tmp_path):
    engine = tf.Engine(
        data=tf.use("image-folder", path=str(tmp_path / "missing")), model=Timm(arch="resnet18.a1_in1k"), page=False
    )
    with pytest.raises(tf.TryAgainError, match="the weights resnet18.a1_in1k are not on this machine"):
        engine.prepare()
