"""Data augmentation of image batches; the change of a sample is a pure function of (seed, epoch, sample).

Each augmentation draws its random numbers from `batch.rng`, a row per sample, and transforms each sample alone, so that
the result for a sample is bit-identical in any batch. Only `MixUp` uses another sample: the next row of the batch.

Shapes: b samples, c channels, h and w pixels, k classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tuneforge import UsageError, between, component, gt, option

if TYPE_CHECKING:
    from tuneforge import Batch, Run

IMAGE_KEYS = ("image", "pixel_values")
"""Keys of images in a mapping of inputs."""


@component(api=1)
class NoAugmentation:
    """Train without augmentation, also on data that has a default one."""

    per_sample = True

    def augment(self, run: Run, batch: Batch) -> Batch:
        """Return the batch as it is."""
        del run
        return batch


@component(api=1)
class Flip:
    """Mirror images at random."""

    per_sample = True
    p: float = option(default=0.5, help="Probability of mirroring a sample.", check=between(0, 1))
    axis: Literal["horizontal", "vertical"] = option(
        default="horizontal", help="Axis of the flip: left-right or top-bottom."
    )

    def augment(self, run: Run, batch: Batch) -> Batch:
        """Mirror each sample with probability `p`."""
        del run
        chosen_b = batch.rng.uniform(f"flip/{self.axis}") < self.p
        dim = -1 if self.axis == "horizontal" else -2

        def mirror(images_bchw: Tensor) -> Tensor:
            chosen_b111 = chosen_b[:, None, None, None].to(images_bchw.device)
            return torch.where(chosen_b111, images_bchw.flip(dim), images_bchw)

        return apply_to_images(batch, mirror, "flip")


@component(api=1)
class Rotate:
    """Rotate images by a random angle about their center."""

    per_sample = True
    degrees: float = option(default=10.0, help="Maximum angle in either direction.", check=between(0, 180))

    def augment(self, run: Run, batch: Batch) -> Batch:
        """Rotate each sample by an angle uniform in [-degrees, degrees], with replicated borders."""
        del run
        angle_b = torch.deg2rad((batch.rng.uniform("rotate") * 2 - 1) * self.degrees)

        def rotate(images_bchw: Tensor) -> Tensor:
            ratio = images_bchw.shape[-1] / images_bchw.shape[-2]
            cos_b, sin_b, zero_b = angle_b.cos(), angle_b.sin(), torch.zeros_like(angle_b)
            return warp_images(images_bchw, (cos_b, -sin_b / ratio, zero_b), (sin_b * ratio, cos_b, zero_b))

        return apply_to_images(batch, rotate, "rotate")


@component(api=1)
class Shift:
    """Translate images at random."""

    per_sample = True
    share: float = option(
        default=0.1, help="Maximum translation, as a fraction of width and height.", check=between(0, 1)
    )

    def augment(self, run: Run, batch: Batch) -> Batch:
        """Translate each sample by fractions uniform in [-share, share], with replicated borders."""
        del run
        right_b, down_b = ((batch.rng.uniform("shift", 2) * 2 - 1) * self.share * 2).unbind(1)

        def translate(images_bchw: Tensor) -> Tensor:
            one_b, zero_b = torch.ones_like(right_b), torch.zeros_like(right_b)
            return warp_images(images_bchw, (one_b, zero_b, -right_b), (zero_b, one_b, -down_b))

        return apply_to_images(batch, translate, "shift")


@component(api=1)
class Erase:
    """Replace a random rectangle of an image by its mean (random erasing, Zhong et al. 2017, 1708.04896)."""

    per_sample = True
    p: float = option(default=0.25, help="Probability of erasing a rectangle.", check=between(0, 1))
    low: float = option(default=0.02, help="Minimum fraction of the area that is erased.", check=between(0, 1))
    high: float = option(default=0.2, help="Maximum fraction of the area that is erased.", check=between(0, 1))

    def augment(self, run: Run, batch: Batch) -> Batch:
        """Erase one rectangle with an aspect ratio from 1:3 to 3:1 from each selected sample."""
        del run
        numbers_b5 = batch.rng.uniform("erase", 5)

        def erase(images_bchw: Tensor) -> Tensor:
            inside_bhw = self._make_rectangle_masks(numbers_b5, images_bchw.shape[-2], images_bchw.shape[-1])
            # avg_pool2d sums each plane alone; the summation order of mean() depends on the batch size
            mean_bc11 = F.avg_pool2d(images_bchw, list(images_bchw.shape[-2:]))
            return torch.where(inside_bhw[:, None].to(images_bchw.device), mean_bc11, images_bchw)

        return apply_to_images(batch, erase, "erase")

    def _make_rectangle_masks(self, numbers_b5: Tensor, height: int, width: int) -> Tensor:
        """Return a mask (b, h, w) of each sample's rectangle, empty for samples that are not selected."""
        chosen_b, area_b, ratio_b, top_b, left_b = numbers_b5.unbind(1)
        area_b = (self.low + area_b * (self.high - self.low)) * height * width
        ratio_b = torch.exp((ratio_b * 2 - 1) * float(np.log(3.0)))
        rows_b = (area_b * ratio_b).sqrt().round().clamp(1, height)
        columns_b = (area_b / ratio_b).sqrt().round().clamp(1, width)
        down_bh = _make_interval_mask(height, (top_b * (height + 1 - rows_b)).floor(), rows_b)
        right_bw = _make_interval_mask(width, (left_b * (width + 1 - columns_b)).floor(), columns_b)
        return down_bh[:, :, None] & right_bw[:, None, :] & (chosen_b < self.p)[:, None, None]


