"""The batches of a run: stored samples become training and evaluation batches on the run's device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.forward import FeatureCacheProtocol, Features
from tuneforge.engine.data.dataset import Batch, Split, TensorTree, map_inputs
from tuneforge.engine.data.loader import batch_sizes, iter_batches, iter_sampled, iter_sequential
from tuneforge.engine.data.sample_seeds import epoch_key
from tuneforge.engine.data.sampler import EpochSampler, ListedSampler, SampleRNG
from tuneforge.engine.data.workers import Workers

if TYPE_CHECKING:
    from tuneforge.engine.context.run import Run

_GATHER_BLOCK_BYTES = 1 << 24  # cached features that are gathered at once


def get_workers(run: Run) -> Workers:
    """Return the processes that decode samples, the same ones for all splits and all passes of a run."""
    state = run.engine_state
    if state.workers is None:
        sources = [split.source for split in run.data.splits().values()]
        state.workers = Workers(run.config.num_workers, sources, run.log)
    return state.workers


def training_batches(
    run: Run, sampler: EpochSampler | ListedSampler, weights: Tensor | None, *, start: int = 0, per_rank: bool = True
) -> Iterator[Batch]:
    """Yield the augmented batches of one epoch of the training split, on the device.

    Args:
        run: With data and model.
        sampler: The order of the epoch.
        weights: Factor of each sample's loss (n,), or None.
        start: The batch to begin with.
        per_rank: True to yield only this rank's share of each batch.
    """
    split, rng_seed, epoch = run.data.train, run.config.seed, run.epoch
    per_rank = per_rank and run.process_group.world_size > 1
    span = {"span": run.process_group.local_range} if per_rank and not split.batch_dependent else {}
    indices = iter_sampled(sampler, run.batch_size, start=start, **span)
    feature_cache = current_feature_cache(run)
    if feature_cache is not None:
        yield from _cached_batches(run, feature_cache, indices, weights)
        return

    def collate(chosen: Tensor, stored: TensorTree) -> Batch:
        rng = SampleRNG(rng_seed, epoch, chosen)
        batch = augment(run, make_batch(run, split, chosen, prepare_inputs(run, stored), rng, weights))
        return _local_part(run, batch) if per_rank and split.batch_dependent else batch

    yield from iter_batches(split, indices, collate, workers=get_workers(run), key=epoch_key(rng_seed, epoch))


def _cached_batches(
    run: Run, feature_cache: FeatureCacheProtocol, indices: Iterator[Tensor], weights: Tensor | None
) -> Iterator[Batch]:
    """Yield batches of cached features, gathered for several steps at once, which costs less than one gather a step."""
    split, seed, epoch = run.data.train, run.config.seed, run.epoch
    num_batches = max(1, _GATHER_BLOCK_BYTES // (run.batch_size * feature_cache.bytes_per_sample))
    while block := list(itertools.islice(indices, num_batches)):
        chosen = torch.cat(block)
        values = feature_cache.get_features(split, chosen, epoch=epoch)
        assert values is not None
        features = Features(values, chosen, functools.partial(load_training_inputs, run, epoch=epoch))
        batch = make_batch(run, split, chosen, features, SampleRNG(seed, epoch, chosen), weights)
        yield from split_batch(batch, [len(each) for each in block])


def load_training_inputs(run: Run, indices: Tensor, *, epoch: int) -> Any:
    """Return what the model takes for samples of the training split, augmented as in an epoch."""
    split, seed = run.data.train, run.config.seed
    inputs = prepare_inputs(run, split.fetch(indices, epoch_key(seed, epoch)))
    return augment(run, make_batch(run, split, indices, inputs, SampleRNG(seed, epoch, indices), None)).inputs


def current_feature_cache(run: Run) -> FeatureCacheProtocol | None:
    """Return the feature cache; it is dropped if the model has changed in a way that its traced parts do not follow."""
    feature_cache = run.forward_pass.feature_cache
    if feature_cache is not None and (change := feature_cache.find_change(evaluating=run.eval_split is not None)):
        run.log(f"  feature cache: off from optimizer step {run.step + 1} on, because {change}")
        run.forward_pass.feature_cache = run.forward_pass.compiled_module = None
        run.engine_state.is_cached = False
    return run.forward_pass.feature_cache


def current_inputs(run: Run, features: Features) -> Any:
    """Return cached features, or the inputs of their samples where the feature cache was dropped."""
    feature_cache = run.forward_pass.feature_cache
    if feature_cache is not None and feature_cache.checks_each_pass:
        feature_cache = current_feature_cache(run)
    return features if feature_cache is not None else features.load_inputs(features.indices)


def evaluation_batches(run: Run, split: Split, *, per_rank: bool = False) -> Iterator[Batch]:
    """Yield every sample of a split once, in order, on the device.

    Args:
        run: With data and model.
        split: What is evaluated.
        per_rank: True to yield only this rank's share of each batch.
    """
    indices = iter_sequential(len(split), run.engine_state.eval_batch_size)
    per_rank = per_rank and run.process_group.world_size > 1
    if per_rank and not split.batch_dependent:
        indices = map(run.process_group.local_indices, indices)
    feature_cache = current_feature_cache(run)
    if feature_cache is not None and feature_cache.get_features(split, torch.tensor([0])) is not None:
        for chosen in indices:
            values = feature_cache.get_features(split, chosen)
            assert values is not None
            features = Features(values, chosen, lambda rows: prepare_inputs(run, split.fetch(rows)))
            yield _evaluation_batch(run, split, chosen, features)
        return

    def collate(chosen: Tensor, stored: TensorTree) -> Batch:
        batch = _evaluation_batch(run, split, chosen, prepare_inputs(run, stored))
        return _local_part(run, batch) if per_rank and split.batch_dependent else batch

    yield from iter_batches(split, indices, collate, workers=get_workers(run))


def prepare_inputs(run: Run, samples: TensorTree) -> Any:
    """Return what the model takes, on the run's device, from the stored inputs of a batch."""
    inputs = run.forward_pass.to_device(run.data.inputs.preprocess(map_inputs(samples, run.device.move)))
    return run.forward_pass.convert(inputs)


