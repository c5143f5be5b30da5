"""A comparison in several processes has the results of one process, and survives a kill of any of them.

`TUNEFORGE_COMPARISONS=1` adds Ctrl-C, and resuming with another number of processes (about half a minute).
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import reduction
from pathlib import Path

import forked
import pytest

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.comparison.study_dir import STUDY

RUN_ALL = "TUNEFORGE_COMPARISONS" in os.environ
SMALL = {"data": tf.use("digits", per_class=3, other_share=0.0), "page": False, "checkpoint_s": 0.0}
FLAGS = ["--data.per-class", "3", "--data.other-share", "0", "--no-page", "--checkpoint-s", "0", "--seeds", "1"]
GATES = "own:Gate,own:Gate:lr=0.02"
STRATEGIES = """
import os, time
from pathlib import Path
import tuneforge as tf

@tf.component(api=1)
class Gate:
    "Waits between two phases until GATE runs have come there, or the file `go` exists."
    lr: float = tf.option(default=0.01, help="Learning rate.")

    @tf.hookimpl
    def finetune_strategy(self, task):
        yield tf.Phase("first", train="head", epochs=1, lr=self.lr)
        Path(f"here-{self.lr}").touch()
        until = time.monotonic() + 60
        while len(list(Path().glob("here-*"))) < int(os.environ["GATE"]) and not Path("go").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        yield tf.Phase("second", train="head", epochs=1, lr=self.lr)

@tf.component(api=1)
class Broken:
    "Raises with the second seed."

    @tf.hookimpl
    def finetune_strategy(self, task):
        if task.seed == 1:
            raise ValueError("out of ideas")
        yield tf.Phase("only", train="head", epochs=2, lr=0.01)
