"""Near copies of pictures: the same picture at another size, light, crop or compression.

Each picture is described by the low frequencies of its grey values, once whole and once for each of a grid of crops.
Two pictures are compared as whole against crop, both ways; the best crop of a likely pair is then fitted finely, and
the pair is a copy where the whole and the crop correlate. Brightness and contrast drop out of a correlation.

Shapes: n pictures, f frequencies, p pairs, y and x pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Edges = NDArray[np.int64]
"""Left, top, right and bottom of a crop of each pair, in hundredths of the whole (p, 4)."""

Box = tuple[int, int, int, int]
"""The same of one crop."""

LIKELY = 0.86
"""Least correlation of low frequencies at which a pair is looked at closely."""

SAME = 0.95
"""Least correlation of all pixels, once fitted, at which a pair is a copy: of grey values, and of colours."""

SAME_DETAIL = 0.6
"""Least correlation of what is left of the pixels without their surroundings: two skies are alike but for it."""

FLATTEST = 8.0
"""Standard deviation of grey values under which a picture shows too little to be told from another."""

_WHOLE = 100  # parts of a side, in which crops are measured
_SIZES = (94, 88, 82, 76)
_FREQUENCIES = 8
_SIDE = 24  # pixels at which pairs are fitted
_BLOCK = 512
_STEPS = (4, 2, 1)
_LEAST = 70  # of these that a crop keeps
_MOST_LIKELY = 20  # pairs for each picture that are looked at closely


@attrs.frozen
class Copy:
    """Two pictures that are the same, or nearly so.

    Args:
        first: Place of the one.
        second: Place of the other, later one.
        likeness: Correlation of their grey values, once fitted.
        exact: They are the same file, to the byte.
    """

    first: int
    second: int
    likeness: float
    exact: bool = False


@attrs.frozen
class _Likely:
    """A picture and another one's crop that are alike by their low frequencies."""

    likeness: float
    whole: int
    crop: int
    box: Box


def near_copies(grey_nyx: NDArray[np.uint8], colour_nyxc: NDArray[np.uint8]) -> list[Copy]:
    """All pairs of pictures that are copies of one another, in order.

    Every picture is compared with every other, so time grows with the square of their number. Pictures that are almost
    of one grey are left out; of a picture that many are like, the likeliest pairs are looked at.

    Args:
        grey_nyx: The pictures in small, square (n, y, x).
        colour_nyxc: The same in colours, of any size (n, y, x, 3).
    """
    rows = np.flatnonzero(grey_nyx.reshape(len(grey_nyx), -1).std(axis=1) >= FLATTEST)
    if len(rows) < 2:
        return []
    pictures_nyx = grey_nyx[rows].astype(np.float32)
    colours_ncyx = colour_nyxc[rows].astype(np.float32).transpose(0, 3, 1, 2)
    likely = _likely_pairs(pictures_nyx)
    copies = []
    for start in range(0, len(likely), _BLOCK):
        block = likely[start : start + _BLOCK]
        for pair, likeness in zip(block, _confirmed(block, pictures_nyx, colours_ncyx), strict=True):
            if likeness >= SAME:
                first, second = sorted((int(rows[pair.whole]), int(rows[pair.crop])))
                copies.append(Copy(first, second, round(likeness, 4)))
    return sorted(copies, key=lambda copy: (copy.first, copy.second))


