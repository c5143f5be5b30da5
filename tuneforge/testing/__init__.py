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
from tuneforge.plugin.declaration import Option, get_option_values, get_options
from tuneforge.plugin.names import to_kebab_case
from tuneforge.testing import known_issues as rows
from tuneforge.testing import processes as ranks
from tuneforge.testing.recording import StrategyHarness

__all__ = ["CHECKS", "SLOW_CHECKS", "StrategyCheck", "check_strategy", "small_options", "strategy_checks"]

CheckFunction = Callable[[StrategyHarness], None]

CHECKS: tuple[CheckFunction, ...] = (
    rows.check_resume_at_phase_boundaries,
    rows.check_frozen_batchnorm_statistics,
    rows.check_frozen_batchnorm_with_feature_cache,
    rows.check_frozen_dropout_is_off,
    rows.check_frozen_weights_ignore_decay_and_momentum,
    rows.check_schedules_survive_resume,
    rows.check_equal_tensors_all_train,
    rows.check_optimizer_state_is_matched_by_name,
    rows.check_sample_order_after_resume,
    rows.check_diagnosis_has_no_side_effects,
    rows.check_misspelled_selectors_are_refused,
    rows.check_every_stop_has_a_reason,
)
"""Every check that takes less than a few seconds."""

SLOW_CHECKS: tuple[CheckFunction, ...] = (rows.check_unfrozen_layers_train_when_compiled, ranks.check_two_ranks)
"""Those that compile, or start processes."""

_MAX_BY_SUFFIX = {"epochs": 2, "steps": 4, "batches": 1, "rounds": 2}
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
            self.check(StrategyHarness(f"strategy '{self.name}'", cls, options, Path(folder)))


def strategy_checks(
    *strategies: Any, options: Mapping[str, Mapping[str, Any]] | None = None, slow: bool = False
) -> list[StrategyCheck]:
    """Checks of strategies, one object each, to be called; `str(check)` is a name for it.

    Args:
        strategies: Names, classes or instances of components; none: every installed strategy. A name or a class gets
            small options (see `small_options`), an instance keeps its own.
        options: By strategy name, options beside those: of strategies that need one, such as `plan-file` its `path`.
        slow: The slow checks instead of the others.
    """
    asked = strategies or _list_installed_strategies()
    checks = SLOW_CHECKS if slow else CHECKS
    return [_build_check(check, each, options or {}, slow) for each in asked for check in checks]


def check_strategy(
    strategy: Any, *, options: Mapping[str, Mapping[str, Any]] | None = None, slow: bool = False
) -> None:
    """Run every check of one strategy, and stop at the first that fails.

    Args:
        strategy: A name, a class or an instance of a component.
        options: As for `strategy_checks`.
        slow: The slow checks too.

    Raises:
        AssertionError: The strategy fails a check; the message says how.
    """
    checks = strategy_checks(strategy, options=options)
    for check in [*checks, *(strategy_checks(strategy, options=options, slow=True) if slow else [])]:
        check()


def small_options(cls: type) -> dict[str, Any]:
    """Options that make a strategy short: epochs at most 2, and steps, rounds and batches likewise, by name."""
    return {name: small for name, each in get_options(cls).items() if (small := _choose_small_value(each)) is not None}


def _list_installed_strategies() -> list[str]:
    """A reference to each installed strategy: its name, with its distribution where two have one name."""
    entries = registry.list_components_of_group("finetune_strategy")
    names = [entry.name for entry in entries]
    return [each.name if names.count(each.name) == 1 else f"{each.distribution}/{each.name}" for each in entries]


def _choose_small_value(declared: Option) -> int | None:
    most = _MAX_BY_SUFFIX.get(declared.name.rpartition("_")[2])
    if most is None or isinstance(declared.default, bool) or not isinstance(declared.default, int):
        return None
    fits = declared.check is None or declared.check.test(most)
    return most if fits and declared.default > most else None


def _build_check(check: CheckFunction, asked: Any, given: Mapping[str, Mapping[str, Any]], slow: bool) -> StrategyCheck:
    name = asked if isinstance(asked, str) else _get_strategy_name(asked if isinstance(asked, type) else type(asked))
    return StrategyCheck(check, name, functools.partial(_resolve_strategy, asked, given.get(name, {})), slow)


def _get_strategy_name(cls: type) -> str:
    """Under which it is installed, or what it would be called."""
    entry = registry.find_entry_of_class("finetune_strategy", cls)
    return entry.name if entry.distribution else to_kebab_case(cls.__name__)


def _resolve_strategy(asked: Any, given: Mapping[str, Any]) -> tuple[type, Mapping[str, Any]]:
    if not isinstance(asked, (str, type)):
        return type(asked), {**get_option_values(asked), **given}
    cls = (
        registry.load_component(registry.find_component("finetune_strategy", asked))
        if isinstance(asked, str)
        else asked
    )
    options = {**small_options(cls), **given}
    missing = [each.key for each in get_options(cls).values() if each.required and each.name not in options]
    if missing:
        raise OptionError(
            f"{cls.__name__} needs {', '.join(missing)}",
            why="the kit cannot guess it",
            fix=f"give it: strategy_checks(options={{{asked!r}: {{{missing[0]!r}: ...}}}})",
        )
    return cls, options
