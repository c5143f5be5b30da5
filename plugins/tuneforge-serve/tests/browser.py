"""Headless Chromium by the WebDriver protocol, with the standard library only."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MISSING = "chromium and chromedriver are not installed (apt-get install chromium chromium-driver)"


def installed() -> bool:
    return bool(shutil.which("chromedriver")) and bool(shutil.which("chromium") or shutil.which("google-chrome"))


class Browser:
    """A browser window; a failure of the driver raises an error."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, url: str) -> None:
        _post(f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        return _post(f"{self._session}/execute/sync", {"script": script, "args": []})

    def ask(self, path: str, content: Any) -> Any:
        """Send any other command of the protocol."""
        return _post(f"{self._session}{path}", content)

    def press(self, keys: str) -> None:
        """Press keys one after the other, on whatever has the focus."""
        presses = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        _post(f"{self._session}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": presses}]})

    def wait(self, script: str, *, seconds: float = 10) -> Any:
        """Return the result of the script as soon as it is true."""
        until = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < until, (
                f"still not: {script}; the page says {self.run('return document.body.innerText')}"
            )
            time.sleep(0.02)
        return found

    def messages(self) -> list[str]:
        """Return the messages of the console."""
        return [each["message"] for each in _post(f"{self._session}/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        with urllib.request.urlopen(f"{self._session}/screenshot") as answer:
            path.write_bytes(base64.b64decode(json.load(answer)["value"]))


@contextlib.contextmanager
def browser(profile: Path, *, width: int = 900, height: int = 760) -> Iterator[Browser]:
    """Yield a browser window, and close it at the end."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = _port(driver.stdout.readline)
        options = {
            "args": [
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                f"--window-size={width},{height}", f"--user-data-dir={profile}",
            ]
        }  # fmt: skip
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        session = _post(f"http://127.0.0.1:{port}/session", {"capabilities": wanted})["sessionId"]
        address = f"http://127.0.0.1:{port}/session/{session}"
        try:
            yield Browser(address)
        finally:
            urllib.request.urlopen(urllib.request.Request(address, method="DELETE")).close()
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()


def _port(read: Callable[[], str]) -> int:
    for _ in range(20):
        words = read().split("on port ")
        if len(words) == 2 and words[0].strip().endswith("successfully"):
            return int(words[1].strip().rstrip("."))
    raise RuntimeError("chromedriver does not start")


def _post(url: str, content: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]
