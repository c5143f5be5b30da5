"""The frozen prefix: whatever depends only on the input and on frozen parameters is computed once, and kept.

The model is cut by dataflow (`graph_split.py` beside this), and before anything is trusted, both parts composed are
compared with the model to the bit. Values at the border are computed in one fixed geometry, because bits differ with
the batch size; they are kept in memory or, past a budget, mapped from disk, where another run finds them by a key that
holds all they depend on (`disk.py`).
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
from tuneforge.engine.feature_cache.extract import FeatureCache, FeatureExtractor, Values, num_megabytes
from tuneforge.engine.feature_cache.graph_split import (
    NotCacheableError,
    SplitModel,
    UntraceableError,
    split_model,
    trace_with_export,
    trace_with_fx,
)
from tuneforge.engine.model.freezing import select
from tuneforge.engine.model.model import call_module, extract_logits
from tuneforge.engine.model.modes import Modes, preserve_modes_and_buffers, set_modes
from tuneforge.engine.model.module_state import bitwise_equal
from tuneforge.plugin.names import format_count

MIN_MACS_PER_BYTE = 32.0
"""Multiplications of the prefix for each byte kept, under which recomputing is no dearer than fetching from memory."""

MIN_MACS_PER_BYTE_ON_DISK = 64.0
"""The same for fetching from disk."""


def try_build_feature_cache(
    run: Run, modes: Modes, *, epochs: int, save_if_due: Callable[[], None] = lambda: None
) -> FeatureCache | None:
    """What a phase keeps of its frozen part (see `build_feature_cache`); None, with the reason said, where nothing."""
    try:
        cache = build_feature_cache(run, modes, epochs=epochs, save_if_due=save_if_due)
    except NotCacheableError as why:
        run.log(f"  feature cache: off, because {why}")
        return None
    size = f"{num_megabytes(run, cache):.1f} MB"
    if not cache.num_computed_batches:
        work = "no new features are computed"
    elif cache.num_augmented_copies:
        work = f"the frozen backbone runs once per augmented copy, {cache.num_augmented_copies} copies per sample"
    else:
        work = "the frozen backbone runs once per sample"
    run.log(f"  feature cache: on ({size}); {work}")
    return cache


def build_feature_cache(
    run: Run, modes: Modes, *, epochs: int, save_if_due: Callable[[], None] = lambda: None
) -> FeatureCache:
    """Split the model for a phase, and fill what is kept from the training and the validation split.

    Args:
        run: With the model frozen as the phase asks.
        modes: The modes of the phase.
        epochs: Epochs that the phase may take.
        save_if_due: Is called between batches, and may save and stop the run.

    Raises:
        NotCacheableError: There is none, or it would not pay; nothing is changed.
        HaltError: What was found in the store is not what the model gives.
    """
    num_augmented_copies = run.config.cache_copies if run.engine_state.augmentations else 0
    _check_supported(run, epochs, num_augmented_copies)
    with preserve_modes_and_buffers(run.model.module):
        cache = FeatureCache(_split_and_verify(run, modes), num_augmented_copies=num_augmented_copies)
    with preserve_modes_and_buffers(run.model.module):
        run.model.module.eval()
        work = _measure_cost(run, cache)
        _check_worthwhile(run, cache, work, epochs)
        extractor = FeatureExtractor(run, cache, save_if_due, use_disk=work >= MIN_MACS_PER_BYTE_ON_DISK)
        extractor.add_later_phases(_plan_later_phases(run, cache))
        val = extractor.load_or_extract("val", run.data.val, None)
        for copy_index in range(max(1, num_augmented_copies)):  # validation is not augmented, whatever the epoch
            cache.features[id(run.data.train), copy_index] = extractor.load_or_extract(
                "train", run.data.train, copy_index
            )
            cache.features[id(run.data.val), copy_index] = val
    return cache


def _check_supported(run: Run, epochs: int, num_augmented_copies: int) -> None:
    if run.config.cache == "off":
        raise NotCacheableError("--cache is off")
    if run.sharded:
        raise NotCacheableError("--shard leaves each rank a part of the model")
    augmentations = run.engine_state.augmentations
    for spec, augmentation in zip(run.config.augment, augmentations, strict=True):
        if not getattr(augmentation, "per_sample", False):
            raise NotCacheableError(f"augmentation '{spec.name}' may look at more than one sample")
    if augmentations and epochs <= num_augmented_copies:
        raise NotCacheableError(
            f"{format_count(epochs, 'epoch')} of random augmentation cost no more than "
            f"{num_augmented_copies} cached augmented copies"
        )
    for member in run.hooks.components:
        if getattr(member.component, "needs_inputs", False):
            raise NotCacheableError(f"{member.label} needs the inputs themselves")
    if any(each._forward_hooks or each._forward_pre_hooks for each in run.model.module.modules()):
        raise NotCacheableError("the model has forward hooks, which a traced part would not call")


def _split_and_verify(run: Run, modes: Modes) -> SplitModel:
    """The model in two parts that agree with the whole to the bit and keep samples apart; fx first, then export."""
    reason: NotCacheableError | None = None
    for tracer in (trace_with_fx, trace_with_export):
        try:
            split = split_model(run.model.module, run.example, modes, tracer=tracer)
            _verify_split(run, split, modes)
            return split
        except UntraceableError as error:
            reason = reason or error
        except NotCacheableError:
            raise
        except Exception as error:  # noqa: BLE001 - it runs the model's own code in parts, which may raise anything
            reason = reason or NotCacheableError(f"the model cannot be run in parts ({type(error).__name__})")
    assert reason is not None
    raise reason


def _verify_split(run: Run, split: SplitModel, modes: Modes) -> None:
    """See that both parts composed give what the whole gives, and that a sample's values are its own."""
    eval_modes = [(each, False) for each in run.model.module.modules()]
    first, second = (_select_samples(run.example, [place] * 3) for place in (0, 1))
    with torch.no_grad(), run.autocast():
        together = _verify_composition(run, run.example, split.backbone, split.train_tail, modes)
        alone = _verify_composition(run, first, split.backbone, split.eval_tail, eval_modes)  # of another batch size
        for place, values in enumerate((alone, call_module(split.backbone, second))):
            if not all(_is_close(one[place], other[place]) for one, other in zip(together, values, strict=True)):
                raise NotCacheableError("the frozen part mixes samples")


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Equal but for what another batch size does to the last bits, measured by the largest of them."""
    largest = float(one.abs().nan_to_num(0, 0, 0).max()) if one.is_floating_point() else 0.0
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * largest, equal_nan=True)


def _verify_composition(run: Run, inputs: Any, backbone: nn.Module, tail: nn.Module, modes: Modes) -> Values:
    set_modes(modes)
    run.reseed()
    whole = extract_logits(call_module(run.model.module, inputs))
    run.reseed()
    values: Values = call_module(backbone, inputs)
    if not bitwise_equal(whole, extract_logits(tail(*values))):
        raise UntraceableError("the parts of the model do not give what the whole gives")
    return values


def _select_samples(example: Any, indices: list[int]) -> Any:
    return map_inputs(example, lambda tensor: tensor[indices])


def _measure_cost(run: Run, cache: FeatureCache) -> float:
    """Set the size of a sample's values, and give the multiplications that the prefix takes for each byte of them."""
    cache.bytes_per_sample, work = _cost_per_sample(run, cache.split_model.backbone)
    return work


