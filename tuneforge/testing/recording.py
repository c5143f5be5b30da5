"""Runs of the conformance kit: one strategy on the fixtures, observed, or interrupted and resumed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from tuneforge import Engine, Result, Run, StoppedError, hookimpl
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.plugin import ComponentSpec, StrategyStep
from tuneforge.plugin.declaration import build_component
from tuneforge.testing import fixtures

COMPARED_FILES = ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json", "model.json")
"""Files that are byte-identical in two runs with bit-identical results."""

InterruptionPoint = tuple[str, int]
"""The name of a fault-injection point that a run passes, and the number of optimizer steps done by then."""


class _KilledError(BaseException):
    """Simulates SIGKILL: nothing catches it."""


class SurroundingSteps:
    """A callback that adds steps to a strategy, so that layers are frozen and unfrozen under every strategy.

    Args:
        before: Steps before the strategy's first.
        after: Steps after the strategy's last.
        before_each: Returns steps to execute before each step of the strategy, given its number.
        transform: Returns the step to execute in place of a step of the strategy.
    """

    def __init__(
        self,
        before: Sequence[StrategyStep] = (),
        after: Sequence[StrategyStep] = (),
        *,
        before_each: Callable[[int], Sequence[StrategyStep]] = lambda number: (),
        transform: Callable[[StrategyStep], StrategyStep] = lambda step: step,
    ) -> None:
        self._before, self._after, self._before_each, self._transform = before, after, before_each, transform

    @hookimpl(wrapper=True)
    def finetune_strategy(self) -> Generator[None, Any, Any]:
        """Add the steps; a list stays a list, so that the engine still validates it before training."""
        steps = yield
        if isinstance(steps, (list, tuple)):
            between = [each for i, step in enumerate(steps) for each in (*self._before_each(i), self._transform(step))]
            return [*self._before, *between, *self._after]
        return self._iterate_steps(steps)

    def _iterate_steps(self, steps: Iterable[StrategyStep]) -> Generator[StrategyStep, Any, None]:
        for step in self._before:
            yield step
        own, result, number = iter(steps), None, 0
        while True:
            try:
                step = own.send(result) if hasattr(own, "send") else next(own)
            except StopIteration:
                break
            for extra in self._before_each(number):  # noqa: UP028 - `yield from` would send the results to a tuple
                yield extra
            result = yield self._transform(step)
            number += 1
        for step in self._after:
            yield step


class _StepCounter:
    """A callback that returns the number of optimizer steps of its run when called."""

    def __init__(self) -> None:
        self._run: Run | None = None

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Store the run."""
        self._run = run

    def __call__(self) -> int:
        return 0 if self._run is None else self._run.step


