"""`tuneforge serve`: models behind HTTP."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import click

from tuneforge.plugin.parameter_types import FiniteFloatRange

_TOKEN = "TUNEFORGE_TOKEN"  # noqa: S105 - the name of a variable


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="RUN|BUNDLE|STORE")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--backend", default="auto", show_default=True, help="torch or onnxruntime; auto measures which is faster."
)
@click.option("--device", default="auto", show_default=True, help="Where torch computes.")
@click.option("--max-batch", default=32, show_default=True, type=click.IntRange(1), help="Rows of one forward pass.")
@click.option(
    "--max-wait-ms",
    default=5.0,
    show_default=True,
    type=FiniteFloatRange(0),
    help="Longest wait for company that is on its way.",
)
@click.option(
    "--max-queue",
    default=512,
    show_default=True,
    type=click.IntRange(1),
    help="Rows that may wait; more are told to come back.",
)
@click.option(
    "--max-body-mb",
    default=16.0,
    show_default=True,
    type=FiniteFloatRange(0, min_open=True),
    help="Largest body of a request.",
)
@click.option(
    "--max-connections", default=256, show_default=True, type=click.IntRange(1), help="Connections at a time."
)
@click.option(
    "--timeout",
    default=30.0,
    show_default=True,
    type=FiniteFloatRange(0, min_open=True),
    help="Seconds that an answer may take.",
)
@click.option(
    "--body-timeout",
    default=20.0,
    show_default=True,
    type=FiniteFloatRange(0, min_open=True),
    help="Seconds that a body may take to arrive.",
)
@click.option(
    "--head-timeout",
    default=10.0,
    show_default=True,
    type=FiniteFloatRange(0, min_open=True),
    help="Seconds that the head of a request may take to arrive.",
)
@click.option(
    "--watch-s",
    default=0.5,
    show_default=True,
    type=FiniteFloatRange(0, min_open=True),
    help="Seconds between two looks at a store's champion.",
)
@click.option(
    "--records",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep answers in this file, and take labels (/feedback, /review, /monitoring).",
)
@click.option(
    "--records-mb", default=256.0, show_default=True, type=FiniteFloatRange(1), help="Most megabytes of records."
)
@click.option(
    "--sample", default=1.0, show_default=True, type=FiniteFloatRange(0, 1), help="Share of the requests to keep."
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Holds the token that every request must name; or set {_TOKEN}.",
)
@click.option("--insecure", is_flag=True, help="Listen at other addresses than this machine's own without a token.")
@click.option("--json", "as_json", is_flag=True, help="Print the address as one JSON object.")
def serve(path: Path, host: str, port: int, **values: Any) -> None:
    """Serve a finished run, a bundle, or the champions of a store.

    Open Inference Protocol v2 at /v2, POST /predict for raw inputs, a page to try it at /, the API at /docs.
    """
    from tuneforge_serve.server.service import Limits, RequestLogConfig, require_packages
    from tuneforge_serve.server.service import serve as serve_models

    require_packages()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("tuneforge").setLevel(logging.INFO)

    def announce(url: str, models: list[dict[str, Any]]) -> None:
        if values["as_json"]:
            click.echo(json.dumps({"url": url, "pid": os.getpid(), "models": models}))
            return
        for each in models:
            click.echo(f"serving {each['name']}, version {each['version']}, by {each['backend']}")
        click.echo(f"page: {url}/   API: {url}/docs   stop with Ctrl-C")

    records = values["records"]
    serve_models(
        path,
        host=host,
        port=port,
        limits=Limits(
            max_body_bytes=int(values["max_body_mb"] * 2**20),
            max_batch_size=values["max_batch"],
            max_queue_size=values["max_queue"],
            max_wait_s=values["max_wait_ms"] / 1000,
            request_timeout_s=values["timeout"],
            body_timeout_s=values["body_timeout"],
            header_timeout_s=values["head_timeout"],
            max_connections=values["max_connections"],
        ),
        token=_read_token(values["token_file"]),
        insecure=values["insecure"],
        backend=values["backend"],
        device_name=values["device"],
        poll_interval_s=values["watch_s"],
        request_log=None if records is None else RequestLogConfig(records, values["sample"], values["records_mb"]),
        on_started=announce,
    )


def _read_token(file: Path | None) -> str | None:
    """The token from a file or from the environment, never from the command line, which other users can see.

    Raises:
        UsageError: The file cannot be read.
    """
    from tuneforge.errors import UsageError

    if file is None:
        return os.environ.get(_TOKEN)
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise UsageError("the token cannot be read", where="--token-file", fix="check the path") from None
