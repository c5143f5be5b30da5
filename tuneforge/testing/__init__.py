"""The conformance kit: what every strategy must hold to, as checks that an author runs on their own.

Rows 1 to 13 of the known defects of fine-tuning tools (resume that freezes again what was thawed, norms that move while
frozen, ...) are a check each. They run a strategy on a small world, a few seconds in all:

    import pytest
    from tuneforge.testing import strategy_checks
    from my_strategies import HeadTwice

    @pytest.mark.parametrize("check", strategy_checks(HeadTwice, HeadTwice(lr=0.1)), ids=str)
    def test_conforms(check):
        check()

Nothing here imports pytest. Without arguments `strategy_checks` takes every strategy that is installed, and
`check_strategy(HeadTwice())` runs all checks of one.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from tuneforge import OptionError
from tuneforge.plugin import registry
from tuneforge.plugin.component import Option, options_of, values_of
from tuneforge.plugin.names import kebab
from tuneforge.testing import known_issues as rows
from tuneforge.testing import processes as ranks
from tuneforge.testing.recording import Trial

__all__ = ["CHECKS", "SLOW_CHECKS", "StrategyCheck", "check_strategy", "small_options", "strategy_checks"]

CheckFunction = Callable[[Trial], None]

CHECKS: tuple[CheckFunction, ...] = (
    rows.check_resume_at_phase_borders,
    rows.check_frozen_norms_keep_still,
    rows.check_frozen_statistics_with_kept_features,
    rows.check_frozen_dropout_is_off,
    rows.check_decay_and_momentum_move_nothing_frozen,
    rows.check_every_schedule_goes_on,
    rows.check_equal_tensors_all_train,
    rows.check_optimizer_state_goes_by_name,
    rows.check_order_goes_on_after_resume,
    rows.check_probe_leaves_no_trace,
    rows.check_misspelt_selectors_are_refused,
    rows.check_every_end_has_its_reason,
)
"""Every check that takes less than a few seconds."""

SLOW_CHECKS: tuple[CheckFunction, ...] = (rows.check_thawed_layers_train_when_compiled, ranks.check_two_ranks)
"""Those that compile, or start processes."""

_SMALL = {"epochs": 2, "steps": 4, "batches": 1, "rounds": 2}
"""The most of an option whose name ends in such a word."""


@attrs.frozen(eq=False)
class StrategyCheck:
    """One check of one strategy; call it, and it raises AssertionError where the strategy fails.

    Args:
        check: The check.
        name: What messages call the strategy.
        resolve: Gives the strategy's class and options.
        slow: True where it takes more than a few seconds.
    """

    check: CheckFunction
    name: str
    resolve: Callable[[], tuple[type, Mapping[str, Any]]]
    slow: bool

    def __str__(self) -> str:
        """As a test's id."""
        return f"{self.name}-{self.check.__name__.removeprefix('check_')}"

    def __call__(self) -> None:
        """Run it in a folder that is thrown away.

        Raises:
            AssertionError: The strategy fails the check.
            PluginLoadError: The strategy cannot be loaded.
            OptionError: It needs an option that nobody gave.
        """
        cls, options = self.resolve()
        with tempfile.TemporaryDirectory() as folder:
            self.check(Trial(f"strategy '{self.name}'", cls, options, Path(folder)))


def strategy_checks(
    *strategies: Any, given: Mapping[str, Mapping[str, Any]] | None = None, slow: bool = False
) -> list[StrategyCheck]:
    """Checks of strategies, one object each, to be called; `str(check)` is a name for it.

    Args:
        strategies: Names, classes or instances of components; none: every installed strategy. A name or a class gets
            small options (see `small_options`), an instance keeps its own.
        given: By strategy name, options beside those: of strategies that need one, such as `plan-file` its `path`.
        slow: The slow checks instead of the others.
    """
    asked = strategies or _installed()
    checks = SLOW_CHECKS if slow else CHECKS
    return [_check_of(check, each, given or {}, slow) for each in asked for check in checks]


def check_strategy(strategy: Any, *, given: Mapping[str, Mapping[str, Any]] | None = None, slow: bool = False) -> None:
    """Run every check of one strategy, and stop at the first that fails.

    Args:
        strategy: A name, a class or an instance of a component.
        given: As for `strategy_checks`.
        slow: The slow checks too.

    Raises:
        AssertionError: The strategy fails a check; the message says how.
    """
    checks = strategy_checks(strategy, given=given)
    for check in [*checks, *(strategy_checks(strategy, given=given, slow=True) if slow else [])]:
        check()


def small_options(cls: type) -> dict[str, Any]:
    """Options that make a strategy short: epochs at most 2, and steps, rounds and batches likewise, by name."""
    return {name: small for name, each in options_of(cls).items() if (small := _small(each)) is not None}


def _installed() -> list[str]:
    """A reference to each installed strategy: its name, with its distribution where two have one name."""
    entries = registry.entries_of("finetune_strategy")
    names = [entry.name for entry in entries]
    return [each.name if names.count(each.name) == 1 else f"{each.distribution}/{each.name}" for each in entries]


def _small(declared: Option) -> int | None:
    most = _SMALL.get(declared.name.rpartition("_")[2])
    if most is None or isinstance(declared.default, bool) or not isinstance(declared.default, int):
        return None
    fits = declared.check is None or declared.check.test(most)
    return most if fits and declared.default > most else None


def _check_of(check: CheckFunction, asked: Any, given: Mapping[str, Mapping[str, Any]], slow: bool) -> StrategyCheck:
    name = asked if isinstance(asked, str) else _name_of(asked if isinstance(asked, type) else type(asked))
    return StrategyCheck(check, name, functools.partial(_resolved, asked, given.get(name, {})), slow)


def _name_of(cls: type) -> str:
    """Under which it is installed, or what it would be called."""
    entry = registry.entry_for("finetune_strategy", cls)
    return entry.name if entry.distribution else kebab(cls.__name__)


def _resolved(asked: Any, given: Mapping[str, Any]) -> tuple[type, Mapping[str, Any]]:
    if not isinstance(asked, (str, type)):
        return type(asked), {**values_of(asked), **given}
    cls = registry.load(registry.find("finetune_strategy", asked)) if isinstance(asked, str) else asked
    options = {**small_options(cls), **given}
    missing = [each.key for each in options_of(cls).values() if each.required and each.name not in options]
    if missing:
        raise OptionError(
            f"{cls.__name__} needs {', '.join(missing)}",
            why="the kit cannot guess it",
            fix=f"give it: strategy_checks(given={{{asked!r}: {{{missing[0]!r}: ...}}}})",
        )
    return cls, options
