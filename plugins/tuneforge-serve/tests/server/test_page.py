"""The page at `/` in headless Chromium, driven over the WebDriver protocol: pointer, keyboard, file, and no errors.

`TUNEFORGE_SCREENSHOTS=docs/images` writes the screenshot of the docs.
"""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from browser import MISSING, Browser, browser, installed
from PIL import Image
from sklearn.datasets import load_digits
from tuneforge_serve import RequestLog
from tuneforge_serve.server.routes_feedback import feedback_routes

pytestmark = pytest.mark.skipif(not installed(), reason=MISSING)
UP, DOWN, TAB, ENTER, ESCAPE = "\ue013", "\ue015", "\ue004", "\ue007", "\ue00c"
TEXT = "return document.getElementById('{}').innerText"


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def draw(window: Browser, *strokes: list[tuple[float, float]], pointer: str) -> None:
    """Draw strokes on the board, in fractions of its width from its center."""
    board = window.ask("/element", {"using": "css selector", "value": "#board"})
    width = window.run("return document.getElementById('board').clientWidth")
    steps = []
    for stroke in strokes:
        moves = [
            {"type": "pointerMove", "duration": 20, "origin": board, "x": round(x * width), "y": round(y * width)}
            for x, y in stroke
        ]
        steps += [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
    kind = {"type": "pointer", "id": pointer, "parameters": {"pointerType": pointer}}
    window.ask("/actions", {"actions": [{**kind, "actions": steps}]})


def choose(window: Browser, file: Path) -> None:
    (reference,) = window.ask("/element", {"using": "css selector", "value": "#file"}).values()
    window.ask(f"/element/{reference}/value", {"text": str(file)})


def predicted_class(window: Browser, *, after: str = "none") -> str:
    """Return the class that the page shows, once the id of the request differs from `after`."""
    window.wait(f"const about = {TEXT.format('about')[7:]}; return about && !about.endsWith({json.dumps(after)})")
    return window.run(TEXT.format("prediction"))


def request_id(window: Browser) -> str:
    """Return the id of the request that the page shows."""
    return window.run(TEXT.format("about")).rpartition(" ")[2]


SEVEN = [[(-0.28, -0.3), (0.0, -0.3), (0.26, -0.3), (0.12, -0.05), (0.0, 0.18), (-0.06, 0.36)]]
THREE = [[(-0.2, -0.3), (0.0, -0.36), (0.2, -0.26), (0.16, -0.08), (-0.02, 0.0)]]
THREE[0] += [(0.18, 0.08), (0.22, 0.24), (0.02, 0.36), (-0.22, 0.3)]
ZERO = [[(0.2 * np.sin(angle), -0.34 * np.cos(angle)) for angle in np.linspace(0, 2 * np.pi, 17).tolist()]]


def test_drawn_digit_is_recognized(window, serving, digits_run, tmp_path):
    with serving(digits_run) as server:
        window.open(f"http://127.0.0.1:{server.port}/")
        seen = "none"
        for strokes, digit, pointer in ((SEVEN, "7", "mouse"), (ZERO, "0", "touch"), (THREE, "3", "mouse")):
            window.run("document.getElementById('clear').click()")
            draw(window, *strokes, pointer=pointer)
            assert predicted_class(window, after=seen) == digit
            seen = request_id(window)
        about = window.run(TEXT.format("about"))
        assert server.service.models.list_loaded()[0].version in about
        assert re.search(r"latency \d+\.\d ms", about)
        shown = window.run("return [...document.querySelectorAll('#bars tr')].map((row) => row.innerText)")
        assert shown[0].startswith("3")
        assert len(shown) == 10
        screenshot = Path(os.environ.get("TUNEFORGE_SCREENSHOTS", tmp_path)) / "serve.png"
        window.screenshot(screenshot)
        assert screenshot.stat().st_size < 100_000
        assert window.messages() == []


def test_keyboard_is_sufficient(window, serving, digits_run):
    with serving(digits_run) as server:
        window.open(f"http://127.0.0.1:{server.port}/")
        window.press(TAB * 2)  # the link, then the board
        assert window.run("return document.activeElement.id") == "board"
        window.press(UP * 9 + " " + DOWN * 18 + " " + ENTER)
        assert predicted_class(window) == "1"
        window.press(ESCAPE + ENTER)
        assert "The board is empty" in window.run(TEXT.format("fault"))
        names = window.run(
            "return [...document.querySelectorAll('button, input, canvas')].map((each) => "
            "(each.getAttribute('aria-label') || each.labels?.[0]?.innerText || each.innerText).trim())"
        )
        assert len(names) == 5
        assert all(names)
        window.press(TAB * 3)  # Predict, Clear, the file
        assert window.run("return document.activeElement.id") == "file"
        assert window.messages() == []


DROP = """
const bytes = Uint8Array.from(atob("{}"), (letter) => letter.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], "three.png", {{ type: "image/png" }}));
document.getElementById("drop").dispatchEvent(new DragEvent("drop", {{ dataTransfer, cancelable: true }}));
"""


def test_image_can_be_chosen_or_dropped_and_a_broken_one_is_explained(window, serving, digits_run, tmp_path):
    three, broken = tmp_path / "three.png", tmp_path / "broken.png"
    Image.fromarray((load_digits().images[3] * 255 / 16).astype(np.uint8)).save(three)
    broken.write_bytes(b"not an image")
    with serving(digits_run) as server:
        window.open(f"http://127.0.0.1:{server.port}/")
        choose(window, three)
        assert predicted_class(window) == "3"
        seen = request_id(window)
        window.run(DROP.format(base64.b64encode(three.read_bytes()).decode()))
        assert predicted_class(window, after=seen) == "3"
        choose(window, broken)
        window.wait(f"{TEXT.format('fault')}.includes('cannot decode')")
        (message,) = window.messages()
        assert "422" in message


def test_page_shows_the_monitoring(window, serving, table_run, tmp_path):
    row = {"size": 3, "weight": -2, "color": "red"}
    request_log = RequestLog(tmp_path / "requests.db")
    with (
        request_log,
        serving(table_run, request_log=request_log, extra_routes=[feedback_routes(request_log)]) as server,
    ):
        given = server.request("POST", "/predict", row).json
        assert server.request("POST", "/feedback", {"id": given["id"], "class": given["class"]}).status == 200
        window.open(f"http://127.0.0.1:{server.port}/")
        window.wait(f"{TEXT.format('monitoring')}.includes('1 labeled')")
        assert "accuracy 100.0 % on 1 labeled requests" in window.run(TEXT.format("monitoring"))
        assert window.messages() == []


def test_row_can_be_typed_and_the_api_page_opens(window, serving, table_run):
    with serving(table_run) as server:
        window.open(f"http://127.0.0.1:{server.port}/")
        window.run("document.getElementById('text').value = JSON.stringify({size: 3, weight: -2, color: 'red'})")
        window.run("document.getElementById('predict').click()")
        assert predicted_class(window) == "apple"
        window.open(f"http://127.0.0.1:{server.port}/docs")
        assert "/predict" in window.run("return document.body.innerText")
        assert window.messages() == []