"""


@pytest.fixture
def working_dir(tmp_path, monkeypatch):
    """An empty working directory with strategies in `own.py`."""
    (tmp_path / "own.py").write_text(STRATEGIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("GATE", "2")
    yield tmp_path
    sys.modules.pop("own", None)


def read(path):
    return json.loads(Path(path).read_text())


def wait_for(condition, seconds=90):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition is not met in time"
        time.sleep(0.05)


def both_at_gate():
    return len(list(Path().glob("here-*"))) == 2


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_two_processes_have_the_results_of_one_with_successive_halving_and_a_failing_candidate(working_dir):
    strategies = ["head-only:lr=0.01", "own:Broken", "head-only:lr=0.0001", "head-only:lr=0.001"]
    options = {**SMALL, "seeds": 2, "budget": "2epochs", "halving": True}
    shared_log, alone_log = [], []
    shared = tf.compare(strategies, **options, out="shared", num_processes=2, log=shared_log.append)
    alone = tf.compare(strategies, **options, out="alone", log=alone_log.append)
    assert Path("shared/results.json").read_bytes() == Path("alone/results.json").read_bytes()
    assert shared.results == alone.results
    assert {each["name"]: each["state"] for each in shared.results["candidates"]}["own:Broken"] == "failed"
    assert "dropped" in {each["state"] for each in shared.results["candidates"]}
    run_dirs = sorted(str(path.relative_to("alone")) for path in Path("alone").glob("*/**/seed-*"))
    assert set(run_dirs) <= {str(path.relative_to("shared")) for path in Path("shared").glob("*/**/seed-*")}
    for name in run_dirs:
        for file in ("metrics.jsonl", "model.safetensors"):
            if (Path("alone") / name / file).exists():
                assert (Path("shared") / name / file).read_bytes() == (Path("alone") / name / file).read_bytes()
    shared_lines, alone_lines = (
        {line.split(" epoch(s), ")[0].split(": failed")[0] for line in lines[1:]} for lines in (shared_log, alone_log)
    )
    assert alone_lines <= shared_lines
    pids = {read(path)["pid"] for path in Path("shared").glob("*/**/seed-*/status.json")}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert all(map(is_gone, pids))


def test_a_killed_worker_is_reported_and_the_same_call_finishes_the_study(working_dir, monkeypatch):
    monkeypatch.setenv("GATE", "9")

    def kill_one():
        wait_for(both_at_gate)
        os.kill(read("killed/own-Gate/seed-0/status.json")["pid"], signal.SIGKILL)
        time.sleep(1)
        Path("go").touch()  # the other worker notices SIGTERM once its strategy yields

    def call():
        return tf.compare(f"head-only:epochs=1,{GATES}", **SMALL, seeds=1, out="killed", num_processes=2)

    thread = threading.Thread(target=kill_one)
    thread.start()
    with pytest.raises(tf.TryAgainError, match=r"was killed.*finished runs are kept"):
        call()
    thread.join()
    assert read("killed/status.json")["state"] == "failed"
    finished = Path("killed/head-only-epochs=1/seed-0/model.safetensors")
    written_at = finished.stat().st_mtime_ns
    repeated = call()
    assert finished.stat().st_mtime_ns == written_at
    whole = tf.compare(f"head-only:epochs=1,{GATES}", **SMALL, seeds=1, out="whole")
    assert repeated.results == whole.results
    assert "resumed from" in Path("killed/own-Gate/seed-0/log.txt").read_text()


def test_workers_end_with_a_killed_parent_and_the_study_can_be_resumed(working_dir, monkeypatch):
    monkeypatch.setenv("GATE", "9")
    command = [sys.executable, "-m", "tuneforge", "compare", "--strategies", GATES, *FLAGS, "--num-processes", "2"]
    parent = forked.Popen([*command, "--out", "killed"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(both_at_gate)
    pids = [read(path)["pid"] for path in Path("killed").glob("*/seed-0/status.json")]
    parent.kill()
    out = parent.communicate(timeout=60)[0]
    wait_for(lambda: all(map(is_gone, pids)), seconds=10)
    assert len(set(pids)) == 2
    assert "Traceback" not in out
    Path("go").touch()
    assert main(["compare", "--resume", "killed"]) == 0
    assert main(["compare", "--strategies", GATES, *FLAGS, "--out", "whole"]) == 0
    assert Path("killed/results.json").read_bytes() == Path("whole/results.json").read_bytes()


@pytest.mark.skipif(not RUN_ALL, reason="part of the full set")
def test_ctrl_c_stops_all_processes_and_the_study_resumes_with_another_number_of_them(working_dir, monkeypatch):
    monkeypatch.setenv("GATE", "9")
    command = [sys.executable, "-m", "tuneforge", "compare", "--strategies", GATES, *FLAGS, "--num-processes", "2"]
    parent = forked.Popen([*command, "--out", "stopped"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(both_at_gate)
    pids = [read(path)["pid"] for path in Path("stopped").glob("*/seed-0/status.json")]
    parent.send_signal(signal.SIGINT)
    time.sleep(1)
    Path("go").touch()
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 130, out + err
    assert err.strip() == "error: stopped by Ctrl-C"
    assert "tuneforge compare --resume stopped" in out
    assert all(map(is_gone, pids))
    assert {read(path)["state"] for path in Path("stopped").glob("**/status.json")} == {"stopped"}
    assert main(["compare", "--resume", "stopped", "--num-processes", "3"]) == 0
    assert main(["compare", "--strategies", GATES, *FLAGS, "--out", "whole"]) == 0
    assert Path("stopped/results.json").read_bytes() == Path("whole/results.json").read_bytes()


def test_torchrun_is_refused_and_its_environment_stays_as_it_is(working_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(tf.UsageError, match="--num-processes N"):
        tf.compare(GATES, **SMALL, seeds=1, out="r")
    assert os.environ["WORLD_SIZE"] == "2"
    assert not Path("r").exists()


def test_python_objects_and_zero_processes_are_refused(working_dir):
    with pytest.raises(tf.UsageError, match="not Python objects"):
        tf.compare([[tf.Phase("head", train="head", epochs=1)]], **SMALL, num_processes=2, out="r")
    with pytest.raises(tf.UsageError, match="0 processes"):
        tf.compare("full", **SMALL, num_processes=0, out="r")
    assert not Path("r", STUDY).exists()


def test_a_budget_in_seconds_comes_with_a_note_on_the_shared_threads(working_dir):
    Path("go").touch()
    table = tf.compare(GATES, **SMALL, seeds=1, budget="60s", num_processes=2, out="r").table
    assert "note: 2 runs at a time, each with 1 thread(s): 60s allow fewer steps" in table


def test_errors_keep_their_parts_when_a_process_sends_them_to_another():
    for error in (tf.StoppedError("stopped", exit_code=130, fix="resume"), tf.FolderError("in use", where="runs/a")):
        copied = reduction.ForkingPickler.loads(reduction.ForkingPickler.dumps(error))
        assert (type(copied), copied.args, vars(copied)) == (type(error), error.args, vars(error))
