"""Pictures with planted near copies: patches of photographs, noise like that of photographs, and scenes of shapes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib.cbook
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_sample_images

KINDS = ("crop", "scale", "light", "recompression")
_PATCH = 72
_VISIBLE = 8.0  # standard deviation of grey values; a copy is planted of what shows something


def plant(
    root: Path, *, count: int, pairs: int, exact: int, seed: int
) -> tuple[set[frozenset[str]], set[frozenset[str]]]:
    """Write pictures into `train` and `test` of two classes; each planted pair lies across the two.

    Returns:
        The pairs of near copies and those of exact ones, by names from the root.
    """
    rng = np.random.default_rng(seed)
    pictures = _scenes(rng)
    for split in ("train", "test"):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
    near, same = set(), set()
    for number in range(count - pairs - exact):
        image, label = next(pictures), "ab"[number % 2]
        planting = number < pairs + exact
        split = "train" if planting or rng.random() < 0.75 else "test"
        name = f"{split}/{label}/{number:05d}.png"
        if planting:
            while not _shows_something(image):
                image = next(pictures)
            other = f"test/{label}/{number:05d}-copy.png"
            if number < pairs:
                _copy(rng, image, _kinds(rng, number)).save(root / other)
                near.add(frozenset((name, other)))
            else:
                image.save(root / other)
                same.add(frozenset((name, other)))
        image.save(root / name)
    return near, same


def _kinds(rng: np.random.Generator, number: int) -> list[str]:
    """One change for every other pair, in turn, and two for the rest."""
    return [KINDS[number // 2 % 4]] if number % 2 else [str(each) for each in rng.permutation(KINDS)[:2]]


def _scenes(rng: np.random.Generator) -> Iterator[Image.Image]:
    patches = _photographs(rng)
    while True:
        size = int(rng.integers(96, 200))
        kind = rng.integers(3)
        if kind == 0 and patches:
            yield patches.pop()
            continue
        colours = rng.integers(0, 255, (9, 3)).tolist()
        image = _noise(rng, size) if kind < 2 else Image.new("RGB", (size, size), tuple(colours[0]))
        draw = ImageDraw.Draw(image)
        for colour in colours[1 : rng.integers(3, 8)]:
            (x, y), (width, height) = rng.uniform(-0.1, 0.9, 2) * size, rng.uniform(0.1, 0.5, 2) * size
            shape = (draw.ellipse, draw.rectangle)[rng.integers(2)]
            shape((x, y, x + width, y + height), fill=tuple(colour))
        yield image


def _photographs(rng: np.random.Generator) -> list[Image.Image]:
    """Patches of three photographs, next to one another, in random order; skies among them."""
    photos = [Image.fromarray(each) for each in load_sample_images().images]
    photos.append(Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))
    patches = [
        photo.crop((x, y, x + _PATCH, y + _PATCH))
        for photo in photos
        for y in range(0, photo.height - _PATCH + 1, _PATCH)
        for x in range(0, photo.width - _PATCH + 1, _PATCH)
    ]
    return [patches[place] for place in rng.permutation(len(patches))]


def _noise(rng: np.random.Generator, size: int) -> Image.Image:
    """Noise whose power falls with frequency as in photographs."""
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


def _shows_something(image: Image.Image) -> bool:
    return np.asarray(image.convert("L").resize((48, 48), Image.Resampling.BOX)).std() >= _VISIBLE


def _copy(rng: np.random.Generator, image: Image.Image, kinds: list[str]) -> Image.Image:
    while True:
        made = image
        for kind in kinds:
            made = _changed(rng, made, kind)
        if _shows_something(made):
            return made


def _changed(rng: np.random.Generator, image: Image.Image, kind: str) -> Image.Image:
    if kind == "crop":  # each side keeps 80 to 97 %
        width, height = (int(side * rng.uniform(0.8, 0.97)) for side in image.size)
        x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        return image.crop((x, y, x + width, y + height))
    if kind == "scale":
        factor = rng.uniform(*((0.5, 0.9), (1.1, 1.7))[rng.integers(2)])
        size = (max(32, int(image.width * factor)), max(32, int(image.height * factor)))
        return image.resize(size, Image.Resampling.BICUBIC)
    if kind == "light":
        brighter = ImageEnhance.Brightness(image).enhance(rng.uniform(0.65, 1.4))
        return ImageEnhance.Contrast(brighter).enhance(rng.uniform(0.7, 1.3))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(20, 60)))
    return Image.open(file).convert("RGB")
