"""The generator of the images that ship: `examples/render_characters.py` and its package `characters`."""

import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tuneforge as tf
from tuneforge.builtin.datasets.demo.digit_images import CHARACTER_IMAGES, CHARACTERS, character_images, real_digits
from tuneforge.exporting import load_tensors

EXAMPLES = Path(tf.__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))

from characters.bitmaps import block_counts, bounds, deepest, distances, thin  # noqa: E402 - from the path above
from characters.fonts import find_fonts  # noqa: E402
from characters.glyphs import glyph_images, render  # noqa: E402
from characters.strokes import TRANSFORMS, bitmaps, digit_margin, make, normalized, recombine  # noqa: E402
from render_characters import OTHER_CHARACTERS, write  # noqa: E402

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def rendered() -> np.ndarray:
    return render(np.array(list("0123456789"))[np.arange(2000) % 10], find_fonts(), seed=0, stream="test")[0]


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    return load_digits().images


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of character images, decompressed."""
    tensors, metadata = load_tensors(path)
    return {
        name: np.frombuffer(zlib.decompress(tensors[name].numpy().tobytes()), np.uint8).reshape(shape)
        for name, shape in metadata["shapes"].items()
    }


@pytest.mark.slow
def test_the_script_draws_the_images_that_ship(tmp_path):
    """`--check` compares bytes, which are the same on one machine; another CPU may choose a few other strokes."""
    write(tmp_path / "again.safetensors")
    again, shipped = (load_tensors(path)[1] for path in (tmp_path / "again.safetensors", CHARACTER_IMAGES))
    if again["versions"] != shipped["versions"]:
        pytest.skip(f"the file was drawn by {shipped['versions']}")
    arrays = tensors_of(CHARACTER_IMAGES)
    for name, drawn in tensors_of(tmp_path / "again.safetensors").items():
        images = [{image.tobytes() for image in array.reshape(-1, 64)} for array in (drawn, arrays[name])]
        assert len(images[0] & images[1]) > 0.99 * len(images[0] | images[1])


def test_the_characters_of_the_script_are_those_that_ship():
    shipped = character_images()
    assert shipped.other_characters == OTHER_CHARACTERS
    assert tuple(shipped.transform_shares) == tuple(sorted(TRANSFORMS))
    assert set(shipped.families) == {font.family for font in find_fonts()}


def test_the_same_seed_gives_the_same_bytes_in_another_process_and_pyplot_stays_out():
    code = """if True:
        import sys, zlib
        from characters.glyphs import glyph_images
        print(zlib.crc32(glyph_images(124, seed=3).images.tobytes()), "matplotlib.pyplot" in sys.modules)
    """
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, check=True, text=True, cwd=EXAMPLES).stdout
    assert printed == f"{zlib.crc32(glyph_images(124, seed=3).images.tobytes())} False\n"


def test_another_seed_gives_other_images():
    assert (glyph_images(62, seed=0).images != glyph_images(62, seed=1).images).any(axis=(1, 2)).all()


def test_a_longer_set_begins_with_the_shorter_one():
    short, long = glyph_images(100, seed=5), glyph_images(1300, seed=5)
    assert short.images.tobytes() == long.images[:100].tobytes()
    assert (short.families == long.families[:100]).all()


def test_classes_are_named_by_their_character_and_equally_many():
    glyphs = glyph_images(62 * 3, seed=0)
    assert "".join(glyphs.class_names) == CHARACTERS
    assert np.bincount(glyphs.labels).tolist() == [3] * 62


def test_images_are_counts_of_ink_from_0_to_16(rendered):
    assert rendered.shape == (2000, 8, 8)
    assert rendered.dtype == np.uint8
    assert (rendered.min(), rendered.max()) == (0, 16)


def test_ink_size_and_spread_are_those_of_the_real_digits(rendered, real):
    ink, ink_real = rendered.sum((1, 2)), real.sum((1, 2))
    assert abs(ink.mean() - ink_real.mean()) < 3
    assert abs(ink.std() - ink_real.std()) < 3
    assert abs(rendered.std(0).mean() - real.std(0).mean()) < 0.15
    assert abs((rendered > 0).any(1).sum(1).mean() - (real > 0).any(1).sum(1).mean()) < 0.2
    assert (rendered > 0).any(2).sum(1).mean() == pytest.approx(8, abs=0.01)


def test_the_control_family_is_rendered_only_when_asked_for():
    families = {font.family for font in find_fonts()}
    assert families == {
        "Computer Modern Roman",
        "Computer Modern Sans",
        "Computer Modern Typewriter",
        "DejaVu Sans",
        "DejaVu Sans Mono",
        "DejaVu Serif",
    }
    assert {font.family for font in find_fonts(held_out=True)} == {"STIXGeneral"}
    assert set(glyph_images(1000, seed=0).families) == families


def test_a_further_folder_adds_its_fonts_but_none_of_the_control_family(tmp_path):
    shutil.copy(FONTS / "DejaVuSans.ttf", tmp_path / "another.ttf")
    shutil.copy(FONTS / "STIXGeneral.ttf", tmp_path / "innocent.ttf")
    added = {font.path for font in find_fonts([tmp_path])} - {font.path for font in find_fonts()}
    assert added == {tmp_path / "another.ttf"}


def test_families_are_as_likely_as_one_another_whatever_their_styles():
    families = glyph_images(6000, seed=0).families
    assert all(900 < (families == family).sum() < 1100 for family in set(families))


def test_a_missing_folder_and_a_character_of_no_font_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_fonts([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="'漢'"):
        render(np.array(["漢"]), find_fonts(), seed=0, stream="test")


def test_no_characters_are_no_images():
    assert glyph_images(0, seed=0).images.shape == (0, 8, 8)


def test_block_counts_count_each_block():
    bitmaps = np.zeros((1, 32, 32), bool)
    bitmaps[0, :4, :3] = True
    bitmaps[0, 31, 31] = True
    counts = block_counts(bitmaps)
    assert (counts[0, 0, 0], counts[0, 7, 7], counts.sum()) == (12, 1, 13)


def test_deepest_marks_exactly_as_many_pixels_as_asked():
    fields = np.random.default_rng(0).random((3, 32, 32), dtype=np.float32)
    assert deepest(fields, np.array([1.0, 300.4, 1024.0])).sum((1, 2)).tolist() == [1, 300, 1024]


def test_deepest_takes_the_upper_of_equals():
    (mask,) = deepest(np.zeros((1, 32, 32), np.float32), np.array([40]))
    assert np.flatnonzero(mask).tolist() == list(range(40))


def test_bounds_are_the_edges_of_the_ink():
    masks = np.zeros((1, 32, 32), bool)
    masks[0, 3:10, 5:6] = True
    assert [edge.item() for edge in bounds(masks)] == [3, 10, 5, 6]


def test_distances_are_euclidean():
    mask = np.random.default_rng(0).random((1, 20, 20)) < 0.03
    places = np.argwhere(mask[0])
    grid = np.argwhere(np.ones((20, 20)))
    expected = np.sqrt(((grid[:, None] - places[None]) ** 2).sum(2).min(1)).reshape(20, 20)
    np.testing.assert_allclose(distances(mask)[0], expected, rtol=1e-6)


def test_thin_leaves_a_line_of_one_pixel():
    masks = np.zeros((1, 20, 40), bool)
    masks[0, 8:13, 5:35] = True
    skeleton = thin(masks)[0]
    assert set(np.flatnonzero(skeleton.any(1))) == {10}
    assert 24 <= skeleton.sum() <= 28


# -- strokes ---------------------------------------------------------------------------------------------------------


def test_bitmaps_count_back_to_the_images_they_were_laid_out_from():
    images = real_digits()[0]
    assert (block_counts(bitmaps(images)) == images).all()


def test_strokes_keep_the_ink_of_their_digit():
    images, labels = real_digits()
    made = make(len(TRANSFORMS) * 10, images=images, labels=labels, rng=np.random.default_rng(0))
    assert (made.images.sum((1, 2)) == images.sum((1, 2))[made.parents[:, 0]]).all()


def test_strokes_that_the_filter_kept_are_not_taken_for_digits_and_digits_are():
    images, labels = real_digits()
    train, test = train_test_split(np.arange(1797), train_size=960, stratify=labels, random_state=0)
    made = recombine(200, images=images[train], labels=labels[train], rng=np.random.default_rng(0))
    assert len(made.images) == 200
    unseen = digit_margin(np.concatenate([images[test], made.images]), images[train], made.images)
    handled = digit_margin(normalized(bitmaps(images[test]), images[test].sum((1, 2))), images[train], made.images)
    assert (unseen[: len(test)] > 0).mean() > 0.97
    assert (unseen[len(test) :] < 0).mean() > 0.97
    assert (handled > 0).mean() > 0.97
