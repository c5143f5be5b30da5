"""`tuneforge retrain`: tune the champion on what production taught, once or whenever there is a reason to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.plugin.command_options import ComponentCommand, build_config, component_options
from tuneforge.plugin.parameter_types import FiniteFloatRange

if TYPE_CHECKING:
    from tuneforge_serve.feedback.request_log import RequestLog
    from tuneforge_serve.feedback.retraining import RetrainingRound
    from tuneforge_serve.feedback.rounds import RetrainingTriggers
    from tuneforge_serve.registry.model_registry import ModelRegistry

REFUSED = 3
"""The exit code where the gate refused."""

_SECONDS_PER_UNIT = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class _RetrainCommand(ComponentCommand):
    """A command whose strategy is `replay` where nothing else is named."""

    def load_base_config(self, ctx: click.Context, args: list[str]) -> dict[str, Any]:
        """The table that flags go over."""
        return {"strategy": {"name": "replay"}}


def _retrain(store: Path, **values: Any) -> int:
    """Tune the champion on its old data and on labelled feedback, and promote the result if the gate lets it pass.

    A server of the store swaps by itself. Exits 3 where the gate refused. With --watch it goes on for ever, and a turn
    begins where there is a reason to: enough new labels, drift, or an accuracy under a floor.

    Where many labels do not fit their samples, nothing is trained: correct those in the turn's label_issues.json
    (POST /feedback, by id), or say --trust.

    \b
    tuneforge retrain --store models
    tuneforge retrain --store models --strategy lwf --strategy.epochs 4 --device cpu
    tuneforge retrain --store models --watch --labels 200 --drift --accuracy 0.9 --hold-off 6h
    """
    config = build_config(click.get_current_context(), values)
    from tuneforge_serve.feedback.request_log import RequestLog
    from tuneforge_serve.feedback.retraining import select_model
    from tuneforge_serve.feedback.rounds import plot_accuracy, run_rounds

    triggers, registry, path = (
        _build_triggers(values),
        select_model(store, values["name"]),
        values["records"] or store / "requests.db",
    )
    _require_file(path)

    def log(text: str) -> None:
        click.echo(text, err=values["as_json"])

    with RequestLog(path) as request_log:
        run_round = _make_round(registry, request_log, config.strategy, values, log)
        if not values["watch"]:
            retraining_round = run_round()
            _print(retraining_round, plot_accuracy(registry, request_log), as_json=values["as_json"])
            return 0 if retraining_round.new_version is not None else REFUSED
        for retraining_round in run_rounds(
            registry, request_log, triggers, run_round, interval_s=values["every_s"], log=log
        ):
            _print(retraining_round, plot_accuracy(registry, request_log), as_json=values["as_json"])
    return 0


def _build_triggers(values: Mapping[str, Any]) -> RetrainingTriggers:
    from tuneforge_serve.feedback.rounds import RetrainingTriggers

    return RetrainingTriggers(
        num_labels=values["labels"],
        drift=values["drift"],
        min_accuracy=values["accuracy"],
        min_new_labels=values["fewest"],
        min_interval_s=_parse_duration(values["hold_off"]),
    )


def _make_round(
    registry: ModelRegistry,
    request_log: RequestLog,
    strategy: Any,
    values: Mapping[str, Any],
    log: Callable[[str], None],
) -> Callable[[], RetrainingRound]:
    """What does one turn as the flags say."""
    from tuneforge_serve.feedback.retraining import retrain
    from tuneforge_serve.registry.gate import GateRules

    return lambda: retrain(
        registry.root,
        request_log,
        name=registry.name,
        strategy=strategy,
        rules=GateRules(non_inferiority_margin=values["margin"], min_recall=values["floor"]),
        trust_labels=values["trust"],
        max_label_issues=values["most_misfits"],
        run_settings={} if values["device"] is None else {"device": values["device"]},
        log=log,
    )


def _print(retraining_round: RetrainingRound, plot: Path, *, as_json: bool) -> None:
    if as_json:
        decision = retraining_round.decision.to_dict()
        about = {
            "round": retraining_round.number,
            "num_labeled": retraining_round.num_labeled,
            "held_out": retraining_round.num_held_out,
            "version": retraining_round.new_version,
        }
        click.echo(
            json.dumps(
                {
                    **about,
                    "num_label_issues": len(retraining_round.label_issues),
                    "decision": decision,
                    "plot": str(plot),
                }
            )
        )
        return
    click.echo(retraining_round.decision.format_table())
    click.echo(f"turn {retraining_round.number} took {retraining_round.seconds:.0f} s; accuracy over time: {plot}")


def _require_file(path: Path) -> None:
    from tuneforge.errors import FolderError

    if not path.is_file():
        raise FolderError(
            f"there are no records in '{path}'",
            where="--records",
            fix="name the file that tuneforge serve keeps them in",
        )


def _parse_duration(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        from tuneforge.errors import UsageError

        raise UsageError(f"'{text}' is no time", where="--hold-off", fix="write it like 90s, 10m, 6h or 1d")
    return float(found[1]) * _SECONDS_PER_UNIT[found[2]]


retrain = _RetrainCommand(
    "retrain",
    callback=_retrain,
    help=_retrain.__doc__,
    params=[
        click.Option(
            ["--store"], type=click.Path(path_type=Path), default="models", show_default=True, help="The store."
        ),
        click.Option(
            ["--records"],
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="What the server keeps (tuneforge serve --records). [default: requests.db in the store]",
        ),
        click.Option(["--name"], help="Of the model, where the store has several."),
        *component_options("strategy", fallback="replay"),
        click.Option(["--device"], help="Where to compute. [default: as the champion was tuned]"),
        click.Option(
            ["--margin"], type=FiniteFloatRange(0, 1), default=0.02, show_default=True, help="Of the gate: see promote."
        ),
        click.Option(
            ["--floor"], type=FiniteFloatRange(0, 1), default=0.5, show_default=True, help="Of the gate: see promote."
        ),
        click.Option(
            ["--most-misfits"],
            type=FiniteFloatRange(0, 1),
            default=0.1,
            show_default=True,
            help="Share of labels that may not fit their samples; with more, nothing is trained.",
        ),
        click.Option(["--trust"], is_flag=True, help="Tune on labels too that do not fit their samples."),
        click.Option(["--watch"], is_flag=True, help="Go on for ever: a turn whenever there is a reason to."),
        click.Option(
            ["--labels"], type=click.IntRange(1), default=100, show_default=True, help="New labels that are a reason."
        ),
        click.Option(["--drift"], is_flag=True, help="Drift of confidence or inputs is a reason."),
        click.Option(
            ["--accuracy"],
            type=FiniteFloatRange(0, 1),
            help="A reason: the 95 % interval of the accuracy on labelled answers lies under this.",
        ),
        click.Option(
            ["--fewest"],
            type=click.IntRange(1),
            default=20,
            show_default=True,
            help="New labels without which nothing is a reason.",
        ),
        click.Option(["--hold-off"], default="10m", show_default=True, help="Least time between two turns."),
        click.Option(
            ["--every-s"],
            type=FiniteFloatRange(0.01),
            default=10.0,
            show_default=True,
            help="Seconds between two looks.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object a turn."),
    ],
)
