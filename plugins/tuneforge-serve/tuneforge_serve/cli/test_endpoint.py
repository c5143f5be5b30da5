"""`tuneforge test-endpoint`: the test split sent to a server, and whether it answers as the offline report says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.plugin.command_options import ComponentCommand, build_config, component_options
from tuneforge.plugin.parameter_types import FiniteFloatRange

if TYPE_CHECKING:
    from tuneforge_serve.endpoint_test.measure import EndpointTestResult

BELOW_MINIMUM = 3
"""The exit code where a floor was missed."""

_MAX_SHOWN = 12


def _test_endpoint(url: str, **values: Any) -> int:
    """Send the test split to a server and print the figures that its answers have, latencies and throughput.

    With --run, the data are those of that run, and each figure is compared with its report. Exits 3 where a --floor is
    missed.
    """
    ctx = click.get_current_context()
    config = build_config(ctx, values)
    minimums = dict(_parse_minimum(text) for text in values["floors"])
    from tuneforge.engine.storage.run_dir import REPORT, nonfinite_to_none, read_json
    from tuneforge.errors import UsageError
    from tuneforge_serve.endpoint_test import http_client as client
    from tuneforge_serve.endpoint_test import measure as wire

    has_data = bool(values["data"] or any(each.key == "data" for each in ctx.meta["tuneforge.chosen"]))
    if not has_data and values["run"] is None:
        raise UsageError("there is nothing to send", where="--run", fix="name a finished run, or data with --data NAME")
    run = wire.prepare_run(values["run"], data=config.data if has_data else None, metrics=config.metrics)
    splits = values["splits"] or ("test",)
    wire.require_metrics(run, splits[0], minimums)
    offline = read_json(values["run"] / REPORT)["splits"] if values["run"] is not None and not has_data else None
    server = client.ServerClient(url, token=values["token"], timeout_s=values["timeout_s"])
    result = wire.measure_endpoint(
        server,
        run,
        splits=splits,
        offline=offline,
        name=values["name"],
        via=values["via"],
        concurrency=values["concurrency"],
        batch_size=values["rows"],
    )
    failures = list(wire.describe_failures(result, minimums, run.data.targets))
    if values["as_json"]:
        click.echo(json.dumps(nonfinite_to_none(_to_dict(result, failures))))
    else:
        for line in _format_lines(result, run.data.targets.primary_metrics, failures, minimums):
            click.echo(line)
    return BELOW_MINIMUM if failures else 0


def _parse_minimum(text: str) -> tuple[str, float]:
    from tuneforge.errors import UsageError

    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise UsageError(f"'{text}' is no floor", where="--floor", fix="write it like accuracy=0.95") from None


def _to_dict(result: EndpointTestResult, failures: list[str]) -> dict[str, Any]:
    mismatches = {
        split: {each.name: [each.online, each.offline] for each in compared if not each.equal}
        for split, compared in result.comparisons.items()
        if compared
    }
    return {
        "splits": result.metrics,
        "latency_ms": {f"p{percent}": result.latency_ms(percent) for percent in (50, 95, 99)},
        "samples_per_second": result.samples_per_second,
        "samples": result.num_samples,
        "requests": result.num_requests,
        "num_retries": result.num_retries,
        "via": result.via,
        "versions": list(result.versions),
        "offline_mismatches": mismatches if any(result.comparisons.values()) else None,
        "failures": failures,
    }


def _format_lines(
    result: EndpointTestResult, primary_metrics: tuple[str, ...], failures: list[str], minimums: Mapping[str, float]
) -> Iterator[str]:
    from tuneforge.engine.session import messages as story

    yield from story.format_metrics(result.metrics, primary_metrics)
    latencies = "  ".join(f"p{percent} {result.latency_ms(percent):.2f} ms" for percent in (50, 95, 99))
    yield f"latency  {latencies}  throughput {result.samples_per_second:.1f} samples/s"
    busy = f", {result.num_retries} sent again because the server was busy" if result.num_retries else ""
    where = "POST /predict, as files" if result.via == "predict" else "v2 infer, as stored tensors"
    yield f"sent     {result.num_samples} samples in {result.num_requests} requests by {where}{busy}"
    yield f"answered by version {', '.join(each or 'unnamed' for each in result.versions)}"
    for split, compared in result.comparisons.items():
        mismatches = [each for each in compared if not each.equal]
        equal = f"{len(compared) - len(mismatches)} of {len(compared)} figures of '{split}' equal the offline report"
        if compared:
            yield f"{equal}{':' if mismatches else ''}"
        for each in mismatches[:_MAX_SHOWN]:
            yield f"  {each.name}: {each.online} over the wire, {each.offline} offline"
        if len(mismatches) > _MAX_SHOWN:
            yield f"  ... and {len(mismatches) - _MAX_SHOWN} more"
    yield from (f"missed: {each}" for each in failures)
    if minimums and not failures:
        yield "every floor is kept"


test_endpoint = ComponentCommand(
    "test-endpoint",
    callback=_test_endpoint,
    help=_test_endpoint.__doc__,
    params=[
        click.Argument(["url"], metavar="URL"),
        click.Option(["--run"], type=click.Path(path_type=Path), metavar="RUN", help="Send the data of this run."),
        *component_options("data", "metrics", fallback="the run's own"),
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
        click.Option(
            ["--timeout-s"], type=FiniteFloatRange(0.1), default=30.0, show_default=True, help="Longest wait."
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
    ],
)
