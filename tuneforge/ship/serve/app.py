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

from tuneforge.ship.serve import LOOPBACK
from tuneforge.ship.serve.batches import Batches, Computed
from tuneforge.ship.serve.bounds import Limits, Refusal
from tuneforge.ship.serve.desk import Desk
from tuneforge.ship.serve.kept import Keeper, Keeps
from tuneforge.ship.serve.models import Models, Source
from tuneforge.ship.serve.people import People
from tuneforge.ship.serve.protocol import Protocol

LOG = logging.getLogger("tuneforge.serve")
_OPEN = ("/v2/health/live", "/v2/health/ready")  # what probes ask without a token
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Routes = Callable[[Desk], Sequence[BaseRoute]]
"""What adds routes to the application, such as those for feedback."""


class Counts:
    """What is counted, for `/metrics`; a registry of its own, so that several servers fit into one process."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("tuneforge_requests", "Answers.", ["path", "status"], registry=own)
        self.seconds = _histogram("request_seconds", "From the head of a request to its answer.", _SECONDS, own)
        self.waited = _histogram("wait_seconds", "From a decoded request to its forward pass.", _SECONDS, own)
        self.forward = _histogram("forward_seconds", "A forward pass.", _SECONDS, own)
        self.batch_rows = _histogram("batch_rows", "Rows of a forward pass.", _ROWS, own)
        self.queue_rows = Gauge("tuneforge_queue_rows", "Rows that wait.", registry=own)
        self.dropped = Gauge("tuneforge_dropped", "Requests that should have been kept and were not.", registry=own)
        self.loads = Counter("tuneforge_loads", "Attempts to load a version.", ["model", "result"], registry=own)
        labels = ["model", "version", "backend"]
        self.served = Gauge("tuneforge_model", "1 for the version that answers.", labels, registry=own)
        self.answered = 0

    def batch(self, done: Sequence[Computed]) -> None:
        """Count the results of a forward pass."""
        self.batch_rows.observe(done[0].rows)
        self.forward.observe(done[0].forward_s)
        for each in done:
            self.waited.observe(each.waited_s)

    def load(self, model: str, done: bool) -> None:
        """Count an attempt to load."""
        self.loads.labels(model, "taken over" if done else "refused").inc()

    def text(self, desk: Desk) -> bytes:
        """Everything, as Prometheus reads it."""
        self.queue_rows.set(desk.batches.rows)
        self.dropped.set(desk.keeper.dropped)
        self.served.clear()
        for each in desk.models.all_current():
            self.served.labels(each.name, each.version, each.servable.backend).set(1)
        return b"".join([generate_latest(self.registry), *(more() for more in desk.metrics)])


@attrs.frozen
class Access:
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
            Refusal: It comes from another site's page, or does not name the token.
        """
        if self.hosts is not None and _hostname(headers.get("host", "")) not in self.hosts:
            raise Refusal(403, "Host: this server answers to " + ", ".join(self.hosts))
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and _netloc(origin) != headers.get("host"):
            raise Refusal(403, "Origin: pages of other sites may not ask")
        if self.token is not None and path not in _OPEN and not self._knows(headers.get("authorization", "")):
            scheme = 'Basic realm="tuneforge", charset="UTF-8"'
            raise Refusal(
                401, "Authorization: the token is needed (Bearer, or as a password)", {"WWW-Authenticate": scheme}
            )

    def _knows(self, authorization: str) -> bool:
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


class Door:
    """What every request passes: it gets a number, is checked, timed and counted, and its errors become JSON.

    Args:
        app: What answers.
        access: Who may ask.
        counts: What is counted.
        head_bytes: Largest head of a request.
    """

    def __init__(self, app: ASGIApp, access: Access, counts: Counts, head_bytes: int) -> None:
        self._app, self._access, self._counts, self._head_bytes = app, access, counts, head_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, identity, status = time.perf_counter(), uuid.uuid4().hex, 500
        scope.setdefault("state", {})["id"] = identity

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = identity
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > self._head_bytes:
                raise Refusal(431, "the head of the request is too large")
            self._access.check(scope["path"], scope["method"], Headers(scope=scope))
            await self._app(scope, receive, numbered)
        except Refusal as refusal:
            await _refused(refusal)(scope, receive, numbered)
        except Exception:
            LOG.exception("request %s failed: a defect of tuneforge or of a plugin", identity)
            defect = Refusal(500, f"a defect of the server; its log has more under {identity}")
            await _refused(defect)(scope, receive, numbered)
        finally:
            path = _template(scope)
            self._counts.answered += 1
            self._counts.requests.labels(path, str(status)).inc()
            self._counts.seconds.observe(time.perf_counter() - began)


