"""Data workers: the order of batches, what workers survive, and that none outlives its run.

The full set:
`TUNEFORGE_SIGNALS=40 TUNEFORGE_WORKER_KILLS=100 python -m pytest -m "" tests/engine/data/test_workers.py`.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

import tuneforge as tf
from tuneforge.engine.data.loader import iter_batches, iter_sequential
from tuneforge.engine.data.workers import Workers
from tuneforge.engine.storage import fault_injection as faults

EPOCHS = 16
SIGNALS = int(os.environ.get("TUNEFORGE_SIGNALS", "4"))
WORKER_KILLS = int(os.environ.get("TUNEFORGE_WORKER_KILLS", "2"))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Numbers:
    """Each sample is its row number and the id of the process that fetches it."""

    def __init__(self, size=100):
        self.size = size

    def __len__(self):
        return self.size

    def fetch(self, rows):
        return torch.stack([rows, torch.full_like(rows, os.getpid())], dim=1)


class Broken(Numbers):
    """Raises an error when row 7 is fetched."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def fetch(self, rows):
        if 7 in rows:
            raise self.error
        return super().fetch(rows)


class Deadly(Numbers):
    """Kills the process that fetches row 7, as the system does when memory runs out."""

    def fetch(self, rows):
        if 7 in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fetch(rows)


@pytest.fixture
def workers():
    """Create workers that are closed after the test."""
    made = []

    def make(count, *sources):
        made.append(Workers(count, sources))
        return made[-1]

    yield make
    for each in made:
        each.close()


def fetch_rows(workers, source, *, size=4, rows=100):
    """Return the rows in the order in which they arrive, and the processes that fetched them."""
    given = list(workers.fetch_batches(source, iter_sequential(rows, size)))
    assert all(torch.equal(chosen, stored[:, 0]) for chosen, stored in given)
    return torch.cat([chosen for chosen, _ in given]).tolist(), {int(stored[0, 1]) for _, stored in given}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batches_arrive_in_the_requested_order(workers, count):
    source = Numbers()
    rows, processes = fetch_rows(workers(count, source), source)
    assert rows == list(range(100))
    assert len(processes) == count
    assert os.getpid() not in processes


def test_same_workers_serve_every_pass_and_every_source(workers):
    one, other = Numbers(), Numbers(30)
    kept = workers(2, one, other)
    first = fetch_rows(kept, one)[1]
    assert fetch_rows(kept, other, rows=30) == (list(range(30)), first)
    assert fetch_rows(kept, one)[1] == first


def test_pass_can_be_abandoned_and_passes_can_overlap(workers):
    source = Numbers()
    kept = workers(2, source)
    outer = kept.fetch_batches(source, iter_sequential(100, 4))
    begun = [next(outer)[0] for _ in range(3)]
    for chosen, _ in kept.fetch_batches(source, iter_sequential(100, 4)):
        if 20 in chosen:
            break
    assert fetch_rows(kept, source)[0] == list(range(100))
    rest = [chosen for chosen, _ in outer]
    assert torch.cat(begun + rest).tolist() == list(range(100))


def test_unknown_source_is_fetched_in_the_main_process(workers):
    known, other = Numbers(), Numbers()
    split = tf.Split(other, torch.zeros(100))
    given = list(iter_batches(split, iter_sequential(100, 50), lambda rows, stored: stored, workers=workers(2, known)))
    assert {int(stored[0, 1]) for stored in given} == {os.getpid()}


def test_data_error_is_raised_as_without_workers(workers):
    source = Broken(tf.DataError("no image", where="row 7", why="it is broken", fix="repair it"))
    with pytest.raises(tf.DataError) as caught:
        fetch_rows(workers(2, source), source)
    assert caught.value.format_lines() == source.error.format_lines()


def test_error_of_a_plugin_keeps_its_traceback(workers):
    source = Broken(ZeroDivisionError("by nothing"))
    with pytest.raises(tf.PluginError, match=r"(?s)ZeroDivisionError: by nothing.*in fetch"):
        fetch_rows(workers(2, source), source)


