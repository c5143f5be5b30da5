"""The frozen prefix: whatever depends only on the input and on frozen parameters is computed once, and kept.

The model is cut by dataflow (`dataflow.py` beside this), and before anything is trusted, both parts composed are
compared with the model to the bit. Values at the border are computed in one fixed geometry, because bits differ with
the batch size; they are kept in memory or, past a budget, mapped from disk, where another run finds them by a key that
holds all they depend on (`store.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import map_inputs
from tuneforge.engine.feature_cache.extract import Filler, Prefix, Values, num_megabytes
from tuneforge.engine.feature_cache.graph_split import (
    Modes,
    NoPrefixError,
    Parts,
    UntraceableError,
    by_export,
    by_fx,
    parts_of,
)
from tuneforge.engine.model.freeze_check import same_bits
from tuneforge.engine.model.freezing import select, set_modes, untouched
from tuneforge.engine.model.model import answer_of, call

LEAST_WORK = 32.0
"""Multiplications of the prefix for each byte kept, under which recomputing is no dearer than fetching from memory."""

LEAST_WORK_DISK = 64.0
"""The same for fetching from disk."""


def kept_prefix(run: Run, plan: Modes, *, epochs: int, pause: Callable[[], None] = lambda: None) -> Prefix | None:
    """What a phase keeps of its frozen part; None, with the reason said, where it keeps nothing. See `prefix_of`."""
    try:
        prefix = prefix_of(run, plan, epochs=epochs, pause=pause)
    except NoPrefixError as why:
        run.note(f"  not cached: {why}")
        return None
    views = f", {prefix.views} augmented views each" if prefix.views else ""
    origin = "one look at the data" if prefix.computed else "found in the cache, so nothing is computed again"
    size = f"{num_megabytes(run, prefix):.1f} MB"
    run.note(f"  cached: what the frozen part gives for each sample{views}, {size}, {origin}")
    return prefix


def prefix_of(run: Run, plan: Modes, *, epochs: int, pause: Callable[[], None] = lambda: None) -> Prefix:
    """Split the model for a phase, and fill what is kept from the training and the validation split.

    Args:
        run: With the model frozen as the phase asks.
        plan: The modes of the phase.
        epochs: Epochs that the phase may take.
        pause: Is called between batches, and may save and stop the run.

    Raises:
        NoPrefixError: There is none, or it would not pay; nothing is changed.
        HaltError: What was found in the store is not what the model gives.
    """
    views = run.config.cache_views if run.augments else 0
    _refuse_without_looking(run, epochs, views)
    with untouched(run.model.module):
        prefix = Prefix(_checked_parts(run, plan), views=views)
    with untouched(run.model.module):
        run.model.module.eval()
        work = _measure(run, prefix)
        _refuse_what_does_not_pay(run, prefix, work, epochs)
        filler = Filler(run, prefix, pause, shared=work >= LEAST_WORK_DISK)
        filler.look_ahead(_later(run, prefix))
        val = filler.values("val", run.data.val, None)
        for view in range(max(1, views)):  # validation is not augmented, whatever the epoch
            prefix.kept[id(run.data.train), view] = filler.values("train", run.data.train, view)
            prefix.kept[id(run.data.val), view] = val
    return prefix


def _refuse_without_looking(run: Run, epochs: int, views: int) -> None:
    if run.config.cache == "off":
        raise NoPrefixError("--cache off")
    if run.sharded:
        raise NoPrefixError("--shard leaves each rank a part of the model")
    for use, part in zip(run.config.augment, run.augments, strict=True):
        if not getattr(part, "per_sample", False):
            raise NoPrefixError(f"augmentation '{use.name}' may look at more than one sample")
    if run.augments and epochs <= views:
        raise NoPrefixError(f"{epochs} epoch(s) of fresh augmentation cost no more than {views} kept views")
    for member in run.hooks.members:
        if getattr(member.component, "needs_inputs", False):
            raise NoPrefixError(f"{member.label} needs the inputs themselves")
    if any(each._forward_hooks or each._forward_pre_hooks for each in run.model.module.modules()):
        raise NoPrefixError("the model has forward hooks, which a traced part would not call")


def _checked_parts(run: Run, plan: Modes) -> Parts:
    """The model in two parts that agree with the whole to the bit and keep samples apart; fx first, then export."""
    reason: NoPrefixError | None = None
    for by in (by_fx, by_export):
        try:
            parts = parts_of(run.model.module, run.example, plan, by=by)
            _check(run, parts, plan)
            return parts
        except UntraceableError as error:
            reason = reason or error
        except NoPrefixError:
            raise
        except Exception as error:  # noqa: BLE001 - it runs the model's own code in parts, which may raise anything
            reason = reason or NoPrefixError(f"the model cannot be run in parts ({type(error).__name__})")
    assert reason is not None
    raise reason


def _check(run: Run, parts: Parts, plan: Modes) -> None:
    """See that both parts composed give what the whole gives, and that a sample's values are its own."""
    eval_plan = [(each, False) for each in run.model.module.modules()]
    first, second = (_rows_of(run.example, [place] * 3) for place in (0, 1))
    with torch.no_grad(), run.autocast():
        together = _same_in_parts(run, run.example, parts.head, parts.training, plan)
        alone = _same_in_parts(run, first, parts.head, parts.evaluating, eval_plan)  # of another batch size
        for place, values in enumerate((alone, call(parts.head, second))):
            if not all(_close(one[place], other[place]) for one, other in zip(together, values, strict=True)):
                raise NoPrefixError("the frozen part mixes samples")


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal but for what another batch size does to the last bits, measured by the largest of them."""
    largest = float(one.abs().nan_to_num(0, 0, 0).max()) if one.is_floating_point() else 0.0
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * largest, equal_nan=True)


def _same_in_parts(run: Run, inputs: Any, head: nn.Module, rest: nn.Module, modes: Modes) -> Values:
    set_modes(modes)
    run.reseed()
    whole = answer_of(call(run.model.module, inputs))
    run.reseed()
    values: Values = call(head, inputs)
    if not same_bits(whole, answer_of(rest(*values))):
        raise UntraceableError("the parts of the model do not give what the whole gives")
    return values


def _rows_of(example: Any, rows: list[int]) -> Any:
    return map_inputs(example, lambda tensor: tensor[rows])


def _measure(run: Run, prefix: Prefix) -> float:
    """Set the size of a sample's values, and give the multiplications that the prefix takes for each byte of them."""
    prefix.bytes_each, work = _cost(run, prefix.parts.head)
    return work


