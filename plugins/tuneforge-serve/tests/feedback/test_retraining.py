"""A retraining round trains on old data and labeled feedback, finds label issues, and asks the gate."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from gaussian_clusters import NUM_FEATURES, is_correct, log_clusters, sample_clusters, train_base_run
from PIL import Image
from tuneforge_serve import ModelRegistry, promote
from tuneforge_serve.feedback.label_issues import (
    describe_label_issues,
    flag_unlikely_labels,
    flag_vanished_classes,
    knn_probabilities,
)
from tuneforge_serve.feedback.monitoring import monitor_version
from tuneforge_serve.feedback.request_log import LoggedRequest, RequestLog
from tuneforge_serve.feedback.retraining import ROUND, LabeledSamples, retrain
from tuneforge_serve.feedback.rounds import (
    RetrainingTriggers,
    check_triggers,
    find_last_round,
    plot_accuracy,
    run_rounds,
)

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.exporting import ReferenceData


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train_base_run(tmp_path_factory.mktemp("base"))


@pytest.fixture
def registry(base, tmp_path):
    promote(base.run_dir, registry=tmp_path / "models", name="kinds", formats=("safetensors",))
    return ModelRegistry(tmp_path / "models", "kinds")


@pytest.fixture
def request_log(tmp_path):
    with RequestLog(
        tmp_path / "models" / "requests.db" if (tmp_path / "models").exists() else tmp_path / "r.db"
    ) as opened:
        yield opened


def run_round(registry, request_log, **options):
    options = {
        "strategy": tf.use("replay", epochs=4, lr=5e-3),
        "formats": ("safetensors",),
        "run_settings": {"page": False},
    } | options
    return retrain(registry.root, request_log, name="kinds", **options)


def test_shifted_data_is_learned_and_old_data_is_not_forgotten(registry, request_log):
    shifted = {"angle": 3.1, "height": 6.0}  # rotated, and lifted, which tells the distributions apart
    values, classes = sample_clusters(300, seed=1, **shifted)
    held_out, labels = sample_clusters(300, seed=2, **shifted)
    before = is_correct(registry.version_dir(), held_out, labels).mean()
    log_clusters(registry, request_log, values, ["abc"[index] for index in classes])
    result = run_round(registry, request_log)
    assert result.decision.promoted, result.decision.format_table()
    assert (result.new_version, result.previous_champion, registry.champion) == (2, 1, 2)
    assert before < 0.5
    assert is_correct(registry.version_dir(), held_out, labels).mean() > 0.85
    assert is_correct(registry.version_dir(), *sample_clusters(300, seed=3)).mean() > 0.95
    assert 30 <= result.num_held_out <= 90
    (line,) = [line for line in registry.read_events() if line["event"] == ROUND]
    assert (line["labels"], line["promoted"], line["round"]) == (300, 2, 1)


def test_drift_ends_with_a_round_on_the_new_data_and_returns_with_the_next_shift(registry, request_log):
    def monitor():
        return monitor_version(request_log, ReferenceData.read(registry.version_dir()), version=str(registry.champion))

    def labels(classes):
        return ["abc"[index] for index in classes]

    first, second = {"angle": 3.1, "height": 6.0}, {"angle": 1.0, "height": -6.0}
    for number, shift in enumerate((first, second)):
        values, classes = sample_clusters(300, seed=10 * number + 1, **shift)
        log_clusters(registry, request_log, values, labels(classes), start=1000 * number)
        assert monitor().input_drift.is_drift
        result = run_round(registry, request_log)
        assert result.decision.promoted, result.decision.format_table()
        log_clusters(
            registry, request_log, sample_clusters(300, seed=10 * number + 2, **shift)[0], [], start=1000 * number + 300
        )
        assert not monitor().has_drift, monitor()
    for number, shift in enumerate(({}, first), start=3):  # earlier distributions are no drift either
        other = RequestLog(request_log.path.with_name(f"{number}.db"))
        log_clusters(registry, other, sample_clusters(300, seed=30 + number, **shift)[0], [])
        assert not monitor_version(other, ReferenceData.read(registry.version_dir()), version="3").has_drift
        other.close()


def test_too_few_labels_are_refused_before_anything_is_written(registry, request_log):
    values, classes = sample_clusters(40, seed=1)
    log_clusters(registry, request_log, values, ["abc"[classes[0]]])
    with pytest.raises(tf.DataError, match=r"1 labeled sample\(s\) are too few") as caught:
        run_round(registry, request_log)
    assert "needs 6 for a significant difference" in str(caught.value.why)
    assert "label about 30 more" in str(caught.value.fix)
    assert not (registry.path / "rounds").exists()
    assert not [line for line in registry.read_events() if line["event"] == ROUND]
    triggers = RetrainingTriggers(num_labels=1, min_new_labels=1)
    assert check_triggers(registry, request_log, triggers) is None
    for row, index in enumerate(classes):
        request_log.label(f"r{row}", "abc"[index])
    assert request_log.stats().num_held_out >= 6
    assert check_triggers(registry, request_log, triggers) == "41 new labels"


def test_too_many_label_issues_stop_the_training(registry, request_log):
    values, classes = sample_clusters(300, seed=1)
    labels = [(index + (row % 5 == 0)) % 3 for row, index in enumerate(classes)]
    log_clusters(registry, request_log, values, ["abc"[index] for index in labels])
    result = run_round(registry, request_log)
    assert not result.decision.promoted
    assert "60 of 300 labels do not fit their samples" in result.decision.reason
    assert "10 % is the limit" in result.decision.reason
    assert [each.name for each in result.round_dir.iterdir()] == ["label_issues.json"]
    assert [line["event"] for line in registry.read_events()][-2:] == ["refused", ROUND]
    assert run_round(registry, request_log, max_label_issues=0.3).round_dir.joinpath("run").exists()


def test_new_classes_are_learned_over_two_rounds(registry, request_log):
    values, classes = sample_clusters(90, seed=1)
    new = np.random.default_rng(5).normal(size=(120, NUM_FEATURES)) * 0.5
    log_clusters(
        registry, request_log, np.concatenate([values, new]), ["abc"[index] for index in classes] + ["middle"] * 120
    )
    result = run_round(registry, request_log)
    assert result.decision.promoted, result.decision.format_table()
    assert tf.load(registry.version_dir()).targets.labels == ("a", "b", "c", "middle")
    more = np.random.default_rng(6).normal(size=(60, NUM_FEATURES)) * 0.5
    more[:, 3] += 8
    log_clusters(registry, request_log, more, ["far"] * 60, start=1000)
    result = run_round(registry, request_log)
    assert result.decision.promoted, result.decision.format_table()
    assert tf.load(registry.version_dir()).targets.labels == ("a", "b", "c", "far", "middle")
    assert is_correct(registry.version_dir(), *sample_clusters(150, seed=9)).mean() > 0.9


def test_class_labeled_as_another_one_is_refused(registry, request_log):
    values, classes = sample_clusters(300, seed=1)
    log_clusters(registry, request_log, values, ["abc"[index] if index else "b" for index in classes])
    result = run_round(registry, request_log)
    assert not result.decision.promoted
    assert registry.champion == 1
    assert len(result.label_issues) > 90
    assert {(each.label, each.suggested_label) for each in result.label_issues} == {("b", "a")}
    named = json.loads((result.round_dir / "label_issues.json").read_text())
    assert len(named) == len(result.label_issues)
    assert sum(int(each["id"][1:]) % 3 == 0 for each in named) > 90


def test_gate_refuses_trusted_wrong_labels(registry, request_log):
    values, classes = sample_clusters(300, seed=1)
    log_clusters(registry, request_log, values, ["abc"[index] if index else "b" for index in classes])
    result = run_round(registry, request_log, trust_labels=True)
    assert result.label_issues == ()
    assert not result.decision.promoted, result.decision.format_table()


def test_missing_labels_are_an_error(registry, request_log):
    with pytest.raises(tf.DataError, match="there are no labels"):
        run_round(registry, request_log)
    assert not (registry.path / "rounds" / "1").exists()


def test_held_out_samples_are_not_trained_on(registry, request_log):
    values, classes = sample_clusters(200, seed=1)
    log_clusters(registry, request_log, values, ["abc"[index] for index in classes])
    result = run_round(registry, request_log)
    data = tf.load(result.round_dir / "run").with_data().data
    held_out = {f"new/{each.request.id}" for each in request_log.labeled_requests("held-out")}
    trained_on = {split.id_of(row) for split in (data.train, data.val) for row in range(len(split))}
    assert held_out
    assert not held_out & trained_on
    assert {data.extra_test_splits["new"].id_of(row) for row in range(len(data.extra_test_splits["new"]))} <= held_out
    assert set(data.sample_groups) == {"old", "new"}


def test_rare_new_class_is_skipped_with_a_note(registry, request_log):
    values, classes = sample_clusters(100, seed=1)
    log_clusters(
        registry, request_log, values, ["typo" if row < 3 else "abc"[index] for row, index in enumerate(classes)]
    )
    result = run_round(registry, request_log, trust_labels=True)
    data = tf.load(result.round_dir / "run").with_data().data
    assert data.targets.labels == ("a", "b", "c")
    assert any("typo" in note for note in data.notes)


def test_version_without_weights_cannot_be_retrained(registry, request_log):
    (registry.version_dir() / "model.safetensors").unlink()
    with pytest.raises(tf.FolderError, match="cannot be retrained"):
        run_round(registry, request_log)


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_random_wrong_labels_are_found(fraction):
    old, old_labels = (torch.from_numpy(each) for each in sample_clusters(300, seed=2))
    new, labels = (torch.from_numpy(each) for each in sample_clusters(400, seed=1))
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(400, generator=generator) < fraction
    noisy = torch.where(wrong, (labels + torch.randint(1, 3, (400,), generator=generator)) % 3, labels)
    probabilities = knn_probabilities(old.float(), old_labels, new.float(), noisy, num_classes=3)
    assert probabilities.sum(1).allclose(torch.ones(400))
    found = flag_unlikely_labels(probabilities, noisy) >= 0
    assert (found & wrong).sum() > 0.9 * wrong.sum()
    assert (found & ~wrong).sum() < 0.02 * 400


def test_vanished_class_is_found_and_shifted_classes_are_not():
    classes = torch.arange(300) % 3
    predicted = torch.eye(3)[classes] * 0.94 + 0.02
    vanished = torch.where(classes == 0, 1, classes)
    assert flag_vanished_classes(predicted, vanished).tolist() == torch.where(classes == 0, 0, -1).tolist()
    assert (flag_vanished_classes(predicted, classes) == -1).all()
    assert (flag_vanished_classes(predicted, (classes + 1) % 3) == -1).all()  # all classes moved, as after a rotation
    half = torch.where((classes == 0) & (torch.arange(300) < 150), 1, classes)
    assert (flag_vanished_classes(predicted, half) == -1).all()


def test_correct_labels_are_not_issues():
    new, labels = (torch.from_numpy(each) for each in sample_clusters(300, seed=1, angle=1.0))
    old, old_labels = (torch.from_numpy(each) for each in sample_clusters(300, seed=2))
    found = flag_unlikely_labels(knn_probabilities(old.float(), old_labels, new.float(), labels, num_classes=3), labels)
    assert (found >= 0).sum() < 0.02 * 300
    assert describe_label_issues([], 3) == "no issues among 3 labels"


@pytest.mark.parametrize(
    ("triggers", "expected"),
    [
        (RetrainingTriggers(num_labels=60), "60 new labels"),
        (RetrainingTriggers(num_labels=61), None),
        (RetrainingTriggers(num_labels=None, min_accuracy=0.9), "below 0.9"),
        (RetrainingTriggers(num_labels=None, min_accuracy=0.1), None),
        (RetrainingTriggers(num_labels=None, min_accuracy=0.9, min_new_labels=61), None),
        (RetrainingTriggers(num_labels=None), None),
    ],
)
def test_trigger_starts_a_round(registry, request_log, triggers, expected):
    values, _ = sample_clusters(60, seed=1)
    log_clusters(registry, request_log, values, ["a"] * 60)
    reason = check_triggers(registry, request_log, triggers)
    assert reason is None if expected is None else expected in reason


def test_minimum_interval_also_holds_after_a_refusal(registry, request_log):
    log_clusters(registry, request_log, sample_clusters(60, seed=1)[0], ["a"] * 60)
    registry.log_event(ROUND, labels=0, promoted=None)
    triggers = RetrainingTriggers(num_labels=50, min_interval_s=100)
    assert check_triggers(registry, request_log, triggers) is None
    assert check_triggers(registry, request_log, triggers, now=time.time() + 200) == "60 new labels"
    registry.log_event(ROUND, labels=60, promoted=None)
    assert check_triggers(registry, request_log, triggers, now=time.time() + 200) is None


def test_continuous_training_goes_on_after_a_failed_round(registry, request_log):
    log_clusters(registry, request_log, sample_clusters(60, seed=1)[0], ["a"] * 60)
    messages, sleeps = [], []

    def fail():
        raise tf.DataError("broken")

    def sleep(seconds):
        sleeps.append(seconds)
        if len(sleeps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(
            run_rounds(
                registry,
                request_log,
                RetrainingTriggers(num_labels=50),
                fail,
                poll_interval_s=7,
                log=messages.append,
                sleep=sleep,
            )
        )
    assert sleeps == [7, 7, 7]
    assert messages == ["retraining round started: 60 new labels", "retraining round failed: broken"]
    assert find_last_round(registry)["failed"]


def test_command_runs_a_round_and_plots_the_accuracy(registry, request_log, capsys):
    values, classes = sample_clusters(120, seed=1)
    log_clusters(registry, request_log, values, ["abc"[index] for index in classes])
    arguments = ["--registry", str(registry.root), "--strategy.epochs", "1", "--json"]
    assert main(["retrain", *arguments]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert (printed["version"], printed["num_labeled"]) == (None, 120)
    assert "no significant difference" in printed["decision"]["reason"]
    with Image.open(plot_accuracy(registry, request_log)) as plot:
        assert plot.size[0] > 500


def test_command_without_a_request_log_is_reported(registry, capsys):
    assert main(["retrain", "--registry", str(registry.root), "--request-log", "nowhere"]) == 73
    assert "no request log 'nowhere'" in capsys.readouterr().err
    assert main(["retrain", "--registry", str(registry.root), "--continuous", "--min-interval", "soon"]) == 2
    assert "'soon' is not a duration" in capsys.readouterr().err


def test_samples_of_different_shapes_are_refused():
    class Anything:
        def decode(self, raw):
            return torch.zeros(len(raw))

    from tuneforge_serve.feedback.request_log import LabeledRequest

    both = [LabeledRequest(LoggedRequest(body.decode(), "1", body, "x", {}), "a", False) for body in (b"1", b"22")]
    with pytest.raises(tf.DataError, match="different shapes"):
        LabeledSamples.decode(both, Anything())
