"""A retraining round: train the champion on old data and labeled requests, and let the gate decide about the result.

A round has a directory in the registry, `REGISTRY/NAME/rounds/N/`, with the new samples at its start, the label issues
and the run. The round can be inspected, and its run resumed, whatever is labeled in the meantime.
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

from tuneforge import Data, Engine, Inputs, Predictor, Split, load
from tuneforge.errors import DataError, FolderError, UsageError
from tuneforge.exporting import (
    BUNDLE,
    named_tensors,
    nonfinite_to_none,
    read_json,
    save_tensors,
    write_json,
)
from tuneforge.plugin import ComponentSpec
from tuneforge_serve.feedback.label_issues import FeedbackLabelIssue, describe_label_issues, find_label_issues
from tuneforge_serve.feedback.monitoring import MIN_REQUESTS
from tuneforge_serve.feedback.request_log import LabeledRequest, RequestLog
from tuneforge_serve.registry.gate import GateDecision, GateRules, make_refusal
from tuneforge_serve.registry.model_registry import ModelRegistry, find_model, list_models
from tuneforge_serve.registry.promotion import promote
from tuneforge_serve.registry.significance import min_num_pairs

ROUND = "retraining-round"
"""The event of a retraining round in the registry's log."""

MAX_LABEL_ISSUES = 0.1
"""The largest accepted fraction of label issues. Of 300 correctly labeled digits after a shift, at most 4 % are issues;
with a fifth of the labels wrong at random, about a fifth are.
"""

ROUNDS, NEW, LABEL_ISSUES, RUN = "rounds", "new.safetensors", "label_issues.json", "run"
_CONTINUED, _WARM_START = "continued", "warm-start"


