"""A budget ends a run at one step, also if the run is killed after the step was recorded, and resumed."""

import json
import shutil

import pytest
import torch
from simulated_kill import SimulatedKillError, read_files, run_and_kill
from tiny import tiny_data, tiny_net

import tuneforge as tf
from tuneforge.engine.storage import checkpoint
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.plugin.config import parse_budget


@pytest.fixture(autouse=True)
def reset_faults():
    yield
    faults.hook = None


def two_phases(task):
    yield tf.Phase("head", train="head", epochs=1, lr=0.02)
    yield tf.Phase("all", epochs=2000, lr=0.01, schedule="cosine", restore_best=True)
    raise AssertionError("nothing is asked for once the budget is spent")


class Slow:
    """Takes long in evaluation, by the clock of the budget: after the `HeadFit`, or at the end of epoch 2."""

    def __init__(self, *, training):
        self.training = training

    @tf.hookimpl
    def evaluation_started(self, run):
        if (run.phase is not None, run.epoch) == (self.training, 1 + self.training):
            run.engine_state.budget.previous_s += 1000


class Late:
    """Takes long in the ninth step, by the clock of the budget."""

    @tf.hookimpl(wrapper=True)
    def train_step(self, run):
        run.engine_state.budget.previous_s += 1000 * (run.step == 8)
        return (yield)


class BudgetRecorder:
    """Stores the seconds that the budget knew when the run was resumed."""

    @tf.hookimpl
    def epoch_ended(self, run):
        self.previous_s = run.engine_state.budget.previous_s


def fit_between(task):
    yield tf.Phase("head", train="head", epochs=1, lr=0.02)
    yield tf.HeadFit("fit")
    yield tf.Phase("all", epochs=1, lr=0.01)


def engine(path, *, resume=False, strategy=two_phases, callbacks=(), **given):
    objects = {"data": tiny_data(), "model": tiny_net(), "strategy": strategy, "callbacks": list(callbacks)}
    if resume:
        return tf.Engine.resume(path, **objects)
    chosen = {"batch_size": 16, "page": False, "checkpoint_s": 0.0, "out": path, **given}
    return tf.Engine(**objects, **chosen)


def read(path, name):
    return json.loads((path / name).read_text())


def last_answer(path):
    return json.loads((path / "steps.jsonl").read_text().splitlines()[-1])["result"]


def test_budget_is_parsed():
    said = {text: parse_budget(text) for text in ("60s", "5m", "2h", "0.5h", "20epochs", "1epoch", "500steps")}
    assert list(said.values()) == [
        ("seconds", 60), ("seconds", 300), ("seconds", 7200), ("seconds", 1800), ("epochs", 20), ("epochs", 1),
        ("steps", 500),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["60", "soon", "0s", "-5s", "1.5epochs", "0steps", "5 s", "5d", ""])
def test_invalid_budget_is_refused_with_an_example(text):
    with pytest.raises(tf.OptionError, match="60s, 5m, 2h, 20epochs or 500steps"):
        tf.Engine(budget=text)


def test_exhausted_budget_ends_the_phase_after_the_step_and_the_run_finishes(tmp_path):
    told = []

    def strategy(task):
        told.append(dict(task.budget))
        yield from two_phases(task)

    result = engine(tmp_path / "r", strategy=strategy, budget="8steps").run()
    assert told == [{"steps": 8}]
    assert [answer.steps for _, answer in result.strategy_steps] == [6, 2]
    assert last_answer(tmp_path / "r")["reason"] == "budget of 8steps spent at step 8"
    assert result.report["stopped_by_budget"] == 8
    assert set(result.report["splits"]) == {"val", "test"}
    assert read(tmp_path / "r", "status.json")["state"] == "done"
    assert "stopping: budget of 8steps spent at step 8" in (tmp_path / "r" / "log.txt").read_text()


def test_run_within_its_budget_does_not_report_it(tmp_path):
    result = engine(tmp_path / "r", strategy=fit_between, budget="13steps").run()
    assert len(result.strategy_steps) == 3
    assert "stopped_by_budget" not in result.report


def test_budget_counts_epochs_over_the_whole_run(tmp_path):
    result = engine(tmp_path / "r", budget="3epochs").run()
    assert [answer.epochs for _, answer in result.strategy_steps] == [1, 2]
    assert result.report["stopped_by_budget"] == 18


def test_strategy_generator_is_closed(tmp_path):
    closed = []

    def strategy(task):
        try:
            yield from two_phases(task)
        finally:
            closed.append(True)

    engine(tmp_path / "r", strategy=strategy, budget="7steps").run()
    assert closed == [True]


