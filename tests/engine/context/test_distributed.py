"""Several processes train as one would, on the same batches in the same order.

The full set: `TUNEFORGE_RANKS=1 python -m pytest -m "" tests/engine/context/test_distributed.py`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

from tuneforge.exporting import load_tensors

FULL = "TUNEFORGE_RANKS" in os.environ
SCRIPT = Path(__file__).parents[2] / "one_rank.py"


def ranks(size, folder, out, **plan):
    """Run this many ranks beside each other; return their exit codes and outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)]),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo", "TUNEFORGE_CACHE": str(folder / "cache"),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(folder), str(out), json.dumps(plan)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children = [
        forked.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipe)
        for rank in range(size)
    ]
    said = [child.communicate(timeout=120)[0] for child in children]
    return [child.returncode for child in children], "\n".join(said)


def batches(folder):
    """Return the rows of each global batch by optimizer step, ranks in order."""
    seen = {}
    for path in sorted(folder.glob("seen-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            seen.setdefault(line["step"], {})[line["rank"]] = line["rows"]
    return {step: [row for rank in sorted(by_rank) for row in by_rank[rank]] for step, by_rank in sorted(seen.items())}


def weights(folder, phase):
    return load_tensors(folder / f"{phase}.safetensors")[0]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    codes, said = ranks(1, folder, folder / "run")
    assert codes == [0], said
    return folder


def allclose(one, other):
    assert set(one) == set(other)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("size", [2, 3] if FULL else [3])
def test_ranks_train_on_the_batches_of_one_process_to_the_same_weights(one_process, tmp_path, size):
    codes, said = ranks(size, tmp_path, tmp_path / "run")
    assert codes == [0] * size, said
    assert batches(tmp_path) == batches(one_process)
    for phase in ("head", "all"):
        allclose(weights(one_process, phase), weights(tmp_path, phase))
    mine, theirs = (json.loads((each / "run/report.json").read_text())["splits"] for each in (tmp_path, one_process))
    assert mine["test"]["confusion"] == theirs["test"]["confusion"]
    lines = [(each / "run/metrics.jsonl").read_text().splitlines() for each in (tmp_path, one_process)]
    assert len(lines[0]) == len(lines[1]) == 4
    assert "feature cache: on" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize(("first", "second", "stop"), [(2, 3, 2), (3, 1, 11), (1, 2, 13)][: None if FULL else 1])
def test_run_resumes_with_another_world_size(one_process, tmp_path, first, second, stop):
    codes, _ = ranks(first, tmp_path, tmp_path / "run", stop=stop)
    assert set(codes) == {9}
    codes, said = ranks(second, tmp_path, tmp_path / "run", resume=True)
    assert codes == [0] * second, said
    assert batches(tmp_path).keys() == batches(one_process).keys()
    for phase in ("head", "all"):
        allclose(weights(one_process, phase), weights(tmp_path, phase))


def test_non_finite_loss_on_one_rank_skips_the_step_on_all(tmp_path):
    codes, said = ranks(2, tmp_path, tmp_path / "run", spoil=12, on_nan="skip")
    assert codes == [0, 0], said
    assert "the training loss is nan" in (tmp_path / "run/log.txt").read_text()
    assert "skipped step: phase 'all'" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.skipif(not FULL, reason="part of the full set; test_backward.py tests micro-batches")
def test_out_of_memory_on_one_rank_halves_the_micro_batches_of_all(one_process, tmp_path):
    codes, said = ranks(2, tmp_path, tmp_path / "run", full=12)
    assert codes == [0, 0], said
    assert "micro-batch size reduced" in (tmp_path / "run/log.txt").read_text()
    allclose(weights(one_process, "all"), weights(tmp_path, "all"))


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_the_run_resumes(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2",
        "--monitor-interval", "0.1", "--no-python", sys.executable, "-c", RESTARTED, str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TUNEFORGE_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 1
    assert json.loads((runs[0] / "status.json").read_text())["state"] == "done"
    assert "resumed from checkpoint" in (runs[0] / "log.txt").read_text()
    assert (tmp_path / "killed").exists()


RESTARTED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tuneforge.__main__ import main
from tuneforge.engine.storage import fault_injection as faults
flag = Path(sys.argv[1]) / "killed"
count = [0]
def point(name):
    count[0] += name == "step-saved"
    if count[0] == 2 and os.environ["RANK"] == "1" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
faults.point = point
sys.argv = ["tuneforge", "run", "--strategy", "head-only", "--strategy.epochs", "1", "--data.per-class", "12",
            "--checkpoint-s", "0", "--no-page"]
sys.exit(main())
"""
