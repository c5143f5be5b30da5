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

from tuneforge.engine.data.dataset import Inputable, Split, Targets
from tuneforge.engine.data.loader import fetched, in_turn
from tuneforge.exporting.bundle import Servable
from tuneforge.exporting.formats import answers_of
from tuneforge.exporting.reference_outputs import digests
from tuneforge.plugin.component import values_of
from tuneforge.ship.champion.statistics import at_most_lost, better, more_error

_BATCH = 64
_TRAINED_ON = 0.1  # share of a test split that may have been trained on, beyond what chance repeats
_LONE_S = 1e-3  # a lone answer that is slower by less than this is no reason to refuse
_TIMED, _WARM = 30, 5
_SMALL, _HUGE = 1e-12, 1e12
_LACKING = -1e4  # the output for a name that a model does not know; finite, so that losses stay numbers


@attrs.frozen
class Rules:
    """What a challenger must keep to.

    Args:
        margin: The share of right answers that may be lost on the old test split; for numbers, of the error added to
            it. The upper end of a one-sided 95 % interval must stay within.
        floor: The least recall of each class on the old test split.
        alpha: Level of the test that shows a difference.
        latency_ratio: How many times as long a lone answer may take.
        accept_equal: Promote also where no significant difference is found.
    """

    margin: float = 0.02
    floor: float = 0.5
    alpha: float = 0.05
    latency_ratio: float = 2.0
    accept_equal: bool = False


@attrs.frozen
class Row:
    """One line of a verdict.

    Args:
        what: The question.
        champion: Its figure.
        challenger: Its figure.
        rule: What must hold.
        holds: Whether it does.
        sentence: Why not, or what it shows.
    """

    what: str
    champion: str
    challenger: str
    rule: str
    holds: bool
    sentence: str


@attrs.frozen
class Verdict:
    """What the gate says.

    Args:
        promoted: True where the challenger takes over.
        reason: Why, in one sentence.
        rows: Every question with its answer.
        tests: Each test split that was used: fingerprint, samples, those left out, and how often it had already been
            used to decide.
    """

    promoted: bool
    reason: str
    rows: tuple[Row, ...]
    tests: Mapping[str, Mapping[str, Any]]

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {**attrs.asdict(self), "rows": [attrs.asdict(row) for row in self.rows], "tests": dict(self.tests)}

    def table(self) -> str:
        """As text: the rows, the test splits, the reason."""
        header = ("", "champion", "challenger", "rule", "holds")
        cells = [(row.what, row.champion, row.challenger, row.rule, "yes" if row.holds else "NO") for row in self.rows]
        widths = [max(len(row[column]) for row in (header, *cells)) for column in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *cells)
        ]
        for name, test in self.tests.items():
            left = f", {test['left_out']} left out because a model trained on them" if test["left_out"] else ""
            times = "never" if not test["used"] else f"{test['used']} time(s)"
            lines.append(f"{name} test set: {test['samples']} samples{left}; used to decide {times} before")
        return "\n".join([*lines, f"{'promoted' if self.promoted else 'not promoted'}: {self.reason}"])


@attrs.frozen(eq=False)
class Both:
    """A test split in two forms, where champion and challenger store inputs otherwise: the same samples in one order.

    Args:
        champion: As the champion stores them; its targets are the truth.
        challenger: As the challenger does.
    """

    champion: Split
    challenger: Split


