"""`plan-file`: strategy steps in a TOML file.

A file holds one `[[step]]` table per step, in order. `kind` is phase, head-fit, diagnosis or weight-average, and the
other keys are the fields of that step, with dashes; an omitted key has the default of the step. A schedule or an
optimizer is a name, or a table of its name and options.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from tuneforge import (
    Diagnosis,
    HeadFit,
    OptionError,
    Phase,
    UnknownNameError,
    UsageError,
    WeightAverage,
    component,
    hookimpl,
    option,
)
from tuneforge.errors import suggest_name
from tuneforge.plugin import ComponentSpec, StrategyStep

STEP_CLASS_BY_KIND: dict[str, type[StrategyStep]] = {
    "phase": Phase,
    "head-fit": HeadFit,
    "diagnosis": Diagnosis,
    "weight-average": WeightAverage,
}
"""Classes of steps by `kind`."""


@component(api=1)
class PlanFile:
    """Run the steps that a TOML file lists.

    A file has a `[[step]]` table for each step, in order:

        [[step]]
        kind = "head-fit"           # or phase, diagnosis, weight-average
        name = "head"

        [[step]]
        kind = "phase"
        name = "all"
        train = ["all", "!norms"]   # a selector or a list of them
        epochs = 5
        lr = 1e-4
        layer-decay = 0.75
        schedule = {name = "cosine", warmup = 0.2}
        patience = 2
        restore-best = true

    Every field of a step may be given. `refit = true`, before the steps, repeats them on training and
    validation samples at the end, unless `--refit` says otherwise. `tuneforge run --dry-run` writes such a file for
    any strategy, and `tuneforge report RUN --export-strategy` writes the steps of a finished run.
    """

    path: Path = option(help="The plan, a TOML file.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """Return the steps of the file.

        Raises:
            UsageError: The file cannot be read or is not a plan; the message names step and key.
        """
        return read_plan(self.path)

    @property
    def refits(self) -> bool:
        """True where the file asks for a refit."""
        return bool(_read_table(self.path).get("refit", False))


def read_plan(path: Path) -> list[StrategyStep]:
    """Return the steps of a plan file.

    Raises:
        UsageError: The file cannot be read, is not TOML, has no steps or two of one name, or averages a later snapshot.
        UnknownNameError: A key or a kind of step does not exist.
        OptionError: A value is invalid.
    """
    steps: list[StrategyStep] = []
    for number, entry in enumerate(_read_entries(path), start=1):
        step = _parse_step(entry, f"{path}, step {number}" + (f" '{entry['name']}'" if "name" in entry else ""))
        _check_references(step, ["start", *(each.name for each in steps)], f"{path}, step {number} '{step.name}'")
        steps.append(step)
    return steps


def format_plan(
    steps: Iterable[StrategyStep],
    *,
    heading: Iterable[str] = (),
    describe: Callable[[StrategyStep], str],
    refit: bool = False,
) -> str:
    """Return the text of a plan file that `read_plan` turns into equal steps; default values are omitted.

    Args:
        steps: In order.
        heading: Lines of the comment at the top.
        describe: Returns a sentence about a step, for the comment above it.
        refit: Whether the plan asks for a refit.
    """
    import tomli_w

    parts = ["".join(f"# {_strip_for_comment(line)}\n" for line in heading)]
    parts += ["refit = true\n"] if refit else []
    for number, step in enumerate(steps, start=1):
        table = tomli_w.dumps({"step": step_to_dict(step)}).removeprefix("[step]")
        parts.append(f"# {number}. {_strip_for_comment(describe(step))}\n[[step]]{table}")
    return "\n".join(part for part in parts if part)


def step_to_dict(step: StrategyStep) -> dict[str, Any]:
    """Return the TOML table of a step."""
    entry: dict[str, Any] = {"kind": next(kind for kind, cls in STEP_CLASS_BY_KIND.items() if type(step) is cls)}
    for field in attrs.fields(type(step)):
        value = getattr(step, field.name)
        if field.name in ("name", "train", "lr") or value != _get_default(field):
            entry[_to_key(field.name)] = _to_toml_value(value)
    if isinstance(step, Phase) and len(step.train) == 1:
        entry["train"] = step.train[0]
    return entry


def _read_table(path: Path) -> dict[str, Any]:
    """Return the content of a plan file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"cannot read the plan '{path}'", where="--strategy.path", why=error.strerror or str(error),
            fix="check the path; tuneforge run --dry-run writes a plan to start from",
        ) from None  # fmt: skip
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not TOML", where="--strategy.path", why=str(error), fix="correct it") from None


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """Return the tables of the steps, before their keys are checked."""
    table = _read_table(path)
    if not isinstance(table.get("refit", False), bool):
        raise OptionError(
            f"{table['refit']!r} is not a valid value for 'refit'", where=str(path), why="it must be true or false",
            fix="change it, or leave the line out",
        )  # fmt: skip
    for key in table:
        if key not in ("step", "refit"):
            raise UnknownNameError(
                f"a plan has no key '{key}'", where=str(path), why="it holds [[step]] tables, and refit",
                fix=f"{suggest_name(key, ['step', 'refit'])} settings of the run go into a --config file",
            )  # fmt: skip
    entries = table.get("step", [])
    if not entries or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"'{path}' lists no steps", where="--strategy.path", fix="begin each step with [[step]]")
    return entries


