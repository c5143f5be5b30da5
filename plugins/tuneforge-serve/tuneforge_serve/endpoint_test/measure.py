"""Send splits to a server, and compute the metrics, the latencies and the throughput of its predictions.

Samples that are files go to `POST /predict` unchanged, so that the server's decoding is tested too. Other samples go to
`POST /v2/models/NAME/infer` as stored tensors, which both the server and the offline evaluation pass to
`Inputs.preprocess`. The predictions have to equal the offline ones either way.

Shapes: n samples, k outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import attrs
import torch

from tuneforge import Data, Split, Targets, load
from tuneforge.comparison import resolve_monitor, scalar_metrics
from tuneforge.errors import UnknownNameError, UsageError, suggest_name
from tuneforge.exporting import compute_metrics, prepare_data
from tuneforge.plugin import ComponentSpec, find_component, get_options, load_component
from tuneforge_serve.endpoint_test.http_client import ServerClient
from tuneforge_serve.endpoint_test.senders import (
    EndpointRequest,
    EndpointResponse,
    Send,
    fetch_model_metadata,
    make_file_sender,
    make_v2_sender,
)

EndpointRoute = Literal["auto", "predict", "v2"]

ROUNDING = 1e-6
"""Two values of a metric that differ by less, relative to 1 or to their size, count as equal."""

_NUM_PROBE_SAMPLES = 16  # enough to see the names of the metrics


@attrs.frozen
class MetricComparison:
    """The value of a metric on the server and offline.

    Args:
        name: A dotted name, such as `per_class.3.recall`.
        online: The value for the server's predictions.
        offline: The value in the offline report.
    """

    name: str
    online: Any
    offline: Any

    @property
    def equal(self) -> bool:
        """True if the two values differ by rounding at most."""
        if isinstance(self.online, float) and isinstance(self.offline, (int, float)):
            return math.isclose(self.online, self.offline, rel_tol=ROUNDING, abs_tol=ROUNDING)
        return bool(self.online == self.offline)


@attrs.frozen(eq=False)
class EndpointData:
    """The data and the metrics of an endpoint test.

    Args:
        data: The splits.
        metrics: The metrics to compute; empty for those of the data's targets.
    """

    data: Data
    metrics: tuple[ComponentSpec, ...] = ()

    def get_split(self, name: str) -> Split:
        """Return a split by name.

        Raises:
            UnknownNameError: There is no such split.
        """
        known = self.data.splits()
        if name not in known:
            raise UnknownNameError(f"there is no split '{name}'", where="--split", fix=suggest_name(name, known))
        return known[name]

    def with_labels(self, labels: Sequence[str]) -> EndpointData:
        """Append the classes that only the server knows to the data's own.

        A prediction of such a class is wrong, and the metrics name the class.
        """
        known = self.data.targets.labels
        if not set(labels) > set(known) or self.data.test.targets.ndim != 1:
            return self
        extra = [name for name in labels if name not in known]
        targets: Any = attrs.evolve(self.data.targets, names=(*known, *extra))  # type: ignore[misc]  # an attrs class
        return attrs.evolve(self, data=attrs.evolve(self.data, targets=targets))

    def compute_metrics(self, split: str, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Compute the metrics of outputs (n, k) with the targets (n, ...) of the same samples."""
        return compute_metrics(self.data, split, outputs, labels, metrics=self.metrics)


@attrs.frozen
class EndpointTestResult:
    """The result of an endpoint test.

    Args:
        metrics: The metrics of each split, as `evaluate` returns them.
        route: `predict` or `v2`.
        versions: The versions of the model that responded, in order of appearance.
        num_samples: The number of samples.
        num_requests: The number of requests.
        num_retries: How many requests were repeated because the server was busy.
        seconds: Wall time of all requests.
        latencies_s: The latency of each request in seconds, sorted.
        comparisons: The metrics of each split beside the offline ones; empty without an offline report.
    """

    metrics: dict[str, dict[str, Any]]
    route: str
    versions: tuple[str, ...]
    num_samples: int
    num_requests: int
    num_retries: int
    seconds: float
    latencies_s: tuple[float, ...]
    comparisons: dict[str, list[MetricComparison]]

    def latency_ms(self, percent: float) -> float:
        """Return a percentile of the latencies in milliseconds, by the nearest rank."""
        return 1000 * self.latencies_s[max(0, math.ceil(percent / 100 * len(self.latencies_s)) - 1)]

    @property
    def samples_per_second(self) -> float:
        """The throughput."""
        return self.num_samples / self.seconds


