"""Successive halving: what each rung of a race may spend, and who falls after it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuneforge.comparison.ranking import DROPPED, FAILED, Row, ahead, monitored
from tuneforge.errors import UsageError
from tuneforge.plugin.config import budget_of

_UNITS = {"seconds": "s", "epochs": "epochs", "steps": "steps"}


def rungs_of(budget: str | None, entrants: int) -> list[str | None]:
    """The budget of each rung of a halving: twice that of the one before it, the last one whole.

    Raises:
        UsageError: There is no budget, or too little to halve so often.
    """
    if budget is None:
        raise UsageError("a halving needs a budget", where="--halving", fix="give one, such as --budget 20epochs")
    count = max(1, math.ceil(math.log2(entrants)))
    kind, amount = budget_of(budget)
    amounts = [amount / 2 ** (count - number) for number in range(1, count)]
    if kind != "seconds" and amounts and min(amounts) < 1:
        raise UsageError(
            f"a budget of {budget} cannot be halved {count - 1} times, as {entrants} entrants need",
            where="--budget",
            fix=f"give at least {2 ** (count - 1)}{_UNITS[kind]}",
        )
    shown = (f"{each:.3f}".rstrip("0").rstrip(".") if kind == "seconds" else str(int(each)) for each in amounts)
    return [*(f"{each}{_UNITS[kind]}" for each in shown), budget]


def fallen(rows: Sequence[Row], *, baseline: str) -> list[str]:
    """Names of the worse half, by their mean; the baseline stays to be compared with.

    Args:
        rows: Of all who ran in a rung.
        baseline: An entrant's name.
    """
    through = [row for row in rows if row.state not in (DROPPED, FAILED)]
    if not through:
        return []
    _, mode = monitored([run for row in through for run in row.runs])
    return [row.name for row in ahead(through, mode)[math.ceil(len(rows) / 2) :] if row.name != baseline]