@attrs.frozen
class RetrainingRound:
    """The result of a retraining round.

    Args:
        number: The number of the round.
        num_labeled: The number of labeled samples; equal inputs count once.
        num_held_out: The number of those that were held out for the gate.
        label_issues: Labels that do not fit their samples.
        new_version: The number of the new champion; None if the gate refused.
        previous_champion: The champion at the start of the round.
        decision: The decision of the gate.
        round_dir: The directory of the round.
        seconds: The duration of the round.
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
    formats: Sequence[str] | None = None,
    run_settings: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> RetrainingRound:
    """Retrain the champion on its old data and on labeled requests, and promote the result if the gate accepts it.

    Args:
        registry: The directory of the registry.
        request_log: The request log of the server.
        name: The name of the model; None uses the only model of the registry.
        strategy: A strategy as `Engine` accepts it.
        rules: The rules of the gate; None uses the defaults.
        trust_labels: Do not look for label issues; train and test on all labels.
        max_label_issues: The largest accepted fraction of label issues; with more, nothing is trained.
        formats: The export formats of the new version; None uses those of the champion.
        run_settings: Settings of the run that override the champion's, such as `seed` and `device`.
        log: Called with messages for the user.

    Raises:
        FolderError: The registry has no such model, or the champion cannot be trained.
        DataError: There are too few labels, or a labeled request cannot be decoded.
    """
    model_registry = select_model(registry, name)
    rules = rules or GateRules()
    job = _RetrainingJob(
        model_registry, request_log, strategy, rules, trust_labels, max_label_issues, formats, run_settings or {}, log
    )
    return job.run()


@attrs.frozen(eq=False)
class _RetrainingJob:
    """A running retraining round; the fields are arguments of `retrain`."""

    registry: ModelRegistry
    request_log: RequestLog
    strategy: Any
    rules: GateRules
    trust_labels: bool
    max_label_issues: float
    formats: Sequence[str] | None
    run_settings: Mapping[str, Any]
    log: Callable[[str], None]

    def run(self) -> RetrainingRound:
        """Run the round."""
        start, registry = time.monotonic(), self.registry
        previous_champion = registry.champion
        if previous_champion is None:
            raise FolderError(
                f"'{registry.name}' has no champion", where=str(registry.path), fix="tuneforge promote RUN"
            )
        champion = _load_trainable(registry.version_dir(previous_champion))
        labels = self.request_log.num_labels()  # labels given during the round count for the next one
        samples = LabeledSamples.decode(list(self.request_log.labeled_requests()), champion.inputs)
        self._require_enough_labels(samples)
        number, round_dir = _create_round_dir(registry)
        self.log(
            f"retraining round {number}: {len(samples)} labeled samples, {sum(samples.held_out)} held out for the gate"
        )
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
            seconds=time.monotonic() - start,
        )
        registry.log_event(ROUND, **_build_event(retraining_round, labels))
        return retraining_round

    def _require_enough_labels(self, samples: LabeledSamples) -> None:
        """Check that the gate can accept the result, before anything is written."""
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
            f"{len(samples)} labeled sample(s) are too few to retrain",
            where=str(self.request_log.path),
            why=f"{num_held_out} of them are held out for the gate, which needs {min_held_out} for a significant "
            "difference, and at least one is needed for training",
            fix=f"label about {more} more (POST /feedback, or the page /review)",
        )

    def _find_label_issues(
        self, champion: Predictor, samples: LabeledSamples, round_dir: Path
    ) -> list[FeedbackLabelIssue]:
        """Find label issues by the champion's features and the old samples, whose labels are trusted."""
        data = load(_base_run(champion)).with_data().data
        labels = data.targets.labels
        classes = [*labels, *sorted(set(samples.labels) - set(labels))]
        issues = find_label_issues(champion, data.train, samples.to_split(classes), classes)
        write_json(round_dir / LABEL_ISSUES, [{"id": samples.ids[each.row], **attrs.asdict(each)} for each in issues])
        self.log(describe_label_issues(issues, len(samples)))
        return issues

    def _refuse_labels(self, issues: Sequence[FeedbackLabelIssue], total: int, previous_champion: int) -> GateDecision:
        """Return a refusal because of too many label issues."""
        fraction, max_fraction = (f"{100 * each:.0f} %" for each in (len(issues) / total, self.max_label_issues))
        rule = f"at most {max_fraction} of the labels are issues"
        decision = make_refusal(
            "label issues",
            f"{describe_label_issues(issues, total)}, and {max_fraction} is the limit",
            challenger=fraction,
            rule=rule,
        )
        self.registry.log_event(
            "refused", previous_champion=previous_champion, decision=nonfinite_to_none(decision.to_dict())
        )
        return decision

    def _train_and_promote(
        self, champion: Predictor, samples: LabeledSamples, round_dir: Path
    ) -> tuple[GateDecision, int | None]:
        """Train and promote; return the decision and the number of the new version, if there is one."""
        samples.save(round_dir / NEW)
        run_dir = _build_engine(champion, round_dir, self.strategy, self.run_settings, self.log).run().run_dir
        data = load(run_dir).with_data().data
        result = promote(
            run_dir,
            registry=self.registry.root,
            name=self.registry.name,
            formats=self.formats or _list_formats(champion.run_dir),
            new_test_set=data.extra_test_splits.get("new"),
            new_targets=data.targets,
            reference_splits=_build_reference_splits(self.registry, samples, data),
            rules=self.rules,
            log=self.log,
        )
        return result.decision, result.version


