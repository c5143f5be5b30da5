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
from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from tuneforge import TensorTree, map_inputs
from tuneforge.errors import DataError
from tuneforge.exporting import named_tensors, stack_inputs
from tuneforge_serve.feedback.schemas import TENSORS
from tuneforge_serve.server.dynamic_batcher import InferenceResult
from tuneforge_serve.server.inference_service import InferenceService
from tuneforge_serve.server.model_manager import ServedModel
from tuneforge_serve.server.openapi import build_document
from tuneforge_serve.server.request_body import RequestError, format_error
from tuneforge_serve.server.request_logger import allows_logging, build_logged_requests, make_ids
from tuneforge_serve.server.tensor_codec import parse_json, require_finite

_MAX_EXAMPLE_NUMBERS = 64  # of an example that a page shows
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src blob: data:; connect-src 'self'; style-src 'nonce-{0}'; script-src 'nonce-{0}'"
)


@attrs.frozen(eq=False)
class RawInput:
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


class PredictRoutes:
    """The routes for people.

    Args:
        service: Takes requests in and brings answers.
    """

    def __init__(self, service: InferenceService) -> None:
        self._service = service

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
        model = self._requested_model(request)
        images = await self._service.run_in_pool(lambda: takes_images(model))
        return render_page(
            "page.html",
            model=model,
            takes_images=images,
            example=make_example(model),
            takes_feedback=_takes_feedback(request),
        )

    async def docs(self, request: Request) -> Response:
        """The description of the server for people."""
        return render_page("docs.html", api=self._openapi_document(request))

    async def openapi(self, request: Request) -> Response:
        """The description of the server for programs."""
        return JSONResponse(self._openapi_document(request))

    async def predict(self, request: Request) -> Response:
        """The answer for one raw input (its bytes are the body), or for several (`{"inputs": [...]}` as JSON)."""
        service, model, began = self._service, self._requested_model(request), time.perf_counter()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind.startswith("multipart/"):
            raise RequestError(415, "Content-Type: forms are not read; send the file itself (curl --data-binary @FILE)")
        with service.body_reader.reserve() as reservation:
            body = await service.body_reader.read(request, reservation)
            (raws, many, stored), result = await service.infer(model, lambda: _parse_request(body, kind, model))
            request_id = request.state.id
            ids = make_ids(request_id, len(raws), several=many)
            outputs = result.outputs
            predictions = await service.run_by_size(
                lambda: [model.targets.describe(row) for row in outputs], outputs.numel()
            )
            if service.request_logger.sink is not None and allows_logging(request):
                sent = [(raw.body, raw.content_type) for raw in raws]
                service.request_logger.log(
                    await service.run_in_pool(lambda: build_logged_requests(model, ids, sent, stored, predictions))
                )
        about = {"id": request_id, "model": model.name, "version": model.version, **_format_timings(result, began)}
        if not many:
            return JSONResponse({**predictions[0], **about})
        return JSONResponse(
            {"predictions": [{**each, "id": own} for each, own in zip(predictions, ids, strict=True)], **about}
        )

    def _requested_model(self, request: Request) -> ServedModel:
        """The version of the model that the query names, or of the first one."""
        models = self._service.models
        return models.get(request.query_params.get("model", models.default_name))

    def _openapi_document(self, request: Request) -> dict[str, Any]:
        service = self._service
        return build_document(service.models.list_loaded(), service.limits, feedback=_takes_feedback(request))


