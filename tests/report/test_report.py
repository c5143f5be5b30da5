import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from tuneforge import FolderError
from tuneforge.builtin.metrics import ClassificationMetrics, RegressionMetrics
from tuneforge.engine.loop.metric_set import scalar_metrics
from tuneforge.engine.storage.atomic import write_json
from tuneforge.plugin.results import Diagnostics, StrategyStepResult
from tuneforge.plugin.serialization import to_json
from tuneforge.plugin.steps import Diagnosis, Phase
from tuneforge.report.report import format_duration, format_metric, write_report

HOSTILE = (
    "<script>alert(1)</script>", '" onmouseover="alert(2)', "'; DROP TABLE runs; --", "{{ 7 * 7 }}",
    "two\nlines\tof text", "$\\frac{1}{", "_hidden", "数字 ✓ \u202eabc", "]]> --> </style>", "&lt;b&gt;",
    "x" * 500, "\udcff\x00\x1b[31m", "",
)  # fmt: skip


def png(seed):
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((96, 96), Image.Resampling.NEAREST).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def class_metrics(labels, samples, *, skill, seed=0):
    """Return metrics of predictions that improve with `skill`."""
    if not labels:
        return {"loss": math.nan, "accuracy": math.nan, "ece": math.nan, "per_class": {}, "confusion": []}
    generator = torch.Generator().manual_seed(seed)
    metrics = ClassificationMetrics(labels, top_k=3, num_bins=15)
    if samples:
        truth = torch.arange(samples) % len(labels)
        outputs = torch.randn(samples, len(labels), generator=generator)
        outputs[torch.arange(samples), truth] += skill
        metrics.update(outputs, truth)
    return metrics.compute()


