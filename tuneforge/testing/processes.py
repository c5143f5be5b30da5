"""Row 10: two processes train as one, while phases freeze and thaw.

Each rank is a process of its own, because a process group is global; the strategy travels as a reference and its
options, so its class must be one that can be imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from tuneforge import Engine, Phase
from tuneforge.exporting import load_tensors, save_tensors
from tuneforge.plugin.serialization import from_json, to_json
from tuneforge.testing import fixtures as world
from tuneforge.testing.observers import InvariantChecker, is_bit_equal
from tuneforge.testing.recording import StrategyHarness, SurroundingSteps

WORLD_SIZE = 2
TIMEOUT_S = 120.0


def check_two_ranks(trial: StrategyHarness) -> None:
    """Row 10: DDP and unfreezing fail, or ranks drift apart (Lightning#20340, #17212).

    Two ranks go through the strategy and a thawing before and after it, each with its share of every batch: both end,
    with the same weights to the bit, nothing frozen has moved, and all that was thawed has. Slow: two processes.
    """
    ends = _run_ranks(trial)
    stopped = [f"rank {rank}: {end}" for rank, end in enumerate(ends) if end]
    assert not stopped, f"{trial.label}: on {WORLD_SIZE} ranks the run stops: {'; '.join(stopped)}"
    one, two = (load_tensors(trial.directory / f"rank-{rank}.safetensors")[0] for rank in range(WORLD_SIZE))
    apart = [name for name, each in one.items() if not is_bit_equal(each, two[name])]
    assert not apart, f"{trial.label}: the ranks end with different weights: {', '.join(apart)}"
    for rank in range(WORLD_SIZE):
        seen = json.loads((trial.directory / f"rank-{rank}.json").read_text(encoding="utf-8"))
        assert not seen["violations"], f"{trial.label}: rank {rank}: {'; '.join(seen['faults'][:3])}"
        missing = set(world.ZERO_BIASES) - set(seen["changed"])
        assert not missing, f"{trial.label}: rank {rank}: thawed and has not moved: {', '.join(sorted(missing))}"


def _run_ranks(trial: StrategyHarness) -> list[str]:
    """Run the ranks beside each other; for each the last line of what went wrong, empty where nothing did."""
    script, asked = (
        "import sys; from tuneforge.testing.processes import run_rank; run_rank(*sys.argv[1:])",
        to_json(trial.to_spec()),
    )
    logs = [trial.directory / f"rank-{rank}.txt" for rank in range(WORLD_SIZE)]
    children = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-c", script, str(rank), str(trial.directory), asked]
        with log.open("w") as out:
            children.append(subprocess.Popen(command, stdout=out, stderr=out, env=_environment()))  # noqa: S603 - ours
    ended: list[int | None] = []
    until = time.monotonic() + TIMEOUT_S
    for child in children:
        try:
            ended.append(child.wait(timeout=max(0.1, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            ended.append(None)
    words = {rank: (logs[rank].read_text().strip().splitlines() or ["?"])[-1] for rank in range(WORLD_SIZE)}
    return ["" if code == 0 else "hangs" if code is None else words[rank] for rank, code in enumerate(ended)]


def run_rank(number: str, directory: str, spec_json: str) -> None:
    """What one rank does: train, and leave its weights and what it saw."""
    rank, folder = int(number), Path(directory)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD_SIZE,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
    )  # fmt: skip
    watch = InvariantChecker()
    frame = SurroundingSteps([Phase("kit-head", train="head", epochs=1)], [Phase("kit-all", epochs=1, lr=0.01)])
    result = Engine(
        data=world.make_data(), model=world.make_model(), strategy=from_json(spec_json),
        callbacks=[frame, watch], batch_size=16, cache="off", page=False, out=folder / "run",
    ).run()  # fmt: skip
    weights = {name: each.detach().clone() for name, each in result.model.parameters().items()}
    save_tensors(weights, folder / f"rank-{rank}.safetensors", metadata={})
    seen = {"violations": watch.violations, "changed": sorted(watch.changed_tensors["kit-all"])}
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    torch.distributed.destroy_process_group()


def _environment() -> dict[str, str]:
    """Where the parent found its modules; gloo on the machine's own interface, which needs no name service."""
    loop = "lo0" if sys.platform == "darwin" else "lo"
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    return {"GLOO_SOCKET_IFNAME": loop, **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
