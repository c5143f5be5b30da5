"""The state of a run: the one thing that changes while it goes on, and only the engine changes it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from tuneforge.engine.context.budget import Budget
from tuneforge.engine.context.distributed import ProcessGroup
from tuneforge.engine.data.dataset import Batch, Data, Split, TensorTree, map_inputs, named_tensors
from tuneforge.engine.data.loader import batch_sizes, iter_batches, iter_sampled, iter_sequential
from tuneforge.engine.data.sampler import EpochSampler, SampleRNG, derive_seed
from tuneforge.engine.data.workers import Workers
from tuneforge.engine.model import fsdp as shards
from tuneforge.engine.model.device import Device
from tuneforge.engine.model.freeze_check import FreezeCheck
from tuneforge.engine.model.model import Model, accepts_inputs, call_module, check_output, extract_logits
from tuneforge.engine.model.optimizer import Optimization
from tuneforge.errors import PluginError
from tuneforge.plugin.config import RunConfig
from tuneforge.plugin.hooks import Hooks
from tuneforge.plugin.steps import Phase

DEFAULT_EVAL_BATCH_SIZE = 256
GATHER_BLOCK_BYTES = 1 << 24


@attrs.frozen(eq=False)
class Features:
    """Inputs of a batch as the frozen part of the model gives them: the values at its border, each (b, ...)."""

    values: tuple[Tensor, ...]


class FeatureCacheProtocol(Protocol):
    """What a phase keeps of its frozen part (see `tuneforge.engine.feature_cache.cache`)."""

    @property
    def bytes_per_sample(self) -> int:
        """Size of what is kept of one sample."""

    @property
    def num_augmented_copies(self) -> int:
        """Augmented views of each training sample; 0 where nothing is augmented."""

    @property
    def train_tail(self) -> nn.Module:
        """The values to the answer, while the phase trains."""

    @property
    def eval_tail(self) -> nn.Module:
        """The same in eval mode."""

    def get_features(self, split: Split, indices: Tensor, *, epoch: int = 0) -> Features | None:
        """The values of some samples, or None where the split is not kept; `epoch` picks the augmented view."""


@attrs.define(eq=False)
class Run:
    """What every hook is given.

    Args:
        config: The resolved configuration; never changes.
        run_dir: Where the run writes; None where nothing is written.
        device: Where the model lives.
        hooks: The components that take part.
        process_group: The processes that work on this run.
        restoring: True where weights follow from a run folder: build shapes, load nothing.
        log_sink: Where sentences for the user go.
        phase: The phase that trains, if one does.
        step: Optimizer steps so far, over the whole run.
        epoch: Epochs so far, over the whole run.
        progress: Share of the phase done, 0 to 1.
        total_steps: Optimizer steps that the phase may take.
        steps_done: Optimizer steps that the phase has taken.
        micro_batch: Samples of a training pass, where fewer than a batch; memory that runs out makes it smaller.
        eval_batch_size: Samples of an evaluation pass; memory that runs out makes it smaller.
        history: One entry an epoch: step, epoch, phase, rate, training loss and validation figures.
        eval_split: Name of the split under evaluation, or None.
        optimization: The run's one optimizer.
        freeze_check: Evidence that the phase gathers, if one trains.
        feature_cache: What the phase keeps of its frozen part, if it does.
        compiled_module: What the phase trains, compiled, if that was asked for.
        next_phases: Phases known to follow the present step.
        later_features: What the frozen part gave for later phases of the plan, by key.
        augmentations: Random changes of training inputs.
        save: Is called after each step, with what the phase knows, and saves a checkpoint where one is due.
        budget: What the run may spend.
        component_states: What each component remembers, by its place and name.
    """

    config: RunConfig
    run_dir: Path | None
    device: Device
    hooks: Hooks
    process_group: ProcessGroup = ProcessGroup()
    restoring: bool = False
    log_sink: Callable[[str], None] = lambda text: None
    phase: Phase | None = None
    step: int = 0
    epoch: int = 0
    progress: float = 0.0
    total_steps: int = 0
    steps_done: int = 0
    micro_batch: int | None = attrs.field(default=attrs.Factory(lambda self: self.config.micro_batch, takes_self=True))
    eval_batch_size: int = attrs.field(
        default=attrs.Factory(lambda self: _resolve_eval_batch_size(self.config), takes_self=True)
    )
    history: list[dict[str, Any]] = attrs.field(factory=list)
    eval_split: str | None = None
    optimization: Optimization = attrs.field(factory=Optimization)
    freeze_check: FreezeCheck | None = None
    feature_cache: FeatureCacheProtocol | None = None
    compiled_module: Any = None
    next_phases: tuple[Phase, ...] = ()
    later_features: dict[str, tuple[Tensor, ...]] = attrs.field(factory=dict)
    augmentations: tuple[Any, ...] = ()
    _data: Data | None = None
    _workers: Workers | None = None
    _model: Model | None = None
    _example: Any = None
    _force_contiguous: bool = False
    save: Callable[[Any], None] = lambda progress: None
    budget: Budget = attrs.field(factory=Budget)
    component_states: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    @property
    def data(self) -> Data:
        """The splits and the two contracts; there once `data_prepare` is done."""
        if self._data is None:
            raise PluginError("there is no data yet", why="data_prepare has not finished", fix="ask in a later hook")
        return self._data

    @property
    def model(self) -> Model:
        """The model; there once `model_adapt` is done."""
        if self._model is None:
            raise PluginError("there is no model yet", why="model_adapt has not finished", fix="ask in a later hook")
        return self._model

    @property
    def example(self) -> Any:
        """Ready inputs of two samples, on the run's device: what shapes can be read from."""
        if self._example is None:
            self._example = self.to_device(self.data.example())
        return self._example

    @property
    def data_seed(self) -> int:
        """The seed of everything that `data_prepare` draws."""
        return self.config.seed if self.config.data_seed is None else self.config.data_seed

    @property
    def workers(self) -> Workers:
        """Processes that decode ahead, the same ones for all splits and all passes."""
        if self._workers is None:
            sources = [split.source for split in self.data.splits().values()]
            self._workers = Workers(self.config.num_workers, sources, self.log)
        return self._workers

    @property
    def sharded(self) -> bool:
        """True where each rank holds a part of the model."""
        return self.config.shard and not self.process_group.is_single

    def set_data(self, data: Data) -> None:
        """Set the data; the engine's."""
        self.close()
        self._data = data

    def close(self) -> None:
        """End the processes that decode ahead; the engine's."""
        if self._workers is not None:
            self._workers.close()
        self._workers = None

    def set_model(self, model: Model) -> None:
        """Set the model, on the run's device and in its layout; the engine's.

        Raises:
            PluginError: It cannot take the data, or its head is not what answers.
        """
        if self.sharded:
            self._force_contiguous = True
            self.log(shards.shard(model, self.device.torch))
        else:
            model.module.to(self.device.torch)
        self._model = model
        if self._use_channels_last(model):
            model.module.to(memory_format=torch.channels_last)
            self._example = None
            if self.config.memory_format == "auto" and not accepts_inputs(model, self.example):
                self._force_contiguous = True
                model.module.to(memory_format=torch.contiguous_format)
                self.log("note: the model needs contiguous tensors, so channels-last is off")
            self._example = None
        try:
            check_output(model, self.example)
        except PluginError as error:
            if not self.sharded:
                raise
            raise shards.incompatible_error(error) from error

    def log(self, text: str) -> None:
        """Say a sentence to the user: on the screen and in the run's log."""
        self.log_sink(text)

    def state(self, component: object) -> dict[str, Any]:
        """What a component remembers while the run goes on: tensors and plain data, saved with checkpoints."""
        return self.component_states.setdefault(self._key_of(component), {})

    def _key_of(self, component: object) -> str:
        """The same key for the same component in a resumed run: its place among the members and its name."""
        for place, member in enumerate(self.hooks.components):
            if member.component is component:
                return f"{place}:{member.name}"
        for place, part in enumerate(self.augmentations):
            if part is component:
                return f"augment:{place}"
        raise PluginError(f"{type(component).__name__} takes no part in this run", fix="call run.state(self)")

    def forward(self, inputs: Any) -> Any:
        """The model's answer (b, k) for a batch's inputs."""
        with self.autocast():
            output = extract_logits(self._run_network(inputs, self._to_device))
        return output.float() if isinstance(output, Tensor) and output.dtype == torch.bfloat16 else output

    def _run_network(self, inputs: Any, placed: Callable[[Tensor], Tensor]) -> Any:
        """The output of the whole model, or of what the frozen prefix leaves; compiled where that was asked for."""
        kept = isinstance(inputs, Features)
        network = self.model.module
        if kept:
            assert self.feature_cache is not None
            network = self.feature_cache.eval_tail if self.eval_split else self.feature_cache.train_tail
        if (
            self.compiled_module is not None
            and self.eval_split is None
            and _num_samples(inputs) == self.config.batch_size
        ):
            network = self.compiled_module
        return network(*map(placed, inputs.values)) if kept else call_module(network, inputs)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of forward passes."""
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.torch.type, torch.bfloat16)

    def to_device(self, inputs: Any) -> Any:
        """Inputs or targets on the run's device, 4-D tensors in its layout."""
        return map_inputs(inputs, self._to_device) if isinstance(inputs, (Tensor, Mapping)) else inputs

    def reseed(self, batch: int = 0) -> None:
        """Give the noise inside the model the generator state of this step (and batch of it), whatever came before."""
        others = (
            [self.process_group.rank] if self.process_group.rank else []
        )  # whose noise is another one than rank 0's
        seed = derive_seed(self.config.seed, "step", self.step, batch, *others) & 0x7FFFFFFFFFFFFFFF
        torch.default_generator.manual_seed(seed)
        self.device.reseed(seed)

    def augment(self, batch: Batch) -> Batch:
        """The batch after every random change of inputs."""
        for place, part in enumerate(self.augmentations):
            batch = part.augment(self, attrs.evolve(batch, rng=attrs.evolve(batch.rng, salt=place)))
        return batch

    def training_batches(
        self, sampler: EpochSampler, weights: Tensor | None, *, start: int = 0, per_rank: bool = True
    ) -> Iterator[Batch]:
        """Batches of one epoch of the training split from batch `start` on, augmented, on the device.

        Of each batch this rank's share, or all of it where it is not `per_rank`.
        """
        split = self.data.train
        span = {"span": self.process_group.local_range} if per_rank else {}
        ordered = iter_sampled(sampler, self.config.batch_size, start=start, **span)
        if self.feature_cache is not None:
            yield from self._cached_batches(self.feature_cache, ordered, weights)
            return

        def finish(rows: Tensor, stored: TensorTree) -> Batch:
            noise = SampleRNG(self.config.seed, self.epoch, rows)
            return self.augment(self._make_batch(split, rows, self.prepare_inputs(stored), noise, weights))

        yield from iter_batches(split, ordered, finish, workers=self.workers)

    def _cached_batches(
        self, feature_cache: FeatureCacheProtocol, waiting: Iterator[Tensor], weights: Tensor | None
    ) -> Iterator[Batch]:
        """Batches of kept features, gathered for several steps at once, which costs less than a gather a step."""
        at_once = max(1, GATHER_BLOCK_BYTES // (self.config.batch_size * feature_cache.bytes_per_sample))
        while block := list(itertools.islice(waiting, at_once)):
            rows = torch.cat(block)
            kept = feature_cache.get_features(self.data.train, rows, epoch=self.epoch)
            noise = SampleRNG(self.config.seed, self.epoch, rows)
            whole = self._make_batch(self.data.train, rows, kept, noise, weights)
            yield from split_batch(whole, [len(each) for each in block])

    def micro_batches(self, batch: Batch) -> Iterable[Batch]:
        """The batch in passes of at most `micro_batch` samples, or a single one more."""
        if self.micro_batch is None or len(batch.indices) <= self.micro_batch:
            return (batch,)
        return split_batch(batch, batch_sizes(len(batch.indices), self.micro_batch))

    def evaluation_batches(self, split: Split, *, per_rank: bool = False) -> Iterator[Batch]:
        """Every sample of a split once, in order, on the device; of each batch only this rank's share if `per_rank`."""
        ordered = iter_sequential(len(split), self.eval_batch_size)
        if per_rank:
            ordered = map(self.process_group.local_indices, ordered)
        if self.feature_cache is not None and self.feature_cache.get_features(split, torch.tensor([0])) is not None:
            for rows in ordered:
                yield self._make_batch(
                    split,
                    rows,
                    self.feature_cache.get_features(split, rows),
                    SampleRNG(self.config.seed, 0, rows),
                    None,
                )
            return

        def finish(rows: Tensor, stored: TensorTree) -> Batch:
            return self._make_batch(
                split, rows, self.prepare_inputs(stored), SampleRNG(self.config.seed, 0, rows), None
            )

        yield from iter_batches(split, ordered, finish, workers=self.workers)

    def prepare_inputs(self, samples: TensorTree) -> Any:
        """What the model takes, on the run's device, from stored inputs."""
        return self.to_device(self.data.inputs.preprocess(map_inputs(samples, self.device.move)))

    def _make_batch(self, split: Split, indices: Tensor, inputs: Any, rng: SampleRNG, weights: Tensor | None) -> Batch:
        return Batch(
            inputs=inputs,
            targets=self.to_device(split.targets.index_select(0, indices)),
            indices=indices,
            weights=None if weights is None else self.device.move(weights.index_select(0, indices)),
            rng=rng,
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        moved = self.device.move(tensor)
        if moved.ndim == 4 and self.channels_last:
            return moved.contiguous(memory_format=torch.channels_last)
        return moved

    @property
    def channels_last(self) -> bool:
        """True where 4-D tensors are laid out with their channels last."""
        return self._model is not None and self._use_channels_last(self._model)

    def _use_channels_last(self, model: Model) -> bool:
        if self.config.memory_format != "auto" or self._force_contiguous:
            return self.config.memory_format == "channels-last"
        return any(parameter.ndim == 4 for parameter in model.module.parameters())


def _resolve_eval_batch_size(config: RunConfig) -> int:
    return config.eval_batch_size or max(DEFAULT_EVAL_BATCH_SIZE, config.batch_size)


def _num_samples(inputs: Any) -> int:
    values = inputs.values if isinstance(inputs, Features) else tuple(named_tensors(inputs).values())
    return len(values[0])


def split_batch(batch: Batch, sizes: Sequence[int]) -> Iterator[Batch]:
    """A batch as several of these sizes, without a copy."""
    if len(sizes) == 1:
        yield batch
        return
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        weights = None if batch.weights is None else batch.weights[part]
        rows = batch.indices[part]
        inputs = _slice_inputs(batch.inputs, part)
        yield Batch(inputs, batch.targets[part], rows, weights, attrs.evolve(batch.rng, indices=rows))
        start += size


def _slice_inputs(inputs: Any, part: slice) -> Any:
    if isinstance(inputs, Features):
        return Features(tuple(each[part] for each in inputs.values))
    return map_inputs(inputs, lambda tensor: tensor[part])
