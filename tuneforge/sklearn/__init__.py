"""scikit-learn estimators: a whole run behind `fit`, so that pipelines, cross-validation and searches can hold it.

They store options and nothing else until `fit` is called. What `fit` leaves is the content of a run folder, so a saved
estimator is one too: `tuneforge predict` and `tuneforge report` take it.

Shapes: n samples, f features, c channels, h and w pixels, k classes or numbers.
"""
# ruff: noqa: N803 - `X` is scikit-learn's own name for samples, and callers write it

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
    """Tune a model to tell classes apart, by any strategy, on tables or pictures.

    Samples are a table of numbers (n, f), or arrays of any further shape that the model takes; uint8 pictures
    (n, c, h, w) are brought to the scale 0 to 1. Everything a run needs is drawn from what `fit` is given: a share is
    held out for validation, which early stopping and best weights look at. Without samples to spare, training samples
    serve for that too.

    Args:
        model: A name, `tf.use(name, ...)`, a torch module, or a component; None: `mlp`, for tables. A module is copied:
            yours stays as it is.
        strategy: A name, `tf.use(name, ...)`, a component, a list of steps, or a function of the task.
        model_options: Options of a model by name; also `set_params(model__NAME=...)`.
        strategy_options: Options of a strategy by name; also `set_params(strategy__NAME=...)`, so that a search can go
            over them.
        adapt: What changes the model, in order.
        augment: Random changes of training samples, in order.
        callbacks: What else takes part.
        optimizer: In place of the strategy's.
        schedule: Course of the rate, in place of the strategy's.
        batch_size: Samples a training step.
        validation_fraction: Share of the samples, of each class, that is held out of training; 0: none.
        standardize: Bring each feature of a table to mean 0 and deviation 1 over the training part.
        partial_lr: Learning rate of each `partial_fit` but the first.
        device: Where to compute.
        settings: Further settings of the run by name, such as `{"precision": "bf16"}`.
        runs_dir: Folder under which each run is kept, as `run-1`, `run-2`, ...; None: nothing is kept on disk.
        random_state: Of everything that is drawn; an integer is the run's seed.
        verbose: Print what the run says.

    Attributes:
        classes_: The classes, sorted (k,).
        n_features_in_: Length of a sample's first axis.
        feature_names_in_: Names of the features, where the samples had some.
        predictor_: The tuned model, as `tuneforge.load` gives it.
        report_: The report of the last run.
        run_dir_: Where `runs_dir` keeps the last run.
    """

    _fitted_attributes: ClassVar[tuple[str, ...]] = (*TunedEstimator._fitted_attributes, "classes_")

    def fit(self, X: Any, y: Any) -> Self:
        """Tune on samples and their classes (n,), from the model's own weights.

        Raises:
            ValueError: The samples cannot be used, or are all of one class.
            TuneforgeError: The run went wrong.
        """
        samples, y = self._validate_samples(X, y, reset=True)
        check_classification_targets(y)
        classes = np.unique(y)
        if len(classes) < 2:
            raise ValueError(f"there is only one class, {classes[0]!r}; a classifier needs at least two to tell apart")
        self.classes_ = classes
        self._run_engine(samples, y, first=True)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Go on with some more samples.

        The first call tunes by the strategy. Each further one, and each after `fit`, takes every layer through the
        samples once, at the rate `partial_lr`, from the present weights.

        Args:
            X: Samples.
            y: Their classes (n,).
            classes: All classes there will ever be; the first call needs them.

        Raises:
            ValueError: The samples cannot be used, or the classes are missing or others than before.
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
        """Probabilities (n, k) of the classes, in the order of `classes_`."""
        logits = self._compute_outputs(X)
        shares = np.exp(logits - logits.max(1, keepdims=True))
        probabilities: NDArray[np.float64] = shares / shares.sum(1, keepdims=True)
        return probabilities

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each sample (n,)."""
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
    """Tune a model to answer with a number, or several, by any strategy, on tables or pictures.

    The numbers are brought to mean 0 and deviation 1 over the training part, and answers back. All else, and every
    parameter, is as in `TunedClassifier`.

    Attributes:
        n_features_in_: Length of a sample's first axis.
        feature_names_in_: Names of the features, where the samples had some.
        predictor_: The tuned model, as `tuneforge.load` gives it.
        report_: The report of the last run.
        run_dir_: Where `runs_dir` keeps the last run.
    """

    _fitted_attributes: ClassVar[tuple[str, ...]] = (*TunedEstimator._fitted_attributes, "_is_single_output")

    def fit(self, X: Any, y: Any) -> Self:
        """Tune on samples and their numbers, (n,) or (n, k), from the model's own weights.

        Raises:
            ValueError: The samples cannot be used.
            TuneforgeError: The run went wrong.
        """
        samples, y = self._validate_numbers(X, y, reset=True)
        self._is_single_output = y.ndim == 1
        self._run_engine(samples, y, first=True)
        return self

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Go on with some more samples.

        The first call tunes by the strategy. Each further one, and each after `fit`, takes every layer through the
        samples once, at the rate `partial_lr`, from the present weights and with the scale of the first numbers.

        Raises:
            ValueError: The samples cannot be used.
        """
        if not hasattr(self, "predictor_"):
            return self.fit(X, y)
        samples, y = self._validate_numbers(X, y, reset=False)
        if (found := y.reshape(len(y), -1).shape[1]) != self.predictor_.targets.num_outputs:
            raise ValueError(
                f"{found} number(s) a sample; {type(self).__name__} learnt {self.predictor_.targets.num_outputs}"
            )
        self._run_engine(samples, y, first=False)
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """The numbers of each sample, (n,) or (n, k) as `fit` was given them."""
        answers = self._compute_outputs(X)
        targets: Any = self.predictor_.targets
        numbers: NDArray[np.float64] = answers * np.array(targets.scales) + np.array(targets.means)
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