def _cost(run: Run, head: nn.Module) -> tuple[int, float]:
    """Bytes of a sample's values, and multiplications for each."""
    with torch.no_grad(), run.autocast(), FlopCounterMode(display=False) as counter:
        values = call(head, run.example)
    bytes_each = sum(value[0].numel() * value.element_size() for value in values)
    return bytes_each, float(counter.get_total_flops()) / 4 / bytes_each  # of two samples; a product and a sum are two


def _refuse_what_does_not_pay(run: Run, prefix: Prefix, work: float, epochs: int) -> None:
    if work < LEAST_WORK:
        raise NoPrefixError("the frozen part is so cheap that computing it again costs no more")
    on_disk = run.config.cache == "auto" and work >= LEAST_WORK_DISK and run.ranks.alone
    if epochs == 1 and not on_disk:
        raise NoPrefixError("each sample is looked at once anyway")
    limits = {"--cache-mb": run.config.cache_mb} | ({"--cache-disk-mb": run.config.cache_disk_mb} if on_disk else {})
    flag, most = max(limits.items(), key=lambda limit: limit[1])
    if (megabytes := num_megabytes(run, prefix)) > most:
        raise NoPrefixError(f"its values take {megabytes:,.0f} MB, more than {flag} {most}")


def _later(run: Run, prefix: Prefix) -> list[Prefix]:
    """The prefixes of later phases of the plan, which the same look at the data can fill, while memory lasts.

    Only those that their own phase would keep anyway: so whether they are at hand changes no bit.
    """
    found: list[Prefix] = []
    trained: set[str] = set()
    left = run.config.cache_mb - num_megabytes(run, prefix)
    for phase in run.planned:
        trained |= set(select(run.model, phase.train))
        parts = prefix.parts
        try:
            border = parts.border_if([run.model.parameters()[name] for name in sorted(trained)], run.example)
            later = Prefix(attrs.evolve(parts, head=parts.trace.before(border), border=border), views=prefix.views)
            _refuse_without_looking(run, phase.epochs or 2, prefix.views)
            _refuse_what_does_not_pay(run, later, _measure(run, later), phase.epochs or 2)
        except NoPrefixError:
            break
        left -= num_megabytes(run, later)
        if left < 0:
            break
        found.append(later)
    return found
