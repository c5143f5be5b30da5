"""What a resumed run must have in common with the run that was started; every difference is refused with a diff."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from tuneforge.engine.data.dataset import Data
from tuneforge.engine.model.fsdp import is_sharded
from tuneforge.engine.model.model import Model
from tuneforge.engine.model.module_state import full_state
from tuneforge.engine.session.run_log import describe_data, describe_modules
from tuneforge.engine.storage.atomic import nonfinite_to_none
from tuneforge.errors import DataError, UsageError
from tuneforge.plugin.config import RunConfig, config_to_dict
from tuneforge.plugin.config_conflicts import ConfigConflict, find_changes
from tuneforge.plugin.serialization import to_json
from tuneforge.plugin.steps import StrategyStep

SETTINGS_THAT_MAY_DIFFER = (
    "cache_dir", "checkpoint_s", "checkpoint_steps", "device", "keep", "num_workers", "page",
)  # fmt: skip
"""Settings that a resumed run may change: none of them decides the result, except that another device may give other
last bits, which the log says.
"""


_MAX_LINES = 8


def check_config(path: Path, recorded: Mapping[str, Any], config: RunConfig, names: Iterable[str]) -> list[str]:
    """Check the components and settings that are given again, and return the allowed differences as lines.

    Args:
        path: The run directory.
        recorded: The configuration in `run.json`.
        config: The configuration of the engine that resumes.
        names: The keywords of `Engine` that were given again.

    Raises:
        UsageError: One differs from that of the run.
    """
    keys = ["callback" if name == "callbacks" else name.replace("_", "-") for name in names]
    table = config_to_dict(config)
    changes = list(find_changes({**recorded, "out": str(path)}, {key: table.get(key) for key in keys}))
    allowed = [each for each in changes if _python_name(each) in SETTINGS_THAT_MAY_DIFFER]
    refused = [_format_change(each) for each in changes if each not in allowed]
    if refused:
        raise UsageError(
            "\n".join([f"the run in '{path}' was started with other components or settings", *refused]),
            where=str(path / "run.json"),
            why=f"a resumed run is the run that was started; only {', '.join(SETTINGS_THAT_MAY_DIFFER)} may differ",
            fix="leave these out, or start another run",
        )
    return [_format_change(each) for each in allowed]


def check_data(data: Data, record: Mapping[str, Any]) -> None:
    """Check that the data is that of the run.

    Args:
        data: What the resumed run has prepared.
        record: The content of `model.json`.

    Raises:
        DataError: Samples, their order or split, targets or preprocessing differ; the message names what does.
    """
    now = json.loads(json.dumps(nonfinite_to_none(describe_data(data))))
    differences = [
        *_compare_splits(record["splits"], now["splits"]),
        *(each for key in ("targets", "inputs", "sample_groups") for each in _compare(key, record[key], now[key])),
    ]
    if differences:
        raise DataError(
            "\n".join(["the data is not that of the stopped run", *(f"  {each}" for each in differences)]),
            where="model.json",
            why="the run would go on with other samples, and some that were trained on might be test samples now",
            fix="give the same data in the same order, or start another run",
        )


def check_model(model: Model, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check that the model is built like that of the run.

    Args:
        model: The model of the resumed run, before anything is restored.
        record: The content of `model.json`.
        tensors: The parameters and buffers in the checkpoint.

    Raises:
        UsageError: Modules, tensors or the parameters that the user froze differ.
    """
    own = {name: f"{tuple(each.shape)} {each.dtype}" for name, each in full_state(model.module).items()}
    saved = {name: f"{tuple(each.shape)} {each.dtype}" for name, each in tensors.items()}
    differences = list(_compare("tensor", saved, own))
    if not differences and record["modules"] is not None and not any(map(is_sharded, model.module.parameters())):
        differences += _compare_lines(record["modules"], describe_modules(model.module))
    differences += _compare("frozen by the user", record["frozen_by_user"], sorted(model.user_frozen))
    if differences:
        more = f"  and {len(differences) - _MAX_LINES} more" if len(differences) > _MAX_LINES else ""
        shown = [f"  {each}" for each in differences[:_MAX_LINES]]
        raise UsageError(
            "\n".join(["the model is not that of the stopped run", *shown, *([more] if more else [])]),
            where="--model",
            why="its weights, and what they compute, would not be those of the checkpoint",
            fix="build the same model, or start another run",
        )


