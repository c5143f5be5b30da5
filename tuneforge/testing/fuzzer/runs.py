"""Runs of a random program: from its beginning or from a checkpoint, with the results that are compared."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuneforge import Batch, Engine, Result, Run, hookimpl, use
from tuneforge.engine.feature_cache import build
from tuneforge.engine.feature_cache.graph_split import UntraceableError
from tuneforge.engine.model import module_graph
from tuneforge.errors import HaltError, TuneforgeError
from tuneforge.testing.fuzzer.network import FuzzNetwork
from tuneforge.testing.fuzzer.program import FuzzProgram
from tuneforge.testing.recording import set_fault_hook

_BATCH_WEIGHTS = torch.tensor([3.0, 1.0, 0.5])
_KILL_POINTS = ("step", "step-saved", "epoch", "phase-trained", "phase-logged", "phase-saved")
_PLAIN = (bool, int, float, str, type(None))


@attrs.frozen
class RunError:
    """How a run failed.

    Args:
        reason: The class of the exception and the first line of its message.
        is_refusal: True for a `TuneforgeError` that is not about an exception of torch inside a component.
        is_halt: True for a `HaltError`.
    """

    reason: str
    is_refusal: bool
    is_halt: bool

    @classmethod
    def from_exception(cls, error: BaseException) -> RunError:
        """Return what is compared of an exception."""
        text = str(error).partition("\n")[0]
        is_refusal = isinstance(error, TuneforgeError) and " failed in " not in text
        return cls(f"{type(error).__name__}: {text:.300}", is_refusal, isinstance(error, HaltError))


@attrs.frozen(eq=False)
class RunResults:
    """What a run ends with.

    Args:
        error: How it failed, or None.
        tensors: Parameters and buffers, and tensors in plain attributes, by name.
        attributes: Other plain attributes of every module by name; for an object of a class, the name of the class.
        history: One entry per epoch, without the seconds.
        log: The lines for the user.
        weights_changed: True if a parameter differs from that at the beginning.
        points: The fault-injection points that the run passed.
    """

    error: RunError | None
    tensors: Mapping[str, Tensor]
    attributes: Mapping[str, Any]
    history: tuple[Any, ...]
    log: tuple[str, ...]
    weights_changed: bool
    points: tuple[str, ...]

    @property
    def num_cached_phases(self) -> int:
        """Phases that trained on cached features."""
        return sum("feature cache: on" in line for line in self.log)

    @property
    def has_failed(self) -> bool:
        """True if the run ended with an error that is no refusal."""
        return self.error is not None and (self.error.is_halt or not self.error.is_refusal)

    def state(self) -> dict[str, Tensor]:
        """Return parameters and buffers by name."""
        return {name: each for name, each in self.tensors.items() if not name.startswith("attribute ")}


class TemperatureSchedule:
    """A callback that changes a plain attribute of the network: at random before a phase, lower after each epoch.

    Args:
        draws: False not to change it before a phase, because each of several ranks would draw its own.
    """

    def __init__(self, *, draws: bool) -> None:
        self._draws = draws

    @hookimpl
    def phase_started(self, run: Run) -> None:
        """Draw the temperature of the first epoch."""
        module: Any = run.model.module
        if "temperature" in module.traits and self._draws:
            module.temperature = 1 + 0.3 * float(torch.rand(()))

    @hookimpl
    def epoch_ended(self, run: Run) -> None:
        """Set the temperature of the next epoch."""
        module: Any = run.model.module
        if "temperature" in module.traits:
            module.temperature = 1 / (1 + 0.3 * run.epoch)


class BatchWeightLoss:
    """Cross-entropy with class weights that are scaled in each batch, so that it is no mean over samples."""

    @hookimpl
    def train_step(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return loss and outputs."""
        outputs = run.forward(batch.inputs)
        return F.cross_entropy(outputs, batch.targets, weight=_BATCH_WEIGHTS.to(outputs.dtype)), outputs


