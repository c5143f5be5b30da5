"""The features of a phase in memory, and the two parts of the model that they connect."""

from __future__ import annotations

import attrs
from torch import Tensor, nn

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Split
from tuneforge.engine.feature_cache.graph_split import SplitModel
from tuneforge.engine.model.inspection import StateCopy
from tuneforge.engine.model.modes import Modes, set_modes
from tuneforge.engine.model.module_state import bitwise_equal

Values = tuple[Tensor, ...]
"""The values at the cut, each (b, ...)."""


@attrs.frozen(eq=False)
class TracedState:
    """What the traced parts of a model rely on beside its weights: attributes, hooks and the buffers of the backbone.

    Args:
        module: The whole model.
        modes: The modes of the phase.
        training: Its attributes in these modes, and which tensors are its parameters and buffers.
        evaluating: The same in eval mode.
        buffers: The buffers that the backbone uses, by name, and their values.
    """

    module: nn.Module
    modes: Modes
    training: StateCopy
    evaluating: StateCopy
    buffers: list[tuple[str, Tensor, Tensor]]

    @classmethod
    def copy(cls, module: nn.Module, modes: Modes, backbone: nn.Module) -> TracedState:
        """Copy the present state; the module is left in eval mode."""
        set_modes(modes)
        training = StateCopy({"": module}, values=False)
        module.eval()
        buffers = [(name, each, each.clone()) for name, each in backbone.named_buffers()]
        return cls(module, modes, training, StateCopy({"": module}, values=False), buffers)

    def find_change(self, *, evaluating: bool) -> str:
        """Return what has changed since, for a sentence; "" if nothing has."""
        if not evaluating:
            set_modes(self.modes)
        for path in (self.evaluating if evaluating else self.training).changes():
            return f"'{path}' of the model has changed"
        changed = (name for name, buffer, value in self.buffers if not bitwise_equal(buffer, value))
        return next((f"the buffer '{name}' of the frozen backbone has changed" for name in changed), "")


@attrs.define(eq=False)
class FeatureCache:
    """A model in two parts, with the features of the training and validation splits.

    Args:
        split_model: The model in two parts.
        bytes_per_sample: Size of the features of one sample.
        num_augmented_copies: Cached augmented copies of each training sample; 0 if training is not augmented.
        features: The features of a split's samples, by the split's identity and the number of the copy.
        traced_state: What must not change while the features are used; None until they are.
        earlier_change: What had changed before the interruption of a resumed phase, and was not noticed yet.
        checks_each_pass: True where components of the user run between optimizer steps, and may change the model.
        num_computed_batches: Batches of features that were computed; 0 if all were found.
        num_hits: Splits and copies whose features were found in memory or on disk.
    """

    split_model: SplitModel
    bytes_per_sample: int = 0
    num_augmented_copies: int = 0
    features: dict[tuple[int, int], Values] = attrs.field(factory=dict)
    traced_state: TracedState | None = None
    earlier_change: str = ""
    checks_each_pass: bool = False
    num_computed_batches: int = 0
    num_hits: int = 0

    @property
    def train_tail(self) -> nn.Module:
        """The module that computes the output from the features, in the modes of the phase."""
        return self.split_model.train_tail

    @property
    def eval_tail(self) -> nn.Module:
        """The same in eval mode."""
        return self.split_model.eval_tail

    def get_features(self, split: Split, indices: Tensor, *, epoch: int = 0) -> Values | None:
        """Return the features at `indices`, or None if the split is not cached; `epoch` selects the copy."""
        copy_index = epoch % self.num_augmented_copies if self.num_augmented_copies else 0
        values = self.features.get((id(split), copy_index))
        if values is None:
            return None
        return tuple(each.index_select(0, indices.to(each.device)) for each in values)

    def find_change(self, *, evaluating: bool) -> str:
        """Return what has changed in the model since it was traced, beside its weights; "" if nothing has."""
        if self.traced_state is None or self.earlier_change:
            return self.earlier_change
        return self.traced_state.find_change(evaluating=evaluating)


def num_megabytes(run: Run, cache: FeatureCache) -> float:
    """Return the size of all features of a cache in MB."""
    return (
        cache.bytes_per_sample * (len(run.data.train) * max(1, cache.num_augmented_copies) + len(run.data.val)) / 2**20
    )
