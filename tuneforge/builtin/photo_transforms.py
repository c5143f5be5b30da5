"""Augmentations for photographs: crops and colors; the change of a sample is a pure function of (seed, epoch, sample).

Shapes: b samples, c channels, h and w pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tuneforge import between, component, option
from tuneforge.builtin.transforms import Flip, apply_to_images, warp_images

if TYPE_CHECKING:
    from tuneforge import Batch, Run

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R 601
_MAX_LOG_RATIO = math.log(4 / 3)


@component(api=1)
class RandomResizedCrop:
    """Enlarge a random part of an image to its size (Szegedy et al. 2014, arXiv 1409.4842)."""

    per_sample = True
    low: float = option(default=0.25, help="Minimum fraction of the area that is kept.", check=between(0.01, 1))

    def augment(self, run: Run, batch: Batch) -> Batch:
        """Crop each sample to an area uniform in [low, 1] with an aspect ratio from 3:4 to 4:3, times its own."""
        del run
        area_b, ratio_b, right_b, down_b = batch.rng.uniform("random-resized-crop", 4).unbind(1)
        area_b = self.low + (1 - self.low) * area_b
        ratio_b = torch.exp((ratio_b * 2 - 1) * _MAX_LOG_RATIO)
        width_b, height_b = (each.sqrt().clamp(max=1) for each in (area_b * ratio_b, area_b / ratio_b))
        x_b, y_b = (right_b * 2 - 1) * (1 - width_b), (down_b * 2 - 1) * (1 - height_b)
        zero_b = torch.zeros_like(width_b)

        def crop(images_bchw: Tensor) -> Tensor:
            return warp_images(images_bchw, (width_b, zero_b, x_b), (zero_b, height_b, y_b))

        return apply_to_images(batch, crop, "random-resized-crop")


@component(api=1)
class ColorJitter:
    """Change brightness, contrast and saturation at random."""

    per_sample = True
    strength: float = option(default=0.3, help="Maximum relative change of each of the three.", check=between(0, 1))

    def augment(self, run: Run, batch: Batch) -> Batch:
        """Multiply brightness, contrast and saturation of each sample by factors uniform in [1 - s, 1 + s].

        Images are changed on the scale 0 to 1 and clipped to it, whatever their normalization.
        """
        factors_b3 = 1 + (batch.rng.uniform("color-jitter", 3) * 2 - 1) * self.strength
        inputs = getattr(run.data, "inputs", None)
        mean, std = getattr(inputs, "mean", (0.0,)), getattr(inputs, "std", (1.0,))

        def jitter(images_bchw: Tensor) -> Tensor:
            mean_c11, std_c11 = (images_bchw.new_tensor(each)[:, None, None] for each in (mean, std))
            changed = _change_colors(images_bchw * std_c11 + mean_c11, factors_b3.to(images_bchw))
            return (changed - mean_c11) / std_c11

        return apply_to_images(batch, jitter, "color-jitter")


@component(api=1)
class Photo:
    """The usual set for photographs: a random resized crop, a horizontal flip, and a color jitter."""

    per_sample = True
    low: float = option(default=0.5, help="Minimum fraction of the area that the crop keeps.", check=between(0.01, 1))
    strength: float = option(default=0.2, help="Maximum relative change of the colors.", check=between(0, 1))
    p: float = option(default=0.5, help="Probability of the flip.", check=between(0, 1))

    def augment(self, run: Run, batch: Batch) -> Batch:
        """Apply the three in turn."""
        for part in (RandomResizedCrop(low=self.low), Flip(p=self.p), ColorJitter(strength=self.strength)):
            batch = part.augment(run, batch)
        return batch


def _change_colors(pixels_bchw: Tensor, factors_b3: Tensor) -> Tensor:
    """Return the images with brightness, contrast and saturation multiplied, clipped to the scale 0 to 1."""
    brightness, contrast, saturation = (each[:, None, None, None] for each in factors_b3.unbind(1))
    pixels = (pixels_bchw * brightness).clamp(0, 1)
    # avg_pool2d sums each plane alone; the summation order of mean() depends on the batch size
    mean_b111 = _to_gray(F.avg_pool2d(pixels, list(pixels.shape[-2:])))
    pixels = ((pixels - mean_b111) * contrast + mean_b111).clamp(0, 1)
    gray = _to_gray(pixels)
    return ((pixels - gray) * saturation + gray).clamp(0, 1)


def _to_gray(pixels_bchw: Tensor) -> Tensor:
    """Return the luma (b, 1, h, w) of color images; other images have no color, and are their own."""
    if pixels_bchw.shape[1] != 3:
        return pixels_bchw
    red, green, blue = pixels_bchw.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]
