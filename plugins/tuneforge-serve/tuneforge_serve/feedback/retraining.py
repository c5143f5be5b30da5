"""One turn of the circle: the champion, old data and what production taught make a challenger, and the gate judges.

A turn has a folder in the store, `STORE/NAME/rounds/N/`: the new samples as they were at its beginning, the labels that
did not fit, the run. So a turn can be looked at, and its run resumed, whatever is labelled meanwhile.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Data, Inputs, Split, named_tensors
from tuneforge.engine.session.engine import Engine
from tuneforge.engine.session.predictor import Predictor, load
from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.safetensors_io import save_tensors
from tuneforge.errors import DataError, FolderError, UsageError
from tuneforge.exporting.bundle import BUNDLE
from tuneforge.plugin.steps import ComponentSpec
from tuneforge_serve.feedback.label_issues import FeedbackLabelIssue, describe_label_issues, find_label_issues
from tuneforge_serve.feedback.monitoring import MIN_REQUESTS
from tuneforge_serve.feedback.request_log import LabeledRequest, RequestLog
from tuneforge_serve.registry.gate import GateDecision, GateRules, make_refusal
from tuneforge_serve.registry.model_registry import ModelRegistry, find_model, list_models
from tuneforge_serve.registry.promotion import promote
from tuneforge_serve.registry.significance import min_num_pairs

ROUND = "retraining-round"
"""The event that the store's log has for each turn."""

MAX_LABEL_ISSUES = 0.1
"""Share of labels that may not fit their samples. Of 300 real digits of a changed world, all labelled right, at most
4 % do not seem to; where a fifth are labelled wrong at random, about a fifth do not.
"""

ROUNDS, NEW, LABEL_ISSUES, RUN = "rounds", "new.safetensors", "label_issues.json", "run"
_CONTINUED, _WARM_START = "continued", "warm-start"


@attrs.frozen
class RetrainingRound:
    """How a turn ended.

    Args:
        number: Of the turn.
        num_labeled: Labelled samples, each content once.
        num_held_out: Those of them that only the gate saw.
        label_issues: Labels that do not fit their samples.
        new_version: The new champion's number; None where the gate refused.
        previous_champion: The champion at the beginning.
        decision: What the gate said.
        round_dir: Of the turn.
        seconds: It took.
    """

    number: int
    num_labeled: int
    num_held_out: int
    label_issues: tuple[FeedbackLabelIssue, ...]
    new_version: int | None
    previous_champion: int
    decision: GateDecision
    round_dir: Path
    seconds: float


