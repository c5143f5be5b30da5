"""The candidates of a study: strategies by name, with options, or as Python objects, each with a unique name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from tuneforge.engine.session.components import is_object
from tuneforge.errors import UnknownNameError, UsageError, suggest_name
from tuneforge.plugin import registry
from tuneforge.plugin.declaration import get_options
from tuneforge.plugin.steps import ComponentSpec, Diagnosis, HeadFit, Phase, WeightAverage

SOUP = "greedy-soup"
"""The name that stands among the strategies for the average of the others' weights."""

_SEPARATOR = re.compile(r",(?![^\[\]]*\])")
_OPTION = re.compile(r":(?=[A-Za-z][\w-]*=)")
_UNSAFE = re.compile(r"[^\w.=,+-]+")
_MAX_DIR_NAME_LENGTH = 80


@attrs.frozen(eq=False)
class Candidate:
    """A strategy that is compared.

    Args:
        name: The name in the table.
        dir_name: The directory of its runs, inside the study directory.
        strategy: The strategy as `Engine` takes it.
        spec: The strategy as the configuration records it.
    """

    name: str
    dir_name: str
    strategy: Any
    spec: ComponentSpec


def parse_strategies(text: str) -> list[ComponentSpec]:
    """Parse strategies of a command line: `lp-ft,full:lr=3e-4:epochs=20,wise-ft:weights=[0.5,1],mine:Name`.

    Commas separate strategies, each `:option=value` belongs to the strategy before it, and lists are in brackets.
    """
    specs = []
    for each in filter(None, (part.strip() for part in _SEPARATOR.split(text))):
        name, *options = _OPTION.split(each)
        pairs = (option.split("=", 1) for option in options)
        specs.append(ComponentSpec(name, {key: value.removeprefix("[").removesuffix("]") for key, value in pairs}))
    return specs


def normalize_strategies(strategies: Any) -> list[tuple[str | None, Any]]:
    """Return each strategy as `Engine` takes it, with its name if the caller gave one.

    Args:
        strategies: Text for `parse_strategies`, or a list of such texts, `use(...)`, instances, functions of the task
            and lists of steps; or a mapping from names to these.

    Raises:
        UsageError: A strategy is an iterator, which can be read only once.
    """
    if isinstance(strategies, Mapping):
        named: list[tuple[str | None, Any]] = [(str(name), _parse_single(each)) for name, each in strategies.items()]
    else:
        several = strategies if isinstance(strategies, (list, tuple)) else [strategies]
        named = [(None, each) for one in several for each in (parse_strategies(one) if isinstance(one, str) else [one])]
    for _, each in named:
        if isinstance(each, Iterator):
            raise UsageError(
                f"a strategy is a {type(each).__name__}, which can be read only once",
                why="every seed reads its steps again",
                fix="pass the function itself, or a list of steps",
            )
    return named


def build_candidates(strategies: Sequence[tuple[str | None, Any]], specs: Sequence[ComponentSpec]) -> list[Candidate]:
    """Return the candidates, each with a unique name and directory.

    Args:
        strategies: The result of `normalize_strategies`.
        specs: Each strategy as the configuration records it, with all options.

    Raises:
        UsageError: Two candidates have the same name.
    """
    candidates: list[Candidate] = []
    for (name, strategy), use in zip(strategies, specs, strict=True):
        label = name or _candidate_name(use, strategy)
        if any(label == other.name for other in candidates):
            raise UsageError(
                f"two candidates are named '{label}'",
                where="--strategies",
                fix='remove one, or name them in Python: compare({"one": ..., "other": ...})',
            )
        candidates.append(
            Candidate(label, _unique_dir_name(label, {other.dir_name for other in candidates}), strategy, use)
        )
    return candidates


def choose_baseline(baseline: str | None, names: Sequence[str]) -> str:
    """Return the name of the baseline: the requested candidate, or the first.

    Raises:
        UnknownNameError: No candidate has that name.
    """
    if baseline is not None and baseline not in names:
        raise UnknownNameError(
            f"no candidate is named '{baseline}'", where="--baseline", fix=suggest_name(baseline, names)
        )
    return baseline if baseline is not None else names[0]


def _parse_single(strategy: Any) -> Any:
    if not isinstance(strategy, str):
        return strategy
    specs = parse_strategies(strategy)
    if len(specs) != 1:
        raise UsageError(f"'{strategy}' names {len(specs)} strategies instead of one", where="strategies")
    return specs[0]


def _candidate_name(spec: ComponentSpec, strategy: Any) -> str:
    """Return the name of the strategy with the options that differ from their default."""
    if is_object(spec.name):
        steps = strategy if isinstance(strategy, (list, tuple)) else [strategy]
        known = [each.name for each in steps if isinstance(each, (Phase, HeadFit, Diagnosis, WeightAverage))]
        unnamed = "steps" if isinstance(strategy, (list, tuple)) else type(strategy).__name__
        return "+".join(known) or str(getattr(strategy, "__name__", unnamed))
    if not spec.options:
        return spec.name
    options = get_options(registry.load_component(registry.find_component("finetune_strategy", spec.name)))
    changed = [(options[name], value) for name, value in spec.options.items() if value != options[name].default]
    return ":".join([spec.name, *(f"{option.key}={_format_value(value)}" for option, value in changed)])


def _format_value(value: Any) -> str:
    """Return the value of an option in the syntax of `parse_strategies`."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_format_value, value))}]"
    if isinstance(value, Mapping):
        return f"[{','.join(f'{key}={_format_value(item)}' for key, item in value.items())}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _unique_dir_name(name: str, used_names: Iterable[str]) -> str:
    """Return a directory name for a candidate that differs from `used_names`, even where case does not count."""
    plain = _UNSAFE.sub("-", name).strip("-.")[:_MAX_DIR_NAME_LENGTH] or "candidate"
    known = {each.casefold() for each in (*used_names, "soup")}
    tries = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(known) + 2))
    return next(each for each in tries if each.casefold() not in known)