def regression_metrics(samples, *, skill):
    """Figures of a regression of one number."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(samples, 1, generator=generator)
    metrics = RegressionMetrics(("price",), scales=(40.0,))
    metrics.update(truth + torch.randn(samples, 1, generator=generator) / skill, truth)
    return metrics.compute()


def incorrect_predictions(labels, number, *, pictures=True):
    """Mistakes as the engine writes them."""
    out = []
    for row in range(number):
        truth, answer = labels[row % len(labels)], labels[(row + 1) % len(labels)]
        probabilities = dict.fromkeys(labels, 0.0) | {truth: 0.04, answer: 0.93}
        told = {"class": answer, "probability": 0.93, "probabilities": probabilities}
        shown = {"image": png(row), "text": None} if pictures else {"image": None, "text": f"ids [{row}, 7, 12]"}
        out.append({"id": f"test/{row}", "label": truth, "prediction": told, "loss": 3.2 - row / 10, **shown})
    return out


def write_run(
    folder,
    *,
    labels,
    splits,
    hardest_samples,
    phases=(("head", 3), ("all", 5)),
    primary_metrics=None,
    monitor="f1_macro",
):
    """The folder of a finished run: `splits` has the metrics of each split by its name."""
    folder.mkdir(parents=True)
    primary_metrics = primary_metrics or ["accuracy", "precision_macro", "recall_macro", "f1_macro"]
    metrics, timings, steps = [], [], []
    for name, number in phases:
        history = []
        for each in range(1, number + 1):
            epoch = len(metrics) + 1
            val = {key: value * (1 - 0.5 / epoch) for key, value in scalar_metrics(splits["val"]).items()}
            loss = {"loss": 2.3 / epoch}
            entry = {"step": 45 * epoch, "epoch": epoch, "phase": name, "lr": 2e-3 / epoch, "train": loss, "val": val}
            metrics.append({**entry, "best": each != number or number == 1})
            timings.append({"epoch": epoch, "seconds": 1.25})
            history.append({"epoch": each, "train": loss, "val": val})
        report = StrategyStepResult(
            name, reason=f"all {number} epochs done", epochs=number, steps=45 * number, best_epoch=max(1, number - 1),
            train=loss, val=splits["val"], history=history, num_trainable=5_643, num_frozen=1_568_832,
            never_updated=("aux.weight",),
        )  # fmt: skip
        steps.append(f'{{"step": {to_json(Phase(name, train="head", epochs=number))}, "result": {to_json(report)}}}')
    probe, readings = Diagnosis("look"), Diagnostics("look", {"head": 0.1234, "groups.0": 2e-5})
    steps.append(f'{{"step": {to_json(probe)}, "result": {to_json(readings)}}}')
    samples = {"train": 1437, "val": 360, "test": 360} | {name: 100 for name in splits if name not in ("val", "test")}
    for name, lines in (("metrics", map(to_json, metrics)), ("timings", map(to_json, timings)), ("steps", steps)):
        (folder / f"{name}.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode(errors="replace"))
    write_json(folder / "hardest_samples.json", hardest_samples)
    report = {
        "strategy": "freeze-then-unfreeze",
        "monitor": monitor,
        "primary_metrics": primary_metrics,
        "num_samples": samples,
    }
    write_json(folder / "report.json", {**report, "splits": splits})
    write_json(folder / "model.json", model_record(labels))
    write_json(folder / "run.json", run_record())
    return folder


def model_record(labels):
    return {
        "head": "fc",
        "labels": list(labels),
        "groups": [{"name": "features", "parameters": 1_568_832}, {"name": "fc", "parameters": 5_643}],
        "changes": ["head: 62 outputs became 11; 10 rows kept by class name, 1 fresh"],
        "inputs": {"name": "images", "options": {}},
        "targets": {"name": "classes", "options": {}},
        "input_specs": {"": [[1, 8, 8], "torch.uint8"]},
        "fingerprints": {name: f"{index:x}" * 64 for index, name in enumerate(("train", "val", "test"), start=10)},
        "notes": ["left out as they cannot be told from a digit at this size: O, l, I"],
    }


def run_record():
    return {
        "tuneforge": "0.1.0",
        "config": {
            "batch-size": 32,
            "seed": 0,
            "data": {"name": "digits", "other-share": 0.4, "fonts": None},
            "model": {"name": "digit-cnn"},
            "strategy": {"name": "freeze-then-unfreeze", "head-epochs": 1, "note": 'a "quoted" </code> one'},
        },
        "components": [{"hook": "data_prepare", "name": "digits", "distribution": "tuneforge", "version": "0.1.0"}],
        "environment": {"python": "3.11.2", "threads": 2, "command": ["/opt/bin/tuneforge", "run", "a b"]},
    }


def classes_run(folder, labels, *, skill=4.0, num_incorrect=6, **more):
    splits = {
        "val": class_metrics(labels, 20 * len(labels), skill=skill),
        "test": class_metrics(labels, 30 * len(labels), skill=skill, seed=1),
        "real digits": class_metrics(labels, 10 * len(labels), skill=skill + 1, seed=2),
    }
    incorrect = incorrect_predictions(labels, num_incorrect if labels else 0)
    return write_run(folder, labels=labels, splits=splits, hardest_samples=incorrect, **more)


def regression_run(folder):
    splits = {"val": regression_metrics(100, skill=3), "test": regression_metrics(100, skill=2)}
    answers = [
        {
            "id": f"row {row}",
            "label": f"{100 + row} EUR",
            "prediction": {"value": 90.5 - row, "unit": "EUR"},
            "loss": 2.0,
            "image": None,
            "text": f"rooms {row}, area 72.5, year 1975",
        }
        for row in range(5)
    ]
    settings = {"primary_metrics": ["mae", "rmse", "r2"], "monitor": "mae"}
    return write_run(folder, labels=(), splits=splits, hardest_samples=answers, **settings)


DIGITS = (*"0123456789", "other")


class Elements(HTMLParser):
    """Tags with their attributes, the text, and whether every element that opens is closed in order."""

    VOID = ("meta", "img", "br", "link", "hr", "input", "use", "path", "image")

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self._open = [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(folder):
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return classes_run(tmp_path_factory.mktemp("runs") / "digits", DIGITS, skill=2.5)


@pytest.fixture(scope="module")
def html(digits):
    return read(digits)


def test_report_is_in_the_run_directory_and_names_strategy_data_and_model(digits, html):
    assert write_report(digits) == digits / "report.html"
    assert "digit-cnn fine-tuned on digits with freeze-then-unfreeze" in Elements(html).text


def test_page_needs_nothing_from_outside(html):
    page = Elements(html)
    names = {tag for tag, _ in page.tags}
    targets = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert targets
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in targets)
    assert not re.search(r"@import|url\((?!#)", html)


def test_page_forbids_scripts_and_outside_content_itself(html):
    policies = [attrs["content"] for tag, attrs in Elements(html).tags if "http-equiv" in attrs]
    assert policies == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]


def test_same_run_gives_the_same_bytes_in_another_process_and_without_pyplot(digits):
    before = write_report(digits).read_bytes()
    code = (
        "import pathlib, sys; from tuneforge.report.report import write_report\n"
        "write_report(pathlib.Path(sys.argv[1]))\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, digits], check=False).returncode == 0
    assert (digits / "report.html").read_bytes() == before


def test_ids_are_unique_and_links_lead_somewhere(html):
    tags = Elements(html).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    targets = [attrs.get(key, "") for _, attrs in tags for key in ("href", "xlink:href")]
    links = {target[1:] for target in targets if target.startswith("#")}
    labels = {attrs["aria-labelledby"] for _, attrs in tags if "aria-labelledby" in attrs}
    assert len(ids) == len(set(ids))
    assert links | labels <= set(ids)


def test_every_plot_has_a_text_alternative_and_every_table_a_caption(html):
    tags = Elements(html).tags
    assert all(attrs.get("alt") for tag, attrs in tags if tag == "img")
    assert all(attrs.get("aria-label") and attrs["role"] == "img" for tag, attrs in tags if tag == "svg")
    assert sum(tag == "svg" for tag, _ in tags) == 2
    assert html.count("<table") == html.count("<caption")


def test_table_of_results_has_a_row_for_every_split(digits, html):
    report = json.loads((digits / "report.json").read_text())
    text = Elements(html).text
    for split, name in (("val", "validation 360"), ("test", "test 360"), ("real digits", "real digits 100")):
        accuracy = report["splits"][split]["accuracy"]
        assert f"{name} {accuracy:.4f}" in text


def test_hardest_class_is_named_with_its_most_frequent_confusion(digits, html):
    metrics = json.loads((digits / "report.json").read_text())["splits"]["test"]
    hardest = metrics["hardest_class"]
    row = metrics["confusion"][DIGITS.index(hardest)]
    text = Elements(html).text
    assert f"Hardest class of the test split: {hardest} with a recall of {metrics['recall_min']:.4f}" in text
    assert f"({row[DIGITS.index(hardest)]} of 30 samples), most often predicted as" in text


def test_classes_stand_in_the_order_of_their_recall(digits, html):
    per_class = json.loads((digits / "report.json").read_text())["splits"]["test"]["per_class"]
    table = Elements(html).text.split("lowest recall first.")[1]
    shown = re.findall(r"(\d|other) [01]\.\d{4} ([01]\.\d{4}) [01]\.\d{4} 30", table)
    assert [name for name, _ in shown] == sorted(per_class, key=lambda name: per_class[name]["recall"])


def test_strategy_steps_show_their_stop_reason_and_what_never_changed(html):
    text = Elements(html).text
    assert (
        "1. head phase training head, 3 epochs, lr 1e-3 all 3 epochs done best epoch: 2 1\N{EN DASH}3 5,643 1,568,832"
        in text
    )
    assert "all 5 epochs done best epoch: 7 4\N{EN DASH}8" in text
    assert (
        "1 tensor had a learning rate and never received a large enough gradient to change: aux.weight (in head , all )"
        in text
    )


def test_configuration_is_a_file_that_runs_the_same(html):
    import tomllib

    written = re.search(r"as TOML\"><code>(.*?)</code>", html, re.DOTALL)[1]
    table = tomllib.loads(written.replace("&#34;", '"').replace("&lt;", "<").replace("&gt;", ">"))
    assert table["strategy"] == {"name": "freeze-then-unfreeze", "head-epochs": 1, "note": 'a "quoted" </code> one'}


@pytest.mark.parametrize("number", [0, 1, 2, 11, 30, 31, 100, 101])
def test_any_number_of_classes_makes_a_page(tmp_path, number):
    page = Elements(read(classes_run(tmp_path / "run", [f"class {index}" for index in range(number)])))
    assert sum(tag == "svg" for tag, _ in page.tags) == (3 if 30 < number <= 100 else 2)
    assert any((attrs.get("class") or "").startswith("matrix") for _, attrs in page.tags) == (0 < number <= 30)
    assert ("most frequent confusions" in page.text) == (number > 30)


def test_many_classes_are_folded_away_and_their_largest_confusions_listed(tmp_path):
    folder = classes_run(tmp_path / "run", [f"class {index}" for index in range(200)])
    label, prediction, count = json.loads((folder / "report.json").read_text())["splits"]["test"]["largest_confusions"][
        0
    ]
    text = Elements(read(folder)).text
    listed = text.split("in percent of the samples with that label. label prediction samples percent")[1]
    assert "All 200 classes, lowest recall first" in text
    assert listed.startswith(f" class {label} class {prediction} {count} ")
    assert len(re.findall(r"class \d+ class \d+ \d+ \d+\.\d %", listed)) == 20


def test_only_so_many_classes_are_listed_as_a_page_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("tuneforge.report.report._MAX_LISTED_CLASSES", 70)
    text = Elements(read(classes_run(tmp_path / "run", [f"class {index}" for index in range(110)]))).text
    assert "70 of 110 classes, lowest recall first; all are in report.json" in text
    assert len(re.findall(r"class \d+ [01]\.\d{4} [01]\.\d{4} [01]\.\d{4} \d", text)) == 70


def test_names_of_users_never_become_markup(tmp_path):
    folder = classes_run(tmp_path / "run", HOSTILE, phases=[(name or "none", 1) for name in HOSTILE])
    page = Elements(read(folder))
    assert not any(tag == "script" or "onmouseover" in attrs for tag, attrs in page.tags)
    for name in HOSTILE[:7]:
        assert " ".join(name.split()) in page.text
    assert "49" not in [word.strip() for word in page.words]
    assert "\\udcff\ufffd\ufffd[31m" in page.text


def test_regression_shows_metrics_and_predictions_and_no_classes(tmp_path):
    page = Elements(read(regression_run(tmp_path / "run")))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert f"test 360 {report['splits']['test']['mae']:.4f}" in page.text
    assert "row 0 100 EUR 90.5 EUR rooms 0, area 72.5, year 1975" in page.text
    assert "Hardest samples" in page.text
    assert not {"confusion", "classes"} & {attrs.get("id") for _, attrs in page.tags}


def test_predictions_without_images_are_table_rows(tmp_path):
    folder = classes_run(tmp_path / "run", DIGITS)
    write_json(folder / "hardest_samples.json", incorrect_predictions(DIGITS, 3, pictures=False))
    page = Elements(read(folder))
    assert "test/0 0 (4.0 %) 1 (93.0 %) ids [0, 7, 12]" in page.text
    assert "img" not in {tag for tag, _ in page.tags}


def test_run_without_incorrect_predictions_says_so(tmp_path):
    folder = classes_run(tmp_path / "run", "ab", num_incorrect=0)
    assert "No incorrect prediction on the test split was recorded." in Elements(read(folder)).text


def test_run_without_epochs_has_no_curves(tmp_path):
    page = Elements(read(classes_run(tmp_path / "run", DIGITS, phases=())))
    assert "svg" not in {tag for tag, _ in page.tags}
    assert "0 epochs" in page.text


def test_nan_and_inf_metrics_are_shown(tmp_path):
    splits = {"val": class_metrics(DIGITS, 0, skill=1), "test": class_metrics(DIGITS, 0, skill=1)}
    text = Elements(read(write_run(tmp_path / "run", labels=DIGITS, splits=splits, hardest_samples=[]))).text
    assert "test 360 NaN or Inf NaN or Inf" in text
    assert "Hardest class" not in text


@pytest.mark.parametrize(
    "name",
    ["run.json", "model.json", "report.json", "metrics.jsonl", "timings.jsonl", "steps.jsonl", "hardest_samples.json"],
)
def test_missing_file_is_left_out(tmp_path, name):
    folder = classes_run(tmp_path / "run", DIGITS)
    (folder / name).unlink()
    assert "</html>" in read(folder)
    Elements(read(folder))


@pytest.mark.parametrize("name", ["run.json", "model.json", "report.json"])
def test_missing_keys_are_left_out(tmp_path, name):
    folder = classes_run(tmp_path / "run", DIGITS, phases=[("all", 1)] if name == "report.json" else ())
    whole = json.loads((folder / name).read_text())
    for key in whole:
        write_json(folder / name, {other: value for other, value in whole.items() if other != key})
        assert "</html>" in read(folder)
    (folder / name).write_text("{}")
    assert "</html>" in read(folder)


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FolderError, match="not a finished run"):
        write_report(tmp_path)


def test_commands_name_the_folder_as_the_user_did(tmp_path):
    folder = classes_run(tmp_path / "my run", "ab")
    assert f"tuneforge predict '{tmp_path.name}/my run' IMAGE" in Elements(read(folder)).text
    run = json.loads((folder / "run.json").read_text())
    run["config"]["out"] = str(folder)
    write_json(folder / "run.json", run)
    assert f"tuneforge evaluate '{folder}'" in Elements(read(folder)).text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "NaN or Inf"),
        (math.nan, "NaN or Inf"),
        (0.0, "0.0000"),
        (0.98611, "0.9861"),
        (2e-5, "2.00e-05"),
        (-3.5, "-3.5000"),
        (12345.678, "12,345.7"),
        (1234, "1,234"),
    ],
)
def test_metrics_are_formatted(value, shown):
    assert format_metric(value) == shown


def test_durations_for_people():
    assert [format_duration(seconds) for seconds in (4.26, 150, 9000)] == ["4.3 s", "2.5 min", "2.5 h"]