def test_batch_that_kills_every_worker_ends_the_run_and_all_workers(workers):
    source = Deadly()
    kept = workers(2, source)
    with pytest.raises(tf.TryAgainError, match="3 workers have died.*SIGKILL") as caught:
        fetch_rows(kept, source)
    assert caught.value.exit_code == 75
    assert num_child_processes() == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_workers_are_replaced_and_the_order_stays(count):
    source, messages, order = Numbers(), [], []
    kept = Workers(count, [source], messages.append)
    for number, (rows, stored) in enumerate(kept.fetch_batches(source, iter_sequential(100, 4))):
        assert torch.equal(rows, stored[:, 0])
        order += rows.tolist()
        for process in multiprocessing.active_children()[: number % (count + 1)]:
            os.kill(process.pid, signal.SIGKILL)
    kept.close()
    assert order == list(range(100))
    assert len(messages) > 10
    assert {line.partition("; ")[0] for line in messages} == {"  warning: a data worker died (SIGKILL)"}


def num_child_processes():
    return len(multiprocessing.active_children())


def test_workers_end_when_their_owner_is_collected():
    source = Numbers()
    kept = Workers(2, [source])
    fetch_rows(kept, source)
    assert num_child_processes() == 2
    del kept
    assert num_child_processes() == 0


HOLDER = """
import os, torch
from tuneforge.engine.data.workers import Workers

class Who:
    def fetch(self, rows):
        return os.getpid()

source = Who()
kept = Workers(2, [source])
print(*{pid for _, pid in kept.fetch_batches(source, iter(torch.arange(8).split(1)))}, flush=True)
"""


def is_alive(pid):
    """Return True if a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(pids, within_s=5.0):
    ends = time.monotonic() + within_s
    while any(map(is_alive, pids)) and time.monotonic() < ends:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


@LINUX
@pytest.mark.parametrize(("last", "code"), [("os.kill(os.getpid(), 9)", -9), ("os._exit(3)", 3), ("", 0), ("1 / 0", 1)])
def test_no_worker_outlives_its_run(last, code):
    command = [sys.executable, "-W", "error", "-c", HOLDER + last]
    done = forked.run(command, capture_output=True, text=True, timeout=60, check=False)
    pids = [int(each) for each in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    assert wait_until_dead(pids)
    assert done.returncode == code


@LINUX
def test_workers_ignore_signals_that_stop_a_run(workers):
    source = Numbers()
    kept = workers(2, source)
    pids = fetch_rows(kept, source)[1]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert fetch_rows(kept, source)[1] == pids


SMALL_NET = """
import torch
import tuneforge as tf

@tf.component(api=1)
class SmallNet:
    @tf.hookimpl
    def model_adapt(self, run, model):
        layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten()]
        return tf.Model.from_module(torch.nn.Sequential(*layers, torch.nn.Dropout(), torch.nn.Linear(72, 2)), head="5")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory of small images, and a small model beside it."""
    root = tmp_path_factory.mktemp("signals")
    (root / "small_net.py").write_text(SMALL_NET)
    chance = np.random.default_rng(0)
    for number in range(160):
        split = "val" if number >= 136 else "test" if number >= 112 else "train"
        path = root / "photos" / split / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 128 + 100 * (number % 2), (8, 8, 3), dtype=np.uint8)).save(path)
    return root


def command(place, *words):
    """Start the real command as the leader of a process group."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    return forked.Popen(
        [sys.executable, "-m", "tuneforge", *map(str, words)],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_words(out, workers):
    return [
        "run", "--data", "image-folder", "--data.path", "photos", "--data.size", "8", "--data.memory-mb", "0",
        "--model", "small_net:SmallNet", "--strategy", "full", "--strategy.epochs", EPOCHS, "--strategy.lr", "0.01",
        "--augment", "shift", "--batch-size", "8", "--num-workers", workers, "--out", out, "--no-page",
    ]  # fmt: skip