def sets_of(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """What pairs join together, as ascending lists of two or more."""
    parent: dict[int, int] = {}

    def root(place: int) -> int:
        while (above := parent.setdefault(place, place)) != place:
            parent[place] = place = parent[above]
        return place

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    joined: dict[int, list[int]] = {}
    for place in sorted(parent):
        joined.setdefault(root(place), []).append(place)
    return list(joined.values())


def _boxes() -> Iterator[Box]:
    """The whole, then crops of it at several sizes and places."""
    yield (0, 0, _WHOLE, _WHOLE)
    for size in _SIZES:
        places = (0, (_WHOLE - size) // 2, _WHOLE - size)
        yield from ((left, top, left + size, top + size) for top in places for left in places)


def _described(pictures_nyx: Floats, box: Box) -> Floats:
    """The low frequencies of a crop of each picture, as vectors of length 1 (n, f)."""
    left, top, right, bottom = (edge / _WHOLE for edge in box)
    side = pictures_nyx.shape[-1]
    rows_fy, columns_fx = _waves(top, bottom, side), _waves(left, right, side)
    waves_nf = (rows_fy @ pictures_nyx @ columns_fx.T).reshape(len(pictures_nyx), -1)[:, 1:]  # without the mean
    length_n = np.linalg.norm(waves_nf, axis=1, keepdims=True)
    return np.asarray(waves_nf / np.maximum(length_n, 1e-6), dtype=np.float32)


def _waves(start: float, stop: float, side: int) -> Floats:
    """Cosines over a part of an axis (f, side): a type-II transform of what lies in it, and 0 outside."""
    middles = (np.arange(side) + 0.5) / side
    edges = np.arange(side + 1) / side
    inside = np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start), 0, None) * side
    place = np.clip((middles - start) / (stop - start), 0, 1)
    waves = np.cos(np.pi * np.arange(_FREQUENCIES)[:, None] * place[None]) * inside
    waves[1:] -= waves[1:].sum(axis=1, keepdims=True) / inside.sum() * inside  # blind to an even light
    return np.asarray(waves / inside.sum(), dtype=np.float32)


def _likely_pairs(pictures_nyx: Floats) -> list[_Likely]:
    """Pairs that may be copies, each with its best crop, the likeliest first."""
    found: dict[tuple[int, int], _Likely] = {}
    most = _MOST_LIKELY * len(pictures_nyx)
    boxes = list(_boxes())
    whole_nf = _described(pictures_nyx, boxes[0])
    for box in boxes:
        for each in _likely(whole_nf, _described(pictures_nyx, box), box):
            pair = (min(each.whole, each.crop), max(each.whole, each.crop))
            if pair not in found or each.likeness > found[pair].likeness:
                found[pair] = each
        if len(found) > 2 * most:  # so that pictures which are all alike do not fill memory
            found = dict(sorted(found.items(), key=lambda item: -item[1].likeness)[:most])
    return sorted(found.values(), key=lambda each: -each.likeness)[:most]


def _likely(whole_nf: Floats, crop_nf: Floats, box: Box) -> Iterator[_Likely]:
    """Pairs of a whole and of another picture's crop that are alike; of each whole the likeliest only."""
    kept = min(_MOST_LIKELY, len(crop_nf) - 1)
    for start in range(0, len(whole_nf), _BLOCK):
        likeness = whole_nf[start : start + _BLOCK] @ crop_nf.T
        every = np.arange(len(likeness))
        likeness[every, every + start] = 0  # itself
        best = np.argpartition(-likeness, kept - 1, axis=1)[:, :kept]
        for row, place in zip(*np.nonzero(np.take_along_axis(likeness, best, axis=1) >= LIKELY), strict=True):
            crop = int(best[row, place])
            yield _Likely(float(likeness[row, crop]), int(row + start), crop, box)


def _confirmed(pairs: Sequence[_Likely], pictures_nyx: Floats, colours_ncyx: Floats) -> list[float]:
    """How alike each pair is once fitted, in grey values and in colours; 0 where their detail differs."""
    wholes, crops = [each.whole for each in pairs], [each.crop for each in pairs]
    edges, grey = _fitted(pictures_nyx[wholes], pictures_nyx[crops], np.array([each.box for each in pairs]))
    colour = _match(_whole(colours_ncyx[wholes]), colours_ncyx[crops], edges)
    detail = _detail_match(pictures_nyx[wholes], pictures_nyx[crops], edges)
    return [float(each) for each in np.where(detail >= SAME_DETAIL, np.minimum(grey, colour), 0.0)]


