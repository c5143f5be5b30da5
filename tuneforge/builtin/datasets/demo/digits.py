"""Data sources with shipped images: `digits`, handwritten digits and other characters; `glyphs`, rendered characters.

Both have the same preprocessing, so that digits differ from glyphs, the pretraining data, only in the handwriting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.random import Generator, default_rng
from torch import Tensor

from tuneforge import Data, DataError, Split, between, component, ge, hookimpl, option, use
from tuneforge.builtin.datasets.demo import digit_images
from tuneforge.builtin.datasets.demo.digit_images import CHARACTERS, DIGITS, InkCounts, Integers, Names
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.builtin.targets import ClassTargets

if TYPE_CHECKING:
    from tuneforge import Run

MEAN, STD = 0.3, 0.35
"""Normalization of both sources: rounded mean and std of real digits at 32x32, on the scale 0 to 1."""

RENDERED_SHARE = 0.2
"""Fraction of rendered digits among the digits of `digits`, if there are others."""

STROKES_SHARE = 0.4
"""Fraction of characters composed of strokes of real digits among the others."""

AUGMENT = (use("rotate", degrees=10), use("shift", share=0.06))
"""Augmentation of `digits`: a writer's slant and place in the box; a flip would make other characters."""

INPUTS = ImageInputs(ops=("grayscale", "crop-to-ink", "resize 8", "resize 32"), channels=3, mean=(MEAN,), std=(STD,))
"""Converts any image to the 8x8 blocks of optdigits, and these to the 32x32 input of the network."""


