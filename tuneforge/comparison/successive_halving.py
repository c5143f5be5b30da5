"""Successive halving (Jamieson and Talwalkar 2016): the budget of each round, and the candidates it drops."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuneforge.comparison.ranking import DROPPED, FAILED, CandidateResult, require_common_monitor, sort_by_mean
from tuneforge.errors import UsageError
from tuneforge.plugin.config import parse_budget

_UNITS = {"seconds": "s", "epochs": "epochs", "steps": "steps"}


def plan_halving(budget: str | None, num_candidates: int) -> list[str | None]:
    """Return the budget of each round: twice that of the round before it, the last one whole.

    Raises:
        UsageError: There is no budget, or it is too small to be halved that often.
    """
    if budget is None:
        raise UsageError("--halving needs a budget", where="--halving", fix="give one, such as --budget 20epochs")
    count = max(1, math.ceil(math.log2(num_candidates)))
    kind, amount = parse_budget(budget)
    amounts = [amount / 2 ** (count - number) for number in range(1, count)]
    if kind != "seconds" and amounts and min(amounts) < 1:
        raise UsageError(
            f"a budget of {budget} cannot be halved {count - 1} times, as {num_candidates} candidates need",
            where="--budget",
            fix=f"give at least {2 ** (count - 1)}{_UNITS[kind]}",
        )
    shown = (f"{each:.3f}".rstrip("0").rstrip(".") if kind == "seconds" else str(int(each)) for each in amounts)
    return [*(f"{each}{_UNITS[kind]}" for each in shown), budget]


def select_dropped(results: Sequence[CandidateResult], *, baseline: str) -> list[str]:
    """Return the names of the worse half by their mean; the baseline is never dropped.

    Args:
        results: The results of all candidates of a round.
        baseline: The name of the baseline.
    """
    through = [row for row in results if row.state not in (DROPPED, FAILED)]
    if not through:
        return []
    _, mode = require_common_monitor([run for row in through for run in row.runs])
    return [row.name for row in sort_by_mean(through, mode)[math.ceil(len(results) / 2) :] if row.name != baseline]
