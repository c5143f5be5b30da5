"""Wrong mean and std, 0-255 input and BGR are found by the running statistics of the first BatchNorm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn

import tuneforge as tf
from tuneforge.builtin.datasets.images.first_norm_check import check_first_norm
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,), (0.5,))


def make_image(rng: np.random.Generator) -> Image.Image:
    """Smooth colors, more red than blue, as photographs have."""
    pixels = rng.normal((0.6, 0.45, 0.25), (0.25, 0.2, 0.1), (8, 8, 3)).clip(0, 1) * 255
    return Image.fromarray(pixels.astype(np.uint8)).resize((48, 48)).filter(ImageFilter.GaussianBlur(1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(60):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        make_image(rng).save(path)
    return folder


def pretrained(mean: Any, std: Any, *, swapped: bool = False) -> nn.Sequential:
    """A network whose running statistics come from other images of the same kind, prepared in this way."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12, momentum=1.0), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 2),
    )  # fmt: skip
    rng = np.random.default_rng(1)
    inputs = ImageInputs(mean=mean, std=std)
    images = torch.stack([inputs.decode(make_image(rng)) for _ in range(200)])
    network.train()(inputs.preprocess(images.flip(1) if swapped else images))
    return network


@pytest.fixture
def tune(photos: Path, tmp_path: Path) -> Any:
    def run(network: nn.Module, **options: Any) -> list[str]:
        lines: list[str] = []
        tf.Engine(
            data=tf.use("image-folder", path=str(photos), size=48, **options),
            model=tf.Model.from_module(network, head="4"),
            strategy=[tf.Phase("head", train="head", steps=1), tf.Phase("all", train="all", steps=1)],
            page=False,
            out=tmp_path / "run",
            log=lines.append,
        ).run()
        return [line for line in lines if "was trained on other inputs" in line or "cannot be checked" in line]

    return run


@pytest.mark.parametrize("right", [IMAGENET, HALF], ids=["imagenet", "half"])
@pytest.mark.parametrize(
    ("options", "swapped"),
    [
        ({"mean": IMAGENET[0], "std": IMAGENET[1]}, False),
        ({"mean": HALF[0], "std": HALF[1]}, False),
        ({"normalize": "none"}, False),
        ({"mean": (0.0,), "std": (1 / 255,)}, False),
    ],
    ids=["imagenet", "half", "0-to-1", "0-to-255"],
)
def test_another_normalization_is_found_and_the_right_one_is_not(tune, right, options, swapped):
    given = (options.get("mean"), options.get("std"))
    warnings = tune(pretrained(*right, swapped=swapped), **options)
    if given == right:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert ("ImageNet's mean and std" if right is IMAGENET else "mean 0.5 and std 0.5") in warnings[0]


def test_swapped_channels_are_found(tune):
    warnings = tune(pretrained(*HALF, swapped=True), mean=HALF[0], std=HALF[1])
    assert len(warnings) == 1
    assert "red and blue swapped" in warnings[0]


def test_a_network_without_running_statistics_says_that_it_cannot_be_checked(tune):
    network = pretrained(*HALF)
    network[1] = nn.GroupNorm(3, 12)
    assert ["cannot be checked" in line for line in tune(network)] == [True]


def test_the_check_leaves_the_network_as_it_was(photos, tmp_path):
    network = pretrained(*HALF)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tf.Engine(
        data=tf.use("image-folder", path=str(photos), size=48),
        model=tf.Model.from_module(network, head="4"),
        strategy=[tf.Phase("head", train="head", steps=1)],
        page=False,
        out=tmp_path / "run",
    ).run()
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items() if name[0] != "4")


class Counting(nn.Conv2d):
    """Counts its forward passes in an attribute and in a buffer, and draws random numbers."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.passes = 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, images):
        self.passes += 1
        self.count += 1
        return super().forward(images) + 0 * torch.rand(1)


def test_the_check_leaves_what_forward_changes_as_it_was(photos):
    network = pretrained(*HALF)
    counting = Counting(3, 12, 3, bias=False)
    counting.weight = network[0].weight
    network[0] = counting
    run = tf.Engine(
        data=tf.use("image-folder", path=str(photos), size=48, normalize="none"),
        model=tf.Model.from_module(network, head="4"),
        strategy=[],
        page=False,
    ).prepare()
    network.train()
    network[1].eval()
    before, passes, modes = counting.count.clone(), counting.passes, [each.training for each in network.modules()]
    generator = torch.get_rng_state()
    assert "mean 0.5 and std 0.5" in check_first_norm(run)
    assert (torch.equal(counting.count, before), counting.passes) == (True, passes)
    assert [each.training for each in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_batchnorm_that_was_never_trained_cannot_be_checked_against(tune):
    network = pretrained(*HALF)
    network[1] = nn.BatchNorm2d(12)
    assert ["no BatchNorm with trained running statistics" in line for line in tune(network)] == [True]
