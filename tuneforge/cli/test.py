"""`tuneforge test`: the test split sent to a server, and whether it answers as the offline report says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.cli.options import ComponentCommand, configuration, pick_options
from tuneforge.cli.parameter_types import Within

if TYPE_CHECKING:
    from tuneforge.ship.wire.wire import Measured

MISSED = 3
"""The exit code where a floor was missed."""

_SHOWN = 12


def _test(url: str, **values: Any) -> int:
    """Send the test split to a server and print the figures that its answers have, latencies and throughput.

    With --run, the data are those of that run, and each figure is compared with its report. Exits 3 where a --floor is
    missed.
    """
    ctx = click.get_current_context()
    config = configuration(ctx, values)
    floors = dict(_floor(text) for text in values["floors"])
    from tuneforge.engine.storage.run_dir import REPORT, finite, read_json
    from tuneforge.errors import UsageError
    from tuneforge.ship.wire import client, wire

    given = bool(values["data"] or any(each.key == "data" for each in ctx.meta["tuneforge.chosen"]))
    if not given and values["run"] is None:
        raise UsageError("there is nothing to send", where="--run", fix="name a finished run, or data with --data NAME")
    run = wire.looking(values["run"], data=config.data if given else None, metrics=config.evaluate)
    splits = values["splits"] or ("test",)
    wire.require_figures(run, splits[0], floors)
    offline = read_json(values["run"] / REPORT)["splits"] if values["run"] is not None and not given else None
    server = client.Server(url, token=values["token"], timeout_s=values["timeout_s"])
    measured = wire.measure(
        server,
        run,
        splits=splits,
        offline=offline,
        name=values["name"],
        via=values["via"],
        concurrency=values["concurrency"],
        rows=values["rows"],
    )
    misses = list(wire.missed(measured, floors, run.data.targets))
    if values["as_json"]:
        click.echo(json.dumps(finite(_plain(measured, misses))))
    else:
        for line in _lines(measured, run.data.targets.headline, misses, floors):
            click.echo(line)
    return MISSED if misses else 0


def _floor(text: str) -> tuple[str, float]:
    from tuneforge.errors import UsageError

    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise UsageError(f"'{text}' is no floor", where="--floor", fix="write it like accuracy=0.95") from None


def _plain(measured: Measured, misses: list[str]) -> dict[str, Any]:
    differ = {
        split: {each.name: [each.wire, each.offline] for each in compared if not each.equal}
        for split, compared in measured.compared.items()
        if compared
    }
    return {
        "splits": measured.figures,
        "latency_ms": {f"p{percent}": measured.latency_ms(percent) for percent in (50, 95, 99)},
        "samples_per_second": measured.per_second,
        "samples": measured.samples,
        "requests": measured.requests,
        "retried": measured.retried,
        "via": measured.via,
        "versions": list(measured.versions),
        "differ_from_offline": differ if any(measured.compared.values()) else None,
        "missed": misses,
    }


def _lines(
    measured: Measured, headline: tuple[str, ...], misses: list[str], floors: Mapping[str, float]
) -> Iterator[str]:
    from tuneforge.engine.session import messages as story

    yield from story.of_result(measured.figures, headline)
    latencies = "  ".join(f"p{percent} {measured.latency_ms(percent):.2f} ms" for percent in (50, 95, 99))
    yield f"latency  {latencies}  throughput {measured.per_second:.1f} samples/s"
    busy = f", {measured.retried} sent again because the server was busy" if measured.retried else ""
    where = "POST /predict, as files" if measured.via == "predict" else "v2 infer, as stored tensors"
    yield f"sent     {measured.samples} samples in {measured.requests} requests by {where}{busy}"
    yield f"answered by version {', '.join(each or 'unnamed' for each in measured.versions)}"
    for split, compared in measured.compared.items():
        differ = [each for each in compared if not each.equal]
        equal = f"{len(compared) - len(differ)} of {len(compared)} figures of '{split}' equal the offline report"
        if compared:
            yield f"{equal}{':' if differ else ''}"
        for each in differ[:_SHOWN]:
            yield f"  {each.name}: {each.wire} over the wire, {each.offline} offline"
        if len(differ) > _SHOWN:
            yield f"  ... and {len(differ) - _SHOWN} more"
    yield from (f"missed: {each}" for each in misses)
    if floors and not misses:
        yield "every floor is kept"


test = ComponentCommand(
    "test",
    callback=_test,
    help=_test.__doc__,
    params=[
        click.Argument(["url"], metavar="URL"),
        click.Option(["--run"], type=click.Path(path_type=Path), metavar="RUN", help="Send the data of this run."),
        *pick_options("data", "evaluate", instead="the run's own"),
        click.Option(["--split", "splits"], multiple=True, help="A split to send. [default: test] Repeatable."),
        click.Option(
            ["--floor", "floors"],
            multiple=True,
            metavar="FIGURE=VALUE",
            help="Exit 3 where a figure of the first split is worse than this. Repeatable.",
        ),
        click.Option(
            ["--concurrency"],
            type=click.IntRange(1, 1024),
            default=1,
            show_default=True,
            help="Requests under way at a time.",
        ),
        click.Option(
            ["--rows"], type=click.IntRange(1), default=1, show_default=True, help="Samples of one v2 request."
        ),
        click.Option(
            ["--via"],
            type=click.Choice(["auto", "predict", "v2"]),
            default="auto",
            show_default=True,
            help="Files to /predict, or stored tensors by the Open Inference Protocol; auto: files where there are.",
        ),
        click.Option(["--name"], help="Of the model, where the server has several."),
        click.Option(
            ["--token"], envvar="TUNEFORGE_TOKEN", help="Where the server asks for one. [env TUNEFORGE_TOKEN]"
        ),
        click.Option(["--timeout-s"], type=Within(0.1), default=30.0, show_default=True, help="Longest wait."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
    ],
)
