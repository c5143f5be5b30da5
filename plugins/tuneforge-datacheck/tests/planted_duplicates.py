"""Images with planted near-duplicates: patches of photographs, noise like that of photographs, scenes of shapes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib.cbook
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_sample_images

CHANGES = ("crop", "scale", "brightness", "recompression")
_PATCH = 72
_MIN_STD = 8.0  # standard deviation of the gray values of images that get a near-duplicate


def plant(
    root: Path, *, count: int, pairs: int, exact: int, seed: int
) -> tuple[set[frozenset[str]], set[frozenset[str]]]:
    """Write images into `train` and `test` of two classes; each planted pair has one image in either split.

    Returns:
        The pairs of near-duplicates and those of exact duplicates, by name relative to the root.
    """
    rng = np.random.default_rng(seed)
    images = _generate_images(rng)
    for split in ("train", "test"):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
    near_pairs, exact_pairs = set(), set()
    for number in range(count - pairs - exact):
        image, label = next(images), "ab"[number % 2]
        is_planted = number < pairs + exact
        split = "train" if is_planted or rng.random() < 0.75 else "test"
        name = f"{split}/{label}/{number:05d}.png"
        if is_planted:
            while not _has_contrast(image):
                image = next(images)
            other = f"test/{label}/{number:05d}-duplicate.png"
            if number < pairs:
                _make_near_duplicate(rng, image, _choose_changes(rng, number)).save(root / other)
                near_pairs.add(frozenset((name, other)))
            else:
                image.save(root / other)
                exact_pairs.add(frozenset((name, other)))
        image.save(root / name)
    return near_pairs, exact_pairs


def _choose_changes(rng: np.random.Generator, number: int) -> list[str]:
    """Return one change for every other pair, in turn, and two for the others."""
    return [CHANGES[number // 2 % 4]] if number % 2 else [str(each) for each in rng.permutation(CHANGES)[:2]]


def _generate_images(rng: np.random.Generator) -> Iterator[Image.Image]:
    patches = _photograph_patches(rng)
    while True:
        size = int(rng.integers(96, 200))
        kind = rng.integers(3)
        if kind == 0 and patches:
            yield patches.pop()
            continue
        colors = rng.integers(0, 255, (9, 3)).tolist()
        image = _noise(rng, size) if kind < 2 else Image.new("RGB", (size, size), tuple(colors[0]))
        draw = ImageDraw.Draw(image)
        for color in colors[1 : rng.integers(3, 8)]:
            (x, y), (width, height) = rng.uniform(-0.1, 0.9, 2) * size, rng.uniform(0.1, 0.5, 2) * size
            shape = (draw.ellipse, draw.rectangle)[rng.integers(2)]
            shape((x, y, x + width, y + height), fill=tuple(color))
        yield image


def _photograph_patches(rng: np.random.Generator) -> list[Image.Image]:
    """Return adjacent patches of three photographs in random order; some show only sky."""
    photos = [Image.fromarray(each) for each in load_sample_images().images]
    photos.append(Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))
    patches = [
        photo.crop((x, y, x + _PATCH, y + _PATCH))
        for photo in photos
        for y in range(0, photo.height - _PATCH + 1, _PATCH)
        for x in range(0, photo.width - _PATCH + 1, _PATCH)
    ]
    return [patches[index] for index in rng.permutation(len(patches))]


def _noise(rng: np.random.Generator, size: int) -> Image.Image:
    """Return noise whose power spectrum falls with frequency as that of photographs."""
    frequencies = np.fft.fftfreq(size)
    radius = np.hypot(frequencies[:, None], frequencies[None])
    radius[0, 0] = 1
    shared, power = rng.normal(size=(size, size)), rng.uniform(0.8, 1.6)
    channels = []
    for _ in range(3):
        waves = np.fft.fft2(0.7 * shared + 0.5 * rng.normal(size=(size, size)))
        values = np.fft.ifft2(waves / radius**power).real
        channels.append((values - values.min()) / np.ptp(values) * 255)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _has_contrast(image: Image.Image) -> bool:
    return np.asarray(image.convert("L").resize((48, 48), Image.Resampling.BOX)).std() >= _MIN_STD


def _make_near_duplicate(rng: np.random.Generator, image: Image.Image, changes: list[str]) -> Image.Image:
    while True:
        result = image
        for change in changes:
            result = _apply_change(rng, result, change)
        if _has_contrast(result):
            return result


def _apply_change(rng: np.random.Generator, image: Image.Image, change: str) -> Image.Image:
    if change == "crop":  # to 80 to 97 % of each side
        width, height = (int(side * rng.uniform(0.8, 0.97)) for side in image.size)
        x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        return image.crop((x, y, x + width, y + height))
    if change == "scale":
        factor = rng.uniform(*((0.5, 0.9), (1.1, 1.7))[rng.integers(2)])
        size = (max(32, int(image.width * factor)), max(32, int(image.height * factor)))
        return image.resize(size, Image.Resampling.BICUBIC)
    if change == "brightness":
        brighter = ImageEnhance.Brightness(image).enhance(rng.uniform(0.65, 1.4))
        return ImageEnhance.Contrast(brighter).enhance(rng.uniform(0.7, 1.3))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(20, 60)))
    return Image.open(file).convert("RGB")
