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

    Probabilities come from the nearest neighbours among the principal components of the features, in five folds. The
    number of likely mistakes of each label follows from thresholds that the classes set themselves, and so many samples
    of it are named, by margin (the paper's "prune by class", which loses less to rounding than by pairs of classes).

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
    named = _mislabelled(chances_nk, own)
    best = chances_nk[named].argmax(axis=1)
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

    from tuneforge.engine.tuned import load

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


def _mislabelled(chances_nk: NDArray[np.float64], codes: Rows) -> Rows:
    """Rows whose label is likely wrong, ascending: of each label as many as it has mistakes, by margin."""
    every = np.arange(len(codes))
    others_nk = chances_nk.copy()
    others_nk[every, codes] = -1
    margins = others_nk.max(axis=1) - chances_nk[every, codes]
    wrong = np.zeros(len(codes), dtype=bool)
    for label, count in enumerate(_mistakes(chances_nk, codes)):
        members = np.flatnonzero(codes == label)
        wrong[members[np.argsort(-margins[members], kind="stable")[:count]]] = True
    return np.flatnonzero(wrong & (margins > 0))


def _mistakes(chances_nk: NDArray[np.float64], codes: Rows) -> Rows:
    """Estimated number of samples with each label that are of another class (k,).

    A sample counts for the likeliest class that it is confidently of: whose probability is at least the mean that the
    class's own members have. The counts of a label are then scaled to all of its samples.
    """
    size = chances_nk.shape[1]
    threshold_k = np.array([chances_nk[codes == label, label].mean() for label in range(size)])
    confident_nk = np.where(chances_nk >= threshold_k, chances_nk, -1.0)
    sure = confident_nk.max(axis=1) >= 0
    agree = confident_nk[sure].argmax(axis=1) == codes[sure]
    right_k = np.maximum(np.bincount(codes[sure][agree], minlength=size), 1)
    wrong_k = np.bincount(codes[sure][~agree], minlength=size)
    share_k = wrong_k / (right_k + wrong_k)
    return np.asarray(np.rint(share_k * np.bincount(codes, minlength=size)), dtype=np.int64)
