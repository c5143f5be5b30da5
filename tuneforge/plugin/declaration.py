"""Declaration of components and their options, from which help, parsing, JSON Schema and checks are derived."""

from __future__ import annotations

import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import attrs

from tuneforge.errors import OptionError, UnknownNameError, suggest_name

API_VERSION = 1
"""The version of the plugin API that this tuneforge supports."""

_CHECK_KEY, _HELP_KEY = "tuneforge_check", "tuneforge_help"
RESERVED_NAMES = frozenset({"name"})  # the key that names the component in a configuration file

C = TypeVar("C", bound=type)


@attrs.frozen
class Check:
    """A rule for the value of an option, as text and as JSON Schema.

    Args:
        text: Completes the sentence "must be ...".
        test: Returns True for a valid value.
        schema: The same rule as JSON Schema.
    """

    text: str
    test: Callable[[Any], bool]
    schema: Mapping[str, Any] = attrs.field(factory=dict)


def gt(low: float) -> Check:
    """Return a check for values greater than `low`."""
    return Check(f"greater than {low}", lambda value: bool(value > low), {"exclusiveMinimum": low})


def ge(low: float) -> Check:
    """Return a check for values of at least `low`."""
    return Check(f"at least {low}", lambda value: bool(value >= low), {"minimum": low})


def between(low: float, high: float) -> Check:
    """Return a check for values from `low` to `high`, both included."""
    return Check(f"from {low} to {high}", lambda value: bool(low <= value <= high), {"minimum": low, "maximum": high})


def option(*, default: Any = attrs.NOTHING, help: str, check: Check | None = None) -> Any:  # noqa: A002 - click's word
    """Declare an option of a component: `lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))`.

    Arguments are keyword-only, because type checkers see from them which options have a default.

    Args:
        default: The default value; an option without one is required.
        help: One sentence for `--help`, the documentation and the schema.
        check: A rule besides the type, such as `gt(0)`; it is not applied to None.
    """
    return attrs.field(default=default, validator=_validate, metadata={_HELP_KEY: help, _CHECK_KEY: check})


@typing.dataclass_transform(field_specifiers=(option,), frozen_default=True, kw_only_default=True, eq_default=False)
def component(*, api: int, observer: bool = False) -> Callable[[C], C]:
    """Turn a class into a component: its annotated `option(...)` fields become read-only keyword arguments.

    Instances compare by identity, because pluggy stores plugins in sets. State that a component needs during a run
    belongs in `run.state(self)`, which checkpoints save.

    Args:
        api: The version of the plugin API that the class was written for; at present `1`.
        observer: True for a component that only observes, such as one that sends metrics to a server: an error in one
            of its hooks is logged once, with its cause, and the run goes on. It may implement no hook that returns
            something, and wrap none.

    Raises:
        OptionError: A field is not declared with `option`, or has a reserved name.
    """

    def decorate(cls: C) -> C:
        made: C = attrs.define(cls, frozen=True, eq=False, kw_only=True, slots=False, repr=True)
        for field in attrs.fields(made):
            if _HELP_KEY not in field.metadata or field.name in RESERVED_NAMES:
                raise OptionError(
                    f"field '{field.name}' of component {cls.__qualname__} is not a valid option",
                    why=f"fields are declared with option(...), and {sorted(RESERVED_NAMES)} are reserved",
                    fix=f"write: {field.name}: TYPE = option(default=DEFAULT, help='...')",
                )
        made.__tuneforge_api__ = api  # type: ignore[attr-defined]  # read by the registry at load
        made.__tuneforge_observer__ = observer  # type: ignore[attr-defined]  # read when its hooks are registered
        return made

    return decorate


@attrs.frozen
class Option:
    """An option of a component, for help, schema and parsing.

    Args:
        name: The Python name, such as `head_epochs`.
        type: The resolved annotation.
        default: The default value; `attrs.NOTHING` if the option is required.
        help: One sentence.
        check: A rule besides the type, or None.
    """

    name: str
    type: Any
    default: Any
    help: str
    check: Check | None

    @property
    def key(self) -> str:
        """The name on the command line and in files, such as `head-epochs`."""
        return self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """True if there is no default."""
        return self.default is attrs.NOTHING


def get_options(cls: type) -> dict[str, Option]:
    """Return the options of a component class by Python name, in order of declaration."""
    hints = _get_type_hints(cls)
    return {
        field.name: Option(
            name=field.name,
            type=hints[field.name],
            default=field.default,
            help=field.metadata[_HELP_KEY],
            check=field.metadata[_CHECK_KEY],
        )
        for field in attrs.fields(cls)
        if _HELP_KEY in field.metadata
    }


def get_option_values(instance: Any) -> dict[str, Any]:
    """Return the option values of an instance by Python name, as plain data (paths as text)."""
    values = {name: getattr(instance, name) for name in get_options(type(instance))}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def build_component(cls: type, values: Mapping[str, Any], *, where: str) -> Any:
    """Construct a component from option values of a user.

    Args:
        cls: A class made by `component`.
        values: Values by option name, with dashes or underscores. Text is parsed to the type of the option.
        where: The source that error messages name, such as `--strategy`; `--` for flags without a prefix.

    Raises:
        UnknownNameError: The component has no such option.
        OptionError: A value has the wrong type or range, or a required option is missing.
    """
    known = get_options(cls)
    parsed = {}
    for key, value in values.items():
        found = find_option(known, key, where=_option_path(where, key), owner=cls.__name__)
        parsed[found.name] = parse_option(found, value, where=_option_path(where, found.key))
    for missing in (each for each in known.values() if each.required and each.name not in parsed):
        spot = _option_path(where, missing.key)
        raise OptionError(
            f"{spot} is required", why=missing.help, fix=f"give {spot}" + ("" if spot.endswith(")") else " VALUE")
        )
    return cls(**parsed)


