"""Classes with one or two samples, and splits that are empty because the user asked for it."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import StubRun, blobs, tiny_data, tiny_net
from torch.utils.data import TensorDataset

import tuneforge as tf
from tuneforge.builtin.datasets.images.image_datasets import ImageFolder
from tuneforge.builtin.datasets.tables.table_csv import TableCsv
from tuneforge.engine.session.messages import format_batches, format_data
from tuneforge.sklearn import data_from_arrays

COUNTS = {"ash": 12, "elm": 12, "fir": 2, "oak": 1}
LABELS = [name for name, count in COUNTS.items() for _ in range(count)]
X = np.arange(4 * len(LABELS)).reshape(-1, 4) / 7


@pytest.fixture(params=["arrays", "dataset", "table", "images"])
def prepare(request, tmp_path):
    """The same classes as each kind of data."""

    def arrays(**options):
        return data_from_arrays(X, LABELS, **options)

    def dataset(**options):
        rows = TensorDataset(torch.from_numpy(X), torch.tensor([[*COUNTS].index(name) for name in LABELS]))
        return data_from_arrays(torch.utils.data.Subset(rows, range(len(LABELS))), **options)

    def table(**options):
        with (tmp_path / "t.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["a", "b", "c", "d", "y"], *([*x, y] for x, y in zip(X, LABELS, strict=True))])
        return TableCsv(path=tmp_path / "t.csv", target="y", **options)

    def images(**options):
        for row, name in enumerate(LABELS):
            (tmp_path / "trees" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), row).save(tmp_path / "trees" / name / f"{row}.png")
        return ImageFolder(path=tmp_path / "trees", size=4, grayscale=True, **options)

    makers = {"arrays": arrays, "dataset": dataset, "table": table, "images": images}
    return lambda **options: makers[request.param](**options).data_prepare(StubRun)


def counts(data):
    size = len(data.targets.labels)
    return {name: split.targets.bincount(minlength=size).tolist() for name, split in data.splits().items()}


def test_a_rare_class_is_an_error_that_names_the_option(prepare):
    with pytest.raises(tf.DataError, match="--data.rare-classes train.*--data.rare-classes drop"):
        prepare()


def test_rare_classes_are_trained_on_or_dropped(prepare):
    data = prepare(rare_classes="train", val=0.25, test=0.25)
    assert counts(data) == {"train": [6, 6, 2, 1], "val": [3, 3, 0, 0], "test": [3, 3, 0, 0]}
    assert any("fir" in note or "'2' (2)" in note for note in data.notes)
    data = prepare(rare_classes="drop", val=0.25, test=0.25)
    assert counts(data) == {"train": [6, 6], "val": [3, 3], "test": [3, 3]}
    assert any("left out" in note for note in data.notes)


def test_a_class_of_two_is_enough_for_two_splits(prepare):
    data = prepare(rare_classes="drop", val=0, test=0.25)
    assert counts(data) == {"train": [9, 9, 1], "val": [0, 0, 0], "test": [3, 3, 1]}


@pytest.mark.parametrize("empty", ["val", "test"])
def test_a_split_may_be_empty_where_asked(prepare, empty):
    data = prepare(rare_classes="drop", **{"val": 0.25, "test": 0.25, empty: 0})
    assert len(data.splits()[empty]) == 0
    assert len(prepare(val=0, test=0).train) == len(LABELS)


def all_data():
    return tf.Data(
        train=blobs(96, seed=1),
        val=blobs(30, seed=2).subset(torch.arange(0)),
        test=blobs(30, seed=3).subset(torch.arange(0)),
        inputs=tiny_data().inputs,
        targets=tiny_data().targets,
    )


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_a_run_without_validation_and_test_trains_and_reports(tune, cache):
    steps = [tf.Phase("head", train="head", epochs=1), tf.HeadFit("fit"), tf.Phase("all", train="all", epochs=2)]
    result = tune(steps, data=all_data(), cache=cache, page=True)
    assert result.report["num_samples"] == {"train": 96, "val": 0, "test": 0}
    assert result.report["splits"] == {"val": {}, "test": {}}
    assert [len(step_result.history) for _, step_result in result.strategy_steps] == [1, 0, 2]
    with_val = tune(steps, data=tiny_data(), cache=cache)
    assert torch.equal(result.model.module.head.weight, with_val.model.module.head.weight)
    assert (result.run_dir / "report.html").exists()


@pytest.mark.parametrize(
    "step",
    [
        tf.Phase("p", train="head", epochs=2, restore_best=True),
        tf.Phase("p", train="head", epochs=2, patience=1),
        tf.Phase("p", train="head", epochs=2, monitor="accuracy"),
        tf.Diagnosis("p", measure="features"),
    ],
)
def test_a_step_that_decides_by_an_empty_split_is_refused_before_training(tune, step):
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(tf.DataError, match="'p' needs a validation split"):
        tune([tf.Phase("first", train="all", epochs=1), step], data=all_data(), model=net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_an_empty_training_split_is_refused():
    data = tiny_data()
    none = data.val.subset(torch.arange(0))
    with pytest.raises(tf.DataError, match="training split is empty"):
        tf.Data(train=none, val=data.val, test=data.test, inputs=data.inputs, targets=data.targets)


def test_classes_that_differ_only_in_spelling_are_named():
    labels = ["yes", "No", "Yes", "NO", "käse", "ka\u0308se", "nö"]
    data = data_from_arrays(np.zeros((70, 1)), labels * 10).data_prepare(StubRun)
    line = next(line for line in format_data("x", data) if line.startswith("warning"))
    assert all(pair in line for pair in ("'Yes' and 'yes'", "'NO' and 'No'", "'ka\u0308se' and 'käse'"))
    assert "nö" not in line


@pytest.mark.parametrize(("size", "noted"), [(24, True), (25, True), (23, False)])
def test_a_batch_that_holds_the_whole_training_split_is_noted(size, noted):
    lines = list(format_batches(24, size))
    assert bool(lines) == noted
    assert all("--batch-size" in line and "one step" in line for line in lines)


def test_a_class_called_na_is_kept_on_request(tmp_path):
    rows = [f"{number},{['DE', 'FR', 'NA'][number % 3]}" for number in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(["a,country", *rows]))
    with pytest.raises(tf.DataError, match=r"(?s)'NA'.*--data.missing-target keep"):
        TableCsv(path=tmp_path / "t.csv", target="country").data_prepare(StubRun)
    data = TableCsv(path=tmp_path / "t.csv", target="country", missing_target="keep").data_prepare(StubRun)
    assert data.targets.labels == ("DE", "FR", "NA")
    (tmp_path / "t.csv").write_text("\n".join(["a,country", *rows, "31,"]))
    with pytest.raises(tf.DataError, match="1 row"):
        TableCsv(path=tmp_path / "t.csv", target="country", missing_target="keep").data_prepare(StubRun)
