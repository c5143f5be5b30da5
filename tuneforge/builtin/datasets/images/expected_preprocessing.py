"""Options of images that the user left open: they follow the pretrained weights, or the inputs of a restored run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.builtin.datasets.images.image_splits import average_channels, compute_normalization
from tuneforge.builtin.datasets.images.preprocess import parse_ops

if TYPE_CHECKING:
    from tuneforge import Run
    from tuneforge.builtin.datasets.images.image_datasets import ImageOptions
    from tuneforge.plugin import ImagePreprocessing

AnyOptions = TypeVar("AnyOptions", bound="ImageOptions")

_DEFAULT_SIZE = 32  # pixels


def resolve_options(options: AnyOptions, run: Run) -> tuple[AnyOptions, tuple[str, ...]]:
    """Return the options with a value for each that the user left open, and sentences for the log.

    Values are those of the weights (`run.expected_inputs`), in a restored run those of its inputs, else the defaults.
    """
    if run.restoring:
        inputs = run.data.inputs
        return (_follow_inputs(options, inputs), ()) if isinstance(inputs, ImageInputs) else (options, ())
    expected = run.expected_inputs
    if expected is None:
        return options, ()
    resolved = _follow_weights(options, expected)
    differences = list(_find_differences(options, resolved, expected))
    if differences:
        return resolved, (f"note: the weights {expected.name} expect other images: {'; '.join(differences)}",)
    return resolved, (_describe(resolved, expected),)


def build_geometry_ops(options: ImageOptions) -> tuple[str, ...]:
    """Return the operations that give an image its size."""
    size = options.size or _DEFAULT_SIZE
    resize = options.resize or size
    words = "" if options.interpolation == "auto" else f" {options.interpolation}"
    crop = (f"center-crop {size}",)
    if options.fit == "pad":
        return ("pad-to-square", f"resize {resize}{words}", *(crop if resize != size else ()))
    if options.fit == "stretch":
        return (f"resize {resize}x{resize}{words}", *(crop if resize != size else ()))
    return (f"resize {resize}{words}", *crop)


def _follow_weights(options: AnyOptions, expected: ImagePreprocessing) -> AnyOptions:
    size = options.size or min(expected.size)
    mean, std = average_channels((expected.mean, expected.std), options.channels)
    follows = options.normalize == "auto"
    return attrs.evolve(  # type: ignore[misc]  # a component is an attrs class
        options,
        size=size,
        resize=options.resize or expected.resize_for(size),
        fit=expected.fit if options.fit == "auto" else options.fit,
        interpolation=expected.interpolation if options.interpolation == "auto" else options.interpolation,
        jpeg_margin=0 if options.jpeg_margin is None else options.jpeg_margin,
        mean=options.mean or (mean if follows else None),
        std=options.std or (std if follows else None),
    )


def _follow_inputs(options: AnyOptions, inputs: ImageInputs) -> AnyOptions:
    """Return the options with the geometry of stored inputs for the parts that the user left open."""
    if options.jpeg_margin is None:
        options = attrs.evolve(options, jpeg_margin=inputs.jpeg_margin)  # type: ignore[misc]
    ops = parse_ops(inputs.ops)
    resizes = [op for op in ops if op.name == "resize"]
    crops = [op for op in ops if op.name == "center-crop"]
    if not resizes or len({*(crops or resizes)[-1].size}) != 1:
        return options
    size = (crops or resizes)[-1].size[0]
    if options.size not in (None, size):
        return options
    stretches = len(resizes[-1].size) == 2
    fit = "pad" if any(op.name == "pad-to-square" for op in ops) else "stretch" if stretches else "crop"
    return attrs.evolve(  # type: ignore[misc]  # a component is an attrs class
        options,
        size=size,
        resize=options.resize or resizes[-1].size[0],
        fit=fit if options.fit == "auto" else options.fit,
        interpolation=(resizes[-1].interpolation or "auto")
        if options.interpolation == "auto"
        else options.interpolation,
    )


def _find_differences(options: Any, resolved: Any, expected: ImagePreprocessing) -> Iterator[str]:
    """Yield what the user chose and what the weights expect, for each option in which they differ."""
    if (resolved.size, resolved.size) != expected.size:
        height, width = expected.size
        yield f"{width}x{height} pixels instead of {resolved.size}x{resolved.size} (--data.size {height})"
    elif options.resize is not None and options.resize != expected.resize:
        yield f"a shorter side of {expected.resize} before the crop instead of {options.resize} (--data.resize)"
    for name in ("fit", "interpolation"):
        if getattr(resolved, name) != getattr(expected, name):
            yield f"{getattr(expected, name)} instead of {getattr(resolved, name)} (--data.{name})"
    wanted = average_channels((expected.mean, expected.std), resolved.channels)
    if _known_normalization(resolved) != wanted:
        mean, std = (",".join(f"{value:g}" for value in values) for values in wanted)
        yield f"another normalization (--data.mean {mean} --data.std {std})"


def _known_normalization(options: Any) -> Any:
    """Return mean and std, or None if they are those of the training images."""
    if options.normalize in ("auto", "data") and not (options.mean and options.std):
        return None
    return compute_normalization(options, options.build_inputs(), None)


def _describe(resolved: Any, expected: ImagePreprocessing) -> str:
    crop = "" if resolved.resize == resolved.size else f", resized to {resolved.resize} and center-cropped"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (resolved.mean, resolved.std))
    return (
        f"images as the weights {expected.name} expect them: {resolved.size}x{resolved.size} pixels{crop} "
        f"({resolved.interpolation}), mean {mean}, std {std}"
    )