def measure_endpoint(
    server: ServerClient,
    data: EndpointData,
    *,
    splits: Sequence[str] = ("test",),
    offline: Mapping[str, Mapping[str, Any]] | None = None,
    name: str | None = None,
    route: EndpointRoute = "auto",
    concurrency: int = 1,
    batch_size: int = 1,
) -> EndpointTestResult:
    """Send whole splits to a server and compute the metrics of its predictions.

    Args:
        server: The server.
        data: The samples and the metrics.
        splits: Names of the splits to send.
        offline: The metrics of the same splits in the offline report, to compare with.
        name: The name of the model; by default the first one that the server lists.
        route: `predict` sends files, `v2` sends stored tensors, and `auto` sends files if all samples are files.
        concurrency: The number of concurrent requests.
        batch_size: The number of samples of one v2 request.

    Raises:
        UnknownNameError: There is no such split.
        DataError: The server refuses a sample, or its classes are not those of the data.
        TryAgainError: The server cannot be reached.
    """
    files = {split: data.get_split(split).file_paths() for split in splits}
    route = _choose_route(route, all_files=None not in files.values())
    model = fetch_model_metadata(server, name)
    data = data.with_labels(model.labels)
    targets = data.data.targets
    if route == "v2":
        send = make_v2_sender(server, targets, model)
    else:
        send = make_file_sender(server, targets, {split: paths or () for split, paths in files.items()})
    batch_size = batch_size if route == "v2" else 1
    chosen = {split: data.get_split(split) for split in splits}
    requests = [
        (split, each, rows)
        for split, each in chosen.items()
        for rows in torch.split(torch.arange(len(each)), batch_size)
    ]
    start = time.perf_counter()
    responses = _send_concurrently(send, requests, concurrency)
    seconds = time.perf_counter() - start
    metrics = {
        split: data.compute_metrics(
            split, torch.cat([each.outputs for each in responses if each.split == split]), chosen[split].targets
        )
        for split in splits
    }
    return EndpointTestResult(
        metrics=metrics,
        route=route,
        versions=tuple(dict.fromkeys(each.version for each in responses)),
        num_samples=sum(map(len, chosen.values())),
        num_requests=len(responses),
        num_retries=server.num_retries,
        seconds=seconds,
        latencies_s=tuple(sorted(each.latency_s for each in responses)),
        comparisons={split: compare_metrics(metrics[split], (offline or {}).get(split)) for split in splits},
    )


def prepare_endpoint_data(
    run_dir: Path | None, *, data: ComponentSpec | None = None, metrics: Sequence[ComponentSpec] = (), model: Any = None
) -> EndpointData:
    """Prepare the data and the metrics of a finished run, or other ones.

    Args:
        run_dir: The directory of the finished run, or None.
        data: The data source; required without a finished run.
        metrics: By default the metrics of the finished run, or those that fit the data.
        model: The module, if the run was given one as a Python object.
    """
    if run_dir is None:
        assert data is not None
        return EndpointData(prepare_data(_without_cache(data)), tuple(metrics))
    predictor = load(run_dir, model=model)
    config = predictor.run.config
    prepared = predictor.with_data(_without_cache(data or config.data)).data
    return EndpointData(prepared, tuple(metrics) or tuple(config.metrics))


def require_metrics(data: EndpointData, split: str, names: Collection[str]) -> None:
    """Check that the metrics have these names, on the first samples of a split.

    Raises:
        UnknownNameError: There is no such metric, or no such split.
    """
    if not names:
        return
    samples = data.get_split(split)
    first = samples.subset(torch.arange(min(len(samples), _NUM_PROBE_SAMPLES)))
    outputs = torch.zeros(len(first), data.data.targets.num_outputs)
    metrics = scalar_metrics(data.compute_metrics(split, outputs, first.targets))
    for name in names:
        if name not in metrics:
            raise UnknownNameError(
                f"there is no metric '{name}'", where="--min-metric", fix=suggest_name(name, metrics)
            )


def describe_failures(result: EndpointTestResult, minimums: Mapping[str, float], targets: Targets) -> Iterator[str]:
    """Yield a sentence for each metric of the first split that is worse than its minimum.

    The minimum of a metric of which less is better, such as a loss, is a maximum.
    """
    metrics = scalar_metrics(next(iter(result.metrics.values())))
    for name, minimum in minimums.items():
        higher = higher_is_better(targets, name)
        if not (metrics[name] >= minimum if higher else metrics[name] <= minimum):
            yield f"{name} is {metrics[name]:.4f}, but has to be at {'least' if higher else 'most'} {minimum:g}"


def higher_is_better(targets: Targets, name: str) -> bool:
    """Return False for metrics of which less is better; an unknown metric counts as one of which more is better."""
    try:
        return resolve_monitor(targets, name, None)[1] > 0
    except UsageError:
        return True


def compare_metrics(online: Mapping[str, Any], offline: Mapping[str, Any] | None) -> list[MetricComparison]:
    """Compare every metric of a split with the offline one; return an empty list without an offline report."""
    if offline is None:
        return []
    ours, theirs = dict(_flatten(online)), dict(_flatten(offline))
    return [MetricComparison(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])]


def _choose_route(route: EndpointRoute, *, all_files: bool) -> EndpointRoute:
    if route == "predict" and not all_files:
        raise UsageError(
            "the samples are not files", where="--route predict", fix="use --route v2, which sends stored tensors"
        )
    return ("predict" if all_files else "v2") if route == "auto" else route


def _without_cache(data: ComponentSpec) -> ComponentSpec:
    """Return the data source with decoding on demand, because images held in memory have lost their file names."""
    options = get_options(load_component(find_component("data_prepare", data.name)))
    return attrs.evolve(data, options={**data.options, "memory_mb": 0}) if "memory_mb" in options else data


def _send_concurrently(send: Send, requests: Sequence[EndpointRequest], concurrency: int) -> list[EndpointResponse]:
    """Send the requests from `concurrency` threads, and return the responses in the order of the requests."""
    pool = ThreadPoolExecutor(min(concurrency, len(requests)))
    try:
        return list(pool.map(lambda request: send(*request), requests))
    finally:
        pool.shutdown(cancel_futures=True)


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested metrics with dotted names; a list is a leaf."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, item in value.items():
        yield from _flatten(item, f"{name}.{key}" if name else str(key))
