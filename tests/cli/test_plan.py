"""Plans on the command line: printed without training, and written from a finished run so that it runs again."""

import json

import pytest
from tiny import tiny_data, tiny_net

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.builtin.strategies.plan_file import read_plan

FEW = ["--data.per-class", "4", "--data.other-share", "0"]
SAME = ("model.safetensors", "metrics.jsonl", "steps.jsonl")


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def decides(task):
    """A strategy of every kind of step, which decides from figures."""
    readings = yield tf.Diagnosis("look", batches=2)
    yield tf.HeadFit("fit", l2=0.1)
    scales = {name: min(1.0, value) for name, value in readings.values.items()}
    report = yield tf.Phase("all", epochs=2, lr=0.01, lr_scales=scales, schedule=tf.use("one-cycle", pct_start=0.2))
    if report.val["accuracy"] > 0.1:
        yield tf.Phase("head", train="head", steps=9, optimizer=tf.use("sgd", momentum=0.5), restore_best=True)
    yield tf.WeightAverage("mix", snapshots=["fit", report.step_name], weights=[0.25, 0.75])
    yield tf.Phase("weak", epochs=1, class_weights={"b": 2.0}, sampling="balanced", patience=1)


def test_what_a_run_did_runs_again_to_the_same_bytes(run, tune, tmp_path):
    one = tune(decides, seed=3)
    code, out, _ = run("report", one.run_dir, "--export-strategy", "--out", tmp_path / "plan.toml")
    assert code == 0
    assert f"--strategy.path {tmp_path / 'plan.toml'}" in out
    assert read_plan(tmp_path / "plan.toml") == [step for step, _ in one.strategy_steps]
    two = tune(tf.use("plan-file", path=tmp_path / "plan.toml"), seed=3)
    for name in SAME:
        assert (one.run_dir / name).read_bytes() == (two.run_dir / name).read_bytes()


def test_the_default_run_on_digits_runs_again_from_its_plan_to_the_same_bytes(run, tmp_path):
    common = [*FEW, "--no-page", "--seed", "2"]
    assert run("run", *common, "--strategy.epochs", "1", "--out", tmp_path / "one")[0] == 0
    code, text, err = run("report", tmp_path / "one", "--export-strategy")
    assert (code, err) == (0, "")
    assert "runs" not in text
    (tmp_path / "plan.toml").write_text(text)
    again = ["--strategy", "plan-file", "--strategy.path", tmp_path / "plan.toml"]
    assert run("run", *common, *again, "--out", tmp_path / "two")[0] == 0
    for name in SAME:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_plan_is_printed_whole_for_a_list_and_nothing_is_trained_or_written(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, err = run("run", *FEW, "--strategy", "lp-ft", "--strategy.epochs", "3", "--dry-run")
    assert (code, err) == (0, "")
    (tmp_path / "plan.toml").write_text(text)
    fit, phase = read_plan(tmp_path / "plan.toml")
    assert (type(fit), phase.epochs) == (tf.HeadFit, 3)
    assert "is_adaptive" not in text
    assert "6 layer groups" in text
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


ADAPTIVE = """
import tuneforge as tf
@tf.component(api=1)
class Adaptive:
    'x'
    @tf.hookimpl
    def finetune_strategy(self):
        report = yield tf.Phase('first', train='head', epochs=1)
        assert False, 'it has heard an answer'
"""


def test_of_a_strategy_that_decides_the_first_step_is_printed_and_that_is_said(run, plant):
    plant("unrelated", {}, adaptive_mod=ADAPTIVE)
    code, text, _ = run("run", *FEW, "--strategy", "adaptive_mod:Adaptive", "--dry-run")
    assert code == 0
    assert text.endswith("\n# the strategy chooses the further steps from the results of these\n")
    assert text.count("[[step]]") == 1
    _, text, _ = run("run", *FEW, "--strategy", "adaptive_mod:Adaptive", "--dry-run", "--json")
    found = json.loads(text)
    assert found["is_adaptive"] is True
    assert [step["name"] for step in found["steps"]] == ["first"]


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_what_cannot_hear_an_answer_is_listed_whole(kind):
    steps = [tf.Phase("a", epochs=1), tf.Phase("b", epochs=1)]
    plan = tf.Engine(strategy=lambda task: kind(steps), data=tiny_data(), model=tiny_net()).dry_run()
    assert (plan.strategy_steps, plan.depends_on_results) == (tuple(steps), False)


def test_a_plan_trains_nothing():
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tf.Engine(strategy="full", data=tiny_data(), model=net).dry_run()
    assert all(bool((before[name] == tensor).all()) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    ("later", "words"),
    [
        (tf.Phase("b", train="haed", epochs=1), "did you mean 'head'"),
        (tf.Phase("b", epochs=1, schedule="cosin"), "did you mean 'cosine'"),
        (tf.Phase("b", epochs=1, optimizer=tf.use("sgd", momentun=0.9)), "did you mean 'momentum'"),
        (tf.Phase("b", train="head", epochs=1, lr_scales={"first": 2.0}), "no parameter that trains"),
        ("no step", "is no step"),
    ],
)
def test_a_plan_looks_ahead_at_every_step_that_is_known(later, words):
    steps = [tf.Phase("a", epochs=1), later]
    with pytest.raises(tf.TuneforgeError, match=words):
        tf.Engine(strategy=lambda task: steps, data=tiny_data(), model=tiny_net()).dry_run()


def test_a_strategy_that_changes_the_loss_says_that_its_plan_does_not(run, tmp_path):
    assert run("run", *FEW, "--strategy", "l2-sp", "--epochs", "1", "--no-page", "--out", tmp_path / "r")[0] == 0
    code, text, err = run("report", tmp_path / "r", "--export-strategy")
    assert code == 0
    note = "note: strategy 'l2-sp' also implements phase_started, train_step, which a plan file does not hold"
    for output in (text, err, run("run", *FEW, "--strategy", "l2-sp", "--dry-run")[1]):
        assert note in output
    assert "the same weights" not in text
    assert "weight-decay = 0.0" in text


def test_a_run_that_its_budget_stopped_says_so_in_its_plan(run, tune):
    result = tune([tf.Phase("a", epochs=5)], budget="2epochs")
    _, text, err = run("report", result.run_dir, "--export-strategy")
    assert "note: the budget stopped the run at optimizer step 12" in err
    assert "epochs = 5" in text


def test_the_executed_steps_are_also_json(run, tune):
    result = tune([tf.Phase("a", epochs=1), tf.WeightAverage("b", snapshots=["start", "a"])])
    found = json.loads(run("report", result.run_dir, "--export-strategy", "--json")[1])
    assert [(step["kind"], step["name"]) for step in found["steps"]] == [("phase", "a"), ("weight-average", "b")]


def test_out_without_plan_is_refused(run, tune, tmp_path):
    result = tune([tf.Phase("a", epochs=1)])
    code, _, err = run("report", result.run_dir, "--out", tmp_path / "x.toml")
    assert code == 2
    assert "add --export-strategy" in err


def test_the_plan_of_a_run_that_is_not_done_is_refused(run, tmp_path):
    assert run("report", tmp_path, "--export-strategy")[0] == 73
