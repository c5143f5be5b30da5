"""scikit-learn estimators, whose `fit` is a run, for pipelines, cross-validation and searches.

The constructor only stores options. A saved estimator is a run directory, so `tuneforge predict` and
`tuneforge report` accept it.

Shapes: n samples, f features, c channels, h and w pixels, k classes or numbers.
"""
# ruff: noqa: N803 - `X` is scikit-learn's name for samples, and callers pass it by keyword

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from tuneforge.builtin.datasets.tables.arrays import data_from_arrays
from tuneforge.builtin.datasets.tables.target_arrays import standardize
from tuneforge.builtin.targets import ClassTargets, RegressionTargets, compute_mean_and_scale
from tuneforge.sklearn.estimator import FLOAT32_TOLERANCE, TunedEstimator

__all__ = ["TunedClassifier", "TunedRegressor", "data_from_arrays"]


class TunedClassifier(ClassifierMixin, TunedEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """Fine-tune a classifier by any strategy, on tables or images.

    Samples are a table of numbers (n, f), or arrays of any other shape that the model takes; uint8 images (n, c, h, w)
    are scaled to 0 to 1. `fit` holds out a fraction of the samples for validation, which early stopping and the choice
    of the best weights use. If there are too few samples, the training samples serve for validation too.

    Args:
        model: A name, `tf.use(name, ...)`, a torch module, or a component; None is `mlp`, for tables. A module is
            copied, not modified.
        strategy: A name, `tf.use(name, ...)`, a component, a list of steps, or a function of the task.
        model_options: Options of a model by name; also `set_params(model__NAME=...)`.
        strategy_options: Options of a strategy by name; also `set_params(strategy__NAME=...)`, for searches.
        adapt: Model adapters, in order.
        augment: Augmentations of training samples, in order.
        callbacks: Callbacks.
        optimizer: Optimizer instead of the strategy's.
        schedule: Learning rate schedule instead of the strategy's.
        batch_size: Samples per optimizer step.
        validation_fraction: Fraction of the samples of each class that is held out for validation; 0 for none.
        standardize: Standardize each feature of a table with mean and std of the training samples.
        partial_lr: Learning rate of each `partial_fit` but the first.
        device: Device name.
        settings: Other settings of the run by name, such as `{"precision": "bf16"}`.
        runs_dir: Folder of run directories `run-1`, `run-2` and so on; None keeps no files.
        random_state: Source of randomness; an integer is the seed of the run.
        verbose: Print the log of the run.

    Attributes:
        classes_: The classes, sorted (k,).
        n_features_in_: Size of the first axis of a sample.
        feature_names_in_: Names of the features, if the samples have them.
        predictor_: The fine-tuned model, a `tuneforge.Predictor`.
        report_: The report of the last run.
        run_dir_: Run directory of the last run, if `runs_dir` is given.
    """

    _fitted_attributes: ClassVar[tuple[str, ...]] = (*TunedEstimator._fitted_attributes, "classes_")

    def fit(self, X: Any, y: Any) -> Self:
        """Fine-tune on samples and their classes (n,), from the initial weights of the model.

        Raises:
            ValueError: The samples are invalid, or all of one class.
            TuneforgeError: The run failed.
        """
        samples, y = self._validate_samples(X, y, reset=True)
        check_classification_targets(y)
        classes = np.unique(y)
        if len(classes) < 2:
            raise ValueError(f"there is only one class, {classes[0]!r}; a classifier needs at least two classes")
        self.classes_ = classes
        self._run_engine(samples, y, first=True)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Continue training with more samples.

        The first call uses the strategy. Other calls, and those after `fit`, train all layers for one epoch with
        learning rate `partial_lr`, from the current weights.

        Args:
            X: Samples.
            y: Their classes (n,).
            classes: All classes that any call may have; required in the first call.

        Raises:
            ValueError: The samples are invalid, or the classes are missing or differ from those of the first call.
        """
        first = not hasattr(self, "predictor_")
        if first and classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit")
        samples, y = self._validate_samples(X, y, reset=first)
        check_classification_targets(y)
        known = self.classes_ if classes is None else np.unique(classes)
        if not first and not np.array_equal(known, self.classes_):
            raise ValueError(f"classes {known.tolist()} are not those of the first call, {self.classes_.tolist()}")
        if unknown := sorted(set(np.unique(y).tolist()) - set(known.tolist())):
            raise ValueError(f"y has the classes {unknown}, which are not among {known.tolist()}")
        self.classes_ = known
        self._run_engine(samples, y, first=first)
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probabilities (n, k) of the classes, in the order of `classes_`."""
        logits = self._compute_outputs(X)
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities: NDArray[np.float64] = exponentials / exponentials.sum(1, keepdims=True)
        return probabilities

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class of each sample (n,)."""
        places = self._compute_outputs(X).argmax(1)
        best: NDArray[Any] = self.classes_[places]
        return best

    def _group_rows(self, y: NDArray[Any]) -> list[Tensor]:
        return [torch.from_numpy(np.flatnonzero(y == each)) for each in np.unique(y)]

    def _build_targets(self, y: NDArray[Any], train: Tensor) -> ClassTargets:
        return ClassTargets(names=tuple(str(each) for each in self.classes_.tolist()))

    def _encode_targets(self, y: NDArray[Any], targets: ClassTargets) -> Tensor:
        return torch.from_numpy(np.searchsorted(self.classes_, y))


class TunedRegressor(RegressorMixin, TunedEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """Fine-tune a model for regression with one or several outputs, by any strategy, on tables or images.

    Targets are standardized with mean and std of the training samples. Everything else, parameters included, is as in
    `TunedClassifier`.

    Attributes:
        n_features_in_: Size of the first axis of a sample.
        feature_names_in_: Names of the features, if the samples have them.
        predictor_: The fine-tuned model, a `tuneforge.Predictor`.
        report_: The report of the last run.
        run_dir_: Run directory of the last run, if `runs_dir` is given.
    """

    _fitted_attributes: ClassVar[tuple[str, ...]] = (*TunedEstimator._fitted_attributes, "_is_single_output")

    def fit(self, X: Any, y: Any) -> Self:
        """Fine-tune on samples and their targets, (n,) or (n, k), from the initial weights of the model.

        Raises:
            ValueError: The samples are invalid.
            TuneforgeError: The run failed.
        """
        samples, y = self._validate_numbers(X, y, reset=True)
        self._is_single_output = y.ndim == 1
        self._run_engine(samples, y, first=True)
        return self

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Continue training with more samples.

        The first call uses the strategy. Other calls, and those after `fit`, train all layers for one epoch with
        learning rate `partial_lr`, from the current weights and with the standardization of the first call.

        Raises:
            ValueError: The samples are invalid.
        """
        if not hasattr(self, "predictor_"):
            return self.fit(X, y)
        samples, y = self._validate_numbers(X, y, reset=False)
        if (found := y.reshape(len(y), -1).shape[1]) != self.predictor_.targets.num_outputs:
            raise ValueError(f"{found} target(s) per sample; expected {self.predictor_.targets.num_outputs}")
        self._run_engine(samples, y, first=False)
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Return the predictions in original units, (n,) or (n, k) as the targets of `fit`."""
        outputs = self._compute_outputs(X)
        targets: Any = self.predictor_.targets
        numbers: NDArray[np.float64] = outputs * np.array(targets.scales) + np.array(targets.means)
        return numbers[:, 0] if self._is_single_output else numbers

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _validate_numbers(self, X: Any, y: Any, *, reset: bool) -> tuple[NDArray[Any], NDArray[np.float64]]:
        samples, y = self._validate_samples(X, y, reset=reset, multi_output=True, y_numeric=True)
        column = y.ndim == 2 and y.shape[1] == 1
        return samples, (column_or_1d(y, warn=True) if column else y).astype(np.float64)

    def _group_rows(self, y: NDArray[Any]) -> list[Tensor]:
        return [torch.arange(len(y))]

    def _build_targets(self, y: NDArray[Any], train: Tensor) -> RegressionTargets:
        columns = y[train.numpy()].reshape(len(train), -1)
        means, scales = compute_mean_and_scale(columns, tolerance=FLOAT32_TOLERANCE)
        names = ("value",) if len(means) == 1 else tuple(f"value{place}" for place in range(len(means)))
        return RegressionTargets(names=names, means=tuple(means.tolist()), scales=tuple(scales.tolist()))

    def _encode_targets(self, y: NDArray[Any], targets: RegressionTargets) -> Tensor:
        return standardize(y, targets)