def results(path):
    return {name: (path / name).read_bytes() for name in ("model.safetensors", "metrics.jsonl", "report.json")}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_run_is_bit_identical_in_memory_from_disk_and_with_workers(place, tmp_path, monkeypatch, suffix):
    photos = tmp_path / "photos"
    for path in (place / "photos").glob("*/*/*.png"):
        copy = photos / path.parent.name / f"{path.stem}.{suffix}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((64, 48)).save(copy)
    monkeypatch.syspath_prepend(str(place))
    plan = [tf.Phase("head", train="head", epochs=2, lr=0.01), tf.Phase("all", epochs=1, lr=0.01)]
    ways = {"held": {"memory_mb": None}, "streamed": {"memory_mb": 0}, "two": {"memory_mb": 0}}
    left = {}
    for name, options in ways.items():
        data = tf.use("image-folder", path=str(photos), size=8, **options)
        settings = {"augment": ["shift"], "batch_size": 8, "num_workers": 2 * (name == "two"), "page": False}
        tf.Engine(data=data, model="small_net:SmallNet", strategy=plan, out=tmp_path / name, **settings).run()
        left[name] = results(tmp_path / name)
    assert left["held"] == left["streamed"] == left["two"]
    assert num_child_processes() == 0


def run_with_killed_workers(place, out, at, num_killed):
    """Run while workers are killed at the `at`-th fault injection point; return the results and the points passed."""
    passed, killed = [], []

    def hook(name):
        passed.append(name)
        if len(passed) == at:
            for process in multiprocessing.active_children()[:num_killed]:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    data = tf.use("image-folder", path=str(place / "photos"), size=8, memory_mb=0)
    plan = [tf.Phase("head", train="head", epochs=1, lr=0.01), tf.Phase("all", epochs=1, lr=0.01)]
    settings = {"augment": ["shift"], "batch_size": 8, "num_workers": 2, "page": False, "out": out, "cache": "off"}
    faults.hook = hook
    try:
        tf.Engine(data=data, model="small_net:SmallNet", strategy=plan, **settings).run()
    finally:
        faults.hook = None
    return results(out), passed, killed, (out / "log.txt").read_text().count("a new one replaces it")


def test_run_whose_workers_are_killed_is_bit_identical(place, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    expected, passed, _, logged = run_with_killed_workers(place, tmp_path / "whole", 0, 0)
    assert logged == 0
    replaced = 0
    for number in range(WORKER_KILLS):
        at = 1 + number * (len(passed) - 1) // WORKER_KILLS
        found, _, killed, logged = run_with_killed_workers(place, tmp_path / str(number), at, 1 + number % 2)
        assert found == expected, passed[at - 1]
        assert logged <= len(killed)
        replaced += logged
    assert replaced >= WORKER_KILLS // 2
    assert num_child_processes() == 0


def wait_for(path, process, *, lines):
    """Wait until a file of the run has this many lines."""
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)


def processes_of_group(group):
    """Return the running processes of a process group."""
    stats = [(path, path / "stat") for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = []
    for path, stat in stats:
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.name))
    return found


def uninterrupted_run(place):
    """Return the results of a run that nothing interrupts."""
    process = command(place, *run_words("whole", 0))
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    return results(place / "whole")


def run_stopped_and_resumed(place, point):
    """Return the results of a run that was stopped by a signal to its process group, and resumed."""
    chance = random.Random(point)
    workers, number = (0, 2)[point % 2], (signal.SIGTERM, signal.SIGINT)[point // 2 % 2]
    out = place / f"stopped {point}"
    process = command(place, *run_words(out, workers))
    wait_for(out / "log.txt", process, lines=1)  # from there on it listens to signals
    wait_for(out / "metrics.jsonl", process, lines=chance.randint(0, EPOCHS // 2))
    time.sleep(chance.uniform(0, 0.1))
    os.killpg(process.pid, number)
    text = process.communicate(timeout=120)[0]
    assert wait_until_dead(processes_of_group(process.pid))
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], text
    assert (out / "checkpoints").exists()
    again = command(place, "resume", out)
    text = again.communicate(timeout=120)[0]
    assert again.returncode == 0, text
    return results(out)


@LINUX
@pytest.mark.slow
def test_run_stopped_by_a_signal_to_its_process_group_resumes_bit_identical(place):
    with ThreadPoolExecutor(2) as pool:
        expected = pool.submit(uninterrupted_run, place)
        ends = list(pool.map(run_stopped_and_resumed, [place] * SIGNALS, range(SIGNALS)))
    assert [point for point, end in enumerate(ends) if end != expected.result()] == []
