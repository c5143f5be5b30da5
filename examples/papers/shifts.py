"""Controlled shifts: a small network learns a source domain, and a target domain differs from it in one known way.

The levels are those of Lee et al. 2023 (arXiv 2210.11466): the inputs change, the features (other kinds of the same
classes), or the meaning of the labels. Half of the kinds were used to develop `adaptive` and `auto`; the others not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as VF

import tuneforge as tf

CASES = "ABDEGHNQRT"
"""Letters whose small form has another shape."""

Shift = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""Changes images uint8 (n, 1, 32, 32) and classes (n,)."""


class SmallNet(nn.Module):
    """Four convolutions and a linear head: images (b, 3, 32, 32) -> logits (b, 10); 47,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 16), (16, 32), (32, 48), (48, 64))
        self.conv1, self.conv2, self.conv3, self.conv4 = (nn.Conv2d(*pair, 3, padding=1) for pair in widths)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, 10)."""
        features = F.avg_pool2d(images, 2)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            features = F.max_pool2d(F.relu(conv(features)), 2)
        logits: Tensor = self.head(features.flatten(1))
        return logits


def _shift_inputs(change: Callable[[Tensor, torch.Generator], Tensor]) -> Shift:
    """Return a shift of the inputs, from a function of images as floats from 0 to 1."""

    def shift(images: Tensor, classes: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        changed = change(images.float() / 255, draw)
        return (changed.clamp(0, 1) * 255).round().to(torch.uint8), classes

    return shift


def _shift_labels(change: Callable[[Tensor, torch.Generator], Tensor]) -> Shift:
    """Return a shift of the labels, from a function of classes."""
    return lambda images, classes, draw: (images, change(classes, draw))


def _no_shift(images: Tensor, classes: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    return images, classes


@attrs.frozen
class Kind:
    """A kind of shift.

    Args:
        level: `input`, `feature` or `output`.
        source: What the network learns: `hand`, `print` or `capitals`.
        target: What it meets: `hand`, `print` or `small letters`.
        shift: How that is changed.
    """

    level: str
    source: str
    target: str
    shift: Shift = _no_shift


MADE_WITH = {
    "inverted": Kind("input", "hand", "hand", _shift_inputs(lambda x, draw: 1 - x)),
    "blurred": Kind("input", "hand", "hand", _shift_inputs(lambda x, draw: VF.gaussian_blur(x, [13, 13], [4.0, 4.0]))),
    "noise": Kind("input", "hand", "hand", _shift_inputs(lambda x, rng: x + 0.5 * torch.randn(x.shape, generator=rng))),
    "rotated": Kind("input", "hand", "hand", _shift_inputs(lambda x, draw: VF.rotate(x, 60))),
    "thick pen": Kind("feature", "hand", "hand", _shift_inputs(lambda x, draw: F.max_pool2d(x, 7, 1, 3))),
    "print to hand": Kind("feature", "print", "hand"),
    "small letters": Kind("feature", "capitals", "small letters"),
    "9 - y": Kind("output", "hand", "hand", _shift_labels(lambda y, draw: 9 - y)),
    "permuted": Kind("output", "hand", "hand", _shift_labels(lambda y, draw: torch.randperm(10, generator=draw)[y])),
}
"""Kinds that were used to develop `auto` and `adaptive`, if only once."""

HELD_OUT = {
    "low contrast": Kind("input", "hand", "hand", _shift_inputs(lambda x, draw: 0.7 + 0.2 * x)),
    "sheared": Kind("input", "hand", "hand", _shift_inputs(lambda x, draw: VF.affine(x, 0, [0, 0], 1.0, [40.0, 0.0]))),
    "hand to print": Kind("feature", "hand", "print"),
    "regrouped": Kind("output", "hand", "hand", _shift_labels(lambda y, draw: y // 2)),
}
"""Kinds that were not."""

KINDS = MADE_WITH | HELD_OUT


def make_domain(kind: str | Kind, seed: int, per_class: int) -> tuple[tf.Model, tf.Data]:
    """Return a network that was trained on the source domain, and labeled samples of the target domain.

    Args:
        kind: One of `KINDS`, or a kind of your own.
        seed: Of the samples, of the network and of the shift.
        per_class: Labeled samples per class before the shift; two thirds are for training, one third for validation.
    """
    what = KINDS[kind] if isinstance(kind, str) else kind
    if what.source == what.target:
        images, classes = (each[_shuffled("hand", seed)[800:]] for each in _samples("hand"))
    else:
        images, classes = (each[_shuffled(what.target, seed)] for each in _samples(what.target))
    rest, test = train_test_split(
        range(len(classes)), test_size=len(classes) - 10 * per_class, stratify=classes, random_state=seed
    )
    train, val = train_test_split(rest, test_size=1 / 3, stratify=classes[rest], random_state=seed)
    images, classes = what.shift(images, classes, torch.Generator().manual_seed(seed))
    return copy.deepcopy(_source_model(what.source, seed)), _data(images, classes, train, val, test[:700])


def network(seed: int) -> SmallNet:
    """Return a network with randomly initialized weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallNet()


def fine_tune(model: tf.Model, data: tf.Data, strategy: Any, *, seed: int, **settings: Any) -> tf.Result:
    """Fine-tune a copy of the model; nothing is kept on disk."""
    with TemporaryDirectory() as folder:
        copied = attrs.evolve(model, module=copy.deepcopy(model.module))
        out = Path(folder) / "run"
        given = {"data": data, "model": copied, "strategy": strategy, "seed": seed, "page": False, "out": out}
        return tf.Engine(**given, **{"batch_size": 16, **settings}).run()


@lru_cache(maxsize=2)
def _source_model(source: str, seed: int) -> tf.Model:
    rows = _shuffled(source, seed)
    data = _data(*_samples(source), rows[:650], rows[650:800], rows[650:800])
    model = tf.Model.from_module(network(seed), head="head", labels=data.targets.labels)
    strategy = tf.use("full", epochs=25, lr=3e-3)
    return fine_tune(model, data, strategy, seed=seed).model


def _data(images: Tensor, classes: Tensor, *rows: Any) -> tf.Data:
    train, val, test = (tf.Split(images[each], classes[each]) for each in map(torch.as_tensor, rows))
    prepared = _prepared("digits").data
    return tf.Data(train=train, val=val, test=test, inputs=prepared.inputs, targets=prepared.targets)


def _shuffled(domain: str, seed: int) -> Tensor:
    return torch.randperm(len(_samples(domain)[1]), generator=torch.Generator().manual_seed(seed))


@cache
def _samples(domain: str) -> tuple[Tensor, Tensor]:
    """Images uint8 (n, 1, 32, 32) of ten classes (n,): handwritten digits, or rendered characters."""
    prepared = _prepared("digits" if domain == "hand" else "glyphs").data
    splits = (prepared.train, prepared.val, prepared.test)
    images = torch.cat([split.fetch(torch.arange(len(split))) for split in splits])
    classes = torch.cat([split.targets for split in splits])
    if domain == "hand":
        return images, classes
    wanted = {"print": "0123456789", "capitals": CASES, "small letters": CASES.lower()}[domain]
    places = [prepared.targets.labels.index(each) for each in wanted]
    rows = torch.isin(classes, torch.tensor(places))
    return images[rows], torch.tensor([places.index(int(each)) for each in classes[rows]])


@cache
def _prepared(name: str) -> tf.Run:
    options = {"digits": {"other_share": 0.0}, "glyphs": {"count": 12_400}}[name]
    return tf.Engine(data=tf.use(name, **options), model="digit-cnn", seed=0).prepare()
