"""What a run that was stopped or killed is resumed with, and what is refused. See also `test_kills.py`."""

import json
import os
import signal
import subprocess
import sys

import attrs
import forked
import pytest
import torch
from simulated_kill import Noisy, contents, every_step, killed
from tiny import TinyNet, tiny_data
from torch import nn

import tuneforge as tf
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.run_dir import RunDir


class Tied(TinyNet):
    """Norms, dropout, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.third = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.third[0].weight = self.second[0].weight

    def forward(self, inputs):
        return self.head(self.third(self.second(self.first(inputs))))


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.Model.from_module(Tied(), head="head")


def data():
    return attrs.evolve(tiny_data(), train=tiny_data().train.subset(torch.arange(48)))


def engine(path, *, resume=False, checkpoint_s=0.0):
    objects = {"data": data(), "model": network(), "strategy": every_step, "callbacks": [tf.use("ema"), Noisy()]}
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
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    points = killed(engine(path).run, -1)
    return contents(path), points


def test_a_run_with_checkpoints_ends_as_one_without(whole, tmp_path):
    engine(tmp_path / "r", checkpoint_s=1e9).run()
    assert contents(tmp_path / "r") == whole[0]
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_strategy_that_has_changed_is_refused_with_the_difference(whole, tmp_path):
    path = tmp_path / "r"
    killed(engine(path).run, len(whole[1]) - 20)
    changed = engine(path, resume=True)

    def other(task):
        yield tf.Phase("head", train="head", epochs=2, lr=0.03)

    objects = {"data": data(), "model": network(), "strategy": other, "callbacks": [tf.use("ema"), Noisy()]}
    del changed
    with pytest.raises(tf.UsageError, match=r"lr=0\.03"):
        tf.Engine.resume(path, **objects).run()


def test_a_stop_saves_says_how_to_go_on_and_the_rest_is_the_same(whole, tmp_path):
    path = tmp_path / "r"
    asked = engine(path, checkpoint_s=1e9)
    faults.hook = lambda name: asked.stop("SIGTERM", exit_code=143) if name == "epoch" else None
    with pytest.raises(tf.StoppedError, match="tuneforge resume") as caught:
        asked.run()
    faults.hook = None
    assert caught.value.exit_code == 143
    assert json.loads((path / "status.json").read_text())["state"] == "stopped"
    engine(path, resume=True).run()
    assert contents(path) == whole[0]


def test_a_finished_run_is_not_resumed(tmp_path):
    path = tmp_path / "r"
    engine(path).run()
    with pytest.raises(tf.UsageError, match="is done"):
        engine(path, resume=True)


def test_a_running_folder_cannot_be_resumed_beside_itself(tmp_path, whole):
    path = tmp_path / "r"
    killed(engine(path).run, len(whole[1]) // 2)
    with RunDir(path, resume=True), pytest.raises(tf.FolderError, match="in use"):
        engine(path, resume=True).run()


COMMAND = [
    sys.executable, "-m", "tuneforge", "run", "--data.per-class", "8", "--data.other-share", "0.2",
    "--strategy.epochs", "2", "--checkpoint-s", "0", "--no-page", "--callback", "ema",
]  # fmt: skip


def command(arguments, folder, *, kill_after=None, number=signal.SIGKILL, begin=forked.Popen):
    """Run the command line in a process group of its own, and kill the group when a line of metrics is there."""
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
    code, out = command([*COMMAND, "--out", "whole"], folder)
    assert code == 0, out
    return folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_killed_and_resumed_ends_the_same(undisturbed, tmp_path, number, code):
    """What goes on is an interpreter of its own, with another seed of hashes."""
    done, out = command([*COMMAND, "--out", "runs/r"], tmp_path, kill_after="epoch 2/", number=number)
    assert done == code, out
    assert ("tuneforge resume" in out) == (number != signal.SIGKILL)
    done, out = command([sys.executable, "-m", "tuneforge", "resume"], tmp_path, begin=subprocess.Popen)
    assert done == 0, out
    assert "in strategy step 2" in out
    for name in ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json"):
        assert (undisturbed / name).read_bytes() == (tmp_path / "runs" / "r" / name).read_bytes()


class Counting(nn.Module):
    """Counts its forward passes, and draws a number in each."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, inputs):
        self.passes += 1
        return self.head(self.body(inputs).relu() + 1e-3 * torch.rand(16))


def test_looks_at_the_model_leave_no_trace_in_its_buffers(tmp_path):
    def counting(path, resume=False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = tf.Model.from_module(Counting(), head="head")
        phases = [tf.Phase("head", train="head", epochs=2, lr=0.02), tf.Phase("all", epochs=2, lr=0.01)]
        objects = {"data": data(), "model": model, "strategy": phases}
        if resume:
            return tf.Engine.resume(path, **objects)
        return tf.Engine(**objects, batch_size=8, page=False, checkpoint_s=0.0, out=path)

    counting(tmp_path / "whole").run()
    killed(counting(tmp_path / "r").run, 15, only="step-saved")
    counting(tmp_path / "r", resume=True).run()
    assert contents(tmp_path / "r") == contents(tmp_path / "whole")
