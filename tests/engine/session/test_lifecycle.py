"""What callbacks are told of a run, what they may ask for, and what their errors cost."""

import json

import pytest
import torch
from tiny import tiny_data, tiny_net

import tuneforge as tf

PLAN = [
    tf.HeadFit("fit"),
    tf.Diagnosis("look"),
    tf.Phase("train", epochs=1),
    tf.WeightAverage("average", snapshots=("start", "train")),
]


class Recorder:
    """Writes down each call, with what a tracker reads of it."""

    def __init__(self, calls):
        self.calls = calls

    @tf.hookimpl
    def run_started(self, run):
        state = run.state(self)
        self.calls.append(("run_started", run.resumed, run.epoch, len(run.history), state.get("id")))
        state.setdefault("id", 7)

    @tf.hookimpl
    def strategy_step_started(self, run, step):
        self.calls.append(("strategy_step_started", step.name))

    @tf.hookimpl
    def strategy_step_ended(self, run, step, result):
        self.calls.append(("strategy_step_ended", step.name, result.step_name))

    @tf.hookimpl
    def phase_started(self, run):
        self.calls.append(("phase_started", run.phase.name))

    @tf.hookimpl
    def phase_resumed(self, run):
        self.calls.append(("phase_resumed", run.phase.name, run.epoch, run.steps_done))

    @tf.hookimpl
    def evaluation_ended(self, run, metrics):
        self.calls.append(("evaluation_ended", run.eval_split, metrics["accuracy"]))

    @tf.hookimpl
    def run_ended(self, report):
        self.calls.append(("run_ended", report["splits"]["test"]["accuracy"]))

    @tf.hookimpl
    def run_stopped(self, error):
        self.calls.append(("run_stopped", type(error).__name__))

    @tf.hookimpl
    def run_failed(self, error):
        self.calls.append(("run_failed", str(error)))


class Asks:
    """Calls a method of the run in a hook, once its epoch or optimizer step has come."""

    def __init__(self, way, *, epoch=None, step=None):
        self.way, self.epoch, self.step = way, epoch, step

    @tf.hookimpl
    def epoch_ended(self, run):
        if run.epoch == self.epoch:
            getattr(run, self.way)("enough")

    @tf.hookimpl(wrapper=True)
    def train_step(self, run):
        if run.step + 1 == self.step:
            getattr(run, self.way)("enough")
        return (yield)


def engine(out, *callbacks, plan=None, log=None, **settings):
    plan = plan or [tf.Phase("a", epochs=4), tf.Phase("b", epochs=2)]
    given = {"data": tiny_data(), "model": tiny_net(), "strategy": plan, "callbacks": list(callbacks)}
    return tf.Engine(**given, out=out / "run", batch_size=32, page=False, cache="off", log=log, **settings)


def stop_at_epoch(epoch, engines):
    class Stops:
        @tf.hookimpl
        def epoch_ended(self, run):
            if run.epoch == epoch and engines:
                engines[0].stop("the test", exit_code=3)

    return Stops()


def test_every_kind_of_step_is_announced_with_its_result(tmp_path):
    calls = []
    result = engine(tmp_path, Recorder(calls), plan=PLAN).run()
    steps = [call for call in calls if call[0].startswith("strategy_step")]
    names = [step.name for step in PLAN]
    assert steps == [
        each for name in names for each in (("strategy_step_started", name), ("strategy_step_ended", name, name))
    ]
    evaluations = {call[1]: call[2] for call in calls if call[0] == "evaluation_ended"}
    assert evaluations["test"] == result.report["splits"]["test"]["accuracy"]
    assert calls[-1] == ("run_ended", result.report["splits"]["test"]["accuracy"])


def test_a_resumed_run_shows_its_state_history_and_phase_before_it_continues(tmp_path):
    calls, engines = [], []
    engines.append(engine(tmp_path, Recorder(calls), stop_at_epoch(2, engines)))
    with pytest.raises(tf.StoppedError):
        engines[0].run()
    assert calls[0] == ("run_started", False, 0, 0, None)
    assert calls[-1] == ("run_stopped", "StoppedError")
    calls.clear()
    plan = [tf.Phase("a", epochs=4), tf.Phase("b", epochs=2)]
    callbacks = [Recorder(calls), stop_at_epoch(2, [])]
    tf.Engine.resume(tmp_path / "run", data=tiny_data(), model=tiny_net(), strategy=plan, callbacks=callbacks).run()
    assert calls[0] == ("run_started", True, 2, 2, 7)
    phases = [call[:2] for call in calls if call[0].startswith("phase")]
    assert phases == [("phase_resumed", "a"), ("phase_started", "b")]
    assert next(call for call in calls if call[0] == "phase_resumed")[2:] == (2, 6)


def test_a_failed_run_is_announced_and_a_failing_callback_hides_nothing(tmp_path):
    class Breaks:
        @tf.hookimpl
        def epoch_ended(self):
            raise ValueError("the disk burns")

        @tf.hookimpl
        def run_failed(self):
            raise RuntimeError("and so does this")

    calls, lines = [], []
    with pytest.raises(tf.PluginError, match="failed in epoch_ended") as caught:
        engine(tmp_path, Breaks(), Recorder(calls), log=lines.append).run()
    assert calls[-1] == ("run_failed", str(caught.value))
    assert any("failed in run_failed: RuntimeError: and so does this" in line for line in lines)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_counts_as_stopped(tmp_path, interrupt):
    calls = []
    with pytest.raises((KeyboardInterrupt, tf.PluginError)):
        engine(tmp_path, Raises(interrupt), Recorder(calls)).run()
    assert calls[-1][0] == ("run_stopped" if interrupt is KeyboardInterrupt else "run_failed")


