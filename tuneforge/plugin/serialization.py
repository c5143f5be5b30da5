"""Plain data: what steps, answers and options are made of, and the JSON that keeps all of it."""

from __future__ import annotations

import copyreg
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, TypeVar

import attrs

from tuneforge.errors import UsageError

_SerializableT = TypeVar("_SerializableT", bound=type)
_SERIALIZABLE_CLASSES: dict[str, type] = {}
KEEP_KEY_ORDER = {"keeps_order": True}
"""Metadata of a field whose mapping keeps its order in JSON."""


def register_serializable(cls: _SerializableT) -> _SerializableT:
    """Register an attrs class as plain data, which JSON stores under the name of the class."""
    _SERIALIZABLE_CLASSES[cls.__name__] = cls
    return cls


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


# So that a step or a `ComponentSpec` can be copied and sent to another process, as scikit-learn does with the options
# of an estimator.
copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


def to_plain_data(value: Any) -> Any:
    """Convert to read-only plain data: tuples, read-only mappings, paths as text, and scalars as Python numbers.

    Raises:
        TypeError: `value` holds something that is not plain data, such as a model or a tensor of several elements.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if attrs.has(type(value)) and type(value) in _SERIALIZABLE_CLASSES.values():
        return value
    if isinstance(value, Mapping):
        return MappingProxyType({to_plain_data(key): to_plain_data(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(to_plain_data(item) for item in value)
    if isinstance(value, PurePath):
        return str(value)
    if getattr(value, "ndim", None) == 0:
        return to_plain_data(value.item())
    raise TypeError(f"{type(value).__name__} is not plain data")


def mapping_field(**metadata: Any) -> Any:
    """Return an attrs field for a mapping of plain data, empty by default."""
    return attrs.field(factory=dict, converter=to_plain_data, metadata=metadata)


def sort_keys(value: Any) -> Any:
    """Return plain data with all mappings sorted by key, recursively.

    The input of a strategy must not depend on whether the run was resumed. That includes the order of metrics, by which
    a strategy may break a tie.
    """
    value = to_plain_data(value)
    if isinstance(value, Mapping):
        names = sorted(value) if all(isinstance(key, str) for key in value) else list(value)
        return MappingProxyType({name: sort_keys(value[name]) for name in names})
    return tuple(map(sort_keys, value)) if isinstance(value, tuple) else value


def metrics_field() -> Any:
    """Return an attrs field for metrics by name, sorted (see `sort_keys`)."""
    return attrs.field(factory=dict, converter=sort_keys)


def to_json(value: Any) -> str:
    """Return one line of JSON from which `from_json` restores an equal value; equal values give equal text."""
    return json.dumps(_encode(to_plain_data(value)), sort_keys=True, allow_nan=False)


def from_json(text: str) -> Any:
    """Return the value that `to_json` wrote.

    Raises:
        UsageError: The text is not the JSON of a step or result.
    """

    try:
        return _decode(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("not the JSON of a strategy step or its result", where=text[:80], why=str(error)) from error


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if type(value) in _SERIALIZABLE_CLASSES.values():
        return {
            "$kind": type(value).__name__,
            **{each.name: _encode_field(value, each) for each in attrs.fields(type(value))},
        }
    if isinstance(value, Mapping):
        return _encode_mapping(value, keeps_order=False)
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _encode_field(value: Any, field: attrs.Attribute[Any]) -> Any:
    held = getattr(value, field.name)
    return _encode_mapping(held, keeps_order=True) if field.metadata.get("keeps_order") else _encode(held)


def _encode_mapping(value: Mapping[Any, Any], *, keeps_order: bool) -> dict[str, Any]:
    """Return a JSON object, or a list of pairs if keys are not plain text or the order counts."""
    plain_keys = all(isinstance(key, str) and not key.startswith("$") for key in value)
    if plain_keys and not (keeps_order and list(value) != sorted(value)):
        return {key: _encode(item) for key, item in value.items()}
    pairs = [[_encode(key), _encode(item)] for key, item in value.items()]
    return {"$map": pairs if keeps_order else sorted(pairs, key=lambda pair: json.dumps(pair, sort_keys=True))}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$map" in value:
        return MappingProxyType({_decode(key): _decode(item) for key, item in value["$map"]})
    if "$kind" in value:
        fields = {key: _decode(item) for key, item in value.items() if key != "$kind"}
        return _SERIALIZABLE_CLASSES[value["$kind"]](**fields)
    return MappingProxyType({key: _decode(item) for key, item in value.items()})
