"""The gate: may a challenger take the champion's place? Judged on the old world, on the new one, and by the clock.

Shapes: n samples of a test split, k outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Split, Targets, TensorTree
from tuneforge.engine.data.loader import fetch_batches, iter_sequential
from tuneforge.exporting.bundle import InferenceModel
from tuneforge.exporting.formats import compute_predictions
from tuneforge.exporting.reference_outputs import hash_samples
from tuneforge.plugin.declaration import get_option_values
from tuneforge_serve.registry.significance import accuracy_loss_bound, error_increase_bound, superiority_test

_BATCH = 64
_MAX_TRAINED_FRACTION = 0.1  # share of a test split that may have been trained on, beyond what chance repeats
_MAX_EXTRA_LATENCY_S = 1e-3  # a lone answer that is slower by less than this is no reason to refuse
_NUM_TIMED, _NUM_WARMUP = 30, 5
_MIN_STD, _MAX_LOSS = 1e-12, 1e12
_MISSING_CLASS_LOGIT = -1e4  # the output for a name that a model does not know; finite, so that losses stay numbers


@attrs.frozen
class GateRules:
    """What a challenger must keep to.

    Args:
        non_inferiority_margin: The share of right answers that may be lost on the old test split; for numbers, of the
            error added to it. The upper end of a one-sided 95 % interval must stay within.
        min_recall: The least recall of each class on the old test split.
        alpha: Level of the test that shows a difference.
        latency_ratio: How many times as long a lone answer may take.
        accept_equal: Promote also where no significant difference is found.
    """

    non_inferiority_margin: float = 0.02
    min_recall: float = 0.5
    alpha: float = 0.05
    latency_ratio: float = 2.0
    accept_equal: bool = False


@attrs.frozen
class GateCheck:
    """One line of a decision.

    Args:
        name: The question.
        champion: Its figure.
        challenger: Its figure.
        rule: What must hold.
        passed: Whether it does.
        reason: Why not, or what it shows.
    """

    name: str
    champion: str
    challenger: str
    rule: str
    passed: bool
    reason: str


@attrs.frozen
class GateDecision:
    """What the gate says.

    Args:
        promoted: True where the challenger takes over.
        reason: Why, in one sentence.
        checks: Every question with its answer.
        test_sets: Each test split that was used: fingerprint, samples, those left out, and how often it had already
            been used to decide.
    """

    promoted: bool
    reason: str
    checks: tuple[GateCheck, ...]
    test_sets: Mapping[str, Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {**attrs.asdict(self), "test_sets": dict(self.test_sets)}

    def format_table(self) -> str:
        """As text: the rows, the test splits, the reason."""
        header = ("", "champion", "challenger", "rule", "holds")
        rows = [
            (check.name, check.champion, check.challenger, check.rule, "yes" if check.passed else "NO")
            for check in self.checks
        ]
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        for name, test in self.test_sets.items():
            left = f", {test['num_skipped']} left out because a model trained on them" if test["num_skipped"] else ""
            times = "never" if not test["num_uses"] else f"{test['num_uses']} time(s)"
            lines.append(f"{name} test set: {test['num_samples']} samples{left}; used to decide {times} before")
        return "\n".join([*lines, f"{'promoted' if self.promoted else 'not promoted'}: {self.reason}"])


@attrs.frozen(eq=False)
class PairedSplit:
    """A test split in two forms, where champion and challenger store inputs otherwise: the same samples in one order.

    Args:
        champion: As the champion stores them; its targets are the truth.
        challenger: As the challenger does.
    """

    champion: Split
    challenger: Split


def run_gate(
    champion: InferenceModel | None,
    challenger: InferenceModel,
    old_test_set: Split | PairedSplit,
    new_test_set: Split | PairedSplit | None = None,
    *,
    rules: GateRules | None = None,
    old_targets: Targets | None = None,
    new_targets: Targets | None = None,
    count_uses: Callable[[str], int] = lambda fingerprint: 0,
) -> GateDecision:
    """Decide between the champion and a challenger.

    Args:
        champion: Who answers now; None for the first of a name, which needs to keep the floors only.
        challenger: Who may take over.
        old_test_set: The old world's test split, as both models store inputs, or in both forms.
        new_test_set: The new world's held-out split; None: superiority on the old one decides.
        rules: What must hold.
        old_targets: How the old split's targets are read; by default as the champion reads them.
        new_targets: Of the new split; by default as the challenger reads them.
        count_uses: How often the test set of a fingerprint has been used to decide.
    """
    rules = rules or GateRules()
    known = challenger.targets if champion is None else champion.targets
    requested = {"old": (old_test_set, old_targets or known)}
    if new_test_set is not None and champion is not None:
        requested["new"] = (new_test_set, new_targets or challenger.targets)
    if (refusal := _find_incompatibility(champion, challenger, [each for each, _ in requested.values()])) is not None:
        return refusal
    test_sets = {
        name: _TestSet.build(
            name, each if isinstance(each, PairedSplit) else PairedSplit(each, each), targets, champion, challenger
        )
        for name, (each, targets) in requested.items()
    }
    infos = {
        name: {**test_set.info, "num_uses": count_uses(test_set.info["fingerprint"])}
        for name, test_set in test_sets.items()
    }
    if contaminated := [
        check for test_set in test_sets.values() if (check := test_set.check_contamination()) is not None
    ]:
        return GateDecision(False, contaminated[0].reason, tuple(contaminated), infos)
    losses = {name: test_set.evaluate(champion, challenger) for name, test_set in test_sets.items()}
    checks = _check_min_recall(losses["old"], rules)
    if champion is None:
        return _build_decision(checks, infos, "it is the first of its name, and every floor holds")
    superior = _check_superiority(losses.get("new", losses["old"]), rules)
    fast = _check_latency(champion, challenger, test_sets["old"].forms, rules)
    return _build_decision(
        [*checks, superior, _check_non_inferiority(losses["old"], rules), fast], infos, superior.reason
    )


def make_refusal(name: str, reason: str, *, champion: str = "", challenger: str = "", rule: str = "") -> GateDecision:
    """A decision without an evaluation: the challenger cannot be judged, or may not go to work."""
    return GateDecision(False, reason, (GateCheck(name, champion, challenger, rule, False, reason),), {})


def _build_decision(
    checks: Sequence[GateCheck], test_sets: Mapping[str, Mapping[str, Any]], default_reason: str
) -> GateDecision:
    broken = [check.reason for check in checks if not check.passed]
    return GateDecision(not broken, broken[0] if broken else default_reason, tuple(checks), test_sets)


def _find_incompatibility(
    champion: InferenceModel | None, challenger: InferenceModel, sets: Sequence[Split | PairedSplit]
) -> GateDecision | None:
    """Why the two cannot be compared at all, or the challenger may not go to work."""
    failed = [name for name, form in challenger.record.get("formats", {}).items() if not form["parity"]["passed"]]
    if failed:
        return make_refusal("parity", f"the {failed[0]} export does not answer as the tuned model")
    if champion is None:
        return None
    missing = [f"'{name}'" for name in champion.targets.labels if name not in challenger.targets.labels]
    if missing:
        before, now = (str(len(each.targets.labels)) for each in (champion, challenger))
        reason = f"the challenger does not know {', '.join(missing)}, which the champion does"
        return make_refusal("class names", reason, champion=before, challenger=now, rule="all of the champion's")
    fits_both = all(isinstance(each, PairedSplit) for each in sets) or same_contract(champion.inputs, challenger.inputs)
    if type(champion.targets) is not type(challenger.targets) or not fits_both:
        return make_refusal("contracts", "the challenger reads inputs or answers otherwise, so no test set fits both")
    return None


def same_contract(one: Any, other: Any) -> bool:
    """True where two contracts are of one kind and have the same options."""
    return type(one) is type(other) and get_option_values(one) == get_option_values(other)


@attrs.frozen(eq=False)
class _TestSet:
    """A test split, less what one of the models trained on.

    Args:
        name: Of the split.
        forms: What is left of it.
        targets: How its targets are read.
        info: What the decision says of it.
        trained_fractions: What champion and challenger trained on of it.
        max_trained_fraction: What the challenger may have.
    """

    name: str
    forms: PairedSplit
    targets: Targets
    info: dict[str, Any]
    trained_fractions: tuple[float, float]
    max_trained_fraction: float

    @classmethod
    def build(
        cls,
        name: str,
        forms: PairedSplit,
        targets: Targets,
        champion: InferenceModel | None,
        challenger: InferenceModel,
    ) -> _TestSet:
        reference_data = [None if each is None else each.reference_data for each in (champion, challenger)]
        trained_on = [
            torch.zeros(len(split), dtype=torch.bool)
            if each is None
            else torch.isin(hash_samples(split), each.train_digests)
            for each, split in zip(reference_data, (forms.champion, forms.challenger), strict=True)
        ]
        duplicate_fractions = [0.0 if each is None else float(each.duplicate_fraction) for each in reference_data]
        excluded = [
            where
            for where, duplicate_fraction in zip(trained_on, duplicate_fractions, strict=True)
            if duplicate_fraction <= _MAX_TRAINED_FRACTION
        ]
        clean = (~torch.stack([*excluded, torch.zeros_like(trained_on[0])]).any(0)).nonzero().flatten()
        num_samples = len(trained_on[0])
        info = {
            "fingerprint": forms.champion.fingerprint(),
            "num_samples": len(clean),
            "num_skipped": num_samples - len(clean),
        }
        if len(clean) not in (0, num_samples):
            forms = PairedSplit(forms.champion.subset(clean), forms.challenger.subset(clean))
        before, now = (float(each.double().mean()) for each in trained_on)
        return cls(name, forms, targets, info, (before, now), duplicate_fractions[1] + _MAX_TRAINED_FRACTION)

    def check_contamination(self) -> GateCheck | None:
        """Refuses a test split that the challenger trained on, or of which nothing is left."""
        if self.trained_fractions[1] <= self.max_trained_fraction and self.info["num_samples"]:
            return None
        before, now = (f"{100 * share:.1f} %" for share in self.trained_fractions)
        reason = f"the challenger trained on {now} of the {self.name} test set, so it cannot be judged by it"
        if self.trained_fractions[1] <= self.max_trained_fraction:
            reason = f"the champion trained on {before} of the {self.name} test set, so they cannot be judged by it"
        return GateCheck(
            "trained on the test set", before, now, f"at most {100 * self.max_trained_fraction:.1f} %", False, reason
        )

    def evaluate(self, champion: InferenceModel | None, challenger: InferenceModel) -> _PairedLosses:
        """Both models' answers."""
        labels = self.forms.champion.targets
        before = None if champion is None else _per_sample_loss(champion, self.forms.champion, labels, self.targets)
        now = _per_sample_loss(challenger, self.forms.challenger, labels, self.targets)
        return _PairedLosses(self.name, before, now, self.targets, labels)


