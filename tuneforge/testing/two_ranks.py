"""Known issue 10: two ranks train one model, while phases freeze and unfreeze layers.

Each rank is a process of its own, because a process group is global. A rank gets the strategy as a reference and
options, so the strategy's class must be importable.
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
from tuneforge.testing import fixtures
from tuneforge.testing.observers import InvariantChecker, is_bit_equal
from tuneforge.testing.recording import StrategyHarness, SurroundingSteps

WORLD_SIZE = 2
TIMEOUT_S = 120.0


def check_two_ranks(harness: StrategyHarness) -> None:
    """Known issue 10: unfreezing fails under DDP, or weights differ between ranks (Lightning#20340, #17212).

    Two ranks execute the strategy between phases that freeze and unfreeze layers, each with its share of every batch.
    Both must end with bit-identical weights, without a change of frozen tensors and with a change of all unfrozen ones.
    The check is slow, because it starts two processes.
    """
    errors = _run_ranks(harness)
    failed = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
    assert not failed, f"{harness.label}: on {WORLD_SIZE} ranks the run fails: {'; '.join(failed)}"
    one, two = (load_tensors(harness.directory / f"rank-{rank}.safetensors")[0] for rank in range(WORLD_SIZE))
    different = [name for name, each in one.items() if not is_bit_equal(each, two[name])]
    assert not different, f"{harness.label}: the ranks end with different weights: {', '.join(different)}"
    for rank in range(WORLD_SIZE):
        record = json.loads((harness.directory / f"rank-{rank}.json").read_text(encoding="utf-8"))
        violations = record["violations"]
        assert not violations, f"{harness.label}: rank {rank}: {'; '.join(violations[:3])}"
        missing = set(fixtures.ZERO_BIASES) - set(record["changed"])
        assert not missing, (
            f"{harness.label}: rank {rank}: unfrozen tensors did not change: {', '.join(sorted(missing))}"
        )


def _run_ranks(harness: StrategyHarness) -> list[str]:
    """Run all ranks at once, and return the last line of each rank's error; "" for a rank without error."""
    script = "import sys; from tuneforge.testing.two_ranks import run_rank; run_rank(*sys.argv[1:])"
    spec_json = to_json(harness.to_spec())
    logs = [harness.directory / f"rank-{rank}.txt" for rank in range(WORLD_SIZE)]
    children = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-c", script, str(rank), str(harness.directory), spec_json]
        with log.open("w") as out:
            children.append(subprocess.Popen(command, stdout=out, stderr=out, env=_environment()))  # noqa: S603 - our own command
    exit_codes: list[int | None] = []
    deadline = time.monotonic() + TIMEOUT_S
    for child in children:
        try:
            exit_codes.append(child.wait(timeout=max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            exit_codes.append(None)
    last_lines = {rank: (logs[rank].read_text().strip().splitlines() or ["?"])[-1] for rank in range(WORLD_SIZE)}
    return [
        "" if code == 0 else "it hangs" if code is None else last_lines[rank] for rank, code in enumerate(exit_codes)
    ]


def run_rank(number: str, directory: str, spec_json: str) -> None:
    """Train as one rank, and write the weights and what the checker found."""
    rank, path = int(number), Path(directory)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path / 'rendezvous'}", rank=rank, world_size=WORLD_SIZE,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
    )  # fmt: skip
    checker = InvariantChecker()
    steps = SurroundingSteps([Phase("kit-head", train="head", epochs=1)], [Phase("kit-all", epochs=1, lr=0.01)])
    result = Engine(
        data=fixtures.make_data(), model=fixtures.make_model(), strategy=from_json(spec_json),
        callbacks=[steps, checker], batch_size=16, cache="off", page=False, out=path / "run",
    ).run()  # fmt: skip
    weights = {name: each.detach().clone() for name, each in result.model.parameters().items()}
    save_tensors(weights, path / f"rank-{rank}.safetensors", metadata={})
    record = {"violations": checker.violations, "changed": sorted(checker.changed_tensors["kit-all"])}
    (path / f"rank-{rank}.json").write_text(json.dumps(record), encoding="utf-8")
    torch.distributed.destroy_process_group()


def _environment() -> dict[str, str]:
    """Return the environment of a rank: the import path of this process, and gloo on the loopback interface."""
    loop = "lo0" if sys.platform == "darwin" else "lo"
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    return {"GLOO_SOCKET_IFNAME": loop, **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
