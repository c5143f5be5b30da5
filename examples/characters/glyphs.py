"""Rendered characters as 8x8 counts of ink: what the handwritten digits of UCI would look like in print.

The way of an image, the same for each, in batches:

1. The character is rasterised once per font, in a box of fixed height, and kept as two distance fields, to its
   outline and to its skeleton.
2. A blend of the two is looked up through a random warp: slant, rotation, width, elastic.
3. The pixels deepest in the blend become ink, as many as a real digit has: thin and bold by one threshold.
4. The character is size-normalised into a 32x32 bitmap and the ink of each 4x4 block counted, 0 to 16.

Step 4 is what the data set documents (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits,
UCI, 1998); its bitmaps come from NIST's form-based handprint programs, which scale a character to 20x32 pixels
and even out the width of its strokes, so that every digit has about the same ink. Step 3 stands for that.

Suffixes: n images, g glyphs, y x pixels, k l waves of the elastic warp.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from characters.bitmaps import Bools, Floats, Images, Integers, block_counts, bounds, deepest
from characters.fonts import (
    CANVAS,
    GLYPH_HEIGHT,
    NARROW_ASPECT,
    Font,
    find_fonts,
    font_fields,
)
from tuneforge.builtin.datasets.demo.digit_images import CHARACTERS

_BITMAP = 32  # Side of the bitmap whose ink is counted.
_BATCH = 1024  # Images of one generator; part of what a seed means.
_WAVES = 3
_REACH = np.float32(CANVAS / GLYPH_HEIGHT)  # A field reaches from minus to plus this, in half heights.
_PIXEL = 2 * _REACH / _BITMAP
_END_ROWS = 2


@attrs.frozen
class Variation:
    """How far rendered characters stray from their font; the defaults are matched to the real digits.

    Lengths are in half heights of the character unless said otherwise, spreads are standard deviations.

    Args:
        ink_mean: Ink of an image, in pixels of the 32x32 bitmap.
        ink_spread: Its spread, the same unit.
        width_mean: Width of the character's box, in pixels of the bitmap.
        width_spread: Its spread, the same unit.
        shift_spread: Of the middle of the box, sideways, the same unit.
        slant_spread: Sideways shift for each unit of height.
        rotation_spread: In radians.
        elastic_spread: Of the longest wave of the elastic warp; shorter ones have less.
        pen: Least and greatest share of the skeleton in the blend: 0 keeps the strokes of the font, 1 draws all
            with one pen.
    """

    ink_mean: float = 312.6
    ink_spread: float = 34.5
    width_mean: float = 20.3
    width_spread: float = 1.8
    shift_spread: float = 0.7
    slant_spread: float = 0.2
    rotation_spread: float = 0.08
    elastic_spread: float = 0.08
    pen: tuple[float, float] = (0.4, 1.0)


@attrs.frozen(eq=False)
class GlyphSet:
    """Rendered characters and what they are.

    Args:
        images: `(n, 8, 8)`, 0 to 16.
        labels: `(n,)`, places in `class_names`.
        class_names: The characters.
        families: `(n,)`, family of the font of each image.
    """

    images: Images
    labels: Integers
    class_names: tuple[str, ...]
    families: NDArray[np.str_]


def glyph_images(
    count: int,
    *,
    seed: int,
    characters: str = CHARACTERS,
    folders: Sequence[Path] = (),
    variation: Variation | None = None,
) -> GlyphSet:
    """Render `count` characters, each class as often as any other (give or take one).

    The first images of a longer set are those of a shorter one. The held-out family is not among the fonts.

    Args:
        count: Number of images.
        seed: Gives the fonts and variations; another seed, other images.
        characters: The classes, in order.
        folders: Font folders besides matplotlib's.
        variation: How far images stray from the fonts; None is matched to the real digits.
    """
    labels = np.arange(count, dtype=np.int64) % len(characters)
    drawn = np.array(list(characters), dtype=np.str_)[labels]
    images, families = render(drawn, find_fonts(folders), seed=seed, stream="glyphs", variation=variation)
    return GlyphSet(images=images, labels=labels, class_names=tuple(characters), families=families)


def render(
    characters: NDArray[np.str_],
    fonts: Sequence[Font],
    *,
    seed: int,
    stream: str,
    variation: Variation | None = None,
) -> tuple[Images, NDArray[np.str_]]:
    """Draw each character in a random font, families as likely as one another, with random variation.

    Args:
        characters: `(n,)`, one character each.
        fonts: To draw from; a character is drawn in those that have it.
        seed: With `stream` the only source of randomness.
        stream: What the images are for; two streams of one seed are independent.
        variation: None is matched to the real digits.

    Returns:
        The images `(n, 8, 8)`, 0 to 16, and the family `(n,)` of each one's font.

    Raises:
        ValueError: No font has one of the characters.
    """
    atlas = _Atlas.of(fonts, "".join(sorted(set(characters.tolist()))))
    images, families = [], []
    for batch, start in enumerate(range(0, len(characters), _BATCH)):
        rng = np.random.default_rng([seed, zlib.crc32(stream.encode()), batch])
        glyphs_n = atlas.choose(characters[start : start + _BATCH], rng.random(_BATCH))
        warp = _Warp.draw(rng, variation or Variation())[: len(glyphs_n)]
        images.append(block_counts(_bitmaps(atlas.blended(glyphs_n, warp.pen), warp)))
        families.append(atlas.families[glyphs_n])
    if not images:
        return np.zeros((0, 8, 8), np.uint8), np.zeros(0, np.str_)
    return np.concatenate(images), np.concatenate(families)


# -- distance fields -----------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Atlas:
    """The distance fields of every glyph that may be drawn, and how to choose among them."""

    fields_g2yx: NDArray[np.int8]
    characters: NDArray[np.str_]  # (g,), sorted.
    families: NDArray[np.str_]  # (g,)
    chances: NDArray[np.float64]  # (g,): sum to 1 for each character.

    @classmethod
    def of(cls, fonts: Sequence[Font], characters: str) -> "_Atlas":
        """Gather the glyphs of these characters from the fonts that have them."""
        entries = [
            (c, font.family, i, place)
            for i, font in enumerate(fonts)
            for place, c in enumerate(_drawn(font, characters))
        ]
        missing = set(characters) - {entry[0] for entry in entries}
        if missing:
            raise ValueError(f"no font has {''.join(sorted(missing))!r}; leave them out or add a font folder")
        entries.sort()
        by_font = [font_fields(font.path, _drawn(font, characters)) for font in fonts]
        fields = [by_font[i][place] for _, _, i, place in entries]
        letters, families = [entry[0] for entry in entries], [entry[1] for entry in entries]
        return cls(
            fields_g2yx=np.stack(fields) if fields else np.zeros((0, 2, CANVAS, CANVAS), np.int8),
            characters=np.array(letters, np.str_),
            families=np.array(families, np.str_),
            chances=_even_chances(letters, families),
        )

    def choose(self, characters: NDArray[np.str_], draws: NDArray[np.float64]) -> Integers:
        """The glyph `(n,)` for each character, by a number from 0 to 1 each; draws beyond the characters are unused."""
        first = np.searchsorted(self.characters, characters)
        ends = np.cumsum(self.chances)
        target = ends[first] - self.chances[first] + draws[: len(characters)]
        last = np.searchsorted(self.characters, characters, side="right") - 1
        return np.minimum(np.searchsorted(ends, target, side="right"), last)

    def blended(self, glyphs_n: Integers, pen: Floats) -> Floats:
        """The fields `(n, y, x)` of glyphs, from that of the outline (pen 0) to that of the skeleton (pen 1)."""
        outline, skeleton = (self.fields_g2yx[glyphs_n, part].astype(np.float32) for part in (0, 1))
        fields: Floats = outline + pen[:, None, None] * (skeleton - outline)
        return fields


def _drawn(font: Font, characters: str) -> str:
    return "".join(c for c in characters if font.has(c))


def _even_chances(letters: Sequence[str], families: Sequence[str]) -> NDArray[np.float64]:
    """Chance of each glyph for its letter: families alike, and styles alike within a family."""
    pairs = list(zip(letters, families, strict=True))
    styles = {pair: pairs.count(pair) for pair in set(pairs)}
    num_families = {letter: sum(pair[0] == letter for pair in styles) for letter in set(letters)}
    return np.array([1 / (styles[pair] * num_families[pair[0]]) for pair in pairs])


# -- warp and bitmap -----------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Warp:
    """Random variation of a batch, from the place in an image to the place in the field, in half heights."""

    ink: Floats  # (n,)
    width: Floats  # (n,)
    middle: Floats  # (n,)
    pen: Floats  # (n,)
    matrix: Floats  # (n, 2, 2), rows x and y.
    waves: Floats  # (n, 2, k, l)

    @classmethod
    def draw(cls, rng: np.random.Generator, variation: Variation) -> "_Warp":
        """Draw the variation of a whole batch, so that the first images do not depend on how many follow."""
        normal = rng.standard_normal((5, _BATCH), dtype=np.float32).clip(-2.5, 2.5)
        fade = 1 / (1 + np.add.outer(np.arange(_WAVES), np.arange(_WAVES)))
        waves = rng.standard_normal((_BATCH, 2, _WAVES, _WAVES), dtype=np.float32) * fade * variation.elastic_spread
        turn, slant = normal[3] * variation.rotation_spread, normal[4] * variation.slant_spread
        matrix = np.stack([np.cos(turn), slant + np.sin(turn), -np.sin(turn), np.cos(turn)], axis=1)
        low, high = variation.pen
        return cls(
            ink=variation.ink_mean + variation.ink_spread * normal[0],
            width=variation.width_mean + variation.width_spread * normal[1],
            middle=_BITMAP / 2 + variation.shift_spread * normal[2],
            pen=low + (high - low) * rng.random(_BATCH, dtype=np.float32),
            matrix=matrix.reshape(-1, 2, 2).astype(np.float32),
            waves=waves.astype(np.float32),
        )

    def __getitem__(self, part: slice) -> "_Warp":
        return _Warp(**{name: value[part] for name, value in attrs.asdict(self).items()})

    def sheared(self, slant: Floats) -> "_Warp":
        """The same warp for characters moved sideways by `slant` `(n,)` for each unit of height."""
        matrix = self.matrix.copy()
        matrix[:, :, 1] += slant[:, None] * matrix[:, :, 0]
        return attrs.evolve(self, matrix=matrix)

    def places(self, y_ny: Floats, x_nx: Floats) -> tuple[Floats, Floats]:
        """Where in the field to look for each pixel `(n, y, x)`, given the rows' and the columns' own places."""
        wave_nyk, wave_nxl = _cosines(y_ny), _cosines(x_nx)
        bend = wave_nyk[:, None] @ self.waves @ wave_nxl[:, None].swapaxes(2, 3)
        y, x = y_ny[:, :, None], x_nx[:, None, :]
        a = self.matrix[:, :, :, None, None]
        return a[:, 1, 0] * x + a[:, 1, 1] * y + bend[:, 1], a[:, 0, 0] * x + a[:, 0, 1] * y + bend[:, 0]


def _cosines(places: Floats) -> Floats:
    """The waves `(n, places, k)` of the elastic warp: half, one, one and a half periods over the character."""
    turns = places[:, :, None] * np.arange(1, _WAVES + 1, dtype=np.float32) / 2 + np.float32(0.25)
    waves: Floats = np.cos(np.float32(np.pi) * turns)
    return waves


def _bitmaps(fields_nyx: Floats, warp: _Warp) -> Bools:
    """Draw the glyphs into their boxes `(n, 32, 32)`, after two looks: at the slant, and at the size without it."""
    slanted = _first_look(fields_nyx, warp)
    warp = warp.sheared(_slant(slanted))
    upright = _first_look(fields_nyx, warp)
    top, bottom, left, right = (edge * _PIXEL - _REACH for edge in bounds(upright))
    narrow = np.minimum(1, _aspect(upright) / NARROW_ASPECT)
    width = warp.width * narrow * np.clip(_aspect(upright) / _aspect(slanted), 0.85, 1.2)
    y_ny = (top + bottom)[:, None] / 2 + _middles(_BITMAP) * (bottom - top)[:, None] / 2
    pixels = np.arange(_BITMAP, dtype=np.float32) + np.float32(0.5)
    x_nx = (left + right)[:, None] / 2 + (pixels - warp.middle[:, None]) * ((right - left) / width)[:, None]
    return deepest(_look_up(fields_nyx, warp, y_ny, x_nx), warp.ink)


def _first_look(fields_nyx: Floats, warp: _Warp) -> Bools:
    """The warped glyphs where they lie in their fields."""
    even = np.broadcast_to(_middles(_BITMAP) * _REACH, (len(fields_nyx), _BITMAP))
    return deepest(_look_up(fields_nyx, warp, even, even), warp.ink / _REACH**2)


def _aspect(masks_nyx: Bools) -> Floats:
    top, bottom, left, right = bounds(masks_nyx)
    return (right - left) / (bottom - top)


def _slant(masks_nyx: Bools) -> Floats:
    """Sideways shift for each row down that brings the left ends of the top and the bottom under one another.

    This is how NIST takes the slant away: a 7 ends up with its foot under the left end of its bar.
    """
    rows = np.arange(masks_nyx.shape[1], dtype=np.float32)
    top, bottom, _, _ = bounds(masks_nyx)
    ends = []
    for near in (rows < top[:, None] + _END_ROWS, rows >= bottom[:, None] - _END_ROWS):
        ends.append((masks_nyx & near[:, :, None]).any(axis=1).argmax(axis=1))
    slant: Floats = (ends[1] - ends[0]) / np.maximum(bottom - top - _END_ROWS, 1)
    return slant.astype(np.float32)


def _middles(count: int) -> Floats:
    """Middles of `count` pixels that cover -1 to 1."""
    return ((np.arange(count, dtype=np.float32) + 0.5) * 2 / count - 1).astype(np.float32)


def _look_up(fields_nyx: Floats, warp: _Warp, y_ny: Floats, x_nx: Floats) -> Floats:
    """The fields `(n, y, x)` seen through the warp, between pixels by bilinear interpolation."""
    half, middle = np.float32(GLYPH_HEIGHT / 2), np.float32((CANVAS - 1) / 2)
    y, x = ((place * half + middle).clip(0, CANVAS - 1.001) for place in warp.places(y_ny, x_nx))
    row, column = y.astype(np.int32), x.astype(np.int32)
    down, along = y - row, x - column
    corner = np.arange(len(fields_nyx), dtype=np.int32)[:, None, None] * CANVAS**2 + row * CANVAS + column
    flat = fields_nyx.reshape(-1)
    above = flat[corner] * (1 - along) + flat[corner + 1] * along
    below = flat[corner + CANVAS] * (1 - along) + flat[corner + CANVAS + 1] * along
    values: Floats = above * (1 - down) + below * down
    return values
