"""A race whose runs several processes share: the same table to the bit, whoever is killed.

`TUNEFORGE_RACES=1` adds Ctrl-C, and a race begun again by another number of processes (about half a minute).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.comparison import worker_pool as crew
from tuneforge.comparison.study_dir import STUDY
from tuneforge.comparison.worker_pool import WorkerPool

FULL = "TUNEFORGE_RACES" in os.environ
FEW = {"data": tf.use("digits", per_class=3, other_share=0.0), "page": False, "checkpoint_s": 0.0}
FLAGS = ["--data.per-class", "3", "--data.other-share", "0", "--no-page", "--checkpoint-s", "0", "--seeds", "1"]
GATES = "own:Gate,own:Gate:lr=0.02"
OWN = """
import os, time
from pathlib import Path
import tuneforge as tf

@tf.component(api=1)
class Gate:
    "Waits in the middle until so many runs have come there, or the file `go` is there."
    lr: float = tf.option(default=0.01, help="Rate.")

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
    "Comes to grief with the second seed."

    @tf.hookimpl
    def finetune_strategy(self, task):
        if task.seed == 1:
            raise ValueError("out of ideas")
        yield tf.Phase("only", train="head", epochs=2, lr=0.01)
"""


@pytest.fixture
def quick_helpers(monkeypatch):
    """Helpers that this process starts are forked; those of a command, as in the tests of signals, begin afresh."""
    names = {name: getattr(subprocess, name) for name in ("PIPE", "DEVNULL")}
    monkeypatch.setattr(crew, "subprocess", SimpleNamespace(Popen=forked.Popen, **names))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder, the current one, with strategies in `own.py`."""
    (tmp_path / "own.py").write_text(OWN)
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
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.05)


def all_here():
    return len(list(Path().glob("here-*"))) == 2


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_two_processes_end_in_the_table_of_one_with_a_halving_and_an_entrant_that_fails(place, quick_helpers):
    strategies = ["head-only:lr=0.01", "own:Broken", "head-only:lr=0.0001", "head-only:lr=0.001"]
    given = {**FEW, "seeds": 2, "budget": "2epochs", "halving": True}
    told, alone_told = [], []
    shared = tf.compare(strategies, **given, out="shared", num_processes=2, log=told.append)
    alone = tf.compare(strategies, **given, out="alone", log=alone_told.append)
    assert Path("shared/results.json").read_bytes() == Path("alone/results.json").read_bytes()
    assert shared.results == alone.results
    assert {each["name"]: each["state"] for each in shared.results["candidates"]}["own:Broken"] == "failed"
    assert "dropped" in {each["state"] for each in shared.results["candidates"]}
    folders = sorted(str(path.relative_to("alone")) for path in Path("alone").glob("*/**/seed-*"))
    assert set(folders) <= {str(path.relative_to("shared")) for path in Path("shared").glob("*/**/seed-*")}
    for name in folders:
        for file in ("metrics.jsonl", "model.safetensors"):
            if (Path("alone") / name / file).exists():
                assert (Path("shared") / name / file).read_bytes() == (Path("alone") / name / file).read_bytes()
    without = [
        {line.split(" epoch(s), ")[0].split(": failed")[0] for line in lines[1:]} for lines in (told, alone_told)
    ]
    assert without[1] <= without[0]
    pids = {read(path)["pid"] for path in Path("shared").glob("*/**/seed-*/status.json")}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert all(map(gone, pids))


def test_what_a_killed_process_was_at_is_gone_on_with_by_the_others(place, quick_helpers, monkeypatch):
    monkeypatch.setenv("GATE", "9")
    told = []

    def kill_one():
        wait_for(all_here)
        os.kill(read("killed/own-Gate/seed-0/status.json")["pid"], signal.SIGKILL)
        wait_for(lambda: any("SIGKILL" in line for line in told))
        Path("go").touch()

    thread = threading.Thread(target=kill_one)
    thread.start()
    killed = tf.compare(GATES, **FEW, seeds=1, out="killed", num_processes=2, log=told.append)
    thread.join()
    whole = tf.compare(GATES, **FEW, seeds=1, out="whole")
    assert killed.results == whole.results
    assert "resumed from" in Path("killed/own-Gate/seed-0/log.txt").read_text()


