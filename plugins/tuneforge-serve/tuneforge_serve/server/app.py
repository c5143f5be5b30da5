"""The ASGI application: routes, access, metrics, and errors as JSON."""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import urlsplit

import attrs
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneforge_serve.server.dynamic_batcher import DynamicBatcher, InferenceResult
from tuneforge_serve.server.inference_service import InferenceService
from tuneforge_serve.server.limits import Limits
from tuneforge_serve.server.model_manager import ModelManager, ModelSource
from tuneforge_serve.server.request_body import RequestError
from tuneforge_serve.server.request_logger import RequestLogger, RequestSink
from tuneforge_serve.server.routes_predict import PredictRoutes
from tuneforge_serve.server.routes_v2 import V2Routes
from tuneforge_serve.server.service import LOOPBACK

LOG = logging.getLogger("tuneforge.serve")
_PUBLIC_PATHS = ("/v2/health/live", "/v2/health/ready")  # probes need no token
_LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

RouteFactory = Callable[[InferenceService], Sequence[BaseRoute]]
"""Returns further routes of the application, such as those for feedback."""


class ServerMetrics:
    """The Prometheus metrics of one server, in a registry of its own, so that one process can run several servers."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("tuneforge_requests", "Responses.", ["path", "status"], registry=own)
        self.seconds = _histogram("request_seconds", "From headers to response.", _LATENCY_BUCKETS, own)
        self.queue_seconds = _histogram(
            "queue_seconds", "Time from a decoded request to its forward pass.", _LATENCY_BUCKETS, own
        )
        self.forward_seconds = _histogram("forward_seconds", "Duration of a forward pass.", _LATENCY_BUCKETS, own)
        self.batch_size = _histogram("batch_size", "Samples of a forward pass.", _BATCH_SIZE_BUCKETS, own)
        self.queue_size = Gauge("tuneforge_queue_size", "Samples that wait for a forward pass.", registry=own)
        self.dropped_requests = Gauge(
            "tuneforge_dropped_requests",
            "Requests that could not be logged.",
            registry=own,
        )
        self.loads = Counter("tuneforge_loads", "Attempts to load a version.", ["model", "result"], registry=own)
        labels = ["model", "version", "backend"]
        self.served_models = Gauge("tuneforge_model", "1 for the version that is served.", labels, registry=own)
        self.num_responses = 0

    def observe_batch(self, results: Sequence[InferenceResult]) -> None:
        """Count the requests of a forward pass."""
        self.batch_size.observe(results[0].batch_size)
        self.forward_seconds.observe(results[0].forward_s)
        for each in results:
            self.queue_seconds.observe(each.queue_s)

    def count_load(self, model: str, succeeded: bool) -> None:
        """Count an attempt to load a version."""
        self.loads.labels(model, "loaded" if succeeded else "refused").inc()

    def render(self, service: InferenceService) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        self.queue_size.set(service.batcher.num_queued_rows)
        self.dropped_requests.set(service.request_logger.num_dropped)
        self.served_models.clear()
        for each in service.models.list_loaded():
            self.served_models.labels(each.name, each.version, each.model.backend).set(1)
        return b"".join([generate_latest(self.registry), *(more() for more in service.extra_metrics)])


@attrs.frozen
class AccessPolicy:
    """Which requests are accepted.

    Args:
        token: The token that every request has to contain; None requires no token.
        hosts: The accepted names in the Host header; None accepts every name. The check stops pages of other sites
            whose name was made to point to this machine (DNS rebinding).
    """

    token: str | None = attrs.field(default=None, repr=False)
    hosts: tuple[str, ...] | None = LOOPBACK

    def check(self, path: str, method: str, headers: Headers) -> None:
        """Check that a request may be processed.

        Raises:
            RequestError: The request comes from the page of another site, or has no valid token.
        """
        if self.hosts is not None and _hostname(headers.get("host", "")) not in self.hosts:
            raise RequestError(403, "Host: the accepted names of this server are " + ", ".join(self.hosts))
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and _netloc(origin) != headers.get("host"):
            raise RequestError(403, "Origin: requests from pages of other sites are refused")
        if (
            self.token is not None
            and path not in _PUBLIC_PATHS
            and not self._has_token(headers.get("authorization", ""))
        ):
            scheme = 'Basic realm="tuneforge", charset="UTF-8"'
            message = "Authorization: a token is required (as a bearer token, or as the password)"
            raise RequestError(401, message, {"WWW-Authenticate": scheme})

    def _has_token(self, authorization: str) -> bool:
        """Compare the token in constant time."""
        assert self.token is not None
        scheme, _, given = authorization.partition(" ")
        content = given.strip().encode()
        if scheme.lower() == "basic":
            try:
                content = base64.b64decode(content, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                content = b""
        known = scheme.lower() in ("bearer", "basic")
        return hmac.compare_digest(content, self.token.encode()) and known


class RequestMiddleware:
    """Middleware that gives every request an id, checks, times and counts it, and turns errors into JSON.

    Args:
        app: The application.
        access: Which requests are accepted.
        metrics: The metrics of the server.
        max_header_bytes: Largest size of the headers of a request.
    """

    def __init__(self, app: ASGIApp, access: AccessPolicy, metrics: ServerMetrics, max_header_bytes: int) -> None:
        self._app, self._access, self._metrics, self._max_header_bytes = app, access, metrics, max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Process one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, request_id, status = time.perf_counter(), uuid.uuid4().hex, 500
        scope.setdefault("state", {})["id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > self._max_header_bytes:
                raise RequestError(431, "the headers of the request are too large")
            self._access.check(scope["path"], scope["method"], Headers(scope=scope))
            await self._app(scope, receive, send_with_id)
        except RequestError as error:
            await _error_response(error)(scope, receive, send_with_id)
        except Exception:
            LOG.exception("request %s failed because of a bug in tuneforge or a plugin", request_id)
            defect = RequestError(500, f"internal server error; see {request_id} in the log of the server")
            await _error_response(defect)(scope, receive, send_with_id)
        finally:
            path = _route_template(scope)
            self._metrics.num_responses += 1
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.observe(time.perf_counter() - start)


def create_app(
    sources: Sequence[ModelSource],
    *,
    limits: Limits | None = None,
    access: AccessPolicy | None = None,
    backend: str = "auto",
    device_name: str = "auto",
    poll_interval_s: float = 0.5,
    request_log: RequestSink | None = None,
    extra_routes: Sequence[RouteFactory] = (),
    discover: Callable[[], Sequence[ModelSource]] = lambda: (),
) -> Starlette:
    """Create the ASGI application that serves models; every model is loaded and checked when this returns.

    Args:
        sources: The sources of the models.
        limits: Limits of the server; None uses the defaults.
        access: Which requests are accepted; by default those that address the server by a name of this machine.
        backend: A backend that every model has a format for, or `auto`.
        device_name: The device that torch computes on.
        poll_interval_s: Seconds between two checks for a new champion.
        request_log: The log that requests are appended to; None logs nothing.
        extra_routes: Functions that return further routes of the service.
        discover: Returns the current sources; models with a new name are served too.

    Raises:
        TuneforgeError: A model cannot be loaded, or its outputs differ from its reference outputs.
    """
    limits, access, metrics = limits or Limits(), access or AccessPolicy(), ServerMetrics()
    batcher = _create_batcher(limits, metrics)
    models = ModelManager(
        list(sources),
        backend=backend,
        device_name=device_name,
        max_batch_size=limits.max_batch_size,
        on_load=metrics.count_load,
        discover=discover,
        compute=lambda work: batcher.run_task(work).result(),
    )
    try:
        for source in sources:
            models.load(source.name)
    except BaseException:
        batcher.close()
        raise
    service = InferenceService(models, limits, batcher, RequestLogger(request_log))
    app = Starlette(
        routes=_create_routes(service, metrics, extra_routes),
        middleware=[
            Middleware(RequestMiddleware, access=access, metrics=metrics, max_header_bytes=limits.max_header_bytes)
        ],
        exception_handlers={RequestError: _on_refusal, HTTPException: _on_http},
        lifespan=_lifespan(service, metrics, poll_interval_s),
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _create_batcher(limits: Limits, metrics: ServerMetrics) -> DynamicBatcher:
    return DynamicBatcher(
        max_batch_size=limits.max_batch_size,
        max_queue_size=limits.max_queue_size,
        max_wait_s=limits.max_wait_s,
        on_batch=metrics.observe_batch,
    )


def _create_routes(
    service: InferenceService, server_metrics: ServerMetrics, extra_routes: Sequence[RouteFactory]
) -> list[BaseRoute]:
    async def metrics(request: Request) -> Response:
        return Response(server_metrics.render(service), media_type="text/plain; version=0.0.4")

    own = [*V2Routes(service).routes(), *PredictRoutes(service).routes(), Route("/metrics", metrics)]
    return [*own, *(route for add in extra_routes for route in add(service))]


def _lifespan(
    service: InferenceService, metrics: ServerMetrics, poll_interval_s: float
) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.models.start_polling(poll_interval_s)
        yield
        service.close()
        LOG.info("stopped after %d response(s)", metrics.num_responses)

    return lifespan


def _route_template(scope: Scope) -> str:
    """Return the path with the names of its parameters, so that label values stay few; `other` for unknown paths."""
    if "endpoint" not in scope:
        return "other"
    values = {value: name for name, value in scope["path_params"].items()}
    return "/".join(f"{{{values[part]}}}" if part in values else part for part in scope["path"].split("/"))


def _histogram(name: str, about: str, buckets: Sequence[float], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"tuneforge_{name}", about, buckets=buckets, registry=registry)


def _error_response(error: RequestError) -> Response:
    return JSONResponse({"error": error.message}, error.status, error.headers)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error_response(error)


async def _on_http(request: Request, error: Exception) -> Response:
    """Return the response to an unknown path or method."""
    assert isinstance(error, HTTPException)
    what = {404: "there is no such path; see /docs", 405: "the path does not support this method; see /docs"}
    return JSONResponse({"error": what.get(error.status_code, error.detail)}, error.status_code, error.headers)


def _hostname(host: str) -> str | None:
    """Return the name in a Host header without the port; None if the header is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
