"""`tuneforge data check`: the list that it writes, what that leaves out, and what the command refuses."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tuneforge.__main__ import main


def made(root):
    """Two real digits in `train` and `test`, with a wrong label, a copy across splits, a copy within, a broken file."""
    images, codes = load_digits(return_X_y=True)
    for code in (0, 1):
        for place, row in enumerate(np.flatnonzero(codes == code)[:40]):
            path = root / ("train" if place < 30 else "test") / f"digit {code}" / f"{place:02d}.png"
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
def fixed(tmp_path_factory):
    """A folder with digits in `d`, and in `out` what the check with --fix has written."""
    folder = tmp_path_factory.mktemp("fixed")
    before = {path: path.read_bytes() for path in made(folder / "d").rglob("*.png")}
    assert main(["data", "check", str(folder / "d"), "--out", str(folder / "out"), "--fix"]) == 0
    assert {path: path.read_bytes() for path in (folder / "d").rglob("*.png")} == before
    return folder


def issues_in(folder):
    return json.loads((folder / "issues.json").read_text())


def test_each_kind_of_issue_is_found_with_its_reason(fixed):
    found = issues_in(fixed / "out")
    told = {(each["kind"], each["path"]): each for each in found["issues"]}
    assert told["unusable", "train/digit 0/broken.png"]["why"] == "it is a PDF"
    assert told["leak", "train/digit 1/leak.png"]["related"] == ["test/digit 1/35.png"]
    assert ("exact duplicate", "train/digit 0/twice.png") in told
    assert told["label issue", "train/digit 1/wrong.png"]["why"] == "it looks like 'digit 0'"
    assert [each["label"] for each in found["issues"] if each["kind"] == "class"] == ["only here"]
    assert found["classes"] == {"train": {"digit 0": 30, "digit 1": 32}, "test": {"digit 0": 10, "digit 1": 10}}


def test_the_cleaned_list_runs_and_that_run_judges_labels(fixed, tmp_path, capsys):
    cleaned = fixed / "out" / "cleaned.csv"
    with cleaned.open(newline="") as file:
        names = {row["path"].rpartition("/d/")[2]: row["split"] for row in csv.DictReader(file)}
    assert not {"train/digit 0/broken.png", "train/digit 1/leak.png", "train/digit 1/wrong.png"} & set(names)
    assert names["test/digit 1/35.png"] == "test"
    options = ["--data", "image-csv", "--data.path", str(cleaned), "--data.checked", str(fixed / "out/issues.json")]
    quick = ["--strategy", "head-only", "--strategy.epochs", "1", "--no-page", "--out", str(tmp_path / "run")]
    assert main(["run", *options, *quick]) == 0
    assert "have a copy" not in capsys.readouterr().out
    again = ["--out", str(tmp_path / "out"), "--run", str(tmp_path / "run")]
    assert main(["data", "check", str(fixed / "d"), *again]) == 65
    found = issues_in(tmp_path / "out")
    assert "by the features of" in found["notes"][0]
    assert "train/digit 1/wrong.png" in [each["path"] for each in found["issues"] if each["kind"] == "label issue"]


def test_a_fix_can_be_told_what_to_leave_out_and_is_taken_back(fixed, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["data", "check", str(fixed / "d"), *out, "--fix", "files,copies"]) == 0
    content = (tmp_path / "out" / "cleaned.csv").read_text()
    left = re.search(r"^left after the advice on files, copies: (\d+) of 83$", capsys.readouterr().out, re.MULTILINE)
    assert int(left[1]) == len(content.splitlines()) - 1
    assert "wrong.png" in content
    assert "leak.png" not in content
    assert main(["data", "check", str(fixed / "d"), *out, "--undo"]) == 0
    assert not (tmp_path / "out" / "cleaned.csv").exists()


def test_a_csv_is_checked_as_a_folder_is(tmp_path):
    rows = [f"{path},{path.parent.name},{path.parent.parent.name}" for path in made(tmp_path / "d").rglob("*.png")]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows, "gone.png,digit 0,train"]))
    assert main(["data", "check", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out")]) == 65
    found = issues_in(tmp_path / "out")["issues"]
    assert {each["kind"] for each in found} == {"unusable", "leak", "exact duplicate", "label issue"}
    assert any(each["why"] == "it cannot be read: No such file or directory" for each in found)


def test_wrong_use_is_refused(tmp_path, capsys):
    made(tmp_path / "d")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    assert main(["data", "check", str(tmp_path / "d"), "--fix", "label"]) == 2
    assert main(["data", "check", str(tmp_path / "none")]) == 65
    assert main(["data", "check", str(tmp_path / "d"), "--out", str(tmp_path / "other")]) == 73
    errors = capsys.readouterr().err
    assert "did you mean 'labels'?" in errors
    assert "holds something else" in errors
