"""Public helpers of `tuneforge.exporting`: data prepared again, and metrics without a model."""

import pytest
import torch
from bundles import data, finished
from PIL import Image
from tiny import blobs

import tuneforge as tf
from tuneforge.exporting import (
    BUNDLE,
    ReferenceData,
    compute_metrics,
    export,
    make_forward,
    prepare_bundle_data,
    prepare_data,
    prepare_run_data,
    read_json,
)


@pytest.fixture(scope="module")
def table_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("table")
    (path / "t.csv").write_text("x,y\n" + "".join(f"{n / 100:.2f},{'ab'[n % 20 > 9]}\n" for n in range(200)))
    source = tf.use("table-csv", path=str(path / "t.csv"), target="y")
    settings = {"model": tf.use("mlp", hidden=(8,)), "strategy": [], "page": False, "seed": 3}
    return tf.Engine(data=source, out=path / "run", **settings).run()


def test_bundle_data_have_the_fingerprint_of_the_runs_test_split(table_run, tmp_path):
    record = read_json(export(table_run.run_dir, to=("safetensors",), out=tmp_path / "b") / BUNDLE)
    prepared = prepare_bundle_data(record)
    assert prepared.test.fingerprint() == record["fingerprints"]["test"]
    assert prepare_run_data(tf.load(table_run.run_dir)).test.fingerprint() == prepared.test.fingerprint()
    with pytest.raises(tf.DataError, match="is not what the model was tested on"):
        prepare_bundle_data(record, data())


def test_run_data_that_changed_are_refused(tmp_path):
    run = finished(tmp_path / "run")
    with pytest.raises(tf.DataError, match="the test split is not what the run was made with"):
        prepare_run_data(tf.load(run), data(test=blobs(30, seed=77)))


def test_metrics_of_outputs_equal_those_of_an_evaluation(table_run):
    predictor = tf.load(table_run.run_dir)
    prepared = prepare_data(predictor.run.config.data, config=predictor.run.config)
    split = prepared.test
    outputs = make_forward(predictor)(split.fetch(torch.arange(len(split))))
    metrics = compute_metrics(prepared, "test", outputs, split.targets)
    expected = tf.evaluate(table_run.run_dir)["test"]
    assert set(metrics) == set(expected)
    assert metrics["accuracy"] == expected["accuracy"]


def test_split_knows_the_files_of_its_samples(tmp_path):
    for number in range(12):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(folder / f"{number}.png")
    splits = prepare_data(tf.use("image-folder", path=str(tmp_path / "images"), size=4, memory_mb=0))
    paths = splits.train.file_paths()
    assert {path.suffix for path in paths} == {".png"}
    assert splits.train.subset(torch.tensor([2, 0])).file_paths() == [paths[2], paths[0]]
    assert blobs(4, seed=1).file_paths() is None


def test_reference_data_know_the_training_samples(tmp_path):
    bundle = export(finished(tmp_path / "run"), to=("safetensors",), out=tmp_path / "b", data=data())
    reference = ReferenceData.read(bundle)
    assert reference.was_trained_on(data().train).all()
    assert not reference.was_trained_on(blobs(20, seed=99)).any()
