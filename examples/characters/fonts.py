"""Fonts: which there are, in what families, and the distance fields of their characters.

Suffixes: g glyphs, y x pixels.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from characters.bitmaps import Bools, distances, thin
from tuneforge.builtin.datasets.demo.digit_images import CHARACTERS

HELD_OUT_FAMILY = "STIX"
"""Never rendered unless asked for by name: the control digits are of this family (and of its fork, XITS)."""

_HELD_OUT_NAMES = ("stix", "xits")
_COMPUTER_MODERN = {
    "cmr10": ("Computer Modern Roman", "Regular"),
    "cmb10": ("Computer Modern Roman", "Bold"),
    "cmti10": ("Computer Modern Roman", "Italic"),
    "cmss10": ("Computer Modern Sans", "Regular"),
    "cmtt10": ("Computer Modern Typewriter", "Regular"),
}
# Have codes for letters, but draw symbols, old-style figures or boxes there.
_SYMBOL_FONTS = ("cmex10", "cmmi10", "cmsy10", "LastResort")
# TeX's encodings put other signs on the codes of these.
_NOT_IN_COMPUTER_MODERN = frozenset('"<>\\^_`{|}~')

CANVAS = 64
"""Side of a distance field, in pixels."""

GLYPH_HEIGHT = 52
"""Height of the character in the middle of its field, in pixels."""

NARROW_ASPECT = 0.45
"""Characters are scaled to one shape, but those narrower than this (1, l, !) in proportion: width to height."""

_BOX_ASPECT = 20 / 32  # The shape that NIST scales a character to.
_SUBPIXELS = 8  # A field is stored as int8 in eighths of a pixel.
_RASTER_SIZE = 120  # Font size of the rasterising, in pixels.


@attrs.frozen
class Font:
    """One font file.

    Args:
        path: The file, TrueType or OpenType.
        family: Name of the family, the same for all its styles.
        style: Such as `Regular` or `Bold Italic`.
        codepoints: The characters it can draw.
    """

    path: Path
    family: str
    style: str
    codepoints: frozenset[int] = attrs.field(repr=False)

    def has(self, character: str) -> bool:
        """Whether the font can draw the character."""
        return ord(character) in self.codepoints


def find_fonts(folders: Sequence[Path] = (), *, held_out: bool = False) -> tuple[Font, ...]:
    """List the fonts that ship in matplotlib and those in further folders, by family, style and file name.

    Fonts that lack one of the 62 characters and fonts of symbols are left out.

    Args:
        folders: Searched with their subfolders for `.ttf` and `.otf` files.
        held_out: True gives the held-out family alone, false everything but it.

    Raises:
        FileNotFoundError: A folder does not exist.
    """
    import matplotlib

    found: dict[tuple[str, str, str], Font] = {}
    for folder in (Path(matplotlib.get_data_path()) / "fonts" / "ttf", *folders):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the font folder {str(folder)!r} does not exist; name a folder of .ttf or .otf files"
            )
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".ttf", ".otf"}):
            font = _read_font(path)
            if font is not None and _is_held_out(font.family) == held_out:
                found.setdefault((font.family, font.style, path.name), font)
    return tuple(found[key] for key in sorted(found))


def _is_held_out(family: str) -> bool:
    return family.lower().startswith(_HELD_OUT_NAMES)


def _read_font(path: Path) -> Font | None:
    """The font in a file, None if it is one of symbols."""
    from matplotlib.ft2font import FT2Font

    if path.stem.startswith(_SYMBOL_FONTS):
        return None
    file = FT2Font(str(path))
    family, style = _COMPUTER_MODERN.get(path.stem, (file.family_name, file.style_name))
    codepoints = frozenset(file.get_charmap())
    if path.stem in _COMPUTER_MODERN:
        codepoints = frozenset(c for c in codepoints if 32 < c < 127 and chr(c) not in _NOT_IN_COMPUTER_MODERN)
    if not codepoints.issuperset(map(ord, CHARACTERS)):
        return None
    return Font(path=path, family=family, style=style, codepoints=codepoints)


@lru_cache(maxsize=512)
def font_fields(path: Path, characters: str) -> NDArray[np.int8]:
    """Distance fields of characters, as int8 in an unnamed unit of length.

    Args:
        path: The font file.
        characters: All of which the font has.

    Returns:
        `(characters, 2, y, x)`: the depth within the outline, and minus the distance to the skeleton.

    Raises:
        ValueError: The font draws nothing for a character.
    """
    font = ImageFont.truetype(str(path), _RASTER_SIZE)
    masks = np.stack([_rasterise(font, c) for c in characters]) if characters else np.zeros((0, CANVAS, CANVAS), bool)
    outline = distances(masks) - distances(~masks)
    skeleton = -distances(thin(masks))
    fields = np.stack([-outline, skeleton], axis=1) * _SUBPIXELS
    stored: NDArray[np.int8] = np.clip(np.rint(fields), -127, 127).astype(np.int8)
    return stored


def _rasterise(font: ImageFont.FreeTypeFont, character: str) -> Bools:
    """The character as a mask `(64, 64)`: of fixed height, in NIST's box unless it is narrow."""
    mask = font.getmask(character, mode="L")
    ink = np.array(mask, dtype=np.uint8).reshape(mask.size[1], mask.size[0])
    solid = ink > 127
    if not solid.any():
        raise ValueError(f"{font.path!r} draws nothing for {character!r}; take the font out of the folder")
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    crop = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    aspect = crop.shape[1] / crop.shape[0]
    width = GLYPH_HEIGHT * _BOX_ASPECT * min(1.0, aspect / NARROW_ASPECT)
    size = (max(2, round(width)), GLYPH_HEIGHT)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(
        Image.fromarray(crop).resize(size, Image.Resampling.BOX), ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2)
    )
    return np.asarray(canvas) > 127
