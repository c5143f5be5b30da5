"""`tuneforge test-endpoint`: send a split to a server, and compare the metrics with the offline report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneforge.plugin import (
    ComponentCommand,
    ExitCode,
    FiniteFloatRange,
    build_config,
    component_options,
    flags_to_table,
    json_option,
)

if TYPE_CHECKING:
    from tuneforge_serve.endpoint_test.measure import EndpointTestResult

_MAX_SHOWN = 12


def _test_endpoint(url: str, **values: Any) -> int:
    """Send the test split to a server and print the metrics, the latencies and the throughput.

    With --run, the data of that run are sent, and each metric is compared with the run's report. The exit code is 3 if
    a metric is below its --min-metric.
    """
    ctx = click.get_current_context()
    config = build_config(ctx, values)
    minimums = dict(_parse_minimum(text) for text in values["min_metrics"])
    from tuneforge.errors import UsageError
    from tuneforge.exporting import nonfinite_to_none, read_json
    from tuneforge_serve.endpoint_test import measure
    from tuneforge_serve.endpoint_test.http_client import ServerClient

    has_data = "data" in flags_to_table(ctx, values)
    if not has_data and values["run"] is None:
        raise UsageError("there is no data to send", where="--run", fix="name a finished run, or data with --data NAME")
    data = measure.prepare_endpoint_data(values["run"], data=config.data if has_data else None, metrics=config.metrics)
    splits = values["splits"] or ("test",)
    measure.require_metrics(data, splits[0], minimums)
    offline = None if has_data else read_json(values["run"] / "report.json")["splits"]
    with ServerClient(url, token=values["token"], timeout_s=values["timeout_s"]) as server:
        result = measure.measure_endpoint(
            server,
            data,
            splits=splits,
            offline=offline,
            name=values["name"],
            route=values["route"],
            concurrency=values["concurrency"],
            batch_size=values["batch_size"],
        )
    targets = data.data.targets
    failures = list(measure.describe_failures(result, minimums, targets))
    if values["as_json"]:
        click.echo(json.dumps(nonfinite_to_none(_to_dict(result, failures))))
    else:
        for line in _format_lines(result, targets.primary_metrics, failures, minimums):
            click.echo(line)
    return ExitCode.TARGET_MISSED if failures else ExitCode.OK


def _parse_minimum(text: str) -> tuple[str, float]:
    from tuneforge.errors import UsageError

    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise UsageError(
            f"'{text}' is not a minimum of a metric", where="--min-metric", fix="write it like accuracy=0.95"
        ) from None


def _to_dict(result: EndpointTestResult, failures: list[str]) -> dict[str, Any]:
    mismatches = {
        split: {each.name: [each.online, each.offline] for each in comparisons if not each.equal}
        for split, comparisons in result.comparisons.items()
        if comparisons
    }
    return {
        "metrics": result.metrics,
        "latency_ms": {f"p{percent}": result.latency_ms(percent) for percent in (50, 95, 99)},
        "samples_per_second": result.samples_per_second,
        "num_samples": result.num_samples,
        "num_requests": result.num_requests,
        "num_retries": result.num_retries,
        "route": result.route,
        "versions": list(result.versions),
        "offline_mismatches": mismatches if any(result.comparisons.values()) else None,
        "failures": failures,
    }


def _format_lines(
    result: EndpointTestResult, primary_metrics: tuple[str, ...], failures: list[str], minimums: Mapping[str, float]
) -> Iterator[str]:
    from tuneforge.comparison import format_metrics

    yield from format_metrics(result.metrics, primary_metrics)
    latencies = "  ".join(f"p{percent} {result.latency_ms(percent):.2f} ms" for percent in (50, 95, 99))
    yield f"latency  {latencies}  throughput {result.samples_per_second:.1f} samples/s"
    retries = f", {result.num_retries} retries because the server was busy" if result.num_retries else ""
    route = "files to /predict" if result.route == "predict" else "stored tensors to the v2 protocol"
    yield f"sent {result.num_samples} samples in {result.num_requests} requests as {route}{retries}"
    yield f"model version {', '.join(each or 'unknown' for each in result.versions)}"
    for split, comparisons in result.comparisons.items():
        mismatches = [each for each in comparisons if not each.equal]
        equal = (
            f"{len(comparisons) - len(mismatches)} of {len(comparisons)} metrics of '{split}' equal the offline report"
        )
        if comparisons:
            yield f"{equal}{':' if mismatches else ''}"
        for each in mismatches[:_MAX_SHOWN]:
            yield f"  {each.name}: {each.online} on the server, {each.offline} offline"
        if len(mismatches) > _MAX_SHOWN:
            yield f"  and {len(mismatches) - _MAX_SHOWN} more"
    yield from (f"below minimum: {each}" for each in failures)
    if minimums and not failures:
        yield "every metric reaches its minimum"


test_endpoint = json_option("Print one JSON object.")(
    ComponentCommand(
        "test-endpoint",
        callback=_test_endpoint,
        help=_test_endpoint.__doc__,
        params=[
            click.Argument(["url"], metavar="URL"),
            click.Option(["--run"], type=click.Path(path_type=Path), metavar="RUN", help="Send the data of this run."),
            *component_options("data", "metrics", fallback="the run's own"),
            click.Option(["--split", "splits"], multiple=True, help="A split to send; repeatable. [default: test]"),
            click.Option(
                ["--min-metric", "min_metrics"],
                multiple=True,
                metavar="METRIC=VALUE",
                help="Exit with code 3 if a metric of the first split is worse than this; repeatable.",
            ),
            click.Option(
                ["--concurrency"],
                type=click.IntRange(1, 1024),
                default=1,
                show_default=True,
                help="Number of concurrent requests.",
            ),
            click.Option(
                ["--batch-size"], type=click.IntRange(1), default=1, show_default=True, help="Samples of a v2 request."
            ),
            click.Option(
                ["--route"],
                type=click.Choice(["auto", "predict", "v2"]),
                default="auto",
                show_default=True,
                help="predict sends files to /predict, v2 sends stored tensors by the Open Inference Protocol; "
                "auto sends files if the samples are files.",
            ),
            click.Option(["--name"], help="Name of the model, if the server has several."),
            click.Option(["--token"], envvar="TUNEFORGE_TOKEN", help="Token of the server. [env TUNEFORGE_TOKEN]"),
            click.Option(
                ["--timeout-s"],
                type=FiniteFloatRange(0.1),
                default=30.0,
                show_default=True,
                help="Longest time to wait for a response, in seconds.",
            ),
        ],
    )
)
