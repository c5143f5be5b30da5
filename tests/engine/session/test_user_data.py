"""A finished run predicts and evaluates every row that a user brings, in any dialect."""

import csv
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.exporting import load_inference_model


def frame_of(count, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"größe (cm)": rng.normal(size=count).round(2), "city": rng.choice(["Bern", "Chur"], count)})
    frame["y"] = np.where((frame["größe (cm)"] > 0) ^ (frame["city"] == "Bern"), "p", "n")
    return frame


@pytest.fixture(scope="module")
def table_run(tmp_path_factory):
    """An untrained network on a table of numbers and text, and the folder of the table."""
    folder = tmp_path_factory.mktemp("table")
    frame_of(60).to_csv(folder / "train.csv", index=False)
    source = tf.use("table-csv", path=str(folder / "train.csv"), target="y")
    run = tf.Engine(data=source, model=tf.use("mlp", hidden=(4,)), strategy=[], page=False, out=folder / "run").run()
    return run.run_dir


@pytest.fixture
def predict(table_run, tmp_path, monkeypatch, capsys):
    """`tuneforge predict --json` in a folder of its own: exit code, predictions by name, errors."""
    monkeypatch.chdir(tmp_path)

    def call(*things, form="--json"):
        code = main(["predict", str(table_run), form, *map(str, things)])
        out, err = capsys.readouterr()
        if form == "--json":
            out = {each["input"]: each for each in map(json.loads, out.splitlines())}
        return code, out, err

    return call


