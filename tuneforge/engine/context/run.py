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
from tuneforge.engine.context.distributed import Ranks
from tuneforge.engine.data.dataset import Batch, Data, Inputable, Split, map_inputs, tensors_of
from tuneforge.engine.data.loader import batch_sizes, batches, in_order, in_turn
from tuneforge.engine.data.sampler import Noise, Order, key_of
from tuneforge.engine.data.workers import Workers
from tuneforge.engine.model import fsdp as shards
from tuneforge.engine.model.device import Device
from tuneforge.engine.model.freeze_check import Proof
from tuneforge.engine.model.model import Model, answer_of, call, check_answer, works
from tuneforge.engine.model.optimizer import Optimization
from tuneforge.errors import PluginError
from tuneforge.plugin.config import RunConfig
from tuneforge.plugin.hooks import Hooks
from tuneforge.plugin.steps import Phase

EVALUATION_BATCH = 256
GATHERED_BYTES = 1 << 24


@attrs.frozen(eq=False)
class Features:
    """Inputs of a batch as the frozen part of the model gives them: the values at its border, each (b, ...)."""

    values: tuple[Tensor, ...]


class KeptPrefix(Protocol):
    """What a phase keeps of its frozen part (see `tuneforge.engine.feature_cache.cache`)."""

    @property
    def bytes_each(self) -> int:
        """Size of what is kept of one sample."""

    @property
    def views(self) -> int:
        """Augmented views of each training sample; 0 where nothing is augmented."""

    @property
    def training(self) -> nn.Module:
        """The values to the answer, while the phase trains."""

    @property
    def evaluating(self) -> nn.Module:
        """The same in eval mode."""

    def values(self, split: Split, rows: Tensor, *, epoch: int = 0) -> Features | None:
        """The values of some samples, or None where the split is not kept; `epoch` picks the augmented view."""


