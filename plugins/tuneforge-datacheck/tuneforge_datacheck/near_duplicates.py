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

MIN_CANDIDATE_CORRELATION = 0.86
"""Least correlation of low frequencies at which a pair is looked at closely."""

MIN_DUPLICATE_CORRELATION = 0.95
"""Least correlation of all pixels, once fitted, at which a pair is a copy: of grey values, and of colours."""

MIN_DETAIL_CORRELATION = 0.6
"""Least correlation of what is left of the pixels without their surroundings: two skies are alike but for it."""

MIN_GRAY_STD = 8.0
"""Standard deviation of grey values under which a picture shows too little to be told from another."""

_SIDE_UNITS = 100  # parts of a side, in which crops are measured
_SIZES = (94, 88, 82, 76)
_NUM_FREQUENCIES = 8
_FIT_SIDE = 24  # pixels at which pairs are fitted
_BLOCK = 512
_FIT_STEPS = (4, 2, 1)
_MIN_CROP_SIZE = 70  # of these that a crop keeps
_MAX_CANDIDATES_PER_IMAGE = 20  # pairs for each picture that are looked at closely


@attrs.frozen
class DuplicatePair:
    """Two pictures that are the same, or nearly so.

    Args:
        first: Place of the one.
        second: Place of the other, later one.
        correlation: Correlation of their grey values, once fitted.
        exact: They are the same file, to the byte.
    """

    first: int
    second: int
    correlation: float
    exact: bool = False


@attrs.frozen
class _CandidatePair:
    """A picture and another one's crop that are alike by their low frequencies."""

    correlation: float
    whole: int
    crop: int
    box: Box


def find_near_duplicates(gray_nyx: NDArray[np.uint8], color_nyxc: NDArray[np.uint8]) -> list[DuplicatePair]:
    """All pairs of pictures that are copies of one another, in order.

    Every picture is compared with every other, so time grows with the square of their number. Pictures that are almost
    of one grey are left out; of a picture that many are like, the likeliest pairs are looked at.

    Args:
        gray_nyx: The pictures in small, square (n, y, x).
        color_nyxc: The same in colours, of any size (n, y, x, 3).
    """
    rows = np.flatnonzero(gray_nyx.reshape(len(gray_nyx), -1).std(axis=1) >= MIN_GRAY_STD)
    if len(rows) < 2:
        return []
    images_nyx = gray_nyx[rows].astype(np.float32)
    colors_ncyx = color_nyxc[rows].astype(np.float32).transpose(0, 3, 1, 2)
    candidates = _find_candidate_pairs(images_nyx)
    duplicates = []
    for start in range(0, len(candidates), _BLOCK):
        block = candidates[start : start + _BLOCK]
        for pair, correlation in zip(block, _confirm_pairs(block, images_nyx, colors_ncyx), strict=True):
            if correlation >= MIN_DUPLICATE_CORRELATION:
                first, second = sorted((int(rows[pair.whole]), int(rows[pair.crop])))
                duplicates.append(DuplicatePair(first, second, round(correlation, 4)))
    return sorted(duplicates, key=lambda copy: (copy.first, copy.second))