class Raises:
    def __init__(self, error):
        self.error = error

    @tf.hookimpl
    def epoch_ended(self):
        raise self.error


def epochs_of(out):
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["phase"] for line in lines]


@pytest.mark.parametrize(
    ("way", "given", "phases", "steps"),
    [
        ("end_phase", {"epoch": 2}, ["a", "a", "b", "b"], 12),
        ("end_phase", {"step": 5}, ["a", "a", "b", "b"], 11),
        ("end_run", {"epoch": 2}, ["a", "a"], 6),
        ("end_run", {"step": 13}, ["a", "a", "a", "a", "b"], 13),
        ("end_epoch", {"step": 5}, ["a", "a", "a", "a", "b", "b"], 17),
    ],
)
def test_a_callback_ends_an_epoch_a_phase_or_the_run(tmp_path, way, given, phases, steps):
    lines = []
    result = engine(tmp_path, Asks(way, **given), log=lines.append).run()
    assert epochs_of(tmp_path) == phases
    assert result.report["splits"]["test"]["accuracy"] > 0
    assert sum(each.steps for _, each in result.strategy_steps) == steps
    assert any("asked for by a callback: enough" in line for line in lines)
    if way == "end_phase":
        assert result.strategy_steps[0][1].reason == "asked for by a callback: enough"
    if way == "end_run":
        assert result.report["stop_reason"] == "asked for by a callback: enough"


def test_a_run_that_was_asked_to_end_ends_so_after_a_resume(tmp_path):
    class AsksAndStops:
        @tf.hookimpl
        def epoch_ended(self, run):
            if run.epoch == 2:
                run.end_run("enough")
                if engines:
                    engines[0].stop("the test", exit_code=3)

    engines = []
    plan = [tf.Phase("a", epochs=4), tf.Phase("b", epochs=2)]
    engines.append(engine(tmp_path, AsksAndStops(), plan=plan))
    with pytest.raises(tf.StoppedError):
        engines[0].run()
    engines.clear()
    again = tf.Engine.resume(
        tmp_path / "run", data=tiny_data(), model=tiny_net(), strategy=plan, callbacks=[AsksAndStops()]
    ).run()
    undisturbed = engine(tmp_path / "other", AsksAndStops(), plan=plan).run()
    assert epochs_of(tmp_path) == ["a", "a"]
    assert again.report["stop_reason"] == undisturbed.report["stop_reason"] == "asked for by a callback: enough"
    for one, other in zip(again.model.module.parameters(), undisturbed.model.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", ["end_epoch", "end_phase"])
def test_there_is_no_phase_to_end_before_the_first(tmp_path, way):
    class Early:
        @tf.hookimpl
        def run_started(self, run):
            getattr(run, way)("too early")

    with pytest.raises(tf.PluginError, match=f"run.{way} was called while no phase is training"):
        engine(tmp_path, Early()).run()


@tf.component(api=1, observer=True)
class Unreachable:
    """Sends metrics to a server that is away."""

    @tf.hookimpl
    def epoch_ended(self, run):
        raise ConnectionError("the server is away")

    @tf.hookimpl
    def phase_started(self, run):
        raise tf.UsageError("no such project", why="it was deleted")


def test_the_error_of_an_observer_is_logged_once_and_changes_nothing(tmp_path):
    lines = []
    result = engine(tmp_path, Unreachable(), log=lines.append).run()
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 2
    assert "failed in phase_started: it was deleted" in warnings[0]
    assert "Unreachable failed in epoch_ended: ConnectionError: the server is away" in warnings[1]
    plain = engine(tmp_path / "plain").run()
    for one, other in zip(result.model.module.parameters(), plain.model.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("hook", "wrapper"), [("train_step", False), ("evaluate", False), ("optimizer_step", True)])
def test_an_observer_returns_nothing_to_the_run(tmp_path, hook, wrapper):
    def method(self, run):
        yield

    body = {hook: tf.hookimpl(wrapper=wrapper)(method), "__doc__": "An observer."}
    cls = tf.component(api=1, observer=True)(type("Meddler", (), body))
    with pytest.raises(tf.PluginLoadError, match=f"declared as an observer, and (wraps|implements) '{hook}'"):
        engine(tmp_path, cls()).run()


def test_a_class_that_no_module_has_is_resumed_with_the_object(tmp_path):
    space = {"tf": tf, "engines": []}
    code = "@tf.component(api=1)\nclass Made:\n    'x'\n    @tf.hookimpl\n    def epoch_ended(self, run):\n"
    exec(code + "        run.epoch == 2 and engines and engines[0].stop('x', exit_code=3)\n", space)
    made, plan = space["Made"], [tf.Phase("a", epochs=3)]
    space["engines"].append(engine(tmp_path, made(), plan=plan))
    with pytest.raises(tf.StoppedError):
        space["engines"][0].run()
    space["engines"].clear()
    given = {"data": tiny_data(), "model": tiny_net(), "strategy": plan}
    assert tf.Engine.resume(tmp_path / "run", **given, callbacks=[made()]).run().report
