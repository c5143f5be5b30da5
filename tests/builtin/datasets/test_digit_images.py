import numpy as np
import pytest
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from tuneforge.builtin.datasets.demo.bitmaps import block_counts
from tuneforge.builtin.datasets.demo.digit_images import (
    AMBIGUOUS,
    DIGITS,
    OTHER_CHARACTERS,
    DigitImages,
    control_digits,
    digits_and_others,
    real_digits,
)
from tuneforge.builtin.datasets.demo.strokes import MAKINGS, bitmaps, digit_margin, make, normalised, recombine

TRAIN, TEST = train_test_split(np.arange(1797), train_size=960, stratify=real_digits()[1], random_state=0)


@pytest.fixture(scope="module")
def train() -> DigitImages:
    return digits_and_others(TRAIN, seed=0, split="train")


@pytest.fixture(scope="module")
def test() -> DigitImages:
    return digits_and_others(TEST, seed=0, split="test")


def test_three_fifths_are_digits_and_two_fifths_others(train):
    assert np.bincount(train.labels, minlength=11)[10] == 800
    assert dict(zip(*np.unique(train.origins, return_counts=True), strict=True)) == {
        "real": 960,
        "rendered": 240,
        "letters": 480,
        "strokes": 320,
    }
    assert train.class_names == (*DIGITS, "other")


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_any_share_is_kept_to_the_nearest_image(share):
    labels = digits_and_others(TEST[:100], other_share=share, seed=0, split="val").labels
    assert abs((labels == 10).sum() - share * len(labels)) <= 0.5


def test_without_others_there_are_ten_classes_of_real_digits():
    digits = digits_and_others(np.array([17, 4]), other_share=0, seed=0, split="train")
    images, labels = real_digits()
    assert digits.class_names == tuple(DIGITS)
    assert digits.ids.tolist() == ["real/17", "real/4"]
    assert (digits.images == images[[17, 4]]).all()
    assert digits.labels.tolist() == labels[[17, 4]].tolist()


def test_images_are_counts_of_ink_from_0_to_16(train):
    assert train.images.shape == (2000, 8, 8)
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int64)
    assert train.images.max() == 16


def test_origin_and_class_agree(train):
    assert (train.labels[np.isin(train.origins, ["letters", "strokes"])] == 10).all()
    assert (train.labels[np.isin(train.origins, ["real", "rendered"])] < 10).all()
    assert np.bincount(train.labels[train.origins == "rendered"]).tolist() == [24] * 10


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(train):
    again = digits_and_others(TRAIN, seed=0, split="train")
    assert again.images.tobytes() == train.images.tobytes()
    assert (again.ids == train.ids).all()
    other = digits_and_others(TRAIN, seed=1, split="train")
    assert (other.images[960:] != train.images[960:]).any(axis=(1, 2)).mean() > 0.99


def test_ids_are_unique_and_splits_share_no_image(train, test):
    ids = np.concatenate([train.ids, test.ids])
    assert len(set(ids)) == len(ids)
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}


def test_no_stroke_comes_from_a_digit_of_another_split(train, test):
    for split, indices in ((train, TRAIN), (test, TEST)):
        parents = split.parents[split.origins == "strokes"]
        assert set(parents.ravel()) <= {-1, *indices}
        assert (parents[:, 0] >= 0).all()


def test_ambiguous_characters_are_not_among_the_others(train):
    drawn = {name.split("/")[2] for name in train.ids[train.origins == "letters"]}
    assert drawn == set(OTHER_CHARACTERS)
    assert not drawn & {*AMBIGUOUS, *DIGITS}


def test_control_digits_are_of_no_family_that_is_trained_on(monkeypatch):
    import tuneforge.builtin.datasets.demo.digit_images as module

    used = []
    draw = module.render
    monkeypatch.setattr(
        module, "render", lambda c, fonts, **rest: used.append({f.family for f in fonts}) or draw(c, fonts, **rest)
    )
    control_digits(20, seed=0)
    digits_and_others(TEST[:60], seed=0, split="train")
    assert used[0] == {"STIXGeneral"}
    assert not any("STIX" in family for families in used[1:] for family in families)


def test_control_digits_are_ten_classes_in_equal_parts():
    control = control_digits(200, seed=0)
    assert np.bincount(control.labels).tolist() == [20] * 10
    assert set(control.origins) == {"control"}


def test_a_simple_model_tells_digits_from_others_and_knows_the_held_out_family(train, test):
    model = SVC(C=10, gamma=0.1).fit(train.images.reshape(-1, 64) / 16, train.labels)

    def share_right(images: DigitImages, origin: str) -> float:
        of_it = images.origins == origin
        return float((model.predict(images.images[of_it].reshape(-1, 64) / 16) == images.labels[of_it]).mean())

    assert share_right(test, "real") > 0.96
    assert share_right(test, "strokes") > 0.93
    assert share_right(test, "letters") > 0.93
    assert share_right(control_digits(500, seed=0), "control") > 0.85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"other_share": 1.0}, "other_share is 1.0"),
        ({"other_share": -0.1}, "other_share is -0.1"),
        ({"rendered_share": 1.0}, "rendered_share is 1.0"),
        ({"strokes_share": 1.1}, "strokes_share is 1.1"),
    ],
)
def test_a_share_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        digits_and_others(TEST, seed=0, split="train", **options)


def test_a_split_without_real_digits_is_refused():
    with pytest.raises(ValueError, match="real_indices is empty"):
        digits_and_others(np.zeros(0, np.int64), seed=0, split="train")


def test_letters_take_the_place_of_strokes_where_digits_are_too_few():
    ones = np.flatnonzero(real_digits()[1] == 1)[:6]
    few = digits_and_others(ones, seed=0, split="train", rendered_share=0)
    assert few.origins.tolist() == ["real"] * 6 + ["letters"] * 4


def test_bitmaps_count_back_to_the_images_they_were_laid_out_from():
    images = real_digits()[0]
    assert (block_counts(bitmaps(images)) == images).all()


def test_strokes_keep_the_ink_of_their_digit():
    images, labels = real_digits()
    made = make(len(MAKINGS) * 10, images=images, labels=labels, rng=np.random.default_rng(0))
    assert (made.images.sum((1, 2)) == images.sum((1, 2))[made.parents[:, 0]]).all()


def test_strokes_that_the_filter_kept_are_not_taken_for_digits_and_digits_are():
    images, labels = real_digits()
    made = recombine(200, images=images[TRAIN], labels=labels[TRAIN], rng=np.random.default_rng(0))
    assert len(made.images) == 200
    unseen = digit_margin(np.concatenate([images[TEST], made.images]), images[TRAIN], made.images)
    handled = digit_margin(normalised(bitmaps(images[TEST]), images[TEST].sum((1, 2))), images[TRAIN], made.images)
    assert (unseen[: len(TEST)] > 0).mean() > 0.97
    assert (unseen[len(TEST) :] < 0).mean() > 0.97
    assert (handled > 0).mean() > 0.97
