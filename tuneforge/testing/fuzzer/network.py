"""Random networks: a stem that fits the inputs, some blocks, and a linear head, with traits of the whole network.

Shapes: b samples, WIDTH features, k outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tuneforge.testing.fuzzer.blocks import BLOCKS, WIDTH, FuzzBlock

TRAITS: Mapping[str, str] = {
    "temperature": "the logits are divided by a plain attribute, which a callback lowers after each epoch",
    "side-loss": "forward stores a penalty on the module, which the loss adds",
    "tuple-output": "forward returns a tuple of logits and features",
    "mapping-output": "forward returns a mapping of logits and features",
    "tied-blocks": "the first and the last block share their weight",
    "frozen-by-user": "the first block does not require gradients",
    "own-train": "train() keeps norms in eval mode",
    "float64": "weights and inputs are float64",
    "max-norm": "the stem is an embedding that rescales its rows (token inputs only)",
}
"""Every trait by name, with what it means."""


class VectorStem(nn.Module):
    """(b, WIDTH) -> (b, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.narrow(torch.relu(self.wide(inputs)))
        return features


class ImageStem(nn.Module):
    """(b, 3, 6, 6) -> (b, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = torch.relu(self.norm(self.conv(inputs))).mean((2, 3))
        return features


class TokenStem(nn.Module):
    """(b, 5), int64 -> (b, WIDTH)."""

    def __init__(self, max_norm: float | None) -> None:
        super().__init__()
        self.lookup = nn.Embedding(20, WIDTH, max_norm=max_norm)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the mean of the embeddings."""
        features: Tensor = self.lookup(inputs).mean(1)
        return features


class FuzzNetwork(nn.Module):
    """A random network: inputs of one sort -> (b, k).

    Args:
        blocks: Kinds of the blocks.
        traits: Names in `TRAITS`.
        inputs: `"vectors"`, `"pairs"`, `"images"` or `"tokens"`.
        num_outputs: k.
    """

    temperature = 1.0

    def __init__(self, blocks: Sequence[str], traits: Sequence[str], inputs: str, num_outputs: int) -> None:
        super().__init__()
        stems: Mapping[str, Callable[[], nn.Module]] = {
            "images": ImageStem,
            "tokens": lambda: TokenStem(1.0 if "max-norm" in traits else None),
        }
        self.stem = stems.get(inputs, VectorStem)()
        self.body = nn.Sequential(*(FuzzBlock(BLOCKS[kind]) for kind in blocks))
        self.head = nn.Linear(WIDTH, num_outputs)
        self.traits = tuple(traits)
        if (
            "tied-blocks" in traits
            and blocks
            and not any(hasattr(each.linear, "parametrizations") for each in self.body)
        ):
            blocks_in_order: list[Any] = list(self.body)
            blocks_in_order[-1].linear.weight = blocks_in_order[0].linear.weight
        if "frozen-by-user" in traits and blocks:
            self.body[0].requires_grad_(False)
        if "float64" in traits:
            self.double()

    def train(self, mode: bool = True) -> FuzzNetwork:
        """Set the mode; with the trait `own-train`, norms stay in eval mode."""
        super().train(mode)
        if "own-train" in self.traits:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()
        return self

    def forward(self, inputs: Tensor) -> Any:
        """Return the logits, alone or with the features."""
        return self._compute(inputs)

    def _compute(self, inputs: Tensor) -> Any:
        features = self.body(self.stem(inputs))
        if "side-loss" in self.traits:
            self.penalty = features.square().mean()
        logits = self.head(features)
        if "temperature" in self.traits:
            logits = logits / self.temperature
        if "tuple-output" in self.traits:
            return logits, features
        return {"logits": logits, "features": features} if "mapping-output" in self.traits else logits


class PairNetwork(FuzzNetwork):
    """A random network with two inputs, (b, 6) and (b, WIDTH - 6)."""

    def forward(self, left: Tensor, right: Tensor) -> Any:  # type: ignore[override]
        """Return the logits, alone or with the features."""
        return self._compute(torch.cat([left, right], 1))


def build_network(
    blocks: Sequence[str], traits: Sequence[str], inputs: str, num_outputs: int, *, seed: int
) -> FuzzNetwork:
    """Return a new network; the same arguments give the same weights and statistics."""
    cls = PairNetwork if inputs == "pairs" else FuzzNetwork
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = cls(blocks, traits, inputs, num_outputs)
        for name, buffer in network.named_buffers():
            if buffer.is_floating_point() and not name.rpartition(".")[2].startswith("_") and buffer.ndim == 1:
                buffer.add_(0.2 * torch.rand_like(buffer))
    return network