@attrs.frozen(eq=False)
class _PairedLosses:
    """How wrong each answer of both models is (n,): 0 is right."""

    name: str
    champion: Tensor | None
    challenger: Tensor
    targets: Targets
    labels: Tensor

    @property
    def is_classification(self) -> bool:
        """True where answers are right or wrong, and not only near or far."""
        return bool(self.targets.labels)


def _per_sample_loss(model: InferenceModel, split: Split, labels: Tensor, targets: Targets) -> Tensor:
    """How wrong each answer is (n,): by the test set's own names, or for numbers in deviations of the truth."""
    batches = fetch_batches(split, iter_sequential(len(split), _BATCH), workers=0)
    outputs = torch.cat([model.outputs(stored) for _, stored in batches])
    if targets.labels:
        named = _reorder_outputs(outputs, model.targets.labels, targets.labels, append_others=labels.ndim == 1)
        return targets.per_sample_loss(named, labels).double()
    expected = compute_predictions(targets, labels.reshape(len(labels), -1)).double()
    error = (compute_predictions(model.targets, outputs).reshape(expected.shape).double() - expected).abs()
    return (error / expected.std(0).clamp_min(_MIN_STD)).mean(1).nan_to_num(nan=_MAX_LOSS, posinf=_MAX_LOSS)


