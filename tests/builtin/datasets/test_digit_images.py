"""`digits` and `glyphs`: the images that ship, how they are shared out, and distortions of them."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import attrs
import matplotlib
import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from tuneforge import Data, DataError, Split
from tuneforge.builtin.datasets.demo import digit_images
from tuneforge.builtin.datasets.demo.digit_images import (
    CHARACTER_IMAGES,
    CHARACTERS,
    character_images,
    distort,
    real_digits,
    render_families,
)
from tuneforge.builtin.datasets.demo.digits import Digits, Glyphs, stored_images

ORIGINS = ("real", "rendered", "letters", "strokes")
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def digits(seed: int = 0, **options) -> Data:
    return Digits(**options).data_prepare(SimpleNamespace(data_seed=seed))


def glyphs(seed: int = 0, **options) -> Data:
    return Glyphs(**options).data_prepare(SimpleNamespace(data_seed=seed))


def of_origin(split: Split, *origins: str) -> torch.Tensor:
    """Rows of the samples whose ids begin with one of the origins."""
    return torch.tensor([row for row, name in enumerate(split.ids) if name.split("/")[0] in origins])


def pixels(split: Split) -> torch.Tensor:
    return split.fetch(torch.arange(len(split)))


@pytest.fixture(scope="module")
def default() -> Data:
    return digits()


def test_the_shipped_file_is_under_one_megabyte():
    assert CHARACTER_IMAGES.stat().st_size < 1_000_000


def test_shipped_images_are_counts_of_ink_from_0_to_16():
    shipped = character_images()
    for images in (shipped.glyphs, shipped.digits, shipped.others, shipped.control, shipped.strokes):
        assert images.shape[-2:] == (8, 8)
        assert (images.min(), images.max()) == (0, 16)


def test_three_fifths_are_digits_and_two_fifths_others(default):
    splits = (default.train, default.val, default.test)
    counts = {origin: sum(len(of_origin(split, origin)) for split in splits) for origin in ORIGINS}
    assert counts == {"real": 1797, "rendered": 450, "letters": 899, "strokes": 599}
    assert [len(split) for split in splits] == [2432, 563, 750]
    assert default.targets.labels == (*"0123456789", "other")


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_any_fraction_of_others_is_exact_to_the_nearest_image_in_each_split(share):
    data = digits(other_share=share)
    for split in (data.train, data.val, data.test):
        assert abs((split.targets == 10).sum() - share * len(split)) <= 0.5


def test_without_others_there_are_ten_classes_of_real_digits():
    data = digits(other_share=0)
    images, labels = real_digits()
    rows = [int(name.removeprefix("real/")) for name in data.test.ids]
    assert data.targets.labels == tuple("0123456789")
    assert data.test.targets.tolist() == labels[rows].tolist()
    assert not data.extra_test_splits
    assert torch.equal(pixels(data.test), stored_images(images[rows]))


def test_origin_and_class_agree(default):
    train = default.train
    assert (train.targets[of_origin(train, "letters", "strokes")] == 10).all()
    assert (train.targets[of_origin(train, "real", "rendered")] < 10).all()
    rendered = torch.bincount(train.targets[of_origin(train, "rendered")])
    assert rendered.max() - rendered.min() <= 1


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data(default):
    assert digits().train.fingerprint() == default.train.fingerprint()
    other = digits(seed=1)
    assert set(other.train.ids) != set(default.train.ids)


def test_ids_are_unique_and_splits_share_no_image(default):
    splits = (default.train, default.val, default.test, default.extra_test_splits["unseen font"])
    ids = [name for split in splits for name in split.ids]
    assert len(set(ids)) == len(ids)
    images = [{image.numpy().tobytes() for image in pixels(split)} for split in splits]
    assert len(set.union(*images)) == sum(map(len, images))


@pytest.mark.parametrize("options", [{}, {"other_share": 0.9}, {"val": 0.02, "test": 0.02}])
def test_no_stroke_comes_from_a_digit_of_another_split(options):
    data = digits(**options)
    sources = character_images().sources
    for split in (data.train, data.val, data.test):
        real = {int(split.ids[row].split("/")[1]) for row in of_origin(split, "real")}
        strokes = [int(split.ids[row].split("/")[2]) for row in of_origin(split, "strokes")]
        assert strokes
        assert set(sources[strokes].ravel().tolist()) <= {-1, *real}


def test_each_transform_keeps_its_fraction_of_the_strokes_in_each_split(default):
    shares = character_images().transform_shares
    for split in (default.train, default.val, default.test):
        transforms = [split.ids[row].split("/")[1] for row in of_origin(split, "strokes")]
        for name, share in shares.items():
            assert abs(transforms.count(name) - share * len(transforms)) < 3


def test_images_that_are_used_again_are_distorted_and_stay_in_their_split():
    data = digits(other_share=0.9)
    images = [{name.split("/")[2] for name in split.ids if "letters/" in name} for split in (data.train, data.test)]
    assert not images[0] & images[1]
    again = [row for row, name in enumerate(data.train.ids) if name.count("/") == 3]
    assert len({image.numpy().tobytes() for image in pixels(data.train)}) > 0.999 * len(data.train)
    assert len(again) > 1000


def test_ambiguous_characters_are_not_among_the_others(default):
    drawn = {default.train.ids[row].split("/")[1] for row in of_origin(default.train, "letters")}
    assert drawn == set(character_images().other_characters)
    assert not drawn & set("0123456789ODQIlijJzZsSGbTBgq")
    assert "O Q S" in default.notes[1]


def test_control_digits_are_ten_classes_in_equal_parts(default):
    assert default.extra_test_splits["unseen font"].targets.bincount().tolist() == [50] * 10


def test_per_class_takes_as_many_training_images_of_each_class():
    data = digits(per_class=7, other_share=0)
    assert data.train.targets.bincount().tolist() == [7] * 10
    assert data.notes == ("images by origin: 700 real",)
    assert digits(per_class=7).train.targets.bincount().tolist() == [7] * 11
    with pytest.raises(DataError, match="training images, fewer than 500"):
        digits(per_class=500)


def test_a_simple_model_tells_digits_from_others_and_knows_the_held_out_family(default):
    def features(split: Split) -> np.ndarray:
        return torch.nn.functional.avg_pool2d(pixels(split).float() / 255, 4).flatten(1).numpy()

    model = SVC(C=10, gamma=0.1).fit(features(default.train), default.train.targets)

    def accuracy(split: Split) -> float:
        return float((model.predict(features(split)) == split.targets.numpy()).mean())

    assert accuracy(default.extra_test_splits["real digits"]) > 0.96
    for origin in ("letters", "strokes"):
        assert accuracy(default.test.subset(of_origin(default.test, origin))) > 0.9
    assert accuracy(default.extra_test_splits["unseen font"]) > 0.85


def test_letters_take_the_place_of_strokes_where_digits_are_too_few(monkeypatch):
    shipped = character_images()
    none = attrs.evolve(shipped, sources=np.full_like(shipped.sources, 5000))
    monkeypatch.setattr(digit_images, "character_images", lambda: none)
    data = digits()
    assert not len(of_origin(data.train, "strokes"))
    assert (data.train.targets == 10).sum() == 973


# -- glyphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [620, 30_000, 40_001])
def test_glyphs_are_62_classes_in_equal_parts_of_every_split(count):
    data = glyphs(count=count)
    assert data.targets.labels == tuple(CHARACTERS)
    assert [len(split) for split in (data.train, data.val, data.test)] == np.diff(
        [round(share * count) for share in (0, 0.8, 0.9, 1)]
    ).tolist()
    for split in (data.train, data.val, data.test):
        counts = split.targets.bincount(minlength=62)
        assert counts.max() - counts.min() <= (2 if count <= 30_132 else 4)


def test_glyphs_beyond_those_that_ship_are_distorted_and_stay_in_their_split():
    data = glyphs(count=40_000)
    rows = [{name.split("/")[2] for name in split.ids} for split in (data.train, data.val, data.test)]
    assert not rows[0] & rows[1]
    assert not (rows[0] | rows[1]) & rows[2]
    assert sum(map(len, rows)) == 30_132
    assert not any(name.count("/") == 3 for name in glyphs(count=30_000).train.ids)


def test_another_seed_draws_other_glyphs():
    assert set(glyphs(count=620).train.ids) != set(glyphs(count=620, seed=1).train.ids)


def test_families_of_further_fonts_are_as_frequent_as_those_that_ship(tmp_path, monkeypatch):
    shutil.copy(FONTS / "DejaVuSans.ttf", tmp_path / "another.ttf")
    shutil.copy(FONTS / "STIXGeneral.ttf", tmp_path / "innocent.ttf")
    shutil.copy(FONTS / "cmr10.ttf", tmp_path)
    shutil.copy(FONTS / "DejaVuSansDisplay.ttf", tmp_path / "few.ttf")
    families = render_families([tmp_path])
    assert {family: images.shape for family, images in families.items()} == {"DejaVu Sans": (62, 1, 8, 8)}
    monkeypatch.setattr(digit_images, "render_families", lambda _: {"New": families["DejaVu Sans"]})
    data = glyphs(count=62 * 70, fonts=(tmp_path,))
    assert "New" in data.notes[0]
    drawn = [int(name.split("/")[2]) % 7 for split in (data.train, data.val, data.test) for name in split.ids]
    assert np.bincount(drawn).tolist() == [620] * 7


def test_rendered_fonts_resemble_the_glyphs_that_ship(tmp_path):
    shutil.copy(FONTS / "DejaVuSerif.ttf", tmp_path / "serif.ttf")
    (images,) = render_families([tmp_path]).values()
    shipped = character_images().glyphs.reshape(62, -1, 64).mean(1)
    distances = ((images[:, 0].reshape(62, 1, 64) - shipped[None]) ** 2).sum(2)
    assert (distances.argsort(axis=1)[:, :3] == np.arange(62)[:, None]).any(axis=1).mean() > 0.8


def test_a_missing_font_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        glyphs(fonts=(tmp_path / "nowhere",))


# -- distortion ------------------------------------------------------------------------------------------------------


def test_no_distortion_gives_the_image_back():
    images = real_digits()[0][:50]
    assert (distort(images, np.random.default_rng(0), strength=0) == images).all()


def test_a_distortion_keeps_the_ink_but_not_the_pixels():
    images = character_images().glyphs[:, :20, 0].reshape(-1, 8, 8)
    variants = distort(images, np.random.default_rng(0))
    assert (variants != images).any(axis=(1, 2)).all()
    ink, ink_before = variants.sum((1, 2), dtype=int), images.sum((1, 2), dtype=int)
    assert (abs(ink / ink_before - 1) < 0.16).all()
    assert abs(ink.mean() - ink_before.mean()) < 4


def test_a_distortion_does_not_depend_on_how_many_follow():
    images = real_digits()[0]
    short, long = (distort(images[:count], np.random.default_rng(3)) for count in (1100, 1300))
    assert (short == long[:1100]).all()