def judge(
    champion: Servable | None,
    challenger: Servable,
    old: Split | Both,
    new: Split | Both | None = None,
    *,
    rules: Rules | None = None,
    old_targets: Targets | None = None,
    new_targets: Targets | None = None,
    used: Callable[[str], int] = lambda fingerprint: 0,
) -> Verdict:
    """Decide between the champion and a challenger.

    Args:
        champion: Who answers now; None for the first of a name, which needs to keep the floors only.
        challenger: Who may take over.
        old: The old world's test split, as both models store inputs, or in both forms.
        new: The new world's held-out split; None: superiority on the old one decides.
        rules: What must hold.
        old_targets: How the old split's targets are read; by default as the champion reads them.
        new_targets: Of the new split; by default as the challenger reads them.
        used: How often the test set of a fingerprint has been used to decide.
    """
    rules = rules or Rules()
    known = challenger.targets if champion is None else champion.targets
    given = {"old": (old, old_targets or known)}
    if new is not None and champion is not None:
        given["new"] = (new, new_targets or challenger.targets)
    if (misfit := _misfit(champion, challenger, [each for each, _ in given.values()])) is not None:
        return misfit
    sets = {
        name: _Exam.of(name, each if isinstance(each, Both) else Both(each, each), targets, champion, challenger)
        for name, (each, targets) in given.items()
    }
    tests = {name: {**exam.about, "used": used(exam.about["fingerprint"])} for name, exam in sets.items()}
    if trained := [row for exam in sets.values() if (row := exam.trained_on()) is not None]:
        return Verdict(False, trained[0].sentence, tuple(trained), tests)
    exams = {name: exam.sat(champion, challenger) for name, exam in sets.items()}
    rows = _floors(exams["old"], rules)
    if champion is None:
        return _verdict(rows, tests, "it is the first of its name, and every floor holds")
    superior = _superior(exams.get("new", exams["old"]), rules)
    fast = _fast_enough(champion, challenger, sets["old"].forms, rules)
    return _verdict([*rows, superior, _not_worse(exams["old"], rules), fast], tests, superior.sentence)


def refused(what: str, sentence: str, *, champion: str = "", challenger: str = "", rule: str = "") -> Verdict:
    """A verdict without an examination: the challenger cannot be judged, or may not go to work."""
    return Verdict(False, sentence, (Row(what, champion, challenger, rule, False, sentence),), {})


def _verdict(rows: Sequence[Row], tests: Mapping[str, Mapping[str, Any]], shown: str) -> Verdict:
    broken = [row.sentence for row in rows if not row.holds]
    return Verdict(not broken, broken[0] if broken else shown, tuple(rows), tests)


def _misfit(champion: Servable | None, challenger: Servable, sets: Sequence[Split | Both]) -> Verdict | None:
    """Why the two cannot be compared at all, or the challenger may not go to work."""
    failed = [name for name, form in challenger.record.get("formats", {}).items() if not form["parity"]["passed"]]
    if failed:
        return refused("parity", f"the {failed[0]} export does not answer as the tuned model")
    if champion is None:
        return None
    missing = [f"'{name}'" for name in champion.targets.labels if name not in challenger.targets.labels]
    if missing:
        before, now = (str(len(each.targets.labels)) for each in (champion, challenger))
        sentence = f"the challenger does not know {', '.join(missing)}, which the champion does"
        return refused("class names", sentence, champion=before, challenger=now, rule="all of the champion's")
    for_both = all(isinstance(each, Both) for each in sets) or same_contract(champion.inputs, challenger.inputs)
    if type(champion.targets) is not type(challenger.targets) or not for_both:
        return refused("contracts", "the challenger reads inputs or answers otherwise, so no test set fits both")
    return None


def same_contract(one: Any, other: Any) -> bool:
    """True where two contracts are of one kind and have the same options."""
    return type(one) is type(other) and values_of(one) == values_of(other)


