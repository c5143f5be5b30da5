"""`tuneforge retune`: tune the champion on what production taught, once or whenever there is a reason to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.cli.options import ComponentCommand, configuration, pick_options
from tuneforge.cli.parameter_types import Within

if TYPE_CHECKING:
    from tuneforge.ship.champion.store import Store
    from tuneforge.ship.circle.records import Records
    from tuneforge.ship.circle.retune import Turn
    from tuneforge.ship.circle.turns import Triggers

REFUSED = 3
"""The exit code where the gate refused."""

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class _Command(ComponentCommand):
    """A command whose strategy is `replay` where nothing else is named."""

    def below_flags(self, ctx: click.Context, args: list[str]) -> dict[str, Any]:
        """The table that flags go over."""
        return {"strategy": {"name": "replay"}}


def _retune(store: Path, **values: Any) -> int:
    """Tune the champion on its old data and on labelled feedback, and promote the result if the gate lets it pass.

    A server of the store swaps by itself. Exits 3 where the gate refused. With --watch it goes on for ever, and a turn
    begins where there is a reason to: enough new labels, drift, or an accuracy under a floor.

    Where many labels do not fit their samples, nothing is trained: correct those in the turn's suspects.json
    (POST /feedback, by id), or say --trust.

    \b
    tuneforge retune --store models
    tuneforge retune --store models --strategy lwf --strategy.epochs 4 --device cpu
    tuneforge retune --store models --watch --labels 200 --drift --accuracy 0.9 --hold-off 6h
    """
    config = configuration(click.get_current_context(), values)
    from tuneforge.ship.circle.records import Records
    from tuneforge.ship.circle.retune import named
    from tuneforge.ship.circle.turns import picture, turns

    triggers, place, kept = _triggers(values), named(store, values["name"]), values["records"] or store / "records.db"
    _require_file(kept)

    def say(text: str) -> None:
        click.echo(text, err=values["as_json"])

    with Records(kept) as records:
        turn = _turn(place, records, config.strategy, values, say)
        if not values["watch"]:
            ended = turn()
            _print(ended, picture(place, records), as_json=values["as_json"])
            return 0 if ended.version is not None else REFUSED
        for ended in turns(place, records, triggers, turn, every_s=values["every_s"], say=say):
            _print(ended, picture(place, records), as_json=values["as_json"])
    return 0


def _triggers(values: Mapping[str, Any]) -> Triggers:
    from tuneforge.ship.circle.turns import Triggers

    return Triggers(
        labels=values["labels"],
        drift=values["drift"],
        accuracy=values["accuracy"],
        fewest=values["fewest"],
        hold_off_s=_seconds(values["hold_off"]),
    )


def _turn(
    place: Store, records: Records, strategy: Any, values: Mapping[str, Any], say: Callable[[str], None]
) -> Callable[[], Turn]:
    """What does one turn as the flags say."""
    from tuneforge.ship.champion.gate import Rules
    from tuneforge.ship.circle.retune import retune

    return lambda: retune(
        place.root,
        records,
        name=place.name,
        strategy=strategy,
        rules=Rules(margin=values["margin"], floor=values["floor"]),
        trust=values["trust"],
        most_misfits=values["most_misfits"],
        settings={} if values["device"] is None else {"device": values["device"]},
        say=say,
    )


def _print(turn: Turn, picture: Path, *, as_json: bool) -> None:
    if as_json:
        verdict = turn.verdict.plain()
        about = {"turn": turn.number, "labelled": turn.labelled, "held_out": turn.held_out, "version": turn.version}
        click.echo(json.dumps({**about, "suspects": len(turn.suspects), "verdict": verdict, "picture": str(picture)}))
        return
    click.echo(turn.verdict.table())
    click.echo(f"turn {turn.number} took {turn.seconds:.0f} s; accuracy over time: {picture}")


def _require_file(path: Path) -> None:
    from tuneforge.errors import FolderError

    if not path.is_file():
        raise FolderError(
            f"there are no records in '{path}'",
            where="--records",
            fix="name the file that tuneforge serve keeps them in",
        )


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        from tuneforge.errors import UsageError

        raise UsageError(f"'{text}' is no time", where="--hold-off", fix="write it like 90s, 10m, 6h or 1d")
    return float(found[1]) * _SECONDS[found[2]]


retune = _Command(
    "retune",
    callback=_retune,
    help=_retune.__doc__,
    params=[
        click.Option(
            ["--store"], type=click.Path(path_type=Path), default="models", show_default=True, help="The store."
        ),
        click.Option(
            ["--records"],
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="What the server keeps (tuneforge serve --records). [default: records.db in the store]",
        ),
        click.Option(["--name"], help="Of the model, where the store has several."),
        *pick_options("strategy", instead="replay"),
        click.Option(["--device"], help="Where to compute. [default: as the champion was tuned]"),
        click.Option(
            ["--margin"], type=Within(0, 1), default=0.02, show_default=True, help="Of the gate: see promote."
        ),
        click.Option(["--floor"], type=Within(0, 1), default=0.5, show_default=True, help="Of the gate: see promote."),
        click.Option(
            ["--most-misfits"],
            type=Within(0, 1),
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
            type=Within(0, 1),
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
            type=Within(0.01),
            default=10.0,
            show_default=True,
            help="Seconds between two looks.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object a turn."),
    ],
)
