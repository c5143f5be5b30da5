"""Routes for feedback: `/feedback` takes labels, `/review` asks for them, `/monitoring` reports accuracy and drift."""

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

from tuneforge import Inputs
from tuneforge.errors import DataError, TryAgainError, UnknownNameError
from tuneforge_serve.feedback.monitoring import MonitoringReport, monitor_version
from tuneforge_serve.feedback.request_log import LabelRecord, LoggedRequest, RequestLog, is_sampled
from tuneforge_serve.server.app import RouteFactory
from tuneforge_serve.server.inference_service import InferenceService
from tuneforge_serve.server.model_manager import ServedModel
from tuneforge_serve.server.request_body import RequestError, busy_error, format_error
from tuneforge_serve.server.routes_predict import render_page
from tuneforge_serve.server.tensor_codec import parse_json

_CACHE_S = 2.0  # the longest time that a monitoring report is cached
_MAX_SKIPPED = 500
_MAX_LIKELY_CLASSES = 5
_MAX_TEXT_LENGTH = 2000  # characters of an input that is not an image


class SampledRequestLog:
    """Logs a fraction of the requests, which depends on their ids only.

    Args:
        request_log: The request log.
        sample_rate: The fraction, 0 to 1.
    """

    def __init__(self, request_log: RequestLog, sample_rate: float) -> None:
        self.request_log, self.sample_rate = request_log, sample_rate

    def append(self, requests: Sequence[LoggedRequest]) -> int:
        """Append the sampled requests in one commit, and return how many were appended."""
        return self.request_log.append(
            [each for each in requests if is_sampled(each.id, self.sample_rate, salt="sample")]
        )


def feedback_routes(request_log: RequestLog) -> RouteFactory:
    """Return a function that adds the routes for feedback to an application that logs to `request_log`."""
    return lambda service: FeedbackRoutes(service, request_log).routes()


