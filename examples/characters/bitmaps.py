"""Ink on a grid: distance fields and skeletons of masks, and the 8x8 counts of UCI's optdigits.

Suffixes: n images, g glyphs, y x pixels.
"""

from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating]
Bools: TypeAlias = NDArray[np.bool_]
Integers: TypeAlias = NDArray[np.int64]
Images: TypeAlias = NDArray[np.uint8]

_AROUND = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # From the north, clockwise.


def block_counts(bitmaps_nyx: Bools) -> Images:
    """Count the ink of each 4x4 block: bitmaps `(n, 32, 32)` to images `(n, 8, 8)` of 0 to 16."""
    counts: Images = bitmaps_nyx.reshape(-1, 8, 4, 8, 4).sum(axis=(2, 4), dtype=np.uint8)
    return counts


def deepest(fields_nyx: Floats, ink_n: Floats | NDArray[np.integer]) -> Bools:
    """Mark the `ink_n` pixels, rounded, with the greatest values of each field `(n, y, x)`; of equals, the upper."""
    flat = fields_nyx.reshape(len(fields_nyx), fields_nyx.shape[1] * fields_nyx.shape[2])
    ink = np.clip(np.rint(ink_n), 1, flat.shape[1]).astype(np.int64)[:, None]
    threshold = np.take_along_axis(np.sort(flat, axis=1), flat.shape[1] - ink, axis=1)
    above, equal = flat > threshold, flat == threshold
    fitting = np.cumsum(equal, axis=1, dtype=np.int32) <= ink - above.sum(axis=1, keepdims=True)
    marked: Bools = above | (equal & fitting)
    return marked.reshape(fields_nyx.shape)


def bounds(masks_nyx: Bools) -> tuple[Floats, Floats, Floats, Floats]:
    """Edges of the ink of each mask, in pixels: top, bottom, left, right, each `(n,)`."""
    rows, columns = np.asarray(masks_nyx.any(axis=2)), np.asarray(masks_nyx.any(axis=1))
    ends = (
        rows.argmax(1),
        rows.shape[1] - rows[:, ::-1].argmax(1),
        columns.argmax(1),
        columns.shape[1] - columns[:, ::-1].argmax(1),
    )
    top, bottom, left, right = (end.astype(np.float32) for end in ends)
    return top, bottom, left, right


def distances(masks_gyx: Bools) -> Floats:
    """Distance of each pixel to the nearest one in its mask, in pixels; large where a mask is empty.

    Exact: along the rows first, then over the columns, as in P. Felzenszwalb and D. Huttenlocher, Distance
    transforms of sampled functions, 2012.
    """
    size = masks_gyx.shape[-1]
    places, far = np.arange(size, dtype=np.float32), np.float32(4 * size)
    before = np.maximum.accumulate(np.where(masks_gyx, places, -far), axis=-1)
    after = np.minimum.accumulate(np.where(masks_gyx, places, far)[..., ::-1], axis=-1)[..., ::-1]
    along = np.minimum(places - before, after - places) ** 2
    nearest = np.full_like(along, np.inf)
    for row in range(masks_gyx.shape[-2]):
        down = (np.arange(masks_gyx.shape[-2], dtype=np.float32) - row) ** 2
        np.minimum(nearest, along[:, row : row + 1] + down[:, None], out=nearest)
    roots: Floats = np.sqrt(nearest)
    return roots


def thin(masks_gyx: Bools) -> Bools:
    """Skeleton of each mask (T. Zhang, C. Suen, A fast parallel algorithm for thinning digital patterns, 1984)."""
    removable = _thinning_tables()
    weights = (1 << np.arange(8)).astype(np.uint8)
    masks = masks_gyx.copy()
    changed = True
    while changed:
        changed = False
        for table in removable:
            padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
            code = np.zeros(masks.shape, np.uint8)
            for weight, (down, right) in zip(weights, _AROUND, strict=True):
                code += weight * padded[:, 1 + down : 1 + down + masks.shape[1], 1 + right : 1 + right + masks.shape[2]]
            gone = masks & table[code]
            masks &= ~gone
            changed |= bool(gone.any())
    return masks


@lru_cache(maxsize=1)
def _thinning_tables() -> tuple[Bools, Bools]:
    """For each of the two half steps, whether a pixel with these eight neighbours (as bits) may go."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    north, east, south, west = (bits[:, i] for i in (0, 2, 4, 6))
    crossings = ((bits == 0) & (np.roll(bits, -1, axis=1) == 1)).sum(axis=1)
    edge = (bits.sum(axis=1) >= 2) & (bits.sum(axis=1) <= 6) & (crossings == 1)
    first = edge & (north * east * south == 0) & (east * south * west == 0)
    second = edge & (north * east * west == 0) & (north * south * west == 0)
    return first, second
