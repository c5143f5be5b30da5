"""`tuneforge serve`: serve models over HTTP."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import click

from tuneforge.plugin import FiniteFloatRange, json_option

_TOKEN_VARIABLE = "TUNEFORGE_TOKEN"  # noqa: S105 - the name of an environment variable


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="RUN|BUNDLE|REGISTRY")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 picks a free port.",
)
@click.option(
    "--backend", default="auto", show_default=True, help="torch or onnxruntime; auto measures which is faster."
)
@click.option("--device", default="auto", show_default=True, help="Device that torch computes on.")
@click.option(
    "--max-batch-size", default=32, show_default=True, type=click.IntRange(1), help="Most samples of a forward pass."
)
@click.option(
    "--max-wait-ms",
    default=5.0,
    show_default=True,
    type=FiniteFloatRange(0),
    help="Longest time a request waits for others to join its batch.",
)
@click.option(
    "--max-queue-size",
    default=512,
    show_default=True,
    type=click.IntRange(1),
    help="Most samples that wait for a forward pass; with more, requests get 503.",
)
@click.option(
    "--max-body-mb",
    default=16.0,
    show_default=True,
    type=FiniteFloatRange(0, min_open=True),
    help="Largest body of a request.",
)
@click.option(
    "--max-connections",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    help="Most connections at a time; with more, requests get 503.",
)
@click.option(
    "--timeout-s",
    default=30.0,
    show_default=True,
    type=FiniteFloatRange(0, min_open=True),
    help="Longest time from a complete request to its prediction, in seconds.",
)
@click.option(
    "--body-timeout-s",
    default=20.0,
    show_default=True,
    type=FiniteFloatRange(0, min_open=True),
    help="Longest time for a body to arrive, in seconds.",
)
@click.option(
    "--poll-interval-s",
    default=0.5,
    show_default=True,
    type=FiniteFloatRange(0, min_open=True),
    help="Seconds between two checks for a new champion in the registry.",
)
@click.option(
    "--request-log",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Log requests to this file, and accept labels (/feedback, /review, /monitoring).",
)
@click.option(
    "--request-log-mb",
    default=256.0,
    show_default=True,
    type=FiniteFloatRange(1),
    help="Largest size of the request log in MB.",
)
@click.option(
    "--sample-rate", default=1.0, show_default=True, type=FiniteFloatRange(0, 1), help="Fraction of requests to log."
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"File with the token that every request needs; or set {_TOKEN_VARIABLE}.",
)
@click.option("--insecure", is_flag=True, help="Accept requests from other machines without a token.")
@json_option("Print the address as one JSON object.")
def serve(path: Path, host: str, port: int, **values: Any) -> None:
    """Serve a finished run, a bundle, or the champions of a registry.

    The server speaks the Open Inference Protocol v2 at /v2. POST /predict takes raw inputs such as image files, the
    page at / lets you try the model, and /docs describes the API. Put a reverse proxy in front of the server if clients
    that you do not trust can reach it: the proxy handles TLS and slow connections.
    """
    from tuneforge_serve import serve as serve_models
    from tuneforge_serve.server.limits import Limits
    from tuneforge_serve.server.service import RequestLogConfig

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("tuneforge").setLevel(logging.INFO)

    def announce(url: str, models: list[dict[str, Any]]) -> None:
        if values["as_json"]:
            click.echo(json.dumps({"url": url, "pid": os.getpid(), "models": models}))
            return
        for each in models:
            click.echo(f"serving {each['name']}, version {each['version']}, backend {each['backend']}")
        click.echo(f"page: {url}/   API: {url}/docs   press Ctrl-C to stop")

    log_path = values["request_log"]
    serve_models(
        path,
        host=host,
        port=port,
        limits=Limits(
            max_body_bytes=int(values["max_body_mb"] * 2**20),
            max_batch_size=values["max_batch_size"],
            max_queue_size=values["max_queue_size"],
            max_wait_s=values["max_wait_ms"] / 1000,
            request_timeout_s=values["timeout_s"],
            body_timeout_s=values["body_timeout_s"],
            max_connections=values["max_connections"],
        ),
        token=_read_token(values["token_file"]),
        insecure=values["insecure"],
        backend=values["backend"],
        device_name=values["device"],
        poll_interval_s=values["poll_interval_s"],
        request_log=log_path and RequestLogConfig(log_path, values["sample_rate"], values["request_log_mb"]),
        on_started=announce,
    )


def _read_token(file: Path | None) -> str | None:
    """Read the token from a file or the environment; never from the command line, which other users can see.

    Raises:
        UsageError: The file cannot be read.
    """
    from tuneforge.errors import UsageError

    if file is None:
        return os.environ.get(_TOKEN_VARIABLE)
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UsageError("the token cannot be read", where="--token-file", fix="check the path") from None