def application(
    sources: Sequence[Source],
    *,
    limits: Limits | None = None,
    access: Access | None = None,
    backend: str = "auto",
    device_name: str = "auto",
    watch_s: float = 0.5,
    records: Keeps | None = None,
    further: Sequence[Routes] = (),
    look: Callable[[], Sequence[Source]] = lambda: (),
) -> Starlette:
    """The ASGI application that serves models; every model is loaded and checked when this returns.

    Args:
        sources: Where the models come from.
        limits: Bounds.
        access: Who may ask; by default who calls it by a name of this machine.
        backend: `auto`, or one that every model has a form for.
        device_name: Where torch computes.
        watch_s: Seconds between two looks at the champions' pointers.
        records: Where answered requests are kept.
        further: What adds routes, given the desk; its `keeper.flush()` waits until answered requests are kept.
        look: Gives the sources that there are now; one with a name that is new is served too.

    Raises:
        TuneforgeError: A model cannot be loaded, or disagrees with its recorded answers.
    """
    limits, access, counts = limits or Limits(), access or Access(), Counts()
    batches = _batches(limits, counts)
    models = Models(
        list(sources),
        backend=backend,
        device_name=device_name,
        batch_rows=limits.batch_rows,
        swapped=counts.load,
        look=look,
        compute=lambda work: batches.aside(work).result(),
    )
    try:
        for source in sources:
            models.load(source.name)
    except BaseException:
        batches.close()
        raise
    desk = Desk(models, limits, batches, Keeper(records))
    app = Starlette(
        routes=_routes(desk, counts, further),
        middleware=[Middleware(Door, access=access, counts=counts, head_bytes=limits.head_bytes)],
        exception_handlers={Refusal: _on_refusal, HTTPException: _on_http},
        lifespan=_lifespan(desk, counts, watch_s),
    )
    app.router.redirect_slashes = False
    app.state.desk = desk
    return app


def _batches(limits: Limits, counts: Counts) -> Batches:
    bounds = {"batch_rows": limits.batch_rows, "queue_rows": limits.queue_rows}
    return Batches(**bounds, wait_s=limits.wait_s, seen=counts.batch)


def _routes(desk: Desk, counts: Counts, further: Sequence[Routes]) -> list[BaseRoute]:
    async def metrics(request: Request) -> Response:
        return Response(counts.text(desk), media_type="text/plain; version=0.0.4")

    own = [*Protocol(desk).routes(), *People(desk).routes(), Route("/metrics", metrics)]
    return [*own, *(route for add in further for route in add(desk))]


def _lifespan(desk: Desk, counts: Counts, watch_s: float) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        desk.models.watch(watch_s)
        yield
        desk.close()
        LOG.info("stopped: %d request(s) answered", counts.answered)

    return lifespan


def _template(scope: Scope) -> str:
    """The path with the names of its parameters, so that there are few of them; `other` where nothing answers it."""
    if "endpoint" not in scope:
        return "other"
    values = {value: name for name, value in scope["path_params"].items()}
    return "/".join(f"{{{values[part]}}}" if part in values else part for part in scope["path"].split("/"))


def _histogram(name: str, about: str, buckets: Sequence[float], registry: CollectorRegistry) -> Histogram:
    return Histogram(f"tuneforge_{name}", about, buckets=buckets, registry=registry)


def _refused(refusal: Refusal) -> Response:
    return JSONResponse({"error": refusal.message}, refusal.status, refusal.headers)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _refused(error)


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