@pytest.mark.parametrize("budget", ["7steps", "12steps", "2epochs"])
@pytest.mark.parametrize("checkpoint_s", [0.0, 1e9])
def test_run_killed_after_its_budget_was_exhausted_resumes_bit_identical(tmp_path, budget, checkpoint_s):
    whole = engine(tmp_path / "whole", budget=budget)
    assert run_and_kill(whole.run, -1)
    expected = read_files(tmp_path / "whole")
    assert read_files(engine(tmp_path / "twice", budget=budget).run().run_dir) == expected
    for later in range(0, 40, 3):
        path = tmp_path / f"r{later}"
        marked = 0

        def hook(name, later=later):
            nonlocal marked
            marked += marked > 0 or name == "budget-marked"
            if marked == later + 1:
                raise SimulatedKillError

        faults.hook = hook
        try:
            engine(path, budget=budget, checkpoint_s=checkpoint_s).run()
        except SimulatedKillError:
            faults.hook = None
            engine(path, resume=True).run()
        faults.hook = None
        assert read_files(path) == expected, later


def test_budget_in_seconds_ends_at_the_recorded_step(tmp_path):
    late = {"callbacks": [Late()]}
    run_and_kill(engine(tmp_path / "r", budget="1000s", **late).run, 1, only="budget-marked")
    step = read(tmp_path / "r", "budget.json")["step"]
    assert step == 9
    shutil.copytree(tmp_path / "r", tmp_path / "again")
    engine(tmp_path / "r", resume=True, **late).run()
    run_and_kill(engine(tmp_path / "again", resume=True, **late).run, 3)
    engine(tmp_path / "again", resume=True, **late).run()
    assert read_files(tmp_path / "again") == read_files(tmp_path / "r")
    assert read(tmp_path / "r", "report.json")["stopped_by_budget"] == step
    assert last_answer(tmp_path / "r")["reason"] == f"budget of 1000s spent at step {step}"
    never_killed = engine(tmp_path / "steps", budget=f"{step}steps").run()
    same = ("model.safetensors", "metrics.jsonl", "report.json", "hardest_samples.json")
    assert read_files(never_killed.run_dir, same) == read_files(tmp_path / "r", same)


def test_seconds_of_earlier_processes_count(tmp_path):
    path = tmp_path / "r"
    run_and_kill(engine(path, budget="1h").run, 10, only="step-saved")
    status = read(path, "status.json")
    (path / "status.json").write_text(json.dumps({**status, "state": "failed", "elapsed_s": 3600.0}))
    result = engine(path, resume=True).run()
    assert result.report["stopped_by_budget"] == 11
    assert read(path, "status.json")["elapsed_s"] >= 3600


def test_checkpoint_stores_the_seconds_spent(tmp_path):
    path = tmp_path / "r"
    run_and_kill(engine(path, strategy=fit_between).run, 9, only="step-saved")
    (path / "status.json").write_text('{"state": "running"}')
    known = checkpoint.load_latest(path, torch.device("cpu"))[1]["elapsed_s"]
    watch = BudgetRecorder()
    objects = {"data": tiny_data(), "model": tiny_net(), "strategy": fit_between}
    tf.Engine.resume(path, observers=[watch], **objects).run()
    assert watch.previous_s == known > 0
    assert read(path, "status.json")["elapsed_s"] > known


def test_budget_exhausted_in_a_head_fit_ends_the_run_after_it(tmp_path):
    given = {"strategy": fit_between, "callbacks": [Slow(training=False)]}
    run_and_kill(engine(tmp_path / "r", budget="1000s", **given).run, 1, only="budget-marked")
    assert read(tmp_path / "r", "budget.json")["completed_steps"] == 2
    shutil.rmtree(tmp_path / "r" / "checkpoints")  # so that even the first phase runs again
    result = engine(tmp_path / "r", resume=True, **given).run()
    assert [step.name for step, _ in result.strategy_steps] == ["head", "fit"]
    assert result.report["stopped_by_budget"] == 6


@pytest.mark.parametrize("checkpoint_s", [0.0, 1e9])
def test_budget_exhausted_in_evaluation_ends_the_run_with_that_epoch(tmp_path, checkpoint_s):
    given = {"callbacks": [Slow(training=True)]}
    run_and_kill(
        engine(tmp_path / "r", budget="1000s", checkpoint_s=checkpoint_s, **given).run, 1, only="budget-marked"
    )
    assert read(tmp_path / "r", "budget.json")["step"] == 12
    engine(tmp_path / "r", resume=True, **given).run()
    never_killed = engine(tmp_path / "steps", budget="12steps").run()
    same = ("model.safetensors", "metrics.jsonl", "report.json", "hardest_samples.json")
    assert read_files(never_killed.run_dir, same) == read_files(tmp_path / "r", same)
