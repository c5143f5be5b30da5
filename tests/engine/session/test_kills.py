"""A run that is killed at any point and resumed ends bit-identical to an unbroken run.

Full set: `TUNEFORGE_KILLS=200 TUNEFORGE_CLOCK_KILLS=50 python -m pytest -m ""
tests/engine/session/test_kills.py`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import attrs
import forked
import pytest
import torch
from simulated_kill import NoisyLoss, every_step_kind, read_files, run_and_kill
from tiny import blobs, tiny_data
from torch import nn

import tuneforge as tf
from tuneforge.engine.context import run as run_module
from tuneforge.engine.feature_cache import build as feature_cache_build
from tuneforge.engine.loop import train_phase
from tuneforge.engine.loop.phase_components import PhaseComponents
from tuneforge.engine.session import resume

KILLS = int(os.environ.get("TUNEFORGE_KILLS", "24"))
CLOCK_KILLS = int(os.environ.get("TUNEFORGE_CLOCK_KILLS", "2"))
BOUNDARIES = ("phase-trained", "phase-logged", "phase-saved")


class Net(nn.Module):
    """BatchNorm, dropout, a shared weight, and a body that is worth caching: (b, 8) -> (b, 3)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.second = nn.Sequential(
            nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Dropout(0.5)
        )
        self.third = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
        self.third[0].weight = self.second[3].weight
        self.head = nn.Linear(16, 3)

    def forward(self, inputs):
        return self.head(self.third(self.second(self.first(inputs))))


