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

FOLDS = 5
LEAST_SKILL = 0.5
"""Skill of the out-of-fold model, over naming the most frequent class, under which its doubts say more about itself."""

_TIMES = 4.0  # so many times more likely than its label is what a sample seems to be
_NEIGHBOURS = 11
_COMPONENTS = 30


@attrs.frozen(eq=False)
class Doubts:
    """What out-of-fold predictions say about labels.

    Args:
        rows: Samples whose label is likely wrong, the surest first.
        suggested: The class that each of them seems to be of.
        margins: Probability of that class less that of the label.
        accuracy: Share of labels that the predictions agree with.
        skill: The same on a scale from 0, for always naming the most frequent class, to 1.
        judged: How many samples were judged; those of tiny classes are not.
    """

    rows: Rows
    suggested: Rows
    margins: NDArray[np.float64]
    accuracy: float
    skill: float
    judged: int


def doubts(features_nf: Floats, codes: Rows, *, seed: int = 0) -> Doubts | None:
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
    judged = np.flatnonzero(counts[codes] >= FOLDS)
    classes, own = np.unique(codes[judged], return_inverse=True)
    if len(classes) < 2:
        return None
    chances_nk = _out_of_fold(features_nf[judged], own, seed)
    every = np.arange(len(own))
    others_nk = _confidences(chances_nk, own)
    own_n = others_nk[every, own]
    others_nk[every, own] = 0
    named = np.flatnonzero(others_nk.max(axis=1) > _TIMES * own_n)
    best = others_nk[named].argmax(axis=1)
    margins = chances_nk[named, best] - chances_nk[named, own[named]]
    order = np.argsort(-margins, kind="stable")
    accuracy = float((chances_nk.argmax(axis=1) == own).mean())
    base = float(np.bincount(own).max() / len(own))
    return Doubts(
        rows=judged[named][order],
        suggested=classes[best][order],
        margins=margins[order],
        accuracy=accuracy,
        skill=(accuracy - base) / (1 - base),
        judged=len(judged),
    )


def pixels(colours_nyxc: NDArray[np.uint8]) -> Floats:
    """The simplest features: small pictures as they are (n, f), on the scale 0 to 1."""
    flat = colours_nyxc.reshape(len(colours_nyxc), -1)
    return np.asarray(flat / 255, dtype=np.float32)


def features_of_run(folder: Path, paths: Sequence[str]) -> Floats:
    """What the model of a finished run gives to its head for each picture (n, f).

    A model that was tuned on these very labels has seen the wrong ones too, and finds fewer of them.

    Raises:
        FolderError: The folder holds no finished run.
        DataError: A picture cannot be decoded.
    """
    import torch

    from tuneforge.engine.session.predictor import load

    tuned = load(folder)
    caught: list[Any] = []
    hook = tuned.model.head_module().register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach()))
    try:
        with torch.inference_mode():
            for _ in tuned.outputs(paths):
                pass
    finally:
        hook.remove()
    return np.asarray(torch.cat([each.flatten(1).float().cpu() for each in caught]).numpy(), dtype=np.float32)


def _out_of_fold(features_nf: Floats, codes: Rows, seed: int) -> NDArray[np.float64]:
    """Probability of each class for each sample (n, k), by a model that has not seen the sample."""
    from sklearn.decomposition import PCA
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline

    smallest_fold = len(codes) - -(-len(codes) // FOLDS)
    components = max(1, min(_COMPONENTS, features_nf.shape[1], smallest_fold - 1))
    model = make_pipeline(
        PCA(components, random_state=seed),
        KNeighborsClassifier(min(_NEIGHBOURS, smallest_fold), weights="distance"),
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # PCA of pictures that are all the same divides by 0
        chances = cross_val_predict(model, features_nf, codes, cv=folds, method="predict_proba")
    return np.asarray(chances, dtype=np.float64)


def _confidences(chances_nk: NDArray[np.float64], codes: Rows) -> NDArray[np.float64]:
    """Each probability over the mean that the class's own members have (n, k): what it is for a usual member is 1."""
    own_k = [chances_nk[codes == label, label].mean() for label in range(chances_nk.shape[1])]
    return np.asarray(chances_nk / np.maximum(own_k, 1e-9), dtype=np.float64)
