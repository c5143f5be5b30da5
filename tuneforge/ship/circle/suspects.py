"""Labels that do not fit their samples: found by their neighbours, and named.

Each new sample is judged by the samples nearest to it in the champion's features, itself left out: old ones, whose
labels are trusted and weigh more, and other new ones. A label is suspect where another class is more likely than that
class usually is for samples that carry it: the rule of confident learning (Northcutt, Jiang and Chuang 2021, arXiv
1911.00068). Where the world is as it was, old samples give a wrong label away, even one that all samples of a class
have; in a new world only labels that differ from those around them can be found.

A class that vanishes is suspect too: the champion is sure to see it, is right wherever it is sure of other classes, and
yet the labels name another class in its place almost always.

Shapes: n new samples, m old ones, f features, k classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Split
from tuneforge.engine.loop.evaluation import head_features

_NEAREST = 10
_TRUST = (
    3.0  # of an old sample, beside 1 of a new one; found on digits, where 1 missed more and shifted worlds saw no harm
)
_SURE, _RIGHT, _LEFT, _FEWEST = 0.9, 0.7, 0.1, 10  # see `vanished`: shares, and samples
_MOST_OLD = 4000
_AT_ONCE = 512


@attrs.frozen
class Suspect:
    """A label that does not fit.

    Args:
        place: Of the sample, among the new ones.
        label: As given.
        likely: The class that fits better.
        probability: Of that class, among the sample's neighbours.
        own: Probability of the label, likewise.
    """

    place: int
    label: str
    likely: str
    probability: float
    own: float


def suspects(run: Run, old: Split, new: Split, names: Sequence[str]) -> list[Suspect]:
    """Find labels of new samples that do not fit them.

    Args:
        run: With the model whose features are used.
        old: Old training samples; at most 4,000 of them, evenly spread, are looked at.
        new: New samples. Targets of both are places in `names`.
        names: Of the classes.
    """
    rows = torch.linspace(0, len(old) - 1, min(len(old), _MOST_OLD)).round().long()
    trusted, codes = head_features(run, old.take(rows))
    features, given = head_features(run, new)
    likely = by_neighbours(trusted, codes, features, given, k=len(names))
    said = _answers(run, new, names)
    better = torch.maximum(misfits(likely, given), vanished(said, given))
    both = enumerate(zip(given.tolist(), better.tolist(), strict=True))
    return [
        Suspect(place, names[own], names[best], float(likely[place, best]), float(likely[place, own]))
        for place, (own, best) in both
        if best >= 0
    ]


def by_neighbours(trusted: Tensor, codes: Tensor, features: Tensor, given: Tensor, *, k: int) -> Tensor:
    """Probabilities (n, k) of the new samples by their nearest ones, cosine of the features, itself left out.

    Args:
        trusted: Features of the old samples (m, f).
        codes: Their classes (m,).
        features: Of the new samples (n, f).
        given: Their labels (n,).
        k: Number of classes.
    """
    places = F.normalize(torch.cat([trusted, features]), dim=1)
    size = len(trusted)
    votes = F.one_hot(torch.cat([codes, given]), k).float()
    votes[:size] *= _TRUST
    found = torch.empty(len(features), k)
    for rows in torch.split(torch.arange(len(features)), _AT_ONCE):
        near = places[size + rows] @ places.T
        near[torch.arange(len(rows)), size + rows] = -torch.inf
        nearest = near.topk(min(_NEAREST, near.shape[1] - 1), dim=1).indices
        found[rows] = votes[nearest].sum(1)
    return found / found.sum(1, keepdim=True)


def misfits(likely: Tensor, given: Tensor) -> Tensor:
    """For each sample the class that fits better than its label, int64 (n,); -1 where the label fits."""
    usual = torch.full((likely.shape[1],), 0.5)  # of a class that no new label names
    for code in sorted(set(given.tolist())):
        usual[code] = likely[given == code, code].mean()
    most, best = likely.max(1)
    return torch.where((best != given) & (most >= usual[best]), best, -1)


def vanished(said: Tensor, given: Tensor) -> Tensor:
    """For each sample the class that the champion sees and that labels have taken away altogether, int64 (n,); else -1.

    Args:
        said: The champion's probabilities (n, k).
        given: Labels (n,).
    """
    most, best = said.max(1)
    sure = most >= _SURE
    found = torch.full_like(given, -1)
    for code in sorted(set(best[sure].tolist())):
        here, elsewhere = sure & (best == code), sure & (best != code)
        if min(here.sum(), elsewhere.sum()) < _FEWEST or (given[elsewhere] == best[elsewhere]).double().mean() < _RIGHT:
            continue
        labels = given[here]
        usual = int(labels.mode().values)
        if (labels == code).double().mean() <= _LEFT and (labels == usual).double().mean() >= 1 - 2 * _LEFT:
            found[(best == code) & (given == usual)] = code
    return found


def _answers(run: Run, new: Split, names: Sequence[str]) -> Tensor:
    """The champion's probabilities of each class in `names` (n, k); 0 for one that it does not know."""
    run.model.module.eval()
    with torch.no_grad():
        outputs = torch.cat([run.forward(batch.inputs).float().cpu() for batch in run.evaluation_batches(new)])
    said = torch.zeros(len(new), len(names))
    said[:, [names.index(name) for name in run.model.labels]] = outputs.softmax(1)
    return said


def sentence(found: Sequence[Suspect], total: int) -> str:
    """How many labels do not fit, and which confusion is the most frequent."""
    if not found:
        return f"all {total} labels fit their samples"
    (label, likely), count = Counter((each.label, each.likely) for each in found).most_common(1)[0]
    return (
        f"{len(found)} of {total} labels do not fit their samples; most often '{label}' where '{likely}' fits ({count})"
    )