@component(api=1)
class Digits:
    """Real handwritten digits (UCI optdigits, from scikit-learn) among other characters, an eleventh class `other`.

    60 % digits 0-9 and 40 % other characters by default. Some digits are rendered from fonts, so that printed
    characters are not all `other`. The report has extra test splits: `real digits`, and `unseen font`, digits in a font
    family that is in neither the training nor the pretraining data.

    The seed splits the real digits and chooses among the other images that ship. Two splits share no image, and no
    strokes of one real digit. If a large fraction needs more images than ship, the rest are random distortions, each
    in the split of its original.
    """

    other_share: float = option(default=0.4, help="Fraction of other characters in the data.", check=between(0, 0.9))
    val: float = option(default=0.15, help="Fraction of the real digits for validation.", check=between(0.01, 0.5))
    test: float = option(default=0.2, help="Fraction of the real digits for the test split.", check=between(0.01, 0.5))
    per_class: int | None = option(default=None, help="Training images per class; default: all.", check=ge(1))

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Split the real digits, and add separate other characters to each split."""
        seed = run.data_seed
        real = self._real_split(seed)
        classes = (*DIGITS, "other") if self.other_share else tuple(DIGITS)
        train, val, test = (_split(parts, classes) for parts in self._samples(real, seed).values())
        if self.per_class is not None:
            train = _few(train, classes, self.per_class, seed)
        origins = Counter(name.split("/")[0] for split in (train, val, test) for name in split.ids or ())
        notes = [f"images by origin: {', '.join(f'{count:,} {origin}' for origin, count in origins.items())}"]
        extra: dict[str, Split] = {}
        if self.other_share:
            shipped = digit_images.character_images()
            ambiguous = " ".join(c for c in CHARACTERS if c not in DIGITS + shipped.other_characters)
            notes.append(f"characters not among the others, because they look like digits at 8x8 pixels: {ambiguous}")
            extra["real digits"] = test.subset(torch.arange(len(real["test"])))
            control = _draw("control", shipped.control, DIGITS, {"control": 500}, default_rng(seed))
            extra["unseen font"] = _split([control["control"]], classes)
        targets = ClassTargets(names=classes)
        return Data(
            augment=AUGMENT,
            train=train,
            val=val,
            test=test,
            inputs=INPUTS,
            targets=targets,
            extra_test_splits=extra,
            notes=tuple(notes),
        )

    def _real_split(self, seed: int) -> dict[str, Integers]:
        """Return the rows of `real_digits` for each split."""
        from sklearn.model_selection import train_test_split

        _, labels = digit_images.real_digits()
        rest, test = train_test_split(np.arange(len(labels)), test_size=self.test, stratify=labels, random_state=seed)
        val = self.val / (1 - self.test)
        train, val = train_test_split(rest, test_size=val, stratify=labels[rest], random_state=seed)
        return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}

    def _samples(self, real: Mapping[str, Integers], seed: int) -> dict[str, list[_Samples]]:
        """Return the real digits of each split, then its rendered digits, letters and strokes."""
        if not self.other_share:
            return {name: [_real(rows)] for name, rows in real.items()}
        shipped, rng = digit_images.character_images(), default_rng(seed)
        num_rendered, num_letters, strokes = {}, {}, {}
        for name, rows in real.items():
            num_rendered[name] = round(len(rows) * RENDERED_SHARE / (1 - RENDERED_SHARE))
            num_others = round((len(rows) + num_rendered[name]) * self.other_share / (1 - self.other_share))
            strokes[name] = _strokes(rows, round(num_others * STROKES_SHARE), rng)
            # A split with too few digits to compose characters of gets letters instead.
            num_letters[name] = num_others - len(strokes[name].ids)
        rendered = _draw("rendered", shipped.digits, DIGITS, num_rendered, rng)
        letters = _draw("letters", shipped.others, shipped.other_characters, num_letters, rng)
        return {name: [_real(rows), rendered[name], letters[name], strokes[name]] for name, rows in real.items()}


@component(api=1)
class Glyphs:
    """Rendered characters 0-9, A-Z, a-z in the shape of optdigits: the source domain for pretraining.

    30,132 images ship, and the seed chooses among them. If the count is larger, the rest are random distortions,
    each in the split of its original. All font families are equally frequent, those of additional folders included.
    """

    count: int = option(default=30_000, help="Total number of images.", check=ge(620))
    fonts: tuple[Path, ...] = option(default=(), help="Additional font folders.")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Choose and split the images; all classes are equally frequent in each split."""
        rng = default_rng(run.data_seed)
        families = _families(self.fonts, rng)
        ends = [round(share * self.count) for share in (0, 0.8, 0.9, 1)]
        counts = dict(zip(("train", "val", "test"), np.diff(ends).tolist(), strict=True))
        samples = _draw("glyphs", np.stack(list(families.values()), axis=2), CHARACTERS, counts, rng)
        train, val, test = (_split([part], CHARACTERS) for part in samples.values())
        targets, notes = ClassTargets(names=tuple(CHARACTERS)), (f"font families: {', '.join(sorted(families))}",)
        return Data(train=train, val=val, test=test, inputs=INPUTS, targets=targets, notes=notes)


class _Samples(NamedTuple):
    """Images (n, 8, 8) of ink counts, the name of each (n,), and an id of each that begins with its origin."""

    images: InkCounts
    names: Names
    ids: list[str]


