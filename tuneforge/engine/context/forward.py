"""How a run calls its model: device, precision, memory format, and which module computes the logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn

from tuneforge.engine.data.dataset import Split, map_inputs, named_tensors
from tuneforge.engine.model.dataflow import FreezeFunctions
from tuneforge.engine.model.device import Device
from tuneforge.engine.model.model import call_module, extract_logits

_HALF_PRECISION = (torch.bfloat16, torch.float16)


@attrs.frozen(eq=False)
class Features:
    """Cached features that replace the inputs of a batch.

    Args:
        values: The frozen backbone's values at the cut, each (b, ...).
        indices: Rows of the split, int64 (b,).
        load_inputs: Returns what the model takes for some of these rows.
    """

    values: tuple[Tensor, ...]
    indices: Tensor
    load_inputs: Callable[[Tensor], Any]

    def slice(self, part: slice) -> Features:
        """Return the features of some samples of the batch, as views."""
        return Features(tuple(each[part] for each in self.values), self.indices[part], self.load_inputs)


class FeatureCacheProtocol(Protocol):
    """What a run needs of `tuneforge.engine.feature_cache.cache.FeatureCache`, which is built above this layer."""

    @property
    def bytes_per_sample(self) -> int:
        """Size of the features of one sample."""

    @property
    def num_augmented_copies(self) -> int:
        """Cached augmented copies of each training sample; 0 where training is not augmented."""

    @property
    def train_tail(self) -> nn.Module:
        """The module that computes the output from the features, in the modes of the phase."""

    @property
    def eval_tail(self) -> nn.Module:
        """The same in eval mode."""

    @property
    def checks_each_pass(self) -> bool:
        """True where components of the user run between optimizer steps, and may change the model."""

    def get_features(self, split: Split, indices: Tensor, *, epoch: int = 0) -> tuple[Tensor, ...] | None:
        """Return the features of the samples at `indices`, or None where the split is not cached.

        `epoch` selects the augmented copy.
        """

    def find_change(self, *, evaluating: bool) -> str:
        """Return what has changed in the model since it was traced, beside its weights; "" if nothing has."""


@attrs.define(eq=False)
class ForwardPass:
    """The forward pass of a run's model.

    Args:
        device: Where the model computes.
        precision: `"fp32"`, or what autocast uses instead.
        full_batch_size: Samples of a full training batch, the only size that `compiled_module` is compiled for.
        channels_last: True where 4-D tensors are converted to `torch.channels_last`.
        feature_cache: The features of the phase, where its frozen backbone is cached.
        compiled_module: What the phase trains, compiled; None where it is not.
        input_dtypes: The dtypes that inputs are converted to, by name ("" for a single one).
        double_targets: True for a model of float64 weights, whose losses take float64 targets.
        function_mode: The mode in which the phase calls its model, if functions have to be frozen.
    """

    device: Device
    precision: str
    full_batch_size: int
    channels_last: bool = False
    feature_cache: FeatureCacheProtocol | None = None
    compiled_module: Any = None
    input_dtypes: Mapping[str, torch.dtype] = attrs.field(factory=dict)
    double_targets: bool = False
    function_mode: FreezeFunctions | None = None

    def __call__(self, module: nn.Module, inputs: Any, *, evaluating: bool) -> Any:
        """Return the logits (b, k) for the inputs or the cached features of a batch, in float32.

        Args:
            module: The whole model.
            inputs: What the model takes, or `Features`.
            evaluating: True to take the eval-mode tail of the feature cache, and never the compiled module.
        """
        with (
            self.autocast(),
            contextlib.nullcontext() if evaluating else self.function_mode or contextlib.nullcontext(),
        ):
            output = extract_logits(self._call_network(module, inputs, evaluating))
        return output.float() if isinstance(output, Tensor) and output.dtype in _HALF_PRECISION else output

    def _call_network(self, module: nn.Module, inputs: Any, evaluating: bool) -> Any:
        cached = isinstance(inputs, Features)
        network: Any = module
        if cached:
            assert self.feature_cache is not None
            network = self.feature_cache.eval_tail if evaluating else self.feature_cache.train_tail
        if self.compiled_module is not None and not evaluating and _num_samples(inputs) == self.full_batch_size:
            network = self.compiled_module  # another batch size would be compiled again
        return network(*map(self._move, inputs.values)) if cached else call_module(network, self.convert(inputs))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which forward passes compute."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.torch.type, torch.bfloat16)

    def to_device(self, inputs: Any) -> Any:
        """Return inputs or targets on the device, 4-D tensors in the model's memory format."""
        return map_inputs(inputs, self._move) if isinstance(inputs, (Tensor, Mapping)) else inputs

    def convert(self, inputs: Any) -> Any:
        """Return inputs in the dtypes that the model takes."""
        if not self.input_dtypes:
            return inputs
        if isinstance(inputs, Tensor):
            return inputs.to(self.input_dtypes[""])
        return {name: tensor.to(self.input_dtypes.get(name, tensor.dtype)) for name, tensor in inputs.items()}

    def prepare_targets(self, targets: Tensor) -> Tensor:
        """Return targets as the loss takes them, on the device."""
        moved: Tensor = self.to_device(targets)
        return moved.double() if self.double_targets and moved.is_floating_point() else moved

    def set_memory_format(self, module: nn.Module, *, channels_last: bool) -> None:
        """Convert the module, and from now on its inputs, to channels-last or to contiguous tensors."""
        module.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self.channels_last = channels_last

    def _move(self, tensor: Tensor) -> Tensor:
        moved = self.device.move(tensor)
        if moved.ndim == 4 and self.channels_last:
            return moved.contiguous(memory_format=torch.channels_last)
        return moved


def _num_samples(inputs: Any) -> int:
    values = inputs.values if isinstance(inputs, Features) else tuple(named_tensors(inputs).values())
    return len(values[0])
