"""What lies at a path decides which data source reads it; unclear paths are refused with what to do."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

import tuneforge as tf
from tuneforge.plugin import data_path
from tuneforge.plugin.data_path import choose_model, infer_data, is_data_path


def add_images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "names", [("moss/1.png", "rust/2.jpg"), ("train/moss/1.png", "val/moss/2.png"), ("a/b/1.png",)]
)
def test_folders_of_images_are_read_as_such(place, names):
    add_images(place / "photos", *names, ".hidden/1.png", "__MACOSX/moss/1.png")
    (place / "photos/.notes.csv").write_text("x")
    found = infer_data("photos")
    assert (found.kind, found.name, found.options) == ("images", "image-folder", {"path": "photos"})
    assert found.describe().endswith("of images; the same as --data image-folder --data.path photos")


@pytest.mark.parametrize(
    ("content", "name", "options"),
    [
        ("file,class\nm/1.png,a\nm/2.png,b\n", "image-csv", {"image": "file", "label": "class"}),
        ("rooms;price;target\n1;2,5;x\n2;3,5;y\n", "table-csv", {"target": "target"}),
        ("a\tLabel\n1\tx\n", "table-csv", {"target": "Label"}),
        ("id,y\nm/1.png gone,1\n", "table-csv", {"target": "y"}),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_is_of_images_or_of_cells(place, content, name, options, suffix):
    add_images(place, "m/1.png", "m/2.png")
    path = place / f"list{suffix}"
    path.write_text(content)
    found = infer_data(path)
    assert (found.name, found.options) == (name, {"path": str(path), **options})


def test_a_target_that_the_user_names_is_not_inferred(place):
    (place / "houses.csv").write_text("label,target,rooms\n1,2,3\n")
    with pytest.raises(tf.UsageError, match=r"not clear which column.*label and target may all be meant"):
        infer_data("houses.csv")
    assert infer_data("houses.csv", given=["target"]).options == {"path": "houses.csv"}


def test_texts_need_their_plugin(place, monkeypatch):
    monkeypatch.setattr(data_path.registry, "list_components_of_group", lambda group: ())
    for name in ("a/1.txt", "b/2.txt"):
        (place / "texts" / name).parent.mkdir(parents=True)
        (place / "texts" / name).write_text("some words")
    (place / "texts.csv").write_text("review,label\nthe food was very good,yes\nno one came to us,no\n")
    for path in ("texts", "texts.csv"):
        with pytest.raises(tf.UsageError, match="pip install tuneforge-transformers"):
            infer_data(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "is an empty folder"),
        (("1.png", "2.png"), "has images but no folder per class"),
        (("a/1.png", "list.csv"), r"may be read in several ways.*1 image and 1 table.*name the table, --data"),
        (("a.csv", "b.csv"), r"may be read in several ways.*2 tables"),
        (("a/1.png", "a/1.txt"), "has 1 image and 1 text file"),
        (("a/1.xyz",), r"has no images, texts or tables.*1 \.xyz"),
    ],
)
def test_unclear_folders_are_refused(place, names, message):
    (place / "data").mkdir()
    for name in names:
        if name.endswith(".png"):
            add_images(place / "data", name)
        else:
            (place / "data" / name).parent.mkdir(exist_ok=True)
            (place / "data" / name).write_text("x")
    with pytest.raises(tf.DataError, match=message):
        infer_data("data")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data.zip", "is an archive"),
        ("one.png", "is a single image"),
        ("table.parquet", "is a Parquet file, which is not read yet"),
        ("book.xlsx", "of no known kind"),
        ("gone.csv", "no"),
    ],
)
def test_unusable_files_are_refused(place, name, message):
    if name != "gone.csv":
        (place / name).write_bytes(b"x")
    with pytest.raises(tf.DataError, match=message):
        infer_data(name)


def test_an_installed_name_wins_and_the_folder_is_named(place):
    (place / "digits").mkdir()
    assert not is_data_path("digits")
    assert "the folder of that name is ./digits" in data_path.note_shadowed_path("digits")
    assert data_path.note_shadowed_path("glyphs") == ""
    assert all(map(is_data_path, ["./digits", place / "digits", "~/photos", "/photos", "houses.csv"]))
    assert not any(map(is_data_path, ["photos", "mine:Data", "", None]))


@pytest.mark.parametrize(
    ("here", "arch", "line"),
    [
        ({"resnet50": "a cache"}, "resnet50", r"weights are on this machine \(a cache\)"),
        ({"resnet18": "one", "efficientnet_b0": "two"}, "efficientnet_b0", r"\(two\)"),
        ({}, "efficientnet_b0", r"so they are downloaded.*tuneforge\[photos\]"),
    ],
)
def test_photographs_get_the_first_backbone_whose_weights_are_here(monkeypatch, here, arch, line):
    class Backbone:
        find_local_weights = staticmethod(here.get)

    known = data_path.registry.list_components_of_group("model_adapt")
    entries = tuple(entry for entry in known if entry.name == "torchvision")
    monkeypatch.setattr(data_path.registry, "list_components_of_group", lambda group: entries)
    monkeypatch.setattr(data_path.registry, "load_component", lambda entry: Backbone)
    model, why = choose_model("images")
    assert model == {"name": "torchvision", "arch": arch}
    assert re.search(line, why)


def test_a_path_in_python_trains_the_model_and_the_strategy_that_suit_it(place):
    x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    np.savez(place / "points.npz", x=x, y=(x[:, 0] > 0).astype(int))
    lines = []
    result = tf.Engine(data="points.npz", out=place / "run", page=False, log=lines.append).run()
    assert lines[1:3] == [
        "data: 'points.npz' is a file of arrays; the same as --data npz --data.path points.npz",
        "strategy: full, because the model has no pretrained weights",
    ]
    assert [step.name for step, _ in result.strategy_steps] == ["all"]
    named = tf.Engine(
        data=tf.use("npz", path="points.npz"), model="mlp", strategy="full", out=place / "named", page=False
    ).run()
    assert named.report["splits"] == result.report["splits"]


@pytest.mark.parametrize(("model", "strategy"), [("mlp", "full"), ("digit-cnn", "freeze-then-unfreeze")])
def test_the_default_strategy_depends_on_pretrained_weights(model, strategy):
    assert tf.Engine(data="digits", model=model).config.strategy.name == strategy
    assert tf.Engine(data="digits", model=model, strategy="lp-ft").config.strategy.name == "lp-ft"


def test_random_weights_by_option_get_the_strategy_full():
    assert tf.Engine(data="digits", model=tf.use("digit-cnn", pretrained=False)).config.strategy.name == "full"
