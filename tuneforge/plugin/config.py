"""The configuration of a run: defaults, updated by a TOML file, updated by flags; resolved once and immutable."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from tuneforge.errors import UnknownNameError, UsageError, suggest_name
from tuneforge.plugin.declaration import Check, build_component, component, ge, get_options, option
from tuneforge.plugin.steps import ComponentSpec

SINGLE_COMPONENT_KEYS = {
    "data": "data_prepare", "model": "model_adapt", "loss": "train_step", "strategy": "finetune_strategy",
    "schedule": "lr_schedule", "optimizer": "optimizer",
}  # fmt: skip
"""Keys that name one component, with its entry-point group."""

REPEATABLE_COMPONENT_KEYS = {
    "adapt": "model_adapt",
    "metrics": "evaluate",
    "callback": "callback",
    "augment": "augment",
}
"""Keys that name any number of components, with their entry-point group."""

GROUP_BY_KEY = {**SINGLE_COMPONENT_KEYS, **REPEATABLE_COMPONENT_KEYS}

_BUDGET_PATTERN = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)|(\d+)(epoch|step)s?")
_SECONDS_PER_UNIT = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_budget(text: str) -> tuple[str, float]:
    """Return the unit of a budget (`seconds`, `epochs` or `steps`) and the amount.

    Raises:
        ValueError: The text is not a budget.
    """
    found = _BUDGET_PATTERN.fullmatch(text)
    if found is None or not float(found[1] or found[3]):
        raise ValueError(text)
    return ("seconds", float(found[1]) * _SECONDS_PER_UNIT[found[2]]) if found[1] else (f"{found[4]}s", float(found[3]))


def _is_budget(text: str) -> bool:
    try:
        return bool(parse_budget(text))
    except ValueError:
        return False


_BUDGET_CHECK = Check(
    "a number above 0 with its unit, such as 60s, 5m, 2h, 20epochs or 500steps",
    _is_budget,
    {"pattern": f"^({_BUDGET_PATTERN.pattern})$"},
)


@component(api=1)
class Settings:
    """The settings of a run besides its components."""

    batch_size: int | None = option(
        default=None,
        help="Batch size of training; by default 32, and down to 8 for fewer than 640 training samples.",
        check=ge(1),
    )
    eval_batch_size: int | None = option(default=None, help="Batch size of evaluation; 256 if not set.", check=ge(1))
    grad_accum_steps: int = option(default=1, help="Gradient accumulation: batches per optimizer step.", check=ge(1))
    micro_batch: int | None = option(
        default=None,
        help="Samples per forward and backward pass; by default the batch size, halved each time memory runs out.",
        check=ge(1),
    )
    on_nan: Literal["halt", "skip", "rollback"] = option(
        default="halt",
        help="If a loss or gradient is NaN or Inf: halt the run, skip the step, or roll back to the start of the epoch "
        "and halve the learning rate.",
    )
    seed: int = option(default=0, help="Seed of splits, shuffling, augmentation and initialization.", check=ge(0))
    data_seed: int | None = option(
        default=None,
        help="Seed of splits and generated data; by default --seed. Set it to compare other seeds on the same data.",
        check=ge(0),
    )
    device: str = option(default="auto", help="auto, cpu, cuda, cuda:1, mps, xla or any other torch device.")
    num_workers: int = option(default=0, help="Worker processes that load data that is not in memory.", check=ge(0))
    precision: Literal["fp32", "bf16"] = option(default="fp32", help="Precision of the forward pass (autocast).")
    compile: bool = option(
        default=False, help="Use torch.compile for the forward pass of each phase; results are not bit-identical."
    )
    shard: bool = option(
        default=False,
        help="Shard weights and optimizer state over the ranks of torchrun (FSDP2), for models that do not fit on one "
        "device.",
    )
    memory_format: Literal["auto", "contiguous", "channels-last"] = option(
        default="auto", help="Memory format of 4-D tensors; auto: channels-last if the model has 4-D weights."
    )
    cache: Literal["auto", "memory", "off"] = option(
        default="auto",
        help="Cache the features of the frozen backbone where that saves time; auto: in memory and on disk, where "
        "runs share them.",
    )
    cache_mb: int = option(
        default=2048, help="Memory of the feature cache, in MB; the rest is memory-mapped.", check=ge(0)
    )
    cache_disk_mb: int = option(
        default=10_240,
        help="Disk space of the feature cache, in MB; the least recently used entries are removed.",
        check=ge(0),
    )
    cache_dir: Path | None = option(
        default=None, help="Directory of the feature cache; by default the user's cache directory."
    )
    cache_copies: int = option(
        default=4,
        help="Augmented copies of each sample that are cached for a phase with a frozen backbone.",
        check=ge(1),
    )
    budget: str | None = option(
        default=None,
        help="Stop training after 60s, 5m, 2h, 20epochs or 500steps, for example; by default no limit.",
        check=_BUDGET_CHECK,
    )
    checkpoint_s: float = option(default=60.0, help="Seconds between checkpoints.", check=ge(0))
    checkpoint_steps: int | None = option(
        default=None,
        help="Also save a checkpoint after this many optimizer steps; by default only by time.",
        check=ge(1),
    )
    keep: int = option(
        default=2,
        help="Number of checkpoints to keep, besides the best one and those in which you create a file named 'pinned'.",
        check=ge(1),
    )
    refit: bool | None = option(
        default=None,
        help="Train again from the initial weights on training and validation samples, by the choices that were made; "
        "val metrics are from before. By default freeze-then-unfreeze, adaptive and auto do, for up to 10,000 samples.",
    )
    page: bool = option(default=True, help="Write report.html at the end of the run.")
    out: Path | None = option(default=None, help="Run directory; by default a new one under runs/.")


@attrs.frozen(kw_only=True, eq=True)
class RunConfig(Settings):
    """Everything that determines a run.

    Args:
        data: The data source.
        model: The component that builds the model.
        adapt: Adapters that change the model, in order.
        loss: The loss; None is the default of the targets.
        metrics: The metrics; empty is the default of the targets.
        strategy: The fine-tuning strategy.
        callbacks: Callbacks (`--callback`).
        augment: Random augmentations of training inputs, in order.
        schedule: The learning rate schedule, which replaces that of the strategy; None keeps it.
        optimizer: The optimizer, which replaces that of the strategy; None keeps it (by default adamw).
    """

    data: ComponentSpec = ComponentSpec("digits")
    model: ComponentSpec = ComponentSpec("digit-cnn")
    adapt: tuple[ComponentSpec, ...] = ()
    loss: ComponentSpec | None = None
    metrics: tuple[ComponentSpec, ...] = ()
    strategy: ComponentSpec = ComponentSpec("freeze-then-unfreeze")
    callbacks: tuple[ComponentSpec, ...] = ()
    augment: tuple[ComponentSpec, ...] = ()
    schedule: ComponentSpec | None = None
    optimizer: ComponentSpec | None = None

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON values, by Python name."""
        values = {name: getattr(self, name) for name in get_options(Settings)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a configuration file and check its keys.

    Raises:
        UsageError: The file cannot be read, is not TOML, or has an unknown key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"cannot read '{path}'", where="--config", why=error.strerror or str(error), fix="check the path"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not TOML", where="--config", why=str(error), fix="correct that line") from None
    for key in table:
        check_key(key, where=str(path))
    return table


def check_key(key: str, *, where: str) -> None:
    """Raise an error for a key that no configuration has.

    Raises:
        UnknownNameError: The key is unknown; the message suggests the nearest one.
    """
    known = [*GROUP_BY_KEY, *(each.key for each in get_options(Settings).values())]
    if key.replace("_", "-") not in known:
        raise UnknownNameError(f"unknown key '{key}'", where=where, fix=suggest_name(key, known))


def merge_config(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Update a file's table by flags; a flag that names another component drops the file's options of that key."""
    table = {key.replace("_", "-"): value for key, value in file.items()}
    for key, value in flags.items():
        if key in SINGLE_COMPONENT_KEYS:
            table[key] = _merge_entry(_to_entry(table.get(key), where=key), _to_entry(value, where=key))
        elif key in REPEATABLE_COMPONENT_KEYS:
            table[key] = _merge_entries(table.get(key, ()), value, key)
        else:
            table[key] = value
    return table


def resolve_config(table: Mapping[str, Any], *, where: str = "") -> RunConfig:
    """Build the configuration that a table of settings and components describes.

    Args:
        table: A table as in a file: `{"seed": 1, "strategy": {"name": "full", "epochs": 3}}`; a component may also be
            a name.
        where: The source that error messages name.

    Raises:
        UnknownNameError: A key is unknown.
        OptionError: A setting's value has the wrong type or range.
    """
    for key in table:
        check_key(key, where=where)
    plain_settings = {key: value for key, value in table.items() if key not in GROUP_BY_KEY}
    settings = build_component(Settings, plain_settings, where=where or "--")
    chosen: dict[str, Any] = {
        key: _to_spec(table[key], key, default_name(key)) for key in SINGLE_COMPONENT_KEYS if key in table
    }
    for key in REPEATABLE_COMPONENT_KEYS:
        chosen["callbacks" if key == "callback" else key] = tuple(
            _to_spec(each, key, None) for each in table.get(key, ())
        )
    return RunConfig(**{name: getattr(settings, name) for name in get_options(Settings)}, **chosen)


def default_name(key: str) -> str | None:
    """Return the default component of a key, or None."""
    default = attrs.fields_dict(RunConfig)[key].default
    return default.name if default is not None else None


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the table from which `resolve_config` builds an equal configuration; None values are omitted."""
    names = {each.name: each.key for each in get_options(Settings).values()}
    table: dict[str, Any] = {names[name]: value for name, value in config.settings().items() if value is not None}
    for key in SINGLE_COMPONENT_KEYS:
        chosen = getattr(config, key)
        if chosen is not None:
            table[key] = _spec_to_dict(chosen)
    for key in REPEATABLE_COMPONENT_KEYS:
        chosen = config.callbacks if key == "callback" else getattr(config, key)
        if chosen:
            table[key] = [_spec_to_dict(each) for each in chosen]
    return table


def config_to_toml(config: RunConfig) -> str:
    """Return the configuration as a TOML file."""
    import tomli_w

    return tomli_w.dumps(config_to_dict(config))


def list_component_entries(value: Any) -> list[dict[str, Any]]:
    """Return the components of a key as tables with a name; the value may also be one name or one table."""
    items = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return [dict(item) if isinstance(item, Mapping) else {"name": item} for item in items]


def _spec_to_dict(chosen: ComponentSpec) -> dict[str, Any]:
    options = {key.replace("_", "-"): _to_toml_value(value) for key, value in chosen.options.items()}
    return {"name": chosen.name, **options}


def _to_toml_value(value: Any) -> Any:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return {key: _to_toml_value(item) for key, item in value.items()}
    return [_to_toml_value(item) for item in value] if isinstance(value, tuple) else value


def _to_entry(value: Any, *, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping):
        return dict(value)
    raise UsageError(f"'{where}' must be a name or a table with a name", where=where, why=f"it is {value!r}")


def _merge_entry(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    same = high.get("name") in (None, low.get("name"))
    kept = {key.replace("_", "-"): value for key, value in low.items()} if same else {}
    return {**kept, **{key.replace("_", "-"): value for key, value in high.items()}}


def _merge_entries(low: Any, high: Any, key: str) -> list[dict[str, Any]]:
    """Append the components of flags to those of the file; options of the same component are updated."""
    out = [_to_entry(each, where=key) for each in low]
    for each in (_to_entry(value, where=key) for value in high):
        place = next((index for index, known in enumerate(out) if known.get("name") == each.get("name")), None)
        if place is None:
            out.append(each)
        else:
            out[place] = _merge_entry(out[place], each)
    return out


def _to_spec(value: Any, key: str, default: str | None) -> ComponentSpec:
    if isinstance(value, ComponentSpec):
        return value
    table = _to_entry(value, where=key)
    name = table.pop("name", default)
    if not isinstance(name, str):
        raise UsageError(f"[{key}] has options but no name", where=key, fix=f'add: name = "..." under [{key}]')
    return ComponentSpec(name, table)
