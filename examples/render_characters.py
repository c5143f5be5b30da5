"""Draw the characters that ship with tuneforge, and write the file that holds them.

    python examples/render_characters.py                          # writes character_images.safetensors
    python examples/render_characters.py --check SHIPPED_FILE     # exits with 1 unless the bytes are the same

They are rendered in the fonts of matplotlib (`characters/glyphs.py`) or made of the strokes of scikit-learn's digits
(`characters/strokes.py`). The same versions of the packages give the same bytes on one machine; the versions that drew
a file are in its metadata. Another CPU may round the filter of the strokes differently, and then a few strokes differ.

The file holds each array of images, uint8 of 0 to 16, compressed with zlib into a tensor of bytes; its shape is in the
metadata. Class and font family of an image follow from its place, except for the strokes, which have two tensors of
their own.
"""

import zlib
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
from characters.fonts import Font, find_fonts
from characters.glyphs import render
from characters.strokes import TRANSFORMS, recombine

from tuneforge.builtin.datasets.demo.digit_images import CHARACTERS, real_digits
from tuneforge.exporting import save_tensors

SEED = 2024  # The pretrained weights have seen seed 0.
DIGITS = CHARACTERS[:10]

AMBIGUOUS = {
    "O": "0",
    "o": "0",
    "D": "0",
    "Q": "0",
    "I": "1",
    "l": "1",
    "i": "1",
    "J": "3",
    "j": "3",
    "Z": "2",
    "z": "2",
    "S": "5",
    "s": "5",
    "G": "6",
    "b": "6",
    "T": "7",
    "B": "8",
    "g": "9",
    "q": "9",
}
"""Letters left out of `other`, and the digit each cannot be told from at 8x8.

Size and slant are normalized away, so case and baseline do not help. Measured, for D I O S Z B g i l o s z: a support
vector machine that learns all 11 classes (120 renderings a character, 5 folds) calls more than 6 % of them a digit, or
more than a quarter of them lie as near to a digit as nine in ten digits lie to their nearest. For J j a small
convolutional network failed on 3 of 12 each. By eye, for G Q T b q: handwriting has 0, 6 and 9 like that, and the stem
of T ends up under the left end of its bar, as that of a 7 does, when the slant is removed.
"""

SYMBOLS = "@#%*=<>~ΔΛΞΠΣΦΨαγηκλμπφψω∂∞≠±"
"""Symbols drawn as `other` besides the letters. Left out: ? ! / | + by the same measurement, $ and & by eye."""

OTHER_CHARACTERS = "".join(c for c in CHARACTERS if c not in DIGITS and c not in AMBIGUOUS) + SYMBOLS
"""All characters that are drawn as `other`."""


def rendered(characters: str, instances: int, fonts: list[Font], stream: str) -> np.ndarray:
    """Render each character `instances` times: `(characters, instances, 8, 8)`."""
    images, _ = render(np.repeat(list(characters), instances), fonts, seed=SEED, stream=stream)
    return images.reshape(len(characters), instances, 8, 8)


def glyphs(instances: int) -> tuple[np.ndarray, dict[str, int]]:
    """Each of the 62 characters equally often in each family: `(62, instances, families, 8, 8)`, and their styles."""
    families: dict[str, list[Font]] = {}
    for font in find_fonts():
        families.setdefault(font.family, []).append(font)
    images = [rendered(CHARACTERS, instances, fonts, f"glyphs/{family}") for family, fonts in families.items()]
    return np.stack(images, axis=2), {family: len(fonts) for family, fonts in families.items()}


def strokes(rounds: int, per_transform: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, float]]:
    """Characters made of strokes: at most `per_transform` different ones of each transform.

    Args:
        rounds: How often as many are made as the data source `digits` takes of them. The filter of each round knows
            its own images alone: it is stricter where a transform is rare.
        per_transform: The most that are kept of a transform.

    Returns:
        Images `(n, 8, 8)`, the digits they are made of `(n, 2)`, the index of each one's transform `(n,)`, and the
        share of each transform among all that the filter left.
    """
    images, labels = real_digits()
    rng = np.random.default_rng(SEED)
    made = [recombine(600, images=images, labels=labels, rng=rng) for _ in range(rounds)]
    drawn, parents, transforms = (
        np.concatenate([getattr(each, name) for each in made]) for name in ("images", "parents", "transforms")
    )
    _, first = np.unique(drawn.reshape(-1, 64), axis=0, return_index=True)
    chosen, shares = [], {}
    for name in sorted(TRANSFORMS):  # The order that JSON with sorted keys gives back.
        members = np.flatnonzero(transforms == name)
        shares[name] = round(len(members) / len(drawn), 4)
        chosen.append(members[np.isin(members, first)][:per_transform])
    indices = np.repeat(np.arange(len(chosen)), [len(members) for members in chosen])
    rows = np.concatenate(chosen)
    return drawn[rows], parents[rows].astype(np.int16), indices.astype(np.uint8), shares


def write(out: Path) -> None:
    """Draw everything and write the file."""
    families = find_fonts()
    images: dict[str, np.ndarray] = {}
    images["glyphs"], styles = glyphs(instances=81)
    images["digits"] = rendered(DIGITS, 100, families, "rendered")
    images["others"] = rendered(OTHER_CHARACTERS, 40, families, "letters")
    images["control"] = rendered(DIGITS, 50, find_fonts(held_out=True), "control")
    images["strokes"], sources, transforms, shares = strokes(rounds=10, per_transform=700)
    tensors = {
        name: torch.frombuffer(bytearray(zlib.compress(array.tobytes(), 9)), dtype=torch.uint8)
        for name, array in images.items()
    }
    tensors |= {"sources": torch.from_numpy(sources), "transforms": torch.from_numpy(transforms)}
    metadata = {
        "shapes": {name: array.shape for name, array in images.items()},
        "families": styles,
        "other_characters": OTHER_CHARACTERS,
        "transform_shares": shares,
        "versions": {name: version(name) for name in ("matplotlib", "numpy", "pillow", "scikit-learn")},
    }
    save_tensors(tensors, out, metadata=metadata)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("character_images.safetensors"), show_default=True)
@click.option("--check", type=click.Path(path_type=Path, exists=True), help="Compare with this file.")
def main(out: Path, check: Path | None) -> None:
    """Draw the characters, write the file, and compare its bytes with those of another."""
    write(out)
    click.echo(f"{out}: {out.stat().st_size:,} bytes")
    if check is not None:
        same = out.read_bytes() == check.read_bytes()
        click.echo(f"{check}: {'the same bytes' if same else 'other bytes'}")
        raise SystemExit(not same)


if __name__ == "__main__":
    main()
