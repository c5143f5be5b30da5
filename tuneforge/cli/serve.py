"""`tuneforge serve`: models behind HTTP."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tuneforge.ship.serve.app import Access

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
    type=click.FloatRange(0),
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
    type=click.FloatRange(0, min_open=True),
    help="Largest body of a request.",
)
@click.option(
    "--max-connections", default=256, show_default=True, type=click.IntRange(1), help="Connections at a time."
)
@click.option(
    "--timeout",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Seconds that an answer may take.",
)
@click.option(
    "--body-timeout",
    default=20.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Seconds that a body may take to arrive.",
)
@click.option(
    "--head-timeout",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Seconds that the head of a request may take to arrive.",
)
@click.option(
    "--watch-s",
    default=0.5,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Seconds between two looks at a store's champion.",
)
@click.option(
    "--records", type=click.Path(path_type=Path), metavar="FILE", help="Keep requests and answers in this file."
)
@click.option(
    "--records-mb", default=256.0, show_default=True, type=click.FloatRange(1), help="Most megabytes of records."
)
@click.option(
    "--sample", default=1.0, show_default=True, type=click.FloatRange(0, 1), help="Share of the requests to keep."
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Holds the token that every request must name; or set {_TOKEN}.",
)
@click.option("--insecure", is_flag=True, help="Listen at other addresses than this machine's own without a token.")
@click.option("--json", "as_json", is_flag=True, help="Print the address as one JSON object.")
def serve(path: Path, host: str, port: int, **values: Any) -> int:
    """Serve a finished run, a bundle, or the champions of a store.

    Open Inference Protocol v2 at /v2, POST /predict for raw inputs, a page to try it at /, the API at /docs.
    """
    _require_packages()
    access = _access(host, values["token_file"], insecure=values["insecure"])
    from tuneforge.ship.records import Records
    from tuneforge.ship.serve import Limits
    from tuneforge.ship.serve.app import application
    from tuneforge.ship.serve.feedback import Sampled, feedback
    from tuneforge.ship.serve.models import sources_of
    from tuneforge.ship.serve.server import listening, server_of

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("tuneforge").setLevel(logging.INFO)
    limits = Limits(
        body_bytes=int(values["max_body_mb"] * 2**20),
        batch_rows=values["max_batch"],
        queue_rows=values["max_queue"],
        wait_s=values["max_wait_ms"] / 1000,
        request_s=values["timeout"],
        body_s=values["body_timeout"],
        head_s=values["head_timeout"],
        connections=values["max_connections"],
    )
    listener = listening(host, port)
    records = None if values["records"] is None else Records(values["records"], cap_mb=values["records_mb"])
    app = application(
        sources_of(path),
        limits=limits,
        access=access,
        backend=values["backend"],
        device_name=values["device"],
        watch_s=values["watch_s"],
        records=None if records is None else Sampled(records, values["sample"]),
        further=[] if records is None else [feedback(records)],
    )

    def announce() -> None:
        number = listener.getsockname()[1]
        url = f"http://{f'[{host}]' if ':' in host else host}:{number}"
        models = [
            {"name": each.name, "version": each.version, "backend": each.servable.backend}
            for each in app.state.desk.models.all_current()
        ]
        if values["as_json"]:
            click.echo(json.dumps({"url": url, "host": host, "port": number, "pid": os.getpid(), "models": models}))
        else:
            for each in models:
                click.echo(f"serving {each['name']}, version {each['version']}, by {each['backend']}")
            click.echo(f"page: {url}/   API: {url}/docs   stop with Ctrl-C")

    server_of(app, limits, started=announce).run(sockets=[listener])
    if records is not None:
        records.close()
    return 0


def _require_packages() -> None:
    """See that the packages of the extra are there.

    Raises:
        MissingDependencyError: One is not.
    """
    import importlib.util

    from tuneforge.errors import MissingDependencyError

    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"{', '.join(missing)} is not installed", where="tuneforge serve", fix="pip install 'tuneforge[serve]'"
        )


def _access(host: str, token_file: Path | None, *, insecure: bool) -> Access:
    """Who may ask: everybody on this machine, and elsewhere who knows the token.

    Raises:
        UsageError: Others could ask without a token, or the token cannot be read.
    """
    from tuneforge.errors import UsageError
    from tuneforge.ship.serve.app import LOOPBACK, Access

    token = os.environ.get(_TOKEN)
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise UsageError("the token cannot be read", where="--token-file", fix="check the path") from None
    if token is not None and len(token) < 8:
        raise UsageError("the token is shorter than 8 characters", where=_TOKEN, fix="use a long random one")
    local = host in LOOPBACK or host.startswith("127.")
    if not local and token is None and not insecure:
        raise UsageError(
            f"'{host}' can be reached by others",
            where="--host",
            why="whoever reaches the server could ask it and unload its models",
            fix=f"give a token (--token-file, or {_TOKEN}), or say --insecure",
        )
    return Access(token=token, hosts=(*LOOPBACK, host) if local else None)
