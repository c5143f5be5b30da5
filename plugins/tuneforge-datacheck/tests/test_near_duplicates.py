"""Duplicates and near-duplicates across splits are found.

`TUNEFORGE_PAIRS=200` plants 200 pairs in 2,000 images, ten times as many as CI (about half a minute).
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
def test_planted_duplicates_across_splits_are_found_with_high_precision(tmp_path, seed):
    near, exact = plant(tmp_path, count=9 * PAIRS + PAIRS, pairs=PAIRS, exact=PAIRS // 4, seed=seed)
    issues = [
        issue
        for issue in check_images(tmp_path).issues
        if issue.kind in ("leak", "near-duplicate", "exact duplicate", "conflicting labels")
    ]
    found_exact = {frozenset((issue.path, issue.related[0])) for issue in issues if issue.score is None}
    found_near = {frozenset((issue.path, issue.related[0])) for issue in issues if issue.score is not None}
    hits = len(near & found_near)
    recall, precision = hits / len(near), hits / len(found_near)
    print(f"\nnear-duplicates: recall {recall:.3f}, precision {precision:.3f} of {len(near)} pairs; {len(exact)} exact")
    assert found_exact == exact
    assert recall >= 0.95
    assert precision >= 0.95


def test_nearly_uniform_images_are_not_near_duplicates():
    flat = np.full((20, 48, 48), 200, np.uint8) + np.random.default_rng(0).integers(0, 3, (20, 48, 48), dtype=np.uint8)
    assert find_near_duplicates(flat, np.repeat(flat[:, ::2, ::2, None], 3, axis=3)) == []


def test_images_that_differ_only_in_color_are_not_near_duplicates():
    rng = np.random.default_rng(1)
    scene = rng.integers(0, 256, (6, 6)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    gray = np.stack([scene, scene])
    color = np.zeros((2, 24, 24, 3), np.uint8)
    color[0, ..., 0] = color[1, ..., 2] = scene[::2, ::2]
    assert find_near_duplicates(gray, color) == []
    assert len(find_near_duplicates(gray, color[[0, 0]])) == 1


def test_connected_components_join_pairs_that_share_an_image():
    assert connected_components([(5, 2), (2, 9), (1, 3)]) == [[1, 3], [2, 5, 9]]


def make_members(*names, labels=None):
    """Return files by index; `test/x` is in the split test."""
    labels = labels or ["a"] * len(names)
    return {index: DataFile(name, name.partition("/")[0], labels[index]) for index, name in enumerate(names)}


def summarize(members, *pairs):
    """Return file, kind, related files and score of each issue."""
    return [(issue.path, issue.kind, issue.related, issue.score) for issue in find_duplicate_issues(members, pairs)]


def test_issue_of_an_excluded_file_names_one_that_stays():
    members = make_members("/photo", "/crop", "/crop-jpeg", "/crop-of-crop")
    pairs = [(0, 1, 0.96), (0, 2, 0.95), (1, 2, 0.99), (2, 3, 0.97)]
    issues = list(find_duplicate_issues(without_splits(members), [DuplicatePair(*pair) for pair in pairs]))
    assert [issue.action for issue in issues] == ["exclude"] * 3
    assert [issue.related for issue in issues] == [("/photo",), ("/photo",), ("/crop-jpeg", "/photo")]
    assert issues[2].why == "it nearly equals '/crop-jpeg', which is connected by near-duplicates to '/photo'"


def without_splits(members):
    return {index: DataFile(file.id, "", file.label) for index, file in members.items()}


def test_issue_of_each_chain_member_names_the_most_similar_file_and_its_score():
    members = make_members("train/a", "train/b", "train/c")
    assert summarize(members, DuplicatePair(0, 1, 0.96), DuplicatePair(1, 2, 0.99)) == [
        ("train/b", "near-duplicate", ("train/c",), 0.99),
        ("train/c", "near-duplicate", ("train/b",), 0.99),
    ]


def test_leak_names_the_test_image_if_the_file_pairs_with_it():
    members = make_members("train/a", "train/b", "test/c", "train/d")
    pairs = [
        DuplicatePair(0, 2, 0.96),
        DuplicatePair(0, 1, 0.99),
        DuplicatePair(1, 2, 0.97),
        DuplicatePair(1, 3, 0.98),
    ]
    issues = list(find_duplicate_issues(members, pairs))
    assert [(issue.path, issue.related, issue.score) for issue in issues] == [
        ("train/a", ("test/c",), 0.96),
        ("train/b", ("test/c",), 0.97),
        ("train/d", ("train/b", "test/c"), 0.98),
    ]
    assert {(issue.kind, issue.action) for issue in issues} == {("leak", "exclude")}
    assert issues[2].why == "it nearly equals 'train/b', which is connected by near-duplicates to 'test/c' in test"


def test_conflicting_labels_name_the_most_similar_file_first():
    members = make_members("train/a", "train/b", "train/c", labels=("x", "x", "y"))
    pairs = [DuplicatePair(0, 1, 1.0, exact=True), DuplicatePair(0, 2, 0.97), DuplicatePair(1, 2, 0.96)]
    issues = list(find_duplicate_issues(members, pairs))
    assert [(issue.path, issue.related, issue.score, issue.action) for issue in issues] == [
        ("train/a", ("train/b", "train/c"), None, "review"),
        ("train/b", ("train/a", "train/c"), None, "review"),
        ("train/c", ("train/a", "train/b"), 0.97, "review"),
    ]


def test_exact_duplicates_of_a_test_image_are_leaks_that_name_it(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    for name in ("train/a/1", "train/a/2", "test/a/3", "train/a/4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / f"{name}.png")
    issues = [issue for issue in check_images(tmp_path).issues if issue.kind != "class"]
    assert [(issue.path, issue.kind, issue.related) for issue in issues] == [
        (f"train/a/{number}.png", "leak", ("test/a/3.png",)) for number in (1, 2, 4)
    ]
