"""`tuneforge retrain`: retrain the champion on labeled feedback, once or continuously."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.plugin import (
    ComponentCommand,
    ExitCode,
    FiniteFloatRange,
    build_config,
    component_options,
    json_option,
)

if TYPE_CHECKING:
    from tuneforge_serve import ModelRegistry, RequestLog
    from tuneforge_serve.feedback.retraining import RetrainingRound
    from tuneforge_serve.feedback.rounds import RetrainingTriggers

_SECONDS_PER_UNIT = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class RetrainCommand(ComponentCommand):
    """A command whose default strategy is `replay`."""

    def load_base_config(self, ctx: click.Context, args: list[str]) -> dict[str, Any]:
        """Return the configuration that flags override."""
        return {"strategy": {"name": "replay"}}


def _retrain(registry: Path, **values: Any) -> int:
    """Retrain the champion on its old data and on labeled feedback, and promote the result if the gate accepts it.

    A server of the registry then loads the new version by itself. The exit code is 3 if the gate refuses the result.
    With --continuous the command runs forever, and starts a retraining round on a trigger: enough new labels, drift, or
    an accuracy below --min-accuracy.

    If too many labels do not fit their samples, nothing is trained: correct the labels listed in the round's
    label_issues.json (POST /feedback, by id), or pass --trust-labels.

    \b
    tuneforge retrain --registry models
    tuneforge retrain --registry models --strategy lwf --strategy.epochs 4 --device cpu
    tuneforge retrain --registry models --continuous --num-labels 200 --drift --min-accuracy 0.9 --min-interval 6h
    """
    config = build_config(click.get_current_context(), values)
    from tuneforge_serve import RequestLog
    from tuneforge_serve.feedback.retraining import select_model
    from tuneforge_serve.feedback.rounds import plot_accuracy, run_rounds

    triggers, model = _build_triggers(values), select_model(registry, values["name"])
    path = values["request_log"] or registry / "requests.db"
    _require_file(path)

    def log(text: str) -> None:
        click.echo(text, err=values["as_json"])

    with RequestLog(path) as request_log:
        run_round = _make_round(model, request_log, config.strategy, values, log)
        if not values["continuous"]:
            retraining_round = run_round()
            _print_round(retraining_round, plot_accuracy(model, request_log), as_json=values["as_json"])
            return ExitCode.OK if retraining_round.new_version is not None else ExitCode.TARGET_MISSED
        rounds = run_rounds(model, request_log, triggers, run_round, poll_interval_s=values["poll_interval_s"], log=log)
        for retraining_round in rounds:
            _print_round(retraining_round, plot_accuracy(model, request_log), as_json=values["as_json"])
    return ExitCode.OK


def _build_triggers(values: Mapping[str, Any]) -> RetrainingTriggers:
    from tuneforge_serve.feedback.rounds import RetrainingTriggers

    return RetrainingTriggers(
        num_labels=values["num_labels"],
        drift=values["drift"],
        min_accuracy=values["min_accuracy"],
        min_new_labels=values["min_new_labels"],
        min_interval_s=_parse_duration(values["min_interval"]),
    )


def _make_round(
    model: ModelRegistry,
    request_log: RequestLog,
    strategy: Any,
    values: Mapping[str, Any],
    log: Callable[[str], None],
) -> Callable[[], RetrainingRound]:
    """Return a function that runs one retraining round with the settings of the flags."""
    from tuneforge_serve import GateRules, retrain

    rules = GateRules(non_inferiority_margin=values["non_inferiority_margin"], min_recall=values["min_recall"])
    return lambda: retrain(
        model.root,
        request_log,
        name=model.name,
        strategy=strategy,
        rules=rules,
        trust_labels=values["trust_labels"],
        max_label_issues=values["max_label_issues"],
        run_settings={} if values["device"] is None else {"device": values["device"]},
        log=log,
    )


def _print_round(retraining_round: RetrainingRound, plot: Path, *, as_json: bool) -> None:
    if as_json:
        content = {
            "round": retraining_round.number,
            "num_labeled": retraining_round.num_labeled,
            "num_held_out": retraining_round.num_held_out,
            "version": retraining_round.new_version,
            "num_label_issues": len(retraining_round.label_issues),
            "decision": retraining_round.decision.to_dict(),
            "plot": str(plot),
        }
        click.echo(json.dumps(content))
        return
    click.echo(retraining_round.decision.format_table())
    seconds = f"{retraining_round.seconds:.0f} s"
    click.echo(f"retraining round {retraining_round.number} took {seconds}; accuracy over time: {plot}")


def _require_file(path: Path) -> None:
    from tuneforge.errors import FolderError

    if not path.is_file():
        raise FolderError(
            f"there is no request log '{path}'",
            where="--request-log",
            fix="pass the file that tuneforge serve --request-log writes",
        )


def _parse_duration(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        from tuneforge.errors import UsageError

        raise UsageError(f"'{text}' is not a duration", where="--min-interval", fix="write it like 90s, 10m, 6h or 1d")
    return float(found[1]) * _SECONDS_PER_UNIT[found[2]]


retrain = json_option("Print one JSON object per retraining round.")(
    RetrainCommand(
        "retrain",
        callback=_retrain,
        help=_retrain.__doc__,
        params=[
            click.Option(
                ["--registry"],
                type=click.Path(path_type=Path),
                default="models",
                show_default=True,
                metavar="DIR",
                help="Directory of the model registry.",
            ),
            click.Option(
                ["--request-log"],
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="The server's request log. [default: requests.db in the registry]",
            ),
            click.Option(["--name"], help="Name of the model, if the registry has several."),
            *component_options("strategy", fallback="replay"),
            click.Option(["--device"], help="Device to train on. [default: the device of the champion's run]"),
            click.Option(
                ["--non-inferiority-margin"],
                type=FiniteFloatRange(0, 1),
                default=0.02,
                show_default=True,
                help="Rule of the gate: see tuneforge promote.",
            ),
            click.Option(
                ["--min-recall"],
                type=FiniteFloatRange(0, 1),
                default=0.5,
                show_default=True,
                help="Rule of the gate: see tuneforge promote.",
            ),
            click.Option(
                ["--max-label-issues"],
                type=FiniteFloatRange(0, 1),
                default=0.1,
                show_default=True,
                help="Largest accepted fraction of label issues; with more, nothing is trained.",
            ),
            click.Option(["--trust-labels"], is_flag=True, help="Do not look for label issues."),
            click.Option(["--continuous"], is_flag=True, help="Run forever: a retraining round on each trigger."),
            click.Option(
                ["--num-labels"],
                type=click.IntRange(1),
                default=100,
                show_default=True,
                help="Trigger: the number of new labels.",
            ),
            click.Option(["--drift"], is_flag=True, help="Trigger: drift of the confidence or the inputs."),
            click.Option(
                ["--min-accuracy"],
                type=FiniteFloatRange(0, 1),
                help="Trigger: the 95 % interval of the accuracy on labeled requests lies below this.",
            ),
            click.Option(
                ["--min-new-labels"],
                type=click.IntRange(1),
                default=20,
                show_default=True,
                help="Number of new labels that every trigger requires.",
            ),
            click.Option(["--min-interval"], default="10m", show_default=True, help="Minimum time between two rounds."),
            click.Option(
                ["--poll-interval-s"],
                type=FiniteFloatRange(0.01),
                default=10.0,
                show_default=True,
                help="Seconds between two checks of the triggers.",
            ),
        ],
    )
)
