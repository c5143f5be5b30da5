"""How often each sample is drawn in an epoch, and how much its loss counts: what a phase says of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.sampler import Order
from tuneforge.errors import DataError, UsageError
from tuneforge.plugin.steps import Phase


@attrs.frozen(eq=False)
class Draws:
    """How often each sample is drawn, and with what weight."""

    size: int
    counts: tuple[int, ...]
    pools: tuple[Tensor, ...]
    weights: Tensor | None

    @classmethod
    def of(cls, run: Run, phase: Phase) -> Draws:
        """Read the phase's `sampling` or `mix`, and its `class_weights`.

        Raises:
            DataError: The targets have no classes to weigh, or the data none of the parts to mix.
        """
        size = len(run.data.train)
        counts: tuple[int, ...] = ()
        pools: dict[str, Tensor] = {}
        if phase.sampling is not None:
            pools = _pools(run, phase)
            factors = _factors(phase.sampling, pools, balance=1.0)
            counts = _shares({name: factors[name] * len(rows) for name, rows in pools.items()}, size)
        elif phase.mix:
            pools, shares = _mixed(run, phase)
            counts = _shares(shares, size)
        return cls(size, counts, tuple(pools.values()), _weights(run, phase, size))

    def order(self, run: Run) -> Order:
        """The order of the epoch that begins."""
        return Order(self.size, run.config.seed, run.epoch, self.counts, self.pools)


def _pools(run: Run, phase: Phase) -> dict[str, Tensor]:
    pools = {name: rows for name, rows in run.data.targets.pools(run.data.train.targets).items() if len(rows)}
    if not pools:
        raise DataError(
            f"phase '{phase.name}' weighs classes, and the targets have none",
            fix="leave class_weights and sampling out",
        )
    return pools


def _factors(asked: Mapping[str, float] | str, pools: dict[str, Tensor], *, balance: float) -> dict[str, float]:
    """A factor for each class: as asked, 1 where nothing is said; `"balanced"` evens out the classes' sizes."""
    if isinstance(asked, str):
        if asked != "balanced":
            raise UsageError(f"class weights must be 'balanced' or a table, not {asked!r}")
        return {name: balance / len(rows) for name, rows in pools.items()}
    unknown = sorted(set(asked) - set(pools))
    if unknown:
        raise UsageError(f"no training sample has class '{unknown[0]}'", fix=f"classes: {', '.join(pools)}")
    return {name: asked.get(name, 1.0) for name in pools}


def _mixed(run: Run, phase: Phase) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The parts of the training split that the phase mixes, with what is in none of them, and the share of each."""
    assert phase.mix is not None
    known, size = run.data.pools, len(run.data.train)
    for name in phase.mix:
        if name not in known:
            raise DataError(
                f"phase '{phase.name}' mixes '{name}', and the data has no such part",
                why=f"its parts are {', '.join(known)}" if known else "it is not made of parts",
                fix="use data that is made of parts, such as --data continued, or leave mix out",
            )
    rest = torch.ones(size, dtype=torch.bool)
    for name in phase.mix:
        rest[known[name]] = False
    pools, shares = {name: known[name] for name in phase.mix}, dict(phase.mix)
    if rest.any() and sum(shares.values()) < 1:
        pools[""], shares[""] = rest.nonzero().flatten(), 1 - sum(shares.values())
    return pools, shares


def _shares(mass: dict[str, float], size: int) -> tuple[int, ...]:
    """Draws of each pool, in proportion to its mass, summing to `size` (largest remainders)."""
    if not sum(mass.values()):
        raise UsageError("nothing is left to draw from", fix="give at least one class or part a factor above 0")
    exact = [size * part / sum(mass.values()) for part in mass.values()]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: size - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def _weights(run: Run, phase: Phase, size: int) -> Tensor | None:
    """The factor of each sample's loss (n,), mean 1 over the split; None where nothing is asked."""
    if phase.class_weights is None:
        return None
    pools = _pools(run, phase)
    weights = torch.ones(size)
    for name, factor in _factors(phase.class_weights, pools, balance=size / len(pools)).items():
        weights[pools[name]] = factor
    if not weights.sum():
        raise UsageError("class_weights leave no class to learn from", fix="give at least one class a factor above 0")
    return weights / weights.mean()
