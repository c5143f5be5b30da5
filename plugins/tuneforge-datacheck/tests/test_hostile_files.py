"""`tuneforge data check` lists every file, whatever its name and content, and undoes what a run has quarantined."""

import json
import os

import numpy as np
import pytest
from hostile_images import encoded, make_image, named, plant, special
from PIL import Image
from tuneforge_datacheck import quarantine
from tuneforge_datacheck.files import list_files

from tuneforge.__main__ import main
from tuneforge.builtin.datasets.images import file_check, image_files
from tuneforge.errors import escape_name


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    small.resize((56, 56), Image.Resampling.BICUBIC).save(path, format="PNG")


@pytest.fixture
def photos(tmp_path):
    """Two classes of eight images, one of which is truncated."""
    for number, label in enumerate("ab"):
        for index in range(8):
            write_image(tmp_path / "photos" / label / f"{index}.png", 10 * number + index)
    path = tmp_path / "photos" / "a" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])
    return tmp_path / "photos"


def test_every_file_has_a_line_and_the_report_contains_no_markup_of_file_names(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    expected = plant(root / "class a", [*named(), *special()])
    (root / "class b").mkdir()
    (root / "class b" / "one.png").write_bytes(encoded(make_image(50)))
    assert main(["data", "check", "data", "--show-all"]) == 65
    lines = capsys.readouterr().out.splitlines()
    for name in expected:
        assert sum(line.startswith(f"class a/{escape_name(name)}: ") for line in lines) >= 1, name
    assert all(line.isprintable() for line in lines)
    assert "class a/fifo.png: it is a FIFO, not a file; exclude" in lines
    assert json.loads((tmp_path / "data-check" / "issues.json").read_text())["files"] == len(expected) + 1
    html = (tmp_path / "data-check" / "issues.html").read_text()
    assert "<script" not in html
    assert '"onerror=' not in html
    assert "49.png" not in html
    assert set(os.listdir(tmp_path)) == {"data", "data-check"}


def test_undo_moves_quarantined_files_back(photos, tmp_path, capsys):
    content = (photos / "a" / "3.png").read_bytes()
    quick = ["--strategy", "head-only", "--strategy.epochs", "1", "--data.size", "32", "--no-page"]
    data = ["--data", "image-folder", "--data.path", str(photos), "--data.on-error", "quarantine"]
    assert main(["run", *data, *quick, "--out", str(tmp_path / "run")]) == 0
    assert not (photos / "a" / "3.png").exists()
    capsys.readouterr()
    assert main(["data", "check", str(photos), "--undo", "--out", str(tmp_path / "out")]) == 0
    assert "moved back: a/3.png" in capsys.readouterr().out
    assert (photos / "a" / "3.png").read_bytes() == content
    assert not (photos / ".quarantine").exists()


def test_undo_overwrites_no_file(photos, tmp_path):
    file_check.quarantine_files(photos, {"a/3.png": "it is broken"})
    write_image(photos / "a" / "3.png", 99)
    content = (photos / "a" / "3.png").read_bytes()
    assert quarantine.restore_quarantined_files(photos) == []
    assert (photos / "a" / "3.png").read_bytes() == content
    assert len(list((photos / ".quarantine").iterdir())) == 2


def test_near_duplicate_across_splits_is_in_the_duplicates_of_the_issues_file(tmp_path):
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        for number, label in enumerate("ab"):
            for index in range(count):
                seed = 100 * number + 10 * ["train", "val", "test"].index(split) + index
                write_image(tmp_path / "d" / split / label / f"{index}.png", seed)
    (tmp_path / "d/test/a/0.png").write_bytes((tmp_path / "d/train/a/1.png").read_bytes())
    near = Image.open(tmp_path / "d/train/b/2.png").resize((64, 64), Image.Resampling.BICUBIC)
    near.save(tmp_path / "d/test/b/1.png")
    assert main(["data", "check", str(tmp_path / "d"), "--out", str(tmp_path / "out")]) == 65
    groups = json.loads((tmp_path / "out" / "issues.json").read_text())["duplicates"]
    assert {frozenset(group) for group in groups} == {
        frozenset({"train/a/1.png", "test/a/0.png"}),
        frozenset({"train/b/2.png", "test/b/1.png"}),
    }


def test_files_splits_and_quarantine_are_those_of_the_image_datasets(tmp_path):
    assert (quarantine.QUARANTINE_DIR, quarantine.QUARANTINE_LOG) == (
        file_check.QUARANTINE_DIR,
        file_check.QUARANTINE_LOG,
    )
    for name in ("Training/a/1.png", "Training/b/x/2.jpg", "dev/a/3.png", "other/4.png", "5.png", "Training/c.txt"):
        write_image(tmp_path / name, 0) if not name.endswith("txt") else (tmp_path / name).write_text("")
    _, files = list_files(tmp_path)
    used = {(file.split, file.name, file.label) for file in files if not file.unused_reason}
    index = image_files.find_images_in_folder(tmp_path, where="--data.path")
    assert used == {
        (split, name, list(listing.classes)[code])
        for split, listing in index.by_split.items()
        for name, code in zip(listing.names, listing.class_indices, strict=True)
    }
