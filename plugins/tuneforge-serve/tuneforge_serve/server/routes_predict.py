"""`/predict` for raw inputs, and the pages."""

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
from tuneforge_serve.server.api_description import build_document
from tuneforge_serve.server.dynamic_batcher import InferenceResult
from tuneforge_serve.server.inference_service import InferenceService
from tuneforge_serve.server.model_manager import ServedModel
from tuneforge_serve.server.request_body import RequestError, format_error
from tuneforge_serve.server.request_logger import allows_logging, build_logged_requests, make_ids
from tuneforge_serve.server.tensor_codec import parse_json, require_finite

_MAX_EXAMPLE_NUMBERS = 64  # in the example of the page
_TABLES = {
    "text/csv": ".csv",
    "text/tab-separated-values": ".tsv",
    "application/jsonl": ".jsonl",
    "application/x-ndjson": ".ndjson",
}
"""Extension of the files that these content types stand for."""

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src blob: data:; connect-src 'self'; style-src 'nonce-{0}'; script-src 'nonce-{0}'"
)


@attrs.frozen(eq=False)
class RawInput:
    """One input as it was sent.

    Args:
        body: The bytes of a file, or JSON.
        content_type: The type of the body.
        value: What `Inputs.decode` takes: the bytes, or the decoded JSON.
        field: The name of the input in error messages.
    """

    body: bytes
    content_type: str
    value: Any
    field: str = ""


class PredictRoutes:
    """The routes for raw inputs, and the pages.

    Args:
        service: The inference service.
    """

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/", self.page),
            Route("/docs", self.docs),
            Route("/openapi.json", self.openapi),
            Route("/predict", self.predict, methods=["POST"]),
        ]

    async def page(self, request: Request) -> Response:
        """Return the page to try a model with a drawing, an image file or a table row."""
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
        """Return the description of the API as a page."""
        return render_page("docs.html", api=self._openapi_document(request))

    async def openapi(self, request: Request) -> Response:
        """Return the description of the API as JSON."""
        return JSONResponse(self._openapi_document(request))

    async def predict(self, request: Request) -> Response:
        """Predict one raw input, whose bytes are the body, or several: `{"inputs": [...]}` as JSON, or a table."""
        service, model, start = self._service, self._requested_model(request), time.perf_counter()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind.startswith("multipart/"):
            raise RequestError(415, "Content-Type: forms are not supported; send the file (curl --data-binary @FILE)")
        with service.body_reader.reserve() as reservation:
            body = await service.body_reader.read(request, reservation)
            (raw_inputs, is_list, stored), result = await service.infer(
                model, lambda: _parse_request(body, kind, model)
            )
            request_id = request.state.id
            ids = make_ids(request_id, len(raw_inputs), is_list=is_list)
            outputs = result.outputs
            predictions = await service.run_by_size(
                lambda: [
                    {**model.targets.describe(row), **model.inputs.describe_input(raw.value)}
                    for row, raw in zip(outputs, raw_inputs, strict=True)
                ],
                outputs.numel(),
            )
            if service.request_logger.sink is not None and allows_logging(request):
                sent = [(raw.body, raw.content_type) for raw in raw_inputs]
                service.request_logger.log(
                    await service.run_in_pool(lambda: build_logged_requests(model, ids, sent, stored, predictions))
                )
        about = {"id": request_id, "model": model.name, "version": model.version, **_format_timings(result, start)}
        if not is_list:
            return JSONResponse({**predictions[0], **about})
        return JSONResponse(
            {"predictions": [{**each, "id": own} for each, own in zip(predictions, ids, strict=True)], **about}
        )

    def _requested_model(self, request: Request) -> ServedModel:
        """Return the model that the query names, or the first one."""
        models = self._service.models
        return models.get(request.query_params.get("model", models.default_name))

    def _openapi_document(self, request: Request) -> dict[str, Any]:
        names = [each.name for each in self._service.models.list_loaded()]
        return build_document(names, feedback=_takes_feedback(request))