ROWS = frame_of(6, seed=1).drop(columns="y")
FILES = {
    "plain.csv": ROWS.to_csv(index=False).encode(),
    "UPPER.CSV": ROWS.to_csv(index=False).encode("utf-8-sig"),
    "german.csv": ROWS.to_csv(index=False, sep=";", decimal=",").encode("cp1252"),
    "unicode.txt": ROWS.to_csv(index=False, sep="\t", lineterminator="\r\n").encode("utf-16"),
    "bars": ROWS.rename(columns=lambda name: f" {name} ").to_csv(index=False, sep="|", lineterminator="\r").encode(),
    "rows.json": ROWS.to_json(orient="records").encode(),
    "rows.jsonl": ROWS.to_json(orient="records", lines=True).encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_rows_is_predicted_as_its_rows_are(table_run, predict, tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    code, predictions, _ = predict(name)
    assert code == 0
    expected = list(tf.predict(table_run, ROWS.to_dict("records")))
    assert [each["probabilities"] for each in predictions.values()] == [each["probabilities"] for each in expected]


def test_a_folder_of_tables_is_predicted(predict, tmp_path):
    for name in ("plain.csv", "rows.json"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(FILES[name])
    _, predictions, _ = predict("in")
    assert list(predictions)[5:7] == ["in/plain.csv:7", "in/rows.json:1"]


def test_rows_that_cannot_be_used_are_named_and_the_others_predicted(predict, tmp_path):
    lines = ["größe (cm),city", "1,Bern", "2", "x,Bern", '"a" b,Bern', "1e39,Bern", "3,Bern,4", "-1,Chur"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    code, predictions, err = predict("t.csv", '{"größe (cm)": 1, "city"', '{"größe (cm)": 1, "city": "Bern"}')
    assert code == 65
    assert list(predictions) == ["t.csv:2", "t.csv:8", '{"größe (cm)": 1, "city": "Bern"}']
    assert [line in err for line in (f"t.csv:{number}:" for number in range(2, 9))] == [False, *[True] * 5, False]
    assert "this is not JSON" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("größe (cm),city\n", "has no rows"),
        ("size,city\n1,Bern\n", "column 'größe (cm)' is missing"),
        ("PK\x03\x04", "workbook"),
        ("[" * 100_000, "column"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_once(predict, tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    code, predictions, err = predict("t.csv")
    assert (code, predictions, err.count("error:")) == (65, {}, 1)
    assert message in err
    assert "check the path" not in err


def test_deeply_nested_json_is_refused(predict):
    code, _, err = predict("[" * 100_000)
    assert code == 65
    assert "nested too deeply" in err


def test_a_value_that_training_did_not_have_is_marked(table_run, predict):
    known, unseen = {"größe (cm)": 1, "city": "Bern"}, {"größe (cm)": 1, "city": "Zug"}
    predictor = tf.load(table_run)
    for predictions in (predictor.predict([known, unseen]), load_inference_model(table_run).predict([known, unseen])):
        first, second = predictions
        assert "unseen" not in first
        assert second["unseen"] == {"city": "Zug"}
    _, predictions, _ = predict(json.dumps(unseen))
    assert [each["unseen"] for each in predictions.values()] == [{"city": "Zug"}]
    _, text, _ = predict(json.dumps(known), json.dumps(unseen), form="--csv")
    assert [row["unseen"] for row in csv.DictReader(io.StringIO(text))] == ["", "city 'Zug'"]


def test_rows_of_a_data_frame_go_in_everywhere(table_run):
    expected = list(tf.predict(table_run, ROWS.to_dict("records")))
    predictor = tf.load(table_run)
    assert list(predictor.predict(ROWS)) == expected
    assert [each["class"] for each in load_inference_model(table_run).predict(ROWS)] == [
        each["class"] for each in expected
    ]
    assert [row.tolist() for row in predictor.predict_outputs(ROWS)] == [
        row.tolist() for row in predictor.predict_outputs(ROWS.to_dict("records"))
    ]
    series = [row for _, row in ROWS.iterrows()]
    assert [each["class"] for each in predictor.predict(series)] == [each["class"] for each in expected]


@pytest.mark.parametrize("count", [2, 37])
def test_every_row_of_another_file_is_scored(table_run, tmp_path, count, capsys):
    frame = frame_of(200, seed=2)
    other = pd.concat([frame[frame["y"] == "p"][: count // 2], frame[frame["y"] == "n"][: count - count // 2]])
    other.to_csv(tmp_path / "other.csv", index=False)
    answers = [each["class"] for each in tf.predict(table_run, other.drop(columns="y"))]
    data = tf.use("table-csv", path=str(tmp_path / "other.csv"), target="y")
    (metrics,) = tf.evaluate(table_run, data=data).values()
    assert metrics["accuracy"] == accuracy_score(other["y"], answers)
    assert sum(each["support"] for each in metrics["per_class"].values()) == count
    code = main(["evaluate", str(table_run), "--data", "table-csv", "--data.path", str(tmp_path / "other.csv"),
                 "--data.target", "y", "--json"])  # fmt: skip
    out, err = capsys.readouterr()
    assert (code, json.loads(out)["test"]["accuracy"]) == (0, metrics["accuracy"])
    assert "read as 2 classes" in err


def test_the_runs_own_data_keep_their_splits(table_run):
    own = tf.evaluate(table_run)
    assert list(own) == ["val", "test"]
    assert tf.evaluate(table_run, data=tf.load(table_run).run.config.data) == own


def test_arrays_given_again_keep_their_splits_and_other_arrays_are_scored_whole(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)).astype(np.float32), np.arange(60) % 3
    run = tf.Engine(data=(x, y), model=tf.use("mlp", hidden=()), strategy=[], page=False, out=tmp_path / "r").run()
    assert tf.evaluate(run.run_dir, data=(x, y))["test"] == run.report["splits"]["test"]
    assert list(tf.predict(run.run_dir, pd.DataFrame(x))) == list(tf.predict(run.run_dir, x))
    (metrics,) = tf.evaluate(run.run_dir, data=(x[:4], y[:4])).values()
    assert sum(each["support"] for each in metrics["per_class"].values()) == 4


@pytest.mark.parametrize("labels", [("rust", "sand"), ("sand",), ("sand", "moss", "rust")])
def test_a_folder_with_some_of_the_classes_is_scored_by_name(tmp_path, labels):
    rng = np.random.default_rng(0)

    def photos(folder, classes):
        for label in classes:
            (tmp_path / folder / label).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / label / f"{number}.png")
        return tf.use("image-folder", path=str(tmp_path / folder), size=8)

    data = photos("old", ("moss", "rust", "sand"))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    run = tf.Engine(data=data, model=model, strategy=[], page=False, out=tmp_path / "r").run()
    other = photos("new", labels)
    (metrics,) = tf.evaluate(run.run_dir, data=other, model=model).values()
    files = sorted((tmp_path / "new").rglob("*.png"))
    answers = [each["class"] for each in tf.predict(run.run_dir, files, model=model)]
    assert metrics["accuracy"] == accuracy_score([file.parent.name for file in files], answers)
    photos("foreign", ("rust", "lichen"))
    with pytest.raises(tf.DataError, match=r"only in the data: \['lichen'\]"):
        tf.evaluate(run.run_dir, data=tf.use("image-folder", path=str(tmp_path / "foreign"), size=8), model=model)
