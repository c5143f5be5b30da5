"""Sampling and loss weights of a phase: how often each sample is drawn in an epoch, and how much its loss counts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import TrainSampler
from tuneforge.engine.data.sample_seeds import draw_epoch
from tuneforge.engine.data.sampler import EpochSampler, ListedSampler
from tuneforge.errors import DataError, UsageError
from tuneforge.plugin.steps import Phase


@attrs.frozen(eq=False)
class SamplingWeights:
    """How often each sample is drawn in an epoch, and the weight of its loss.

    Args:
        size: Draws of one epoch; the number of training samples unless the data has a sampler of its own.
        num_draws: Draws from each group, summing to `size`; empty if every sample is drawn once.
        groups: The indices of the samples of each group.
        loss_weights: The weight of each sample's loss (n,), with mean 1; None if all weights are 1.
    """

    size: int
    num_draws: tuple[int, ...]
    groups: tuple[Tensor, ...]
    loss_weights: Tensor | None

    @classmethod
    def from_phase(cls, run: Run, phase: Phase) -> SamplingWeights:
        """Return the weights that the phase's `sampling`, `mixture_weights` and `class_weights` describe.

        Raises:
            DataError: The targets have no classes, or the data lacks a sample group.
            UsageError: A class is unknown, nothing is left to draw from, or the data has a sampler of its own.
        """
        own = run.data.train_sampler
        if own is not None:
            _check_own_sampler(run, own, phase)
            return cls(own.num_draws, (), (), _sample_loss_weights(run, phase, len(run.data.train)))
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

    def make_sampler(self, run: Run) -> EpochSampler | ListedSampler:
        """Return the sampler of the epoch that begins."""
        if not self.groups:
            return epoch_sampler(run)
        return EpochSampler(self.size, run.config.seed, run.epoch, self.num_draws, self.groups)


def epoch_sampler(run: Run) -> EpochSampler | ListedSampler:
    """Return the sampler of the epoch that begins where no phase asks for one: the data's, or a permutation."""
    own = run.data.train_sampler
    if own is not None:
        return ListedSampler(draw_epoch(own, run.config.seed, run.epoch))
    return EpochSampler(len(run.data.train), run.config.seed, run.epoch)


def num_draws(run: Run) -> int:
    """Return the number of samples that an epoch trains on."""
    own = run.data.train_sampler
    return len(run.data.train) if own is None else own.num_draws


def _check_own_sampler(run: Run, sampler: TrainSampler, phase: Phase) -> None:
    """Check that the sampler of the data can be repeated, and that the phase asks for no other."""
    if phase.sampling is not None or phase.mixture_weights:
        raise UsageError(
            f"phase '{phase.name}' samples the data, and so does the sampler of the data",
            why="only one of them can decide how often a sample is drawn",
            fix="give data without a sampler, or remove sampling and mixture_weights from the phase",
        )
    if not torch.equal(*(draw_epoch(sampler, run.config.seed, run.epoch) for _ in range(2))):
        raise DataError(
            "the sampler of the data gives another order if it draws an epoch again",
            why="it keeps a state between passes, or draws from a generator that no seed reaches",
            fix="draw from random, numpy.random, torch or a generator that it holds, or define set_epoch(epoch)",
        )


def _class_groups(run: Run, phase: Phase) -> dict[str, Tensor]:
    groups = {
        name: indices
        for name, indices in run.data.targets.group_by_class(run.data.train.targets).items()
        if len(indices)
    }
    if not groups:
        raise DataError(
            f"phase '{phase.name}' has class weights or class sampling, but the targets have no classes",
            fix="remove class_weights and sampling",
        )
    return groups


def _class_factors(
    weights: Mapping[str, float] | str, groups: dict[str, Tensor], *, balance: float
) -> dict[str, float]:
    """Return a factor for each class; 1 for a class without one, and inverse to its size for `"balanced"`."""
    if isinstance(weights, str):
        if weights != "balanced":
            raise UsageError(f"class weights must be 'balanced' or a table, not {weights!r}")
        return {name: balance / len(indices) for name, indices in groups.items()}
    unknown = sorted(set(weights) - set(groups))
    if unknown:
        raise UsageError(f"no training sample has class '{unknown[0]}'", fix=f"classes: {', '.join(groups)}")
    return {name: weights.get(name, 1.0) for name in groups}


def _mixture_groups(run: Run, phase: Phase) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the sample groups that the phase mixes and the share of each; `""` is the group of all other samples."""
    assert phase.mixture_weights is not None
    known, size = run.data.sample_groups, len(run.data.train)
    for name in phase.mixture_weights:
        if name not in known:
            raise DataError(
                f"phase '{phase.name}' mixes sample group '{name}', which the data does not have",
                why=f"its sample groups are {', '.join(known)}" if known else "the data has no sample groups",
                fix="use data with sample groups, such as --data continued, or remove mixture_weights",
            )
    rest = torch.ones(size, dtype=torch.bool)
    for name in phase.mixture_weights:
        rest[known[name]] = False
    groups, shares = {name: known[name] for name in phase.mixture_weights}, dict(phase.mixture_weights)
    if rest.any() and sum(shares.values()) < 1:
        groups[""], shares[""] = rest.nonzero().flatten(), 1 - sum(shares.values())
    return groups, shares


def _allocate_draws(mass: dict[str, float], size: int) -> tuple[int, ...]:
    """Return the draws of each group, proportional to its mass and summing to `size` (largest-remainder method)."""
    if not sum(mass.values()):
        raise UsageError("nothing is left to draw from", fix="give at least one class or sample group a weight above 0")
    exact = [size * part / sum(mass.values()) for part in mass.values()]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: size - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def _sample_loss_weights(run: Run, phase: Phase, size: int) -> Tensor | None:
    """Return the weight of each sample's loss (n,), with mean 1; None if the phase has no class weights."""
    if phase.class_weights is None:
        return None
    groups = _class_groups(run, phase)
    weights = torch.ones(size)
    for name, factor in _class_factors(phase.class_weights, groups, balance=size / len(groups)).items():
        weights[groups[name]] = factor
    if not weights.sum():
        raise UsageError("class_weights are 0 for every class", fix="give at least one class a weight above 0")
    return weights / weights.mean()
