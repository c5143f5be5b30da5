"""Tuning that goes on: a run's data joined by newly labelled samples, and a model that starts where a run ended.

Only options are declared here, so that `--help` needs no torch; the work is in `joined`.
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
    """A run's own data, joined by newly labelled samples: the parts `old` and `new` of the training split.

    Validation gets a share of the new samples. The old test split stays what it was; new samples that are held out are
    a test split of their own, `new`. Classes may grow: new ones follow the old ones, by name.
    """

    run: Path = option(help="The run whose data go on: its folder, or a bundle that holds its safetensors form.")
    new: Path = option(help="The new samples, a safetensors file as `tuneforge retune` writes it.")
    val: float = option(default=0.2, help="Share of the new samples for validation.", check=between(0, 0.5))
    fewest: int = option(
        default=5, help="Training samples that a new class must have; one with fewer is left out.", check=ge(2)
    )

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Prepare the old data again, read the new samples, and join them."""
        from tuneforge_serve.feedback.new_samples import merge_new_samples, read_new_samples

        return merge_new_samples(
            self.run, read_new_samples(self.new), val=self.val, min_samples_per_class=self.fewest, seed=run.data_seed
        )


@component(api=1)
class WarmStart:
    """Start from the weights of a finished run: tensors by name, rows of the head by the names of their classes."""

    run: Path = option(help="The finished run: its folder, or a bundle that holds its safetensors form.")

    @hookimpl(wrapper=True)
    def model_adapt(self, run: Run) -> Generator[None, Model, Model]:
        """Build the model as its chain says, then copy the weights.

        Raises:
            DataError: A tensor other than the head's has another shape.
        """
        model = yield
        if run.restoring:
            return model
        from tuneforge_serve.feedback.new_samples import load_warm_start

        return load_warm_start(model, self.run)
