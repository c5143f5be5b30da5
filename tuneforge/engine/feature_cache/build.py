"""Build the feature cache of a phase: what depends only on inputs and frozen parameters is computed once per sample.

The model is cut along its dataflow (`graph_split.py`). Before the cut is trusted, training steps of both parts must be
bit-identical to those of the model (`verification.py`). Features are always extracted in batches of one size, because
the bits of a result depend on the batch size. They are held in memory or, if they are too large, memory-mapped from
disk, where other runs find them by a key that covers all they depend on (`disk.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.flop_counter import FlopCounterMode

from tuneforge.engine.context.run import Run
from tuneforge.engine.feature_cache.cache import FeatureCache, TracedState, num_megabytes
from tuneforge.engine.feature_cache.extract import FeatureExtractor
from tuneforge.engine.feature_cache.graph_split import (
    NotCacheableError,
    UntraceableError,
    split_model,
    trace_with_export,
    trace_with_fx,
)
from tuneforge.engine.feature_cache.verification import ComputeLoss, SplitVerification
from tuneforge.engine.model.freezing import select
from tuneforge.engine.model.inspection import StateCopy, preserve_state
from tuneforge.engine.model.model import call_module
from tuneforge.engine.model.modes import Modes
from tuneforge.plugin.names import format_count

MIN_MACS_PER_BYTE = 32.0
"""Multiply-accumulates of the backbone per byte of features, below which computing features again takes no longer than
fetching them from memory.
"""

MIN_MACS_PER_BYTE_ON_DISK = 64.0
"""The same for fetching features from disk."""

MACS_PER_TRACED_MODULE = {trace_with_fx: 1e7, trace_with_export: 3e8}
"""Multiply-accumulates that take about as long as tracing and comparing one module of the model, on a CPU."""


@attrs.frozen(eq=False)
class CachePlan:
    """What a phase does with the features.

    Args:
        epochs: Epochs that the phase may take.
        compute_loss: Returns the loss and the outputs of a batch; None where nothing is trained.
        loss_weights: Factor of each training sample's loss (n,), or None.
        save_if_due: Called between batches; it may save a checkpoint and stop the run.
    """

    epochs: int
    compute_loss: ComputeLoss | None = None
    loss_weights: Tensor | None = None
    save_if_due: Callable[[], None] = lambda: None


def try_build_feature_cache(run: Run, modes: Modes, plan: CachePlan) -> FeatureCache | None:
    """Return the result of `build_feature_cache`, or None if the phase is not cached; the reason is logged."""
    try:
        cache = build_feature_cache(run, modes, plan)
    except NotCacheableError as why:
        run.log(f"  feature cache: off, because {why}")
        return None
    size = f"{num_megabytes(run, cache):.1f} MB"
    if not cache.num_computed_batches:
        work = "features computed earlier are reused"
    elif cache.num_augmented_copies:
        work = f"the frozen backbone runs once per augmented copy, {cache.num_augmented_copies} copies per sample"
    else:
        work = "the frozen backbone runs once per sample"
    run.log(f"  feature cache: on ({size}); {work}")
    return cache


def build_feature_cache(run: Run, modes: Modes, plan: CachePlan) -> FeatureCache:
    """Split the model for a phase, and fill the cache with the features of the training and validation splits.

    Args:
        run: With the model frozen as the phase asks.
        modes: The modes of the phase.
        plan: What the phase does with the features.

    Raises:
        NotCacheableError: The model cannot be split, or caching would not pay; nothing is changed.
        HaltError: Features found on disk are not what the model computes.
    """
    num_augmented_copies = run.config.cache_copies if run.engine_state.augmentations else 0
    _check_supported(run, plan.epochs, num_augmented_copies)
    module = run.model.module
    with preserve_state(module) as before:
        cache, extractor = _split_on_all_ranks(run, modes, plan, before, num_augmented_copies)
        cache.traced_state = TracedState.copy(module, modes, cache.split_model.backbone)
        val = extractor.load_or_extract("val", run.data.val, None) if len(run.data.val) else ()
        for copy_index in range(max(1, num_augmented_copies)):  # validation is not augmented, whatever the epoch
            cache.features[id(run.data.train), copy_index] = extractor.load_or_extract(
                "train", run.data.train, copy_index
            )
            cache.features[id(run.data.val), copy_index] = val
    owners = [owner for hook in ("train_step", "optimizer_step") for owner in run.hooks.get_owners(hook)]
    cache.checks_each_pass = not all(type(each.component).__module__.startswith("tuneforge.") for each in owners)
    return cache


def _check_supported(run: Run, epochs: int, num_augmented_copies: int) -> None:
    if run.config.cache == "off":
        raise NotCacheableError("--cache is off")
    if run.sharded:
        raise NotCacheableError("--shard leaves each rank only a shard of the model")
    if run.data.train.batch_dependent or run.data.val.batch_dependent:
        raise NotCacheableError("collate_fn makes the batches, so a sample may depend on the others of its batch")
    augmentations = run.engine_state.augmentations
    for spec, augmentation in zip(run.engine_state.augment_specs, augmentations, strict=True):
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
    has_global_hook = _has_any_global_hook()  # type: ignore[no-untyped-call]  # torch does not annotate it
    if has_global_hook or any(map(_has_hooks, run.model.module.modules())):
        raise NotCacheableError("the model has forward hooks or backward hooks, which its traced parts would not call")


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _split_on_all_ranks(
    run: Run, modes: Modes, plan: CachePlan, before: StateCopy, num_augmented_copies: int
) -> tuple[FeatureCache, FeatureExtractor]:
    """Return what `_split_and_verify` returns; if it fails on one rank, it fails on all."""
    reason = NotCacheableError("another process cannot split the model")
    found = None
    try:
        found = _split_and_verify(run, modes, plan, before, num_augmented_copies)
    except NotCacheableError as error:
        reason = error
    if run.process_group.all_reduce_any(found is None)[0] or found is None:
        raise reason
    return found


def _split_and_verify(
    run: Run, modes: Modes, plan: CachePlan, before: StateCopy, num_augmented_copies: int
) -> tuple[FeatureCache, FeatureExtractor]:
    """Return the model in two parts that are bit-identical to the whole, traced by fx or else by export."""
    reason: NotCacheableError | None = None
    module, epochs_saved = run.model.module, max(1, plan.epochs - max(1, num_augmented_copies))
    for tracer in (trace_with_fx, trace_with_export):
        try:
            if tracer is trace_with_export:
                _check_tracing_pays(run, _count_macs(run), epochs_saved, tracer)
            split = split_model(module, run.example, modes, tracer=tracer, before=before)
            cache = FeatureCache(split, split.bytes_per_sample, num_augmented_copies)
            work = split.backbone_macs / split.bytes_per_sample
            _check_worthwhile(run, cache, work, plan.epochs)
            _check_tracing_pays(run, split.backbone_macs, epochs_saved, tracer)
            module.eval()
            extractor = FeatureExtractor(run, cache, plan.save_if_due, use_disk=work >= MIN_MACS_PER_BYTE_ON_DISK)
            extractor.add_later_phases(_plan_later_phases(run, cache))
            SplitVerification(run, cache, extractor, modes, before, plan.compute_loss, plan.loss_weights).verify()
            return cache, extractor
        except UntraceableError as error:
            reason = reason or error
        except NotCacheableError as error:
            raise reason or error from None
        except Exception as error:  # noqa: BLE001 - parts of the model may raise anything
            reason = reason or NotCacheableError(f"the two parts of the model cannot run ({type(error).__name__})")
        before.restore()
    assert reason is not None
    raise reason


def _check_tracing_pays(run: Run, macs: float, epochs_saved: int, tracer: Any) -> None:
    """Check that tracing takes less time than the forward passes that a feature cache saves.

    Args:
        run: The run.
        macs: Multiply-accumulates for one sample that are saved in an epoch, or more.
        epochs_saved: Passes over the data that are saved.
        tracer: `trace_with_fx` or `trace_with_export`.
    """
    cost = MACS_PER_TRACED_MODULE[tracer] * len(list(run.model.module.modules()))
    # Other devices compute faster, and tracing takes as long.
    if macs * _num_samples(run) * epochs_saved < cost * (1.0 if run.device.torch.type == "cpu" else 100.0):
        raise NotCacheableError("tracing the model takes longer than computing its features again")


def _num_samples(run: Run) -> int:
    return len(run.data.train) + len(run.data.val)


def _count_macs(run: Run) -> float:
    """Return the multiply-accumulates of a forward pass of the whole model for one sample."""
    run.model.module.eval()
    with torch.no_grad(), run.autocast(), FlopCounterMode(display=False) as counter:
        call_module(run.model.module, run.example)
    return float(counter.get_total_flops()) / 4  # two samples, and two operations each


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
        try:
            cut = cache.split_model.find_cut_if_trainable([run.model.parameters()[name] for name in sorted(trainable)])
            backbone = cache.split_model.trace.extract_backbone(cut.crossing, cut.live)
            split = attrs.evolve(cache.split_model, backbone=backbone, cut=cut)
            later = FeatureCache(split, split.bytes_per_sample, cache.num_augmented_copies)
            _check_supported(run, phase.epochs or 2, cache.num_augmented_copies)
            _check_worthwhile(run, later, split.backbone_macs / split.bytes_per_sample, phase.epochs or 2)
        except NotCacheableError:
            break
        remaining_mb -= num_megabytes(run, later)
        if remaining_mb < 0:
            break
        later_caches.append(later)
    return later_caches
