"""Labels that do not fit the samples: found by models that were not told them, and named.

Confident learning (Northcutt, Jiang and Chuang 2021, arXiv 1911.00068): each new sample is judged by a logistic
regression on the champion's features that has seen the old samples and the other new ones, but not this one. A label is
suspect where another class is more likely than that class usually is for samples that carry it.

Shapes: n new samples, m old ones, f features, k classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from tuneforge.engine.passes import head_features
from tuneforge.engine.run import Run
from tuneforge.engine.samples.data import Split

Doubles = NDArray[np.float64]

_FOLDS = 5
_MOST_OLD = 2000
_C = 0.05  # a strong ridge: with a weak one every sample's own fold fits noise


@attrs.frozen
class Suspect:
    """A label that does not fit.

    Args:
        place: Of the sample, among the new ones.
        label: As given.
        likely: The class that fits better.
        probability: Of that class.
        own: Probability of the label.
    """

    place: int
    label: str
    likely: str
    probability: float
    own: float


def suspects(run: Run, old: Split, new: Split, names: Sequence[str], *, seed: int = 0) -> list[Suspect]:
    """Find labels of new samples that do not fit them.

    Args:
        run: With the model whose features are used.
        old: Old training samples, whose labels are trusted; at most 2,000 of them are looked at.
        new: New samples. Targets of both are places in `names`.
        names: Of the classes.
        seed: Draws the folds.
    """
    rows = torch.linspace(0, len(old) - 1, min(len(old), _MOST_OLD)).round().long()
    trusted, codes = head_features(run, old.take(rows))
    features, labels = head_features(run, new)
    likely = out_of_fold(trusted.numpy(), codes.numpy(), features.numpy(), labels.numpy(), k=len(names), seed=seed)
    known = labels.numpy()
    return [
        Suspect(place, names[known[place]], names[best], float(likely[place, best]), float(likely[place, known[place]]))
        for place, best in enumerate(_misfits(likely, known))
        if best >= 0
    ]


def out_of_fold(
    trusted: NDArray[np.float32],
    trusted_codes: NDArray[np.int64],
    features: NDArray[np.float32],
    codes: NDArray[np.int64],
    *,
    k: int,
    seed: int = 0,
) -> Doubles:
    """Probabilities (n, k) of the new samples by models that saw the trusted ones and the other folds alone.

    Args:
        trusted: (m, f).
        trusted_codes: (m,).
        features: Of the new samples (n, f).
        codes: Their labels (n,).
        k: Number of classes.
        seed: Draws the folds.
    """
    from sklearn.linear_model import LogisticRegression

    mean = trusted.mean(0)
    scale = np.maximum(trusted.std(0), 1e-3 * (np.abs(mean) + 1))
    old, new = (trusted - mean) / scale, np.clip((features - mean) / scale, -10, 10)
    fold = np.random.default_rng(seed).permutation(len(new)) % _FOLDS
    found = np.zeros((len(new), k))
    for each in range(min(_FOLDS, len(new))):
        inside = fold != each
        x = np.concatenate([old, new[inside]])
        y = np.concatenate([trusted_codes, codes[inside]])
        model = LogisticRegression(C=_C, max_iter=300, tol=1e-3).fit(x, y)
        found[np.ix_(~inside, model.classes_)] = model.predict_proba(new[~inside])
    return found


def sentence(found: Sequence[Suspect], total: int) -> str:
    """How many labels do not fit, and which confusion is the most frequent."""
    if not found:
        return f"all {total} labels fit their samples"
    (label, likely), count = Counter((each.label, each.likely) for each in found).most_common(1)[0]
    return (
        f"{len(found)} of {total} labels do not fit their samples; most often '{label}' where '{likely}' fits ({count})"
    )


def _misfits(likely: Doubles, codes: NDArray[np.int64]) -> list[int]:
    """For each sample the class that fits better than its label; -1 where the label fits."""
    present = np.unique(codes)
    usual = np.full(likely.shape[1], np.inf)
    for code in present:
        usual[code] = likely[codes == code, code].mean()
    usual[~np.isin(np.arange(len(usual)), present)] = 0.5
    best = likely.argmax(1)
    misfit = (best != codes) & (likely[np.arange(len(codes)), best] >= usual[best])
    return np.where(misfit, best, -1).tolist()  # type: ignore[no-any-return]
