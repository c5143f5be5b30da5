"""Resuming stopped and killed runs, and what is refused. See also `test_kills.py`."""

import json
import os
import signal
import subprocess
import sys

import attrs
import forked
import pytest
import torch
from simulated_kill import NoisyLoss, every_step_kind, read_files, run_and_kill
from tiny import TinyNet, tiny_data
from torch import nn

import tuneforge as tf
from tuneforge.engine.model.extra_state import get_extra_states, set_extra_states
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.run_dir import RunDir


class SharedWeight(TinyNet):
    """A network with BatchNorm, dropout, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.third = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.third[0].weight = self.second[0].weight

    def forward(self, inputs):
        return self.head(self.third(self.second(self.first(inputs))))


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.Model.from_module(SharedWeight(), head="head")


def data():
    return attrs.evolve(tiny_data(), train=tiny_data().train.subset(torch.arange(48)))


def engine(path, *, resume=False, checkpoint_s=0.0):
    objects = {
        "data": data(),
        "model": network(),
        "strategy": every_step_kind,
        "callbacks": [tf.use("ema"), NoisyLoss()],
    }
    if resume:
        return tf.Engine.resume(path, **objects)
    settings = {
        "batch_size": 8,
        "grad_accum_steps": 2,
        "seed": 3,
        "page": False,
        "checkpoint_s": checkpoint_s,
        "out": path,
    }
    return tf.Engine(**objects, **settings)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "run"
    points = run_and_kill(engine(path).run, -1)
    return read_files(path), points


def test_checkpoints_do_not_change_the_result(unbroken, tmp_path):
    engine(tmp_path / "r", checkpoint_s=1e9).run()
    assert read_files(tmp_path / "r") == unbroken[0]
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_changed_strategy_is_refused_with_the_difference(unbroken, tmp_path):
    path = tmp_path / "r"
    run_and_kill(engine(path).run, len(unbroken[1]) - 20)

    def other(task):
        yield tf.Phase("head", train="head", epochs=2, lr=0.03)

    objects = {"data": data(), "model": network(), "strategy": other, "callbacks": [tf.use("ema"), NoisyLoss()]}
    with pytest.raises(tf.UsageError, match=r"lr=0\.03"):
        tf.Engine.resume(path, **objects).run()


def test_stopped_run_saves_a_checkpoint_and_resumes_bit_identical(unbroken, tmp_path):
    path = tmp_path / "r"
    running = engine(path, checkpoint_s=1e9)
    faults.hook = lambda name: running.stop("SIGTERM", exit_code=143) if name == "epoch" else None
    with pytest.raises(tf.StoppedError, match="tuneforge resume") as caught:
        running.run()
    faults.hook = None
    assert caught.value.exit_code == 143
    assert json.loads((path / "status.json").read_text())["state"] == "stopped"
    engine(path, resume=True).run()
    assert read_files(path) == unbroken[0]


def test_finished_run_is_not_resumed(tmp_path):
    path = tmp_path / "r"
    engine(path).run()
    with pytest.raises(tf.UsageError, match="is done"):
        engine(path, resume=True)


def test_finished_run_goes_on_for_more_epochs_from_its_weights(tmp_path):
    first = tf.Engine(
        data=data(), model=network(), strategy=[tf.Phase("all", epochs=1)], page=False, out=tmp_path / "a"
    )
    report = first.run().report
    with pytest.raises(tf.UsageError, match=r"warm start.*--warm-start\.run.*Engine\(model=load\(") as caught:
        tf.Engine.resume(tmp_path / "a", data=data(), model=network(), strategy=[tf.Phase("all", epochs=4)])
    assert "more epochs" in caught.value.fix
    model = tf.load(tmp_path / "a", model=network()).model
    steps = [tf.WeightAverage("as loaded", snapshots=["start"]), tf.Phase("more", epochs=1)]
    result = tf.Engine(data=data(), model=model, strategy=steps, page=False, out=tmp_path / "b").run()
    start, end = result.strategy_steps[0][1].val, report["splits"]["val"]
    assert [start[name] for name in ("loss", "accuracy")] == [end[name] for name in ("loss", "accuracy")]
    assert result.strategy_steps[1][1].epochs == 1


def test_running_run_cannot_be_resumed(tmp_path, unbroken):
    path = tmp_path / "r"
    run_and_kill(engine(path).run, len(unbroken[1]) // 2)
    with RunDir(path, resume=True), pytest.raises(tf.FolderError, match="in use"):
        engine(path, resume=True).run()


COMMAND = [
    sys.executable, "-m", "tuneforge", "run", "--data.per-class", "8", "--data.other-share", "0.2",
    "--strategy.epochs", "2", "--checkpoint-s", "0", "--no-page", "--callback", "ema",
]  # fmt: skip


def command(arguments, folder, *, kill_after=None, number=signal.SIGKILL, begin=forked.Popen):
    """Run the command line in its own process group, and signal the group when a line contains `kill_after`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TUNEFORGE_CACHE": str(folder / "cache")}
    process = begin(
        arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    out = []
    for line in process.stdout:
        out.append(line)
        if kill_after is not None and kill_after in line:
            os.killpg(process.pid, number)
    process.stdout.close()
    return process.wait(), "".join(out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out = command([*COMMAND, "--out", "unbroken"], folder)
    assert code == 0, out
    return folder / "unbroken"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_command_killed_and_resumed_ends_with_the_same_files(undisturbed, tmp_path, number, code):
    """The resumed run is another interpreter, with another hash seed."""
    done, out = command([*COMMAND, "--out", "runs/r"], tmp_path, kill_after="epoch 1/", number=number)
    assert done == code, out
    assert ("tuneforge resume" in out) == (number != signal.SIGKILL)
    done, out = command([sys.executable, "-m", "tuneforge", "resume"], tmp_path, begin=subprocess.Popen)
    assert done == 0, out
    assert "in strategy step 2" in out
    for name in ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json"):
        assert (undisturbed / name).read_bytes() == (tmp_path / "runs" / "r" / name).read_bytes()


class Counting(nn.Module):
    """Counts its forward passes in a buffer, and draws random numbers in each."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, inputs):
        self.passes += 1
        return self.head(self.body(inputs).relu() + 1e-3 * torch.rand(16))


def test_engines_own_forward_passes_leave_buffers_unchanged(tmp_path):
    def counting(path, resume=False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = tf.Model.from_module(Counting(), head="head")
        phases = [tf.Phase("head", train="head", epochs=2, lr=0.02), tf.Phase("all", epochs=2, lr=0.01)]
        objects = {"data": data(), "model": model, "strategy": phases}
        if resume:
            return tf.Engine.resume(path, **objects)
        return tf.Engine(**objects, batch_size=8, page=False, checkpoint_s=0.0, out=path)

    counting(tmp_path / "unbroken").run()
    run_and_kill(counting(tmp_path / "r").run, 15, only="step-saved")
    counting(tmp_path / "r", resume=True).run()
    assert read_files(tmp_path / "r") == read_files(tmp_path / "unbroken")


class WithExtraState(nn.Linear):
    """Anneals its output by a count of training passes, which only its extra state holds."""

    count = 0

    def forward(self, inputs):
        self.count += self.training
        return super().forward(inputs) / (1 + 0.01 * self.count)

    def get_extra_state(self):
        return torch.tensor([self.count])

    def set_extra_state(self, state):
        self.count = int(state)


@pytest.mark.parametrize("point", [5, 14, 22])
def test_extra_state_of_modules_is_resumed_and_belongs_to_the_best_weights(tmp_path, point):
    def run(path, resume=False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = nn.Sequential(WithExtraState(8, 16), nn.ReLU(), nn.Linear(16, 3))
        best = {"restore_best": True, "monitor": "loss", "monitor_mode": "max"}
        phases = [tf.Phase("one", epochs=2, lr=0.02, **best), tf.Phase("two", epochs=2, lr=0.01)]
        objects = {"data": data(), "model": module, "strategy": phases}
        if resume:
            return tf.Engine.resume(path, **objects), module
        return tf.Engine(**objects, batch_size=8, page=False, checkpoint_s=0.0, out=path), module

    unbroken, module = run(tmp_path / "unbroken")
    unbroken.run()
    assert module[0].count == 6 + 12, "the first of two epochs was the best"
    run_and_kill(run(tmp_path / "r")[0].run, point, only="step-saved")
    resumed, module = run(tmp_path / "r", resume=True)
    resumed.run()
    assert module[0].count == 6 + 12
    assert read_files(tmp_path / "r") == read_files(tmp_path / "unbroken")


def test_extra_state_of_any_plain_form_comes_back_and_a_failed_one_is_named():
    class Plain(nn.Module):
        def get_extra_state(self):
            return {"scale": (1.5, [2]), "name": "a"}

        def set_extra_state(self, state):
            self.state = state

    module = nn.Sequential(nn.Linear(1, 1), Plain())
    states = get_extra_states(module)
    assert states == {"1": {"scale": (1.5, [2]), "name": "a"}}
    set_extra_states(module, states)
    assert module[1].state == states["1"]

    class Half(nn.Module):
        def get_extra_state(self):
            return 1

    with pytest.raises(tf.PluginError, match="set_extra_state of Half 'inner' failed"):
        set_extra_states(nn.ModuleDict({"inner": Half()}), {"inner": 1})


def test_resumed_run_knows_that_its_model_is_pretrained(tmp_path):
    settings = {"data": tf.use("digits", per_class=2, other_share=0.0), "page": False, "checkpoint_s": 0.0}
    strategy = tf.use("head-only", epochs=2)
    run_and_kill(tf.Engine(**settings, strategy=strategy, out=tmp_path / "r").run, 1, only="step-saved")
    lines = []
    tf.Engine.resume(tmp_path / "r", log=lines.append).run()
    assert not [line for line in lines if "random weights" in line]
