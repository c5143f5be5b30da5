"""What every hook is given: the run, as one thin object over its configuration, data, model and state."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tuneforge.engine.context import batches
from tuneforge.engine.context.distributed import ProcessGroup
from tuneforge.engine.context.forward import Features, ForwardPass
from tuneforge.engine.context.input_dtypes import candidate_dtypes, describe_conversion
from tuneforge.engine.context.state import EngineState, TrainerState
from tuneforge.engine.data.dataset import Batch, Data, Split, TensorTree
from tuneforge.engine.data.hidden_split import hide_test_splits
from tuneforge.engine.data.loader import choose_batch_size
from tuneforge.engine.data.sampler import EpochSampler, ListedSampler, derive_seed
from tuneforge.engine.data.tensor_tree import clone_inputs, named_tensors
from tuneforge.engine.model import fsdp
from tuneforge.engine.model.device import Device
from tuneforge.engine.model.inspection import preserve_state
from tuneforge.engine.model.model import Model, accepts_inputs, check_output
from tuneforge.engine.model.optimizer import Optimization
from tuneforge.engine.model.output_layer import infer_head, wrong_head_error
from tuneforge.errors import PluginError
from tuneforge.plugin.config import RunConfig
from tuneforge.plugin.hooks import Hooks
from tuneforge.plugin.image_preprocessing import ImagePreprocessing


@attrs.define(eq=False, kw_only=True)
class Run(TrainerState):
    """What every hook is given. Its counters (`step`, `epoch`, `phase`, ...) are those of `TrainerState`.

    Args:
        config: The resolved configuration; it never changes.
        run_dir: The run directory; None where nothing is written.
        device: Where the model computes.
        hooks: The components that take part.
        process_group: The processes that work on this run.
        resumed: True where the run continues from a checkpoint.
        restoring: True where the weights follow from a run directory: build the model's shapes and load nothing.
        single_split: True where other data is evaluated: a source that would draw splits returns all samples as one
            split, three times the same object.
        expected_inputs: How the weights of the model expect their inputs; None if no component says.
        optimization: The optimizer of the run, whose parameter groups hooks may read.
        forward_pass: How the model is called.
        engine_state: What only the engine needs.
        log_sink: Called with each message for the user.
    """

    config: RunConfig
    run_dir: Path | None
    device: Device
    hooks: Hooks
    process_group: ProcessGroup = ProcessGroup()
    resumed: bool = False
    restoring: bool = False
    single_split: bool = False
    expected_inputs: ImagePreprocessing | None = None
    optimization: Optimization = attrs.field(factory=Optimization)
    forward_pass: ForwardPass = attrs.field(
        default=attrs.Factory(
            lambda self: ForwardPass(self.device, self.config.precision, self.config.batch_size or 0), takes_self=True
        )
    )
    engine_state: EngineState = attrs.field(
        default=attrs.Factory(lambda self: EngineState.from_config(self.config), takes_self=True)
    )
    _log_sink: Callable[[str], None] = lambda text: None
    _batch_size: int = 0
    _data: Data | None = None
    _model: Model | None = None
    _prepared_example: Any = None
    _example: Any = None

    @property
    def data(self) -> Data:
        """The splits, the inputs and the targets; available once `data_prepare` has returned.

        While a strategy decides, reading a test split is an error.
        """
        if self._data is None:
            raise PluginError("there is no data yet", why="data_prepare has not finished", fix="ask in a later hook")
        return hide_test_splits(self._data) if self.engine_state.strategy_decides else self._data

    @property
    def model(self) -> Model:
        """The model; available once `model_adapt` has returned."""
        if self._model is None:
            raise PluginError("there is no model yet", why="model_adapt has not finished", fix="ask in a later hook")
        return self._model

    @property
    def example(self) -> Any:
        """What the model takes for two training samples, on the run's device; builders read shapes from it."""
        if self._prepared_example is None:
            self._prepared_example = self.data.example()
        if self._example is None:
            self._example = self.forward_pass.convert(self.to_device(self._prepared_example))
        return clone_inputs(self._example)  # a model may overwrite its inputs

    @property
    def batch_size(self) -> int:
        """Samples per training batch: that of the configuration, or the one chosen for the data."""
        return self._batch_size

    @property
    def data_seed(self) -> int:
        """The seed of everything random in `data_prepare`."""
        return self.config.seed if self.config.data_seed is None else self.config.data_seed

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype in which data in memory is stored: float64 for a module that was given in it, else float32."""
        if self._model is not None:
            dtypes = {each.dtype for each in self._model.module.parameters()}
        else:
            components = (member.component for member in self.hooks.components)
            dtypes = {dtype for each in components for dtype in getattr(each, "weight_dtypes", ())}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    @property
    def sharded(self) -> bool:
        """True where FSDP leaves each rank a shard of the model."""
        return self.config.shard and self.process_group.world_size > 1

    def log(self, text: str) -> None:
        """Log a message for the user, on the terminal and in the run's log."""
        self._log_sink(text)

    def end_epoch(self, reason: str) -> None:
        """End the epoch after the current optimizer step; validation follows, then the next epoch.

        Like `end_phase` and `end_run`, it takes effect on all ranks, is part of a checkpoint, and does nothing in a
        refit, which repeats what was trained before.

        Args:
            reason: Why, for the log and the report.

        Raises:
            PluginError: No phase is training.
        """
        self._request_end("epoch", reason)

    def end_phase(self, reason: str) -> None:
        """End the phase after the current optimizer step and a validation; the strategy goes on with its result.

        Args:
            reason: Why, for the log and the report.

        Raises:
            PluginError: No phase is training.
        """
        self._request_end("phase", reason)

    def end_run(self, reason: str) -> None:
        """End the phase as `end_phase` does, and take no further step of the strategy; the report follows.

        Args:
            reason: Why, for the log and the report.
        """
        self._request_end("run", reason)

    def _request_end(self, part: str, reason: str) -> None:
        if self.phase is None and part != "run":
            raise PluginError(
                f"run.end_{part} was called while no phase is training",
                why=f"there is no {part} to end",
                fix="call it from phase_started, train_step, optimizer_step, evaluation_ended or epoch_ended",
            )
        if not self.engine_state.is_refit:
            self.engine_state.end_requests.setdefault(part, reason)

    def agree_on_ends(self) -> dict[str, str]:
        """Return what components of any rank asked to end early, with the reasons; only the engine calls it."""
        requests = self.engine_state.end_requests
        if self.process_group.all_reduce_any(bool(requests))[0]:
            for each in self.process_group.all_gather_object(dict(requests)):
                for part, reason in each.items():
                    requests.setdefault(part, reason)
        return requests

    def state(self, component: object) -> dict[str, Any]:
        """Return the dictionary of a component's state: tensors and plain data, saved with checkpoints."""
        return self.engine_state.component_states.setdefault(self._state_key(component), {})

    def _state_key(self, component: object) -> str:
        """Return the same key for the same component in a resumed run: its position among all and its name.

        A class of a script is in `__main__` or in the module of that name, so the module is left out.
        """
        for position, member in enumerate(self.hooks.components):
            if member.component is component:
                return f"{position}:{member.name.rpartition(':')[2]}"
        for position, augmentation in enumerate(self.engine_state.augmentations):
            if augmentation is component:
                return f"augment:{position}"
        raise PluginError(f"{type(component).__name__} is not part of this run", fix="call run.state(self)")

    def forward(self, inputs: Any) -> Any:
        """Return the model's logits (b, k) for the inputs of a batch."""
        if isinstance(inputs, Features):
            inputs = batches.current_inputs(self, inputs)
        return self.forward_pass(self.model.module, inputs, evaluating=self.eval_split is not None)

    def preserve_model(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context after which the model is as it was: all that its modules hold, and the random generators."""
        return preserve_state(self.model.module)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which forward passes compute."""
        return self.forward_pass.autocast()

    def to_device(self, inputs: Any) -> Any:
        """Return inputs or targets on the run's device, 4-D tensors in the model's memory format."""
        return self.forward_pass.to_device(inputs)

    def prepare_inputs(self, samples: TensorTree) -> Any:
        """Return what the model takes, on the run's device, from the stored inputs of a batch."""
        return batches.prepare_inputs(self, samples)

    def training_batches(
        self, sampler: EpochSampler | ListedSampler, weights: Tensor | None, *, start: int = 0, per_rank: bool = True
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch; see `tuneforge.engine.context.batches.training_batches`."""
        return batches.training_batches(self, sampler, weights, start=start, per_rank=per_rank)

    def evaluation_batches(self, split: Split, *, per_rank: bool = False) -> Iterator[Batch]:
        """Yield every sample of a split once; see `tuneforge.engine.context.batches.evaluation_batches`."""
        return batches.evaluation_batches(self, split, per_rank=per_rank)

    def reseed(self, batch: int = 0, *, step: int | None = None) -> None:
        """Seed torch's generators from the run's seed, the optimizer step and the batch of it.

        Random operations inside the model thus do not depend on what was drawn before, so that a resumed run draws
        the same. Each rank draws its own numbers.
        """
        rank = [self.process_group.rank] if self.process_group.rank else []
        seed = (
            derive_seed(self.config.seed, "step", self.step if step is None else step, batch, *rank)
            & 0x7FFFFFFFFFFFFFFF
        )
        torch.default_generator.manual_seed(seed)
        self.device.reseed(seed)

    def set_data(self, data: Data) -> None:
        """Set the data; only the engine does."""
        self.close()
        self._data, self._prepared_example, self._example = data, None, None
        if not self._batch_size:  # a refit, on more samples, keeps it
            self._batch_size = self.config.batch_size or choose_batch_size(len(data.train))
            self.forward_pass.full_batch_size = self._batch_size

    def as_model(self, built: Any) -> Model:
        """Return a model of what a model component or a function has built: a `Model`, or a module.

        The head of a module is the linear layer that computes its output.

        Raises:
            PluginError: It is neither.
        """
        if isinstance(built, Model):
            return built
        if isinstance(built, nn.Module):
            return Model.from_module(built)
        raise PluginError(
            f"what builds the model returned {type(built).__name__}",
            fix="return a torch.nn.Module or a tuneforge.Model",
        )

    def set_model(self, model: Model, *, check: bool = True) -> None:
        """Set the model, and move it to the run's device and memory format; only the engine does.

        Args:
            model: The model.
            check: False for the graph of a model, which was checked before and does not call the head as a module.

        Raises:
            PluginError: It does not accept the data, or its head does not give its output.
            UsageError: It cannot be sharded.
        """
        if self.sharded:
            self.log(fsdp.shard(model, self.device.torch))
        else:
            model.module.to(self.device.torch)
        self._model = model
        self.match_inputs(model)
        if self._prefers_channels_last(model):
            self._set_memory_format(channels_last=True)
            if self.config.memory_format == "auto" and not accepts_inputs(model, self.example):
                self._set_memory_format(channels_last=False)
                self.log("note: the model needs contiguous tensors, so channels-last is off")
        try:
            if (
                check
                and model.head_inferred
                and not self.sharded
                and infer_head(model, self.example).head != model.head
            ):
                raise wrong_head_error(model)
            if check:
                check_output(model, self.example)
        except PluginError as error:
            if not self.sharded:
                raise
            raise fsdp.incompatible_error(error) from error

    def match_inputs(self, model: Model) -> None:
        """Convert the inputs from now on if the model takes them only in other dtypes than the data has."""
        before = self.forward_pass.input_dtypes
        self.forward_pass.input_dtypes, self._example = {}, None
        self.forward_pass.double_targets = self.float_dtype == torch.float64
        example = self.example
        candidates = candidate_dtypes(model.module, example)
        first = next(candidates, None)
        if first is None or accepts_inputs(model, example):
            return
        for dtypes in itertools.chain([first], candidates):
            self.forward_pass.input_dtypes = dtypes
            if accepts_inputs(model, self.forward_pass.convert(example)):
                if dtypes != before:
                    self.log(f"note: {describe_conversion(dtypes, example)}")
                break
        else:  # the error will name another reason than the dtype of floats
            floats = {name for name, each in named_tensors(example).items() if each.is_floating_point()}
            self.forward_pass.input_dtypes = {name: dtype for name, dtype in first.items() if name in floats}
        self._example = None

    def _prefers_channels_last(self, model: Model) -> bool:
        if self.config.memory_format != "auto" or self.sharded:
            return self.config.memory_format == "channels-last"
        return any(parameter.ndim == 4 for parameter in model.module.parameters())

    def _set_memory_format(self, *, channels_last: bool) -> None:
        self.forward_pass.set_memory_format(self.model.module, channels_last=channels_last)
        self._example = None  # it was laid out in the other format

    def close(self) -> None:
        """End the processes that decode samples."""
        if self.engine_state.workers is not None:
            self.engine_state.workers.close()
        self.engine_state.workers = None
