"""A turn of the circle: old data and labelled feedback become a challenger, suspects are named, the gate decides."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from gaussian_clusters import FIELDS, ask, base_run, cloud, right
from PIL import Image
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
from tuneforge_serve.registry.model_registry import ModelRegistry
from tuneforge_serve.registry.promotion import promote

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.exporting.reference_outputs import ReferenceData


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_run(tmp_path_factory.mktemp("base"))


@pytest.fixture
def store(base, tmp_path):
    promote(base.run_dir, registry=tmp_path / "models", name="kinds", to=("safetensors",))
    return ModelRegistry(tmp_path / "models", "kinds")


@pytest.fixture
def records(tmp_path):
    with RequestLog(
        tmp_path / "models" / "requests.db" if (tmp_path / "models").exists() else tmp_path / "r.db"
    ) as opened:
        yield opened


def turn(store, records, **given):
    given = {
        "strategy": tf.use("replay", epochs=4, lr=5e-3),
        "to": ("safetensors",),
        "run_settings": {"page": False},
    } | given
    return retrain(store.root, records, name="kinds", **given)


def test_a_changed_world_is_learnt_and_the_old_one_kept(store, records):
    changed = {"shift": 3.1, "height": 6.0}  # turned around, and lifted, which tells the worlds apart
    values, codes = cloud(300, seed=1, **changed)
    fresh, truth = cloud(300, seed=2, **changed)
    before = right(store.version_dir(), fresh, truth).mean()
    ask(store, records, values, ["abc"[code] for code in codes])
    done = turn(store, records)
    assert done.decision.promoted, done.decision.format_table()
    assert (done.new_version, done.previous_champion, store.champion) == (2, 1, 2)
    assert before < 0.5
    assert right(store.version_dir(), fresh, truth).mean() > 0.85
    assert right(store.version_dir(), *cloud(300, seed=3)).mean() > 0.95
    assert 30 <= done.num_held_out <= 90
    (line,) = [line for line in store.read_events() if line["event"] == ROUND]
    assert (line["labels"], line["promoted"], line["round"]) == (300, 2, 1)


def test_drift_is_over_once_a_turn_has_seen_the_new_world_and_comes_back_with_the_next(store, records):
    def seen():
        return monitor_version(records, ReferenceData.read(store.version_dir()), version=str(store.champion))

    def labels(codes):
        return ["abc"[code] for code in codes]

    first, second = {"shift": 3.1, "height": 6.0}, {"shift": 1.0, "height": -6.0}
    for number, world in enumerate((first, second)):
        values, codes = cloud(300, seed=10 * number + 1, **world)
        ask(store, records, values, labels(codes), start=1000 * number)
        assert seen().input_drift.is_drift
        done = turn(store, records)
        assert done.decision.promoted, done.decision.format_table()
        ask(store, records, cloud(300, seed=10 * number + 2, **world)[0], [], start=1000 * number + 300)
        assert not seen().has_drift, seen()
    for number, world in enumerate(({}, first), start=3):  # what it knows from before is no drift either
        other = RequestLog(records.path.with_name(f"{number}.db"))
        ask(store, other, cloud(300, seed=30 + number, **world)[0], [])
        assert not monitor_version(other, ReferenceData.read(store.version_dir()), version="3").has_drift
        other.close()


def test_too_few_labels_are_refused_before_anything_is_made(store, records):
    values, codes = cloud(40, seed=1)
    ask(store, records, values, ["abc"[codes[0]]])
    with pytest.raises(tf.DataError, match=r"1 labelled sample\(s\) are too few") as caught:
        turn(store, records)
    assert "needs 6 to see any difference" in str(caught.value.why)
    assert "label about 30 more" in str(caught.value.fix)
    assert not (store.path / "rounds").exists()
    assert not [line for line in store.read_events() if line["event"] == ROUND]
    triggers = RetrainingTriggers(num_labels=1, min_new_labels=1)
    assert check_triggers(store, records, triggers) is None
    for place, code in enumerate(codes):
        records.label(f"r{place}", "abc"[code])
    assert records.stats().num_held_out >= 6
    assert check_triggers(store, records, triggers) == "41 new labels"


def test_where_too_many_labels_do_not_fit_nothing_is_trained(store, records):
    values, codes = cloud(300, seed=1)
    given = [(code + (place % 5 == 0)) % 3 for place, code in enumerate(codes)]
    ask(store, records, values, ["abc"[code] for code in given])
    done = turn(store, records)
    assert not done.decision.promoted
    assert "60 of 300 labels do not fit their samples" in done.decision.reason
    assert "10 % are allowed" in done.decision.reason
    assert [each.name for each in done.round_dir.iterdir()] == ["label_issues.json"]
    assert [line["event"] for line in store.read_events()][-2:] == ["refused", ROUND]
    assert turn(store, records, max_label_issues=0.3).round_dir.joinpath("run").exists()


def test_a_class_never_seen_before_is_learnt_over_two_turns(store, records):
    values, codes = cloud(90, seed=1)
    new = np.random.default_rng(5).normal(size=(120, FIELDS)) * 0.5
    ask(store, records, np.concatenate([values, new]), ["abc"[code] for code in codes] + ["middle"] * 120)
    done = turn(store, records)
    assert done.decision.promoted, done.decision.format_table()
    assert tf.load(store.version_dir()).targets.labels == ("a", "b", "c", "middle")
    more = np.random.default_rng(6).normal(size=(60, FIELDS)) * 0.5
    more[:, 3] += 8
    ask(store, records, more, ["far"] * 60, start=1000)
    done = turn(store, records)
    assert done.decision.promoted, done.decision.format_table()
    assert tf.load(store.version_dir()).targets.labels == ("a", "b", "c", "far", "middle")
    assert right(store.version_dir(), *cloud(150, seed=9)).mean() > 0.9


def test_labels_of_one_class_always_called_another_do_not_pass(store, records):
    values, codes = cloud(300, seed=1)
    ask(store, records, values, ["abc"[code] if code else "b" for code in codes])
    done = turn(store, records)
    assert not done.decision.promoted
    assert store.champion == 1
    assert len(done.label_issues) > 90
    assert {(each.label, each.suggested_label) for each in done.label_issues} == {("b", "a")}
    named = json.loads((done.round_dir / "label_issues.json").read_text())
    assert len(named) == len(done.label_issues)
    assert sum(int(each["id"][1:]) % 3 == 0 for each in named) > 90


def test_trusted_labels_that_do_not_fit_are_for_the_gate_to_refuse(store, records):
    values, codes = cloud(300, seed=1)
    ask(store, records, values, ["abc"[code] if code else "b" for code in codes])
    done = turn(store, records, trust_labels=True)
    assert done.label_issues == ()
    assert not done.decision.promoted, done.decision.format_table()


def test_nothing_labelled_is_an_error(store, records):
    with pytest.raises(tf.DataError, match="nothing is labelled"):
        turn(store, records)
    assert not (store.path / "rounds" / "1").exists()


def test_what_was_held_out_is_not_trained_on(store, records):
    values, codes = cloud(200, seed=1)
    ask(store, records, values, ["abc"[code] for code in codes])
    done = turn(store, records)
    data = tf.load(done.round_dir / "run").with_data().data
    held = {f"new/{each.request.id}" for each in records.labeled_requests("held-out")}
    seen = {split.id_of(row) for split in (data.train, data.val) for row in range(len(split))}
    assert held
    assert not held & seen
    assert {data.extra_test_splits["new"].id_of(row) for row in range(len(data.extra_test_splits["new"]))} <= held
    assert set(data.sample_groups) == {"old", "new"}


def test_a_rare_new_class_is_left_out_and_said(store, records):
    values, codes = cloud(100, seed=1)
    ask(store, records, values, ["typo" if place < 3 else "abc"[code] for place, code in enumerate(codes)])
    done = turn(store, records, trust_labels=True)
    data = tf.load(done.round_dir / "run").with_data().data
    assert data.targets.labels == ("a", "b", "c")
    assert any("typo" in note for note in data.notes)


def test_a_version_without_weights_cannot_be_tuned(store, records):
    (store.version_dir() / "model.safetensors").unlink()
    with pytest.raises(tf.FolderError, match="holds nothing that can be tuned"):
        turn(store, records)


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


def test_a_class_that_labels_take_away_is_named_and_one_that_moved_is_not():
    codes = torch.arange(300) % 3
    said = torch.eye(3)[codes] * 0.94 + 0.02
    gone = torch.where(codes == 0, 1, codes)
    assert flag_vanished_classes(said, gone).tolist() == torch.where(codes == 0, 0, -1).tolist()
    assert (flag_vanished_classes(said, codes) == -1).all()
    assert (flag_vanished_classes(said, (codes + 1) % 3) == -1).all()  # all classes moved: so is a world that turned
    half = torch.where((codes == 0) & (torch.arange(300) < 150), 1, codes)
    assert (flag_vanished_classes(said, half) == -1).all()


def test_labels_that_fit_are_left_alone():
    new, truth = (torch.from_numpy(each) for each in cloud(300, seed=1, shift=1.0))
    old, known = (torch.from_numpy(each) for each in cloud(300, seed=2))
    found = flag_unlikely_labels(knn_probabilities(old.float(), known, new.float(), truth, num_classes=3), truth)
    assert (found >= 0).sum() < 0.02 * 300
    assert describe_label_issues([], 3) == "all 3 labels fit their samples"


@pytest.mark.parametrize(
    ("triggers", "said"),
    [
        (RetrainingTriggers(num_labels=60), "60 new labels"),
        (RetrainingTriggers(num_labels=61), None),
        (RetrainingTriggers(num_labels=None, min_accuracy=0.9), "under 0.9"),
        (RetrainingTriggers(num_labels=None, min_accuracy=0.1), None),
        (RetrainingTriggers(num_labels=None, min_accuracy=0.9, min_new_labels=61), None),
        (RetrainingTriggers(num_labels=None), None),
    ],
)
def test_a_turn_begins_where_there_is_a_reason(store, records, triggers, said):
    values, _ = cloud(60, seed=1)
    ask(store, records, values, ["a"] * 60)
    reason = check_triggers(store, records, triggers)
    assert reason is None if said is None else said in reason


def test_a_turn_is_held_off_also_after_a_refusal(store, records):
    ask(store, records, cloud(60, seed=1)[0], ["a"] * 60)
    store.log_event(ROUND, labels=0, promoted=None)
    triggers = RetrainingTriggers(num_labels=50, min_interval_s=100)
    assert check_triggers(store, records, triggers) is None
    assert check_triggers(store, records, triggers, now=time.time() + 200) == "60 new labels"
    store.log_event(ROUND, labels=60, promoted=None)
    assert check_triggers(store, records, triggers, now=time.time() + 200) is None


def test_watching_goes_on_after_a_turn_that_failed(store, records):
    ask(store, records, cloud(60, seed=1)[0], ["a"] * 60)
    said, looks = [], []

    def fail():
        raise tf.DataError("broken")

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(
            run_rounds(
                store, records, RetrainingTriggers(num_labels=50), fail, interval_s=7, log=said.append, sleep=sleep
            )
        )
    assert looks == [7, 7, 7]
    assert said == ["a turn begins: 60 new labels", "the turn failed: broken"]
    assert find_last_round(store)["failed"]


def test_the_command_does_a_turn_and_draws_it(store, records, capsys):
    values, codes = cloud(120, seed=1)
    ask(store, records, values, ["abc"[code] for code in codes])
    arguments = ["--store", str(store.root), "--strategy.epochs", "1", "--json"]
    assert main(["retune", *arguments]) == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["version"], said["num_labeled"]) == (None, 120)
    assert "no significant difference" in said["decision"]["reason"]
    with Image.open(plot_accuracy(store, records)) as drawn:
        assert drawn.size[0] > 500


def test_the_command_without_records_says_so(store, capsys):
    assert main(["retune", "--store", str(store.root), "--records", "nowhere"]) == 73
    assert "no records in 'nowhere'" in capsys.readouterr().err
    assert main(["retune", "--store", str(store.root), "--watch", "--hold-off", "soon"]) == 2
    assert "'soon' is no time" in capsys.readouterr().err


def test_samples_of_different_shapes_are_refused():
    class Anything:
        def decode(self, raw):
            return torch.zeros(len(raw))

    from tuneforge_serve.feedback.request_log import LabeledRequest

    both = [LabeledRequest(LoggedRequest(body.decode(), "1", body, "x", {}), "a", False) for body in (b"1", b"22")]
    with pytest.raises(tf.DataError, match="different shapes"):
        LabeledSamples.decode(both, Anything())
