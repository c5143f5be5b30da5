"""A retraining round trains on old data and labeled feedback, finds label issues, and asks the gate."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from gaussian_clusters import FIELDS, ask, base_run, cloud, right
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
    return base_run(tmp_path_factory.mktemp("base"))


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
    changed = {"shift": 3.1, "height": 6.0}  # rotated, and lifted, which tells the distributions apart
    values, codes = cloud(300, seed=1, **changed)
    held_out, labels = cloud(300, seed=2, **changed)
    before = right(registry.version_dir(), held_out, labels).mean()
    ask(registry, request_log, values, ["abc"[code] for code in codes])
    done = run_round(registry, request_log)
    assert done.decision.promoted, done.decision.format_table()
    assert (done.new_version, done.previous_champion, registry.champion) == (2, 1, 2)
    assert before < 0.5
    assert right(registry.version_dir(), held_out, labels).mean() > 0.85
    assert right(registry.version_dir(), *cloud(300, seed=3)).mean() > 0.95
    assert 30 <= done.num_held_out <= 90
    (line,) = [line for line in registry.read_events() if line["event"] == ROUND]
    assert (line["labels"], line["promoted"], line["round"]) == (300, 2, 1)


def test_drift_ends_with_a_round_on_the_new_data_and_returns_with_the_next_shift(registry, request_log):
    def seen():
        return monitor_version(request_log, ReferenceData.read(registry.version_dir()), version=str(registry.champion))

    def labels(codes):
        return ["abc"[code] for code in codes]

    first, second = {"shift": 3.1, "height": 6.0}, {"shift": 1.0, "height": -6.0}
    for number, shift in enumerate((first, second)):
        values, codes = cloud(300, seed=10 * number + 1, **shift)
        ask(registry, request_log, values, labels(codes), start=1000 * number)
        assert seen().input_drift.is_drift
        done = run_round(registry, request_log)
        assert done.decision.promoted, done.decision.format_table()
        ask(registry, request_log, cloud(300, seed=10 * number + 2, **shift)[0], [], start=1000 * number + 300)
        assert not seen().has_drift, seen()
    for number, shift in enumerate(({}, first), start=3):  # earlier distributions are no drift either
        other = RequestLog(request_log.path.with_name(f"{number}.db"))
        ask(registry, other, cloud(300, seed=30 + number, **shift)[0], [])
        assert not monitor_version(other, ReferenceData.read(registry.version_dir()), version="3").has_drift
        other.close()


def test_too_few_labels_are_refused_before_anything_is_written(registry, request_log):
    values, codes = cloud(40, seed=1)
    ask(registry, request_log, values, ["abc"[codes[0]]])
    with pytest.raises(tf.DataError, match=r"1 labeled sample\(s\) are too few") as caught:
        run_round(registry, request_log)
    assert "needs 6 for a significant difference" in str(caught.value.why)
    assert "label about 30 more" in str(caught.value.fix)
    assert not (registry.path / "rounds").exists()
    assert not [line for line in registry.read_events() if line["event"] == ROUND]
    triggers = RetrainingTriggers(num_labels=1, min_new_labels=1)
    assert check_triggers(registry, request_log, triggers) is None
    for row, code in enumerate(codes):
        request_log.label(f"r{row}", "abc"[code])
    assert request_log.stats().num_held_out >= 6
    assert check_triggers(registry, request_log, triggers) == "41 new labels"


def test_too_many_label_issues_stop_the_training(registry, request_log):
    values, codes = cloud(300, seed=1)
    given = [(code + (row % 5 == 0)) % 3 for row, code in enumerate(codes)]
    ask(registry, request_log, values, ["abc"[code] for code in given])
    done = run_round(registry, request_log)
    assert not done.decision.promoted
    assert "60 of 300 labels do not fit their samples" in done.decision.reason
    assert "10 % is the limit" in done.decision.reason
    assert [each.name for each in done.round_dir.iterdir()] == ["label_issues.json"]
    assert [line["event"] for line in registry.read_events()][-2:] == ["refused", ROUND]
    assert run_round(registry, request_log, max_label_issues=0.3).round_dir.joinpath("run").exists()


def test_new_classes_are_learned_over_two_rounds(registry, request_log):
    values, codes = cloud(90, seed=1)
    new = np.random.default_rng(5).normal(size=(120, FIELDS)) * 0.5
    ask(registry, request_log, np.concatenate([values, new]), ["abc"[code] for code in codes] + ["middle"] * 120)
    done = run_round(registry, request_log)
    assert done.decision.promoted, done.decision.format_table()
    assert tf.load(registry.version_dir()).targets.labels == ("a", "b", "c", "middle")
    more = np.random.default_rng(6).normal(size=(60, FIELDS)) * 0.5
    more[:, 3] += 8
    ask(registry, request_log, more, ["far"] * 60, start=1000)
    done = run_round(registry, request_log)
    assert done.decision.promoted, done.decision.format_table()
    assert tf.load(registry.version_dir()).targets.labels == ("a", "b", "c", "far", "middle")
    assert right(registry.version_dir(), *cloud(150, seed=9)).mean() > 0.9


def test_class_labeled_as_another_one_is_refused(registry, request_log):
    values, codes = cloud(300, seed=1)
    ask(registry, request_log, values, ["abc"[code] if code else "b" for code in codes])
    done = run_round(registry, request_log)
    assert not done.decision.promoted
    assert registry.champion == 1
    assert len(done.label_issues) > 90
    assert {(each.label, each.suggested_label) for each in done.label_issues} == {("b", "a")}
    named = json.loads((done.round_dir / "label_issues.json").read_text())
    assert len(named) == len(done.label_issues)
    assert sum(int(each["id"][1:]) % 3 == 0 for each in named) > 90


def test_gate_refuses_trusted_wrong_labels(registry, request_log):
    values, codes = cloud(300, seed=1)
    ask(registry, request_log, values, ["abc"[code] if code else "b" for code in codes])
    done = run_round(registry, request_log, trust_labels=True)
    assert done.label_issues == ()
    assert not done.decision.promoted, done.decision.format_table()


def test_missing_labels_are_an_error(registry, request_log):
    with pytest.raises(tf.DataError, match="there are no labels"):
        run_round(registry, request_log)
    assert not (registry.path / "rounds" / "1").exists()


def test_held_out_samples_are_not_trained_on(registry, request_log):
    values, codes = cloud(200, seed=1)
    ask(registry, request_log, values, ["abc"[code] for code in codes])
    done = run_round(registry, request_log)
    data = tf.load(done.round_dir / "run").with_data().data
    held = {f"new/{each.request.id}" for each in request_log.labeled_requests("held-out")}
    seen = {split.id_of(row) for split in (data.train, data.val) for row in range(len(split))}
    assert held
    assert not held & seen
    assert {data.extra_test_splits["new"].id_of(row) for row in range(len(data.extra_test_splits["new"]))} <= held
    assert set(data.sample_groups) == {"old", "new"}


def test_rare_new_class_is_skipped_with_a_note(registry, request_log):
    values, codes = cloud(100, seed=1)
    ask(registry, request_log, values, ["typo" if row < 3 else "abc"[code] for row, code in enumerate(codes)])
    done = run_round(registry, request_log, trust_labels=True)
    data = tf.load(done.round_dir / "run").with_data().data
    assert data.targets.labels == ("a", "b", "c")
    assert any("typo" in note for note in data.notes)


def test_version_without_weights_cannot_be_retrained(registry, request_log):
    (registry.version_dir() / "model.safetensors").unlink()
    with pytest.raises(tf.FolderError, match="cannot be retrained"):
        run_round(registry, request_log)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_random_wrong_labels_are_found(share):
    old, known = (torch.from_numpy(each) for each in cloud(300, seed=2))
    new, truth = (torch.from_numpy(each) for each in cloud(400, seed=1))
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(400, generator=generator) < share
    given = torch.where(wrong, (truth + torch.randint(1, 3, (400,), generator=generator)) % 3, truth)
    likely = knn_probabilities(old.float(), known, new.float(), given, num_classes=3)
    assert likely.sum(1).allclose(torch.ones(400))
    found = flag_unlikely_labels(likely, given) >= 0
    assert (found & wrong).sum() > 0.9 * wrong.sum()
    assert (found & ~wrong).sum() < 0.02 * 400


def test_vanished_class_is_found_and_shifted_classes_are_not():
    codes = torch.arange(300) % 3
    predicted = torch.eye(3)[codes] * 0.94 + 0.02
    gone = torch.where(codes == 0, 1, codes)
    assert flag_vanished_classes(predicted, gone).tolist() == torch.where(codes == 0, 0, -1).tolist()
    assert (flag_vanished_classes(predicted, codes) == -1).all()
    assert (flag_vanished_classes(predicted, (codes + 1) % 3) == -1).all()  # all classes moved, as after a rotation
    half = torch.where((codes == 0) & (torch.arange(300) < 150), 1, codes)
    assert (flag_vanished_classes(predicted, half) == -1).all()


def test_correct_labels_are_not_issues():
    new, truth = (torch.from_numpy(each) for each in cloud(300, seed=1, shift=1.0))
    old, known = (torch.from_numpy(each) for each in cloud(300, seed=2))
    found = flag_unlikely_labels(knn_probabilities(old.float(), known, new.float(), truth, num_classes=3), truth)
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
    values, _ = cloud(60, seed=1)
    ask(registry, request_log, values, ["a"] * 60)
    reason = check_triggers(registry, request_log, triggers)
    assert reason is None if expected is None else expected in reason


def test_minimum_interval_also_holds_after_a_refusal(registry, request_log):
    ask(registry, request_log, cloud(60, seed=1)[0], ["a"] * 60)
    registry.log_event(ROUND, labels=0, promoted=None)
    triggers = RetrainingTriggers(num_labels=50, min_interval_s=100)
    assert check_triggers(registry, request_log, triggers) is None
    assert check_triggers(registry, request_log, triggers, now=time.time() + 200) == "60 new labels"
    registry.log_event(ROUND, labels=60, promoted=None)
    assert check_triggers(registry, request_log, triggers, now=time.time() + 200) is None


def test_continuous_training_goes_on_after_a_failed_round(registry, request_log):
    ask(registry, request_log, cloud(60, seed=1)[0], ["a"] * 60)
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
    values, codes = cloud(120, seed=1)
    ask(registry, request_log, values, ["abc"[code] for code in codes])
    arguments = ["--registry", str(registry.root), "--strategy.epochs", "1", "--json"]
    assert main(["retrain", *arguments]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert (printed["version"], printed["num_labeled"]) == (None, 120)
    assert "no significant difference" in printed["decision"]["reason"]
    with Image.open(plot_accuracy(registry, request_log)) as drawn:
        assert drawn.size[0] > 500


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