def connected_components(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
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


def _crop_boxes() -> Iterator[Box]:
    """The whole, then crops of it at several sizes and places."""
    yield (0, 0, _SIDE_UNITS, _SIDE_UNITS)
    for size in _SIZES:
        places = (0, (_SIDE_UNITS - size) // 2, _SIDE_UNITS - size)
        yield from ((left, top, left + size, top + size) for top in places for left in places)


def _low_frequencies(images_nyx: Floats, box: Box) -> Floats:
    """The low frequencies of a crop of each picture, as vectors of length 1 (n, f)."""
    left, top, right, bottom = (edge / _SIDE_UNITS for edge in box)
    side = images_nyx.shape[-1]
    rows_fy, columns_fx = _cosine_basis(top, bottom, side), _cosine_basis(left, right, side)
    waves_nf = (rows_fy @ images_nyx @ columns_fx.T).reshape(len(images_nyx), -1)[:, 1:]  # without the mean
    length_n = np.linalg.norm(waves_nf, axis=1, keepdims=True)
    return np.asarray(waves_nf / np.maximum(length_n, 1e-6), dtype=np.float32)


def _cosine_basis(start: float, stop: float, side: int) -> Floats:
    """Cosines over a part of an axis (f, side): a type-II transform of what lies in it, and 0 outside."""
    middles = (np.arange(side) + 0.5) / side
    edges = np.arange(side + 1) / side
    inside = np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start), 0, None) * side
    place = np.clip((middles - start) / (stop - start), 0, 1)
    waves = np.cos(np.pi * np.arange(_NUM_FREQUENCIES)[:, None] * place[None]) * inside
    waves[1:] -= waves[1:].sum(axis=1, keepdims=True) / inside.sum() * inside  # blind to an even light
    return np.asarray(waves / inside.sum(), dtype=np.float32)


def _find_candidate_pairs(images_nyx: Floats) -> list[_CandidatePair]:
    """Pairs that may be copies, each with its best crop, the likeliest first."""
    found: dict[tuple[int, int], _CandidatePair] = {}
    most = _MAX_CANDIDATES_PER_IMAGE * len(images_nyx)
    boxes = list(_crop_boxes())
    whole_nf = _low_frequencies(images_nyx, boxes[0])
    for box in boxes:
        for each in _match_crops(whole_nf, _low_frequencies(images_nyx, box), box):
            pair = (min(each.whole, each.crop), max(each.whole, each.crop))
            if pair not in found or each.correlation > found[pair].correlation:
                found[pair] = each
        if len(found) > 2 * most:  # so that pictures which are all alike do not fill memory
            found = dict(sorted(found.items(), key=lambda item: -item[1].correlation)[:most])
    return sorted(found.values(), key=lambda each: -each.correlation)[:most]


def _match_crops(whole_nf: Floats, crop_nf: Floats, box: Box) -> Iterator[_CandidatePair]:
    """Pairs of a whole and of another picture's crop that are alike; of each whole the likeliest only."""
    kept = min(_MAX_CANDIDATES_PER_IMAGE, len(crop_nf) - 1)
    for start in range(0, len(whole_nf), _BLOCK):
        correlation = whole_nf[start : start + _BLOCK] @ crop_nf.T
        every = np.arange(len(correlation))
        correlation[every, every + start] = 0  # itself
        best = np.argpartition(-correlation, kept - 1, axis=1)[:, :kept]
        for row, place in zip(
            *np.nonzero(np.take_along_axis(correlation, best, axis=1) >= MIN_CANDIDATE_CORRELATION), strict=True
        ):
            crop = int(best[row, place])
            yield _CandidatePair(float(correlation[row, crop]), int(row + start), crop, box)


def _confirm_pairs(pairs: Sequence[_CandidatePair], images_nyx: Floats, colors_ncyx: Floats) -> list[float]:
    """How alike each pair is once fitted, in grey values and in colours; 0 where their detail differs."""
    wholes, crops = [each.whole for each in pairs], [each.crop for each in pairs]
    edges, gray = _fit_crops(images_nyx[wholes], images_nyx[crops], np.array([each.box for each in pairs]))
    color = _correlate(_standardize_whole(colors_ncyx[wholes]), colors_ncyx[crops], edges)
    detail = _correlate_detail(images_nyx[wholes], images_nyx[crops], edges)
    return [float(each) for each in np.where(detail >= MIN_DETAIL_CORRELATION, np.minimum(gray, color), 0.0)]