def _reorder_outputs(
    outputs: Tensor, model_labels: Sequence[str], labels: Sequence[str], *, append_others: bool
) -> Tensor:
    """Outputs (b, k) in the order of other names; hopeless where the model lacks one; with `append_others`, its others
    last.
    """
    if tuple(model_labels) == tuple(labels):
        return outputs
    order = [*labels, *(name for name in model_labels if append_others and name not in labels)]
    lacking = torch.full((len(outputs), 1), _MISSING_CLASS_LOGIT)
    return torch.cat([outputs, lacking], 1)[
        :, [model_labels.index(name) if name in model_labels else len(model_labels) for name in order]
    ]


def _check_non_inferiority(losses: _PairedLosses, rules: GateRules) -> GateCheck:
    """Non-inferiority on the old world."""
    assert losses.champion is not None
    if losses.is_classification:
        lost, most = accuracy_loss_bound(losses.champion == 0, losses.challenger == 0)
    else:
        lost, most = error_increase_bound(losses.champion, losses.challenger)
    metrics = _format_metrics(losses)
    unit = "points" if losses.is_classification else "% of the error"
    passed = most <= rules.non_inferiority_margin
    ruled_out = f"more than {100 * most:.2f} can be ruled out, and {100 * rules.non_inferiority_margin:g} are allowed"
    reason = f"on the {losses.name} test set it loses {100 * lost:.2f} {unit}; only {ruled_out}"
    rule = f"loses at most {100 * rules.non_inferiority_margin:g} {unit}: {100 * lost:+.2f}, at most {100 * most:+.2f}"
    return GateCheck(f"{losses.name} test set", *metrics, rule, passed, reason)