def render_page(name: str, **content: Any) -> HTMLResponse:
    """A page of this folder; it may load nothing from anywhere but what the server itself answers."""
    nonce = secrets.token_urlsafe(12)
    source = files("tuneforge_serve.server").joinpath("pages", name).read_text(encoding="utf-8")
    text = Environment(autoescape=True).from_string(source).render(nonce=nonce, **content)
    headers = {"Content-Security-Policy": _CONTENT_SECURITY_POLICY.format(nonce), "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(text, headers=headers)


def takes_images(model: ServedModel) -> bool:
    """True where the model's inputs are pictures."""
    return model.inputs.render_image(map_inputs(model.example(1), lambda tensor: tensor[0])) is not None


def make_example(model: ServedModel) -> str:
    """An input as JSON, to begin with; empty where there is no short one."""
    inputs = model.inputs
    if inputs.tabular and (columns := getattr(inputs, "columns", ())):
        known = getattr(inputs, "categories", ((),) * len(columns))
        means = getattr(inputs, "means", (0.0,) * len(columns))
        cells = [values[0] if values else mean for values, mean in zip(known, means, strict=True)]
        return json.dumps(dict(zip(columns, cells, strict=True)), indent=1)
    tensors = named_tensors(model.example(1))
    if sum(tensor.numel() for tensor in tensors.values()) > _MAX_EXAMPLE_NUMBERS:
        return ""
    plain = {name: tensor[0].tolist() for name, tensor in tensors.items()}
    return json.dumps(plain[""] if set(plain) == {""} else plain)


def _takes_feedback(request: Request) -> bool:
    """True where the application has the routes for feedback."""
    return any(getattr(route, "path", "") == "/feedback" for route in request.app.routes)


def _parse_request(
    body: bytes, kind: str, model: ServedModel
) -> tuple[tuple[list[RawInput], bool, TensorTree], TensorTree]:
    """The raw inputs, whether they came as a list, and their stored form (b, ...)."""
    if not body:
        raise RequestError(400, "the body is empty")
    raws, many = _parse_inputs(body, kind)
    stored = _collate([_decode(raw, model) for raw in raws])
    return (raws, many, stored), stored


def _parse_inputs(body: bytes, kind: str) -> tuple[list[RawInput], bool]:
    if kind != "application/json":
        return [RawInput(body, "application/octet-stream" if kind in ("", TENSORS) else kind, body)], False
    value = parse_json(body, "the body")
    if not (isinstance(value, Mapping) and set(value) == {"inputs"}):
        return [_parse_input(value, "the body")], False
    if not isinstance(value["inputs"], list) or not value["inputs"]:
        raise RequestError(400, "inputs: a list of inputs is needed")
    return [_parse_input(each, f"inputs[{place}]") for place, each in enumerate(value["inputs"])], True


def _parse_input(value: Any, field: str) -> RawInput:
    """A JSON value as an input: a text is the base64 of a file, never the name of one."""
    if isinstance(value, str):
        try:
            content = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(422, f"{field}: a text has to be the base64 of a file") from None
        return RawInput(content, "application/octet-stream", content, field)
    if not isinstance(value, (Mapping, list)):
        raise RequestError(422, f"{field}: a row, a list of numbers, or the base64 of a file is needed")
    return RawInput(json.dumps(value).encode(), "application/json", value, field)


def _decode(raw: RawInput, model: ServedModel) -> TensorTree:
    try:
        with np.errstate(over="ignore"):  # what a smaller type cannot hold becomes infinite, which is refused below
            stored = model.inputs.decode(raw.value)
    except DataError as error:
        raise RequestError(422, format_error(error, field=raw.field)) from None
    for name, tensor in named_tensors(stored).items():
        require_finite(tensor, " ".join(filter(None, (raw.field, name))) or "the input", status=422)
    return stored


def _collate(samples: list[TensorTree]) -> TensorTree:
    """Stored samples without a sample axis as one batch."""
    try:
        return stack_inputs(samples)
    except (RuntimeError, KeyError):
        raise RequestError(422, "inputs: those of one request need equal shapes") from None


def _format_timings(result: InferenceResult, began: float) -> dict[str, float]:
    seconds = {"ms": time.perf_counter() - began, "queue_ms": result.queue_s, "forward_ms": result.forward_s}
    return {name: round(1000 * value, 3) for name, value in seconds.items()}