@attrs.frozen(eq=False)
class LabeledSamples:
    """Labeled samples in stored form, as the data source `continued` reads them.

    Args:
        tensors: The stored inputs, each (n, ...), by name; a single tensor has the name ''.
        labels: The label of each sample.
        ids: The request id of each sample.
        held_out: Whether each sample is held out for the gate.
        label_numbers: The position of each label among all labels ever given.
    """

    tensors: dict[str, Tensor]
    labels: list[str]
    ids: list[str]
    held_out: list[bool]
    label_numbers: list[int]

    @classmethod
    def decode(cls, requests: Sequence[LabeledRequest], inputs: Inputs) -> LabeledSamples:
        """Decode labeled requests.

        Raises:
            DataError: There are none, one cannot be decoded, or they have different shapes.
        """
        if not requests:
            raise DataError("there are no labels", fix="label some requests (POST /feedback, or the page /review)")
        stored = [named_tensors(each.request.decode(inputs)) for each in requests]
        if any(stored[0][name].shape != each[name].shape for each in stored for name in stored[0]):
            raise DataError("labeled samples have different shapes", fix="use preprocessing that resizes to one shape")
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
        """Return the samples without some rows."""
        return self.take([row for row in range(len(self)) if row not in rows])

    def take(self, rows: Sequence[int]) -> LabeledSamples:
        """Return the samples of some rows."""
        return LabeledSamples(
            {name: tensor[list(rows)] for name, tensor in self.tensors.items()},
            [self.labels[row] for row in rows],
            [self.ids[row] for row in rows],
            [self.held_out[row] for row in rows],
            [self.label_numbers[row] for row in rows],
        )

    def to_split(self, classes: Sequence[str]) -> Split:
        """Return the samples as a split, with indices into `classes` as targets."""
        codes = torch.tensor([classes.index(each) for each in self.labels])
        return Split(self.tensors.get("", self.tensors), codes, ids=self.ids)

    def save(self, path: Path) -> None:
        """Write the samples to a file atomically."""
        metadata = {"labels": self.labels, "ids": self.ids, "held_out": self.held_out}
        save_tensors({f"stored/{name}": each for name, each in self.tensors.items()}, path, metadata=metadata)


def select_model(registry: str | Path, name: str | None) -> ModelRegistry:
    """Return a model of a registry, or its only model if `name` is None.

    Raises:
        FolderError: The registry has no such model, or no model at all.
        UsageError: The registry has several models, and `name` is None.
    """
    if name is not None:
        return find_model(registry, name)
    known = list_models(registry)
    if not known:
        fix = "add one: tuneforge promote RUN"
        raise FolderError(f"the registry '{registry}' has no model", where="--registry", fix=fix)
    if len(known) > 1:
        listed = ", ".join(each.name for each in known)
        raise UsageError(f"the registry has several models: {listed}", where="--name", fix="choose one of them")
    return known[0]


def _load_trainable(version_dir: Path) -> Predictor:
    """Load a version that can be retrained: it has safetensors weights, and predicts classes."""
    if not (version_dir / "model.safetensors").is_file():
        raise FolderError(
            f"version {version_dir.name} of '{version_dir.parent.name}' cannot be retrained",
            where=str(version_dir),
            why="it contains no safetensors weights",
            fix="promote the run again with --format onnx --format safetensors",
        )
    predictor = load(version_dir)
    if "class" not in predictor.targets.describe(torch.zeros(predictor.targets.num_outputs)):
        raise DataError(
            f"'{version_dir.parent.name}' does not predict classes",
            why="labels are class names, so they cannot train this model",
            fix="train on data of your own: tuneforge run",
        )
    return predictor


def _list_formats(version_dir: Path) -> tuple[str, ...]:
    """Return the export formats of a version."""
    return tuple(read_json(version_dir / BUNDLE)["formats"])


def _base_run(champion: Predictor) -> Path:
    """Return the run or version with the old data: the first one that later versions were retrained from."""
    data = champion.run.config.data
    return Path(data.options["run"]) if data.name == _CONTINUED else champion.run_dir.absolute()


def _create_round_dir(registry: ModelRegistry) -> tuple[int, Path]:
    rounds_dir = registry.path / ROUNDS
    rounds_dir.mkdir(exist_ok=True)
    number = 1 + max((int(each.name) for each in rounds_dir.iterdir() if each.name.isdigit()), default=0)
    (rounds_dir / str(number)).mkdir()
    return number, rounds_dir / str(number)


def _build_reference_splits(registry: ModelRegistry, samples: LabeledSamples, data: Data) -> list[Split]:
    """Return the references for drift: labeled samples of the validation and test sets, one split per promoted round.

    Samples of a round that are too few for a reference are merged with those of the round before.
    """
    evaluated = (each for each in (data.val, data.extra_test_splits.get("new")) if each is not None)
    known = {split.id_of(row) for split in evaluated for row in range(len(split))}
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
    """Build a run with the champion's settings, but with other data, initial weights and strategy."""
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
    """Return the event of a round for the log; `num_labels` is the number of labels ever given at its start."""
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