def augment(run: Run, batch: Batch) -> Batch:
    """Return the batch after every augmentation of the run, each with random numbers of its own."""
    for salt, augmentation in enumerate(run.engine_state.augmentations):
        batch = augmentation.augment(run, attrs.evolve(batch, rng=attrs.evolve(batch.rng, salt=salt)))
    return batch


def _evaluation_batch(run: Run, split: Split, indices: Tensor, inputs: Any) -> Batch:
    return make_batch(run, split, indices, inputs, SampleRNG(run.config.seed, 0, indices), None)


def make_batch(run: Run, split: Split, indices: Tensor, inputs: Any, rng: SampleRNG, weights: Tensor | None) -> Batch:
    """Return a batch of prepared inputs or features, with the targets and the loss weights of its samples."""
    return Batch(
        inputs=inputs,
        targets=run.forward_pass.prepare_targets(split.targets.index_select(0, indices)),
        indices=indices,
        weights=None if weights is None else run.device.move(weights.index_select(0, indices)),
        rng=rng,
    )


def micro_batches(run: Run, batch: Batch) -> Iterable[Batch]:
    """Return the batch in parts of at most `micro_batch_size` samples; a last part of one sample joins the one before.

    A part of a single sample has no batch statistics, so BatchNorm could not train on it.
    """
    size = run.engine_state.micro_batch_size
    if size is None or len(batch.indices) <= size:
        return (batch,)
    return split_batch(batch, batch_sizes(len(batch.indices), size))


def split_batch(batch: Batch, sizes: Sequence[int]) -> Iterator[Batch]:
    """Yield a batch in parts of these sizes, as views of its tensors."""
    if len(sizes) == 1:
        yield batch
        return
    start = 0
    for size in sizes:
        yield _slice_batch(batch, slice(start, start + size))
        start += size


def _local_part(run: Run, batch: Batch) -> Batch:
    """Return this rank's share of a batch that each rank makes as a whole, because its samples depend on each other."""
    return _slice_batch(batch, slice(*run.process_group.local_range(len(batch.indices))))


def _slice_batch(batch: Batch, part: slice) -> Batch:
    weights = None if batch.weights is None else batch.weights[part]
    indices, inputs = batch.indices[part], _slice_inputs(batch.inputs, part)
    return Batch(inputs, batch.targets[part], indices, weights, attrs.evolve(batch.rng, indices=indices))


def _slice_inputs(inputs: Any, part: slice) -> Any:
    if isinstance(inputs, Features):
        return inputs.slice(part)
    return map_inputs(inputs, lambda tensor: tensor[part])
