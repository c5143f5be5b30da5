"""Who takes part in a race: strategies by name, with options, or as Python objects, each with a name of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from tuneforge.engine.session import from_objects as given
from tuneforge.errors import UnknownNameError, UsageError, close_match
from tuneforge.plugin import registry
from tuneforge.plugin.component import options_of
from tuneforge.plugin.steps import Blend, Fit, Phase, Probe, Use

SOUP = "greedy-soup"
"""Stands among the strategies for the average of the others' weights."""

_BETWEEN = re.compile(r",(?![^\[\]]*\])")
_OPTION = re.compile(r":(?=[A-Za-z][\w-]*=)")
_UNSAFE = re.compile(r"[^\w.=,+-]+")
_MOST_IN_A_NAME = 80


@attrs.frozen(eq=False)
class Entrant:
    """A strategy that takes part.

    Args:
        name: As the table shows it.
        folder: Of its runs, inside the race's.
        strategy: What the engine is given.
        use: How the configuration records it.
    """

    name: str
    folder: str
    strategy: Any
    use: Use


def parsed(text: str) -> list[Use]:
    """Strategies as a command line writes them: `lp-ft,full:lr=3e-4:epochs=20,wise-ft:weights=[0.5,1],mine:Name`.

    Commas part the strategies, each `:option=value` belongs to the one before it, and a list stands in brackets.
    """
    uses = []
    for each in filter(None, (part.strip() for part in _BETWEEN.split(text))):
        name, *options = _OPTION.split(each)
        pairs = (option.split("=", 1) for option in options)
        uses.append(Use(name, {key: value.removeprefix("[").removesuffix("]") for key, value in pairs}))
    return uses


def asked_for(strategies: Any) -> list[tuple[str | None, Any]]:
    """Each strategy as the engine takes it, with its name where the caller gave one.

    Args:
        strategies: Text as `parsed` takes it, or a list of such texts, `use(...)`, instances, functions of the brief
            and lists of steps; or a mapping of these by name.

    Raises:
        UsageError: One of them can be read only once.
    """
    if isinstance(strategies, Mapping):
        named: list[tuple[str | None, Any]] = [(str(name), _alone(each)) for name, each in strategies.items()]
    else:
        several = strategies if isinstance(strategies, (list, tuple)) else [strategies]
        named = [(None, each) for one in several for each in (parsed(one) if isinstance(one, str) else [one])]
    for _, each in named:
        if isinstance(each, Iterator):
            raise UsageError(
                f"a strategy of the race is {type(each).__name__}, which can be read only once",
                why="every seed begins it anew",
                fix="give the function itself, or a list of steps",
            )
    return named


def entered(named: Sequence[tuple[str | None, Any]], uses: Sequence[Use]) -> list[Entrant]:
    """The entrants, each with a name and a folder of its own.

    Args:
        named: As `asked_for` gives them.
        uses: How a configuration records each, its options complete.

    Raises:
        UsageError: Two have the same name.
    """
    entrants: list[Entrant] = []
    for (name, strategy), use in zip(named, uses, strict=True):
        label = name or _label(use, strategy)
        if any(label == other.name for other in entrants):
            raise UsageError(
                f"two entrants of the race are '{label}'",
                where="--strategies",
                fix='leave one out, or name them in Python: compare({"one": ..., "other": ...})',
            )
        entrants.append(Entrant(label, _folder(label, {other.folder for other in entrants}), strategy, use))
    return entrants


def baseline_of(asked: str | None, names: Sequence[str]) -> str:
    """The entrant that others are compared with: the one asked for, else the first.

    Raises:
        UnknownNameError: None has that name.
    """
    if asked is not None and asked not in names:
        raise UnknownNameError(f"no entrant is '{asked}'", where="--baseline", fix=close_match(asked, names))
    return asked if asked is not None else names[0]


def is_object(name: str) -> bool:
    """True for a recorded name that stands for a Python object, which no folder can hold."""
    return name.startswith(given.__name__)


def _alone(asked: Any) -> Any:
    if not isinstance(asked, str):
        return asked
    uses = parsed(asked)
    if len(uses) != 1:
        raise UsageError(f"'{asked}' is {len(uses)} strategies under one name", where="strategies")
    return uses[0]


def _label(use: Use, strategy: Any) -> str:
    """The strategy's name with those of its options that are not the default."""
    if is_object(use.name):
        steps = strategy if isinstance(strategy, (list, tuple)) else [strategy]
        known = [each.name for each in steps if isinstance(each, (Phase, Fit, Probe, Blend))]
        return "+".join(known) or str(getattr(strategy, "__name__", "steps"))
    if not use.options:
        return use.name
    options = options_of(registry.load(registry.find("finetune_strategy", use.name)))
    changed = [(options[name], value) for name, value in use.options.items() if value != options[name].default]
    return ":".join([use.name, *(f"{option.key}={_shown(value)}" for option, value in changed)])


def _shown(value: Any) -> str:
    """An option's value as `parsed` takes it."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return f"[{','.join(f'{key}={_shown(item)}' for key, item in value.items())}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _folder(name: str, taken: Iterable[str]) -> str:
    """A folder's name from an entrant's, unlike those that are taken, in small letters too."""
    plain = _UNSAFE.sub("-", name).strip("-.")[:_MOST_IN_A_NAME] or "entrant"
    known = {each.casefold() for each in (*taken, "soup")}
    tries = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(known) + 2))
    return next(each for each in tries if each.casefold() not in known)