class NotInMemory:
    """A data source that is not in memory, so that data workers fetch from it."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def fetch(self, indices):
        return self.split.fetch(indices)

    def fingerprint(self):
        return self.split.inputs_fingerprint()


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.Model.from_module(Net(), head="head")


def data():
    plain = blobs(48, seed=1)
    return attrs.evolve(tiny_data(), train=tf.Split(NotInMemory(plain), plain.targets))


def engine(path, *, resume=False, num_workers=0):
    strategy = partial(every_step_kind, epochs=(5, 3))
    objects = {"data": data(), "model": network(), "strategy": strategy, "callbacks": [tf.use("ema"), NoisyLoss()]}
    if resume:
        return tf.Engine.resume(path, **objects)
    settings = {"batch_size": 8, "grad_accum_steps": 2, "seed": 3, "page": False, "checkpoint_s": 0.0, "out": path}
    bank = {"augment": [tf.use("tiny:GaussianJitter")], "cache_copies": 2, "num_workers": num_workers}
    return tf.Engine(**objects, **settings, **bank)


def done(path):
    status = path / "status.json"
    return status.exists() and json.loads(status.read_text())["state"] == "done"


@pytest.fixture(scope="module", autouse=True)
def tracing_is_free():
    """Cache features although tracing this small network takes longer than it saves."""
    with pytest.MonkeyPatch.context() as patch:
        free = dict.fromkeys(feature_cache_build.MACS_PER_TRACED_MODULE, 0.0)
        patch.setattr(feature_cache_build, "MACS_PER_TRACED_MODULE", free)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEFORGE_CACHE", str(path.parent / "cache"))
        points = run_and_kill(engine(path).run, -1)
    return read_files(path), points


def choose_point(points, seed):
    """Return where seed `seed` kills: each kind of point in turn, or next to a phase boundary."""
    generator = random.Random(seed)
    if seed % 4 == 0:
        boundaries = [index for index, name in enumerate(points) if name in BOUNDARIES]
        steps = [index for index, name in enumerate(points) if name == "step"]
        near = generator.choice(boundaries)
        before = [index for index in steps if index < near][-1:]
        after = [index for index in steps if index > near][:1]
        return 1 + generator.choice([*before, near, *after])
    kinds = sorted(set(points))
    kind = kinds[seed % len(kinds)]
    return 1 + generator.choice([index for index, name in enumerate(points) if name == kind])


def test_points_cover_checkpoints_steps_phase_boundaries_and_the_cache(unbroken):
    kinds = set(unbroken[1])
    assert kinds >= {"step", "step-saved", "epoch", "cache.begin", "cache.before-rename", *BOUNDARIES}
    assert len([kind for kind in kinds if kind.startswith("checkpoint.")]) >= 7


@pytest.mark.parametrize("seed", range(KILLS))
def test_run_killed_at_any_point_and_resumed_ends_bit_identical(unbroken, tmp_path, seed):
    expected, points = unbroken
    path = tmp_path / "r"
    run_and_kill(engine(path, num_workers=2 if seed % 6 == 0 else 0).run, choose_point(points, seed))
    generator = random.Random(seed)
    for _ in range(generator.randint(0, 2)):
        if not done(path):
            run_and_kill(engine(path, resume=True).run, generator.randint(1, len(points) // 2))
    if not done(path):
        engine(path, resume=True).run()
    assert read_files(path) == expected


def test_cached_features_lost_before_the_resume_are_recomputed_bit_identical(unbroken, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEFORGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "r"
    run_and_kill(engine(path).run, 1 + [index for index, name in enumerate(unbroken[1]) if name == "epoch"][2])
    monkeypatch.setenv("TUNEFORGE_CACHE", str(tmp_path / "another"))
    engine(path, resume=True).run()
    assert read_files(path) == unbroken[0]


def forget(patch, name):
    """Make `ResumeState.restore` or the phase forget one thing."""
    restore, modes = resume.ResumeState.restore, train_phase.compute_modes

    def restore_without(self, state):
        if name == "sampler position":
            state["phase"]["batch"] = max(0, state["phase"]["batch"] - 2)
        if name == "EMA":
            for component_state in state["components"].values():
                if "average" in component_state:
                    component_state["average"] = {key: tensor * 0 for key, tensor in component_state["average"].items()}
        restore(self, state)
        if name == "log of steps":
            self.completed_steps.pop()
        if name == "random state":
            patch.setattr(run_module.Run, "reseed", lambda self, batch=0: None)
        if name == "accumulation":
            self.run.config = attrs.evolve(self.run.config, grad_accum_steps=1)

    patch.setattr(resume.ResumeState, "restore", restore_without)
    if name == "requires_grad":
        patch.setattr(train_phase, "freeze", lambda model, trainable: None)
    if name == "BatchNorm mode":
        patch.setattr(
            train_phase,
            "compute_modes",
            lambda *a, **k: [(m, on or isinstance(m, nn.BatchNorm1d)) for m, on in modes(*a, **k)],
        )
    if name == "schedule":
        patch.setattr(PhaseComponents, "build_schedule", lambda self, phase: _Constant())


class _Constant:
    def factor(self, progress):
        return 1.0


FORGOTTEN = (
    "random state", "sampler position", "requires_grad", "BatchNorm mode", "schedule", "EMA", "log of steps",
    "accumulation",
)  # fmt: skip


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_incomplete_restore_is_found_by_the_comparison(unbroken, tmp_path, monkeypatch, forgotten):
    """The negative control: a comparison that misses one of these would show nothing."""
    expected, points = unbroken
    path = tmp_path / "r"
    phases = [index for index, name in enumerate(points) if name == "phase-saved"]
    # The second phase freezes most layers, but it has no schedule; the third has one.
    first = phases[2] if forgotten != "schedule" else phases[3]
    steps = [index for index, name in enumerate(points) if name == "step-saved" and index > first]
    run_and_kill(engine(path).run, 1 + steps[4])
    forget(monkeypatch, forgotten)
    try:
        engine(path, resume=True).run()
    except (tf.TuneforgeError, KeyError, ValueError, RuntimeError):
        return
    assert read_files(path) != expected


def test_complete_restore_at_the_same_points_is_bit_identical(unbroken, tmp_path, monkeypatch):
    expected, points = unbroken
    for index in (2, 3):
        monkeypatch.setenv("TUNEFORGE_CACHE", str(tmp_path / f"cache{index}"))
        path = tmp_path / f"r{index}"
        first = [where for where, name in enumerate(points) if name == "phase-saved"][index]
        steps = [where for where, name in enumerate(points) if name == "step-saved" and where > first]
        run_and_kill(engine(path).run, 1 + steps[4])
        engine(path, resume=True).run()
        assert read_files(path) == expected


COMMAND = [
    sys.executable, "-m", "tuneforge", "run", "--data.per-class", "8", "--data.other-share", "0.2",
    "--strategy.head-epochs", "3", "--strategy.epochs", "2", "--checkpoint-s", "0", "--no-page", "--callback", "ema",
    "--augment", "shift", "--cache-copies", "2", "--grad-accum-steps", "2",
]  # fmt: skip
RESUME = [sys.executable, "-m", "tuneforge", "resume", "runs/r"]


def command(arguments, folder, *, kill_after_s=None):
    """Run the command in its own process group, kill it after some time, and return code, seconds and output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TUNEFORGE_CACHE": str(folder / "cache")}
    began = time.monotonic()
    process = forked.Popen(
        arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
    return process.returncode, time.monotonic() - began, out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, seconds, out = command([*COMMAND, "--out", "runs/r"], folder)
    assert code == 0, out
    return folder / "runs" / "r", seconds


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CLOCK_KILLS))
def test_command_killed_at_a_random_time_and_resumed_ends_with_the_same_files(undisturbed, tmp_path, seed):
    expected, seconds = undisturbed
    generator = random.Random(seed)
    path = tmp_path / "runs" / "r"
    command([*COMMAND, "--out", "runs/r"], tmp_path, kill_after_s=generator.uniform(0.3, 1.0) * seconds)
    if generator.random() < 0.3 and (path / "run.json").exists() and not done(path):
        command(RESUME, tmp_path, kill_after_s=generator.uniform(0.3, 1.0) * seconds)
    if not (path / "run.json").exists():  # killed before it had begun: there is nothing to resume
        assert command([*COMMAND, "--out", "runs/r"], tmp_path)[0] == 0
    elif not done(path):
        code, _, out = command(RESUME, tmp_path)
        assert code == 0, out
    for name in ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json"):
        assert (path / name).read_bytes() == (expected / name).read_bytes(), name