def find_option(known: Mapping[str, Option], key: str, *, where: str, owner: str) -> Option:
    """Return the option that `key` names, with dashes or underscores.

    Raises:
        UnknownNameError: There is no such option; the message suggests the nearest one.
    """
    found = known.get(key.replace("-", "_"))
    if found is None:
        raise UnknownNameError(
            f"{owner} has no option '{key}'", where=where, fix=suggest_name(key, [each.key for each in known.values()])
        )
    return found


def parse_option(declared: Option, value: Any, *, where: str) -> Any:
    """Convert a value from the command line, a file or Python to the type of the option, and check it.

    Raises:
        OptionError: The value cannot be converted without loss, or breaks the rule of the option.
    """
    try:
        converted = _convert(value, declared.type)
    except (ValueError, TypeError):
        raise OptionError(
            f"{value!r} is not a valid value for '{declared.key}'",
            where=where,
            why=f"it must be of type: {describe_type(declared.type)}",
            fix=_suggest_fix(declared, where),
        ) from None
    if declared.check is not None and converted is not None and not declared.check.test(converted):
        raise OptionError(
            f"{value!r} is out of range for '{declared.key}'",
            where=where,
            why=f"it must be {declared.check.text}",
            fix=_suggest_fix(declared, where),
        )
    return converted


def _suggest_fix(declared: Option, where: str) -> str:
    shown = where.startswith("--") and not declared.required and declared.default not in (None, (), {})
    example = f", for example {where} {declared.default}" if shown else ""
    return f"give a valid value{example}; the option means: {declared.help}"


def build_json_schema(cls: type) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the options of a component in a configuration file."""
    known = get_options(cls)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": cls.__name__,
        "description": (cls.__doc__ or "").strip().partition("\n")[0],
        "type": "object",
        "properties": {each.key: _property_schema(each) for each in known.values()},
        "required": [each.key for each in known.values() if each.required],
        "additionalProperties": False,
    }


def describe_type(annotation: Any) -> str:
    """Describe a type to a user: `integer`, `number`, `one of 'a', 'b'`, `list of text`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if arg is type(None) else describe_type(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"list of {describe_type(args[0])}"
    if origin in (dict, Mapping):
        return f"table of {describe_type(args[1])} (key=value,...)"
    words = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _option_path(where: str, key: str) -> str:
    """Return how a user gives an option: `--data.path`, or `use("image-folder", path=...)` in Python."""
    if where.startswith("use("):
        return f"{where[:-1]}, {key.replace('-', '_')}=...)"
    return where + key if where.endswith("-") else f"{where}.{key}"


@functools.cache
def _get_type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _validate(instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
    """Apply the rules of flags and files to constructor calls from Python."""
    declared = get_options(type(instance))[field.name]
    converted = parse_option(declared, value, where=f"{type(instance).__name__}({field.name}=...)")
    object.__setattr__(instance, field.name, converted)


def _convert(value: Any, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin is Literal:
        return _convert_literal(value, args)
    if origin is tuple:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else list(value)
        return tuple(_convert(item.strip() if isinstance(item, str) else item, args[0]) for item in items)
    if origin in (dict, Mapping):
        pairs = dict(part.split("=", 1) for part in value.split(",") if part) if isinstance(value, str) else value
        return {_convert(key, args[0]): _convert(item, args[1]) for key, item in dict(pairs).items()}
    return _convert_scalar(value, annotation)


def _convert_union(value: Any, args: tuple[Any, ...]) -> Any:
    if type(None) in args and (value is None or value == "none"):
        return None
    for arg in (arg for arg in args if arg is not type(None)):
        try:
            return _convert(value, arg)
        except (ValueError, TypeError):
            continue
    raise ValueError(value)


def _convert_literal(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if (value == choice and type(value) is type(choice)) or (isinstance(value, str) and value == str(choice)):
            return choice
    raise ValueError(value)


_BOOL_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _convert_scalar(value: Any, kind: Any) -> Any:
    if kind is bool:
        word = value.lower() if isinstance(value, str) else ""
        return (
            value
            if isinstance(value, bool)
            else _BOOL_WORDS[word]
            if word in _BOOL_WORDS
            else _raise_value_error(value)
        )
    if kind in (int, float) and isinstance(value, bool):
        return _raise_value_error(value)
    if kind is int:
        return int(value) if isinstance(value, (numbers.Integral, str)) else _raise_value_error(value)
    if kind is float:
        number = float(value) if isinstance(value, (numbers.Real, str)) else _raise_value_error(value)
        return _raise_value_error(value) if math.isnan(number) else number
    if kind is Path:
        return Path(value)
    return value if isinstance(value, kind) else _raise_value_error(value)


def _raise_value_error(value: Any) -> Any:
    raise ValueError(value)


def _property_schema(declared: Option) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": declared.help, **_type_schema(declared.type)}
    if declared.check is not None:
        schema.update(declared.check.schema)
    if not declared.required:
        schema["default"] = str(declared.default) if isinstance(declared.default, Path) else declared.default
    return schema


def _type_schema(annotation: Any) -> dict[str, Any]:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if arg is type(None) else _type_schema(arg) for arg in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        return {"type": "array", "items": _type_schema(args[0])}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _type_schema(args[1])}
    names = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "string"}
    return {"type": names[annotation]} if annotation in names else {}
