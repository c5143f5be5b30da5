"""A checkpoint is whole or not there, a damaged one is found before it is used, and what is kept is what was promised.

The full set of random histories: `TUNEFORGE_HISTORIES=1000 python -m pytest tests/engine/storage/test_checkpoint.py`.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_data, tiny_net

import tuneforge as tf
from tuneforge.engine.storage import checkpoint
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.checkpoint import Checkpoints

HISTORIES = int(os.environ.get("TUNEFORGE_HISTORIES", "100"))
COMPARED = ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json", "model.json", "hardest_samples.json")
CPU = torch.device("cpu")
ROOT = Path(tf.__file__).parent.parent


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing cleans up."""


@pytest.fixture(autouse=True)
def no_fault_is_left():
    yield
    faults.hook = None


def fail_at(number, error, *, only=""):
    """Raise `error` at the `number`-th point that is passed, or at the `number`-th of one name."""
    passed = 0

    def hook(name):
        nonlocal passed
        passed += not only or name == only
        if passed == number and (not only or name == only):
            raise error

    faults.hook = hook


def saver(folder, **given):
    return Checkpoints(folder, **{"interval_s": 0.0, "keep_last": 2, **given})


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# Runs that are killed


def steps(task):
    yield tf.Phase("head", train="head", epochs=2, lr=0.02, schedule="cosine")
    yield tf.Phase("all", epochs=4, lr=0.05, schedule="one-cycle", restore_best=True, patience=2)
    yield tf.Phase("few", steps=5, lr=0.001)


def engine(path, *, resume=False, say=None, strategy=steps, **given):
    objects = {"data": tiny_data(), "model": tiny_net(), "strategy": strategy, "callbacks": [tf.use("ema")]}
    if resume:
        return tf.Engine.resume(path, log=say, **objects)
    chosen = {"batch_size": 16, "grad_accum_steps": 2, "page": False, "checkpoint_s": 0.0, "out": path, **given}
    return tf.Engine(**objects, log=say, **chosen)


def contents(path):
    return {name: (path / name).read_bytes() for name in COMPARED}


def killed(path, number, *, only, **given):
    fail_at(number, Killed(), only=only)
    with pytest.raises(Killed):
        engine(path, **given).run()
    faults.hook = None
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    result = engine(path).run()
    return contents(path), len((path / "metrics.jsonl").read_text().splitlines()), result


def test_a_run_resumed_from_the_end_of_any_epoch_ends_the_same(whole, tmp_path):
    expected, num_epochs, _ = whole
    ends = []
    for number in range(1, num_epochs + 1):
        path = killed(tmp_path / f"r{number}", number, only="epoch")
        _, state, _ = checkpoint.load_latest(path, CPU)
        assert state["phase"]["batch"] == 0
        ends.append(bool(state["phase"]["metrics"]["stop_reason"]))
        engine(path, resume=True).run()
        assert contents(path) == expected, number
    assert ends.count(True) == 3, "each phase's last epoch is one of them"


def test_a_phase_of_some_steps_resumed_at_its_last_one_takes_no_more(whole, tmp_path):
    expected, _, result = whole
    last = sum(answer.steps for _, answer in result.strategy_steps)
    path = killed(tmp_path / "r", last, only="step-saved")
    assert len(tiny_data().train) > 5 * 32 - 96 > 0, "samples of that epoch are left"
    said = []
    engine(path, resume=True, say=said.append).run()
    assert contents(path) == expected
    assert f"  continuing with the evaluation after optimizer step {last}, epoch 8" in said


def test_a_resumed_run_says_where_it_goes_on(tmp_path):
    path = killed(tmp_path / "r", 8, only="step-saved")
    newest = checkpoint.load_latest(path, CPU)[0]
    (newest / "state.json").write_bytes(b"{}")
    said = []
    engine(path, resume=True, say=said.append).run()
    damaged, used = newest.name, next(line for line in said if line.startswith("resumed"))
    assert f"warning: checkpoint '{damaged}' is damaged at state.json: it has 2 bytes" in "\n".join(said)
    assert used.endswith("in strategy step 2, 7 optimizer steps done")
    where = next(line for line in said if line.startswith("  continuing"))
    assert where.startswith("  continuing at optimizer step 8, epoch 3, batch 3, lr 0.0")
    assert len(where.partition("next samples ")[2].split(", ")) == 4
    assert said.index(used) < said.index(where)


def test_of_a_run_the_newest_best_epoch_is_kept_however_old(tmp_path):
    path = killed(tmp_path / "r", 8, only="epoch")
    history = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    best = max(entry["step"] for entry in history if entry["best"])
    saved = [checkpoint.verify(path / "checkpoints" / name) for name in names(path)]
    assert [each.step for each in saved if each.best] == [best]
    assert best < saved[-2].step, "it is older than the last two"


def test_what_is_pinned_outlives_resume_and_the_end_of_the_run(whole, tmp_path):
    path = killed(tmp_path / "r", 4, only="step-saved")
    pinned = checkpoint.load_latest(path, CPU)[0]
    (pinned / "pinned").write_text("the one before the fall")
    engine(path, resume=True).run()
    assert contents(path) == whole[0]
    assert names(path) == [pinned.name]
    assert checkpoint.verify(pinned).step == 4


