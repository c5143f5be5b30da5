"""Serve models over HTTP until a signal arrives.

A request passes through these files: `http_server` (connections), `app` (access, metrics, errors), `request_body`
(bodies), `routes_predict` or `routes_v2` (parsing), `model_manager` (the version of the model), `dynamic_batcher` (the
forward pass), `request_logger` (the request log).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from tuneforge.errors import UsageError
from tuneforge_serve.server.limits import Limits

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine."""

_MIN_TOKEN_LENGTH = 8


@attrs.frozen
class RequestLogConfig:
    """Settings of the request log.

    Args:
        path: The file.
        sample_rate: Fraction of the requests to log, 0 to 1.
        max_mb: Largest size of the file in MB.
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
    """Serve models until SIGINT or SIGTERM; every accepted request is finished when this returns.

    Args:
        path: A finished run, a bundle, a registry, or a model of a registry.
        host: The address to listen on.
        port: 0 picks a free port.
        limits: Limits of the server.
        token: A token that every request has to contain.
        insecure: Accept requests from other machines without a token.
        backend: `torch`, `onnxruntime` or another one; `auto` measures which is faster.
        device_name: The device that torch computes on.
        poll_interval_s: Seconds between two checks for a new champion in the registry.
        request_log: Log requests, and accept labels for them; None logs nothing.
        on_started: Called once connections are accepted, with the address and with each model's name, version and
            backend.

    Raises:
        UsageError: Other machines could send requests without a token, or this machine has no such address.
        TryAgainError: The port is in use.
        FolderError: There is no model, or it is broken.
    """
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
    """Serve until a signal arrives; `app_options` are passed on to `create_app`."""
    from tuneforge_serve.feedback.request_log import RequestLog
    from tuneforge_serve.server.app import AccessPolicy, create_app
    from tuneforge_serve.server.http_server import create_server, open_socket
    from tuneforge_serve.server.model_manager import find_model_sources
    from tuneforge_serve.server.routes_feedback import SampledRequestLog, feedback_routes
    from tuneforge_serve.server.threads import limit_to_one_thread

    with contextlib.ExitStack() as stack:
        stack.callback(limit_to_one_thread().restore_original_limits)
        listener = stack.enter_context(open_socket(host, port))
        log = stack.enter_context(RequestLog(request_log.path, max_mb=request_log.max_mb)) if request_log else None
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


def is_local(host: str) -> bool:
    """Return True if only this machine can reach the address."""
    return host in LOOPBACK or host.startswith("127.")


def _require_token(host: str, token: str | None, *, insecure: bool) -> None:
    if token is not None and len(token) < _MIN_TOKEN_LENGTH:
        raise UsageError(f"the token is shorter than {_MIN_TOKEN_LENGTH} characters", fix="use a long random token")
    if not is_local(host) and token is None and not insecure:
        raise UsageError(
            f"other machines can reach '{host}'",
            where="--host",
            why="everyone who can reach the server could send requests and unload its models",
            fix="set a token (--token-file or TUNEFORGE_TOKEN), or pass --insecure",
        )
