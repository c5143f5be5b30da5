"""Image folders as users have them: links, leftovers of archives, a folder too high, other formats, huge photos."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from tuneforge import DataError
from tuneforge.builtin.datasets.images.image_files import find_images_in_folder
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.plugin import scan_images

LINKS = "a link to another place in the same data"


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not opened here")


def pets(root: Path) -> Path:
    write(*(root / name / f"{number}.png" for name in ("cat", "dog") for number in range(3)))
    return root


def labels(root: Path) -> Counter[str]:
    listing = find_images_in_folder(root, where="--data.path").by_split["train"]
    names = list(listing.classes)
    return Counter(names[code] for code in listing.class_indices)


@pytest.mark.parametrize(
    ("link", "target"),
    [("cat/more", "../dog"), ("cat/up", ".."), ("dog/5.png", "../cat/0.png"), ("dog/again", "."), ("kitten", "cat")],
)
def test_a_link_inside_the_data_gives_no_image_a_second_label(tmp_path: Path, link: str, target: str) -> None:
    root = pets(tmp_path / "pets")
    (root / link).symlink_to(target)
    assert labels(root) == {"cat": 3, "dog": 3}
    assert any(LINKS in note for note in find_images_in_folder(root, where="").notes)


def test_a_link_to_a_parent_of_the_data_is_not_followed(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets")
    write(tmp_path / "unrelated.png")
    (root / "cat" / "all").symlink_to(tmp_path)
    assert labels(root) == {"cat": 3, "dog": 3}


def test_links_to_images_that_are_listed_nowhere_else_are_followed(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets")
    write(root / ".store" / "1.png", tmp_path / "elsewhere" / "2.png")
    (root / "cat" / "7.png").symlink_to("../.store/1.png")
    (root / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    assert labels(root) == {"cat": 4, "dog": 4}
    (root / "fox").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"'dog' and 'fox' hold the same images"):
        labels(root)


def test_a_class_of_links_alone_is_refused_by_name(tmp_path: Path) -> None:
    root = pets(tmp_path / "pets")
    (root / "fox").mkdir()
    (root / "fox" / "0.png").symlink_to("../dog/0.png")
    with pytest.raises(DataError, match=f"class 'fox' has no images.*{LINKS}"):
        labels(root)


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "$RECYCLE.BIN"])
def test_folders_of_archives_and_systems_are_hidden(tmp_path: Path, name: str) -> None:
    root = pets(tmp_path / "pets")
    write(root / name / "cat" / "._0.png", root / "cat" / name / "1.png")
    assert labels(root) == {"cat": 3, "dog": 3}


@pytest.mark.parametrize("below", ["flowers", "flowers/train"])
def test_a_folder_too_high_is_answered_with_the_right_one(tmp_path: Path, below: str) -> None:
    pets(tmp_path / "parent" / below)
    pets(tmp_path / "parent" / "flowers" / "test")
    (tmp_path / "parent" / "notes").mkdir()
    with pytest.raises(DataError) as caught:
        labels(tmp_path / "parent")
    assert f"'{tmp_path / 'parent' / 'flowers'}', which holds" in caught.value.fix
    (tmp_path / "parent" / "notes").rmdir()
    with pytest.raises(DataError, match="one folder with images") as caught:
        labels(tmp_path / "parent")
    assert f"'{tmp_path / 'parent' / 'flowers'}', which holds" in caught.value.fix


def test_formats_that_are_not_supported_are_refused_by_name_and_not_left_out(tmp_path: Path) -> None:
    for name, brand in (("a.heic", b"heic"), ("b.avif", b"avif")):
        (tmp_path / name).write_bytes(b"\0\0\0\x20ftyp" + brand + b"\0" * 40)
    heic, avif = scan_images([str(tmp_path / "a.heic"), str(tmp_path / "b.avif")])
    assert "HEIC" in heic.why
    assert "supported are PNG, JPEG" in heic.why
    assert avif.why
    write(tmp_path / "pets" / "cat" / "0.heic", tmp_path / "pets" / "dog" / "0.jfif")
    assert labels(tmp_path / "pets") == {"cat": 1, "dog": 1}


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (32, 24), (200, 30, 40)).save(tmp_path / "a.avif")
    assert ImageInputs().decode(tmp_path / "a.avif").shape == (3, 24, 32)
    assert next(iter(scan_images([str(tmp_path / "a.avif")]))).format.startswith("AVIF")


def test_the_limit_is_on_the_size_at_which_a_jpeg_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL's own check, which counts all pixels of the file
    pixels = np.full((400, 600, 3), 90, np.uint8)
    files = {}
    for name in ("JPEG", "PNG"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format=name)
        files[name] = file.getvalue()
    small = ImageInputs(ops=("resize 16x16",), max_pixels=20_000)
    assert abs(int(small.decode(files["JPEG"]).float().mean()) - 90) <= 1
    with pytest.raises(DataError, match="too large or too long: 600x400"):
        small.decode(files["PNG"])
    with pytest.raises(DataError, match="too large"):
        ImageInputs(ops=("resize 16x16",), max_pixels=20_000, jpeg_margin=0).decode(files["JPEG"])
    assert ImageInputs(ops=("resize 16x16",), max_pixels=240_000).decode(files["PNG"]).shape == (3, 16, 16)


def test_a_directory_stands_for_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    expected = [tmp_path / name for name in ("a.png", "b/1.png", "b/2.png")]
    write(*reversed(expected))
    for folder in (tmp_path, str(tmp_path)):
        assert list(ImageInputs().expand_directories([folder, b"content"])) == [*expected, b"content"]


def test_no_note_speaks_of_entries_that_are_not_there(tmp_path: Path) -> None:
    for part in ("train", "val"):
        pets(tmp_path / part)
    (tmp_path / "train" / "cat" / ".hidden").write_bytes(b"")
    assert find_images_in_folder(tmp_path, where="--data.path").notes == ("skipped because hidden: 1 entry",)
