"""The application: its routes, who may ask, what is counted, and errors as JSON."""

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
from tuneforge_serve.server.model_manager import ModelManager, ModelSource
from tuneforge_serve.server.request_body import Limits, RequestError
from tuneforge_serve.server.request_logger import RequestLogger, RequestSink
from tuneforge_serve.server.routes_predict import PredictRoutes
from tuneforge_serve.server.routes_v2 import V2Routes
from tuneforge_serve.server.service import LOOPBACK

LOG = logging.getLogger("tuneforge.serve")
_PUBLIC_PATHS = ("/v2/health/live", "/v2/health/ready")  # what probes ask without a token
_LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

RouteFactory = Callable[[InferenceService], Sequence[BaseRoute]]
"""What adds routes to the application, such as those for feedback."""


class ServerMetrics:
    """What is counted, for `/metrics`; a registry of its own, so that several servers fit into one process."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("tuneforge_requests", "Answers.", ["path", "status"], registry=own)
        self.seconds = _histogram("request_seconds", "From the head of a request to its answer.", _LATENCY_BUCKETS, own)
        self.queue_seconds = _histogram(
            "wait_seconds", "From a decoded request to its forward pass.", _LATENCY_BUCKETS, own
        )
        self.forward_seconds = _histogram("forward_seconds", "A forward pass.", _LATENCY_BUCKETS, own)
        self.batch_size = _histogram("batch_rows", "Rows of a forward pass.", _BATCH_SIZE_BUCKETS, own)
        self.queue_size = Gauge("tuneforge_queue_rows", "Rows that wait.", registry=own)
        self.dropped_requests = Gauge(
            "tuneforge_dropped", "Requests that should have been kept and were not.", registry=own
        )
        self.loads = Counter("tuneforge_loads", "Attempts to load a version.", ["model", "result"], registry=own)
        labels = ["model", "version", "backend"]
        self.served_models = Gauge("tuneforge_model", "1 for the version that answers.", labels, registry=own)
        self.num_responses = 0

    def observe_batch(self, results: Sequence[InferenceResult]) -> None:
        """Count the results of a forward pass."""
        self.batch_size.observe(results[0].batch_size)
        self.forward_seconds.observe(results[0].forward_s)
        for each in results:
            self.queue_seconds.observe(each.queue_s)

    def count_load(self, model: str, succeeded: bool) -> None:
        """Count an attempt to load."""
        self.loads.labels(model, "taken over" if succeeded else "refused").inc()

    def render(self, service: InferenceService) -> bytes:
        """Everything, as Prometheus reads it."""
        self.queue_size.set(service.batcher.num_queued_rows)
        self.dropped_requests.set(service.request_logger.num_dropped)
        self.served_models.clear()
        for each in service.models.list_loaded():
            self.served_models.labels(each.name, each.version, each.model.backend).set(1)
        return b"".join([generate_latest(self.registry), *(more() for more in service.extra_metrics)])


@attrs.frozen
class AccessPolicy:
    """Who may ask.

    Args:
        token: What every request must name; None where none is needed.
        hosts: What a request may call the server; None where anything goes. Against pages of other sites whose name
            was made to point here (DNS rebinding).
    """

    token: str | None = attrs.field(default=None, repr=False)
    hosts: tuple[str, ...] | None = LOOPBACK

    def check(self, path: str, method: str, headers: Headers) -> None:
        """See that a request may be answered.

        Raises:
            RequestError: It comes from another site's page, or does not name the token.
        """
        if self.hosts is not None and _hostname(headers.get("host", "")) not in self.hosts:
            raise RequestError(403, "Host: this server answers to " + ", ".join(self.hosts))
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and _netloc(origin) != headers.get("host"):
            raise RequestError(403, "Origin: pages of other sites may not ask")
        if (
            self.token is not None
            and path not in _PUBLIC_PATHS
            and not self._has_token(headers.get("authorization", ""))
        ):
            scheme = 'Basic realm="tuneforge", charset="UTF-8"'
            raise RequestError(
                401, "Authorization: the token is needed (Bearer, or as a password)", {"WWW-Authenticate": scheme}
            )

    def _has_token(self, authorization: str) -> bool:
        """Compare in constant time."""
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
    """What every request passes: it gets a number, is checked, timed and counted, and its errors become JSON.

    Args:
        app: What answers.
        access: Who may ask.
        metrics: What is counted.
        max_header_bytes: Largest head of a request.
    """

    def __init__(self, app: ASGIApp, access: AccessPolicy, metrics: ServerMetrics, max_header_bytes: int) -> None:
        self._app, self._access, self._metrics, self._max_header_bytes = app, access, metrics, max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, request_id, status = time.perf_counter(), uuid.uuid4().hex, 500
        scope.setdefault("state", {})["id"] = request_id

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > self._max_header_bytes:
                raise RequestError(431, "the head of the request is too large")
            self._access.check(scope["path"], scope["method"], Headers(scope=scope))
            await self._app(scope, receive, numbered)
        except RequestError as error:
            await _error_response(error)(scope, receive, numbered)
        except Exception:
            LOG.exception("request %s failed: a defect of tuneforge or of a plugin", request_id)
            defect = RequestError(500, f"a defect of the server; its log has more under {request_id}")
            await _error_response(defect)(scope, receive, numbered)
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
    """The ASGI application that serves models; every model is loaded and checked when this returns.

    Args:
        sources: Where the models come from.
        limits: Bounds.
        access: Who may ask; by default who calls it by a name of this machine.
        backend: `auto`, or one that every model has a form for.
        device_name: Where torch computes.
        poll_interval_s: Seconds between two looks at the champions' pointers.
        request_log: Where answered requests are kept.
        extra_routes: What adds routes, given the service; its `request_logger.flush()` waits until answered requests
            are kept.
        discover: Gives the sources that there are now; one with a name that is new is served too.

    Raises:
        TuneforgeError: A model cannot be loaded, or disagrees with its recorded answers.
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
        LOG.info("stopped: %d request(s) answered", metrics.num_responses)

    return lifespan


def _route_template(scope: Scope) -> str:
    """The path with the names of its parameters, so that there are few of them; `other` where nothing answers it."""
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
    """An unknown path or method."""
    assert isinstance(error, HTTPException)
    what = {404: "there is no such path; see /docs", 405: "the method does not fit the path; see /docs"}
    return JSONResponse({"error": what.get(error.status_code, error.detail)}, error.status_code, error.headers)


def _hostname(host: str) -> str | None:
    """The name in a Host header, without the port; None of a malformed one."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