def retrain(
    registry: str | Path,
    request_log: RequestLog,
    *,
    name: str | None = None,
    strategy: Any = "replay",
    rules: GateRules | None = None,
    trust_labels: bool = False,
    max_label_issues: float = MAX_LABEL_ISSUES,
    to: Sequence[str] | None = None,
    run_settings: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> RetrainingRound:
    """Tune the champion on the old data and on what got labelled, and promote the result if the gate lets it pass.

    Args:
        registry: The store's folder.
        request_log: Of the server that the champion answers in.
        name: Of the model; None: the only one that the store has.
        strategy: By name, `use(...)`, or what else `Engine` takes.
        rules: Of the gate.
        trust_labels: Train also on labels that do not fit their samples, judge by them, and have as many as there are.
        max_label_issues: Share of the labels that may not fit their samples; with more, nothing is trained.
        to: The forms of the new version; None: those of the champion.
        run_settings: Of the run, over the champion's, such as `seed` and `device`.
        log: Where sentences for the user go.

    Raises:
        FolderError: The store has no such champion, or its version does not hold what can be tuned.
        DataError: Too little is labelled, or what is cannot be decoded any more.
    """
    model_registry = select_model(registry, name)
    rules = rules or GateRules()
    job = _RetrainingJob(
        model_registry, request_log, strategy, rules, trust_labels, max_label_issues, to, run_settings or {}, log
    )
    return job.run()


@attrs.frozen(eq=False)
class _RetrainingJob:
    """A turn while it goes on; the fields are what `retrain` is given."""

    registry: ModelRegistry
    request_log: RequestLog
    strategy: Any
    rules: GateRules
    trust_labels: bool
    max_label_issues: float
    to: Sequence[str] | None
    run_settings: Mapping[str, Any]
    log: Callable[[str], None]

    def run(self) -> RetrainingRound:
        """From the labels to the decision."""
        began, registry = time.monotonic(), self.registry
        previous_champion = registry.champion
        if previous_champion is None:
            raise FolderError(
                f"'{registry.name}' has no champion", where=str(registry.path), fix="tuneforge promote RUN"
            )
        champion = _load_trainable(registry.version_dir(previous_champion))
        labels = self.request_log.num_labels()  # those given while the turn goes on are for the next one
        samples = LabeledSamples.decode(list(self.request_log.labeled_requests()), champion.inputs)
        self._require_enough_labels(samples)
        number, round_dir = _create_round_dir(registry)
        self.log(f"turn {number}: {len(samples)} labelled samples, {sum(samples.held_out)} of them for the gate alone")
        label_issues = [] if self.trust_labels else self._find_label_issues(champion, samples, round_dir)
        if len(label_issues) > self.max_label_issues * len(samples):
            decision, new_version = self._refuse_labels(label_issues, len(samples), previous_champion), None
        else:
            decision, new_version = self._train_and_promote(
                champion, samples.without({each.row for each in label_issues}), round_dir
            )
        retraining_round = RetrainingRound(
            number=number,
            num_labeled=len(samples),
            num_held_out=sum(samples.held_out),
            label_issues=tuple(label_issues),
            new_version=new_version,
            previous_champion=previous_champion,
            decision=decision,
            round_dir=round_dir,
            seconds=time.monotonic() - began,
        )
        registry.log_event(ROUND, **_build_event(retraining_round, labels))
        return retraining_round

    def _require_enough_labels(self, samples: LabeledSamples) -> None:
        """See that a turn can end well, before anything is made."""
        num_held_out, min_held_out = (
            sum(samples.held_out),
            0 if self.rules.accept_equal else min_num_pairs(self.rules.alpha),
        )
        if num_held_out < len(samples) and num_held_out >= min_held_out:
            return
        more = (
            max(1, math.ceil((min_held_out - num_held_out) / self.request_log.held_out_fraction))
            if self.request_log.held_out_fraction
            else 1
        )
        raise DataError(
            f"{len(samples)} labelled sample(s) are too few for a turn",
            where=str(self.request_log.path),
            why=f"{num_held_out} of them are held out for the gate, which needs {min_held_out} to see any difference, "
            "and the others are to train on",
            fix=f"label about {more} more (POST /feedback, or the page /review)",
        )

    def _find_label_issues(
        self, champion: Predictor, samples: LabeledSamples, round_dir: Path
    ) -> list[FeedbackLabelIssue]:
        """Labels that do not fit, by the champion's features and the old samples, which are trusted."""
        data = load(_base_run(champion)).with_data().data
        labels = data.targets.labels
        classes = [*labels, *sorted(set(samples.labels) - set(labels))]
        issues = find_label_issues(champion.run, data.train, samples.to_split(classes), classes)
        names.write_json(
            round_dir / LABEL_ISSUES, [{"id": samples.ids[each.row], **attrs.asdict(each)} for each in issues]
        )
        self.log(describe_label_issues(issues, len(samples)))
        return issues

    def _refuse_labels(self, issues: Sequence[FeedbackLabelIssue], total: int, previous_champion: int) -> GateDecision:
        """Refuse labels of which too many do not fit."""
        fraction, max_fraction = (f"{100 * each:.0f} %" for each in (len(issues) / total, self.max_label_issues))
        rule = f"at most {max_fraction} of the labels do not fit"
        decision = make_refusal(
            "labels",
            f"{describe_label_issues(issues, total)}, and {max_fraction} are allowed",
            challenger=fraction,
            rule=rule,
        )
        self.registry.log_event(
            "refused", previous_champion=previous_champion, decision=names.nonfinite_to_none(decision.to_dict())
        )
        return decision

    def _train_and_promote(
        self, champion: Predictor, samples: LabeledSamples, round_dir: Path
    ) -> tuple[GateDecision, int | None]:
        """Tune, and let the gate judge; the number of the new version, if there is one."""
        samples.save(round_dir / NEW)
        run_dir = _build_engine(champion, round_dir, self.strategy, self.run_settings, self.log).run().run_dir
        data = load(run_dir).with_data().data
        result = promote(
            run_dir,
            registry=self.registry.root,
            name=self.registry.name,
            to=self.to or _list_formats(champion.run_dir),
            new_test_set=data.extra_test_splits.get("new"),
            new_targets=data.targets,
            reference_splits=_build_reference_splits(self.registry, samples, data),
            rules=self.rules,
            log=self.log,
        )
        return result.decision, result.version


@attrs.frozen(eq=False)
class LabeledSamples:
    """Labelled samples as the inputs contract stores them; what the data source `continued` reads.

    Args:
        tensors: Each (n, ...), by name; a single one is named ''.
        labels: The class of each.
        ids: The request of each.
        held_out: Whether each is for the gate alone.
        label_numbers: How many labels had been given when each was, itself counted.
    """

    tensors: dict[str, Tensor]
    labels: list[str]
    ids: list[str]
    held_out: list[bool]
    label_numbers: list[int]

    @classmethod
    def decode(cls, requests: Sequence[LabeledRequest], inputs: Inputs) -> LabeledSamples:
        """Decode labelled requests.

        Raises:
            DataError: There are none, or one cannot be decoded, or they come out in different shapes.
        """
        if not requests:
            raise DataError("nothing is labelled", fix="label some requests (POST /feedback, or the page /review)")
        stored = [named_tensors(each.request.decode(inputs)) for each in requests]
        if any(stored[0][name].shape != each[name].shape for each in stored for name in stored[0]):
            raise DataError("labelled samples have different shapes", fix="let the inputs' operations give one size")
        return cls(
            {name: torch.stack([each[name] for each in stored]) for name in stored[0]},
            [each.label for each in requests],
            [each.request.id for each in requests],
            [each.held_out for each in requests],
            [each.label_number for each in requests],
        )

    def __len__(self) -> int:
        return len(self.labels)

    def without(self, rows: Collection[int]) -> LabeledSamples:
        """All but some."""
        return self.take([place for place in range(len(self)) if place not in rows])

    def take(self, rows: Sequence[int]) -> LabeledSamples:
        """Some of them."""
        return LabeledSamples(
            {name: tensor[list(rows)] for name, tensor in self.tensors.items()},
            [self.labels[place] for place in rows],
            [self.ids[place] for place in rows],
            [self.held_out[place] for place in rows],
            [self.label_numbers[place] for place in rows],
        )

    def to_split(self, classes: Sequence[str]) -> Split:
        """As a split; targets are places in `classes`."""
        codes = torch.tensor([classes.index(each) for each in self.labels])
        return Split(self.tensors.get("", self.tensors), codes, ids=self.ids)

    def save(self, path: Path) -> None:
        """Write them into a file, whole or not at all."""
        metadata = {"labels": self.labels, "ids": self.ids, "held_out": self.held_out}
        save_tensors({f"stored/{name}": each for name, each in self.tensors.items()}, path, metadata=metadata)


def select_model(registry: str | Path, name: str | None) -> ModelRegistry:
    """The model of that name in a store, or the only one there is.

    Raises:
        FolderError: The store has none of that name, or none at all.
        UsageError: It has several, and none is named.
    """
    if name is not None:
        return find_model(registry, name)
    known = list_models(registry)
    if not known:
        raise FolderError(f"there is no model in the store '{registry}'", where="--store", fix="tuneforge promote RUN")
    if len(known) > 1:
        listed = ", ".join(each.name for each in known)
        raise UsageError(f"the store has the models {listed}", where="--name", fix="name one of them")
    return known[0]


def _load_trainable(folder: Path) -> Predictor:
    """The champion as a run that answers with a class."""
    if not (folder / names.WEIGHTS).is_file():
        raise FolderError(
            f"version {folder.name} of '{folder.parent.name}' holds nothing that can be tuned",
            where=str(folder),
            why="its safetensors form is missing",
            fix="promote the run again with --to onnx --to safetensors",
        )
    predictor = load(folder)
    if "class" not in predictor.targets.describe(torch.zeros(predictor.targets.num_outputs)):
        raise DataError(
            f"'{folder.parent.name}' does not answer with a class",
            why="labels name classes, so there is nothing to learn from them",
            fix="tune again on data of your own: tuneforge run",
        )
    return predictor


def _list_formats(folder: Path) -> tuple[str, ...]:
    """The export formats that a version holds."""
    return tuple(names.read_json(folder / BUNDLE)["formats"])


def _base_run(champion: Predictor) -> Path:
    """The run or version whose data are the old world: the first of the line."""
    data = champion.run.config.data
    return Path(data.options["run"]) if data.name == _CONTINUED else champion.run_dir.absolute()


def _create_round_dir(registry: ModelRegistry) -> tuple[int, Path]:
    rounds_dir = registry.path / ROUNDS
    rounds_dir.mkdir(exist_ok=True)
    number = 1 + max((int(each.name) for each in rounds_dir.iterdir() if each.name.isdigit()), default=0)
    (rounds_dir / str(number)).mkdir()
    return number, rounds_dir / str(number)


def _build_reference_splits(registry: ModelRegistry, samples: LabeledSamples, data: Data) -> list[Split]:
    """Labelled samples that were validated or judged on and not trained on, one split for each turn that was promoted
    and one for this one: what drift is measured from. Those too few to be a reference go with an older turn's.
    """
    looked = (each for each in (data.val, data.extra_test_splits.get("new")) if each is not None)
    known = {split.id_of(row) for split in looked for row in range(len(split))}
    ends = [
        line["labels"] for line in registry.read_events() if line["event"] == ROUND and line["promoted"] is not None
    ]
    by_round: dict[int, list[int]] = {}
    for row, (each, number) in enumerate(zip(samples.ids, samples.label_numbers, strict=True)):
        if f"new/{each}" in known:
            by_round.setdefault(bisect_left(ends, number), []).append(row)
    reference_rows: list[list[int]] = []
    rows: list[int] = []
    for round_index in sorted(by_round, reverse=True):
        rows += by_round[round_index]
        if len(rows) >= MIN_REQUESTS:
            reference_rows.append(rows)
            rows = []
    return [samples.take(each).to_split(data.targets.labels) for each in reference_rows]


def _build_engine(
    champion: Predictor,
    round_dir: Path,
    strategy: Any,
    run_settings: Mapping[str, Any],
    log: Callable[[str], None],
) -> Engine:
    """A run as the champion's, but for its data, its start and its strategy."""
    config = champion.run.config
    others = [each for each in config.callbacks if each.name != _WARM_START]
    return Engine(
        data=ComponentSpec(_CONTINUED, {"run": str(_base_run(champion)), "new": str((round_dir / NEW).absolute())}),
        strategy=strategy,
        callbacks=[*others, ComponentSpec(_WARM_START, {"run": str(champion.run_dir.absolute())})],
        **{name: getattr(config, name) for name in ("model", "adapt", "loss", "metrics", "augment")},
        **{name: getattr(config, name) for name in ("schedule", "optimizer")},
        **{**config.settings(), "out": round_dir / RUN, **run_settings},
        log=log,
    )


def _build_event(retraining_round: RetrainingRound, num_labels: int) -> dict[str, Any]:
    """What the store's log keeps of a turn; `num_labels` had been given when it began."""
    return {
        "round": retraining_round.number,
        "labels": num_labels,
        "num_labeled": retraining_round.num_labeled,
        "held_out": retraining_round.num_held_out,
        "num_label_issues": len(retraining_round.label_issues),
        "previous_champion": retraining_round.previous_champion,
        "promoted": retraining_round.new_version,
        "reason": retraining_round.decision.reason,
        "seconds": round(retraining_round.seconds, 1),
    }
