"""A run that was stopped or killed and resumed writes the same files as an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from small_models import COMPARED_FILES, Stopper, run_until_stopped, save_model

import tuneforge as tf


def read_files(folder):
    return {name: (folder / name).read_bytes() for name in COMPARED_FILES}


def make_settings(folder, table, adapt):
    return {
        "data": tf.use("text", path=str(table)),
        "model": tf.use("transformers", pretrained=str(folder)),
        "adapt": adapt,
        "strategy": tf.use("freeze-then-unfreeze", epochs=2),
        "batch_size": 8,
        "cache": "memory",
        "page": False,
        "checkpoint_s": 1e9,
    }


@pytest.mark.parametrize(("adapt", "step"), [(["lora"], 2), ([], 5), (["lora"], 11)], ids=["lora", "plain", "lora-all"])
def test_stopped_and_resumed_run_writes_the_same_files(tmp_path, table, adapt, step):
    """An epoch has 5 steps: stop within the frozen phase, at its end, and in a later epoch of the second phase."""
    source = save_model(tmp_path / "source", "bert")
    given = make_settings(source, table, adapt)
    tf.Engine(**given, out=tmp_path / "whole", callbacks=[Stopper(step=step)]).run()
    run_until_stopped(tmp_path / "cut", step, **given)
    tf.Engine.resume(tmp_path / "cut").run()
    assert read_files(tmp_path / "cut") == read_files(tmp_path / "whole")


KILL = """
import os, signal
import tuneforge as tf

@tf.component(api=1)
class Kill:
    '''Kills the process at its eighth step.'''

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run):
        result = yield
        if run.step + 1 == 8 and os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
"""


def test_killed_run_is_resumed_without_the_model_folder(tmp_path, table):
    """`tuneforge run` is killed with SIGKILL, then `tuneforge resume` finishes it."""
    source = save_model(tmp_path / "source", "bert")
    (tmp_path / "kill.py").write_text(KILL)

    def command(*arguments, kill=False):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"KILL": "1"} if kill else {})}
        line = [sys.executable, "-m", "tuneforge", *map(str, arguments)]
        return subprocess.run(line, env=environment, cwd=tmp_path, check=False, capture_output=True, text=True)

    run = [
        "run", "--data", "text", "--data.path", table, "--model", "transformers", "--model.pretrained", source,
        "--adapt", "lora", "--epochs", "2", "--batch-size", "8", "--cache", "memory", "--no-page",
        "--checkpoint-steps", "3", "--callback", "kill:Kill", "--out",
    ]  # fmt: skip
    whole = command(*run, "whole")
    assert whole.returncode == 0, whole.stderr
    assert command(*run, "cut", kill=True).returncode == -signal.SIGKILL
    for each in source.iterdir():
        each.unlink()
    resumed = command("resume", "cut")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "cut" / "status.json").read_text())["state"] == "done"
    assert read_files(tmp_path / "cut") == read_files(tmp_path / "whole")
