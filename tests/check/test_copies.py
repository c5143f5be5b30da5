"""Near and exact copies across splits are found.

`TUNEFORGE_PAIRS=200` plants 200 pairs in 2,000 pictures, ten times what CI does (about half a minute).
"""

import os

import numpy as np
import pytest
from check.planted import plant

from tuneforge.check.check import check
from tuneforge.check.copies import near_copies, sets_of

PAIRS = int(os.environ.get("TUNEFORGE_PAIRS", "20"))


@pytest.mark.parametrize("seed", range(3 if PAIRS >= 200 else 1))
def test_planted_copies_across_splits_are_found_and_little_else_is(tmp_path, seed):
    near, same = plant(tmp_path, count=9 * PAIRS + PAIRS, pairs=PAIRS, exact=PAIRS // 4, seed=seed)
    issues = [each for each in check(tmp_path).issues if each.kind in ("leak", "near copy", "same bytes", "two labels")]
    exact = {frozenset((each.path, each.others[0])) for each in issues if each.score is None}
    alike = {frozenset((each.path, each.others[0])) for each in issues if each.score is not None}
    recall, precision = len(near & alike) / len(near), len(near & alike) / len(alike)
    print(f"\nnear: recall {recall:.3f}, precision {precision:.3f} of {len(near)} pairs; exact: {len(exact & same)}")
    assert exact == same
    assert recall >= 0.95
    assert precision >= 0.95


def test_pictures_that_show_next_to_nothing_are_no_copies_of_one_another():
    flat = np.full((20, 48, 48), 200, np.uint8) + np.random.default_rng(0).integers(0, 3, (20, 48, 48), dtype=np.uint8)
    assert near_copies(flat, np.repeat(flat[:, ::2, ::2, None], 3, axis=3)) == []


def test_colour_tells_apart_what_is_equal_in_grey():
    rng = np.random.default_rng(1)
    scene = rng.integers(0, 256, (6, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    grey = np.stack([scene, scene])
    colour = np.zeros((2, 24, 24, 3), np.uint8)
    colour[0, ..., 0] = colour[1, ..., 2] = scene[::2, ::2]
    assert near_copies(grey, colour) == []
    assert len(near_copies(grey, colour[[0, 0]])) == 1


def test_pairs_join_into_sets():
    assert sets_of([(5, 2), (2, 9), (1, 3)]) == [[1, 3], [2, 5, 9]]
