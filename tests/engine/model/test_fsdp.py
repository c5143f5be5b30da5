"""Training a sharded model equals training in one process, step by step.

The full set, also with three ranks: `TUNEFORGE_RANKS=1 python -m pytest tests/engine/model/test_fsdp.py`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import forked
import one_shard
import pytest
import torch

import tuneforge as tf
from tuneforge.exporting import load_tensors

FULL = "TUNEFORGE_RANKS" in os.environ
SCRIPT = Path(one_shard.__file__)

SAME = {
    "plain": {"callbacks": ["grad-clip", "ema"]},
    "steps": {
        "steps": ["features", "gradients", *(["rates"] if FULL else []), "fit", "blend"], "optimizer": "sgd",
        "spoil": 4, "settings": {"on_nan": "rollback", "micro_batch": 20, "grad_accum_steps": 2},
    },
}  # fmt: skip
"""Plans that finish, and must equal one process."""

MORE = {
    "tied": {"net": "tied"},
    "skip": {"spoil": 6, "settings": {"on_nan": "skip"}},
    "still": {"optimizer": "sgd", "arguments": {"momentum": 0.0}},
    **{
        kind: {"optimizer": "torch", "arguments": {"kind": kind}}
        for kind in ("Adam", "NAdam", "RAdam", "RMSprop", "Adagrad")
    },
}

REFUSED = {
    "l2-sp": ({"strategy": "l2-sp"}, "the loss is computed directly from weights"),
    "lwf": ({"strategy": "lwf"}, "is called with other weights than its own"),
    "adafactor": ({"optimizer": "torch", "arguments": {"kind": "Adafactor"}}, "Adafactor cannot be combined with"),
    "borrowing": ({"net": "borrowing"}, "a layer must be called"),
}  # fmt: skip


def ranks(size, folder, **plans):
    """Run the plans on this many ranks, one after the other; return exit codes and outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)]),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo", "TUNEFORGE_CACHE": str(folder / "cache"),
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(plans)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children = [
        forked.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipe)
        for rank in range(size)
    ]
    said = [child.communicate(timeout=300)[0] for child in children]
    return [child.returncode for child in children], "\n".join(said)


def steps(folder):
    return {path.stem: load_tensors(path)[0] for path in sorted(folder.glob("*.safetensors"))}


def assert_same_steps(one, other):
    one, other = steps(one), steps(other)
    assert list(one) == list(other)
    assert one
    for step, weights in one.items():
        assert set(weights) == set(other[step])
        for name, tensor in weights.items():
            torch.testing.assert_close(other[step][name], tensor, rtol=1e-4, atol=1e-5, msg=f"{name}, step {step}")


def outputs(folder):
    return [json.loads(line)["result"] for line in (folder / "run/steps.jsonl").read_text().splitlines()]


def log(folder):
    return (folder / "run/log.txt").read_text()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name, plan in {**SAME, **(MORE if FULL else {})}.items():
        one_shard.work(folder / name, plan)
    return folder


@pytest.fixture(scope="module", params=[2, 3] if FULL else [2])
def sharded(request, tmp_path_factory):
    """What the ranks wrote. One process begins `taken-over`, and finishes `handed-over`, which they began."""
    folder = tmp_path_factory.mktemp("sharded")
    one_shard.work(folder / "taken-over", {**SAME["plain"], "stop": 5})
    plans = {
        **SAME, **(MORE if FULL else {}), "handed-over": {**SAME["plain"], "stop": 5},
        "taken-over": {**SAME["plain"], "resume": True}, **{name: plan for name, (plan, _) in REFUSED.items()},
    }  # fmt: skip
    codes, said = ranks(request.param, folder, **plans)
    assert codes == [0] * request.param, said
    one_shard.work(folder / "handed-over", {**SAME["plain"], "resume": True})
    return folder, request.param


