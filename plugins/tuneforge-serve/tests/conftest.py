"""A server in a thread, a plain HTTP client, small fine-tuned models, and a registry."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from bundles import digits
from shared_fixtures import own_cache, plant, tune
from tuneforge_serve import RequestLog
from tuneforge_serve.registry.model_registry import CHAMPION
from tuneforge_serve.server.limits import Limits

import tuneforge as tf
from tuneforge.exporting import export, write_json


@attrs.frozen
class HTTPResponse:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@attrs.frozen(eq=False)
class RunningServer:
    host: str
    port: int
    app: Any
    server: Any

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def service(self) -> Any:
        return self.app.state.service

    def connect(self, timeout: float = 20) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> HTTPResponse:
        """Send one request on a new connection; any body but bytes is sent as JSON."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body, named = json.dumps(body).encode(), {"Content-Type": "application/json", **named}
        with closing(self.connect()) as connection:
            connection.request(method, path, body, named)
            response = connection.getresponse()
            lowered = {name.lower(): value for name, value in response.getheaders()}
            return HTTPResponse(response.status, lowered, response.read())


@contextmanager
def run_server(path: Path, *, limits: Limits | None = None, **options: Any) -> Iterator[RunningServer]:
    from tuneforge_serve.server.app import create_app
    from tuneforge_serve.server.http_server import create_server, open_socket
    from tuneforge_serve.server.model_manager import find_model_sources

    limits = limits or Limits()
    app = create_app(find_model_sources(path), limits=limits, discover=lambda: find_model_sources(path), **options)
    listener, started = open_socket("127.0.0.1", 0), threading.Event()
    port = listener.getsockname()[1]
    server = create_server(app, limits, on_started=started.set)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    assert started.wait(30)
    try:
        yield RunningServer("127.0.0.1", port, app, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def serving():
    return run_server


@pytest.fixture
def request_log(tmp_path: Path) -> Iterator[RequestLog]:
    with RequestLog(tmp_path / "requests.db") as log:
        yield log


def make_table(path: Path, *, seed: int, rows: int = 120) -> Path:
    """Write rows of two numbers and a word that determine the class."""
    rng = np.random.default_rng(seed)
    lines = ["size,weight,color,kind"]
    for _ in range(rows):
        size, weight = rng.normal(size=2)
        color = ("red", "blue")[int(rng.integers(2))]
        kind = "apple" if size + 2 * (color == "red") > weight + 1 else "plum"
        lines.append(f"{size:.3f},{weight:.3f},{color},{kind}")
    path.write_text("\n".join(lines) + "\n")
    return path


def train_on_table(run_dir: Path, *, seed: int) -> Path:
    """Train on such rows, and return the run directory."""
    data = tf.use("table-csv", path=make_table(run_dir.parent / f"{run_dir.name}.csv", seed=7), target="kind")
    strategy = tf.use("full", epochs=3, lr=1e-2)
    return tf.Engine(data=data, model="mlp", strategy=strategy, seed=seed, page=False, out=run_dir).run().run_dir


@pytest.fixture(scope="session")
def table_run(tmp_path_factory) -> Path:
    return train_on_table(tmp_path_factory.mktemp("table") / "fruit", seed=1)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """A digit model whose head was fitted to a few real digits; it recognizes a clear one."""
    return digits(tmp_path_factory.mktemp("digits") / "digits", tf.HeadFit("head"), per_class=60).run_dir


@pytest.fixture(scope="session")
def bundles(tmp_path_factory, table_run) -> list[Path]:
    """Two bundles with different predictions."""
    path = tmp_path_factory.mktemp("bundles")
    runs = [table_run, train_on_table(path / "other", seed=2)]
    return [export(run, to=("safetensors",), out=path / f"bundle{n}", name="fruit") for n, run in enumerate(runs)]


@attrs.define(eq=False)
class RegistryDir:
    """A registry as `promote` leaves it: numbered versions, and a pointer that is replaced atomically."""

    path: Path
    bundles: list[Path]
    num_versions: int = 0

    def add(self, name: str = "fruit") -> Path:
        """Add the next version, alternately one of the two bundles, without making it the champion."""
        self.num_versions += 1
        bundle = self.bundles[self.num_versions % 2]
        return Path(shutil.copytree(bundle, self.path / name / str(self.num_versions)))

    def set_champion(self, version: int | None = None, name: str = "fruit") -> None:
        write_json(self.path / name / CHAMPION, {"version": self.num_versions if version is None else version})


@pytest.fixture
def registry_dir(tmp_path, bundles) -> RegistryDir:
    (tmp_path / "registry" / "fruit").mkdir(parents=True)
    registry = RegistryDir(tmp_path / "registry", bundles)
    registry.add()
    registry.set_champion()
    return registry


__all__ = ["own_cache", "plant", "tune"]