def render_page(name: str, **content: Any) -> HTMLResponse:
    """Render a page, which may load nothing from other servers."""
    nonce = secrets.token_urlsafe(12)
    source = files("tuneforge_serve.server").joinpath("pages", name).read_text(encoding="utf-8")
    text = Environment(autoescape=True).from_string(source).render(nonce=nonce, **content)
    headers = {"Content-Security-Policy": _CONTENT_SECURITY_POLICY.format(nonce), "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(text, headers=headers)


def takes_images(model: ServedModel) -> bool:
    """Return True if the inputs of the model are images."""
    return model.inputs.render_image(map_inputs(model.example(1), lambda tensor: tensor[0])) is not None


def make_example(model: ServedModel) -> str:
    """Return an example input as JSON; an empty string if there is no short one."""
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
    """Return True if the application has the routes for feedback."""
    return any(getattr(route, "path", "") == "/feedback" for route in request.app.routes)


def _parse_request(
    body: bytes, kind: str, model: ServedModel
) -> tuple[tuple[list[RawInput], bool, TensorTree], TensorTree]:
    """Return the raw inputs, whether they were a list, and their stored form (b, ...)."""
    if not body:
        raise RequestError(400, "the body is empty")
    raw_inputs, is_list = _parse_inputs(body, kind, model)
    stored = _collate([_decode(raw, model) for raw in raw_inputs])
    return (raw_inputs, is_list, stored), stored


def _parse_inputs(body: bytes, kind: str, model: ServedModel) -> tuple[list[RawInput], bool]:
    if model.inputs.tabular and kind != "application/json":
        raw_inputs = _read_table(body, _TABLES.get(kind, ""), model)
        is_one = raw_inputs[0].value is body or (len(raw_inputs) == 1 and body.lstrip()[:1] == b"{")
        return raw_inputs, kind in _TABLES or not is_one
    if kind != "application/json":
        return [RawInput(body, "application/octet-stream" if kind in ("", TENSORS) else kind, body)], False
    value = parse_json(body, "the body")
    if isinstance(value, list) and model.inputs.tabular:
        value = {"inputs": value}
    if not (isinstance(value, Mapping) and set(value) == {"inputs"}):
        return [_parse_input(value, "the body")], False
    if not isinstance(value["inputs"], list) or not value["inputs"]:
        raise RequestError(400, "inputs: a list of inputs is required")
    return [_parse_input(each, f"inputs[{index}]") for index, each in enumerate(value["inputs"])], True


def _read_table(body: bytes, extension: str, model: ServedModel) -> list[RawInput]:
    """Return the rows of a CSV file or of JSON, in any dialect that `tuneforge run` reads."""
    raw_inputs = []
    try:
        for field, row in model.inputs.read_file(body, name=f"the body{extension}"):
            if isinstance(row, DataError):
                raise row
            if row is body:
                raw_inputs.append(RawInput(body, "application/octet-stream", body))
            else:
                raw_inputs.append(RawInput(json.dumps(row).encode(), "application/json", row, field))
    except DataError as error:
        raise RequestError(422, format_error(error)) from None
    return raw_inputs


def _parse_input(value: Any, field: str) -> RawInput:
    """Parse a JSON value as an input; a string is a base64-encoded file, never a file name."""
    if isinstance(value, str):
        try:
            content = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(422, f"{field}: a string has to be a base64-encoded file") from None
        return RawInput(content, "application/octet-stream", content, field)
    if not isinstance(value, (Mapping, list)):
        raise RequestError(422, f"{field}: a table row, a list of numbers, or a base64-encoded file is required")
    return RawInput(json.dumps(value).encode(), "application/json", value, field)


def _decode(raw: RawInput, model: ServedModel) -> TensorTree:
    try:
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which is refused below
            stored = model.inputs.decode(raw.value)
    except DataError as error:
        raise RequestError(422, format_error(error, field=raw.field)) from None
    for name, tensor in named_tensors(stored).items():
        require_finite(tensor, " ".join(filter(None, (raw.field, name))) or "the input", status=422)
    return stored


def _collate(samples: list[TensorTree]) -> TensorTree:
    """Stack stored samples into a batch."""
    try:
        return stack_inputs(samples)
    except (RuntimeError, KeyError):
        raise RequestError(422, "inputs: the inputs of one request need equal shapes") from None


def _format_timings(result: InferenceResult, start: float) -> dict[str, float]:
    seconds = {"ms": time.perf_counter() - start, "queue_ms": result.queue_s, "forward_ms": result.forward_s}
    return {name: round(1000 * value, 3) for name, value in seconds.items()}
