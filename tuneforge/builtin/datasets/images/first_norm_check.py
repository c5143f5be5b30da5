"""Compare images with the running statistics of the first BatchNorm, which remembers how images were prepared.

Shapes: n images, c channels of an image, k channels of the layer, h and w pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from tuneforge.builtin.datasets.images.image_inputs import ImageInputs

if TYPE_CHECKING:
    from tuneforge import Run

MIN_IMAGES, MAX_IMAGES = 24, 256
MIN_DISTANCE_GAIN = 0.05
"""How much closer another mean and std must be: on photographs, wrong ones were farther by 0.08 to 9."""
MIN_SWAP_Z = 0.8
"""Standard errors by which swapped channels must be closer: wrong ones were farther by 1.0 to 13.6."""
_NUM_RESAMPLES = 100
_NORMALIZATIONS = {
    "ImageNet's mean and std (--data.normalize imagenet)": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean 0.5 and std 0.5 (--data.mean 0.5 --data.std 0.5)": ((0.5,) * 3, (0.5,) * 3),
    "values from 0 to 1 (--data.normalize none)": ((0.0,) * 3, (1.0,) * 3),
    "values from 0 to 255 (--data.mean 0 --data.std 0.003922)": ((0.0,) * 3, (1 / 255,) * 3),
}


@attrs.frozen(eq=False)
class _Layer:
    """The first BatchNorm that images reach.

    Args:
        path: Its path.
        norm: The layer.
        network: The network.
    """

    path: str
    norm: Any
    network: nn.Module

    def moments(self, images_nchw: Tensor) -> Tensor:
        """Return mean and mean square of its input for each image, (2, n, k)."""
        chunks = [_capture_input(self.network, self.norm, each).float() for each in torch.split(images_nchw, 32)]
        return torch.cat([torch.stack([each.mean((2, 3)), each.square().mean((2, 3))]) for each in chunks], dim=1)

    def distances(self, moments_2nk: Tensor) -> Tensor:
        """Return log(1 + D) for each channel (k,), D the Kullback-Leibler divergence of two normal distributions."""
        mean, square = moments_2nk.mean(1).double()
        variance = (square - mean.square()).clamp_min(1e-12)
        known = self.norm.running_var.double() + self.norm.eps
        shift = (mean - self.norm.running_mean.double()).square()
        return torch.log1p(0.5 * (torch.log(known / variance) + (variance + shift) / known - 1))


def check_first_norm(run: Run) -> str | None:
    """Return a sentence if images do not seem to be prepared as those that a pretrained network was trained on.

    The distance of a batch to the running statistics is compared with the distances that other usual preparations of
    the same images have. It needs no metadata of the weights. None if nothing is suspicious, or if there are too few
    images or no pretrained weights.
    """
    inputs = run.data.inputs
    if not isinstance(inputs, ImageInputs) or not run.model.pretrained or run.sharded:
        return None
    count = len(run.data.train)
    rows = torch.linspace(0, count - 1, min(count, MAX_IMAGES)).round().long()
    if len(rows) < MIN_IMAGES:
        return None
    images = inputs.preprocess(run.data.train.fetch(rows)).to(run.device.torch)
    with run.preserve_model(), torch.no_grad():
        run.model.module.eval()
        layer = _find_first_norm(run.model.module, images[:2])
        if layer is None:
            return (
                "note: the network has no BatchNorm with trained running statistics near its input, so mean, std and "
                "the order of channels cannot be checked against it"
            )
        return _find_better(layer, images, inputs)


def _find_better(layer: _Layer, images_nchw: Tensor, inputs: ImageInputs) -> str | None:
    """Return a sentence on another preparation that is closer to the running statistics, or None."""
    own = layer.moments(images_nchw)
    distance = float(layer.distances(own).mean())
    others = {
        name: float(layer.distances(layer.moments(each)).mean())
        for name, each in _prepare_otherwise(images_nchw, inputs)
    }
    name = min(others, key=lambda each: others[each])
    start = f"warning: the layer '{layer.path}' was trained on other inputs: "
    if images_nchw.shape[1] == 3:
        swapped = layer.moments(_swap(images_nchw, inputs))
        is_closest = float(layer.distances(swapped).mean()) < others[name]
        if is_closest and _swap_z(layer, own, swapped) > MIN_SWAP_Z:
            return f"{start}its running statistics are closer to images with red and blue swapped, so it may expect BGR"
    if distance - others[name] > MIN_DISTANCE_GAIN:
        return (
            f"{start}its running statistics are closer to images with {name} (distance {others[name]:.2f}) than to "
            f"those of this run ({distance:.2f})"
        )
    return None


def _prepare_otherwise(images_nchw: Tensor, inputs: ImageInputs) -> Iterator[tuple[str, Tensor]]:
    channels = images_nchw.shape[1]
    pixels = _to_pixels(images_nchw, inputs)
    for name, (mean, std) in _NORMALIZATIONS.items():
        if channels == 3:
            yield name, (pixels - _column(mean, pixels)) / _column(std, pixels)
        else:
            yield name, (pixels - sum(mean) / 3) / (sum(std) / 3)


def _to_pixels(images_nchw: Tensor, inputs: ImageInputs) -> Tensor:
    return images_nchw * _column(inputs.std, images_nchw) + _column(inputs.mean, images_nchw)


def _swap(images_nchw: Tensor, inputs: ImageInputs) -> Tensor:
    """Return the images with red and blue swapped before normalization."""
    swapped = _to_pixels(images_nchw, inputs).flip(1)
    return (swapped - _column(inputs.mean, swapped)) / _column(inputs.std, swapped)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def _swap_z(layer: _Layer, own: Tensor, swapped: Tensor) -> float:
    """Return how much closer swapped channels are, in standard errors (bootstrap over images)."""
    count = own.shape[1]

    def gain(rows: Tensor) -> float:
        return float((layer.distances(own[:, rows]) - layer.distances(swapped[:, rows])).sum())

    generator = torch.Generator().manual_seed(0)
    resampled = [gain(torch.randint(count, (count,), generator=generator)) for _ in range(_NUM_RESAMPLES)]
    spread = float(torch.tensor(resampled).std())
    return gain(torch.arange(count)) / spread if spread > 0 else 0.0


def _find_first_norm(network: nn.Module, images_nchw: Tensor) -> _Layer | None:
    """Return the first layer that normalizes, if it is a BatchNorm of images with running statistics; else None."""
    for path, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            mean, variance = module.running_mean, module.running_var
            if mean is None or variance is None or (torch.count_nonzero(mean) == 0 and bool((variance == 1).all())):
                return None  # without statistics, or never trained
            captured = _capture_input(network, module, images_nchw)
            return _Layer(path, module, network) if captured.ndim == 4 else None
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            return None
    return None


class _CapturedError(Exception):
    """Ends a forward pass at the layer whose input is wanted."""


def _capture_input(network: nn.Module, layer: nn.Module, images_nchw: Tensor) -> Tensor:
    captured: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Any, ...]) -> None:
        captured.append(args[0])
        raise _CapturedError

    handle = layer.register_forward_pre_hook(capture)
    try:
        network(images_nchw)
    except _CapturedError:
        pass
    finally:
        handle.remove()
    return captured[0] if captured else images_nchw.new_zeros(0)
