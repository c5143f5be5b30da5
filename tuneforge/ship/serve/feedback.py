"""What people say of the answers: `/feedback` takes labels, `/review` asks for them, `/watch` tells how it stands."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tuneforge.engine.data.dataset import Inputs
from tuneforge.errors import DataError, TryAgainError, UnknownNameError
from tuneforge.ship.circle.records import Exchange, Label, Records, in_share
from tuneforge.ship.circle.watch import Watched, watched
from tuneforge.ship.serve.app import Routes
from tuneforge.ship.serve.bounds import Refusal, busy, in_words
from tuneforge.ship.serve.desk import Desk
from tuneforge.ship.serve.models import Served
from tuneforge.ship.serve.people import page
from tuneforge.ship.serve.tensors import parsed

_LOOK_S = 2.0  # what watching says is at most so old
_MOST_SKIPPED = 500
_SHOWN = 5
_TEXT = 2000  # characters of an input that is no picture


class Sampled:
    """Keeps a share of the requests: always the same ones, by their ids.

    Args:
        records: Where they are kept.
        share: How many of them, 0 to 1.
    """

    def __init__(self, records: Records, share: float) -> None:
        self.records, self.share = records, share

    def keep(self, exchanges: Sequence[Exchange]) -> int:
        """Keep those that belong to the share, in one commit; how many were kept."""
        return self.records.keep([each for each in exchanges if in_share(each.id, self.share, salt="sample")])


def feedback(records: Records) -> Routes:
    """What adds the routes for feedback to an application that keeps its requests in `records`."""
    return lambda desk: Feedback(desk, records).routes()


class Feedback:
    """The routes for feedback.

    Args:
        desk: Knows the models, and keeps requests.
        records: Where the requests are kept.
    """

    def __init__(self, desk: Desk, records: Records) -> None:
        self._desk, self._records = desk, records
        self._looked: dict[tuple[str, str], tuple[float, Watched]] = {}
        registry = CollectorRegistry()
        registry.register(self)
        desk.metrics.append(lambda: generate_latest(registry))

    def routes(self) -> list[BaseRoute]:
        """Paths and what answers them."""
        return [
            Route("/feedback", self.label, methods=["POST"]),
            Route("/review", self.review),
            Route("/review/next", self.next),
            Route("/watch", self.watch),
        ]

    async def label(self, request: Request) -> Response:
        """Take the right class for a request: `{"id": ..., "class": ...}`; on the answer it is on the disk."""
        with self._desk.bodies.held() as holding:
            given = parsed(await self._desk.bodies.read(request, holding), "the request")
        if not isinstance(given, dict) or set(given) != {"id", "class"}:
            raise Refusal(400, "an object with id and class is needed, and nothing else")
        for field, value in given.items():
            if not isinstance(value, str) or not value.strip():
                raise Refusal(400, f"{field}: a text is needed")
        try:
            label = await self._desk.slowly(lambda: self._label(given["id"], given["class"]))
        except UnknownNameError as error:
            raise Refusal(404, in_words(error, field="id")) from None
        except DataError as error:
            raise Refusal(422, in_words(error)) from None
        except TryAgainError:
            raise busy("the label could not be written") from None
        known = {"previous": label.previous, "held_out": label.held_out, "agrees": label.agrees}
        return JSONResponse({"id": label.id, "class": label.name, **known})

    async def review(self, request: Request) -> Response:
        """A page that shows the least certain answers one at a time."""
        return page("review.html")

    async def next(self, request: Request) -> Response:
        """The least certain answer without a label; ids given as `skip` are passed over."""
        skip = request.query_params.getlist("skip")[-_MOST_SKIPPED:]
        return JSONResponse(await self._desk.aside(lambda: self._next(skip)))

    async def watch(self, request: Request) -> Response:
        """How each model does at work."""
        return JSONResponse(await self._desk.aside(self._all_watched))

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What Prometheus reads."""
        counts = self._records.counts()
        kept = GaugeMetricFamily("tuneforge_kept_requests", "Requests that are kept, by state.", labels=["state"])
        kept.add_metric(["all"], counts.requests)
        kept.add_metric(["labelled"], counts.labelled)
        kept.add_metric(["held out"], counts.held_out)
        yield kept
        yield GaugeMetricFamily("tuneforge_kept_bytes", "Bytes that the records use.", counts.bytes)
        yield GaugeMetricFamily("tuneforge_kept_full", "1 where only labelled requests are left.", self._records.full)
        yield GaugeMetricFamily("tuneforge_evicted", "Requests removed to make room.", self._records.evicted)
        accuracy = GaugeMetricFamily(
            "tuneforge_labelled_accuracy", "Of labelled answers, with 95 %.", labels=["model", "version", "bound"]
        )
        drift = GaugeMetricFamily(
            "tuneforge_drift_p", "Corrected p of a two-sample test.", labels=["model", "version", "of"]
        )
        for served in self._desk.models.all_current():
            seen, own = self._watched(served), [served.name, served.version]
            if seen.accuracy.total:
                values = {"share": seen.accuracy.share, "low": seen.accuracy.low, "high": seen.accuracy.high}
                for bound, value in values.items():
                    accuracy.add_metric([*own, bound], value)
            for kind, found in (("confidence", seen.confidence), ("inputs", seen.inputs)):
                if found is not None:
                    drift.add_metric([*own, kind], found.p)
        yield accuracy
        yield drift

    def _label(self, request_id: str, name: str) -> Label:
        self._desk.keeper.flush()  # what was answered a moment ago may still wait to be kept
        label = self._records.label(request_id, name)
        self._looked = {}
        return label

    def _next(self, skip: list[str]) -> dict[str, Any]:
        self._desk.keeper.flush()
        counts = self._records.counts()
        left = {"left": counts.requests - counts.labelled, "labelled": counts.labelled}
        found = self._records.least_certain(skip=skip)
        if found is None:
            return {"id": None, **left}
        models = self._desk.models.all_current()
        classes = dict.fromkeys([*(name for each in models for name in each.targets.labels), *self._records.classes()])
        likely = sorted((found.answer.get("probabilities") or {}).items(), key=lambda each: -(each[1] or 0))[:_SHOWN]
        return {
            "id": found.id,
            "class": found.answer.get("class"),
            "probability": found.answer.get("probability"),
            "likely": likely,
            "classes": list(classes),
            "version": found.version,
            "time": found.time,
            **_shown(found, models[0].inputs if models else None),
            **left,
        }

    def _watched(self, served: Served) -> Watched:
        key, now = (served.name, served.version), time.monotonic()
        at, seen = self._looked.get(key, (0.0, None))
        if seen is None or now - at > _LOOK_S:
            seen = watched(self._records, served.servable.evidence, version=served.version)
            self._looked = {key: (now, seen), **{other: each for other, each in self._looked.items() if other != key}}
        return seen

    def _all_watched(self) -> dict[str, Any]:
        models = [{"model": each.name, **self._watched(each).plain()} for each in self._desk.models.all_current()]
        counts = self._records.counts()
        kept = {"requests": counts.requests, "labelled": counts.labelled, "held_out": counts.held_out}
        return {"models": models, "kept": {**kept, "bytes": counts.bytes, "full": self._records.full}}


def _shown(exchange: Exchange, inputs: Inputs | None) -> dict[str, str | None]:
    """What was asked, for a person: a picture as a data URI, or text."""
    text = exchange.body.decode(errors="replace")[:_TEXT] if exchange.content_type == "application/json" else ""
    try:
        stored = None if inputs is None else exchange.stored(inputs)
    except DataError as error:
        return {"picture": None, "text": text or f"it cannot be shown: {error.what}"}
    png = None if inputs is None or stored is None else inputs.picture(stored)
    if png is None:
        return {"picture": None, "text": text or ("" if inputs is None or stored is None else inputs.text(stored))}
    return {"picture": "data:image/png;base64," + base64.b64encode(png).decode(), "text": None}