def _fit_crops(wholes_pyx: Floats, others_pyx: Floats, boxes_p4: Edges) -> tuple[Edges, NDArray[np.float64]]:
    """The crop of each other picture, near its box, that is most like the whole, and their correlation.

    Returns:
        Left, top, right and bottom of each crop (p, 4), and the correlations (p,).
    """
    edges = boxes_p4.copy()
    lowest_and_highest = [(0, _SIDE_UNITS - _MIN_CROP_SIZE)] * 2 + [(_MIN_CROP_SIZE, _SIDE_UNITS)] * 2
    targets = _standardize_whole(wholes_pyx)
    best = _correlate(targets, others_pyx, edges)
    for step in _FIT_STEPS:
        for _ in range(4):
            before = best.copy()
            for side in range(4):
                for change in (-step, step):
                    tried = edges.copy()
                    tried[:, side] = np.clip(tried[:, side] + change, *lowest_and_highest[side])
                    correlation = _correlate(targets, others_pyx, tried)
                    better = (correlation > best) & (tried[:, 2:] - tried[:, :2] >= _MIN_CROP_SIZE).all(axis=1)
                    edges[better], best[better] = tried[better], correlation[better]
            if (best - before).max() < 1e-3:
                break
    return edges, best


def _standardize_whole(images: Floats) -> Floats:
    return _standardize(_resample_crops(images, _whole_edges(len(images))))


def _whole_edges(count: int) -> Edges:
    return np.tile([0, 0, _SIDE_UNITS, _SIDE_UNITS], (count, 1))


def _correlate(targets_pf: Floats, others_pyx: Floats, edges_p4: Edges) -> NDArray[np.float64]:
    return np.asarray((targets_pf * _standardize(_resample_crops(others_pyx, edges_p4))).sum(axis=1), dtype=np.float64)


def _correlate_detail(wholes_pyx: Floats, others_pyx: Floats, edges_p4: Edges) -> NDArray[np.float64]:
    whole, crop = _resample_crops(wholes_pyx, _whole_edges(len(edges_p4))), _resample_crops(others_pyx, edges_p4)
    return np.asarray((_standardize(_high_pass(whole)) * _standardize(_high_pass(crop))).sum(axis=1), dtype=np.float64)


def _high_pass(images_pyx: Floats) -> Floats:
    """Each pixel without the mean of the nine around it."""
    padded = np.pad(images_pyx, ((0, 0), (1, 1), (1, 1)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.asarray(images_pyx - windows.mean(axis=(-2, -1)), dtype=np.float32)


def _resample_crops(images_pyx: Floats, edges_p4: Edges) -> Floats:
    """A crop of each at the size of fitting, each pixel a mean over its area (p, ..., 24, 24)."""
    between = (slice(None), *(None,) * (images_pyx.ndim - 3))
    table = _averaging_weights(images_pyx.shape[-1])
    rows, columns = (table[edges_p4[:, axis], _SIDE_UNITS - edges_p4[:, axis + 2]][between] for axis in (1, 0))
    return np.asarray(rows @ images_pyx @ columns.swapaxes(-1, -2), dtype=np.float32)


@functools.cache
def _averaging_weights(side: int) -> Floats:
    """Weights that average a part of an axis into 24 pixels (start, rest, 24, side): what it leaves out at each end."""
    start = np.arange(_SIDE_UNITS - _MIN_CROP_SIZE + 1)[:, None, None] / _SIDE_UNITS
    stop = 1 - start.swapaxes(0, 1)
    edges = (start + (stop - start) * np.arange(_FIT_SIDE + 1) / _FIT_SIDE)[..., None] * side
    cells = np.arange(side)
    overlap = np.minimum(edges[..., 1:, :], cells + 1) - np.maximum(edges[..., :-1, :], cells)
    weights = np.clip(overlap, 0, None)
    return np.asarray(weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-9), dtype=np.float32)


def _standardize(values_pyx: Floats) -> Floats:
    """Each picture as one vector of mean 0 and length 1 (p, f)."""
    flat = values_pyx.reshape(len(values_pyx), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6), dtype=np.float32)
