"""The test split sent to a server, and what came back judged as `evaluate` judges: figures, latency, throughput.

Files go to `POST /predict` as they are, so that the server's decoding is tested too. What has no file goes to
`POST /v2/models/NAME/infer` in its stored form, the tensor that both the server and the offline evaluation give to
`Inputs.preprocess`. Either way each sample must be answered as offline.

Shapes: n samples, k outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Split, Targets
from tuneforge.engine.data.loader import iter_sequential
from tuneforge.engine.loop.metric_set import resolve_monitor, scalar_metrics
from tuneforge.engine.model import device
from tuneforge.engine.session.components import resolve_component
from tuneforge.engine.session.predictor import load
from tuneforge.errors import UnknownNameError, UsageError, suggest_name
from tuneforge.plugin import registry
from tuneforge.plugin.config import resolve_config
from tuneforge.plugin.declaration import get_options
from tuneforge.plugin.hooks import Hooks
from tuneforge.plugin.steps import ComponentSpec
from tuneforge_serve.endpoint_test.http_client import ServerClient
from tuneforge_serve.endpoint_test.senders import (
    EndpointRequest,
    EndpointResponse,
    ModelMetadata,
    Send,
    fetch_model_metadata,
    list_sample_files,
    make_file_sender,
    make_v2_sender,
)

Via = Literal["auto", "predict", "v2"]

ROUNDING = 1e-6
"""Figures that differ by less, relative to 1 or to their size, differ by rounding only."""


_NUM_PROBE_SAMPLES = 16  # samples that tell which figures metrics give


@attrs.frozen
class MetricComparison:
    """A figure over the wire beside the same one offline.

    Args:
        name: Dotted, such as `per_class.3.recall`.
        online: Its value over the wire.
        offline: Its value in the offline report.
    """

    name: str
    online: Any
    offline: Any

    @property
    def equal(self) -> bool:
        """True where they are the same, or differ by rounding only."""
        if isinstance(self.online, float) and isinstance(self.offline, (int, float)):
            return math.isclose(self.online, self.offline, rel_tol=ROUNDING, abs_tol=ROUNDING)
        return bool(self.online == self.offline)


@attrs.frozen
class EndpointTestResult:
    """What a test over the wire found.

    Args:
        metrics: Of each split, as `evaluate` gives them.
        via: `predict` or `v2`.
        versions: The versions that answered, in order of appearance.
        num_samples: How many were sent.
        num_requests: In how many requests.
        num_retries: Requests that were sent again because the server was busy.
        seconds: Wall time of all of it.
        latencies_s: Of each request, sorted.
        comparisons: Figures of each split beside the offline ones; empty where there is no offline report.
    """

    metrics: dict[str, dict[str, Any]]
    via: str
    versions: tuple[str, ...]
    num_samples: int
    num_requests: int
    num_retries: int
    seconds: float
    latencies_s: tuple[float, ...]
    comparisons: dict[str, list[MetricComparison]]

    def latency_ms(self, percent: float) -> float:
        """The latency in milliseconds that `percent` of the requests stay within (the nearest rank)."""
        return 1000 * self.latencies_s[max(0, math.ceil(percent / 100 * len(self.latencies_s)) - 1)]

    @property
    def samples_per_second(self) -> float:
        """Samples a second."""
        return self.num_samples / self.seconds


def measure_endpoint(
    server: ServerClient,
    run: Run,
    *,
    splits: Sequence[str] = ("test",),
    offline: Mapping[str, Mapping[str, Any]] | None = None,
    name: str | None = None,
    via: Via = "auto",
    concurrency: int = 1,
    batch_size: int = 1,
) -> EndpointTestResult:
    """Send whole splits to a server and judge its answers.

    Args:
        server: Which.
        run: With data and metrics (see `Predictor.with_data`); its model is not used.
        splits: Names of the splits.
        offline: Figures of the same splits from the offline report, to compare with.
        name: Of the model; by default the first that the server lists.
        via: `predict` sends files, `v2` stored tensors, `auto` files where all samples have one.
        concurrency: Requests under way at a time, each on a connection of its own.
        batch_size: Samples of one v2 request.

    Raises:
        UnknownNameError: There is no such split.
        DataError: The server refuses a sample, or its classes are not those of the data.
        TryAgainError: It cannot be reached.
    """
    chosen = {split: _get_split(run, split) for split in splits}
    via = _choose_route(via, chosen.values())
    model = fetch_model_metadata(server, name)
    send = _make_sender(via, server, model, _extend_targets(run, model.labels))
    batch_size = batch_size if via == "v2" else 1
    requests = [
        (split, each, numbers) for split, each in chosen.items() for numbers in iter_sequential(len(each), batch_size)
    ]
    began = time.perf_counter()
    responses = list(_send_concurrently(server, send, requests, concurrency))
    seconds = time.perf_counter() - began
    metrics = {split: _collect_metrics(run, each, split, responses) for split, each in chosen.items()}
    return EndpointTestResult(
        metrics=metrics,
        via=via,
        versions=tuple(dict.fromkeys(each.version for each in responses)),
        num_samples=sum(len(each) for each in chosen.values()),
        num_requests=len(responses),
        num_retries=server.num_retries,
        seconds=seconds,
        latencies_s=tuple(sorted(each.seconds for each in responses)),
        comparisons={split: compare_metrics(metrics[split], (offline or {}).get(split)) for split in chosen},
    )


def _choose_route(via: Via, splits: Iterable[Split]) -> Via:
    """Files or tensors, where that is left to us."""
    all_files = all(list_sample_files(each) is not None for each in splits)
    if via == "predict" and not all_files:
        raise UsageError(
            "the samples are no files", where="--via predict", fix="use --via v2, which sends them as they are stored"
        )
    return ("predict" if all_files else "v2") if via == "auto" else via


def _make_sender(via: Via, server: ServerClient, model: ModelMetadata, targets: Targets) -> Send:
    return make_v2_sender(server, targets, model) if via == "v2" else make_file_sender(targets)


def prepare_run(
    run_dir: Path | None, *, data: ComponentSpec | None = None, metrics: Sequence[ComponentSpec] = (), model: Any = None
) -> Run:
    """A run with the data and the metrics of a finished run, or with others; where there are files, they keep names.

    Args:
        run_dir: The finished run's folder; None where there is none.
        data: Where samples come from; needed without a finished run.
        metrics: By default those of the finished run, or those that fit the data.
        model: The module, where the run was given one as an object.
    """
    if run_dir is not None:
        found = load(run_dir, model=model)
        return found.with_data(_decode_on_demand(data or found.run.config.data), metrics=metrics)
    assert data is not None
    run = Run(config=resolve_config({}), run_dir=None, device=device.resolve_device("cpu"), hooks=Hooks())
    run.hooks.add(resolve_component("data_prepare", _decode_on_demand(data), where="--data")[0])
    run.hooks.get_provider("data_prepare")
    run.set_data(run.hooks.call.data_prepare(run=run))
    for asked in metrics or run.data.targets.metrics:
        run.hooks.add(resolve_component("evaluate", asked, where="--metrics")[0])
    return run


def _decode_on_demand(data: ComponentSpec) -> ComponentSpec:
    """The same source, decoding its files when asked: pictures held in memory have lost the name of their file."""
    known = get_options(registry.load_component(registry.find_component("data_prepare", data.name)))
    return attrs.evolve(data, options={**data.options, "memory_mb": 0}) if "memory_mb" in known else data


def require_metrics(run: Run, split: str, names: Collection[str]) -> None:
    """See that metrics give figures of these names for a split, by what they say of its first samples.

    Raises:
        UnknownNameError: There is no such figure, or no such split.
    """
    if not names:
        return
    first = _get_split(run, split).subset(torch.arange(min(len(_get_split(run, split)), _NUM_PROBE_SAMPLES)))
    outputs = torch.zeros(len(first), run.data.targets.num_outputs)
    metrics = scalar_metrics(_compute_metrics(run, split, outputs, first.targets))
    for name in names:
        if name not in metrics:
            raise UnknownNameError(f"there is no figure '{name}'", where="--floor", fix=suggest_name(name, metrics))


def describe_failures(result: EndpointTestResult, minimums: Mapping[str, float], targets: Targets) -> Iterator[str]:
    """A sentence for each figure of the first split that is worse than its floor; of errors less is better."""
    metrics = scalar_metrics(next(iter(result.metrics.values())))
    for name, minimum in minimums.items():
        higher = higher_is_better(targets, name)
        if not (metrics[name] >= minimum if higher else metrics[name] <= minimum):
            yield f"{name} is {metrics[name]:.4f}, and at {'least' if higher else 'most'} {minimum:g} was asked for"


def higher_is_better(targets: Targets, name: str) -> bool:
    """False for errors, such as a loss; a figure that nobody knows is better the more it is."""
    try:
        return resolve_monitor(targets, name, None)[1] > 0
    except UsageError:
        return True


def compare_metrics(online: Mapping[str, Any], offline: Mapping[str, Any] | None) -> list[MetricComparison]:
    """Every figure of a split beside the offline one; nothing where there is no offline report."""
    if offline is None:
        return []
    ours, theirs = dict(_flatten(online)), dict(_flatten(offline))
    return [MetricComparison(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])]


def _get_split(run: Run, name: str) -> Split:
    known = run.data.splits()
    if name not in known:
        raise UnknownNameError(f"there is no split '{name}'", where="--split", fix=suggest_name(name, known))
    return known[name]


def _collect_metrics(run: Run, split: Split, name: str, responses: Sequence[EndpointResponse]) -> dict[str, Any]:
    return _compute_metrics(
        run, name, torch.cat([each.outputs for each in responses if each.split == name]), split.targets
    )


def _compute_metrics(run: Run, split: str, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    run.eval_split = split
    metrics = run.hooks.call.evaluate(run=run)
    metrics.update(outputs, targets)
    run.eval_split = None
    computed: dict[str, Any] = metrics.compute()
    return computed


def _send_concurrently(
    server: ServerClient, send: Send, requests: Sequence[EndpointRequest], concurrency: int
) -> Iterator[EndpointResponse]:
    """The answers in the order of what is asked, `concurrency` requests under way at a time."""
    free = [server.connect() for _ in range(min(concurrency, len(requests)))]
    connections = list(free)

    def work(request: EndpointRequest) -> EndpointResponse:
        connection = free.pop()
        try:
            return send(connection, *request)
        finally:
            free.append(connection)

    pool = ThreadPoolExecutor(len(connections))
    try:
        yield from pool.map(work, requests)
    finally:
        pool.shutdown(cancel_futures=True)
        for connection in connections:
            connection.close()


def _extend_targets(run: Run, labels: Sequence[str]) -> Targets:
    """The data's targets, with the classes that the server knows beyond them behind the data's own: each such answer
    is wrong, and has its name in the report.
    """
    known = run.data.targets.labels
    if set(labels) > set(known) and run.data.test.targets.ndim == 1:
        more = [name for name in labels if name not in known]
        targets: Any = attrs.evolve(run.data.targets, names=(*known, *more))  # type: ignore[misc]  # an attrs class
        run.set_data(attrs.evolve(run.data, targets=targets))
    return run.data.targets


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested figures with dotted names; lists are leaves."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, item in value.items():
        yield from _flatten(item, f"{name}.{key}" if name else str(key))