# What makes one due, and what is kept


def test_a_checkpoint_is_due_by_time_or_by_steps_whichever_comes_first(tmp_path):
    by_steps = saver(tmp_path, interval_s=1e9, interval_steps=3)
    assert [by_steps.is_due(step) for step in (1, 2, 3)] == [False, False, True]
    by_steps.save(3, {})
    assert [by_steps.is_due(step) for step in (4, 5, 6)] == [False, False, True]
    assert saver(tmp_path, interval_s=0.0, interval_steps=1000).is_due(1)
    assert not saver(tmp_path, interval_s=1e9).is_due(10**9)


def test_one_that_knows_more_of_the_same_step_takes_the_place_of_the_other(tmp_path):
    saving = saver(tmp_path, interval_s=1e9, interval_steps=3)
    saving.save(3, {}, other_counters=(0, 0))
    assert not saving.is_due(3, other_counters=(0, 0))
    assert saving.is_due(3, other_counters=(1, 0)), "the epoch has ended"
    saving.save(3, {}, other_counters=(1, 0))
    assert names(tmp_path) == ["000002-step-3"]


def test_the_setting_counts_steps(tmp_path):
    killed(tmp_path / "r", 5, only="step-saved", checkpoint_s=1e9, checkpoint_steps=2)
    assert [name[-6:] for name in names(tmp_path / "r")] == ["step-2", "step-4"]


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    (tmp_path / "checkpoints" / "readme.txt").write_text("mine")
    for step in range(4):
        saver(tmp_path, keep_last=1).save(step, {})
    checkpoint.delete_unpinned(tmp_path)
    assert names(tmp_path) == ["notes", "readme.txt"]


def test_a_broken_one_does_not_count_among_those_that_are_kept(tmp_path):
    saver(tmp_path).save(1, {})
    broken = saver(tmp_path).save(2, {})
    (broken / "state.json").write_bytes(b"")
    saver(tmp_path).save(3, {})
    assert names(tmp_path) == ["000001-step-1", "000003-step-3"]


# Damage


def damaged(path, *, flips, truncations):
    """Copies of a checkpoint's files with one byte changed or an end cut off, over all of them in turn."""
    chance = random.Random(0)
    files = [path / name for name in ("manifest.json", "state.json", "tensors.safetensors")]
    for number in range(flips + truncations):
        file = files[number % len(files)]
        content = bytearray(file.read_bytes())
        if number < flips:
            content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
        else:
            del content[chance.randrange(len(content)) :]
        yield file, bytes(content)


def test_every_flip_and_every_cut_is_found_before_use_and_named_and_the_one_before_is_used(tmp_path):
    path = killed(tmp_path / "r", 10, only="step-saved")
    newest, before = (path / "checkpoints" / name for name in names(path)[:-3:-1])
    found = 0
    for file, content in damaged(newest, flips=500, truncations=100):
        good = file.read_bytes()
        file.write_bytes(content)
        used, state, passed_over = checkpoint.load_latest(path, CPU)
        found += used == before and state["step"] == 9 and newest.name in passed_over[0] and file.name in passed_over[0]
        file.write_bytes(good)
    assert found == 600
    assert checkpoint.load_latest(path, CPU)[0] == newest


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
def test_a_run_whose_newest_checkpoint_is_damaged_ends_the_same(whole, tmp_path, name):
    path = killed(tmp_path / "r", 10, only="step-saved")
    file = checkpoint.load_latest(path, CPU)[0] / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    engine(path, resume=True).run()
    assert contents(path) == whole[0]
    assert f"is damaged at {name}" in (path / "log.txt").read_text()


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(tmp_path):
    saving = saver(tmp_path)
    saving.save(0, {"value": torch.zeros(4)})
    for number in range(1, 7):  # every point before the checkpoint has its name
        fail_at(number, OSError(28, "No space left on device"))
        with pytest.raises(tf.TryAgainError, match="No space"):
            saving.save(1, {"value": torch.ones(4)})
        faults.hook = None
        path, state, passed_over = checkpoint.load_latest(tmp_path, CPU)
        assert (path.name, float(state["value"][0]), passed_over) == ("000001-step-0", 0.0, [])
    saving.save(1, {"value": torch.ones(4)})
    assert [name[-6:] for name in names(tmp_path)] == ["step-0", "step-1"]


def test_tensors_met_twice_are_stored_once_and_are_one_again():
    shared = torch.arange(3)
    tensors = {}
    packed = checkpoint.pack({"a": shared, "b": [shared, {"c": 1.5}]}, tensors, {})
    assert len(tensors) == 1
    again = checkpoint.unpack(packed, tensors)
    assert again["a"] is again["b"][0]


# Random histories

