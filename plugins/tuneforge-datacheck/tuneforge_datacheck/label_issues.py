"""Labels that are likely wrong: confident learning (Northcutt, Jiang and Chuang 2021) on out-of-fold probabilities.

Shapes: n pictures, f features, k classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]

NUM_FOLDS = 5
MIN_SKILL = 0.5
"""Skill of the out-of-fold model, over naming the most frequent class, under which its doubts say more about itself."""

_MIN_PROBABILITY_RATIO = 4.0  # so many times more likely than its label is what a sample seems to be
_NUM_NEIGHBORS = 11
_NUM_COMPONENTS = 30


@attrs.frozen(eq=False)
class LabelIssues:
    """What out-of-fold predictions say about labels.

    Args:
        rows: Samples whose label is likely wrong, the surest first.
        suggested_codes: The class that each of them seems to be of.
        margins: Probability of that class less that of the label.
        accuracy: Share of labels that the predictions agree with.
        skill: The same on a scale from 0, for always naming the most frequent class, to 1.
        num_judged: How many samples were judged; those of tiny classes are not.
    """

    rows: Rows
    suggested_codes: Rows
    margins: NDArray[np.float64]
    accuracy: float
    skill: float
    num_judged: int


def find_label_issues(features_nf: Floats, codes: Rows, *, seed: int = 0) -> LabelIssues | None:
    """Which labels are likely wrong; None where fewer than two classes have enough samples to say.

    Probabilities come from the nearest neighbours among the principal components of the features, in five folds, and
    are taken relative to what each class's own members have, as confident learning does. A label is doubted where
    another class is four times as likely by that. On digits with 10 % wrong labels this finds more of them, and fewer
    others, than pruning as many as the estimated joint distribution says (the paper's "prune by class").

    Args:
        features_nf: What the labels are judged by.
        codes: The class of each sample, int64 (n,).
        seed: Of the folds.
    """
    counts = np.bincount(codes)
    judged = np.flatnonzero(counts[codes] >= NUM_FOLDS)
    classes, own = np.unique(codes[judged], return_inverse=True)
    if len(classes) < 2:
        return None
    probabilities_nk = _out_of_fold_probabilities(features_nf[judged], own, seed)
    every = np.arange(len(own))
    normalized_nk = _normalize_by_self_confidence(probabilities_nk, own)
    own_n = normalized_nk[every, own]
    normalized_nk[every, own] = 0
    named = np.flatnonzero(normalized_nk.max(axis=1) > _MIN_PROBABILITY_RATIO * own_n)
    best = normalized_nk[named].argmax(axis=1)
    margins = probabilities_nk[named, best] - probabilities_nk[named, own[named]]
    order = np.argsort(-margins, kind="stable")
    accuracy = float((probabilities_nk.argmax(axis=1) == own).mean())
    base = float(np.bincount(own).max() / len(own))
    return LabelIssues(
        rows=judged[named][order],
        suggested_codes=classes[best][order],
        margins=margins[order],
        accuracy=accuracy,
        skill=(accuracy - base) / (1 - base),
        num_judged=len(judged),
    )


def pixel_features(colors_nyxc: NDArray[np.uint8]) -> Floats:
    """The simplest features: small pictures as they are (n, f), on the scale 0 to 1."""
    flat = colors_nyxc.reshape(len(colors_nyxc), -1)
    return np.asarray(flat / 255, dtype=np.float32)


def extract_run_features(run_dir: Path, paths: Sequence[str]) -> Floats:
    """What the model of a finished run gives to its head for each picture (n, f).

    A model that was tuned on these very labels has seen the wrong ones too, and finds fewer of them.

    Raises:
        FolderError: The folder holds no finished run.
        DataError: A picture cannot be decoded.
    """
    import torch

    from tuneforge.engine.session.predictor import load

    predictor = load(run_dir)
    features: list[Any] = []
    hook = predictor.model.head_module().register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0].detach())
    )
    try:
        with torch.inference_mode():
            for _ in predictor.predict_outputs(paths):
                pass
    finally:
        hook.remove()
    return np.asarray(torch.cat([each.flatten(1).float().cpu() for each in features]).numpy(), dtype=np.float32)


def _out_of_fold_probabilities(features_nf: Floats, codes: Rows, seed: int) -> NDArray[np.float64]:
    """Probability of each class for each sample (n, k), by a model that has not seen the sample."""
    from sklearn.decomposition import PCA
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline

    smallest_fold = len(codes) - -(-len(codes) // NUM_FOLDS)
    components = max(1, min(_NUM_COMPONENTS, features_nf.shape[1], smallest_fold - 1))
    model = make_pipeline(
        PCA(components, random_state=seed),
        KNeighborsClassifier(min(_NUM_NEIGHBORS, smallest_fold), weights="distance"),
    )
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # PCA of pictures that are all the same divides by 0
        probabilities = cross_val_predict(model, features_nf, codes, cv=folds, method="predict_proba")
    return np.asarray(probabilities, dtype=np.float64)


def _normalize_by_self_confidence(probabilities_nk: NDArray[np.float64], codes: Rows) -> NDArray[np.float64]:
    """Each probability over the mean that the class's own members have (n, k): what it is for a usual member is 1."""
    own_k = [probabilities_nk[codes == label, label].mean() for label in range(probabilities_nk.shape[1])]
    return np.asarray(probabilities_nk / np.maximum(own_k, 1e-9), dtype=np.float64)