@attrs.frozen(eq=False)
class StrategyHarness:
    """Runs one strategy for one check.

    Args:
        label: The name of the strategy in messages.
        cls: The strategy's class.
        options: Its options; each run gets a new instance, as in another process.
        directory: An empty directory for the runs of the check.
    """

    label: str
    cls: type
    options: Mapping[str, Any]
    directory: Path

    def build_strategy(self) -> Any:
        """Return a new instance of the strategy."""
        return build_component(self.cls, self.options, where=self.label)

    def to_spec(self) -> ComponentSpec:
        """Return the reference by which another process finds the strategy."""
        return ComponentSpec(f"{self.cls.__module__}:{self.cls.__qualname__}", self.options)

    def run(self, *callbacks: Any, model: Any = None, name: str = "run", **settings: Any) -> Result:
        """Run the strategy to its end.

        Args:
            callbacks: Callbacks of the run.
            model: A `Model` other than that of the fixtures.
            name: The name of the run directory.
            settings: Settings as for `Engine`.

        Raises:
            AssertionError: The run failed; the message holds the reason.
        """
        return self._run_to_end(self.build_engine(*callbacks, model=model, name=name, **settings))

    def build_engine(self, *callbacks: Any, model: Any = None, name: str = "run", **settings: Any) -> Engine:
        """Return an engine on the fixtures that has not run yet."""
        defaults = {
            "batch_size": 16,
            "cache": "off",
            "checkpoint_s": 1e9,
            "page": False,
            "refit": False,
            "data": fixtures.make_data(),
        }
        return Engine(
            strategy=self.build_strategy(),
            model=fixtures.make_model() if model is None else model,
            callbacks=callbacks,
            out=self.directory / name,
            **{**defaults, **settings},
        )

    def run_interrupted(
        self,
        points: Iterable[InterruptionPoint],
        make_callbacks: Callable[[], Sequence[Any]] = list,
        *,
        make_model: Callable[[], Any] = fixtures.make_model,
        name: str = "interrupted",
        **settings: Any,
    ) -> Result:
        """Run the strategy to its end; at each of the points interrupt the run and resume it.

        After an optimizer step and after a strategy step the run is stopped, which saves a checkpoint; between training
        and recording a strategy step it is killed, and resumes from an earlier checkpoint.

        Args:
            points: The points at which to interrupt, each once.
            make_callbacks: Returns new callbacks for the first run and each resumed one.
            make_model: Returns a new model for each resumed run.
            name: The name of the run directory.
            settings: Settings as for `Engine`.
        """
        remaining, data = set(points), settings.get("data") or fixtures.make_data()
        counter = _StepCounter()
        engine = self.build_engine(*make_callbacks(), counter, name=name, **settings)
        while True:
            with set_fault_hook(functools.partial(_interrupt, engine, counter, remaining)):
                try:
                    return self._run_to_end(engine)
                except (_KilledError, StoppedError):
                    pass
            counter = _StepCounter()
            engine = Engine.resume(
                self.directory / name, data=data, model=make_model(), strategy=self.build_strategy(),
                callbacks=[*make_callbacks(), counter],
            )  # fmt: skip

    def record_points(self, *callbacks: Any, name: str = "points", **settings: Any) -> list[InterruptionPoint]:
        """Run the strategy, and return every fault-injection point that the run passes, in order."""
        counter, passed = _StepCounter(), list[InterruptionPoint]()
        with set_fault_hook(lambda point: passed.append((point, counter()))):
            self.run(*callbacks, counter, name=name, **settings)
        return passed

    def read_files(self, name: str) -> dict[str, bytes]:
        """Return the content of the files that must not depend on interruptions."""
        return {each: (self.directory / name / each).read_bytes() for each in COMPARED_FILES}

    def _run_to_end(self, engine: Engine) -> Result:
        try:
            return engine.run()
        except StoppedError:
            raise
        except Exception as error:
            raise AssertionError(f"{self.label}: the run failed: {type(error).__name__}: {error}") from error


def choose_interruption_points(points: Iterable[InterruptionPoint]) -> list[InterruptionPoint]:
    """Return points one optimizer step before, at (twice), and one after the end of each strategy step."""
    passed = list(dict.fromkeys(points))
    ends = [step for point, step in passed if point == "phase-trained"]
    wanted = {
        each
        for step in ends
        for each in (("step", step - 1), ("phase-trained", step), ("phase-logged", step), ("step", step + 1))
    }
    return [each for each in passed if each in wanted]


def compare_files(one: dict[str, bytes], other: dict[str, bytes]) -> str:
    """Return the files that differ, and from which line; "" if all files are equal."""
    differing = []
    for name in (each for each in one if one[each] != other[each]):
        lines = zip(one[name].splitlines(), other[name].splitlines(), strict=False)
        first = next((number for number, (a, b) in enumerate(lines, start=1) if a != b), 0)
        differing.append(name if name.endswith("safetensors") else f"{name} from line {first}")
    return ", ".join(differing)


def copy_parameters(result: Result) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter by name after the run."""
    return {name: each.detach().clone() for name, each in result.model.parameters().items()}


def _interrupt(engine: Engine, counter: _StepCounter, remaining: set[InterruptionPoint], point: str) -> None:
    if (point, counter()) not in remaining:
        return
    remaining.remove((point, counter()))
    if point == "phase-trained":
        raise _KilledError
    engine.stop("the conformance kit", exit_code=143)


@contextlib.contextmanager
def set_fault_hook(hook: Callable[[str], None]) -> Iterator[None]:
    """Call `hook` with the name of each fault-injection point that a run passes."""
    before, faults.hook = faults.hook, hook
    try:
        yield
    finally:
        faults.hook = before