@attrs.frozen(eq=False)
class _Exam:
    """A test split, less what one of the models trained on.

    Args:
        name: Of the split.
        forms: What is left of it.
        targets: How its targets are read.
        about: What the verdict says of it.
        shares: What champion and challenger trained on of it.
        allowed: What the challenger may have.
    """

    name: str
    forms: Both
    targets: Targets
    about: dict[str, Any]
    shares: tuple[float, float]
    allowed: float

    @classmethod
    def of(cls, name: str, forms: Both, targets: Targets, champion: Servable | None, challenger: Servable) -> _Exam:
        kept = [None if each is None else each.evidence for each in (champion, challenger)]
        seen = [
            torch.zeros(len(split), dtype=torch.bool) if each is None else torch.isin(digests(split), each.seen)
            for each, split in zip(kept, (forms.champion, forms.challenger), strict=True)
        ]
        chance = [0.0 if each is None else float(each.repeated) for each in kept]
        dirty = [where for where, repeated in zip(seen, chance, strict=True) if repeated <= _TRAINED_ON]
        clean = (~torch.stack([*dirty, torch.zeros_like(seen[0])]).any(0)).nonzero().flatten()
        whole = len(seen[0])
        about = {"fingerprint": forms.champion.fingerprint(), "samples": len(clean), "left_out": whole - len(clean)}
        if len(clean) not in (0, whole):
            forms = Both(forms.champion.take(clean), forms.challenger.take(clean))
        before, now = (float(each.double().mean()) for each in seen)
        return cls(name, forms, targets, about, (before, now), chance[1] + _TRAINED_ON)

    def trained_on(self) -> Row | None:
        """Refuses a test split that the challenger trained on, or of which nothing is left."""
        if self.shares[1] <= self.allowed and self.about["samples"]:
            return None
        before, now = (f"{100 * share:.1f} %" for share in self.shares)
        sentence = f"the challenger trained on {now} of the {self.name} test set, so it cannot be judged by it"
        if self.shares[1] <= self.allowed:
            sentence = f"the champion trained on {before} of the {self.name} test set, so they cannot be judged by it"
        return Row("trained on the test set", before, now, f"at most {100 * self.allowed:.1f} %", False, sentence)

    def sat(self, champion: Servable | None, challenger: Servable) -> _Sat:
        """Both models' answers."""
        truths = self.forms.champion.targets
        before = None if champion is None else _wrongness(champion, self.forms.champion, truths, self.targets)
        now = _wrongness(challenger, self.forms.challenger, truths, self.targets)
        return _Sat(self.name, before, now, self.targets, truths)


@attrs.frozen(eq=False)
class _Sat:
    """How wrong each answer of both models is (n,): 0 is right."""

    name: str
    champion: Tensor | None
    challenger: Tensor
    targets: Targets
    truths: Tensor

    @property
    def named(self) -> bool:
        """True where answers are right or wrong, and not only near or far."""
        return bool(self.targets.labels)


def _wrongness(model: Servable, split: Split, truths: Tensor, targets: Targets) -> Tensor:
    """How wrong each answer is (n,): by the test set's own names, or for numbers in deviations of the truth."""
    batches = fetched(split, in_turn(len(split), _BATCH), workers=0)
    outputs = torch.cat([model.outputs(stored) for _, stored in batches])
    if targets.labels:
        named = _by_name(outputs, model.targets.labels, targets.labels, more=truths.ndim == 1)
        return targets.wrongness(named, truths).double()
    wanted = answers_of(targets, truths.reshape(len(truths), -1)).double()
    off = (answers_of(model.targets, outputs).reshape(wanted.shape).double() - wanted).abs()
    return (off / wanted.std(0).clamp_min(_SMALL)).mean(1).nan_to_num(nan=_HUGE, posinf=_HUGE)


def _by_name(outputs: Tensor, own: Sequence[str], wanted: Sequence[str], *, more: bool) -> Tensor:
    """Outputs (b, k) in the order of other names; hopeless where the model lacks one; with `more`, its others last."""
    if tuple(own) == tuple(wanted):
        return outputs
    order = [*wanted, *(name for name in own if more and name not in wanted)]
    lacking = torch.full((len(outputs), 1), _LACKING)
    return torch.cat([outputs, lacking], 1)[:, [own.index(name) if name in own else len(own) for name in order]]


def _not_worse(sat: _Sat, rules: Rules) -> Row:
    """Non-inferiority on the old world."""
    assert sat.champion is not None
    if sat.named:
        lost, most = at_most_lost(sat.champion == 0, sat.challenger == 0)
    else:
        lost, most = more_error(sat.champion, sat.challenger)
    figures = _figures(sat)
    unit = "points" if sat.named else "% of the error"
    holds = most <= rules.margin
    ruled_out = f"more than {100 * most:.2f} can be ruled out, and {100 * rules.margin:g} are allowed"
    sentence = f"on the {sat.name} test set it loses {100 * lost:.2f} {unit}; only {ruled_out}"
    rule = f"loses at most {100 * rules.margin:g} {unit}: {100 * lost:+.2f}, at most {100 * most:+.2f}"
    return Row(f"{sat.name} test set", *figures, rule, holds, sentence)


