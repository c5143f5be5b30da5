"""Find near-duplicates: the same image at another size, brightness, crop or compression.

Each image is described by the low frequencies of its gray values, once whole and once for each of a grid of crops.
Every image is compared with every crop of every other; the best crop of a likely pair is then refined, and the pair is
reported if the image and the crop correlate. A correlation does not depend on brightness and contrast.

Shapes: n images, f frequencies, p pairs, y and x pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Edges = NDArray[np.int64]
"""Left, top, right and bottom of a crop of each pair, in hundredths of the side (p, 4)."""

Box = tuple[int, int, int, int]
"""The same for one crop."""

MIN_CANDIDATE_CORRELATION = 0.86
"""Minimum correlation of low frequencies of a pair whose pixels are compared."""

MIN_DUPLICATE_CORRELATION = 0.95
"""Minimum correlation of the pixels of near-duplicates, after the crop is refined, in gray values and in colors."""

MIN_DETAIL_CORRELATION = 0.6
"""Minimum correlation of the high-pass filtered pixels of near-duplicates; without it any two skies would be a pair."""

MIN_GRAY_STD = 8.0
"""Minimum standard deviation of the gray values of an image that is compared; a nearly uniform one equals many."""

_SIDE_UNITS = 100  # unit of crops: hundredths of a side
_SIZES = (94, 88, 82, 76)
_NUM_FREQUENCIES = 8
_FIT_SIDE = 24  # side in pixels at which the crop of a pair is refined
_BLOCK = 512
_FIT_STEPS = (4, 2, 1)
_MIN_CROP_SIZE = 70  # hundredths of a side
_MAX_CANDIDATES_PER_IMAGE = 20  # pairs of each image whose pixels are compared


@attrs.frozen
class DuplicatePair:
    """Two images that are duplicates or near-duplicates.

    Args:
        first: Index of the first image.
        second: Index of the second, greater than `first`.
        correlation: Correlation of their pixels after the crop is refined.
        exact: Their files are bit-identical.
    """

    first: int
    second: int
    correlation: float
    exact: bool = False


@attrs.frozen
class _CandidatePair:
    """An image and a crop of another one whose low frequencies correlate."""

    correlation: float
    whole: int
    crop: int
    box: Box


def find_near_duplicates(gray_nyx: NDArray[np.uint8], color_nyxc: NDArray[np.uint8]) -> list[DuplicatePair]:
    """Return all pairs of near-duplicates, sorted by index.

    Every image is compared with every other, so time grows with the square of their number. Nearly uniform images are
    not compared, and of each image only the 20 most likely pairs of each crop are.

    Args:
        gray_nyx: Square grayscale thumbnails (n, y, x).
        color_nyxc: RGB thumbnails of the same images, of any size (n, y, x, 3).
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
    return sorted(duplicates, key=lambda pair: (pair.first, pair.second))