@component(api=1)
class MixUp:
    """Mix each sample and its target with the next one of the batch (Zhang et al. 2018, 1710.09412)."""

    needs_inputs = True

    alpha: float = option(
        default=0.2, help="Both parameters of the Beta distribution of the mixing weight.", check=gt(0)
    )

    def augment(self, run: Run, batch: Batch) -> Batch:
        """Mix inputs and targets; class indices (b,) become class probabilities (b, k).

        Sample weights are included in the probabilities, so that the loss is that of the paper.
        """
        own_b = uniform_to_beta(batch.rng.uniform("mix-up"), alpha=self.alpha).to(batch.targets.device)
        targets = batch.targets
        if targets.ndim == 1 and not targets.is_floating_point():
            targets = F.one_hot(targets, run.data.targets.num_outputs)
        mixed = {"inputs": _mix_inputs(batch.inputs, own_b)}
        if batch.weights is None:
            return attrs.evolve(batch, targets=_mix_with_next(targets.float(), own_b), **mixed)
        weights_b = _mix_with_next(batch.weights, own_b)
        weighted = _mix_with_next(targets.float() * _broadcast_like(batch.weights, targets), own_b)
        return attrs.evolve(
            batch, targets=weighted / _broadcast_like(weights_b.clamp_min(1e-12), weighted), weights=weights_b, **mixed
        )


def uniform_to_beta(uniform: Tensor, *, alpha: float) -> Tensor:
    """Return samples of Beta(alpha, alpha) from uniform samples, by the inverse CDF."""
    points, cdf = _beta_table(alpha)
    numbers = uniform.double().numpy()
    lower = np.minimum(numbers, 1.0 - numbers)
    values = np.interp(lower, cdf, points) ** (1.0 / alpha)
    return torch.from_numpy(np.where(numbers > 0.5, 1.0 - values, values)).float()


@functools.lru_cache(maxsize=8)
def _beta_table(alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points s = x ** alpha for x in [0, 1/2] and the CDF at these points.

    The density x ** (alpha - 1) * (1 - x) ** (alpha - 1) has a pole at 0 for alpha < 1; as a function of s it has none.
    """
    x = 0.5 * np.linspace(0.0, 1.0, 8193) ** 3
    s = x**alpha
    density = (1.0 - x) ** (alpha - 1.0)
    area = np.concatenate([[0.0], np.cumsum(np.diff(s) * (density[1:] + density[:-1]))])
    return s, 0.5 * area / area[-1]


def _mix_with_next(values: Tensor, own_b: Tensor) -> Tensor:
    """Return each row mixed with the next one, the last with the first."""
    own = _broadcast_like(own_b.to(values.device, values.dtype), values)
    return own * values + (1 - own) * values.roll(-1, 0)


def _mix_inputs(inputs: Any, own_b: Tensor) -> Any:
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return _mix_with_next(inputs, own_b)
    name = _find_image_key(inputs, "mix-up")
    return {**inputs, name: _mix_with_next(inputs[name], own_b)}


def _broadcast_like(values_b: Tensor, like: Tensor) -> Tensor:
    return values_b.reshape(-1, *([1] * (like.ndim - 1)))


def _make_interval_mask(size: int, start_b: Tensor, length_b: Tensor) -> Tensor:
    """Return a mask (b, size) of the `length_b` positions from `start_b`."""
    places = torch.arange(size)
    return (places >= start_b[:, None]) & (places < (start_b + length_b)[:, None])


def warp_images(images_bchw: Tensor, x_row: tuple[Tensor, ...], y_row: tuple[Tensor, ...]) -> Tensor:
    """Sample the images at x' = x_row . (x, y, 1), y' = y_row . (x, y, 1), in coordinates from -1 to 1.

    The grid is computed elementwise, because the matrix product of `affine_grid` rounds differently by batch size.
    """
    height, width = images_bchw.shape[-2:]
    y_h1, x_w = _pixel_centers(height, images_bchw)[:, None], _pixel_centers(width, images_bchw)
    grid = [
        a[:, None, None] * x_w + b[:, None, None] * y_h1 + c[:, None, None]
        for a, b, c in (tuple(each.to(images_bchw) for each in row) for row in (x_row, y_row))
    ]
    return F.grid_sample(images_bchw, torch.stack(grid, dim=-1), padding_mode="border", align_corners=False)


def _pixel_centers(size: int, like: Tensor) -> Tensor:
    """Return the coordinates of pixel centers from -1 to 1 (size,)."""
    return (torch.arange(size, device=like.device, dtype=like.dtype) * 2 + 1) / size - 1


def apply_to_images(batch: Batch, change: Callable[[Tensor], Tensor], part: str) -> Batch:
    """Return the batch with transformed images."""
    inputs = batch.inputs
    if isinstance(inputs, Tensor):
        return attrs.evolve(batch, inputs=change(_require_images(inputs, part)))
    name = _find_image_key(inputs, part)
    return attrs.evolve(batch, inputs={**inputs, name: change(_require_images(inputs[name], part))})


def _find_image_key(inputs: Any, part: str) -> str:
    found = [name for name in IMAGE_KEYS if isinstance(inputs, Mapping) and name in inputs]
    if not found:
        kind = f"a mapping of {', '.join(inputs)}" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise _not_images_error(part, kind)
    return found[0]


def _require_images(images: Tensor, part: str) -> Tensor:
    if images.ndim != 4 or not images.is_floating_point():
        raise _not_images_error(part, f"{images.dtype} of shape {tuple(images.shape)}")
    return images


def _not_images_error(part: str, found: str) -> UsageError:
    return UsageError(
        f"augmentation '{part}' needs images, and the inputs are {found}",
        where="--augment",
        why=f"it takes float tensors (batch, channels, height, width), or a mapping with {' or '.join(IMAGE_KEYS)}",
        fix="remove it for this data",
    )