def _check_min_recall(losses: _PairedLosses, rules: GateRules) -> list[GateCheck]:
    """The weakest class's recall on the old world; nothing where there are no classes."""
    classes = {name: rows for name, rows in losses.targets.group_by_class(losses.labels).items() if len(rows)}
    if not classes:
        return []
    weakest = min(classes, key=lambda name: _accuracy(losses.challenger[classes[name]]))
    now = _accuracy(losses.challenger[classes[weakest]])
    before = "" if losses.champion is None else f"{_accuracy(losses.champion[classes[weakest]]):.4f}"
    reason = f"its recall of class '{weakest}' is {now:.4f}, under the floor of {rules.min_recall:g}"
    rule = f"at least {rules.min_recall:g}"
    return [GateCheck(f"recall of '{weakest}'", before, f"{now:.4f}", rule, now >= rules.min_recall, reason)]


def _check_superiority(losses: _PairedLosses, rules: GateRules) -> GateCheck:
    """Superiority on the new world, or on the old one where there is no new one."""
    assert losses.champion is not None
    ahead, p = superiority_test(losses.champion, losses.challenger, is_classification=losses.is_classification)
    metrics = _format_metrics(losses)
    shown = f"{metrics[1]} against {metrics[0]}, p = {p:.2g}"
    if p <= rules.alpha:
        what = "better" if ahead else "worse"
        passed, reason = ahead, f"it is significantly {what} on the {losses.name} test set ({shown})"
    else:
        passed, reason = (
            rules.accept_equal,
            f"there is no significant difference on the {losses.name} test set ({shown})",
        )
        reason += ", and --accept-equal lets it pass" if passed else ""
    test = "McNemar's exact test" if losses.is_classification else "paired t test"
    rule = f"{test}: p {p:.2g}, at most {rules.alpha:g}" + (", or equal" if rules.accept_equal else "")
    return GateCheck(f"better, {losses.name} test set", *metrics, rule, passed, reason)


def _format_metrics(losses: _PairedLosses) -> tuple[str, str]:
    """Shares right, or mean errors, of champion and challenger."""
    assert losses.champion is not None
    if losses.is_classification:
        return f"{_accuracy(losses.champion):.4f}", f"{_accuracy(losses.challenger):.4f}"
    return f"error {float(losses.champion.mean()):.4g}", f"error {float(losses.challenger.mean()):.4g}"


def _accuracy(losses: Tensor) -> float:
    return float((losses == 0).double().mean())


def _check_latency(
    champion: InferenceModel, challenger: InferenceModel, forms: PairedSplit, rules: GateRules
) -> GateCheck:
    """The time of a lone answer, the two measured in turn."""
    first = torch.tensor([0])
    before, now = measure_latencies(
        ((champion, forms.champion.fetch(first)), (challenger, forms.challenger.fetch(first)))
    )
    ratio = now / before
    passed = ratio <= rules.latency_ratio or now - before <= _MAX_EXTRA_LATENCY_S
    reason = f"a lone answer takes {ratio:.1f} times as long, and {rules.latency_ratio:g} are allowed"
    shown = (f"{1000 * before:.2f} ms", f"{1000 * now:.2f} ms")
    rule = f"at most {rules.latency_ratio:g} times, or {1000 * _MAX_EXTRA_LATENCY_S:g} ms more: {ratio:.2f}"
    return GateCheck("a lone answer", *shown, rule, passed, reason)


def measure_latencies(requests: Sequence[tuple[InferenceModel, TensorTree]]) -> list[float]:
    """The time of one answer of each model in seconds, as the quickest tenth have it.

    They are asked in turn, there and back, and the quickest count, so that other work on the machine slows all alike:
    by medians one of two equal networks seemed to take five times as long where fifteen processes shared two cores.
    """
    seconds: list[list[float]] = [[] for _ in requests]
    both = list(zip(requests, seconds, strict=True))
    for trial in range(_NUM_TIMED + _NUM_WARMUP):
        for (model, stored), own in both if trial % 2 else both[::-1]:
            began = time.perf_counter()
            model.outputs(stored)
            if trial >= _NUM_WARMUP:
                own.append(time.perf_counter() - began)
    return [sorted(own)[len(own) // 10] for own in seconds]
