"""A server process and its clients, with the standard library."""

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

from production.domains import Sample


class Client:
    """Sends requests to a server, one at a time."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: bytes, kind: str) -> Any:
        """Return the JSON of the response."""
        with urlopen(Request(self.url + path, body, {"Content-Type": kind}), timeout=30) as response:
            return json.load(response)

    def predict(self, body: bytes) -> dict[str, Any]:
        """Return the prediction for an image."""
        prediction: dict[str, Any] = self.post("/predict", body, "image/png")
        return prediction

    def label(self, request: str, name: str) -> None:
        """Label a request."""
        self.post("/feedback", json.dumps({"id": request, "class": name}).encode(), "application/json")

    def accuracy(self, samples: list[Sample]) -> float:
        """Return the accuracy on samples."""
        return sum(self.predict(body)["class"] == name for body, name in samples) / len(samples)


class BackgroundClient(threading.Thread):
    """A client that sends requests continuously, and counts failures."""

    def __init__(self, client: Client, samples: list[Sample]) -> None:
        super().__init__(daemon=True)
        self.client, self.samples = client, samples
        self.num_requests = self.num_lost = 0
        self.over = threading.Event()
        self.versions: list[str] = []

    def __enter__(self) -> BackgroundClient:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()

    def run(self) -> None:
        """Send requests until the block ends."""
        while not self.over.wait(0.05):
            body, _ = self.samples[self.num_requests % len(self.samples)]
            self.num_requests += 1
            try:
                version = self.client.predict(body)["version"]
            except OSError:
                self.num_lost += 1
                continue
            if version not in self.versions:
                self.versions.append(version)


@contextlib.contextmanager
def run_server(registry: Path, request_log: Path) -> Iterator[str]:
    """Yield the address of a server of a model registry that logs its requests."""
    arguments = ["serve", str(registry), "--port", "0", "--request-log", str(request_log), "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "tuneforge", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield str(json.loads(process.stdout.readline())["url"])
        finally:
            process.terminate()


def run_command(*arguments: Any, exit_codes: tuple[int, ...] = (0,)) -> str:
    """Return the output of a command of tuneforge; exit if it fails."""
    done = subprocess.run([sys.executable, "-m", "tuneforge", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode not in exit_codes:
        raise SystemExit(f"tuneforge {' '.join(map(str, arguments))}:\n{done.stdout}{done.stderr}")
    return done.stdout
