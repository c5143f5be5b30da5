"""`tuneforge data check` writes a list of issues, a report and a cleaned list, and refuses wrong use."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tuneforge.__main__ import main


def make_digits(root):
    """Write two digits into `train` and `test`, with a wrong label, a leak, a duplicate and an unusable file."""
    images, labels = load_digits(return_X_y=True)
    for label in (0, 1):
        for number, row in enumerate(np.flatnonzero(labels == label)[:40]):
            path = root / ("train" if number < 30 else "test") / f"digit {label}" / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((images[row].reshape(8, 8) * 15.9).astype(np.uint8)).save(path)
    train, test = root / "train", root / "test"
    (train / "digit 0" / "00.png").rename(train / "digit 1" / "wrong.png")
    (train / "digit 1" / "leak.png").write_bytes((test / "digit 1" / "35.png").read_bytes())
    (train / "digit 0" / "twice.png").write_bytes((train / "digit 0" / "05.png").read_bytes())
    (train / "digit 0" / "broken.png").write_bytes(b"%PDF-1.4")
    (train / "only here").mkdir()
    return root


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A directory with digits in `d`, and in `out` the output of a check with --fix."""
    directory = tmp_path_factory.mktemp("checked")
    before = {path: path.read_bytes() for path in make_digits(directory / "d").rglob("*.png")}
    assert main(["data", "check", str(directory / "d"), "--out", str(directory / "out"), "--fix"]) == 0
    assert {path: path.read_bytes() for path in (directory / "d").rglob("*.png")} == before
    return directory


def read_issues(out):
    return json.loads((out / "issues.json").read_text())


def test_each_kind_of_issue_is_found_with_its_reason(checked):
    content = read_issues(checked / "out")
    issues = {(issue["kind"], issue["path"]): issue for issue in content["issues"]}
    assert issues["unusable", "train/digit 0/broken.png"]["why"] == "it is a PDF"
    assert issues["leak", "train/digit 1/leak.png"]["related"] == ["test/digit 1/35.png"]
    assert ("exact duplicate", "train/digit 0/twice.png") in issues
    assert issues["label issue", "train/digit 1/wrong.png"]["why"] == "it is predicted as 'digit 0'"
    assert [issue["label"] for issue in content["issues"] if issue["kind"] == "class"] == ["only here"]
    assert content["classes"] == {"train": {"digit 0": 30, "digit 1": 32}, "test": {"digit 0": 10, "digit 1": 10}}


def test_a_run_on_the_cleaned_list_computes_features_that_labels_are_checked_with(checked, tmp_path, capsys):
    cleaned = checked / "out" / "cleaned.csv"
    with cleaned.open(newline="") as file:
        split_of = {row["path"].rpartition("/d/")[2]: row["split"] for row in csv.DictReader(file)}
    assert not {"train/digit 0/broken.png", "train/digit 1/leak.png", "train/digit 1/wrong.png"} & set(split_of)
    assert split_of["test/digit 1/35.png"] == "test"
    options = ["--data", "image-csv", "--data.path", str(cleaned), "--data.checked", str(checked / "out/issues.json")]
    quick = ["--strategy", "head-only", "--strategy.epochs", "1", "--no-page", "--out", str(tmp_path / "run")]
    assert main(["run", *options, *quick]) == 0
    assert not re.search(r"have a (copy|duplicate) in", capsys.readouterr().out)
    out = ["--out", str(tmp_path / "out"), "--run", str(tmp_path / "run")]
    assert main(["data", "check", str(checked / "d"), *out]) == 65
    content = read_issues(tmp_path / "out")
    assert "from the features of" in content["notes"][0]
    assert "train/digit 1/wrong.png" in [issue["path"] for issue in content["issues"] if issue["kind"] == "label issue"]


def test_fix_follows_only_the_named_suggestions_and_undo_removes_the_list(checked, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["data", "check", str(checked / "d"), *out, "--fix", "files,duplicates"]) == 0
    content = (tmp_path / "out" / "cleaned.csv").read_text()
    line = r"^files to train on after fixing files, duplicates: (\d+) of 83$"
    remaining = re.search(line, capsys.readouterr().out, re.MULTILINE)
    assert int(remaining[1]) == len(content.splitlines()) - 1
    assert "wrong.png" in content
    assert "leak.png" not in content
    assert main(["data", "check", str(checked / "d"), *out, "--undo"]) == 0
    assert not (tmp_path / "out" / "cleaned.csv").exists()


def test_a_csv_file_is_checked_as_a_folder_is(tmp_path):
    paths = make_digits(tmp_path / "d").rglob("*.png")
    rows = [f"{path},{path.parent.name},{path.parent.parent.name}" for path in paths]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows, "missing.png,digit 0,train"]))
    assert main(["data", "check", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")]) == 65
    issues = read_issues(tmp_path / "out")["issues"]
    assert {issue["kind"] for issue in issues} == {"unusable", "leak", "exact duplicate", "label issue"}
    assert any(issue["why"] == "it cannot be read: No such file or directory" for issue in issues)


def test_json_prints_the_content_of_the_issues_file(checked, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--no-near-duplicates", "--json"]
    assert main(["data", "check", str(checked / "d"), *out]) == 65
    assert json.loads(capsys.readouterr().out) == read_issues(tmp_path / "out")


def test_wrong_use_is_refused(tmp_path, capsys):
    make_digits(tmp_path / "d")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    assert main(["data", "check", str(tmp_path / "d"), "--fix", "label"]) == 2
    assert main(["data", "check", str(tmp_path / "none")]) == 65
    assert main(["data", "check", str(tmp_path / "d"), "--out", str(tmp_path / "other")]) == 73
    errors = capsys.readouterr().err
    assert "did you mean 'labels'?" in errors
    assert "contains other files" in errors
