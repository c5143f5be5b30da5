"""The conformance kit: checks that a strategy avoids 13 known issues of fine-tuning tools.

Such an issue is a resumed run that freezes unfrozen layers again, or a frozen BatchNorm that updates its statistics.
The checks run a strategy on a small model and data set and take a few seconds in all:

    import pytest
    from tuneforge.testing import strategy_checks
    from my_strategies import HeadTwice

    @pytest.mark.parametrize("check", strategy_checks(HeadTwice, HeadTwice(lr=0.1)), ids=str)
    def test_conforms(check):
        check()

The kit does not import pytest. Without arguments `strategy_checks` returns the checks of every installed strategy;
`check_strategy(HeadTwice())` runs all checks of one strategy.
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
from tuneforge.testing import known_issues, two_ranks
from tuneforge.testing.recording import StrategyHarness

__all__ = ["CHECKS", "SLOW_CHECKS", "StrategyCheck", "check_strategy", "small_options", "strategy_checks"]

CheckFunction = Callable[[StrategyHarness], None]

CHECKS: tuple[CheckFunction, ...] = (
    known_issues.check_resume_at_phase_boundaries,
    known_issues.check_frozen_batchnorm_statistics,
    known_issues.check_frozen_batchnorm_with_feature_cache,
    known_issues.check_frozen_dropout_is_off,
    known_issues.check_frozen_weights_ignore_decay_and_momentum,
    known_issues.check_schedules_survive_resume,
    known_issues.check_equal_tensors_all_train,
    known_issues.check_optimizer_state_is_matched_by_name,
    known_issues.check_sample_order_after_resume,
    known_issues.check_diagnosis_has_no_side_effects,
    known_issues.check_misspelled_selectors_are_refused,
    known_issues.check_every_stop_has_a_reason,
)
"""The checks that take at most a few seconds."""

SLOW_CHECKS: tuple[CheckFunction, ...] = (
    known_issues.check_unfrozen_layers_train_when_compiled,
    two_ranks.check_two_ranks,
)
"""The checks that compile, or start processes."""

_MAX_BY_SUFFIX = {"epochs": 2, "steps": 4, "batches": 1, "rounds": 2}
"""The largest small value of an option, by the last word of its name."""


@attrs.frozen(eq=False)
class StrategyCheck:
    """One check of one strategy; calling it raises AssertionError if the strategy fails.

    Args:
        check: The check.
        name: The name of the strategy in messages.
        resolve: Returns the strategy's class and options.
        slow: True if the check takes more than a few seconds.
    """

    check: CheckFunction
    name: str
    resolve: Callable[[], tuple[type, Mapping[str, Any]]]
    slow: bool

    def __str__(self) -> str:
        """Return the test id."""
        return f"{self.name}-{self.check.__name__.removeprefix('check_')}"

    def __call__(self) -> None:
        """Run the check in a temporary directory.

        Raises:
            AssertionError: The strategy fails the check.
            PluginLoadError: The strategy cannot be loaded.
            OptionError: The strategy needs an option that was not given.
        """
        cls, options = self.resolve()
        with tempfile.TemporaryDirectory() as directory:
            self.check(StrategyHarness(f"strategy '{self.name}'", cls, options, Path(directory)))


def strategy_checks(
    *strategies: Any, options: Mapping[str, Mapping[str, Any]] | None = None, slow: bool = False
) -> list[StrategyCheck]:
    """Return the checks of strategies as callables; `str(check)` is a test id.

    Args:
        strategies: Names, classes or instances of components; by default every installed strategy. A name or a class
            gets small options (see `small_options`), an instance keeps its own.
        options: Further options by strategy name, for strategies that require one, such as the `path` of `plan-file`.
        slow: Return the slow checks instead of the others.
    """
    chosen = strategies or _list_installed_strategies()
    checks = SLOW_CHECKS if slow else CHECKS
    return [_build_check(check, each, options or {}, slow) for each in chosen for check in checks]


def check_strategy(
    strategy: Any, *, options: Mapping[str, Mapping[str, Any]] | None = None, slow: bool = False
) -> None:
    """Run every check of one strategy; the first failure raises.

    Args:
        strategy: A name, a class or an instance of a component.
        options: Further options by strategy name, as for `strategy_checks`.
        slow: Run the slow checks too.

    Raises:
        AssertionError: The strategy fails a check; the message says how.
    """
    checks = strategy_checks(strategy, options=options)
    for check in [*checks, *(strategy_checks(strategy, options=options, slow=True) if slow else [])]:
        check()


def small_options(cls: type) -> dict[str, Any]:
    """Return options that make a strategy short, at most 2 epochs; steps, rounds and batches are limited too."""
    return {name: small for name, each in get_options(cls).items() if (small := _choose_small_value(each)) is not None}


def _list_installed_strategies() -> list[str]:
    """Return a reference to each installed strategy; where two share a name, it includes the distribution."""
    entries = registry.list_components_of_group("finetune_strategy")
    names = [entry.name for entry in entries]
    return [each.name if names.count(each.name) == 1 else f"{each.distribution}/{each.name}" for each in entries]


def _choose_small_value(option: Option) -> int | None:
    most = _MAX_BY_SUFFIX.get(option.name.rpartition("_")[2])
    if most is None or isinstance(option.default, bool):
        return None
    # A strategy may choose its epochs by the data; other options that are open stay so, because a value changes more.
    is_open = option.default is None and option.name == "epochs"
    is_large = isinstance(option.default, int) and option.default > most
    fits = option.check is None or option.check.test(most)
    return most if fits and (is_open or is_large) else None


def _build_check(
    check: CheckFunction, strategy: Any, options: Mapping[str, Mapping[str, Any]], slow: bool
) -> StrategyCheck:
    if isinstance(strategy, str):
        name = strategy
    else:
        name = _get_strategy_name(strategy if isinstance(strategy, type) else type(strategy))
    return StrategyCheck(check, name, functools.partial(_resolve_strategy, strategy, options.get(name, {})), slow)


def _get_strategy_name(cls: type) -> str:
    """Return the name under which a strategy is installed, or the name that its class would get."""
    entry = registry.find_entry_of_class("finetune_strategy", cls)
    return entry.name if entry.distribution else to_kebab_case(cls.__name__)


def _resolve_strategy(strategy: Any, extra: Mapping[str, Any]) -> tuple[type, Mapping[str, Any]]:
    if not isinstance(strategy, (str, type)):
        return type(strategy), {**get_option_values(strategy), **extra}
    if isinstance(strategy, str):
        cls = registry.load_component(registry.find_component("finetune_strategy", strategy))
    else:
        cls = strategy
    options = {**small_options(cls), **extra}
    missing = [each.key for each in get_options(cls).values() if each.required and each.name not in options]
    if missing:
        raise OptionError(
            f"{cls.__name__} needs {', '.join(missing)}",
            why="the option has no default",
            fix=f"give it: strategy_checks(options={{{strategy!r}: {{{missing[0]!r}: ...}}}})",
        )
    return cls, options
