"""The test split sent to a server, and what came back judged as `evaluate` judges: figures, latency, throughput.

Files go to `POST /predict` as they are, so that the server's decoding is tested too. What has no file goes to
`POST /v2/models/NAME/infer` in its stored form, the tensor that both the server and the offline evaluation give to
`Inputs.ready`. Either way each sample must be answered as offline.

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
from tuneforge.engine.data.loader import in_turn
from tuneforge.engine.loop.metric_set import single_numbers, watched
from tuneforge.engine.model import device
from tuneforge.engine.session import predictor as tuned
from tuneforge.engine.session.from_objects import member
from tuneforge.errors import UnknownNameError, UsageError, close_match
from tuneforge.plugin import registry
from tuneforge.plugin.component import options_of
from tuneforge.plugin.config import resolve
from tuneforge.plugin.hooks import Hooks
from tuneforge.plugin.steps import Use
from tuneforge.ship.wire.client import Server
from tuneforge.ship.wire.senders import Answered, Ask, Model, Send, by_file, by_v2, files_of, model_of

Via = Literal["auto", "predict", "v2"]

ROUNDING = 1e-6
"""Figures that differ by less, relative to 1 or to their size, differ by rounding only."""


_LOOK = 16  # samples that tell which figures metrics give


@attrs.frozen
class Comparison:
    """A figure over the wire beside the same one offline.

    Args:
        name: Dotted, such as `per_class.3.recall`.
        wire: Its value over the wire.
        offline: Its value in the offline report.
    """

    name: str
    wire: Any
    offline: Any

    @property
    def equal(self) -> bool:
        """True where they are the same, or differ by rounding only."""
        if isinstance(self.wire, float) and isinstance(self.offline, (int, float)):
            return math.isclose(self.wire, self.offline, rel_tol=ROUNDING, abs_tol=ROUNDING)
        return bool(self.wire == self.offline)


@attrs.frozen
class Measured:
    """What a test over the wire found.

    Args:
        figures: Of each split, as `evaluate` gives them.
        via: `predict` or `v2`.
        versions: The versions that answered, in order of appearance.
        samples: How many were sent.
        requests: In how many requests.
        retried: Requests that were sent again because the server was busy.
        seconds: Wall time of all of it.
        latencies_s: Of each request, sorted.
        compared: Figures of each split beside the offline ones; empty where there is no offline report.
    """

    figures: dict[str, dict[str, Any]]
    via: str
    versions: tuple[str, ...]
    samples: int
    requests: int
    retried: int
    seconds: float
    latencies_s: tuple[float, ...]
    compared: dict[str, list[Comparison]]

    def latency_ms(self, percent: float) -> float:
        """The latency in milliseconds that `percent` of the requests stay within (the nearest rank)."""
        return 1000 * self.latencies_s[max(0, math.ceil(percent / 100 * len(self.latencies_s)) - 1)]

    @property
    def per_second(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds


def measure(
    server: Server,
    run: Run,
    *,
    splits: Sequence[str] = ("test",),
    offline: Mapping[str, Mapping[str, Any]] | None = None,
    name: str | None = None,
    via: Via = "auto",
    concurrency: int = 1,
    rows: int = 1,
) -> Measured:
    """Send whole splits to a server and judge its answers.

    Args:
        server: Which.
        run: With data and metrics (see `tuned.with_data`); its model is not used.
        splits: Names of the splits.
        offline: Figures of the same splits from the offline report, to compare with.
        name: Of the model; by default the first that the server lists.
        via: `predict` sends files, `v2` stored tensors, `auto` files where all samples have one.
        concurrency: Requests under way at a time, each on a connection of its own.
        rows: Samples of one v2 request.

    Raises:
        UnknownNameError: There is no such split.
        DataError: The server refuses a sample, or its classes are not those of the data.
        TryAgainError: It cannot be reached.
    """
    chosen = {split: _split(run, split) for split in splits}
    via = _way(via, chosen.values())
    model = model_of(server, name)
    send = _sender(via, server, model, _grown(run, model.labels))
    rows = rows if via == "v2" else 1
    asks = [(split, each, numbers) for split, each in chosen.items() for numbers in in_turn(len(each), rows)]
    began = time.perf_counter()
    answers = list(_in_threads(server, send, asks, concurrency))
    seconds = time.perf_counter() - began
    figures = {split: _figures(run, each, split, answers) for split, each in chosen.items()}
    return Measured(
        figures=figures,
        via=via,
        versions=tuple(dict.fromkeys(each.version for each in answers)),
        samples=sum(len(each) for each in chosen.values()),
        requests=len(answers),
        retried=server.retried,
        seconds=seconds,
        latencies_s=tuple(sorted(each.seconds for each in answers)),
        compared={split: compared(figures[split], (offline or {}).get(split)) for split in chosen},
    )


def _way(via: Via, splits: Iterable[Split]) -> Via:
    """Files or tensors, where that is left to us."""
    all_files = all(files_of(each) is not None for each in splits)
    if via == "predict" and not all_files:
        raise UsageError(
            "the samples are no files", where="--via predict", fix="use --via v2, which sends them as they are stored"
        )
    return ("predict" if all_files else "v2") if via == "auto" else via


def _sender(via: Via, server: Server, model: Model, targets: Targets) -> Send:
    return by_v2(server, targets, model) if via == "v2" else by_file(targets)


def looking(path: Path | None, *, data: Use | None = None, metrics: Sequence[Use] = (), model: Any = None) -> Run:
    """A run with the data and the metrics of a finished run, or with others; where there are files, they keep names.

    Args:
        path: The finished run's folder; None where there is none.
        data: Where samples come from; needed without a finished run.
        metrics: By default those of the finished run, or those that fit the data.
        model: The module, where the run was given one as an object.
    """
    if path is not None:
        found = tuned.load(path, model=model)
        return tuned.with_data(found, data=_on_demand(data or found.run.config.data), metrics=metrics)
    assert data is not None
    run = Run(config=resolve({}), folder=None, device=device.choose("cpu"), hooks=Hooks())
    run.hooks.add(member("data_prepare", _on_demand(data), where="--data")[0])
    run.hooks.provider("data_prepare")
    run.take_data(run.hooks.call.data_prepare(run=run))
    for asked in metrics or run.data.targets.metrics:
        run.hooks.add(member("evaluate", asked, where="--evaluate")[0])
    return run


def _on_demand(data: Use) -> Use:
    """The same source, decoding its files when asked: pictures held in memory have lost the name of their file."""
    known = options_of(registry.load(registry.find("data_prepare", data.name)))
    return attrs.evolve(data, options={**data.options, "memory_mb": 0}) if "memory_mb" in known else data


def require_figures(run: Run, split: str, names: Collection[str]) -> None:
    """See that metrics give figures of these names for a split, by what they say of its first samples.

    Raises:
        UnknownNameError: There is no such figure, or no such split.
    """
    if not names:
        return
    first = _split(run, split).take(torch.arange(min(len(_split(run, split)), _LOOK)))
    outputs = torch.zeros(len(first), run.data.targets.size)
    figures = single_numbers(_judged(run, split, outputs, first.targets))
    for name in names:
        if name not in figures:
            raise UnknownNameError(f"there is no figure '{name}'", where="--floor", fix=close_match(name, figures))


def missed(measured: Measured, floors: Mapping[str, float], targets: Targets) -> Iterator[str]:
    """A sentence for each figure of the first split that is worse than its floor; of errors less is better."""
    figures = single_numbers(next(iter(measured.figures.values())))
    for name, floor in floors.items():
        least = more_is_better(targets, name)
        if not (figures[name] >= floor if least else figures[name] <= floor):
            yield f"{name} is {figures[name]:.4f}, and at {'least' if least else 'most'} {floor:g} was asked for"


def more_is_better(targets: Targets, name: str) -> bool:
    """False for errors, such as a loss; a figure that nobody knows is better the more it is."""
    try:
        return watched(targets, name, None)[1] > 0
    except UsageError:
        return True


def compared(wire: Mapping[str, Any], offline: Mapping[str, Any] | None) -> list[Comparison]:
    """Every figure of a split beside the offline one; nothing where there is no offline report."""
    if offline is None:
        return []
    ours, theirs = dict(_flat(wire)), dict(_flat(offline))
    return [Comparison(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])]


def _split(run: Run, name: str) -> Split:
    known = run.data.splits()
    if name not in known:
        raise UnknownNameError(f"there is no split '{name}'", where="--split", fix=close_match(name, known))
    return known[name]


def _figures(run: Run, split: Split, name: str, answers: Sequence[Answered]) -> dict[str, Any]:
    return _judged(run, name, torch.cat([each.outputs for each in answers if each.split == name]), split.targets)


def _judged(run: Run, split: str, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    run.evaluating = split
    metrics = run.hooks.call.evaluate(run=run)
    metrics.update(outputs, targets)
    run.evaluating = None
    figures: dict[str, Any] = metrics.compute()
    return figures


def _in_threads(server: Server, send: Send, asks: Sequence[Ask], concurrency: int) -> Iterator[Answered]:
    """The answers in the order of what is asked, `concurrency` requests under way at a time."""
    free = [server.connect() for _ in range(min(concurrency, len(asks)))]
    connections = list(free)

    def work(ask: Ask) -> Answered:
        connection = free.pop()
        try:
            return send(connection, *ask)
        finally:
            free.append(connection)

    pool = ThreadPoolExecutor(len(connections))
    try:
        yield from pool.map(work, asks)
    finally:
        pool.shutdown(cancel_futures=True)
        for connection in connections:
            connection.close()


def _grown(run: Run, labels: Sequence[str]) -> Targets:
    """The data's targets, with the classes that the server knows beyond them behind the data's own: each such answer
    is wrong, and has its name in the report.
    """
    known = run.data.targets.labels
    if set(labels) > set(known) and run.data.test.targets.ndim == 1:
        more = [name for name in labels if name not in known]
        grown: Any = attrs.evolve(run.data.targets, names=(*known, *more))  # type: ignore[misc]  # an attrs class
        run.take_data(attrs.evolve(run.data, targets=grown))
    return run.data.targets


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested figures with dotted names; lists are leaves."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{name}.{key}" if name else str(key))