@attrs.define(eq=False)
class Run:
    """What every hook is given.

    Args:
        config: The resolved configuration; never changes.
        folder: Where the run writes; None where nothing is written.
        device: Where the model lives.
        hooks: The components that take part.
        ranks: The processes that work on this run.
        restoring: True where weights follow from a run folder: build shapes, load nothing.
        say: Where sentences for the user go.
        phase: The phase that trains, if one does.
        step: Optimizer steps so far, over the whole run.
        epoch: Epochs so far, over the whole run.
        progress: Share of the phase done, 0 to 1.
        total_steps: Optimizer steps that the phase may take.
        steps_done: Optimizer steps that the phase has taken.
        micro_batch: Samples of a training pass, where fewer than a batch; memory that runs out makes it smaller.
        eval_batch: Samples of an evaluation pass; memory that runs out makes it smaller.
        history: One entry an epoch: step, epoch, phase, rate, training loss and validation figures.
        evaluating: Name of the split under evaluation, or None.
        optimization: The run's one optimizer.
        proof: Evidence that the phase gathers, if one trains.
        prefix: What the phase keeps of its frozen part, if it does.
        compiled: What the phase trains, compiled, if that was asked for.
        planned: Phases known to follow the present step.
        features: What the frozen part gave for later phases of the plan, by key.
        augments: Random changes of training inputs.
        save: Is called after each step, with what the phase knows, and saves a checkpoint where one is due.
        budget: What the run may spend.
        states: What each component remembers, by its place and name.
    """

    config: RunConfig
    folder: Path | None
    device: Device
    hooks: Hooks
    ranks: Ranks = Ranks()
    restoring: bool = False
    say: Callable[[str], None] = lambda text: None
    phase: Phase | None = None
    step: int = 0
    epoch: int = 0
    progress: float = 0.0
    total_steps: int = 0
    steps_done: int = 0
    micro_batch: int | None = attrs.field(default=attrs.Factory(lambda self: self.config.micro_batch, takes_self=True))
    eval_batch: int = attrs.field(default=attrs.Factory(lambda self: _eval_batch(self.config), takes_self=True))
    history: list[dict[str, Any]] = attrs.field(factory=list)
    evaluating: str | None = None
    optimization: Optimization = attrs.field(factory=Optimization)
    proof: Proof | None = None
    prefix: KeptPrefix | None = None
    compiled: Any = None
    planned: tuple[Phase, ...] = ()
    features: dict[str, tuple[Tensor, ...]] = attrs.field(factory=dict)
    augments: tuple[Any, ...] = ()
    _data: Data | None = None
    _workers: Workers | None = None
    _model: Model | None = None
    _example: Any = None
    _contiguous: bool = False
    save: Callable[[Any], None] = lambda progress: None
    budget: Budget = attrs.field(factory=Budget)
    states: dict[str, dict[str, Any]] = attrs.field(factory=dict)

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
            self._example = self.place(self.data.example())
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
            self._workers = Workers(self.config.workers, sources, self.note)
        return self._workers

    @property
    def sharded(self) -> bool:
        """True where each rank holds a part of the model."""
        return self.config.shard and not self.ranks.alone

    def take_data(self, data: Data) -> None:
        """Set the data; the engine's."""
        self.close()
        self._data = data

    def close(self) -> None:
        """End the processes that decode ahead; the engine's."""
        if self._workers is not None:
            self._workers.close()
        self._workers = None

    def take_model(self, model: Model) -> None:
        """Set the model, on the run's device and in its layout; the engine's.

        Raises:
            PluginError: It cannot take the data, or its head is not what answers.
        """
        if self.sharded:
            self._contiguous = True
            self.note(shards.shard(model, self.device.torch))
        else:
            model.module.to(self.device.torch)
        self._model = model
        if self._channels_last(model):
            model.module.to(memory_format=torch.channels_last)
            self._example = None
            if self.config.memory_format == "auto" and not works(model, self.example):
                self._contiguous = True
                model.module.to(memory_format=torch.contiguous_format)
                self.note("note: the model needs contiguous tensors, so channels-last is off")
            self._example = None
        try:
            check_answer(model, self.example)
        except PluginError as error:
            if not self.sharded:
                raise
            raise shards.unfit(error) from error

    def note(self, text: str) -> None:
        """Say a sentence to the user: on the screen and in the run's log."""
        self.say(text)

    def state(self, component: object) -> dict[str, Any]:
        """What a component remembers while the run goes on: tensors and plain data, saved with checkpoints."""
        return self.states.setdefault(self._key_of(component), {})

    def _key_of(self, component: object) -> str:
        """The same key for the same component in a resumed run: its place among the members and its name."""
        for place, member in enumerate(self.hooks.members):
            if member.component is component:
                return f"{place}:{member.name}"
        for place, part in enumerate(self.augments):
            if part is component:
                return f"augment:{place}"
        raise PluginError(f"{type(component).__name__} takes no part in this run", fix="call run.state(self)")

    def forward(self, inputs: Any) -> Any:
        """The model's answer (b, k) for a batch's inputs."""
        with self.autocast():
            output = answer_of(self._network(inputs, self._placed))
        return output.float() if isinstance(output, Tensor) and output.dtype == torch.bfloat16 else output

    def _network(self, inputs: Any, placed: Callable[[Tensor], Tensor]) -> Any:
        """The output of the whole model, or of what the frozen prefix leaves; compiled where that was asked for."""
        kept = isinstance(inputs, Features)
        network = self.model.module
        if kept:
            assert self.prefix is not None
            network = self.prefix.evaluating if self.evaluating else self.prefix.training
        if self.compiled is not None and self.evaluating is None and _rows_in(inputs) == self.config.batch_size:
            network = self.compiled
        return network(*map(placed, inputs.values)) if kept else call(network, inputs)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of forward passes."""
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.torch.type, torch.bfloat16)

    def place(self, inputs: Any) -> Any:
        """Inputs or targets on the run's device, 4-D tensors in its layout."""
        return map_inputs(inputs, self._placed) if isinstance(inputs, (Tensor, Mapping)) else inputs

    def reseed(self, batch: int = 0) -> None:
        """Give the noise inside the model the generator state of this step (and batch of it), whatever came before."""
        others = [self.ranks.rank] if self.ranks.rank else []  # whose noise is another one than rank 0's
        seed = key_of(self.config.seed, "step", self.step, batch, *others) & 0x7FFFFFFFFFFFFFFF
        torch.default_generator.manual_seed(seed)
        self.device.reseed(seed)

    def augmented(self, batch: Batch) -> Batch:
        """The batch after every random change of inputs."""
        for place, part in enumerate(self.augments):
            batch = part.augment(self, attrs.evolve(batch, noise=attrs.evolve(batch.noise, salt=place)))
        return batch

    def training_batches(
        self, order: Order, weights: Tensor | None, *, start: int = 0, shared: bool = True
    ) -> Iterator[Batch]:
        """Batches of one epoch of the training split from batch `start` on, augmented, on the device.

        Of each batch this rank's share, or all of it where it is not `shared`.
        """
        split = self.data.train
        span = {"span": self.ranks.span} if shared else {}
        ordered = in_order(order, self.config.batch_size, start=start, **span)
        if self.prefix is not None:
            yield from self._kept_batches(self.prefix, ordered, weights)
            return

        def finish(rows: Tensor, stored: Inputable) -> Batch:
            noise = Noise(self.config.seed, self.epoch, rows)
            return self.augmented(self._batch(split, rows, self.ready(stored), noise, weights))

        yield from batches(split, ordered, finish, workers=self.workers)

    def _kept_batches(self, prefix: KeptPrefix, waiting: Iterator[Tensor], weights: Tensor | None) -> Iterator[Batch]:
        """Batches of kept features, gathered for several steps at once, which costs less than a gather a step."""
        at_once = max(1, GATHERED_BYTES // (self.config.batch_size * prefix.bytes_each))
        while block := list(itertools.islice(waiting, at_once)):
            rows = torch.cat(block)
            kept = prefix.values(self.data.train, rows, epoch=self.epoch)
            noise = Noise(self.config.seed, self.epoch, rows)
            whole = self._batch(self.data.train, rows, kept, noise, weights)
            yield from in_pieces(whole, [len(each) for each in block])

    def pieces(self, batch: Batch) -> Iterable[Batch]:
        """The batch in passes of at most `micro_batch` samples, or a single one more."""
        if self.micro_batch is None or len(batch.rows) <= self.micro_batch:
            return (batch,)
        return in_pieces(batch, batch_sizes(len(batch.rows), self.micro_batch))

    def evaluation_batches(self, split: Split, *, shared: bool = False) -> Iterator[Batch]:
        """Every sample of a split once, in order, on the device; of each batch only this rank's share if `shared`."""
        ordered = in_turn(len(split), self.eval_batch)
        if shared:
            ordered = map(self.ranks.share, ordered)
        if self.prefix is not None and self.prefix.values(split, torch.tensor([0])) is not None:
            for rows in ordered:
                yield self._batch(split, rows, self.prefix.values(split, rows), Noise(self.config.seed, 0, rows), None)
            return

        def finish(rows: Tensor, stored: Inputable) -> Batch:
            return self._batch(split, rows, self.ready(stored), Noise(self.config.seed, 0, rows), None)

        yield from batches(split, ordered, finish, workers=self.workers)

    def ready(self, stored: Inputable) -> Any:
        """What the model takes, on the run's device, from stored inputs."""
        return self.place(self.data.inputs.ready(map_inputs(stored, self.device.move)))

    def _batch(self, split: Split, rows: Tensor, inputs: Any, noise: Noise, weights: Tensor | None) -> Batch:
        return Batch(
            inputs=inputs,
            targets=self.place(split.targets.index_select(0, rows)),
            rows=rows,
            weights=None if weights is None else self.device.move(weights.index_select(0, rows)),
            noise=noise,
        )

    def _placed(self, tensor: Tensor) -> Tensor:
        moved = self.device.move(tensor)
        if moved.ndim == 4 and self.channels_last:
            return moved.contiguous(memory_format=torch.channels_last)
        return moved

    @property
    def channels_last(self) -> bool:
        """True where 4-D tensors are laid out with their channels last."""
        return self._model is not None and self._channels_last(self._model)

    def _channels_last(self, model: Model) -> bool:
        if self.config.memory_format != "auto" or self._contiguous:
            return self.config.memory_format == "channels-last"
        return any(parameter.ndim == 4 for parameter in model.module.parameters())


def _eval_batch(config: RunConfig) -> int:
    return config.eval_batch_size or max(EVALUATION_BATCH, config.batch_size)


def _rows_in(inputs: Any) -> int:
    values = inputs.values if isinstance(inputs, Features) else tuple(tensors_of(inputs).values())
    return len(values[0])


def in_pieces(whole: Batch, sizes: Sequence[int]) -> Iterator[Batch]:
    """A batch as several of these sizes, without a copy."""
    if len(sizes) == 1:
        yield whole
        return
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        weights = None if whole.weights is None else whole.weights[part]
        rows = whole.rows[part]
        inputs = _part_of(whole.inputs, part)
        yield Batch(inputs, whole.targets[part], rows, weights, attrs.evolve(whole.noise, rows=rows))
        start += size


def _part_of(inputs: Any, part: slice) -> Any:
    if isinstance(inputs, Features):
        return Features(tuple(each[part] for each in inputs.values))
    return map_inputs(inputs, lambda tensor: tensor[part])
