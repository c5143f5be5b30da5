"""Data sources that ship with the package: `digits`, real handwriting among other characters; `glyphs`, rendered ones.

Both go through one preprocessing, so that a model pretrained on glyphs meets nothing new in the digits but the hand.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tuneforge import Data, DataError, Split, between, component, ge, hookimpl, option
from tuneforge.builtin.datasets.demo.digit_images import (
    AMBIGUOUS,
    DigitImages,
    control_digits,
    digits_and_others,
    real_digits,
)
from tuneforge.builtin.datasets.demo.glyphs import glyph_images
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.builtin.targets import ClassTargets

if TYPE_CHECKING:
    from tuneforge import Run

MEAN, STD = 0.3, 0.35
"""Of the ink of real digits at 32x32, on the scale 0 to 1, rounded: normalises both sources alike."""


@component(api=1)
class Digits:
    """Real handwritten digits (UCI optdigits, from scikit-learn) among other characters, an eleventh class `other`.

    60 % digits 0-9 and 40 % other characters by default. Some digits are rendered from fonts, so that print does not
    mean `other`; the report has rows of their own for the real digits alone, and for a control set of digits rendered
    in a font family that neither training nor pretraining has seen.
    """

    other_share: float = option(default=0.4, help="Share of other characters in the whole.", check=between(0, 0.9))
    val: float = option(default=0.15, help="Share of the real digits for validation.", check=between(0.01, 0.5))
    test: float = option(default=0.2, help="Share of the real digits for the test.", check=between(0.01, 0.5))
    per_class: int | None = option(
        default=None, help="Training images of each class; none: all there are.", check=ge(1)
    )

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Split the real digits, and make each split's other characters for it alone."""
        seed = run.data_seed
        parts = {
            name: digits_and_others(indices, other_share=self.other_share, seed=seed, split=name)
            for name, indices in self._real_split(seed).items()
        }
        if self.per_class is not None:
            parts["train"] = _few(parts["train"], self.per_class, seed)
        inputs = _inputs()
        splits = {name: _split(part, inputs) for name, part in parts.items()}
        return Data(
            train=splits["train"],
            val=splits["val"],
            test=splits["test"],
            inputs=inputs,
            targets=ClassTargets(names=parts["train"].class_names),
            extra_test_splits=self._further(parts["test"], splits["test"], inputs, seed),
            notes=tuple(self._notes(parts)),
        )

    def _real_split(self, seed: int) -> dict[str, Any]:
        from sklearn.model_selection import train_test_split

        _, labels = real_digits()
        rest, test = train_test_split(np.arange(len(labels)), test_size=self.test, stratify=labels, random_state=seed)
        train, val = train_test_split(
            rest, test_size=self.val / (1 - self.test), stratify=labels[rest], random_state=seed
        )
        return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}

    def _further(self, part: DigitImages, test: Split, inputs: ImageInputs, seed: int) -> dict[str, Split]:
        if not self.other_share:
            return {}
        real = torch.from_numpy(np.flatnonzero(part.origins == "real"))
        return {"real digits": test.subset(real), "control": _split(control_digits(seed=seed), inputs)}

    def _notes(self, parts: dict[str, DigitImages]) -> list[str]:
        origins = np.concatenate([part.origins for part in parts.values()])
        counts = ", ".join(f"{int((origins == origin).sum()):,} {origin}" for origin in dict.fromkeys(origins.tolist()))
        notes = [f"images by origin: {counts}"]
        if self.other_share:
            notes.append(
                f"left out of the others, because 8x8 pixels cannot tell them from digits: {' '.join(AMBIGUOUS)}"
            )
        return notes


@component(api=1)
class Glyphs:
    """Rendered characters 0-9, A-Z, a-z in the shape of optdigits: the source domain for pretraining."""

    count: int = option(default=30_000, help="Images in all.", check=ge(620))
    fonts: tuple[Path, ...] = option(default=(), help="Font folders besides those of matplotlib.")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Render them all at once and cut: every class is as frequent in each split."""
        inputs = _inputs()
        made = glyph_images(self.count, seed=run.data_seed, folders=self.fonts)
        images, labels = _stored(made.images, inputs), torch.from_numpy(made.labels)
        borders = [0, round(0.8 * self.count), round(0.9 * self.count), self.count]
        cuts = [slice(start, stop) for start, stop in pairwise(borders)]
        train, val, test = (Split(images[cut], labels[cut]) for cut in cuts)
        families = sorted(set(made.families.tolist()))
        return Data(
            train=train,
            val=val,
            test=test,
            inputs=inputs,
            targets=ClassTargets(names=made.class_names),
            notes=(f"font families: {', '.join(families)}",),
        )


def _inputs() -> ImageInputs:
    """From any picture to the 8x8 blocks of optdigits, and up to the 32x32 that the network takes."""
    return ImageInputs(ops=("grayscale", "ink", "resize 8", "resize 32"), channels=3, mean=(MEAN,), std=(STD,))


def _stored(images_nyx: Any, inputs: ImageInputs) -> Tensor:
    """Ink counts (n, 8, 8), 0 to 16, as the inputs store them: uint8 (n, 1, 32, 32)."""
    grey = ((images_nyx.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    return inputs.apply_ops(torch.from_numpy(grey)[:, None], name="the digits")


def _split(part: DigitImages, inputs: ImageInputs) -> Split:
    return Split(_stored(part.images, inputs), torch.from_numpy(part.labels), ids=part.ids.tolist())


def _few(part: DigitImages, per_class: int, seed: int) -> DigitImages:
    """`per_class` images of each class, drawn by the seed."""
    rng = np.random.default_rng([seed, per_class])
    chosen = []
    for label, name in enumerate(part.class_names):
        members = np.flatnonzero(part.labels == label)
        if len(members) < per_class:
            raise DataError(
                f"class '{name}' has {len(members)} training images, fewer than {per_class}",
                where="--data.per-class",
                fix=f"ask for at most {len(members)}",
            )
        chosen.append(rng.choice(members, per_class, replace=False))
    rows = np.sort(np.concatenate(chosen))
    arrays = {name: getattr(part, name)[rows] for name in ("images", "labels", "origins", "ids", "parents")}
    return DigitImages(class_names=part.class_names, **arrays)
