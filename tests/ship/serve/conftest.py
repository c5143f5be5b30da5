"""Small tuned models, a server for them in a thread, and a plain client."""

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

import tuneforge as tf
from tuneforge.engine.state.folder import write_json
from tuneforge.ship.bundles.bundle import CHAMPION
from tuneforge.ship.bundles.export import export
from tuneforge.ship.serve import Limits
from tuneforge.ship.serve.app import application
from tuneforge.ship.serve.models import sources_of
from tuneforge.ship.serve.server import listening, server_of


@attrs.frozen
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@attrs.frozen(eq=False)
class Served:
    host: str
    port: int
    app: Any
    server: Any

    @property
    def desk(self) -> Any:
        return self.app.state.desk

    def connect(self, timeout: float = 20) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        return ask(self.host, self.port, method, path, body, **headers)


def ask(host: str, port: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """One request on a connection of its own; anything but bytes goes as JSON."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and not isinstance(body, bytes):
        body, given = json.dumps(body).encode(), {"Content-Type": "application/json", **given}
    with closing(http.client.HTTPConnection(host, port, timeout=20)) as connection:
        connection.request(method, path, body, given)
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


@contextmanager
def served(path: Path, *, limits: Limits | None = None, **given: Any) -> Iterator[Served]:
    limits = limits or Limits()
    app = application(sources_of(path), limits=limits, **given)
    listener, up = listening("127.0.0.1", 0), threading.Event()
    port = listener.getsockname()[1]
    server = server_of(app, limits, started=up.set)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    assert up.wait(30)
    try:
        yield Served("127.0.0.1", port, app, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def serving():
    return served


def make_table(path: Path, *, seed: int, rows: int = 120) -> Path:
    """Rows of two numbers and a word; the class follows from them."""
    rng = np.random.default_rng(seed)
    lines = ["size,weight,colour,kind"]
    for _ in range(rows):
        size, weight = rng.normal(size=2)
        colour = ("red", "blue")[int(rng.integers(2))]
        kind = "apple" if size + 2 * (colour == "red") > weight + 1 else "plum"
        lines.append(f"{size:.3f},{weight:.3f},{colour},{kind}")
    path.write_text("\n".join(lines) + "\n")
    return path


def tune_table(folder: Path, *, seed: int) -> Path:
    """A finished run on such rows."""
    data = tf.use("table-csv", path=make_table(folder.parent / f"{folder.name}.csv", seed=7), target="kind")
    strategy = tf.use("full", epochs=3, lr=1e-2)
    return tf.Engine(data=data, model="mlp", strategy=strategy, seed=seed, page=False, out=folder).run().folder


@pytest.fixture(scope="session")
def table_run(tmp_path_factory) -> Path:
    return tune_table(tmp_path_factory.mktemp("table") / "fruit", seed=1)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """A digit network whose head was solved on a few real digits; good enough to read a clear one."""
    data = tf.use("digits", per_class=60, other_share=0.0)
    out = tmp_path_factory.mktemp("digits") / "digits"
    return tf.Engine(data=data, strategy=[tf.Fit("head")], page=False, out=out).run().folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory, table_run) -> list[Path]:
    """Two bundles that answer differently."""
    folder = tmp_path_factory.mktemp("bundles")
    runs = [table_run, tune_table(folder / "other", seed=2)]
    return [export(run, to=("safetensors",), out=folder / f"bundle{n}", name="fruit") for n, run in enumerate(runs)]


@attrs.define(eq=False)
class Store:
    """A store as `promote` leaves it: numbered versions, and a pointer that is replaced whole."""

    path: Path
    bundles: list[Path]
    count: int = 0

    def add(self) -> Path:
        """The next version, without the pointer: the two bundles in turn."""
        self.count += 1
        return Path(shutil.copytree(self.bundles[self.count % 2], self.path / "fruit" / str(self.count)))

    def point(self, version: int | None = None) -> None:
        write_json(self.path / "fruit" / CHAMPION, {"version": self.count if version is None else version})


@pytest.fixture
def store(tmp_path, bundles) -> Store:
    (tmp_path / "store" / "fruit").mkdir(parents=True)
    made = Store(tmp_path / "store", bundles)
    made.add()
    made.point()
    return made