def stored_images(counts: InkCounts) -> Tensor:
    """Convert ink counts (n, 8, 8), 0 to 16, to the stored form of `INPUTS`, uint8 (n, 1, 32, 32)."""
    gray = torch.from_numpy(((counts.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8))
    return INPUTS.apply_ops(gray[:, None], name="the digits")


def _split(parts: Sequence[_Samples], classes: Sequence[str]) -> Split:
    """Return the split of all parts. A name that is not in `classes` gets the last class."""
    images = stored_images(np.concatenate([part.images for part in parts]))
    labels = {name: label for label, name in enumerate(classes)}
    targets = torch.tensor([labels.get(name, len(classes) - 1) for part in parts for name in part.names.tolist()])
    ids = [name for part in parts for name in part.ids]
    return Split(images, targets, ids=ids)


def _real(rows: Integers) -> _Samples:
    images, labels = digit_images.real_digits()
    return _Samples(images[rows], labels[rows].astype(str), [f"real/{row}" for row in rows])


def _draw(
    origin: str, images: InkCounts, characters: str, counts: Mapping[str, int], rng: Generator
) -> dict[str, _Samples]:
    """Draw separate images for each split; a character repeats only after all others were drawn.

    Args:
        origin: Origin of the images, for the ids.
        images: (characters, instances, 8, 8) or (characters, instances, families, 8, 8); families alternate.
        characters: Character of each row.
        counts: Samples of each split. If there are fewer images, they are split in the same proportion.
        rng: The only source of randomness.
    """
    numbered = np.arange(images[..., 0, 0].size).reshape(images.shape[:-2])
    rounds = rng.permuted(numbered, axis=1).reshape(len(characters), -1).T
    rows = rng.permuted(rounds, axis=1).ravel()
    ends = np.cumsum([0, *counts.values()])
    ends = ends * min(len(rows), ends[-1]) // max(1, ends[-1])
    names = np.repeat(list(characters), len(rounds))
    return {
        name: _take(origin, images, names, rows[ends[i] : ends[i + 1]], count, rng)
        for i, (name, count) in enumerate(counts.items())
    }


def _strokes(real_rows: Integers, count: int, rng: Generator) -> _Samples:
    """Draw from the stroke images that are composed of only these real digits; may return no samples."""
    shipped = digit_images.character_images()
    rows = rng.permutation(np.flatnonzero(np.isin(shipped.sources, [-1, *real_rows]).all(axis=1)))
    # Each transform keeps its frequency; otherwise images composed of two digits would be rare in small splits.
    order = np.zeros(len(rows))
    for transform, share in enumerate(shipped.transform_shares.values()):
        members = shipped.transforms[rows] == transform
        order[members] = np.arange(members.sum()) / share
    names = np.array(list(shipped.transform_shares))[shipped.transforms]
    return _take("strokes", shipped.strokes, names, rows[order.argsort(kind="stable")], count if len(rows) else 0, rng)


def _take(origin: str, images: InkCounts, names: Names, rows: Integers, count: int, rng: Generator) -> _Samples:
    """Return `count` of the images `rows`, cyclically; repeated images are distorted."""
    copies, places = np.divmod(np.arange(count), max(1, len(rows)))
    rows = rows[places]
    taken = images.reshape(-1, 8, 8)[rows]
    taken[copies > 0] = digit_images.distort(taken[copies > 0], rng)
    ids = [f"{origin}/{names[row]}/{row}" + f"/{copy}" * bool(copy) for row, copy in zip(rows, copies, strict=True)]
    return _Samples(taken, names[rows], ids)


def _families(folders: Sequence[Path], rng: Generator) -> dict[str, InkCounts]:
    """Return the glyphs (62, instances, 8, 8) of each font family, shipped or in the folders."""
    shipped = digit_images.character_images()
    families = {family: shipped.glyphs[:, :, i] for i, family in enumerate(shipped.families)}
    for family, styles in digit_images.render_families(folders).items():
        # Additional styles of a shipped family replace a proportional number of its instances.
        share = styles.shape[1] / (styles.shape[1] + shipped.families.get(family, 0))
        instances = round(shipped.glyphs.shape[1] * share)
        originals = styles[:, np.arange(instances) % styles.shape[1]]
        variants = digit_images.distort(originals.reshape(-1, 8, 8), rng, strength=2, ink=digit_images.MEAN_INK)
        others = families.get(family, styles[:, :0])[:, instances:]
        families[family] = np.concatenate((others, variants.reshape(originals.shape)), axis=1)
    return families


def _few(split: Split, classes: Sequence[str], per_class: int, seed: int) -> Split:
    """Return `per_class` samples of each class, drawn by the seed."""
    rng, chosen = default_rng([seed, per_class]), []
    for label, name in enumerate(classes):
        members = np.flatnonzero(split.targets.numpy() == label)
        if len(members) < per_class:
            what = f"class '{name}' has {len(members)} training images, fewer than {per_class}"
            raise DataError(what, where="--data.per-class", fix=f"ask for at most {len(members)}")
        chosen.append(rng.choice(members, per_class, replace=False))
    return split.subset(torch.from_numpy(np.sort(np.concatenate(chosen))))
