"""Runs of the kit: one strategy on the small world, watched, framed, or killed and resumed."""

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
from tuneforge.testing import fixtures as world

COMPARED_FILES = ("model.safetensors", "metrics.jsonl", "steps.jsonl", "report.json", "model.json")
"""What two runs that are the same to the bit share, byte by byte."""

InterruptionPoint = tuple[str, int]
"""A place in a run: the name of a point that it passes, and the optimizer steps taken by then."""


class _KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing cleans up."""


class SurroundingSteps:
    """Puts phases of the kit around a strategy's own steps, so that every strategy freezes and thaws something.

    Args:
        before: Steps before its first.
        after: Steps after its last.
        before_each: Gives steps to do before each of its own.
        transform: What is done in place of each step.
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
        """A list stays a list, so that it is still checked before anything trains."""
        steps = yield
        if isinstance(steps, (list, tuple)):
            between = [each for i, step in enumerate(steps) for each in (*self._before_each(i), self._transform(step))]
            return [*self._before, *between, *self._after]
        return self._iterate_steps(steps)

    def _iterate_steps(self, steps: Iterable[StrategyStep]) -> Generator[StrategyStep, Any, None]:
        for step in self._before:
            yield step
        own, answer, number = iter(steps), None, 0
        while True:
            try:
                step = own.send(answer) if hasattr(own, "send") else next(own)
            except StopIteration:
                break
            for beside in self._before_each(number):  # noqa: UP028 - `yield from` would send it the answers
                yield beside
            answer = yield self._transform(step)
            number += 1
        for step in self._after:
            yield step


class _StepCounter:
    """Knows how many optimizer steps a run has taken."""

    def __init__(self) -> None:
        self._run: Run | None = None

    @hookimpl
    def run_started(self, run: Run) -> None:
        """Take hold of the run."""
        self._run = run

    def __call__(self) -> int:
        return 0 if self._run is None else self._run.step


@attrs.frozen(eq=False)
class StrategyHarness:
    """One strategy under one check.

    Args:
        label: How messages name the strategy.
        cls: The strategy's class.
        options: Its options; each run gets an instance of its own, as another process would.
        directory: Where runs go; the check may fill it.
    """

    label: str
    cls: type
    options: Mapping[str, Any]
    directory: Path

    def build_strategy(self) -> Any:
        """The strategy anew."""
        return build_component(self.cls, self.options, where=self.label)

    def to_spec(self) -> ComponentSpec:
        """How another process finds it."""
        return ComponentSpec(f"{self.cls.__module__}:{self.cls.__qualname__}", self.options)

    def run(self, *callbacks: Any, model: Any = None, name: str = "run", **settings: Any) -> Result:
        """Run the strategy to its end.

        Args:
            callbacks: What else takes part.
            model: A `Model` other than the world's.
            name: Of the run's folder.
            settings: As for `Engine`.

        Raises:
            AssertionError: The run stopped; the message holds its reason.
        """
        return self._run_to_end(self.build_engine(*callbacks, model=model, name=name, **settings))

    def build_engine(self, *callbacks: Any, model: Any = None, name: str = "run", **settings: Any) -> Engine:
        """An engine on the world, its run not yet started."""
        given = {"batch_size": 16, "cache": "off", "checkpoint_s": 1e9, "page": False, "data": world.make_data()}
        return Engine(
            strategy=self.build_strategy(),
            model=world.make_model() if model is None else model,
            callbacks=callbacks,
            out=self.directory / name,
            **{**given, **settings},
        )

    def run_interrupted(
        self,
        points: Iterable[InterruptionPoint],
        make_callbacks: Callable[[], Sequence[Any]] = list,
        *,
        make_model: Callable[[], Any] = world.make_model,
        name: str = "interrupted",
        **settings: Any,
    ) -> Result:
        """Run the strategy, interrupt it at each of the places and resume it each time, to its end.

        After an optimizer step and after a step of the strategy it is stopped, which saves a checkpoint; anywhere else
        it is killed, and goes on from the checkpoint before.

        Args:
            points: Where; each is used once, in the order in which the run passes them.
            make_callbacks: Gives what else takes part, afresh for each process.
            make_model: Gives the model for each resumed process.
            name: Of the run's folder.
            settings: As for `Engine`.
        """
        left, data = set(points), settings.get("data") or world.make_data()
        clock = _StepCounter()
        engine = self.build_engine(*make_callbacks(), clock, name=name, **settings)
        while True:
            with _set_fault_hook(functools.partial(_interrupt, engine, clock, left)):
                try:
                    return self._run_to_end(engine)
                except (_KilledError, StoppedError):
                    pass
            clock = _StepCounter()
            engine = Engine.resume(
                self.directory / name, data=data, model=make_model(), strategy=self.build_strategy(),
                callbacks=[*make_callbacks(), clock],
            )  # fmt: skip

    def record_points(self, *callbacks: Any, name: str = "places", **settings: Any) -> list[InterruptionPoint]:
        """Every place that the run passes, in order."""
        clock, passed = _StepCounter(), list[InterruptionPoint]()
        with _set_fault_hook(lambda point: passed.append((point, clock()))):
            self.run(*callbacks, clock, name=name, **settings)
        return passed

    def read_files(self, name: str) -> dict[str, bytes]:
        """What a run left that must not depend on how it was interrupted."""
        return {each: (self.directory / name / each).read_bytes() for each in COMPARED_FILES}

    def _run_to_end(self, engine: Engine) -> Result:
        try:
            return engine.run()
        except StoppedError:
            raise
        except Exception as error:
            raise AssertionError(f"{self.label}: the run stopped: {type(error).__name__}: {error}") from error


def choose_interruption_points(places: Iterable[InterruptionPoint]) -> list[InterruptionPoint]:
    """Where to interrupt a run: one optimizer step before, at (twice), and one after the end of each of its steps."""
    passed = list(dict.fromkeys(places))
    ends = [step for point, step in passed if point == "phase-trained"]
    wanted = {
        each
        for step in ends
        for each in (("step", step - 1), ("phase-trained", step), ("phase-logged", step), ("step", step + 1))
    }
    return [each for each in passed if each in wanted]


def compare_files(one: dict[str, bytes], other: dict[str, bytes]) -> str:
    """Empty where two runs left the same; else which files differ, and in which lines."""
    differing = []
    for name in (each for each in one if one[each] != other[each]):
        lines = zip(one[name].splitlines(), other[name].splitlines(), strict=False)
        first = next((number for number, (a, b) in enumerate(lines, start=1) if a != b), 0)
        differing.append(name if name.endswith("safetensors") else f"{name} from line {first}")
    return ", ".join(differing)


def copy_parameters(result: Result) -> dict[str, torch.Tensor]:
    """Every parameter by name, as the run left it."""
    return {name: each.detach().clone() for name, each in result.model.parameters().items()}


def _interrupt(engine: Engine, clock: _StepCounter, left: set[InterruptionPoint], point: str) -> None:
    if (point, clock()) not in left:
        return
    left.remove((point, clock()))
    if point == "phase-trained":
        raise _KilledError
    engine.stop("the kit", exit_code=143)


@contextlib.contextmanager
def _set_fault_hook(hook: Callable[[str], None]) -> Iterator[None]:
    before, faults.hook = faults.hook, hook
    try:
        yield
    finally:
        faults.hook = before
