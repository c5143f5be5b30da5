"""Ctrl-C and SIGTERM in a program of Python save a checkpoint first."""

import json
import os
import signal
import subprocess
import sys
import threading

import forked
import pytest
from simulated_kill import read_files
from tiny import tiny_data, tiny_net

import tuneforge as tf
from tuneforge.engine.session.signals import save_on_signals


@pytest.fixture(autouse=True)
def default_handlers():
    """Set the handlers of a fresh interpreter; a runner of tests may have others."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Press:
    """Raises SIGINT in the given hook, once for each number of times that it was called."""

    def __init__(self, hook="", *counts):
        self.hook, self.counts, self.count = hook, counts, 0

    def press(self, hook):
        if hook == self.hook:
            self.count += 1
            if self.count in self.counts:
                signal.raise_signal(signal.SIGINT)

    @tf.hookimpl
    def epoch_ended(self):
        self.press("epoch_ended")

    @tf.hookimpl
    def evaluation_started(self):
        self.press("evaluation_started")

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self):
        self.press("optimizer_step")
        return (yield)

    @tf.hookimpl
    def run_started(self):
        self.press("run_started")

    @tf.hookimpl(wrapper=True)
    def model_adapt(self):
        self.press("model_adapt")
        return (yield)

    @tf.hookimpl
    def run_ended(self):
        self.press("run_ended")


def objects(press):
    phases = [tf.Phase("head", train="head", epochs=2), tf.Phase("all", epochs=2)]
    return {"data": tiny_data(), "model": tiny_net(), "strategy": phases, "callbacks": [press]}


def engine(path, press):
    return tf.Engine(**objects(press), batch_size=32, page=False, out=path)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "r"
    engine(path, Press()).run()
    return read_files(path)


def state(path):
    return json.loads((path / "status.json").read_text())["state"]


@pytest.mark.parametrize(
    ("hook", "count", "steps"),
    [("optimizer_step", 1, 1), ("optimizer_step", 8, 8), ("epoch_ended", 2, 6), ("evaluation_started", 3, 9)],
)
def test_ctrl_c_saves_a_checkpoint_and_raises_keyboard_interrupt(tmp_path, unbroken, hook, count, steps):
    path = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt, match=r"stopped by Ctrl-C.*Engine\.resume"):
        engine(path, Press(hook, count)).run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert state(path) == "stopped"
    lines = []
    tf.Engine.resume(path, log=lines.append, **objects(Press())).run()
    assert f"{steps} optimizer step{'s' if steps > 1 else ''} done" in "\n".join(lines)
    assert read_files(path) == unbroken


@pytest.mark.parametrize("hook", ["run_started", "model_adapt"])
def test_ctrl_c_before_training_takes_effect_at_once(tmp_path, hook):
    press = Press(hook, 1)
    with pytest.raises(KeyboardInterrupt):
        engine(tmp_path / "r", press).run()
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_second_ctrl_c_takes_effect_at_once(tmp_path):
    class Twice:
        after = False

        @tf.hookimpl
        def evaluation_started(self):
            signal.raise_signal(signal.SIGINT)
            assert not self.after
            self.after = True
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        engine(tmp_path / "r", Twice()).run()
    assert str(caught.value) == ""
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_ctrl_c_after_the_last_step_lets_the_run_finish_and_is_not_lost(tmp_path, unbroken):
    with pytest.raises(KeyboardInterrupt):
        engine(tmp_path / "r", Press("run_ended", 1)).run()
    assert state(tmp_path / "r") == "done"
    assert read_files(tmp_path / "r") == unbroken


def test_handlers_of_the_program_stay(tmp_path):
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    engine(tmp_path / "r", Press("epoch_ended", 1, 3)).run()
    assert seen == [signal.SIGINT] * 2
    assert state(tmp_path / "r") == "done"


def test_other_threads_leave_the_handlers_alone():
    seen = []

    def run():
        with save_on_signals(lambda reason, *, exit_code: True):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


PROGRAM = """
import sys
import tuneforge as tf
from tiny import tiny_data, tiny_net

class Wait:
    @tf.hookimpl
    def epoch_ended(self, run):
        if run.epoch == 2:
            print("waiting", flush=True)
            sys.stdin.readline()

tf.Engine(
    data=tiny_data(), model=tiny_net(), strategy=[tf.Phase("all", epochs=4)], callbacks=[Wait()],
    page=False, out="r", batch_size=32,
).run()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, -2)])
def test_signal_to_a_program_ends_it_as_ever_once_a_checkpoint_is_saved(tmp_path, number, code):
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(__file__)))}
    with forked.Popen(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        process.stdin.write(b"\n")
        process.stdin.flush()
        out = process.stdout.read()
    assert process.returncode == code, out
    assert state(tmp_path / "r") == "stopped"
    assert len(list((tmp_path / "r" / "checkpoints").glob("*-step-6"))) == 1
