"""One output layer instead of several: networks with a distillation head, or with a head for each branch.

Shapes: b samples, f features of one head, k outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class MergedHead(nn.Module):
    """A network whose output is a weighted sum of linear heads, with one linear head on the features of all of them.

    The sum of c_i * (W_i x_i + b_i) over heads equals W x + b for x = (c_1 x_1, c_2 x_2, ...) and W = (W_1, W_2, ...).
    Each head of the network is replaced by zero-padding to its part of x, so that the network's own sum computes x.

    Args:
        network: The network, changed in place.
        heads: Paths of its linear heads.
        num_outputs: Outputs of the new head, which is randomly initialized.
    """

    def __init__(self, network: nn.Module, heads: Sequence[str], num_outputs: int) -> None:
        super().__init__()
        widths = [_get_linear(network, path).in_features for path in heads]
        like = _get_linear(network, heads[0]).weight
        for index, path in enumerate(heads):
            parent, _, name = path.rpartition(".")
            padding = _Padding(sum(widths[:index]), sum(widths[index + 1 :]))
            _set_child(network.get_submodule(parent), name, padding)
        self.network = network
        self.head = nn.Linear(sum(widths), num_outputs, device=like.device, dtype=like.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, k) of images (b, channels, height, width)."""
        logits: Tensor = self.head(self.network(images))
        return logits


class _Padding(nn.Module):
    """Zeros before and after the features (b, f)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, features: Tensor) -> Tensor:
        return F.pad(features, (self.before, self.after))


def _get_linear(network: nn.Module, path: str) -> nn.Linear:
    module = network.get_submodule(path)
    assert isinstance(module, nn.Linear), path
    return module


def _set_child(parent: nn.Module, name: str, child: nn.Module) -> None:
    if isinstance(parent, nn.ModuleList):
        parent[int(name)] = child
    else:
        setattr(parent, name, child)
