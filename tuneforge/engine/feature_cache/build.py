"""Build the feature cache of a phase: what depends only on inputs and frozen parameters is computed once per sample.

The model is cut along its dataflow (`graph_split.py`). Before the cut is trusted, the composition of both parts must
be bit-identical to the model. Features are always extracted in batches of one size, because the bits of a result
depend on the batch size. They are held in memory or, if they are too large, memory-mapped from disk, where other runs
find them by a key that covers all they depend on (`disk.py`).
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
from tuneforge.engine.feature_cache.cache import FeatureCache, Values, num_megabytes
from tuneforge.engine.feature_cache.extract import FeatureExtractor
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
"""Multiply-accumulates of the backbone per byte of features, below which computing features again takes no longer than
fetching them from memory.
"""

MIN_MACS_PER_BYTE_ON_DISK = 64.0
"""The same for fetching features from disk."""


def try_build_feature_cache(
    run: Run, modes: Modes, *, epochs: int, save_if_due: Callable[[], None] = lambda: None
) -> FeatureCache | None:
    """Return the result of `build_feature_cache`, or None if the phase is not cached; the reason is logged."""
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
    """Split the model for a phase, and fill the cache with the features of the training and validation splits.

    Args:
        run: With the model frozen as the phase asks.
        modes: The modes of the phase.
        epochs: Epochs that the phase may take.
        save_if_due: Called between batches; it may save a checkpoint and stop the run.

    Raises:
        NotCacheableError: The model cannot be split, or caching would not pay; nothing is changed.
        HaltError: Features found on disk are not what the model computes.
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
        raise NotCacheableError("--shard leaves each rank only a shard of the model")
    if run.data.train.batch_dependent or run.data.val.batch_dependent:
        raise NotCacheableError("collate_fn makes the batches, so a sample may depend on the others of its batch")
    augmentations = run.engine_state.augmentations
    for spec, augmentation in zip(run.config.augment, augmentations, strict=True):
        if not getattr(augmentation, "per_sample", False):
            raise NotCacheableError(f"augmentation '{spec.name}' may combine several samples")
    if augmentations and epochs <= num_augmented_copies:
        raise NotCacheableError(
            f"{format_count(epochs, 'epoch')} of random augmentation cost no more than "
            f"{num_augmented_copies} cached augmented copies"
        )
    for member in run.hooks.components:
        if getattr(member.component, "needs_inputs", False):
            raise NotCacheableError(f"{member.label} needs the model's inputs")
    if any(each._forward_hooks or each._forward_pre_hooks for each in run.model.module.modules()):
        raise NotCacheableError("the model has forward hooks, which its traced parts would not call")


def _split_and_verify(run: Run, modes: Modes) -> SplitModel:
    """Return the model in two parts that are bit-identical to the whole and keep samples apart; try fx, then export."""
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
        except Exception as error:  # noqa: BLE001 - parts of the model may raise anything
            reason = reason or NotCacheableError(f"the two parts of the model cannot run ({type(error).__name__})")
    assert reason is not None
    raise reason


def _verify_split(run: Run, split: SplitModel, modes: Modes) -> None:
    """Check that both parts composed give the output of the model, and that features do not depend on other samples."""
    eval_modes = [(each, False) for each in run.model.module.modules()]
    # Three copies of one sample: another batch size and other neighbors must not change its features.
    first, second = (_select_samples(run.example, [index] * 3) for index in (0, 1))
    with torch.no_grad(), run.autocast():
        together = _verify_composition(run, run.example, split.backbone, split.train_tail, modes)
        alone = _verify_composition(run, first, split.backbone, split.eval_tail, eval_modes)
        for index, values in enumerate((alone, call_module(split.backbone, second))):
            if not all(_is_close(one[index], other[index]) for one, other in zip(together, values, strict=True)):
                raise NotCacheableError("the frozen backbone mixes samples")


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors differ by no more than what another batch size does to their last bits.

    The tolerance is relative to the largest element, because rounding errors of sums are.
    """
    largest = float(one.abs().nan_to_num(0, 0, 0).max()) if one.is_floating_point() else 0.0
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * largest, equal_nan=True)


def _verify_composition(run: Run, inputs: Any, backbone: nn.Module, tail: nn.Module, modes: Modes) -> Values:
    set_modes(modes)
    run.reseed()
    expected = extract_logits(call_module(run.model.module, inputs))
    run.reseed()
    values: Values = call_module(backbone, inputs)
    if not bitwise_equal(expected, extract_logits(tail(*values))):
        raise UntraceableError("the two parts of the model do not give the output of the whole")
    return values


def _select_samples(example: Any, indices: list[int]) -> Any:
    return map_inputs(example, lambda tensor: tensor[indices])


def _measure_cost(run: Run, cache: FeatureCache) -> float:
    """Set the size of a sample's features, and return the backbone's multiply-accumulates per byte of them."""
    cache.bytes_per_sample, work = _cost_per_sample(run, cache.split_model.backbone)
    return work


def _cost_per_sample(run: Run, backbone: nn.Module) -> tuple[int, float]:
    """Return the size of a sample's features in bytes, and the multiply-accumulates per byte."""
    with torch.no_grad(), run.autocast(), FlopCounterMode(display=False) as counter:
        values = call_module(backbone, run.example)
    bytes_each = sum(value[0].numel() * value.element_size() for value in values)
    return bytes_each, float(counter.get_total_flops()) / 4 / bytes_each  # two samples, and two operations per MAC


def _check_worthwhile(run: Run, cache: FeatureCache, macs_per_byte: float, epochs: int) -> None:
    if macs_per_byte < MIN_MACS_PER_BYTE:
        raise NotCacheableError("the frozen backbone is so cheap that computing it again costs no more")
    on_disk = (
        run.config.cache == "auto" and macs_per_byte >= MIN_MACS_PER_BYTE_ON_DISK and run.process_group.world_size == 1
    )
    if epochs == 1 and not on_disk:
        raise NotCacheableError("each sample is used only once")
    limits = {"--cache-mb": run.config.cache_mb} | ({"--cache-disk-mb": run.config.cache_disk_mb} if on_disk else {})
    flag, limit = max(limits.items(), key=lambda item: item[1])
    if (megabytes := num_megabytes(run, cache)) > limit:
        raise NotCacheableError(f"its features take {megabytes:,.0f} MB, more than {flag} {limit}")


def _plan_later_phases(run: Run, cache: FeatureCache) -> list[FeatureCache]:
    """Return caches for later phases of the plan that the same pass over the data can fill, as far as memory allows.

    Only phases that would build a cache by themselves are included, so the plan does not affect the weights.
    """
    later_caches: list[FeatureCache] = []
    trainable: set[str] = set()
    remaining_mb = run.config.cache_mb - num_megabytes(run, cache)
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
        remaining_mb -= num_megabytes(run, later)
        if remaining_mb < 0:
            break
        later_caches.append(later)
    return later_caches