def _parse_step(entry: Mapping[str, Any], where: str) -> StrategyStep:
    """Return the step that a table describes."""
    fields = {key.replace("-", "_"): value for key, value in entry.items()}
    kind = fields.pop("kind", None)
    if kind is None:
        raise OptionError("a step needs the key 'kind'", where=where, fix=f"say which: {', '.join(STEP_CLASS_BY_KIND)}")
    if not isinstance(kind, str) or kind not in STEP_CLASS_BY_KIND:
        raise UnknownNameError(
            f"there is no step of kind {kind!r}", where=where, fix=suggest_name(str(kind), STEP_CLASS_BY_KIND)
        )
    cls = STEP_CLASS_BY_KIND[kind]
    known = {_to_key(field.name): field for field in attrs.fields(cls)}
    for key in (_to_key(name) for name in fields):
        if key not in known:
            raise UnknownNameError(f"a {kind} has no key '{key}'", where=where, fix=suggest_name(key, known))
    for key, field in known.items():
        if field.default is attrs.NOTHING and field.name not in fields:
            raise OptionError(f"a {kind} needs the key '{key}'", where=where, fix=f"add a line: {key} = ...")
    values = {name: _parse_value(name, value, where) for name, value in fields.items()}
    try:
        return cls(**values)
    except UsageError as error:
        raise OptionError(error.what, where=where, why=error.why, fix="change it in the file") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise OptionError(f"a value of this {kind} is invalid", where=where, why=str(error)) from None


def _parse_value(name: str, value: Any, where: str) -> Any:
    """Return the value of a field from its TOML value.

    Raises:
        OptionError: The TOML value has the wrong type.
    """
    words, fits = _FIELD_RULES.get(name, ("anything", lambda value: True))
    if not fits(value):
        raise OptionError(
            f"{value!r} is not a valid value for '{_to_key(name)}'", where=where, why=f"it must be {words}",
            fix="change it, or leave the line out for the default",
        )  # fmt: skip
    if name in ("schedule", "optimizer") and isinstance(value, Mapping):
        options = {key.replace("-", "_"): item for key, item in value.items() if key != "name"}
        return ComponentSpec(value["name"], options)
    return value


def _check_references(step: StrategyStep, known: list[str], where: str) -> None:
    if step.name in known:
        raise UsageError(
            f"the name '{step.name}' is taken", where=where,
            why="a weight average and the report refer to a step by its name, and 'start' names the starting weights",
            fix="give each step its own name",
        )  # fmt: skip
    for name in step.snapshots if isinstance(step, WeightAverage) else ():
        if name not in known:
            what = f"there is no earlier step '{name}' to average"
            raise UnknownNameError(what, where=where, fix=suggest_name(name, known))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_factors(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


_TEXT = ("text", _is_text)
_COMPONENT = (
    "a name, or a table with a name",
    lambda v: _is_text(v) or (isinstance(v, dict) and _is_text(v.get("name"))),
)
_BY_CLASS = ('"balanced", or a table of numbers by class', lambda value: value == "balanced" or _is_factors(value))
_FIELD_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("name", "monitor", "monitor_mode", "batchnorm_stats", "measure", "by", "why"), _TEXT),
    **dict.fromkeys(("schedule", "optimizer"), _COMPONENT),
    **dict.fromkeys(("class_weights", "sampling"), _BY_CLASS),
    "train": ("a selector, or a list of selectors", lambda value: _is_text(value) or _is_texts(value)),
    "snapshots": ("a list of names", _is_texts),
    "weights": ("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value))),
    "lr_scales": ("a table of numbers by selector", _is_factors),
    "mixture_weights": ("a table of weights by sample group", _is_factors),
    "batches": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
}
"""Type checks by field, for fields that the step does not check itself."""


def _strip_for_comment(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _to_key(name: str) -> str:
    return name.replace("_", "-")


def _get_default(field: attrs.Attribute[Any]) -> Any:
    default = field.default
    return getattr(default, "factory", lambda: default)()


def _to_toml_value(value: Any) -> Any:
    """Return the TOML value of a field. TOML has no null, so None becomes "none", which options read as None."""
    if isinstance(value, ComponentSpec):
        options = {_to_key(name): _to_toml_value(item) for name, item in value.options.items()}
        return {"name": value.name, **options} if options else value.name
    if isinstance(value, Mapping):
        return {key: _to_toml_value(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_to_toml_value(item) for item in value]
    return "none" if value is None else value
