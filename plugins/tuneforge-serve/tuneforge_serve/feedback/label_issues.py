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
from tuneforge.engine.loop.evaluation import compute_head_features

_NUM_NEIGHBORS = 10
_REFERENCE_WEIGHT = (
    3.0  # of an old sample, beside 1 of a new one; found on digits, where 1 missed more and shifted worlds saw no harm
)
_MIN_CONFIDENCE, _MIN_ACCURACY, _MAX_REMAINING, _MIN_SAMPLES = (
    0.9,
    0.7,
    0.1,
    10,
)  # see `flag_vanished_classes`: shares, and samples
_MAX_REFERENCE_SAMPLES = 4000
_AT_ONCE = 512


@attrs.frozen
class FeedbackLabelIssue:
    """A label that does not fit.

    Args:
        row: Of the sample, among the new ones.
        label: As given.
        suggested_label: The class that fits better.
        suggested_probability: Of that class, among the sample's neighbours.
        label_probability: Probability of the label, likewise.
    """

    row: int
    label: str
    suggested_label: str
    suggested_probability: float
    label_probability: float


def find_label_issues(run: Run, reference: Split, new: Split, classes: Sequence[str]) -> list[FeedbackLabelIssue]:
    """Find labels of new samples that do not fit them.

    Args:
        run: With the model whose features are used.
        reference: Old training samples; at most 4,000 of them, evenly spread, are looked at.
        new: New samples. Targets of both are places in `classes`.
        classes: Names of the classes.
    """
    rows = torch.linspace(0, len(reference) - 1, min(len(reference), _MAX_REFERENCE_SAMPLES)).round().long()
    reference_features, reference_labels = compute_head_features(run, reference.subset(rows))
    features, labels = compute_head_features(run, new)
    probabilities = knn_probabilities(reference_features, reference_labels, features, labels, num_classes=len(classes))
    predicted = _predict_probabilities(run, new, classes)
    better = torch.maximum(flag_unlikely_labels(probabilities, labels), flag_vanished_classes(predicted, labels))
    both = enumerate(zip(labels.tolist(), better.tolist(), strict=True))
    return [
        FeedbackLabelIssue(
            row, classes[own], classes[best], float(probabilities[row, best]), float(probabilities[row, own])
        )
        for row, (own, best) in both
        if best >= 0
    ]


def knn_probabilities(
    reference_features: Tensor, reference_labels: Tensor, features: Tensor, labels: Tensor, *, num_classes: int
) -> Tensor:
    """Probabilities (n, k) of the new samples by their nearest ones, cosine of the features, itself left out.

    Args:
        reference_features: Features of the old samples (m, f).
        reference_labels: Their classes (m,).
        features: Of the new samples (n, f).
        labels: Their labels (n,).
        num_classes: Number of classes.
    """
    normalized = F.normalize(torch.cat([reference_features, features]), dim=1)
    size = len(reference_features)
    votes = F.one_hot(torch.cat([reference_labels, labels]), num_classes).float()
    votes[:size] *= _REFERENCE_WEIGHT
    probabilities = torch.empty(len(features), num_classes)
    for rows in torch.split(torch.arange(len(features)), _AT_ONCE):
        similarity = normalized[size + rows] @ normalized.T
        similarity[torch.arange(len(rows)), size + rows] = -torch.inf
        nearest = similarity.topk(min(_NUM_NEIGHBORS, similarity.shape[1] - 1), dim=1).indices
        probabilities[rows] = votes[nearest].sum(1)
    return probabilities / probabilities.sum(1, keepdim=True)


def flag_unlikely_labels(probabilities: Tensor, labels: Tensor) -> Tensor:
    """For each sample the class that fits better than its label, int64 (n,); -1 where the label fits."""
    usual = torch.full((probabilities.shape[1],), 0.5)  # of a class that no new label names
    for code in sorted(set(labels.tolist())):
        usual[code] = probabilities[labels == code, code].mean()
    most, best = probabilities.max(1)
    return torch.where((best != labels) & (most >= usual[best]), best, -1)


def flag_vanished_classes(probabilities: Tensor, targets: Tensor) -> Tensor:
    """For each sample the class that the champion sees and that labels have taken away altogether, int64 (n,); else -1.

    Args:
        probabilities: The champion's probabilities (n, k).
        targets: Labels (n,).
    """
    most, best = probabilities.max(1)
    sure = most >= _MIN_CONFIDENCE
    found = torch.full_like(targets, -1)
    for code in sorted(set(best[sure].tolist())):
        here, elsewhere = sure & (best == code), sure & (best != code)
        if (
            min(here.sum(), elsewhere.sum()) < _MIN_SAMPLES
            or (targets[elsewhere] == best[elsewhere]).double().mean() < _MIN_ACCURACY
        ):
            continue
        labels = targets[here]
        usual = int(labels.mode().values)
        if (labels == code).double().mean() <= _MAX_REMAINING and (
            labels == usual
        ).double().mean() >= 1 - 2 * _MAX_REMAINING:
            found[(best == code) & (targets == usual)] = code
    return found


def _predict_probabilities(run: Run, new: Split, classes: Sequence[str]) -> Tensor:
    """The champion's probabilities of each class in `classes` (n, k); 0 for one that it does not know."""
    run.model.module.eval()
    with torch.no_grad():
        outputs = torch.cat([run.forward(batch.inputs).float().cpu() for batch in run.evaluation_batches(new)])
    probabilities = torch.zeros(len(new), len(classes))
    probabilities[:, [classes.index(name) for name in run.model.labels]] = outputs.softmax(1)
    return probabilities


def describe_label_issues(issues: Sequence[FeedbackLabelIssue], total: int) -> str:
    """How many labels do not fit, and which confusion is the most frequent."""
    if not issues:
        return f"all {total} labels fit their samples"
    (label, suggested), count = Counter((each.label, each.suggested_label) for each in issues).most_common(1)[0]
    most_frequent = f"most often '{label}' where '{suggested}' fits ({count})"
    return f"{len(issues)} of {total} labels do not fit their samples; {most_frequent}"
