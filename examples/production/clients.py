"""A server as a process, and clients that ask it; the standard library is enough."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from production.worlds import Sample


class Client:
    """Asks a server, one request at a time."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: bytes, kind: str) -> Any:
        """The JSON that the server answers."""
        with urlopen(Request(self.url + path, body, {"Content-Type": kind}), timeout=30) as answer:
            return json.load(answer)

    def predict(self, body: bytes) -> dict[str, Any]:
        """The prediction for an image."""
        found: dict[str, Any] = self.post("/predict", body, "image/png")
        return found

    def label(self, request: str, name: str) -> None:
        """Say which class was right."""
        self.post("/feedback", json.dumps({"id": request, "class": name}).encode(), "application/json")

    def accuracy(self, samples: list[Sample]) -> float:
        """The share of samples that is answered right."""
        return sum(self.predict(body)["class"] == name for body, name in samples) / len(samples)


class Busy(threading.Thread):
    """A client that asks without a pause, and counts what is not answered."""

    def __init__(self, client: Client, samples: list[Sample]) -> None:
        super().__init__(daemon=True)
        self.client, self.samples = client, samples
        self.asked = self.lost = 0
        self.over = threading.Event()
        self.versions: list[str] = []

    def __enter__(self) -> Busy:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        """Ask until it is over."""
        while not self.over.wait(0.05):
            body, _ = self.samples[self.asked % len(self.samples)]
            self.asked += 1
            try:
                version = self.client.predict(body)["version"]
            except OSError:
                self.lost += 1
                continue
            if version not in self.versions:
                self.versions.append(version)


@contextlib.contextmanager
def serving(store: Path, records: Path) -> Iterator[str]:
    """The address of a server of a store, which keeps its requests and is stopped at the end."""
    arguments = ["serve", str(store), "--port", "0", "--records", str(records), "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "tuneforge", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield str(json.loads(process.stdout.readline())["url"])
        finally:
            process.terminate()


def command(*arguments: Any, good: tuple[int, ...] = (0,)) -> str:
    """What a command of tuneforge prints; an exit code that is not among the good ones ends it all."""
    done = subprocess.run([sys.executable, "-m", "tuneforge", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode not in good:
        raise SystemExit(f"tuneforge {' '.join(map(str, arguments))}:\n{done.stdout}{done.stderr}")
    return done.stdout