class TwoPassLoss:
    """Cross-entropy over the mean of two forward passes (as in R-Drop)."""

    @hookimpl
    def train_step(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return loss and outputs."""
        outputs = (run.forward(batch.inputs) + run.forward(batch.inputs)) / 2
        return F.cross_entropy(outputs, batch.targets), outputs


class SideLoss:
    """The default loss plus the penalty that forward left on the network."""

    @hookimpl
    def train_step(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return loss and outputs."""
        outputs = run.forward(batch.inputs)
        module: Any = run.model.module
        regression = batch.targets.is_floating_point()
        loss = F.mse_loss(outputs, batch.targets) if regression else F.cross_entropy(outputs, batch.targets)
        return loss + 2.0 * module.penalty, outputs


_LOSSES: Mapping[str, Callable[[], Any]] = {
    "default": lambda: None,
    "label-smoothing": lambda: use("cross-entropy", label_smoothing=0.1),
    "class-weights": lambda: use("cross-entropy", class_weights={"a": 3.0}),
    "batch-weights": BatchWeightLoss,
    "two-passes": TwoPassLoss,
    "side-loss": SideLoss,
}


class ProgramRuns:
    """Runs of one program, below one directory.

    Args:
        program: The program.
        directory: An empty directory; also holds the feature cache on disk.
        draws: False if callbacks must not draw random numbers, because other ranks would draw others.
    """

    def __init__(self, program: FuzzProgram, directory: Path, *, draws: bool = True) -> None:
        self.program, self.directory, self._draws = program, directory, draws

    def run(
        self,
        name: str,
        *,
        callbacks: Sequence[Any] = (),
        at_point: Callable[[str], None] = lambda point: None,
        **settings: Any,
    ) -> RunResults:
        """Run the program from its beginning.

        Args:
            name: The name of the run directory.
            callbacks: Further callbacks.
            at_point: Called with the name of each fault-injection point.
            settings: Settings that differ from those of the program; None is the default.
        """
        module, log = self.program.build_network(), list[str]()
        _seed_random_state(self.program.seed)
        own: dict[str, Any] = {
            "out": self.directory / name,
            "cache_dir": self.directory / "cache",
            "seed": self.program.seed,
        }
        fixed: dict[str, Any] = {"device": "cpu", "page": False, "checkpoint_s": 1e9, "log": log.append}
        chosen = {key: value for key, value in {**self.program.settings, **settings}.items() if value is not None}
        return self._execute(
            lambda: Engine(**self._objects(module, callbacks), **own, **fixed, **chosen), module, log, at_point
        )

    def resume(self, name: str) -> RunResults:
        """Continue a run in a directory, with everything built anew and other global random states."""
        module, log = self.program.build_network(), list[str]()
        _seed_random_state(12345)  # a new process has other states
        return self._execute(
            lambda: Engine.resume(self.directory / name, log=log.append, **self._objects(module)), module, log
        )

    def _objects(self, module: nn.Module, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
        program = self.program
        loss = _LOSSES[program.loss]()
        return {
            "model": module,
            "data": program.build_data(),
            "strategy": list(program.strategy) if isinstance(program.strategy, tuple) else program.strategy,
            "callbacks": [*map(use, program.callbacks), TemperatureSchedule(draws=self._draws), *callbacks],
            **({"loss": loss} if loss is not None else {}),
        }

    def _execute(
        self,
        build_engine: Callable[[], Engine],
        module: FuzzNetwork,
        log: list[str],
        at_point: Callable[[str], None] = lambda point: None,
    ) -> RunResults:
        before = {
            name: each.detach().clone()
            for name, each in module.named_parameters()
            if not ("max-norm" in module.traits and name == "stem.lookup.weight")  # each forward pass may rescale it
        }
        points: list[str] = []
        result: Result | None = None
        error: RunError | None = None

        def pass_point(point: str) -> None:
            points.append(point)
            at_point(point)

        try:
            with set_fault_hook(pass_point), cache_that_always_pays(with_export=self.program.seed % 8 == 0):
                result = build_engine().run()
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is compared
            error = RunError.from_exception(raised)
        tensors, attributes = _read_module(module)
        return RunResults(
            error,
            tensors,
            attributes,
            () if result is None else _read_history(result.run_dir),
            tuple(log),
            any(not torch.equal(each, dict(module.named_parameters())[name]) for name, each in before.items()),
            tuple(points),
        )


class PointTrigger:
    """Calls a function at one of the points at which a run may be killed.

    Args:
        position: Which of them, as a fraction of the run in [0, 1).
        points: The points that the undisturbed run passed.
        act: What to call.
    """

    def __init__(self, position: float, points: Sequence[str], act: Callable[[], Any]) -> None:
        self._remaining = int(position * sum(point in _KILL_POINTS for point in points))
        self._act = act

    def __call__(self, point: str) -> None:
        """Count a point that the run passes."""
        if point in _KILL_POINTS:
            if self._remaining == 0:
                self._act()
            self._remaining -= 1


@contextlib.contextmanager
def cache_that_always_pays(*, with_export: bool = True) -> Iterator[None]:
    """Let every phase that can be cached be cached, although the computations of a tiny network cost next to nothing.

    Args:
        with_export: False to try `torch.fx` alone, also for the graph of a model that a run keeps, because
            `torch.export` takes ten times as long.
    """

    def accept(*args: Any, **kwargs: Any) -> None: ...

    def fail(*args: Any, **kwargs: Any) -> None:
        raise UntraceableError("torch.export is not tried")

    with contextlib.ExitStack() as stack:
        for name in ("_check_worthwhile", "_check_tracing_pays"):
            stack.enter_context(replace_attribute(build, name, lambda before: accept))
        stack.enter_context(replace_attribute(build, "MIN_MACS_PER_BYTE_ON_DISK", lambda before: 0.0))
        if not with_export:
            stack.enter_context(replace_attribute(build, "trace_with_export", lambda before: fail))
            stack.enter_context(replace_attribute(module_graph, "_trace_with_export", lambda before: fail))
        yield


@contextlib.contextmanager
def replace_attribute(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of a module or a class by what `make` returns for it."""
    before = vars(owner)[name]
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def _read_module(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return copies of all tensors of a module, and its other plain attributes."""
    tensors = {name: each.detach().clone() for name, each in module.named_parameters()}
    tensors |= {name: each.detach().clone() for name, each in module.named_buffers()}
    attributes: dict[str, Any] = {}
    for path, child in module.named_modules():
        for key, value in vars(child).items():
            name = f"{path}.{key}"
            if key.startswith("_") or key == "training":
                continue
            if type(value) is Tensor:
                tensors[f"attribute {name}"] = value.detach().clone()
            else:
                attributes[name] = value if isinstance(value, _PLAIN) else type(value).__name__
    return tensors, attributes


def _read_history(run_dir: Path) -> tuple[Any, ...]:
    metrics = run_dir / "metrics.jsonl"  # missing where no epoch was trained
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    return (*map(json.loads, lines), report)


def _seed_random_state(seed: int) -> None:
    """Seed the global generators, from which a network or a callback may draw."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
