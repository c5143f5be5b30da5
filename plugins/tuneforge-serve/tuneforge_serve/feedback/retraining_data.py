"""Components for retraining: a run's data with newly labeled samples, and a warm start from the weights of a run.

This module only declares options, so that `--help` imports no torch; `new_samples` does the work.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from tuneforge import between, component, ge, hookimpl, option

if TYPE_CHECKING:
    from tuneforge import Data, Model, Run


@component(api=1)
class ContinualData:
    """A run's own data with newly labeled samples: the sample groups `old` and `new` of the training split.

    A fraction of the new samples is for validation. The old test split is unchanged; held-out new samples are the extra
    test split `new`. New classes follow the old ones, sorted by name.
    """

    run: Path = option(help="The run with the old data: its directory, or a bundle with safetensors weights.")
    new: Path = option(help="The new samples: a safetensors file that `tuneforge retrain` writes.")
    val: float = option(default=0.2, help="Fraction of the new samples for validation.", check=between(0, 0.5))
    min_samples_per_class: int = option(
        default=5, help="Minimum number of training samples of a new class; a smaller class is skipped.", check=ge(2)
    )

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Prepare the old data, read the new samples, and merge them."""
        from tuneforge_serve.feedback.new_samples import merge_new_samples, read_new_samples

        return merge_new_samples(
            self.run,
            read_new_samples(self.new),
            val=self.val,
            min_samples_per_class=self.min_samples_per_class,
            seed=run.data_seed,
        )


@component(api=1)
class WarmStart:
    """Start from the weights of a finished run: tensors by name, rows of the head by class name."""

    run: Path = option(help="The finished run: its directory, or a bundle with safetensors weights.")

    @hookimpl(wrapper=True)
    def model_adapt(self, run: Run) -> Generator[None, Model, Model]:
        """Build the model, then load the weights.

        Raises:
            DataError: A tensor outside the head has another shape.
        """
        model = yield
        if run.restoring:
            return model
        from tuneforge_serve.feedback.new_samples import load_warm_start

        return load_warm_start(model, self.run)