def check_step(number: int, before: StrategyStep, now: StrategyStep | None) -> None:
    """Check that a strategy asks for the same step again; its reason may be reworded.

    Args:
        number: Of the step, counted from 1.
        before: The step of the stopped run.
        now: What the strategy asks for now; None if it has ended.

    Raises:
        UsageError: They differ; the message names the options that do.
    """
    differing = [
        field.name
        for field in attrs.fields(type(before))
        if field.name != "why"
        and (type(before) is not type(now) or _encode(before, field.name) != _encode(now, field.name))
    ]
    if differing:
        raise UsageError(
            f"strategy step {number}, '{before.name}', differs from that of the stopped run",
            where=f"before: {_format_options(before, now, differing)}",
            why=f"now: {_format_options(now, before, differing)}",
            fix="restore the strategy, or start another run",
        )


def check_plan(before: tuple[StrategyStep, ...], now: tuple[StrategyStep, ...]) -> None:
    """Check that a strategy whose steps are all known has the same steps again.

    Raises:
        UsageError: A step differs, is missing or is new.
    """
    for number, pair in enumerate(zip(before, now, strict=False), start=1):
        check_step(number, *pair)
    if len(before) != len(now):
        raise UsageError(
            f"the strategy has {len(now)} steps, and {len(before)} in the stopped run",
            where=f"before: {', '.join(each.name for each in before)}",
            why=f"now: {', '.join(each.name for each in now)}",
            fix="restore the strategy, or start another run",
        )


def _python_name(change: ConfigConflict) -> str:
    return change.key.removeprefix("--").replace("-", "_")


def _format_change(change: ConfigConflict) -> str:
    return f"  {attrs.evolve(change, key=_python_name(change))}"


def _encode(step: StrategyStep | None, name: str) -> str:
    value = getattr(step, name)
    return to_json(list(value.items()) if isinstance(value, Mapping) else value)  # the order of `lr_scales` counts


def _format_options(step: StrategyStep | None, other: StrategyStep | None, names: list[str]) -> str:
    if step is None:
        return "the strategy ends"
    if type(step) is not type(other):
        return f"{type(step).__name__} '{step.name}'"
    return ", ".join(f"{name}={getattr(step, name)!r}" for name in names)


def _compare_lines(before: list[str], now: list[str]) -> list[str]:
    changed = difflib.ndiff(before, now)
    return [f"{each[2:].strip()} {'in the run' if each[0] == '-' else 'now'}" for each in changed if each[0] in "-+"]


def _compare_splits(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*before, *now]):
        one, other = before.get(name), now.get(name)
        if one is None or other is None or one["samples"] != other["samples"]:
            had, has = (f"{each['samples']:,} samples" if each else "no such split" for each in (one, other))
            yield f"{name} split: {had} in the run, {has} now"
        else:
            differing = [part for part in ("inputs", "targets", "ids") if not _same_hashes(one[part], other[part])]
            if differing:
                yield f"{name} split: other {' and '.join(differing)}, or another order of the samples"


def _same_hashes(before: Any, now: Any) -> bool:
    """Return True unless what both sides know differs: each is a hash, a list of hashes of chunks, or None."""
    if isinstance(before, list) and isinstance(now, list):
        return all(one == other for one, other in zip(before, now, strict=False))
    return type(before) is not type(now) or before == now


def _compare(key: str, before: Any, now: Any) -> Iterator[str]:
    """Yield a line for each leaf of nested plain data that differs; of two lists only the first place."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from _compare(f"{key}.{name}", before.get(name), now.get(name))
    elif isinstance(before, list) and isinstance(now, list):
        pairs = enumerate(itertools.zip_longest(before, now))
        yield from itertools.islice((each for index, pair in pairs for each in _compare(f"{key}[{index}]", *pair)), 1)
    elif before != now:
        yield f"{key}: {before!r} in the run, {now!r} now"
