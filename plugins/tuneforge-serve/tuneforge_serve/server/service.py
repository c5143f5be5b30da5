"""A tuned model behind HTTP: the Open Inference Protocol for programs, `/predict` and a page for people.

A request passes through the files in this order: `server` (connections), `app` (who may ask, times, counts), `bounds`
(bodies), `people` or `protocol` (what is asked), `models` (which version answers), `batches` (the forward pass).
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from tuneforge.errors import MissingDependencyError, UsageError
from tuneforge_serve.server.limits import Limits as Limits

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""What this machine calls itself."""

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
_MIN_TOKEN_LENGTH = 8


@attrs.frozen
class RequestLogConfig:
    """What is kept of requests and answers.

    Args:
        path: The file of records.
        sample_rate: Share of the requests, 0 to 1.
        max_mb: Most megabytes of the file.
    """

    path: Path
    sample_rate: float = 1.0
    max_mb: float = 256.0


def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    token: str | None = None,
    insecure: bool = False,
    backend: str = "auto",
    device_name: str = "auto",
    poll_interval_s: float = 0.5,
    request_log: RequestLogConfig | None = None,
    on_started: Callable[[str, list[dict[str, Any]]], None] = lambda url, models: None,
) -> None:
    """Serve models until SIGINT or SIGTERM comes; everything that was accepted is answered on return.

    Args:
        path: A finished run, a bundle, a store, or a model of a store.
        host: Address to listen at.
        port: 0 takes a free one.
        limits: Bounds on what requests may cost.
        token: What every request must name.
        insecure: Listen where others can reach it without a token.
        backend: `torch`, `onnxruntime` or another; `auto` measures which is faster.
        device_name: Where torch computes.
        poll_interval_s: Seconds between two looks at a store's champion.
        request_log: Keep answered requests, and take labels for them.
        on_started: Is called once connections are accepted, with the address and with each model's name, version and
            backend.

    Raises:
        MissingDependencyError: The packages of the extra `serve` are not installed.
        UsageError: Others could ask without a token, or there is no such address here.
        TryAgainError: The port is taken.
        FolderError: There is no model, or it is broken.
    """
    require_packages()
    _require_token(host, token, insecure=insecure)
    app_options = {"backend": backend, "device_name": device_name, "poll_interval_s": poll_interval_s}
    _run(Path(path), host, port, limits or Limits(), token, request_log, on_started, app_options)


def _run(
    path: Path,
    host: str,
    port: int,
    limits: Limits,
    token: str | None,
    request_log: RequestLogConfig | None,
    on_started: Callable[[str, list[dict[str, Any]]], None],
    app_options: dict[str, Any],
) -> None:
    """Serve until a signal comes; `app_options` is what `create_app` takes as it is."""
    from tuneforge_serve.feedback.request_log import RequestLog
    from tuneforge_serve.server.app import AccessPolicy, create_app
    from tuneforge_serve.server.http_server import create_server, open_socket
    from tuneforge_serve.server.model_manager import find_model_sources
    from tuneforge_serve.server.routes_feedback import SampledRequestLog, feedback_routes
    from tuneforge_serve.server.threads import limit_to_one_thread

    with contextlib.ExitStack() as opened:
        opened.callback(limit_to_one_thread().restore_original_limits)
        listener = opened.enter_context(open_socket(host, port))
        log = opened.enter_context(RequestLog(request_log.path, max_mb=request_log.max_mb)) if request_log else None
        app = create_app(
            find_model_sources(path),
            limits=limits,
            access=AccessPolicy(token=token, hosts=(*LOOPBACK, host) if is_local(host) else None),
            request_log=SampledRequestLog(log, request_log.sample_rate) if request_log and log else None,
            extra_routes=[feedback_routes(log)] if log else [],
            discover=lambda: find_model_sources(path),
            **app_options,
        )
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

        def announce() -> None:
            on_started(url, [model.about for model in app.state.service.models.list_loaded()])

        create_server(app, limits, on_started=announce).run(sockets=[listener])


def require_packages() -> None:
    """See that the packages of the extra are there.

    Raises:
        MissingDependencyError: One is not.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"{', '.join(missing)} is not installed", where="tuneforge serve", fix="pip install 'tuneforge[serve]'"
        )


def is_local(host: str) -> bool:
    """True where nobody but this machine can reach an address."""
    return host in LOOPBACK or host.startswith("127.")


def _require_token(host: str, token: str | None, *, insecure: bool) -> None:
    if token is not None and len(token) < _MIN_TOKEN_LENGTH:
        raise UsageError(f"the token is shorter than {_MIN_TOKEN_LENGTH} characters", fix="use a long random one")
    if not is_local(host) and token is None and not insecure:
        raise UsageError(
            f"'{host}' can be reached by others",
            where="--host",
            why="whoever reaches the server could ask it and unload its models",
            fix="give a token (--token-file, or TUNEFORGE_TOKEN), or say --insecure",
        )
