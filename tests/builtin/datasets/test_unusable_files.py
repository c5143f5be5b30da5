"""What a run does about files that cannot be used: before it trains, and when one breaks while it trains."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hostile_images import NAMES
from PIL import Image

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.builtin.datasets.images.file_check import FILE_CHECK_FILE
from tuneforge.builtin.datasets.images.image_datasets import ImageFolder
from tuneforge.builtin.datasets.images.replacements import REPLACEMENTS_FILE
from tuneforge.engine.context.distributed import ProcessGroup

STEPS = [tf.Phase("head", train="head", epochs=1, lr=1e-3)]
QUICK = ["--strategy", "head-only", "--strategy.epochs", "1", "--data.size", "32"]


def image(path, seed):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    small.resize((56, 56), Image.Resampling.BICUBIC).save(path, format="PNG")
    return path


@pytest.fixture
def photos(tmp_path):
    """Two classes of eight images, one of which is cut off."""
    for place, label in enumerate("ab"):
        for number in range(8):
            image(tmp_path / "photos" / label / f"{number}.png", 10 * place + number)
    cut(tmp_path / "photos" / "a" / "3.png")
    return tmp_path / "photos"


def cut(path):
    path.write_bytes(path.read_bytes()[:-60])


def run_of(folder):
    folder.mkdir(exist_ok=True)
    return SimpleNamespace(
        config=SimpleNamespace(seed=0),
        data_seed=0,
        restoring=False,
        expected_inputs=None,
        single_split=False,
        run_dir=folder,
        process_group=ProcessGroup(),
    )


def ids(data):
    return {split.id_of(row) for split in data.splits().values() for row in range(len(split))}


def test_a_run_with_unusable_files_stops_before_training(photos, tmp_path, capsys):
    code = main(["run", "--data", "image-folder", "--data.path", str(photos), "--out", str(tmp_path / "r"), *QUICK])
    assert code == 65
    err = capsys.readouterr().err
    assert "cannot use 'a/3.png'" in err
    assert "--data.on-error skip" in err
    assert not (tmp_path / "r" / "model.safetensors").exists()


def test_skipped_files_are_recorded_in_the_run_directory(photos, tmp_path):
    run = tf.Engine(data=ImageFolder(path=photos, size=32, on_error="skip"), strategy=STEPS, out=tmp_path / "r").run()
    assert sum(run.report["num_samples"].values()) == 15
    assert list(json.loads((run.run_dir / FILE_CHECK_FILE).read_text())["unusable"]) == ["a/3.png"]
    assert "1 of 16 images, the first &#39;a/3.png&#39;" in (run.run_dir / "report.html").read_text()
    assert (photos / "a" / "3.png").exists()


def test_quarantined_files_are_moved_into_a_hidden_folder_with_a_log(photos, tmp_path):
    content = (photos / "a" / "3.png").read_bytes()
    data = ImageFolder(path=photos, size=32, on_error="quarantine").data_prepare(run_of(tmp_path / "r"))
    assert len(ids(data)) == 15
    assert not (photos / "a" / "3.png").exists()
    entry = json.loads((photos / ".quarantine" / "quarantined.jsonl").read_text())
    assert entry["from"] == "a/3.png"
    assert (photos / ".quarantine" / entry["to"]).read_bytes() == content


def test_a_resumed_run_has_the_samples_that_it_had_even_if_a_file_was_mended_meanwhile(photos, tmp_path):
    options = {"path": photos, "size": 32, "on_error": "skip"}
    before = ImageFolder(**options).data_prepare(run_of(tmp_path / "r"))
    image(photos / "a" / "3.png", 99)
    assert ids(ImageFolder(**options).data_prepare(run_of(tmp_path / "r"))) == ids(before)
    assert len(ids(ImageFolder(**options).data_prepare(run_of(tmp_path / "new")))) == 16


class Breaks:
    """Cuts a training image off after the first epoch."""

    def __init__(self, root):
        self.root, self.broken = root, ""

    @tf.hookimpl
    def epoch_ended(self, run):
        if not self.broken:
            self.broken = run.data.train.id_of(0)
            cut(self.root / self.broken)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_while_a_run_trains_does_not_end_it(photos, tmp_path, workers):
    data = ImageFolder(path=photos, size=32, on_error="skip", memory_mb=0)
    breaks, told = Breaks(photos), []
    steps = [tf.Phase("all", train="all", epochs=3, lr=1e-3)]
    run = tf.Engine(
        data=data, strategy=steps, callbacks=[breaks], num_workers=workers, out=tmp_path / "r", log=told.append
    ).run()
    assert len(run.strategy_steps) == 1
    lines = [json.loads(line) for line in (run.run_dir / REPLACEMENTS_FILE).read_text().splitlines()]
    assert {(line["split"], line["id"]) for line in lines} == {("train", breaks.broken)}
    assert {line["replacement"][0] for line in lines} == {breaks.broken[0]}  # of the same class
    assert len({line["replacement"] for line in lines}) == 1
    assert sum("replaces it" in line for line in told) == 1


def test_the_metrics_of_a_split_count_replaced_images(photos, tmp_path):
    data = ImageFolder(path=photos, size=32, on_error="skip", memory_mb=0)

    class BreaksTheTest(Breaks):
        @tf.hookimpl
        def phase_ended(self, run):
            self.broken = run.data.test.id_of(0)
            cut(self.root / self.broken)

        @tf.hookimpl
        def epoch_ended(self, run):
            pass

    run = tf.Engine(data=data, strategy=STEPS, callbacks=[BreaksTheTest(photos)], out=tmp_path / "r", page=False).run()
    line = json.loads((run.run_dir / REPLACEMENTS_FILE).read_text())
    assert line["replacement"] == "a gray image"  # the split has one image of each class
    assert run.report["splits"]["test"]["replacements"] == 1
    assert "replacements" not in run.report["splits"]["val"]


def test_a_disk_that_is_gone_is_no_broken_file(photos, tmp_path):
    data = ImageFolder(path=photos, size=32, on_error="skip", memory_mb=0).data_prepare(run_of(tmp_path / "r"))
    assert data.train.inputs_fingerprint()
    os.rename(photos, tmp_path / "gone")
    with pytest.raises(tf.DataError, match="nor the next"):
        data.train.fetch(torch.tensor([0]))


def test_duplicates_across_splits_are_marked_in_the_report(tmp_path):
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        for place, label in enumerate("ab"):
            for number in range(count):
                seed = 100 * place + 10 * ["train", "val", "test"].index(split) + number
                image(tmp_path / "d" / split / label / f"{number}.png", seed)
    (tmp_path / "d/test/a/0.png").write_bytes((tmp_path / "d/train/a/1.png").read_bytes())
    near = Image.open(tmp_path / "d/train/b/2.png").resize((64, 64), Image.Resampling.BICUBIC)
    near.save(tmp_path / "d/test/b/1.png")
    duplicates = [["train/a/1.png", "test/a/0.png"], ["train/b/2.png", "test/b/1.png"]]
    (tmp_path / "issues.json").write_text(json.dumps({"root": str(tmp_path / "d"), "duplicates": duplicates}))
    made = {}
    for name, options in {"own": {}, "checked": {"checked": tmp_path / "issues.json"}}.items():
        data = ImageFolder(path=tmp_path / "d", size=32, **options)
        made[name] = tf.Engine(data=data, strategy=STEPS, out=tmp_path / name).run()
    for name, leaked in {"own": 1, "checked": 2}.items():
        page = (tmp_path / name / "report.html").read_text()
        assert f"test: {leaked} of 6 images have a duplicate in train or val" in page
        assert made[name].report["num_samples"]["test without duplicates"] == 6 - leaked
        assert "test without duplicates" in page


def test_names_lead_nowhere_and_are_escaped_in_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = ["../../up", "<script>alert(1)</script>", "a\nb", "/etc/passwd", "..", "{{ 7*7 }}", "' onload='x"]
    rows = ["path,label"]
    for place, label in enumerate(labels):
        for number in range(4):
            name = os.fsdecode(NAMES[(4 * place + number) % len(NAMES)]) + f"{place}.png"
            image(tmp_path / "in" / name, 10 * place + number)
            quoted = [each.replace('"', '""') for each in (name, label)]
            rows.append(",".join(f'"{each}"' for each in quoted))
    (tmp_path / "in" / "list.csv").write_bytes("\n".join(rows).encode(errors="surrogateescape"))
    before = {*map(str, Path("in").rglob("*"))}
    options = ["--data", "image-csv", "--data.path", "in/list.csv", "--out", "made/<b>run"]
    assert main(["run", *options, *QUICK]) == 0
    assert {*map(str, Path("in").rglob("*"))} == before
    assert set(os.listdir(".")) == {"in", "made"}
    page = Path("made/<b>run/report.html").read_text()
    assert "<script>alert" not in page
    assert "<b>run" not in page
    assert " onload='x" not in page
