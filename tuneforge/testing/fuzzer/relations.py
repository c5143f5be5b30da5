"""The relations that must hold between runs of one random program.

Each returns an `Outcome`. Equal means: the same bits where nothing but an interruption differs; within `TOLERANCE`
where sums are taken over batches of another size, which changes the last bits. Instead of an equal result a run may be
refused by a `TuneforgeError`, before a weight has changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.testing.fuzzer.rank_pair import RankPair
from tuneforge.testing.fuzzer.runs import PointTrigger, ProgramRuns, RunResults
from tuneforge.testing.fuzzer.sabotage import Saboteur
from tuneforge.testing.observers import InvariantChecker, is_bit_equal

TOLERANCES = {"float64": 1e-7, "float32": 1e-3, "bfloat16": 2e-2}
"""The largest difference, relative to the largest element of a tensor or to 1, that another batch size may make.

Training amplifies rounding errors: by up to 1e6 where the learning rate is too high for the network.
"""


@attrs.frozen
class Outcome:
    """What a relation found.

    Args:
        verdict: `"equal"`, `"refused"`, `"different"`, or `"not applicable"`.
        reason: What differs, or the first line of the refusal.
        bitwise: True if everything was bit-identical.
        cached: True if a run of the relation trained on cached features.
    """

    verdict: str
    reason: str = ""
    bitwise: bool = False
    cached: bool = False


class Relations:
    """The relations of one program, which share its undisturbed run.

    Args:
        runs: Runs of the program.
    """

    def __init__(self, runs: ProgramRuns) -> None:
        self._runs, self._program = runs, runs.program
        self._reference: RunResults | None = None
        self._cached: RunResults | None = None
        self._checker = InvariantChecker()

    @property
    def _tolerance(self) -> float:
        dtype = "bfloat16" if self._program.in_bfloat16 else "float32"
        return TOLERANCES["float64" if "float64" in self._program.traits and dtype == "float32" else dtype]

    @property
    def in_float64(self) -> Relations:
        """The relations of the same program in float64, whose rounding errors stay below those of any defect."""
        program = self._program.in_float64()
        if program == self._program:
            return self
        directory = self._runs.directory / "float64"
        directory.mkdir(exist_ok=True)
        return Relations(ProgramRuns(program, directory))

    @property
    def reference(self) -> RunResults:
        """The undisturbed run with `--cache off`."""
        if self._reference is None:
            self._reference = self._runs.run("reference", cache="off", checkpoint_steps=None, callbacks=[self._checker])
        return self._reference

    def cached(self) -> RunResults:
        """The run with a feature cache; a copy of its directory is kept as it was at the program's position."""
        if self._cached is None:
            source, copy = self._runs.directory / "cached", self._runs.directory / "copy"
            trigger = PointTrigger(self._program.position, self.reference.points, lambda: shutil.copytree(source, copy))
            self._cached = self._runs.run("cached", at_point=trigger)
        return self._cached

    def cache(self) -> Outcome:
        """Training on cached features equals training without."""
        return _compare(self.reference, self.cached(), tolerance=self._tolerance)

    def resume(self) -> Outcome:
        """A run that is killed and continued in another process equals the undisturbed one."""
        undisturbed = self.cached()
        if not (self._runs.directory / "copy").exists():
            return Outcome("not applicable", "the run ended before the position of the interruption")
        return _compare(undisturbed, self._runs.resume("copy"), tolerance=0.0, resumed=True)

    def micro_batches(self) -> Outcome:
        """Batches that are computed in parts equal whole batches, where each sample counts by itself, in float64."""
        if (exact := self.in_float64) is not self:
            return exact.micro_batches()
        cache: dict[str, Any] = {} if self._program.seed % 3 == 0 else {"cache": "off"}
        size = self._program.micro_batch
        parts = self._runs.run("micro-batches", micro_batch=size, checkpoint_steps=None, **cache)
        outcome = _compare(self.reference, parts, tolerance=self._tolerance, passes_differ=True)
        if outcome.verdict == "different" and not self._program.per_sample and not parts.has_failed:
            return Outcome("not applicable", "the network computes with whole batches")  # perhaps from some phase on
        return outcome

    def freezing(self) -> Outcome:
        """A frozen tensor stays as it is; a write to one, and a trained tensor that is held fast, halt the run."""
        if self.reference.error is None and self._checker.violations:
            return Outcome("different", self._checker.violations[0])
        saboteur = Saboteur(self._program.seed, self._program.position)
        results = self._runs.run("sabotage", checkpoint_steps=None, callbacks=[saboteur])
        if not saboteur.target:
            return Outcome("not applicable", "nothing is frozen")
        is_halt = results.error is not None and results.error.is_halt
        if is_halt or (results.error is None and saboteur.may_warn and any(saboteur.warned(results.log))):
            return Outcome("equal", bitwise=True, cached=results.num_cached_phases > 0)
        return Outcome("different", f"{saboteur.target}, and the run ends with {results.error}")

    def two_ranks(self) -> Outcome:
        """Two ranks end alike, also after a kill, and like one process where each sample counts by itself."""
        if self._program.per_sample and (exact := self.in_float64) is not self:
            return exact.two_ranks()
        pair = RankPair(self._runs.program, self._runs.directory)
        undisturbed, other = pair.run("ranks")
        if undisturbed.error is not None:
            return _explain_error(undisturbed, weights_may_differ=False)
        if differences := _compare_tensors(undisturbed.state(), other.state(), 0.0):
            return Outcome("different", f"rank 1: {differences[0]}")
        outcome = _compare(undisturbed, pair.run_with_kill("killed", undisturbed), tolerance=0.0, resumed=True)
        if outcome.verdict == "different" or not self._program.per_sample:
            return outcome
        reference = ProgramRuns(self._program, self._runs.directory, draws=False).run("alone", cache="off")
        alone = _compare(reference, undisturbed, tolerance=self._tolerance, passes_differ=True)
        return attrs.evolve(alone, reason=f"against one process: {alone.reason}" if alone.reason else "")


