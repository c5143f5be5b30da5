"""Linear heads solved on features: logistic and ridge regression, and the choice of their L2 penalty.

Shapes: n samples, f features, k outputs, r the rank of the features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Doubles = NDArray[np.float64]

SCALE_FLOORS = (1e-2, 0.1, 1.0)
"""Candidates for the least scale of a feature, relative to the largest standard deviation of all features.

A feature that is nearly constant in training, such as a ReLU that is active in one sample, would otherwise get a weight
of the inverse of its deviation, and decide wherever it is active. The first is used where the penalty is given. With
few samples per class the larger ones were up to 8 points more accurate.
"""

L2_CANDIDATES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Candidate penalties, relative to the mean loss."""

_MAX_CV_SAMPLES = 500

Solution = tuple[Doubles, Doubles]
"""Weight (k, f) and bias (k,)."""


@attrs.frozen(eq=False)
class ScaledFeatures:
    """Centered features, divided by their scales.

    Args:
        values: (n, f); mean 0 and a standard deviation of at most 1.
        mean: (f,).
        scale: (f,); the standard deviation, at least a fraction of the largest.
    """

    values: Doubles
    mean: Doubles
    scale: Doubles

    @classmethod
    def from_tensor(cls, features: Tensor, *, floor: float = SCALE_FLOORS[0]) -> ScaledFeatures:
        """Return the scaled features of a tensor (n, f); `floor` times the largest deviation is the least scale."""
        values = features.detach().cpu().double().numpy()
        mean, deviation = values.mean(0), values.std(0)
        deviation = np.where(deviation > 1e-12 * np.abs(mean), deviation, 0.0)  # constant up to rounding
        largest = deviation.max(initial=0.0)
        scale = np.maximum(deviation, floor * largest) if largest > 0 else np.ones_like(deviation)
        return cls((values - mean) / scale, mean, scale)

    def unscale(self, solution: Solution, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight (k, f) and bias (k,) of the same function of unscaled features, as tensors like `like`."""
        weight = solution[0] / self.scale
        bias = solution[1] - weight @ self.mean
        return torch.from_numpy(weight).to(like), torch.from_numpy(bias).to(like)


def scale_and_choose(
    features: Tensor, targets: NDArray[Any], loss_by_l2: Callable[[Doubles, Any], Iterator[tuple[float, float]]]
) -> tuple[ScaledFeatures, float]:
    """Return the scaled features and the L2 penalty with the lowest loss, over `SCALE_FLOORS` and `L2_CANDIDATES`.

    Args:
        features: (n, f).
        targets: (n,) or (n, k).
        loss_by_l2: Yields penalties, from the largest on, each with the loss on samples that were held out.
    """
    best: tuple[float, float, ScaledFeatures] | None = None
    for floor in SCALE_FLOORS:
        scaled, rises, before = ScaledFeatures.from_tensor(features, floor=floor), 0, np.inf
        for l2, loss in loss_by_l2(scaled.values, targets):
            if best is None or loss < best[0]:
                best = (loss, l2, scaled)
            rises, before = (rises + 1 if loss >= before else 0), loss
            if rises == 2:
                break
    assert best is not None
    return best[2], best[1]


def fit_logistic(features: Doubles, codes: NDArray[np.int64], *, l2: float) -> Solution:
    """Minimize the mean cross-entropy + l2 / 2 * |W|^2; the bias has no penalty.

    Args:
        features: (n, f).
        codes: The class of each sample, 0 to k - 1, (n,).
        l2: L2 penalty, relative to the mean loss.
    """
    return _get_solution(_create_logistic(codes, l2, tol=1e-6, max_iter=10_000).fit(features, codes))


def fit_binary(features: Doubles, labels: NDArray[np.bool_], *, l2: float) -> Solution:
    """Minimize the mean binary cross-entropy + l2 / 2 * |w|^2 for one label that some samples have.

    Args:
        features: (n, f).
        labels: (n,).
        l2: L2 penalty, relative to the mean loss.

    Returns:
        Weight (1, f) and bias (1,).
    """
    weight, bias = fit_logistic(features, labels.astype(np.int64), l2=2 * l2)
    return weight[1:] * 2, bias[1:] * 2


def fit_ridge(features: Doubles, targets: Doubles, *, l2: float) -> Solution:
    """Minimize the mean squared error + l2 / 2 * |W|^2 in closed form: (X'X / n + l2 / 2) W' = X'Y / n.

    Args:
        features: (n, f), centered.
        targets: (n, k).
        l2: L2 penalty, relative to the mean loss.
    """
    bias = targets.mean(0)
    gram = features.T @ features / len(features) + l2 / 2 * np.eye(features.shape[1])
    return np.linalg.solve(gram, features.T @ (targets - bias) / len(features)).T, bias


def log_sum_exp(logits: Doubles) -> Doubles:
    """Return the logarithm of the sum of exponentials of each row."""
    peak = logits.max(1)
    total: Doubles = peak + np.log(np.exp(logits - peak[:, None]).sum(1))
    return total


def cross_validate_logistic(features: Doubles, codes: NDArray[np.int64]) -> Iterator[tuple[float, float]]:
    """Yield each L2 penalty with its mean cross-entropy in cross-validation, stratified by class.

    Five folds, or three of more than 200 samples, of at most 500 samples, for which the penalty is then scaled. Each
    penalty starts from the solution of the one before it. The only sample of a class is never held out.

    Args:
        features: (n, f), scaled.
        codes: The class of each sample, 0 to k - 1, (n,).
    """
    chosen = np.linspace(0, len(codes) - 1, min(len(codes), _MAX_CV_SAMPLES)).round().astype(np.int64)
    codes = np.unique(codes[chosen], return_inverse=True)[1]
    rows, parts = _reduce_rank(features[chosen]), list(_folds(codes))
    if codes.max() == 0 or not parts:
        yield 1e-2, 0.0
        return
    models = [_create_logistic(codes, 1.0, tol=1e-4, max_iter=200, warm_start=True) for _ in parts]
    for l2 in L2_CANDIDATES:
        total = 0.0
        for model, (train, held) in zip(models, parts, strict=True):
            model.C = _invert(l2, codes[train])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a penalty is compared, so 200 iterations are close enough
                weight, bias = _get_solution(model.fit(rows[train], codes[train]))
            logits = rows[held] @ weight.T + bias
            total += float((log_sum_exp(logits) - logits[np.arange(len(held)), codes[held]]).sum())
        yield l2 * len(chosen) / len(features), total / sum(len(held) for _, held in parts)


def leave_one_out_ridge(features: Doubles, targets: Doubles) -> Iterator[tuple[float, float]]:
    """Yield each L2 penalty with its mean squared leave-one-out error, in closed form (Golub et al. 1979).

    Args:
        features: (n, f), centered.
        targets: (n, k).
    """
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    residual = targets - targets.mean(0)
    projected = left.T @ residual
    power = singular**2 / len(features)
    for l2 in L2_CANDIDATES:
        shrink = power / (power + l2 / 2)
        leverage = (left**2 @ shrink + 1 / len(features)).clip(max=1 - 1e-9)
        errors = (residual - left @ (shrink[:, None] * projected)) / (1 - leverage)[:, None]
        yield l2, float((errors**2).mean())


def _folds(codes: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield training and held-out rows of each fold, every class among the training rows."""
    counts = np.bincount(codes)
    num_folds = 5 if len(codes) <= 200 else 3
    rank = np.empty(len(codes), dtype=np.int64)
    for code in range(len(counts)):
        rank[codes == code] = np.arange(counts[code]) if counts[code] > 1 else -1
    fold = np.where(rank < 0, -1, (rank + codes) % num_folds)
    for number in range(num_folds):
        train, held = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        if len(held):
            yield train, held


def _reduce_rank(features: Doubles) -> Doubles:
    """Return features (n, r) with the same inner products, hence the same penalized solutions in fewer columns."""
    if features.shape[1] <= len(features):
        return features
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    return np.ascontiguousarray(left * singular)


def _create_logistic(codes: NDArray[np.int64], l2: float, **options: Any) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=_invert(l2, codes), solver="lbfgs", **options)


def _invert(l2: float, codes: NDArray[np.int64]) -> float:
    """Return scikit-learn's C of a penalty relative to the mean loss."""
    # For two classes scikit-learn fits one row, the difference of the two. Half of it for each class gives the same
    # predictions and half the penalty, hence twice the C.
    return (2 if len(np.unique(codes)) == 2 else 1) / (l2 * len(codes))


def _get_solution(model: Any) -> Solution:
    if len(model.coef_) > 1:
        return model.coef_, model.intercept_
    return np.concatenate([-model.coef_, model.coef_]) / 2, np.concatenate([-model.intercept_, model.intercept_]) / 2