class FeedbackRoutes:
    """The routes for feedback.

    Args:
        service: The inference service.
        request_log: The request log.
    """

    def __init__(self, service: InferenceService, request_log: RequestLog) -> None:
        self._service, self._request_log = service, request_log
        self._cache: dict[tuple[str, str], tuple[float, MonitoringReport]] = {}
        registry = CollectorRegistry()
        registry.register(self)
        service.extra_metrics.append(lambda: generate_latest(registry))

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/feedback", self.label, methods=["POST"]),
            Route("/review", self.review),
            Route("/review/next", self.next),
            Route("/monitoring", self.monitor),
        ]

    async def label(self, request: Request) -> Response:
        """Label a request: `{"id": ..., "class": ...}`; the response is sent once the label is on the disk."""
        with self._service.body_reader.reserve() as holding:
            content = parse_json(await self._service.body_reader.read(request, holding), "the request")
        if not isinstance(content, dict) or set(content) != {"id", "class"}:
            raise RequestError(400, "an object with id and class, and nothing else, is required")
        for field, value in content.items():
            if not isinstance(value, str) or not value.strip():
                raise RequestError(400, f"{field}: a string is required")
        try:
            label = await self._service.run_in_own_thread(lambda: self._store_label(content["id"], content["class"]))
        except UnknownNameError as error:
            raise RequestError(404, format_error(error, field="id")) from None
        except DataError as error:
            raise RequestError(422, format_error(error)) from None
        except TryAgainError:
            raise busy_error("the label could not be written") from None
        known = {"previous": label.previous_class, "held_out": label.held_out, "agrees": label.agrees}
        return JSONResponse({"id": label.id, "class": label.class_name, **known})

    async def review(self, request: Request) -> Response:
        """Return the page to label uncertain predictions."""
        return render_page("review.html")

    async def next(self, request: Request) -> Response:
        """Return the unlabeled request with the least certain prediction, without the ids in `skip`."""
        skip = request.query_params.getlist("skip")[-_MAX_SKIPPED:]
        return JSONResponse(await self._service.run_in_pool(lambda: self._find_next(skip)))

    async def monitor(self, request: Request) -> Response:
        """Return the monitoring report of each model."""
        return JSONResponse(await self._service.run_in_pool(self._monitor_all))

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the metrics for Prometheus."""
        stats = self._request_log.stats()
        logged = GaugeMetricFamily("tuneforge_logged_requests", "Logged requests by state.", labels=["state"])
        logged.add_metric(["all"], stats.num_requests)
        logged.add_metric(["labeled"], stats.num_labeled)
        logged.add_metric(["held out"], stats.num_held_out)
        yield logged
        yield GaugeMetricFamily("tuneforge_request_log_bytes", "Used size of the request log.", stats.used_bytes)
        yield GaugeMetricFamily(
            "tuneforge_request_log_full", "1 if only labeled requests are left.", self._request_log.is_full
        )
        yield GaugeMetricFamily(
            "tuneforge_evicted_requests", "Requests removed from the log.", self._request_log.num_evicted
        )
        accuracy = GaugeMetricFamily(
            "tuneforge_labeled_accuracy",
            "Accuracy with its 95 % interval.",
            labels=["model", "version", "bound"],
        )
        drift = GaugeMetricFamily(
            "tuneforge_drift_p_value", "Corrected p value of the drift test.", labels=["model", "version", "of"]
        )
        for model in self._service.models.list_loaded():
            report, own = self._monitor_model(model), [model.name, model.version]
            if report.accuracy.total:
                values = {
                    "proportion": report.accuracy.proportion,
                    "low": report.accuracy.low,
                    "high": report.accuracy.high,
                }
                for bound, value in values.items():
                    accuracy.add_metric([*own, bound], value)
            for kind, test in (("confidence", report.confidence_drift), ("inputs", report.input_drift)):
                if test is not None:
                    drift.add_metric([*own, kind], test.p_value)
        yield accuracy
        yield drift

    def _store_label(self, request_id: str, name: str) -> LabelRecord:
        self._service.request_logger.flush()  # a recent request may not be logged yet
        label = self._request_log.label(request_id, name)
        self._cache = {}
        return label

    def _find_next(self, skip: list[str]) -> dict[str, Any]:
        self._service.request_logger.flush()
        stats = self._request_log.stats()
        progress = {"left": stats.num_requests - stats.num_labeled, "num_labeled": stats.num_labeled}
        found = self._request_log.least_certain(skip=skip)
        if found is None:
            return {"id": None, **progress}
        models = self._service.models.list_loaded()
        classes = dict.fromkeys(
            [*(name for each in models for name in each.targets.labels), *self._request_log.classes()]
        )
        likely_classes = sorted(
            (found.prediction.get("probabilities") or {}).items(), key=lambda each: -(each[1] or 0)
        )[:_MAX_LIKELY_CLASSES]
        return {
            "id": found.id,
            "class": found.prediction.get("class"),
            "probability": found.prediction.get("probability"),
            "likely_classes": likely_classes,
            "classes": list(classes),
            "version": found.version,
            "time": found.time,
            **_render_input(found, models[0].inputs if models else None),
            **progress,
        }

    def _monitor_model(self, model: ServedModel) -> MonitoringReport:
        key, now = (model.name, model.version), time.monotonic()
        at, report = self._cache.get(key, (0.0, None))
        if report is None or now - at > _CACHE_S:
            report = monitor_version(self._request_log, model.model.reference_data, version=model.version)
            self._cache = {key: (now, report), **{other: each for other, each in self._cache.items() if other != key}}
        return report

    def _monitor_all(self) -> dict[str, Any]:
        models = [
            {"model": each.name, **self._monitor_model(each).to_dict()} for each in self._service.models.list_loaded()
        ]
        counts = self._request_log.stats()
        stats = {"requests": counts.num_requests, "num_labeled": counts.num_labeled, "held_out": counts.num_held_out}
        log = {**stats, "bytes": counts.used_bytes, "full": self._request_log.is_full}
        return {"models": models, "request_log": log}


def _render_input(request: LoggedRequest, inputs: Inputs | None) -> dict[str, str | None]:
    """Render an input for a person: an image as a data URI, or text."""
    text = (
        request.body.decode(errors="replace")[:_MAX_TEXT_LENGTH] if request.content_type == "application/json" else ""
    )
    try:
        stored = None if inputs is None else request.decode(inputs)
    except DataError as error:
        return {"image": None, "text": text or f"cannot be shown: {error.what}"}
    png = None if inputs is None or stored is None else inputs.render_image(stored)
    if png is None:
        return {
            "image": None,
            "text": text or ("" if inputs is None or stored is None else inputs.render_text(stored)),
        }
    return {"image": "data:image/png;base64," + base64.b64encode(png).decode(), "text": None}
