"""Images for weights of torchvision are prepared as torchvision's own evaluation transforms prepare them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

import tuneforge as tf
from tuneforge.builtin.datasets.images.expected_preprocessing import resolve_options
from tuneforge.builtin.datasets.images.image_datasets import ImageFolder
from tuneforge.builtin.models.torchvision_models import TorchvisionModel, _get_preprocessing

ARCHS = ("resnet18", "efficientnet_b0", "inception_v3", "vit_b_16", "swin_t", "convnext_tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(24):
        height, width = (int(side) for side in rng.integers(30, 300, 2))
        pixels = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        path = folder / "ab"[number % 2] / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((width, height)).save(path)
    return folder


@pytest.mark.parametrize("arch", ARCHS)
def test_prepared_images_equal_those_of_torchvision(photos, arch):
    transforms = models.get_model_weights(arch).DEFAULT.transforms()
    expected_inputs = TorchvisionModel(arch=arch, weights="download").model_inputs(SimpleNamespace(restoring=False))
    run = SimpleNamespace(restoring=False, expected_inputs=expected_inputs)
    options, _ = resolve_options(ImageFolder(path=photos), run)
    inputs = options.build_inputs().with_normalization(options.mean, options.std)
    std = torch.tensor(transforms.std)[:, None, None]
    for path in sorted(photos.rglob("*.png")):
        with Image.open(path) as image:
            expected = transforms(image)
        prepared = inputs.preprocess(inputs.decode(path)[None])[0]
        assert ((prepared - expected) * std).abs().max() < 1e-6


def test_every_classification_weight_of_torchvision_is_described():
    for arch in models.list_models(module=models):
        preprocessing = _get_preprocessing(arch)
        assert preprocessing.resize >= preprocessing.size[0], arch
        assert preprocessing.interpolation in ("bilinear", "bicubic")


def test_random_weights_expect_nothing_and_wrong_ones_are_an_error_before_data_is_read(tmp_path):
    def prepare(**options):
        engine = tf.Engine(
            data=tf.use("image-folder", path=str(tmp_path / "missing")), model=TorchvisionModel(**options), page=False
        )
        engine.prepare()

    with pytest.raises(tf.FolderError, match=r"none\.safetensors"):
        prepare(weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(tf.UnknownNameError, match="resnet19"):
        prepare(arch="resnet19", weights="none")
    with pytest.raises(tf.DataError, match="missing"):
        prepare(weights="none")
