"""The features of a phase in memory, and the two parts of the model that they connect."""

from __future__ import annotations

import attrs
from torch import Tensor, nn

from tuneforge.engine.context.forward import Features
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Split
from tuneforge.engine.feature_cache.graph_split import SplitModel

Values = tuple[Tensor, ...]
"""The values at the cut, each (b, ...)."""


@attrs.define(eq=False)
class FeatureCache:
    """A model in two parts, with the features of the training and validation splits.

    Args:
        split_model: The model in two parts.
        bytes_per_sample: Size of the features of one sample.
        num_augmented_copies: Cached augmented copies of each training sample; 0 if training is not augmented.
        features: The features of a split's samples, by the split's identity and the number of the copy.
        num_computed_batches: Batches of features that were computed; 0 if all were found.
        num_hits: Splits and copies whose features were found in memory or on disk.
    """

    split_model: SplitModel
    bytes_per_sample: int = 0
    num_augmented_copies: int = 0
    features: dict[tuple[int, int], Values] = attrs.field(factory=dict)
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

    def get_features(self, split: Split, indices: Tensor, *, epoch: int = 0) -> Features | None:
        """Return the features at `indices`, or None if the split is not cached; `epoch` selects the copy."""
        copy_index = epoch % self.num_augmented_copies if self.num_augmented_copies else 0
        values = self.features.get((id(split), copy_index))
        if values is None:
            return None
        return Features(tuple(each.index_select(0, indices.to(each.device)) for each in values))


def num_megabytes(run: Run, cache: FeatureCache) -> float:
    """Return the size of all features of a cache in MB."""
    return (
        cache.bytes_per_sample * (len(run.data.train) * max(1, cache.num_augmented_copies) + len(run.data.val)) / 2**20
    )
