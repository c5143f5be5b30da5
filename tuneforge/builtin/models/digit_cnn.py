"""`digit-cnn`: a small convolutional network, pretrained on rendered characters."""

from __future__ import annotations

import string
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
from torch import Tensor, nn
from torch.nn import functional as F

from tuneforge import DataError, LayerGroup, Model, PluginError, UsageError, component, hookimpl, option
from tuneforge.builtin.models.state_dict import load_matching_weights
from tuneforge.builtin.seeding import seeded_rng
from tuneforge.exporting import load_tensors

if TYPE_CHECKING:
    from tuneforge import Run

WIDTHS = (3, 32, 64, 128, 256, 512)
"""Channels of the input and after each convolution."""

IMAGE_SIZE = 32
"""Height and width of the input, in pixels; five poolings reduce them to 1."""

LABELS = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
"""Classes of the pretrained head."""

PRETRAINED_WEIGHTS = Path(__file__).parent / "weights" / "digit_cnn.safetensors"
"""The pretrained weights, float16, made by `examples/pretrain_digit_cnn.py`."""


class DigitNet(nn.Module):
    """Five convolutions of 3x3 with padding 1, each with ReLU and 2x2 max pooling, and a linear head.

    Args:
        num_outputs: k.
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = (
            nn.Conv2d(narrow, wide, kernel_size=3, padding=1) for narrow, wide in pairwise(WIDTHS)
        )
        self.head = nn.Linear(WIDTHS[-1], num_outputs)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """Return logits (b, k) of images (b, 3, 32, 32)."""
        features = images_bchw
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            features = F.max_pool2d(F.relu(conv(features)), 2)
        logits_bk: Tensor = self.head(features.flatten(1))
        return logits_bk


@component(api=1)
class DigitCNN:
    """A network of five convolutions for 3x32x32 images, pretrained on 62 rendered characters."""

    pretrained: bool = option(default=True, help="Load pretrained weights; otherwise randomly initialized.")
    weights: Path | None = option(
        default=None, help="A safetensors file of this network; default: the shipped weights."
    )

    @property
    def is_pretrained(self) -> bool:
        """True unless all weights are randomly initialized; then the default strategy is `full`."""
        return self.pretrained

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Build the network.

        Raises:
            PluginError: There is a model already.
            DataError: The images are not 32x32.
            UsageError: The weights are not those of this network.
        """
        if model is not None:
            raise PluginError(
                "digit-cnn builds a model; it cannot adapt one",
                where="--model",
                fix="use it as --model, and adapters such as head as --adapt",
            )
        _require_image_size(run)
        if run.restoring or not self.pretrained:
            return _build_untrained(run)
        if self.weights is not None and not self.weights.is_file():
            raise UsageError(
                f"there is no file '{self.weights}'",
                where="--model.weights",
                why="weights must be a safetensors file of digit-cnn",
                fix="check the path, or omit it for the shipped weights",
            )
        return _load_pretrained(self.weights or PRETRAINED_WEIGHTS)


def _build_untrained(run: Run) -> Model:
    """Return a network for the classes of the data, with PyTorch's initialization from the seed of the run."""
    with seeded_rng(run.config.seed):
        module = DigitNet(run.data.targets.num_outputs)
    return attrs.evolve(_build_model(module, run.data.targets.labels, kept=()), pretrained=False)


def _load_pretrained(path: Path) -> Model:
    """Return a network with weights of a file, and their classes."""
    tensors, metadata = load_tensors(path)
    num_outputs = len(tensors.get("head.bias", LABELS))
    with seeded_rng(0):
        module = DigitNet(num_outputs)
    load_matching_weights(module, tensors, path, kind="digit-cnn", fix="give a file that was made from this network")
    labels = tuple(metadata.get("labels", LABELS if num_outputs == len(LABELS) else ()))
    return _build_model(module, labels, kept=labels)


def _build_model(module: DigitNet, labels: tuple[str, ...], *, kept: tuple[str, ...]) -> Model:
    groups = [LayerGroup(name, (name,)) for name, _ in module.named_children()]
    return Model(module, groups=groups, head="head", labels=labels, pretrained_labels=kept)


def _require_image_size(run: Run) -> None:
    example = run.example
    if isinstance(example, Tensor) and example.ndim == 4 and tuple(example.shape[2:]) == (IMAGE_SIZE, IMAGE_SIZE):
        return
    found = "x".join(map(str, example.shape[1:])) if isinstance(example, Tensor) else "a mapping of tensors"
    raise DataError(
        f"digit-cnn takes images of {IMAGE_SIZE}x{IMAGE_SIZE} pixels, and the data has {found}",
        where="--model digit-cnn",
        fix=f"use --data.size {IMAGE_SIZE}, or another --model",
    )
