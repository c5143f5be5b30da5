"""`/predict` for raw inputs as people have them, and the pages."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import time
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import attrs
import numpy as np
import torch
from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from tuneforge.engine.data.dataset import Inputable, map_inputs, tensors_of
from tuneforge.errors import DataError
from tuneforge.ship.circle.exchanges import TENSORS
from tuneforge.ship.serve.batches import Computed
from tuneforge.ship.serve.bounds import Refusal, in_words
from tuneforge.ship.serve.desk import Desk
from tuneforge.ship.serve.kept import exchanges, ids_of, may_be_kept
from tuneforge.ship.serve.models import Served
from tuneforge.ship.serve.openapi import described
from tuneforge.ship.serve.tensors import parsed, require_finite

_MOST_NUMBERS = 64  # of an example that a page shows
_POLICY = "default-src 'none'; img-src blob: data:; connect-src 'self'; style-src 'nonce-{0}'; script-src 'nonce-{0}'"


@attrs.frozen(eq=False)
class Raw:
    """One input as it was sent.

    Args:
        body: Bytes of a file, or JSON.
        content_type: Of these bytes.
        value: What the inputs contract decodes: the bytes, or what the JSON means.
        field: What messages call it.
    """

    body: bytes
    content_type: str
    value: Any
    field: str = ""


class People:
    """The routes for people.

    Args:
        desk: Takes requests in and brings answers.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def routes(self) -> list[Route]:
        """Paths and what answers them."""
        return [
            Route("/", self.page),
            Route("/docs", self.docs),
            Route("/openapi.json", self.openapi),
            Route("/predict", self.predict, methods=["POST"]),
        ]

    async def page(self, request: Request) -> Response:
        """Draw or drop a picture, or write a row, and see the answer."""
        served = self._served(request)
        pictures = await self._desk.aside(lambda: takes_pictures(served))
        watching = _takes_feedback(request)
        return page("page.html", served=served, pictures=pictures, example=example_of(served), watching=watching)

    async def docs(self, request: Request) -> Response:
        """The description of the server for people."""
        return page("docs.html", api=self._described(request))

    async def openapi(self, request: Request) -> Response:
        """The description of the server for programs."""
        return JSONResponse(self._described(request))

    async def predict(self, request: Request) -> Response:
        """The answer for one raw input (its bytes are the body), or for several (`{"inputs": [...]}` as JSON)."""
        desk, served, began = self._desk, self._served(request), time.perf_counter()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind.startswith("multipart/"):
            raise Refusal(415, "Content-Type: forms are not read; send the file itself (curl --data-binary @FILE)")
        with desk.bodies.held() as holding:
            body = await desk.bodies.read(request, holding)
            (raws, many, stored), computed = await desk.ask(served, lambda: _read(body, kind, served))
            identity = request.state.id
            ids = ids_of(identity, len(raws), several=many)
            outputs = computed.outputs
            answers = await desk.by_size(lambda: [served.targets.describe(row) for row in outputs], outputs.numel())
            if desk.keeper.records is not None and may_be_kept(request):
                sent = [(raw.body, raw.content_type) for raw in raws]
                desk.keeper.keep(await desk.aside(lambda: exchanges(served, ids, sent, stored, answers)))
        about = {"id": identity, "model": served.name, "version": served.version, **_times(computed, began)}
        if not many:
            return JSONResponse({**answers[0], **about})
        return JSONResponse({"answers": [{**each, "id": own} for each, own in zip(answers, ids, strict=True)], **about})

    def _served(self, request: Request) -> Served:
        """The version of the model that the query names, or of the first one."""
        models = self._desk.models
        return models.current(request.query_params.get("model", models.first))

    def _described(self, request: Request) -> dict[str, Any]:
        desk = self._desk
        return described(desk.models.all_current(), desk.limits, feedback=_takes_feedback(request))


