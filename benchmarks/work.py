"""The workloads of the benchmarks: three networks of a body and a head, and images that need no download."""

import math
from collections.abc import Callable
from itertools import pairwise

import attrs
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

Split = tuple[Tensor, Tensor]
"""Images or rows (n, ...), and labels (n,)."""


class Network(nn.Module):
    """A body and a linear head: (b, ...) -> (b, 10).

    Args:
        body: Computes features (b, width).
        width: Width of the head's input.
    """

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 10)
        self.frozen = False

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, 10)."""
        logits: Tensor = self.head(self.body(images))
        return logits

    def freeze(self) -> None:
        """Train the head only; the body stays in eval mode whatever a framework sets."""
        self.frozen = True
        self.body.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Network":
        """Set the mode, of the body only where it trains."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self


@attrs.frozen(eq=False)
class Work:
    """The workload of every entry of a table: train a new network, and validate after each epoch.

    Args:
        build: Builds the network.
        train: Training data.
        val: Validation data.
        frozen: True where only the head trains.
        epochs: Passes over `train`.
        batch: Samples per training step.
    """

    build: Callable[[], Network]
    train: Split
    val: Split
    frozen: bool
    epochs: int = 5
    batch: int = 32

    @property
    def steps(self) -> int:
        """Return the number of training steps of all epochs."""
        return self.epochs * math.ceil(len(self.train[0]) / self.batch)

    def cut(self, samples: int | None, epochs: int | None) -> "Work":
        """Return the workload on the first `samples`, half as many for validation, and other epochs; None: as is."""
        (x, y), (x_val, y_val) = self.train, self.val
        train, val = (x[:samples], y[:samples]), (x_val, y_val)
        if samples is not None:
            val = (x_val[: samples // 2], y_val[: samples // 2])
        return attrs.evolve(self, train=train, val=val, epochs=epochs or self.epochs)


def digit_network() -> Network:
    """Build the digit CNN: five convolutions of 3x3, each with ReLU and 2x2 pooling: (b, 3, 32, 32) -> (b, 10)."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise((3, 32, 64, 128, 256, 512)):
        layers += [nn.Conv2d(narrow, wide, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return Network(nn.Sequential(*layers, nn.Flatten()), width=512)


def resnet_network() -> Network:
    """Build resnet18 with random weights: (b, 3, 224, 224) -> (b, 10)."""
    body = models.resnet18(weights=None)
    body.fc = nn.Identity()
    return Network(body, width=512)


def free_network() -> Network:
    """Build a network that costs nothing, so that the loop is measured: (b, 8) -> (b, 10)."""
    return Network(nn.Identity(), width=8)


def digits(*, frozen: bool) -> Work:
    """Return the digit CNN on 1,437 and 360 handwritten digits at 3x32x32."""
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x, y = F.interpolate(small, 32, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels)
    return Work(digit_network, (x[:1437], y[:1437]), (x[1437:], y[1437:]), frozen)


def photos() -> Work:
    """Return a frozen resnet18 on 512 and 128 synthetic images at 3x224x224."""
    return Work(resnet_network, *_made(512, 128, (3, 224, 224)), frozen=True)


def free() -> Work:
    """Return a network that costs nothing on 6,400 and 1,600 rows: 1,000 steps in 5 epochs of 200."""
    return Work(free_network, *_made(6400, 1600, (8,)), frozen=False)


def _made(num_train: int, num_val: int, shape: tuple[int, ...]) -> tuple[Split, Split]:
    generator = torch.Generator().manual_seed(0)
    total = num_train + num_val
    x, y = torch.randn(total, *shape, generator=generator), torch.randint(0, 10, (total,), generator=generator)
    return (x[:num_train], y[:num_train]), (x[num_train:], y[num_train:])
