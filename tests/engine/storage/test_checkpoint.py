"""Checkpoints: each is complete or absent, damage is detected before use, and the promised ones are kept.

The full set of random histories: `TUNEFORGE_HISTORIES=1000 python -m pytest tests/engine/storage/test_checkpoint.py`.
"""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_data, tiny_net

import tuneforge as tf
from tuneforge.engine.storage import checkpoint
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.checkpoint import Checkpoints
from tuneforge.plugin.serialization import from_json, to_json

HISTORIES = int(os.environ.get("TUNEFORGE_HISTORIES", "100"))
COMPARED = ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json", "model.json", "hardest_samples.json")
CPU = torch.device("cpu")
ROOT = Path(tf.__file__).parent.parent


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, so nothing is cleaned up."""


@pytest.fixture(autouse=True)
def reset_faults():
    yield
    faults.hook = None


def fail_at(number, error, *, only=""):
    """Raise `error` at the `number`-th fault injection point, or at the `number`-th of one name."""
    passed = 0

    def hook(name):
        nonlocal passed
        passed += not only or name == only
        if passed == number and (not only or name == only):
            raise error

    faults.hook = hook


def make_checkpoints(folder, **given):
    return Checkpoints(folder, **{"interval_s": 0.0, "keep_last": 2, **given})


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# Killed runs


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


def run_until_killed(path, number, *, only, **given):
    fail_at(number, Killed(), only=only)
    with pytest.raises(Killed):
        engine(path, **given).run()
    faults.hook = None
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    result = engine(path).run()
    return contents(path), len((path / "metrics.jsonl").read_text().splitlines()), result


def test_run_resumed_from_the_end_of_any_epoch_ends_the_same(uninterrupted, tmp_path):
    expected, num_epochs, _ = uninterrupted
    ends = []
    for number in range(1, num_epochs + 1):
        path = run_until_killed(tmp_path / f"r{number}", number, only="epoch")
        _, state, _ = checkpoint.load_latest(path, CPU)
        assert state["phase"]["batch"] == 0
        ends.append(bool(state["phase"]["metrics"]["stop_reason"]))
        engine(path, resume=True).run()
        assert contents(path) == expected, number
    assert ends.count(True) == 3, "each phase's last epoch is one of them"


def test_phase_resumed_after_its_last_step_takes_no_more_steps(uninterrupted, tmp_path):
    expected, _, result = uninterrupted
    last = sum(answer.steps for _, answer in result.strategy_steps)
    path = run_until_killed(tmp_path / "r", last, only="step-saved")
    assert len(tiny_data().train) > 5 * 32 - 96 > 0, "samples of that epoch are left"
    messages = []
    engine(path, resume=True, say=messages.append).run()
    assert contents(path) == expected
    assert f"  continuing with the evaluation after optimizer step {last}, epoch 8" in messages


def test_resumed_run_logs_where_it_continues(tmp_path):
    path = run_until_killed(tmp_path / "r", 8, only="step-saved")
    newest = checkpoint.load_latest(path, CPU)[0]
    (newest / "state.json").write_bytes(b"{}")
    messages = []
    engine(path, resume=True, say=messages.append).run()
    damaged, used = newest.name, next(line for line in messages if line.startswith("resumed"))
    assert f"warning: checkpoint '{damaged}' is damaged at state.json: it has 2 bytes" in "\n".join(messages)
    assert used.endswith("in strategy step 2, 7 optimizer steps done")
    where = next(line for line in messages if line.startswith("  continuing"))
    assert where.startswith("  continuing at optimizer step 8, epoch 3, batch 3, lr 0.0")
    assert len(where.partition("next samples ")[2].split(", ")) == 4
    assert messages.index(used) < messages.index(where)


def test_newest_checkpoint_of_a_best_epoch_is_kept(tmp_path):
    path = run_until_killed(tmp_path / "r", 8, only="epoch")
    history = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    best = max(entry["step"] for entry in history if entry["best"])
    saved = [checkpoint.verify(path / "checkpoints" / name) for name in names(path)]
    assert [each.step for each in saved if each.best] == [best]
    assert best < saved[-2].step, "it is older than the last two"


def test_pinned_checkpoint_outlives_resume_and_the_end_of_the_run(uninterrupted, tmp_path):
    path = run_until_killed(tmp_path / "r", 4, only="step-saved")
    pinned = checkpoint.load_latest(path, CPU)[0]
    (pinned / "pinned").write_text("the one before the fall")
    engine(path, resume=True).run()
    assert contents(path) == uninterrupted[0]
    assert names(path) == [pinned.name]
    assert checkpoint.verify(pinned).step == 4


# When a checkpoint is due, and which are kept


def test_checkpoint_is_due_by_time_or_by_steps_whichever_comes_first(tmp_path):
    by_steps = make_checkpoints(tmp_path, interval_s=1e9, interval_steps=3)
    assert [by_steps.is_due(step) for step in (1, 2, 3)] == [False, False, True]
    by_steps.save(3, {})
    assert [by_steps.is_due(step) for step in (4, 5, 6)] == [False, False, True]
    assert make_checkpoints(tmp_path, interval_s=0.0, interval_steps=1000).is_due(1)
    assert not make_checkpoints(tmp_path, interval_s=1e9).is_due(10**9)


def test_checkpoint_with_later_counters_replaces_one_of_the_same_step(tmp_path):
    saving = make_checkpoints(tmp_path, interval_s=1e9, interval_steps=3)
    saving.save(3, {}, other_counters=(0, 0))
    assert not saving.is_due(3, other_counters=(0, 0))
    assert saving.is_due(3, other_counters=(1, 0)), "the epoch has ended"
    saving.save(3, {}, other_counters=(1, 0))
    assert names(tmp_path) == ["000002-step-3"]


def test_checkpoint_steps_setting_counts_optimizer_steps(tmp_path):
    run_until_killed(tmp_path / "r", 5, only="step-saved", checkpoint_s=1e9, checkpoint_steps=2)
    assert [name[-6:] for name in names(tmp_path / "r")] == ["step-2", "step-4"]


def test_other_files_among_the_checkpoints_are_never_deleted(tmp_path):
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    (tmp_path / "checkpoints" / "readme.txt").write_text("mine")
    for step in range(4):
        make_checkpoints(tmp_path, keep_last=1).save(step, {})
    checkpoint.delete_unpinned(tmp_path)
    assert names(tmp_path) == ["notes", "readme.txt"]


def test_damaged_checkpoint_does_not_count_among_those_that_are_kept(tmp_path):
    make_checkpoints(tmp_path).save(1, {})
    broken = make_checkpoints(tmp_path).save(2, {})
    (broken / "state.json").write_bytes(b"")
    make_checkpoints(tmp_path).save(3, {})
    assert names(tmp_path) == ["000001-step-1", "000003-step-3"]


# Damage


def damaged_files(path, *, flips, truncations):
    """Yield files of a checkpoint with one byte changed, or with the end cut off, over all files in turn."""
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


def test_flipped_or_truncated_byte_is_detected_and_the_checkpoint_before_is_used(tmp_path):
    path = run_until_killed(tmp_path / "r", 10, only="step-saved")
    newest, before = (path / "checkpoints" / name for name in names(path)[:-3:-1])
    found = 0
    for file, content in damaged_files(newest, flips=500, truncations=100):
        good = file.read_bytes()
        file.write_bytes(content)
        used, state, skipped = checkpoint.load_latest(path, CPU)
        found += used == before and state["step"] == 9 and newest.name in skipped[0] and file.name in skipped[0]
        file.write_bytes(good)
    assert found == 600
    assert checkpoint.load_latest(path, CPU)[0] == newest


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
def test_run_whose_newest_checkpoint_is_damaged_ends_the_same(uninterrupted, tmp_path, name):
    path = run_until_killed(tmp_path / "r", 10, only="step-saved")
    file = checkpoint.load_latest(path, CPU)[0] / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    engine(path, resume=True).run()
    assert contents(path) == uninterrupted[0]
    assert f"is damaged at {name}" in (path / "log.txt").read_text()


def test_full_disk_while_saving_leaves_the_earlier_checkpoint(tmp_path):
    saving = make_checkpoints(tmp_path)
    saving.save(0, {"value": torch.zeros(4)})
    for number in range(1, 7):  # every fault injection point before the rename
        fail_at(number, OSError(28, "No space left on device"))
        with pytest.raises(tf.TryAgainError, match="No space"):
            saving.save(1, {"value": torch.ones(4)})
        faults.hook = None
        path, state, skipped = checkpoint.load_latest(tmp_path, CPU)
        assert (path.name, float(state["value"][0]), skipped) == ("000001-step-0", 0.0, [])
    saving.save(1, {"value": torch.ones(4)})
    assert [name[-6:] for name in names(tmp_path)] == ["step-0", "step-1"]


def test_shared_tensors_are_stored_once_and_shared_again():
    shared = torch.arange(3)
    tensors = {}
    packed = checkpoint.pack({"a": shared, "b": [shared, {"c": 1.5}]}, tensors, {})
    assert len(tensors) == 1
    again = checkpoint.unpack(packed, tensors)
    assert again["a"] is again["b"][0]


def test_plain_data_comes_back_as_it_was():
    value = {
        "tuple": (1, (2.5, [None, "a"])), "list": [True, {"x": (torch.ones(2),)}], "nan": math.nan, "inf": -math.inf,
        "empty": (), 7: "a key that is no text", "step": tf.Phase("p", epochs=1), "zero-dimensional": np.float32(0.5),
    }  # fmt: skip
    tensors = {}
    text = to_json(checkpoint.pack(value, tensors, {}))
    again = checkpoint.unpack(from_json(text), tensors)
    assert math.isnan(again.pop("nan"))
    assert math.isnan(value.pop("nan"))
    assert again["list"][1]["x"][0] is value["list"][1]["x"][0]
    del again["list"], value["list"]
    assert again == value


@pytest.mark.parametrize("value", [{1, 2}, object(), np.zeros(3), b"bytes"])
def test_what_is_neither_tensor_nor_plain_data_is_refused_with_its_place(tmp_path, value):
    with pytest.raises(tf.PluginError, match=r"state\.components\.3:mine\.seen"):
        make_checkpoints(tmp_path).save(0, {"components": {"3:mine": {"count": 1, "seen": [value]}}})
    assert list((tmp_path / "checkpoints").iterdir()) == []


# Random histories

MOST_POINTS = 16  # a save passes eight points, and two for each checkpoint that it deletes
FAULTS = st.none() | st.tuples(st.sampled_from(["kill", "full disk"]), st.integers(1, MOST_POINTS))
SAVES = st.tuples(st.just("save"), st.integers(0, 2), st.booleans(), FAULTS)
EVENTS = st.lists(
    st.one_of(SAVES, SAVES, SAVES, st.tuples(st.just("pin"), st.integers(0, 9)), st.tuples(st.just("restart"))),
    min_size=4,
    max_size=24,
)


class History:
    """The checkpoints that must exist after a random history, and the directory that holds them."""

    def __init__(self, folder, keep):
        self.folder, self.keep = folder, keep
        self.saving = make_checkpoints(folder, keep_last=keep)
        self.attempts = 0
        self.step = 0
        self.last = None
        self.best = set()
        self.pinned = set()

    def restart(self):
        """Simulate a restart of the process, which finds only the files."""
        self.saving = make_checkpoints(self.folder, keep_last=self.keep)
        self.check_newest(self.last)
        path, state, _ = checkpoint.load_latest(self.folder, CPU)
        if path is not None:
            self.step, self.last = checkpoint.verify(path).step, int(state["attempt"])

    def complete(self):
        """Return the names of the checkpoints with a manifest, the newest last."""
        return sorted(path.parent.name for path in self.folder.glob("checkpoints/[0-9]*/manifest.json"))

    def pin(self, which):
        if complete := self.complete():
            self.pinned.add(complete[which % len(complete)])
            (self.folder / "checkpoints" / complete[which % len(complete)] / "pinned").touch()

    def save(self, advance, best, fault):
        self.step += advance
        self.attempts += 1
        if fault is not None:
            fail_at(fault[1], Killed() if fault[0] == "kill" else OSError(28, "No space left on device"))
        before = self.complete()
        try:
            path = self.saving.save(self.step, {"attempt": torch.tensor(self.attempts)}, best=best)
        except (Killed, tf.TryAgainError) as error:
            faults.hook = None
            if best:  # a save that failed may have written a complete checkpoint
                self.best |= set(self.complete()) - set(before)
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
        assert names(self.folder) == self.expected_names([*before, path.name])

    def check_newest(self, *allowed):
        path, state, _ = checkpoint.load_latest(self.folder, CPU)
        assert (int(state["attempt"]) if path is not None else None) in allowed
        for name in self.pinned:
            checkpoint.verify(self.folder / "checkpoints" / name)
        if self.best:
            checkpoint.verify(self.folder / "checkpoints" / max(self.best))

    def expected_names(self, complete):
        """Return the names to keep: the last ones, each of another step, the newest best one, and the pinned ones."""
        by_step = {name.partition("-")[2]: name for name in complete}
        newest_best = {max(self.best)} if self.best else set()
        return sorted({*sorted(by_step.values())[-self.keep :], *newest_best, *self.pinned})


@given(EVENTS, st.integers(1, 3))
@settings(max_examples=HISTORIES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_saves_pins_and_kills_keep_the_promised_checkpoints(events, keep):
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
def test_linter_rejects_every_use_of_pickle(source):
    assert "TID251" in linted(f'"""A module."""\n\n{source}')


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_linter_accepts_safetensors():
    assert "TID251" not in linted('"""A module."""\n\nfrom safetensors.torch import save\n\nsave({})\n')
