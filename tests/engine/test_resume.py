"""A run that was killed anywhere goes on and ends as if nothing had happened, to the bit.

The full set: `TUNEFORGE_KILLS=200 python -m pytest tests/engine/test_resume.py`.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import attrs
import pytest
import torch
from small import TinyNet, tiny_data
from torch import nn

import tuneforge as tf
from tuneforge.engine import checkpoint, faults, memory
from tuneforge.engine.folder import RunFolder

KILLS = int(os.environ.get("TUNEFORGE_KILLS", "30"))
COMPARED = ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json", "model.json", "mistakes.json")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing cleans up."""


class Tied(TinyNet):
    """Norms, dropout, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.third = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.third[0].weight = self.second[0].weight

    def forward(self, inputs):
        return self.head(self.third(self.second(self.first(inputs))))


class Noisy:
    """Random augmentation from each sample's own numbers, and a count in the component's state."""

    @tf.hookimpl(wrapper=True)
    def train_step(self, run, batch):
        state = run.state(self)
        state["steps"] = state.get("steps", 0) + 1
        result = yield
        return result[0] * (1 + 0.1 * float(batch.noise.uniform("noise").mean()) + 1e-3 * state["steps"]), result[1]


def strategy(brief):
    report = yield tf.Phase("head", train="head", epochs=2, lr=0.02, schedule="cosine")
    yield tf.Fit("fit", l2=0.1)
    yield tf.Probe("look", batches=1)
    lr = 0.01 if report.val["accuracy"] > 0.1 else 0.02
    yield tf.Phase(
        "top", train="groups[-2:]", epochs=2, lr=lr, optimizer=tf.use("sgd", momentum=0.9), restore_best=True
    )
    yield tf.Phase(
        "all", epochs=2, lr=0.005, optimizer="adamw", schedule="one-cycle", patience=1, class_weights="balanced"
    )
    yield tf.Blend("mix", snapshots=["start", "all"], weights=[0.5, 1.0])


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.Model.of(Tied(), head="head")


def data():
    return attrs.evolve(tiny_data(), train=tiny_data().train.take(torch.arange(48)))


def engine(path, *, resume=False, checkpoint_s=0.0):
    objects = {"data": data(), "model": network(), "strategy": strategy, "extensions": [tf.use("ema"), Noisy()]}
    if resume:
        return tf.Engine.resume(path, **objects)
    settings = {"batch_size": 8, "accumulate": 2, "seed": 3, "page": False, "checkpoint_s": checkpoint_s, "out": path}
    return tf.Engine(**objects, **settings)


def contents(path):
    return {name: (path / name).read_bytes() for name in COMPARED}


def run_until(action, at):
    """Run `action` and kill it at the `at`-th point that it passes; how many points were passed."""
    passed = 0

    def hook(name):
        nonlocal passed
        passed += 1
        if passed == at:
            raise Killed(name)

    faults.hook = hook
    try:
        action()
    except Killed:
        pass
    finally:
        faults.hook = None
    return passed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    points = run_until(engine(path).run, at=-1)
    return contents(path), points


def test_a_run_with_checkpoints_ends_as_one_without(whole, tmp_path):
    engine(tmp_path / "r", checkpoint_s=1e9).run()
    assert contents(tmp_path / "r") == whole[0]
    assert not (tmp_path / "r" / "checkpoints").exists()


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_anywhere_and_resumed_it_ends_the_same_to_the_bit(whole, tmp_path, seed):
    expected, points = whole
    chance = random.Random(seed)
    path = tmp_path / "r"
    run_until(engine(path).run, at=chance.randint(1, points))
    for _ in range(chance.randint(0, 2)):
        if json.loads((path / "status.json").read_text())["state"] != "done":
            run_until(engine(path, resume=True).run, at=chance.randint(1, points // 2))
    if json.loads((path / "status.json").read_text())["state"] != "done":
        engine(path, resume=True).run()
    assert contents(path) == expected


def forget(name):
    """A mutant: one thing is left out of what is put back."""
    original = memory.Memory.recall

    def recall(self, state):
        if name == "sampler position":
            state["phase"]["batch"] = max(0, state["phase"]["batch"] - 2)
        if name == "optimizer":
            state["optimizer"] = {}
        if name == "norm statistics":
            state["model"] = {key: value for key, value in state["model"].items() if "running" not in key}
        if name == "component state":
            state["components"] = {key: {"steps": 0} for key in state["components"] if key.endswith("Noisy")} | {
                key: value for key, value in state["components"].items() if not key.endswith("Noisy")
            }
        if name == "averages":
            for kept in state["components"].values():
                if "average" in kept:
                    kept["average"] = {key: tensor * 0 for key, tensor in kept["average"].items()}
        if name == "epoch":
            state["epoch"] = 0
        if name == "schedule":
            state["phase"]["steps_done"] = 0
        if name == "metrics already written":
            state["offsets"] = {}
        original(self, state)

    return recall


MUTANTS = (
    "sampler position", "optimizer", "norm statistics", "component state", "averages", "epoch", "schedule",
    "metrics already written",
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_restore_that_forgets_something_is_caught_by_this_comparison(whole, tmp_path, monkeypatch, mutant):
    """The negative control: were the comparison blind to one of these, it would prove nothing."""
    expected, _ = whole
    path = tmp_path / "r"
    steps = 0

    def hook(name):
        nonlocal steps
        steps += name == "step-saved"
        if steps == 17:  # in the second epoch of the last phase, before its last step
            raise Killed

    faults.hook = hook
    with pytest.raises(Killed):
        engine(path).run()
    faults.hook = None
    place = path / "metrics.jsonl"
    place.write_text(place.read_text() + "{}\n")
    monkeypatch.setattr(memory.Memory, "recall", forget(mutant))
    try:
        engine(path, resume=True).run()
    except (tf.TuneforgeError, KeyError, ValueError):
        return
    assert contents(path) != expected


def broken_copies(path, count):
    """Copies of a checkpoint with one byte flipped or an end cut off, over all its files."""
    chance = random.Random(0)
    files = sorted(each for each in path.iterdir())
    for number in range(count):
        file = files[number % len(files)]
        content = bytearray(file.read_bytes())
        if number % 6 == 5:
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        yield file, bytes(content)


def test_a_damaged_checkpoint_is_found_before_use_and_the_one_before_is_used(whole, tmp_path):
    path = tmp_path / "r"
    run_until(engine(path).run, at=whole[1] // 3)
    newest = max(checkpoint._complete(path / "checkpoints"), key=checkpoint._number)
    before = sorted(checkpoint._complete(path / "checkpoints"), key=checkpoint._number)[-2]
    for file, content in broken_copies(newest, 120):
        good = file.read_bytes()
        file.write_bytes(content)
        used, _, passed_over = checkpoint.newest(path, torch.device("cpu"))
        assert used == before
        assert newest.name in passed_over[0]
        file.write_bytes(good)
    shutil.rmtree(newest)
    engine(path, resume=True).run()
    assert contents(path) == whole[0]


def test_whatever_is_killed_a_whole_checkpoint_exists_once_the_first_is_done(tmp_path):
    chance = random.Random(1)
    saver = checkpoint.Checkpoints(tmp_path, every_s=0.0, keep=2)
    saver.save(0, {"value": torch.zeros(4)})
    newest = 0
    for step in range(1, 80):
        kill = chance.randint(1, 14)
        run_until(lambda step=step: saver.save(step, {"value": torch.full((4,), float(step))}), at=kill)
        path, state, _ = checkpoint.newest(tmp_path, torch.device("cpu"))
        assert path is not None
        found = int(state["value"][0])
        assert found in (newest, step)
        newest = found


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(tmp_path):
    saver = checkpoint.Checkpoints(tmp_path, every_s=0.0, keep=2)
    saver.save(0, {"value": torch.zeros(4)})

    def full(name):
        raise OSError(28, "No space left on device")

    faults.hook = full
    with pytest.raises(OSError, match="No space"):
        saver.save(1, {"value": torch.ones(4)})
    faults.hook = None
    path, state, passed_over = checkpoint.newest(tmp_path, torch.device("cpu"))
    assert (path.name, float(state["value"][0]), passed_over) == ("000001-step-0", 0.0, [])
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["000001-step-0"]


def test_tensors_met_twice_are_stored_once_and_are_one_again():
    shared = torch.arange(3)
    tensors = {}
    packed = checkpoint.pack({"a": shared, "b": [shared, {"c": 1.5}]}, tensors, {})
    assert len(tensors) == 1
    again = checkpoint.unpack(packed, tensors)
    assert again["a"] is again["b"][0]


def test_a_strategy_that_has_changed_is_refused_with_the_difference(whole, tmp_path):
    path = tmp_path / "r"
    run_until(engine(path).run, at=whole[1] - 20)
    changed = engine(path, resume=True)

    def other(brief):
        yield tf.Phase("head", train="head", epochs=2, lr=0.03)

    objects = {"data": data(), "model": network(), "strategy": other, "extensions": [tf.use("ema"), Noisy()]}
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
    run_until(engine(path).run, at=whole[1] // 2)
    with RunFolder(path, resume=True), pytest.raises(tf.FolderError, match="in use"):
        engine(path, resume=True).run()


COMMAND = [
    sys.executable, "-m", "tuneforge", "run", "--data.per-class", "8", "--data.other-share", "0.2",
    "--strategy.epochs", "2", "--checkpoint-s", "0", "--no-page", "--with", "ema",
]  # fmt: skip


def command(arguments, folder, *, kill_after=None, number=signal.SIGKILL):
    """Run the command line in a process group of its own, and kill the group when a line of metrics is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
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


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_killed_and_resumed_ends_the_same(tmp_path, number, code):
    assert command([*COMMAND, "--out", "whole"], tmp_path)[0] == 0
    done, out = command([*COMMAND, "--out", "runs/r"], tmp_path, kill_after="epoch   2", number=number)
    assert done == code, out
    assert ("tuneforge resume" in out) == (number != signal.SIGKILL)
    done, out = command([sys.executable, "-m", "tuneforge", "resume"], tmp_path)
    assert done == 0, out
    assert "goes on in step 2 of the strategy" in out
    for name in ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "runs" / "r" / name).read_bytes()