def _floors(sat: _Sat, rules: Rules) -> list[Row]:
    """The weakest class's recall on the old world; nothing where there are no classes."""
    classes = {name: rows for name, rows in sat.targets.pools(sat.truths).items() if len(rows)}
    if not classes:
        return []
    weakest = min(classes, key=lambda name: _share_right(sat.challenger[classes[name]]))
    now = _share_right(sat.challenger[classes[weakest]])
    before = "" if sat.champion is None else f"{_share_right(sat.champion[classes[weakest]]):.4f}"
    sentence = f"its recall of class '{weakest}' is {now:.4f}, under the floor of {rules.floor:g}"
    rule = f"at least {rules.floor:g}"
    return [Row(f"recall of '{weakest}'", before, f"{now:.4f}", rule, now >= rules.floor, sentence)]


def _superior(sat: _Sat, rules: Rules) -> Row:
    """Superiority on the new world, or on the old one where there is no new one."""
    assert sat.champion is not None
    ahead, p = better(sat.champion, sat.challenger, named=sat.named)
    figures = _figures(sat)
    shown = f"{figures[1]} against {figures[0]}, p = {p:.2g}"
    if p <= rules.alpha:
        what = "better" if ahead else "worse"
        holds, sentence = ahead, f"it is significantly {what} on the {sat.name} test set ({shown})"
    else:
        holds, sentence = rules.accept_equal, f"there is no significant difference on the {sat.name} test set ({shown})"
        sentence += ", and --accept-equal lets it pass" if holds else ""
    test = "McNemar's exact test" if sat.named else "paired t test"
    rule = f"{test}: p {p:.2g}, at most {rules.alpha:g}" + (", or equal" if rules.accept_equal else "")
    return Row(f"better, {sat.name} test set", *figures, rule, holds, sentence)


def _figures(sat: _Sat) -> tuple[str, str]:
    """Shares right, or mean errors, of champion and challenger."""
    assert sat.champion is not None
    if sat.named:
        return f"{_share_right(sat.champion):.4f}", f"{_share_right(sat.challenger):.4f}"
    return f"error {float(sat.champion.mean()):.4g}", f"error {float(sat.challenger.mean()):.4g}"


def _share_right(wrongness: Tensor) -> float:
    return float((wrongness == 0).double().mean())


def _fast_enough(champion: Servable, challenger: Servable, forms: Both, rules: Rules) -> Row:
    """The time of a lone answer, the two measured in turn."""
    first = torch.tensor([0])
    before, now = lone_times(((champion, forms.champion.fetch(first)), (challenger, forms.challenger.fetch(first))))
    ratio = now / before
    holds = ratio <= rules.latency_ratio or now - before <= _LONE_S
    sentence = f"a lone answer takes {ratio:.1f} times as long, and {rules.latency_ratio:g} are allowed"
    shown = (f"{1000 * before:.2f} ms", f"{1000 * now:.2f} ms")
    rule = f"at most {rules.latency_ratio:g} times, or {1000 * _LONE_S:g} ms more: {ratio:.2f}"
    return Row("a lone answer", *shown, rule, holds, sentence)


def lone_times(asked: Sequence[tuple[Servable, Inputable]]) -> list[float]:
    """The time of one answer of each model in seconds, as the quickest tenth have it.

    They are asked in turn, there and back, and the quickest count, so that other work on the machine slows all alike:
    by medians one of two equal networks seemed to take five times as long where fifteen processes shared two cores.
    """
    taken: list[list[float]] = [[] for _ in asked]
    both = list(zip(asked, taken, strict=True))
    for turn in range(_TIMED + _WARM):
        for (model, stored), own in both if turn % 2 else both[::-1]:
            began = time.perf_counter()
            model.outputs(stored)
            if turn >= _WARM:
                own.append(time.perf_counter() - began)
    return [sorted(own)[len(own) // 10] for own in taken]