@pytest.mark.parametrize("name", [*SAME, *(MORE if FULL else ())])
def test_each_sharded_step_equals_that_of_one_process(one_process, sharded, name):
    folder, _ = sharded
    assert_same_steps(one_process / name, folder / name)
    one, other = (load_tensors(each / name / "run/model.safetensors")[0] for each in (one_process, folder))
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-5)
    assert [each.get("never_updated") for each in outputs(one_process / name)] == [
        each.get("never_updated") for each in outputs(folder / name)
    ]


@pytest.mark.parametrize("name", ["handed-over", "taken-over"])
def test_run_resumes_with_or_without_sharding(one_process, sharded, name):
    folder, _ = sharded
    assert_same_steps(one_process / "plain", folder / name)
    assert "resumed from checkpoint" in log(folder / name)
    assert "sharded: " in log(folder / name)
    assert "note: --shard has no effect on one process" in log(folder / name)


def test_gradients_are_averaged_by_default_and_summed_by_the_engine(sharded):
    folder, size = sharded
    for rank in range(size):
        assert json.loads((folder / f"reductions-{rank}.json").read_text()) == [[1.0], [size]]


def test_rank_holds_its_shard_of_weights_and_optimizer_state(sharded):
    folder, size = sharded
    held = [json.loads((folder / f"plain/held-all-{rank}.json").read_text()) for rank in range(size)]
    assert sum(own for own, _ in held) == held[0][1] + size - 1  # a scalar is replicated on every rank
    assert max(own for own, _ in held) < 1.2 * held[0][1] / size


def test_diagnoses_equal_those_of_one_process(one_process, sharded):
    folder, _ = sharded
    for one, other in list(zip(outputs(one_process / "steps"), outputs(folder / "steps"), strict=True))[1:-3]:
        pairs = list(zip(one["values"]["$map"], other["values"]["$map"], strict=True))
        assert pairs
        for (key, value), (other_key, other_value) in pairs:
            assert key == other_key
            assert other_value == pytest.approx(value, rel=1e-3, abs=1e-6)


def test_non_finite_loss_on_one_rank_stops_all_before_backward(sharded):
    folder, _ = sharded
    assert "rolled back to the beginning of the epoch: phase 'all'" in log(folder / "steps")
    assert "the training loss is nan" in log(folder / "steps")


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_combination_is_refused(sharded, name):
    folder, size = sharded
    for rank in range(size):
        assert REFUSED[name][1] in (folder / name / f"error-{rank}.txt").read_text()


def test_sharded_model_cannot_be_compiled():
    with pytest.raises(tf.UsageError, match="--compile cannot be combined with --shard"):
        tf.Engine(shard=True, compile=True)


@pytest.mark.skipif(not FULL, reason="part of the full set")
def test_batchnorm_statistics_equal_those_of_replicated_ranks(tmp_path):
    plans = {"whole": {"net": "normed", "settings": {"shard": False}}, "parts": {"net": "normed"}}
    codes, said = ranks(2, tmp_path, **plans)
    assert codes == [0, 0], said
    assert_same_steps(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(not FULL, reason="part of the full set")
def test_out_of_memory_ends_a_sharded_run_with_advice(tmp_path):
    codes, _ = ranks(2, tmp_path, full={"full": 4})
    assert codes[0] != 0  # the other rank has died
    assert "a sharded run ran out of memory" in (tmp_path / "full/error-1.txt").read_text()
    assert "--micro-batch" in (tmp_path / "full/error-1.txt").read_text()


@pytest.mark.skipif(not FULL, reason="part of the full set")
@pytest.mark.parametrize(("first", "second", "kill"), [(2, 3, 4), (3, 2, 5), (2, 1, 7)])
def test_killed_sharded_run_resumes_with_another_world_size(one_process, tmp_path, first, second, kill):
    codes, _ = ranks(first, tmp_path, killed={**SAME["plain"], "kill": kill})
    assert set(codes) == {9}
    codes, said = ranks(second, tmp_path, killed={**SAME["plain"], "resume": True})
    assert codes == [0] * second, said
    assert_same_steps(one_process / "plain", tmp_path / "killed")
