"""How often each sample is drawn in an epoch, and how much its loss counts: what a phase says of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.sampler import EpochSampler
from tuneforge.errors import DataError, UsageError
from tuneforge.plugin.steps import Phase


@attrs.frozen(eq=False)
class SamplingWeights:
    """How often each sample is drawn, and with what weight."""

    size: int
    num_draws: tuple[int, ...]
    groups: tuple[Tensor, ...]
    loss_weights: Tensor | None

    @classmethod
    def from_phase(cls, run: Run, phase: Phase) -> SamplingWeights:
        """Read the phase's `sampling` or `mixture_weights`, and its `class_weights`.

        Raises:
            DataError: The targets have no classes to weigh, or the data none of the parts to mix.
        """
        size = len(run.data.train)
        num_draws: tuple[int, ...] = ()
        groups: dict[str, Tensor] = {}
        if phase.sampling is not None:
            groups = _class_groups(run, phase)
            factors = _class_factors(phase.sampling, groups, balance=1.0)
            num_draws = _allocate_draws({name: factors[name] * len(indices) for name, indices in groups.items()}, size)
        elif phase.mixture_weights:
            groups, shares = _mixture_groups(run, phase)
            num_draws = _allocate_draws(shares, size)
        return cls(size, num_draws, tuple(groups.values()), _sample_loss_weights(run, phase, size))

    def make_sampler(self, run: Run) -> EpochSampler:
        """The order of the epoch that begins."""
        return EpochSampler(self.size, run.config.seed, run.epoch, self.num_draws, self.groups)


def _class_groups(run: Run, phase: Phase) -> dict[str, Tensor]:
    groups = {
        name: indices
        for name, indices in run.data.targets.group_by_class(run.data.train.targets).items()
        if len(indices)
    }
    if not groups:
        raise DataError(
            f"phase '{phase.name}' weighs classes, and the targets have none",
            fix="leave class_weights and sampling out",
        )
    return groups


def _class_factors(asked: Mapping[str, float] | str, groups: dict[str, Tensor], *, balance: float) -> dict[str, float]:
    """A factor for each class: as asked, 1 where nothing is said; `"balanced"` evens out the classes' sizes."""
    if isinstance(asked, str):
        if asked != "balanced":
            raise UsageError(f"class weights must be 'balanced' or a table, not {asked!r}")
        return {name: balance / len(indices) for name, indices in groups.items()}
    unknown = sorted(set(asked) - set(groups))
    if unknown:
        raise UsageError(f"no training sample has class '{unknown[0]}'", fix=f"classes: {', '.join(groups)}")
    return {name: asked.get(name, 1.0) for name in groups}


def _mixture_groups(run: Run, phase: Phase) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The parts of the training split that the phase mixes, with what is in none of them, and the share of each."""
    assert phase.mixture_weights is not None
    known, size = run.data.sample_groups, len(run.data.train)
    for name in phase.mixture_weights:
        if name not in known:
            raise DataError(
                f"phase '{phase.name}' mixes '{name}', and the data has no such part",
                why=f"its parts are {', '.join(known)}" if known else "it is not made of parts",
                fix="use data that is made of parts, such as --data continued, or leave mixture_weights out",
            )
    rest = torch.ones(size, dtype=torch.bool)
    for name in phase.mixture_weights:
        rest[known[name]] = False
    groups, shares = {name: known[name] for name in phase.mixture_weights}, dict(phase.mixture_weights)
    if rest.any() and sum(shares.values()) < 1:
        groups[""], shares[""] = rest.nonzero().flatten(), 1 - sum(shares.values())
    return groups, shares


def _allocate_draws(mass: dict[str, float], size: int) -> tuple[int, ...]:
    """Draws of each pool, in proportion to its mass, summing to `size` (largest remainders)."""
    if not sum(mass.values()):
        raise UsageError("nothing is left to draw from", fix="give at least one class or part a factor above 0")
    exact = [size * part / sum(mass.values()) for part in mass.values()]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: size - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def _sample_loss_weights(run: Run, phase: Phase, size: int) -> Tensor | None:
    """The factor of each sample's loss (n,), mean 1 over the split; None where nothing is asked."""
    if phase.class_weights is None:
        return None
    groups = _class_groups(run, phase)
    weights = torch.ones(size)
    for name, factor in _class_factors(phase.class_weights, groups, balance=size / len(groups)).items():
        weights[groups[name]] = factor
    if not weights.sum():
        raise UsageError("class_weights leave no class to learn from", fix="give at least one class a factor above 0")
    return weights / weights.mean()
