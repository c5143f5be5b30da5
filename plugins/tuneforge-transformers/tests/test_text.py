"""Texts are read, tokenized as transformers does, and predicted from the run directory alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from small_models import make_texts, make_tokenizer, save_model, write_csv
from tuneforge_transformers.text import PackedTokenizer, TextInputs

import tuneforge as tf


def make_text_inputs(length=12, **options):
    backend = make_tokenizer().backend_tokenizer
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=0, pad_token="[PAD]")
    return TextInputs(tokenizer=PackedTokenizer.pack(backend), max_length=length, **options)


def prepare_data(tmp_path, folder, path, **options):
    """Return the data of a run."""
    recorded = {}

    class Recorder:
        @tf.hookimpl
        def phase_started(self, run):
            recorded["data"] = run.data

    tf.Engine(
        data=tf.use("text", path=str(path), **options), model=tf.use("transformers", pretrained=str(folder("bert"))),
        strategy=tf.use("head-only", epochs=1), callbacks=[Recorder()], cache="off", page=False, out=tmp_path / "run",
    ).run()  # fmt: skip
    return recorded["data"]


def test_tokens_equal_those_of_transformers(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(folder("bert"))
    texts = [text for text, _ in make_texts(4)] + ["an unseen word", "wave " * 40]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    ours = make_text_inputs().preprocess(make_text_inputs().encode(texts))
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    assert torch.equal(ours["attention_mask"], expected["attention_mask"])


@pytest.mark.parametrize("form", ["text", "row", "path", "bytes", "json"])
def test_text_is_accepted_in_every_form(tmp_path, form):
    (tmp_path / "a.txt").write_text("the old boat")
    raw = {
        "text": "the old boat",
        "row": {"text": "the old boat", "more": 1},
        "path": tmp_path / "a.txt",
        "bytes": b"the old boat",
        "json": b'{"text": "the old boat"}',
    }[form]
    stored = make_text_inputs().decode(raw)
    assert stored["input_ids"].dtype == torch.int32
    assert stored["input_ids"].shape == stored["attention_mask"].shape == (12,)
    assert make_text_inputs().render_text(stored) == "the old boat"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"txt": "boat"}, "column 'text' is missing"),
        ("  ", "an empty text"),
        (7, "int is not a text"),
        ({"text": None}, "NoneType is not a text"),
        (b"\xff\xfe\x00", "this is not a text"),
        ("boat " * 100, "a text of 500 characters"),
    ],
)
def test_inputs_without_a_text_are_refused(raw, words):
    with pytest.raises(tf.DataError, match=words):
        make_text_inputs(max_chars=100).decode(raw)


def test_error_messages_do_not_contain_the_tokenizer():
    inputs = make_text_inputs()
    assert len(inputs.tokenizer) > 500
    assert len(repr(inputs)) < 200


def test_folders_and_tables_by_split_give_the_same_data(tmp_path, folder):
    pairs = {"train": make_texts(6, seed=1), "val": make_texts(2, seed=2), "test": make_texts(2, seed=3)}
    for split, texts in pairs.items():
        (tmp_path / "tables").mkdir(exist_ok=True)
        write_csv(tmp_path / "tables" / f"{split}.csv", texts)
        for number, (text, label) in enumerate(texts):
            file = tmp_path / "folders" / split / label / f"{number:02}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    tables = prepare_data(tmp_path / "a", folder, tmp_path / "tables", max_length=12)
    folders = prepare_data(tmp_path / "b", folder, tmp_path / "folders", max_length=12)
    assert tables.targets.labels == folders.targets.labels == ("kitchen", "sea", "sky")
    for split in pairs:
        assert len(tables.splits()[split]) == len(folders.splits()[split]) == len(pairs[split])
    tokens = [sorted(map(str, data.test.fetch(torch.arange(6))["input_ids"].tolist())) for data in (tables, folders)]
    assert tokens[0] == tokens[1]
    assert tables.train.id_of(0) == "train.csv:2"
    assert folders.train.id_of(0) == "kitchen/01.txt"


def test_csv_without_splits_is_split_by_class(tmp_path, folder, table):
    data = prepare_data(tmp_path, folder, table)
    assert {name: len(split) for name, split in data.splits().items()} == {"train": 36, "val": 6, "test": 6}
    assert sorted(data.test.targets.tolist()) == [0, 0, 1, 1, 2, 2]
    names = [split.id_of(row) for split in data.splits().values() for row in range(len(split))]
    assert len(set(names)) == 48
    assert data.notes[0].startswith("texts have ")


def test_long_texts_are_truncated_and_a_note_says_how_many(tmp_path, folder):
    path = write_csv(tmp_path / "long.csv", [(text * 8, label) for text, label in make_texts(8)])
    data = prepare_data(tmp_path, folder, path)
    assert data.train.fetch(torch.tensor([0]))["input_ids"].shape == (1, 32)
    assert "the limit is 32, so 24 text(s) are truncated" in data.notes[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,lable\na,b\n", "no column 'label'"),
        ("text,label\n", "has no rows"),
        ("text,label\nboat,\n", "there is no label"),
        ("text,label\n  ,sea\n", "there is no text"),
        ("text,label\nboat,sea\nfish,sea\nanchor,sea\n", "only one class"),
        ("text,label\nboat,sea\npan,kitchen\n", "has 1 sample"),
        (b"text,label\n\x81\x81,sea\n", "cannot read"),
        ('text,label\n"boat,sea\n', "cannot read"),
    ],
)
def test_unusable_csv_is_refused(tmp_path, folder, tune, content, words):
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(tf.DataError, match=words):
        tune(folder("bert"), data=tf.use("text", path=str(path)))


def test_folder_without_texts_and_missing_path_are_refused(tmp_path, folder, tune):
    (tmp_path / "empty" / "sea").mkdir(parents=True)
    for path, words in ((tmp_path / "empty", "there is no text in"), (tmp_path / "none", "no file or folder")):
        with pytest.raises(tf.DataError, match=words):
            tune(folder("bert"), data=tf.use("text", path=str(path)))


def test_another_model_than_transformers_needs_a_tokenizer_by_name(tune, folder, table, tmp_path):
    with pytest.raises(tf.UsageError, match="need the tokenizer of a model"):
        tune(folder("bert"), model="mlp")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(tf.UsageError, match="has no tokenizer that can be used"):
        tune(folder("bert"), data=tf.use("text", path=str(table), tokenizer=str(tmp_path / "nothing")))


@pytest.mark.parametrize("adapt", [[], ["lora"]], ids=["plain", "lora"])
def test_run_directory_alone_predicts_and_evaluates(tmp_path, tune, table, adapt):
    source = save_model(tmp_path / "source", "bert")
    result = tune(source, adapt=adapt, strategy=tf.use("full", epochs=6, lr=3e-3))
    moved = shutil.move(result.run_dir, tmp_path / "elsewhere")
    shutil.rmtree(source)
    predictions = list(tf.predict(moved, ["the salt wave and the harbour", {"text": "moon wind cloud in the sky"}]))
    assert [set(each["probabilities"]) for each in predictions] == [{"kitchen", "sea", "sky"}] * 2
    assert tf.evaluate(moved)["test"] == result.report["splits"]["test"]
    other = write_csv(tmp_path / "other.csv", make_texts(3, seed=9))
    metrics = tf.evaluate(moved, data=tf.use("text", path=str(other)))
    assert {name: sum(each["support"] for each in split["per_class"].values()) for name, split in metrics.items()} == {
        "test": 9
    }


def test_command_line_predicts_for_rows_files_and_json(tmp_path, tune, folder, table):
    result = tune(folder("bert"))
    (tmp_path / "a.txt").write_text("the old boat")
    command = [sys.executable, "-m", "tuneforge", "predict", result.run_dir, "--json", table, tmp_path / "a.txt"]
    done = subprocess.run([*command, '{"text": "a knife"}'], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 50
    assert lines[0]["class"] in ("kitchen", "sea", "sky")


def test_report_shows_the_texts_of_the_hardest_samples(tune, folder):
    result = tune(folder("bert"))
    hardest = json.loads((result.run_dir / "hardest_samples.json").read_text())
    assert hardest
    assert all(each["text"] and each["image"] is None for each in hardest)
    page = tune(folder("bert"), page=True).run_dir / "report.html"
    assert hardest[0]["text"] in page.read_text()