def page(name: str, **content: Any) -> HTMLResponse:
    """A page of this folder; it may load nothing from anywhere but what the server itself answers."""
    nonce = secrets.token_urlsafe(12)
    source = files("tuneforge.ship.serve").joinpath("pages", name).read_text(encoding="utf-8")
    text = Environment(autoescape=True).from_string(source).render(nonce=nonce, **content)
    headers = {"Content-Security-Policy": _POLICY.format(nonce), "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(text, headers=headers)


def takes_pictures(served: Served) -> bool:
    """True where the model's inputs are pictures."""
    return served.inputs.picture(map_inputs(served.example(1), lambda tensor: tensor[0])) is not None


def example_of(served: Served) -> str:
    """An input as JSON, to begin with; empty where there is no short one."""
    inputs = served.inputs
    if inputs.rows and (columns := getattr(inputs, "columns", ())):
        known = getattr(inputs, "categories", ((),) * len(columns))
        means = getattr(inputs, "means", (0.0,) * len(columns))
        cells = [values[0] if values else mean for values, mean in zip(known, means, strict=True)]
        return json.dumps(dict(zip(columns, cells, strict=True)), indent=1)
    tensors = tensors_of(served.example(1))
    if sum(tensor.numel() for tensor in tensors.values()) > _MOST_NUMBERS:
        return ""
    plain = {name: tensor[0].tolist() for name, tensor in tensors.items()}
    return json.dumps(plain[""] if set(plain) == {""} else plain)


def _takes_feedback(request: Request) -> bool:
    """True where the application has the routes for feedback."""
    return any(getattr(route, "path", "") == "/feedback" for route in request.app.routes)


def _read(body: bytes, kind: str, served: Served) -> tuple[tuple[list[Raw], bool, Inputable], Inputable]:
    """The raw inputs, whether they came as a list, and their stored form (b, ...)."""
    if not body:
        raise Refusal(400, "the body is empty")
    raws, many = _raws(body, kind)
    stored = _batch([_decoded(raw, served) for raw in raws])
    return (raws, many, stored), stored


def _raws(body: bytes, kind: str) -> tuple[list[Raw], bool]:
    if kind != "application/json":
        return [Raw(body, "application/octet-stream" if kind in ("", TENSORS) else kind, body)], False
    value = parsed(body, "the body")
    if not (isinstance(value, Mapping) and set(value) == {"inputs"}):
        return [_raw(value, "the body")], False
    if not isinstance(value["inputs"], list) or not value["inputs"]:
        raise Refusal(400, "inputs: a list of inputs is needed")
    return [_raw(each, f"inputs[{place}]") for place, each in enumerate(value["inputs"])], True


def _raw(value: Any, field: str) -> Raw:
    """A JSON value as an input: a text is the base64 of a file, never the name of one."""
    if isinstance(value, str):
        try:
            content = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise Refusal(422, f"{field}: a text has to be the base64 of a file") from None
        return Raw(content, "application/octet-stream", content, field)
    if not isinstance(value, (Mapping, list)):
        raise Refusal(422, f"{field}: a row, a list of numbers, or the base64 of a file is needed")
    return Raw(json.dumps(value).encode(), "application/json", value, field)


def _decoded(raw: Raw, served: Served) -> Inputable:
    try:
        with np.errstate(over="ignore"):  # what a smaller type cannot hold becomes infinite, which is refused below
            stored = served.inputs.decode(raw.value)
    except DataError as error:
        raise Refusal(422, in_words(error, field=raw.field)) from None
    for name, tensor in tensors_of(stored).items():
        require_finite(tensor, " ".join(filter(None, (raw.field, name))) or "the input", status=422)
    return stored


def _batch(samples: list[Inputable]) -> Inputable:
    """Stored samples without a sample axis as one batch."""
    named = [tensors_of(sample) for sample in samples]
    try:
        joined = {name: torch.stack([each[name] for each in named]) for name in named[0]}
    except (RuntimeError, KeyError):
        raise Refusal(422, "inputs: those of one request need equal shapes") from None
    return joined[""] if isinstance(samples[0], Tensor) else joined


def _times(computed: Computed, began: float) -> dict[str, float]:
    seconds = {"ms": time.perf_counter() - began, "waited_ms": computed.waited_s, "forward_ms": computed.forward_s}
    return {name: round(1000 * value, 3) for name, value in seconds.items()}