MOST_POINTS = 16  # a save passes eight, and two for each that it deletes
FAULTS = st.none() | st.tuples(st.sampled_from(["kill", "full disk"]), st.integers(1, MOST_POINTS))
SAVES = st.tuples(st.just("save"), st.integers(0, 2), st.booleans(), FAULTS)
EVENTS = st.lists(
    st.one_of(SAVES, SAVES, SAVES, st.tuples(st.just("pin"), st.integers(0, 9)), st.tuples(st.just("restart"))),
    min_size=4,
    max_size=24,
)


class History:
    """What a folder of checkpoints must hold, beside the folder itself."""

    def __init__(self, folder, keep):
        self.folder, self.keep = folder, keep
        self.saving = saver(folder, keep_last=keep)
        self.attempts = 0
        self.step = 0
        self.last = None
        self.best = set()
        self.pinned = set()

    def restart(self):
        """The process died: another one finds what lies there."""
        self.saving = saver(self.folder, keep_last=self.keep)
        self.check_newest(self.last)
        path, state, _ = checkpoint.load_latest(self.folder, CPU)
        if path is not None:
            self.step, self.last = checkpoint.verify(path).step, int(state["attempt"])

    def whole(self):
        """Names of those that are whole, as far as they have a manifest, the newest last."""
        return sorted(path.parent.name for path in self.folder.glob("checkpoints/[0-9]*/manifest.json"))

    def pin(self, which):
        if whole := self.whole():
            self.pinned.add(whole[which % len(whole)])
            (self.folder / "checkpoints" / whole[which % len(whole)] / "pinned").touch()

    def save(self, advance, best, fault):
        self.step += advance
        self.attempts += 1
        if fault is not None:
            fail_at(fault[1], Killed() if fault[0] == "kill" else OSError(28, "No space left on device"))
        before = self.whole()
        try:
            path = self.saving.save(self.step, {"attempt": torch.tensor(self.attempts)}, best=best)
        except (Killed, tf.TryAgainError) as error:
            faults.hook = None
            if best:  # one that failed may be whole all the same
                self.best |= set(self.whole()) - set(before)
            self.check_newest(self.last, self.attempts)
            state = checkpoint.load_latest(self.folder, CPU)[1]
            self.last = int(state["attempt"]) if state else None
            if isinstance(error, Killed):
                self.restart()
            return
        faults.hook = None
        self.last = self.attempts
        if best:
            self.best.add(path.name)
        self.check_newest(self.attempts)
        assert names(self.folder) == self.promised([*before, path.name])

    def check_newest(self, *allowed):
        path, state, _ = checkpoint.load_latest(self.folder, CPU)
        assert (int(state["attempt"]) if path is not None else None) in allowed
        for name in self.pinned:
            checkpoint.verify(self.folder / "checkpoints" / name)
        if self.best:
            checkpoint.verify(self.folder / "checkpoints" / max(self.best))

    def promised(self, whole):
        """Of these, the last ones, each of another step; the newest best; the pinned. Nothing else, so no litter."""
        by_step = {name.partition("-")[2]: name for name in whole}
        newest_best = {max(self.best)} if self.best else set()
        return sorted({*sorted(by_step.values())[-self.keep :], *newest_best, *self.pinned})


@given(EVENTS, st.integers(1, 3))
@settings(max_examples=HISTORIES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_saved_pinned_and_killed_what_was_promised_is_there(events, keep):
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        history = History(Path(folder), keep)
        for name, *given_ in events:
            getattr(history, name)(*given_)


# No pickle

FORBIDDEN = [
    "import pickle\n\npickle.dumps(1)\n",
    "from pickle import loads\n\nloads(b'')\n",
    "import _pickle\n\n_pickle.dumps(1)\n",
    "import torch\n\ntorch.save({}, 'f')\n",
    "from torch import save\n\nsave({}, 'f')\n",
    "import torch as t\n\nt.load('f')\n",
    "import torch\n\ntorch.jit.save(None, 'f')\n",
    "from torch import jit\n\njit.load('f')\n",
    "import torch\n\ntorch.export.save(None, 'f')\n",
    "from torch.serialization import load\n\nload('f')\n",
    "import numpy as np\n\nnp.load('f', allow_pickle=True)\n",
    "from numpy import load\n\nload('f')\n",
    "import joblib\n\njoblib.dump(1, 'f')\n",
    "from joblib import dump\n\ndump(1, 'f')\n",
    "import dill\n\ndill.dumps(1)\n",
    "import cloudpickle\n\ncloudpickle.dumps(1)\n",
    "import shelve\n\nshelve.open('f')\n",
    "import pandas as pd\n\npd.read_pickle('f')\n",
]


def linted(source):
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    command += ["--stdin-filename", "tuneforge/engine/sample.py", "-"]
    return subprocess.run(command, input=source, cwd=ROOT, capture_output=True, text=True, check=False).stdout


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("source", FORBIDDEN)
def test_the_linter_refuses_every_way_to_a_pickle(source):
    assert "TID251" in linted(f'"""A module."""\n\n{source}')


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_the_linter_lets_safetensors_pass():
    assert "TID251" not in linted('"""A module."""\n\nfrom safetensors.torch import save\n\nsave({})\n')