def _cost_per_sample(run: Run, backbone: nn.Module) -> tuple[int, float]:
    """Bytes of a sample's values, and multiplications for each."""
    with torch.no_grad(), run.autocast(), FlopCounterMode(display=False) as counter:
        values = call_module(backbone, run.example)
    bytes_each = sum(value[0].numel() * value.element_size() for value in values)
    return bytes_each, float(counter.get_total_flops()) / 4 / bytes_each  # of two samples; a product and a sum are two


def _check_worthwhile(run: Run, cache: FeatureCache, macs_per_byte: float, epochs: int) -> None:
    if macs_per_byte < MIN_MACS_PER_BYTE:
        raise NotCacheableError("the frozen part is so cheap that computing it again costs no more")
    on_disk = run.config.cache == "auto" and macs_per_byte >= MIN_MACS_PER_BYTE_ON_DISK and run.process_group.is_single
    if epochs == 1 and not on_disk:
        raise NotCacheableError("each sample is looked at once anyway")
    limits = {"--cache-mb": run.config.cache_mb} | ({"--cache-disk-mb": run.config.cache_disk_mb} if on_disk else {})
    flag, most = max(limits.items(), key=lambda limit: limit[1])
    if (megabytes := num_megabytes(run, cache)) > most:
        raise NotCacheableError(f"its values take {megabytes:,.0f} MB, more than {flag} {most}")


def _plan_later_phases(run: Run, cache: FeatureCache) -> list[FeatureCache]:
    """The prefixes of later phases of the plan, which the same look at the data can fill, while memory lasts.

    Only those that their own phase would keep anyway: so whether they are at hand changes no bit.
    """
    found: list[FeatureCache] = []
    trainable: set[str] = set()
    left = run.config.cache_mb - num_megabytes(run, cache)
    for phase in run.engine_state.next_phases:
        trainable |= set(select(run.model, phase.train))
        split = cache.split_model
        try:
            cut = split.find_cut_if_trainable([run.model.parameters()[name] for name in sorted(trainable)], run.example)
            later = FeatureCache(
                attrs.evolve(split, backbone=split.trace.extract_backbone(cut), cut=cut),
                num_augmented_copies=cache.num_augmented_copies,
            )
            _check_supported(run, phase.epochs or 2, cache.num_augmented_copies)
            _check_worthwhile(run, later, _measure_cost(run, later), phase.epochs or 2)
        except NotCacheableError:
            break
        left -= num_megabytes(run, later)
        if left < 0:
            break
        found.append(later)
    return found
