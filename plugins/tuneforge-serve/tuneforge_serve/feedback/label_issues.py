"""Find labels of new samples that do not fit the samples.

Each new sample is compared with its nearest neighbors in the champion's features: old samples, whose labels are trusted
and weigh more, and the other new ones. Its label is an issue if another class is at least as probable for it as that
class is on average for the samples with its label: the rule of confident learning (Northcutt, Jiang and Chuang 2021,
arXiv 1911.00068). While the data distribution is unchanged, old samples reveal a wrong label even if all samples of a
class have it; after a shift, only labels that differ from their neighbors' can be found.

The labels of a class that vanishes are issues too: the champion predicts the class with high confidence, is correct
where it predicts other classes with high confidence, and yet almost all labels name one other class in its place.

Shapes: n new samples, m old samples, f features, k classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from tuneforge import Predictor, Split
from tuneforge.exporting import compute_head_features, make_forward

_NUM_NEIGHBORS = 10
_REFERENCE_WEIGHT = 3.0  # of an old sample; on digits a weight of 1 missed more issues, and 3 did no harm after a shift
_MIN_CONFIDENCE, _MIN_ACCURACY, _MAX_REMAINING, _MIN_SAMPLES = 0.9, 0.7, 0.1, 10  # see `flag_vanished_classes`
_MAX_REFERENCE_SAMPLES = 4000
_SIMILARITY_ROWS = 512  # rows of the similarity matrix that are in memory at a time
_BATCH = 256


@attrs.frozen
class FeedbackLabelIssue:
    """A label that does not fit its sample.

    Args:
        row: The row of the sample among the new ones.
        label: The label.
        suggested_label: The class that fits better.
        suggested_probability: The probability of that class among the neighbors.
        label_probability: The probability of the label among the neighbors.
    """

    row: int
    label: str
    suggested_label: str
    suggested_probability: float
    label_probability: float


def find_label_issues(
    predictor: Predictor, reference: Split, new: Split, classes: Sequence[str]
) -> list[FeedbackLabelIssue]:
    """Find labels of new samples that do not fit the samples.

    Args:
        predictor: The model whose features are compared.
        reference: Old training samples; at most 4,000 evenly spaced ones are used.
        new: New samples. The targets of both splits are indices into `classes`.
        classes: The class names.
    """
    rows = torch.linspace(0, len(reference) - 1, min(len(reference), _MAX_REFERENCE_SAMPLES)).round().long()
    reference_features, reference_labels = compute_head_features(predictor.run, reference.subset(rows))
    features, labels = compute_head_features(predictor.run, new)
    probabilities = knn_probabilities(reference_features, reference_labels, features, labels, num_classes=len(classes))
    predicted = _predict_probabilities(predictor, new, classes)
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
    """Return class probabilities (n, k) of new samples by their nearest neighbors in cosine similarity.

    Args:
        reference_features: Features of the old samples (m, f).
        reference_labels: Labels of the old samples (m,).
        features: Features of the new samples (n, f).
        labels: Labels of the new samples (n,).
        num_classes: The number of classes.
    """
    normalized = F.normalize(torch.cat([reference_features, features]), dim=1)
    size = len(reference_features)
    votes = F.one_hot(torch.cat([reference_labels, labels]), num_classes).float()
    votes[:size] *= _REFERENCE_WEIGHT
    probabilities = torch.empty(len(features), num_classes)
    for rows in torch.split(torch.arange(len(features)), _SIMILARITY_ROWS):
        similarity = normalized[size + rows] @ normalized.T
        similarity[torch.arange(len(rows)), size + rows] = -torch.inf
        nearest = similarity.topk(min(_NUM_NEIGHBORS, similarity.shape[1] - 1), dim=1).indices
        probabilities[rows] = votes[nearest].sum(1)
    return probabilities / probabilities.sum(1, keepdim=True)


def flag_unlikely_labels(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return for each sample the class that fits better than its label, int64 (n,); -1 if the label fits."""
    usual = torch.full((probabilities.shape[1],), 0.5)  # for a class without new labels
    for code in sorted(set(labels.tolist())):
        usual[code] = probabilities[labels == code, code].mean()
    most, best = probabilities.max(1)
    return torch.where((best != labels) & (most >= usual[best]), best, -1)


def flag_vanished_classes(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return for each sample the class that the champion predicts and that vanished from the labels, int64 (n,); or -1.

    Args:
        probabilities: The champion's probabilities (n, k).
        targets: The labels (n,).
    """
    most, best = probabilities.max(1)
    confident = most >= _MIN_CONFIDENCE
    found = torch.full_like(targets, -1)
    for code in sorted(set(best[confident].tolist())):
        here, elsewhere = confident & (best == code), confident & (best != code)
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


def _predict_probabilities(predictor: Predictor, new: Split, classes: Sequence[str]) -> Tensor:
    """Return the champion's probabilities of `classes` (n, k); 0 for a class that it does not know."""
    forward = make_forward(predictor)
    outputs = torch.cat([forward(new.fetch(rows)) for rows in torch.split(torch.arange(len(new)), _BATCH)])
    probabilities = torch.zeros(len(new), len(classes))
    probabilities[:, [classes.index(name) for name in predictor.model.labels]] = outputs.softmax(1)
    return probabilities


def describe_label_issues(issues: Sequence[FeedbackLabelIssue], total: int) -> str:
    """Return a sentence with the number of label issues and the most frequent confusion."""
    if not issues:
        return f"no issues among {total} labels"
    (label, suggested), count = Counter((each.label, each.suggested_label) for each in issues).most_common(1)[0]
    most_frequent = f"most frequent: label '{label}', suggested '{suggested}' ({count})"
    return f"{len(issues)} of {total} labels do not fit their samples; {most_frequent}"