def connected_components(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the connected components of the graph of pairs, each as an ascending list of two or more indices."""
    parent: dict[int, int] = {}

    def root(index: int) -> int:
        while (above := parent.setdefault(index, index)) != index:
            parent[index] = index = parent[above]
        return index

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    components: dict[int, list[int]] = {}
    for index in sorted(parent):
        components.setdefault(root(index), []).append(index)
    return list(components.values())


def _crop_boxes() -> Iterator[Box]:
    """Yield the box of the whole image, then those of a 3 x 3 grid of crops of each size."""
    yield (0, 0, _SIDE_UNITS, _SIDE_UNITS)
    for size in _SIZES:
        offsets = (0, (_SIDE_UNITS - size) // 2, _SIDE_UNITS - size)
        yield from ((left, top, left + size, top + size) for top in offsets for left in offsets)


def _low_frequencies(images_nyx: Floats, box: Box) -> Floats:
    """Compute the low frequencies of a crop of each image as vectors of length 1 (n, f)."""
    left, top, right, bottom = (edge / _SIDE_UNITS for edge in box)
    side = images_nyx.shape[-1]
    rows_fy, columns_fx = _cosine_basis(top, bottom, side), _cosine_basis(left, right, side)
    waves_nf = (rows_fy @ images_nyx @ columns_fx.T).reshape(len(images_nyx), -1)[:, 1:]  # without the mean
    length_n = np.linalg.norm(waves_nf, axis=1, keepdims=True)
    return np.asarray(waves_nf / np.maximum(length_n, 1e-6), dtype=np.float32)


def _cosine_basis(start: float, stop: float, side: int) -> Floats:
    """Return the basis of a type-II cosine transform of a part of an axis (f, side); it is 0 outside that part."""
    middles = (np.arange(side) + 0.5) / side
    edges = np.arange(side + 1) / side
    inside = np.clip(np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start), 0, None) * side
    position = np.clip((middles - start) / (stop - start), 0, 1)
    waves = np.cos(np.pi * np.arange(_NUM_FREQUENCIES)[:, None] * position[None]) * inside
    waves[1:] -= (
        waves[1:].sum(axis=1, keepdims=True) / inside.sum() * inside
    )  # a constant image must have no such frequency
    return np.asarray(waves / inside.sum(), dtype=np.float32)


def _find_candidate_pairs(images_nyx: Floats) -> list[_CandidatePair]:
    """Return the pairs that may be near-duplicates, each with its best crop, by descending correlation."""
    found: dict[tuple[int, int], _CandidatePair] = {}
    most = _MAX_CANDIDATES_PER_IMAGE * len(images_nyx)
    boxes = list(_crop_boxes())
    whole_nf = _low_frequencies(images_nyx, boxes[0])
    for box in boxes:
        for each in _match_crops(whole_nf, _low_frequencies(images_nyx, box), box):
            pair = (min(each.whole, each.crop), max(each.whole, each.crop))
            if pair not in found or each.correlation > found[pair].correlation:
                found[pair] = each
        if len(found) > 2 * most:  # bounds memory where all images are similar
            found = dict(sorted(found.items(), key=lambda item: -item[1].correlation)[:most])
    return sorted(found.values(), key=lambda each: -each.correlation)[:most]


def _match_crops(whole_nf: Floats, crop_nf: Floats, box: Box) -> Iterator[_CandidatePair]:
    """Yield pairs of an image and a crop of another one that correlate; of each image the most likely ones only."""
    num_best = min(_MAX_CANDIDATES_PER_IMAGE, len(crop_nf) - 1)
    for start in range(0, len(whole_nf), _BLOCK):
        correlation = whole_nf[start : start + _BLOCK] @ crop_nf.T
        every = np.arange(len(correlation))
        correlation[every, every + start] = 0  # not with itself
        best = np.argpartition(-correlation, num_best - 1, axis=1)[:, :num_best]
        for row, column in zip(
            *np.nonzero(np.take_along_axis(correlation, best, axis=1) >= MIN_CANDIDATE_CORRELATION), strict=True
        ):
            crop = int(best[row, column])
            yield _CandidatePair(float(correlation[row, crop]), int(row + start), crop, box)


def _confirm_pairs(pairs: Sequence[_CandidatePair], images_nyx: Floats, colors_ncyx: Floats) -> list[float]:
    """Return the correlation of each pair after refining its crop: the lower of gray and color; 0 if details differ."""
    wholes, crops = [each.whole for each in pairs], [each.crop for each in pairs]
    edges, gray = _fit_crops(images_nyx[wholes], images_nyx[crops], np.array([each.box for each in pairs]))
    color = _correlate(_standardize_whole(colors_ncyx[wholes]), colors_ncyx[crops], edges)
    detail = _correlate_detail(images_nyx[wholes], images_nyx[crops], edges)
    return [float(each) for each in np.where(detail >= MIN_DETAIL_CORRELATION, np.minimum(gray, color), 0.0)]


def _fit_crops(wholes_pyx: Floats, others_pyx: Floats, boxes_p4: Edges) -> tuple[Edges, NDArray[np.float64]]:
    """Refine the crop of each pair by coordinate search from its box, maximizing the correlation.

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
                    candidate = edges.copy()
                    candidate[:, side] = np.clip(candidate[:, side] + change, *lowest_and_highest[side])
                    correlation = _correlate(targets, others_pyx, candidate)
                    better = (correlation > best) & (candidate[:, 2:] - candidate[:, :2] >= _MIN_CROP_SIZE).all(axis=1)
                    edges[better], best[better] = candidate[better], correlation[better]
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
    """Subtract from each pixel the mean of the 3 x 3 pixels around it."""
    padded = np.pad(images_pyx, ((0, 0), (1, 1), (1, 1)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.asarray(images_pyx - windows.mean(axis=(-2, -1)), dtype=np.float32)


def _resample_crops(images_pyx: Floats, edges_p4: Edges) -> Floats:
    """Resample a crop of each image to 24 x 24 pixels by averaging areas (p, ..., 24, 24)."""
    between = (slice(None), *(None,) * (images_pyx.ndim - 3))
    table = _averaging_weights(images_pyx.shape[-1])
    rows, columns = (table[edges_p4[:, axis], _SIDE_UNITS - edges_p4[:, axis + 2]][between] for axis in (1, 0))
    return np.asarray(rows @ images_pyx @ columns.swapaxes(-1, -2), dtype=np.float32)


@functools.cache
def _averaging_weights(side: int) -> Floats:
    """Return the weights that average a part of an axis into 24 pixels (margin at start, margin at end, 24, side)."""
    start = np.arange(_SIDE_UNITS - _MIN_CROP_SIZE + 1)[:, None, None] / _SIDE_UNITS
    stop = 1 - start.swapaxes(0, 1)
    edges = (start + (stop - start) * np.arange(_FIT_SIDE + 1) / _FIT_SIDE)[..., None] * side
    cells = np.arange(side)
    overlap = np.minimum(edges[..., 1:, :], cells + 1) - np.maximum(edges[..., :-1, :], cells)
    weights = np.clip(overlap, 0, None)
    return np.asarray(weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-9), dtype=np.float32)


def _standardize(values_pyx: Floats) -> Floats:
    """Flatten each image to a vector of mean 0 and length 1 (p, f)."""
    flat = values_pyx.reshape(len(values_pyx), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6), dtype=np.float32)