def _fitted(wholes_pyx: Floats, others_pyx: Floats, boxes_p4: Edges) -> tuple[Edges, NDArray[np.float64]]:
    """The crop of each other picture, near its box, that is most like the whole, and their correlation.

    Returns:
        Left, top, right and bottom of each crop (p, 4), and the correlations (p,).
    """
    edges = boxes_p4.copy()
    lowest_and_highest = [(0, _WHOLE - _LEAST)] * 2 + [(_LEAST, _WHOLE)] * 2
    targets = _whole(wholes_pyx)
    best = _match(targets, others_pyx, edges)
    for step in _STEPS:
        for _ in range(4):
            before = best.copy()
            for side in range(4):
                for change in (-step, step):
                    tried = edges.copy()
                    tried[:, side] = np.clip(tried[:, side] + change, *lowest_and_highest[side])
                    likeness = _match(targets, others_pyx, tried)
                    better = (likeness > best) & (tried[:, 2:] - tried[:, :2] >= _LEAST).all(axis=1)
                    edges[better], best[better] = tried[better], likeness[better]
            if (best - before).max() < 1e-3:
                break
    return edges, best


def _whole(pictures: Floats) -> Floats:
    return _unit(_resampled(pictures, _everything(len(pictures))))


def _everything(count: int) -> Edges:
    return np.tile([0, 0, _WHOLE, _WHOLE], (count, 1))


def _match(targets_pf: Floats, others_pyx: Floats, edges_p4: Edges) -> NDArray[np.float64]:
    return np.asarray((targets_pf * _unit(_resampled(others_pyx, edges_p4))).sum(axis=1), dtype=np.float64)


def _detail_match(wholes_pyx: Floats, others_pyx: Floats, edges_p4: Edges) -> NDArray[np.float64]:
    whole, crop = _resampled(wholes_pyx, _everything(len(edges_p4))), _resampled(others_pyx, edges_p4)
    return np.asarray((_unit(_detail(whole)) * _unit(_detail(crop))).sum(axis=1), dtype=np.float64)


def _detail(pictures_pyx: Floats) -> Floats:
    """Each pixel without the mean of the nine around it."""
    padded = np.pad(pictures_pyx, ((0, 0), (1, 1), (1, 1)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.asarray(pictures_pyx - windows.mean(axis=(-2, -1)), dtype=np.float32)


def _resampled(pictures_pyx: Floats, edges_p4: Edges) -> Floats:
    """A crop of each at the size of fitting, each pixel a mean over its area (p, ..., 24, 24)."""
    between = (slice(None), *(None,) * (pictures_pyx.ndim - 3))
    table = _means(pictures_pyx.shape[-1])
    rows, columns = (table[edges_p4[:, axis], _WHOLE - edges_p4[:, axis + 2]][between] for axis in (1, 0))
    return np.asarray(rows @ pictures_pyx @ columns.swapaxes(-1, -2), dtype=np.float32)


@functools.cache
def _means(side: int) -> Floats:
    """Weights that average a part of an axis into 24 pixels (start, rest, 24, side): what it leaves out at each end."""
    start = np.arange(_WHOLE - _LEAST + 1)[:, None, None] / _WHOLE
    stop = 1 - start.swapaxes(0, 1)
    edges = (start + (stop - start) * np.arange(_SIDE + 1) / _SIDE)[..., None] * side
    cells = np.arange(side)
    overlap = np.minimum(edges[..., 1:, :], cells + 1) - np.maximum(edges[..., :-1, :], cells)
    weights = np.clip(overlap, 0, None)
    return np.asarray(weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-9), dtype=np.float32)


def _unit(values_pyx: Floats) -> Floats:
    """Each picture as one vector of mean 0 and length 1 (p, f)."""
    flat = values_pyx.reshape(len(values_pyx), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6), dtype=np.float32)