def test_a_killed_leader_takes_the_others_with_it_and_the_race_goes_on(place, monkeypatch):
    monkeypatch.setenv("GATE", "9")
    command = [sys.executable, "-m", "tuneforge", "compare", "--strategies", GATES, *FLAGS, "--num-processes", "2"]
    leader = forked.Popen([*command, "--out", "killed"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(all_here)
    pids = [read(path)["pid"] for path in Path("killed").glob("*/seed-0/status.json")]
    leader.kill()
    out = leader.communicate(timeout=60)[0]
    wait_for(lambda: all(map(gone, pids)), seconds=10)
    assert len(set(pids)) == 2
    assert "Traceback" not in out
    Path("go").touch()
    assert main(["compare", "--resume", "killed"]) == 0
    assert main(["compare", "--strategies", GATES, *FLAGS, "--out", "whole"]) == 0
    assert Path("killed/results.json").read_bytes() == Path("whole/results.json").read_bytes()


@pytest.mark.skipif(not FULL, reason="part of the full set")
def test_ctrl_c_stops_all_and_the_race_goes_on_with_another_number(place, monkeypatch):
    monkeypatch.setenv("GATE", "9")
    command = [sys.executable, "-m", "tuneforge", "compare", "--strategies", GATES, *FLAGS, "--num-processes", "2"]
    leader = forked.Popen([*command, "--out", "stopped"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(all_here)
    pids = [read(path)["pid"] for path in Path("stopped").glob("*/seed-0/status.json")]
    leader.send_signal(signal.SIGINT)
    time.sleep(1)
    Path("go").touch()
    out, err = leader.communicate(timeout=60)
    assert leader.returncode == 130, out + err
    assert err.strip() == "error: stopped by Ctrl-C"
    assert "go on with: tuneforge compare --resume stopped" in out
    assert all(map(gone, pids))
    assert {read(path)["state"] for path in Path("stopped").glob("**/status.json")} == {"stopped"}
    assert main(["compare", "--resume", "stopped", "--num-processes", "3"]) == 0
    assert main(["compare", "--strategies", GATES, *FLAGS, "--out", "whole"]) == 0
    assert Path("stopped/results.json").read_bytes() == Path("whole/results.json").read_bytes()


def test_the_ranks_of_torchrun_divide_the_runs_and_the_first_one_speaks(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tuneforge", "compare", "--strategies", GATES, *FLAGS, "--out", "shared"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        forked.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipe) for rank in (0, 1)
    ]
    said = [each.communicate(timeout=120)[0] for each in ranks]
    assert [each.returncode for each in ranks] == [0, 0], said
    assert said[1] == ""
    assert "done: shared" in said[0]
    pids = {read(path)["pid"] for path in Path("shared").glob("*/seed-0/status.json")}
    assert pids == {each.pid for each in ranks}
    assert main(["compare", "--strategies", GATES, *FLAGS, "--out", "alone"]) == 0
    assert Path("shared/results.json").read_bytes() == Path("alone/results.json").read_bytes()


def test_a_run_that_is_taken_is_left_to_who_has_it(place):
    code = "import sys; from pathlib import Path; from tuneforge.comparison.worker_pool import WorkerPool\n"
    code += "with WorkerPool(Path('.')) as crew:\n for n in (3, 4):\n  with crew.claim(n) as mine: print(mine)"
    with WorkerPool(Path()) as own, own.claim(3) as mine:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert mine
    assert done.stdout.split() == ["False", "True"]


def test_what_other_processes_cannot_have_is_refused(place):
    with pytest.raises(tf.UsageError, match="not Python objects"):
        tf.compare([[tf.Phase("head", train="head", epochs=1)]], **FEW, num_processes=2, out="r")
    with pytest.raises(tf.UsageError, match="0 processes"):
        tf.compare("full", **FEW, num_processes=0, out="r")
    assert not Path("r", STUDY).exists()


def test_a_race_by_the_clock_says_what_its_seconds_are_worth(place, quick_helpers):
    Path("go").touch()
    said = tf.compare(GATES, **FEW, seeds=1, budget="60s", num_processes=2, out="r").table
    assert "note: 2 runs at a time, each with 1 thread(s): 60s are worth less so" in said
