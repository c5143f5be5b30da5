"""Hand-written entries: a tight loop, and the lower bound of a phase with a frozen backbone.

SGD at 0.01 with momentum 0.9, and the accuracy on the validation images after each epoch.
"""

import copy
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial

import attrs
import torch
from common import Entry
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from work import Network, Split, Work

Batches = Iterable[tuple[Tensor, Tensor]]
LOOKS = (8, 16, 32, 64, 128)
"""Batch sizes that are tried for the forward pass."""


def raw(
    work: Work, network: Network, *, layout: torch.memory_format = torch.contiguous_format, loader: bool = False
) -> None:
    """Train in a tight loop over indexed tensors, or over a DataLoader."""
    network.to(memory_format=layout)
    train, val = laid_out(work.train, layout), laid_out(work.val, layout)
    batches = partial(iter, loaders(work)[0]) if loader else partial(_shuffled, train, work.batch)
    optimizer = optimizer_of(work, network)
    for _ in range(work.epochs):
        network.train()
        for images, labels in batches():
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
        accuracy(network, zip(*(each.split(work.batch) for each in val), strict=True))


raw_channels_last: Entry = partial(raw, layout=torch.channels_last)
raw_loader: Entry = partial(raw, loader=True)


def raw_bfloat16(work: Work, network: Network) -> None:
    """Train in the tight loop in channels-last under bfloat16 autocast, which changes the numerics."""
    with torch.autocast("cpu", torch.bfloat16):
        raw_channels_last(work, network)


@attrs.frozen
class FeaturePass:
    """One inference pass over all images: the lower bound of a phase with a frozen backbone.

    Args:
        layout: Memory format of images and weights.
        batch: Images per forward pass.
    """

    layout: torch.memory_format
    batch: int

    @classmethod
    def fastest(cls, work: Work) -> "FeaturePass":
        """Return the best of two layouts and five batch sizes on the first 256 images (64 large ones), of 3 tries."""
        images = work.train[0][: 256 if work.train[0][0].numel() < 2**14 else 64]
        network = work.build()
        tried = [cls(layout, batch) for layout in (torch.contiguous_format, torch.channels_last) for batch in LOOKS]
        seconds: dict[FeaturePass, list[float]] = {feature_pass: [] for feature_pass in tried}
        for _ in range(3):
            for feature_pass in tried:
                began = time.perf_counter()
                feature_pass.features(network, images)
                seconds[feature_pass].append(time.perf_counter() - began)
        return min(seconds, key=lambda feature_pass: min(seconds[feature_pass]))

    def features(self, network: Network, images: Tensor) -> Tensor:
        """Return the features (n, width) of images (n, ...)."""
        network.body.to(memory_format=self.layout).eval()
        with torch.inference_mode():
            parts = [network.body(part.contiguous(memory_format=self.layout)) for part in images.split(self.batch)]
            return torch.cat(parts)

    def over_all(self, work: Work, network: Network) -> None:
        """Run the forward pass alone, over both splits."""
        for images, _ in (work.train, work.val):
            self.features(network, images)

    def by_hand(self, work: Work, network: Network) -> None:
        """Run the forward pass, then train the head on its features, with validation."""
        features = [self.features(network, images).clone() for images, _ in (work.train, work.val)]
        known = attrs.evolve(work, train=(features[0], work.train[1]), val=(features[1], work.val[1]), frozen=False)
        raw(known, _only_head(network))

    def overlapped(self, work: Work, network: Network) -> None:
        """Run `by_hand`, but with the pass over the validation images behind the first epoch.

        The training images cannot be deferred likewise: a shuffled batch needs features from every part of the pass.
        """
        body = copy.deepcopy(network)
        train = self.features(network, work.train[0]).clone()
        found: list[Tensor] = []
        looking = threading.Thread(target=lambda: found.append(self.features(body, work.val[0]).clone()))
        looking.start()
        head, first = _only_head(network), attrs.evolve(work, train=(train, work.train[1]), frozen=False, epochs=1)
        raw(attrs.evolve(first, val=(train[:0], work.val[1][:0])), head)
        looking.join()
        val = (found[0], work.val[1])
        accuracy(head, zip(*(each.split(work.batch) for each in val), strict=True))
        raw(attrs.evolve(first, val=val, epochs=work.epochs - 1), head)

    def __str__(self) -> str:
        return f"{'channels-last' if self.layout is torch.channels_last else 'contiguous'}, batches of {self.batch}"


def optimizer_of(work: Work, network: Network) -> torch.optim.Optimizer:
    """Freeze what does not train, and return the optimizer of what does."""
    if work.frozen:
        network.freeze()
    return torch.optim.SGD([each for each in network.parameters() if each.requires_grad], lr=0.01, momentum=0.9)


def loaders(work: Work) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Return both splits as DataLoaders, the first in random order."""
    train, val = TensorDataset(*work.train), TensorDataset(*work.val)
    return DataLoader(train, work.batch, shuffle=True), DataLoader(val, work.batch)


def accuracy(network: torch.nn.Module, batches: Batches) -> float:
    """Return the accuracy."""
    right = total = 0
    network.eval()
    with torch.inference_mode():
        for images, labels in batches:
            right += int((network(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / max(1, total)


def laid_out(split: Split, layout: torch.memory_format) -> Split:
    """Return the split with its images in a memory format."""
    return split[0].contiguous(memory_format=layout), split[1]


def _shuffled(split: Split, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.randperm(len(split[0])).split(batch):
        yield split[0][rows], split[1][rows]


def _only_head(network: Network) -> Network:
    network.body = torch.nn.Identity()
    return network