RELATIONS: Mapping[str, Callable[[Relations], Outcome]] = {
    "cache": Relations.cache,
    "resume": Relations.resume,
    "micro-batches": Relations.micro_batches,
    "freezing": Relations.freezing,
    "two-ranks": Relations.two_ranks,
}


def _compare(
    one: RunResults, other: RunResults, *, tolerance: float, resumed: bool = False, passes_differ: bool = False
) -> Outcome:
    """Compare two runs; where `passes_differ`, what the last forward pass left in plain attributes is left out."""
    cached = one.num_cached_phases + other.num_cached_phases > 0
    for results in (one, other):
        if results.error is not None:
            return _explain_error(results, weights_may_differ=resumed and results is other)
    tensors = (one.state(), other.state()) if passes_differ else (one.tensors, other.tensors)
    differences = _compare_tensors(*tensors, tolerance)
    differences += (
        []
        if passes_differ
        else [
            f"attribute '{name}' is {other.attributes.get(name)!r}, not {value!r}"
            for name, value in one.attributes.items()
            if other.attributes.get(name, "missing") != value
        ]
    )
    differences += [
        f"{name} is {right!r:.80}, not {left!r:.80}"
        for name, left, right in _align(one.history, other.history, "history")
        if not _is_near(left, right, tolerance)
    ]
    bitwise = not differences and not _compare_tensors(*tensors, 0.0)
    return Outcome("different" if differences else "equal", "; ".join(differences[:3]), bitwise, cached)


def _explain_error(results: RunResults, *, weights_may_differ: bool) -> Outcome:
    """Return what an error means: a refusal, unless it is none of tuneforge's or comes after training has begun."""
    error = results.error
    assert error is not None
    if not error.is_refusal:
        return Outcome("different", f"the run ends with {error.reason}")
    late = error.is_halt or (results.weights_changed and not weights_may_differ)
    if late and "NaN or Inf" not in error.reason:
        return Outcome("different", f"the run ends after weights have changed, with {error.reason}")
    return Outcome("refused", error.reason)


def _compare_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float) -> list[str]:
    differences = [f"'{name}' is in one of both only" for name in sorted(set(one) ^ set(other))]
    for name in (name for name in one if name in other):
        left, right = one[name], other[name]
        if left.dtype != right.dtype or left.shape != right.shape:
            differences.append(f"'{name}' is {right.dtype} {tuple(right.shape)}, not {left.dtype} {tuple(left.shape)}")
        elif not is_bit_equal(left, right):
            gap = float((left.double() - right.double()).abs().nan_to_num(torch.inf).max())
            if not gap <= tolerance * max(1.0, float(left.double().abs().max())):
                differences.append(f"'{name}' differs by {gap:.2g}")
    return differences


def _align(one: Any, other: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the leaves of two trees of JSON values, side by side; values of another shape are a leaf."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and set(one) == set(other):
        for key in one:
            yield from _align(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from _align(left, right, f"{name}[{number}]")
    else:
        yield name, one, other


def _is_near(one: Any, other: Any, tolerance: float) -> bool:
    if tolerance and isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance * max(1.0, abs(one))
    return bool(one == other)
