"""Simulate a kill at any fault-injection point of a run; and a strategy that yields every kind of step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tuneforge as tf
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.plugin import StrategySteps

COMPARED = ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json", "model.json", "hardest_samples.json")
"""Files that must be byte-identical in an unbroken run and in one that was killed and resumed."""


class SimulatedKillError(BaseException):
    """Simulates SIGKILL: nothing catches it."""


class NoisyLoss:
    """A callback that changes the loss by each sample's random numbers and by a count in its state."""

    @tf.hookimpl(wrapper=True)
    def train_step(self, run: tf.Run, batch: tf.Batch) -> Any:
        state = run.state(self)
        state["steps"] = state.get("steps", 0) + 1
        result = yield
        return result[0] * (1 + 0.1 * float(batch.rng.uniform("noise").mean()) + 1e-3 * state["steps"]), result[1]


def every_step_kind(task: tf.TaskInfo, *, epochs: tuple[int, int] = (2, 2)) -> StrategySteps:
    """Yield every kind of step, one of which depends on a result; `epochs` are those of the first two phases."""
    result = yield tf.Phase("head", train="head", epochs=epochs[0], lr=0.02, schedule="cosine")
    yield tf.HeadFit("fit", l2=0.1)
    yield tf.Diagnosis("look", batches=1)
    lr = 0.01 if result.val["accuracy"] > 0.1 else 0.02
    momentum = tf.use("sgd", momentum=0.9)
    yield tf.Phase("top", train="groups[-2:]", epochs=epochs[1], lr=lr, optimizer=momentum, restore_best=True)
    yield tf.Phase(
        "all", epochs=2, lr=0.005, optimizer="adamw", schedule="one-cycle", patience=1, class_weights="balanced"
    )
    yield tf.WeightAverage("mix", snapshots=["start", "all"], weights=[0.5, 1.0])


def run_and_kill(action: Callable[[], object], number: int, *, only: str = "") -> list[str]:
    """Run `action`, kill it at its `number`-th point (of the name `only`, if given), and return the points passed."""
    passed: list[str] = []

    def hook(name: str) -> None:
        if only in ("", name):
            passed.append(name)
            if len(passed) == number:
                raise SimulatedKillError(name)

    faults.hook = hook
    try:
        action()
    except SimulatedKillError:
        pass
    finally:
        faults.hook = None
    return passed


def read_files(path: Path, names: tuple[str, ...] = COMPARED) -> dict[str, bytes]:
    """Return the bytes of files of a run."""
    return {name: (path / name).read_bytes() for name in names}
