"""Near and exact copies across splits are found.

`TUNEFORGE_PAIRS=200` plants 200 pairs in 2,000 pictures, ten times what CI does (about half a minute).
"""

import os

import numpy as np
import pytest
from PIL import Image
from planted_duplicates import plant
from tuneforge_datacheck.check import check_images
from tuneforge_datacheck.files import DataFile
from tuneforge_datacheck.issues import find_duplicate_issues
from tuneforge_datacheck.near_duplicates import DuplicatePair, connected_components, find_near_duplicates

PAIRS = int(os.environ.get("TUNEFORGE_PAIRS", "20"))


@pytest.mark.parametrize("seed", range(3 if PAIRS >= 200 else 1))
def test_planted_copies_across_splits_are_found_and_little_else_is(tmp_path, seed):
    near, same = plant(tmp_path, count=9 * PAIRS + PAIRS, pairs=PAIRS, exact=PAIRS // 4, seed=seed)
    issues = [
        each
        for each in check_images(tmp_path).issues
        if each.kind in ("leak", "near-duplicate", "exact duplicate", "conflicting labels")
    ]
    exact = {frozenset((each.path, each.related[0])) for each in issues if each.score is None}
    alike = {frozenset((each.path, each.related[0])) for each in issues if each.score is not None}
    recall, precision = len(near & alike) / len(near), len(near & alike) / len(alike)
    print(f"\nnear: recall {recall:.3f}, precision {precision:.3f} of {len(near)} pairs; exact: {len(exact & same)}")
    assert exact == same
    assert recall >= 0.95
    assert precision >= 0.95


def test_pictures_that_show_next_to_nothing_are_no_copies_of_one_another():
    flat = np.full((20, 48, 48), 200, np.uint8) + np.random.default_rng(0).integers(0, 3, (20, 48, 48), dtype=np.uint8)
    assert find_near_duplicates(flat, np.repeat(flat[:, ::2, ::2, None], 3, axis=3)) == []


def test_colour_tells_apart_what_is_equal_in_grey():
    rng = np.random.default_rng(1)
    scene = rng.integers(0, 256, (6, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    grey = np.stack([scene, scene])
    colour = np.zeros((2, 24, 24, 3), np.uint8)
    colour[0, ..., 0] = colour[1, ..., 2] = scene[::2, ::2]
    assert find_near_duplicates(grey, colour) == []
    assert len(find_near_duplicates(grey, colour[[0, 0]])) == 1


def test_pairs_join_into_sets():
    assert connected_components([(5, 2), (2, 9), (1, 3)]) == [[1, 3], [2, 5, 9]]


def chain(*named, label="a", labels=()):
    """Files by place: `test/x.png` lies in `test`."""
    named_labels = labels or [label] * len(named)
    return {place: DataFile(name, name.partition("/")[0], named_labels[place]) for place, name in enumerate(named)}


def told(members, *copies):
    """Of each issue: its file, its kind, whom it is named beside, and the score."""
    return [(each.path, each.kind, each.related, each.score) for each in find_duplicate_issues(members, copies)]


def test_each_member_of_a_chain_is_named_beside_its_nearest_with_that_score():
    members = chain("train/a", "train/b", "train/c")
    assert told(members, DuplicatePair(0, 1, 0.96), DuplicatePair(1, 2, 0.99)) == [
        ("train/b", "near-duplicate", ("train/c",), 0.99),
        ("train/c", "near-duplicate", ("train/b",), 0.99),
    ]


def test_a_leak_is_named_beside_the_copy_that_is_kept_where_it_is_like_it():
    members = chain("train/a", "train/b", "test/c", "train/d")
    issues = list(
        find_duplicate_issues(
            members,
            [
                DuplicatePair(0, 2, 0.96),
                DuplicatePair(0, 1, 0.99),
                DuplicatePair(1, 2, 0.97),
                DuplicatePair(1, 3, 0.98),
            ],
        )
    )
    assert [(each.path, each.related, each.score) for each in issues] == [
        ("train/a", ("test/c",), 0.96),
        ("train/b", ("test/c",), 0.97),
        ("train/d", ("train/b", "test/c"), 0.98),
    ]
    assert {(each.kind, each.action) for each in issues} == {("leak", "exclude")}
    assert issues[2].why == "it is nearly the same picture as 'train/b', and through it as 'test/c', which is in test"


def test_of_several_labels_the_nearest_comes_first():
    members = chain("train/a", "train/b", "train/c", labels=("x", "x", "y"))
    issues = list(
        find_duplicate_issues(
            members, [DuplicatePair(0, 1, 1.0, exact=True), DuplicatePair(0, 2, 0.97), DuplicatePair(1, 2, 0.96)]
        )
    )
    assert [(each.path, each.related, each.score, each.action) for each in issues] == [
        ("train/a", ("train/b", "train/c"), None, "review"),
        ("train/b", ("train/a", "train/c"), None, "review"),
        ("train/c", ("train/a", "train/b"), 0.97, "review"),
    ]


def test_copies_to_the_byte_are_named_beside_the_one_of_the_test(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    for name in ("train/a/1", "train/a/2", "test/a/3", "train/a/4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / f"{name}.png")
    issues = [each for each in check_images(tmp_path).issues if each.kind != "class"]
    assert [(each.path, each.kind, each.related) for each in issues] == [
        (f"train/a/{number}.png", "leak", ("test/a/3.png",)) for number in (1, 2, 4)
    ]
