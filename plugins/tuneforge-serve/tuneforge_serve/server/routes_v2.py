"""The Open Inference Protocol (version 2), with its extensions for binary tensors and the model repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

import tuneforge
from tuneforge import TensorTree
from tuneforge.exporting import compute_predictions
from tuneforge_serve.feedback.schemas import TENSORS, LoggedRequest, encode_row
from tuneforge_serve.server.inference_service import InferenceService
from tuneforge_serve.server.model_manager import ServedModel
from tuneforge_serve.server.request_body import RequestError
from tuneforge_serve.server.request_logger import allows_logging, build_logged_requests, make_ids
from tuneforge_serve.server.tensor_codec import (
    TensorSpec,
    encode_output,
    list_input_specs,
    list_output_specs,
    parse_json,
    read_inputs,
    split_body,
)

EXTENSIONS = ["binary_tensor_data", "model_repository"]


class V2Routes:
    """The routes under `/v2`.

    Args:
        service: The inference service.
    """

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Return the routes."""
        model, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        return [
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            *[Route(path, self.metadata) for path in (model, version)],
            *[Route(f"{path}/ready", self.model_ready) for path in (model, version)],
            *[Route(f"{path}/infer", self.infer, methods=["POST"]) for path in (model, version)],
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", self.load, methods=["POST"]),
            Route("/v2/repository/models/{name}/unload", self.unload, methods=["POST"]),
        ]

    async def server(self, request: Request) -> Response:
        """Return name, version and extensions of the server."""
        return JSONResponse({"name": "tuneforge", "version": tuneforge.__version__, "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        """Return whether the server is running."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Return whether the server accepts requests: a model is loaded, and the server is not stopping."""
        ready = bool(self._service.models.list_loaded()) and not self._service.stopping
        return JSONResponse({"ready": ready}, 200 if ready else 400)

    async def metadata(self, request: Request) -> Response:
        """Return the inputs and outputs of a model."""
        model = self._requested_model(request)
        about = {
            "name": model.name,
            "versions": [model.version],
            "platform": f"tuneforge_{model.model.backend}",
            "inputs": [spec.to_metadata() for spec in list_input_specs(model).values()],
            "outputs": [spec.to_metadata() for spec in list_output_specs(model)],
        }
        labels = list(model.targets.labels)
        return JSONResponse({**about, "parameters": {"labels": labels}} if labels else about)

    async def model_ready(self, request: Request) -> Response:
        """Return whether a model is loaded, in the requested version if the path names one."""
        return JSONResponse({"name": self._requested_model(request).name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """Predict stored tensors."""
        model, service = self._requested_model(request), self._service
        with service.body_reader.reserve() as reservation:
            body = await service.body_reader.read(request, reservation)
            length = request.headers.get("inference-header-content-length")
            (infer_request, stored), result = await service.infer(
                model, lambda: _parse_infer_request(body, length, model)
            )
            is_logged = service.request_logger.sink is not None and allows_logging(request)

            def respond() -> Response:
                described = (
                    [model.targets.describe(row) for row in result.outputs]
                    if infer_request.wants_text or is_logged
                    else []
                )
                if is_logged:
                    service.request_logger.log(_build_logged_requests(request.state.id, model, stored, described))
                return _build_response(infer_request, request.state.id, model, result.outputs, described)

            return await (
                service.run_in_pool(respond) if is_logged else service.run_by_size(respond, result.outputs.numel())
            )

    async def index(self, request: Request) -> Response:
        """Return the models and their states."""
        content = await self._read_json_object(request)
        ready = content.get("ready", False)
        if not isinstance(ready, bool):
            raise RequestError(400, "ready: true or false is required")
        rows = self._service.models.index()
        return JSONResponse([row for row in rows if row["state"] == "READY" or not ready])

    async def load(self, request: Request) -> Response:
        """Load the champion of a model; the old version stays if that fails."""
        parameters = (await self._read_json_object(request)).get("parameters", {})
        if not isinstance(parameters, Mapping) or parameters:
            raise RequestError(400, "parameters: a model is loaded as it was promoted, so no parameters are accepted")
        name = request.path_params["name"]
        try:
            model = await self._service.run_in_own_thread(lambda: self._service.models.load(name))
        except RequestError:
            raise
        except Exception:  # noqa: BLE001 - the reason in the log may contain paths
            reason = self._service.models.reason(name) or "champion.json cannot be read"
            raise RequestError(400, f"model '{name}' was not loaded: {reason}") from None
        return JSONResponse({"name": model.name, "version": model.version})

    async def unload(self, request: Request) -> Response:
        """Unload a model, after its waiting requests."""
        await self._read_json_object(request)
        name = request.path_params["name"]
        await self._service.run_in_own_thread(lambda: self._service.models.unload(name))
        return JSONResponse({"name": name})

    def _requested_model(self, request: Request) -> ServedModel:
        return self._service.models.get(request.path_params["name"], request.path_params.get("version"))

    async def _read_json_object(self, request: Request) -> Mapping[str, Any]:
        """Read the JSON object of a request, which may be empty."""
        with self._service.body_reader.reserve() as reservation:
            body = await self._service.body_reader.read(request, reservation)
        content = parse_json(body, "the request") if body.strip() else {}
        if not isinstance(content, Mapping):
            raise RequestError(400, "the request is not a JSON object")
        return content


@attrs.frozen
class _InferRequest:
    """A parsed request.

    Args:
        id: The client's id of the request; may be empty.
        outputs: The requested outputs, each with whether it is requested as binary data.
    """

    id: str
    outputs: list[tuple[TensorSpec, bool]]

    @property
    def wants_text(self) -> bool:
        """True if the described prediction is requested."""
        return any(spec.dtype == "bytes" for spec, _ in self.outputs)


def _parse_infer_request(
    body: bytes, header_length: str | None, model: ServedModel
) -> tuple[tuple[_InferRequest, TensorTree], TensorTree]:
    """Return the parsed request, and its stored tensors (b, ...)."""
    request, binary = split_body(body, header_length)
    request_id = request.get("id", "")
    if not isinstance(request_id, str) or len(request_id) > 256:
        raise RequestError(400, "id: a string of at most 256 characters is required")
    wanted = _parse_outputs(request, list_output_specs(model))
    specs = list_input_specs(model)
    found = read_inputs(request, binary, list(specs.values()))
    named = {name: found[spec.name] for name, spec in specs.items()}
    stored = named[""] if set(named) == {""} else named
    return (_InferRequest(request_id, wanted), stored), stored


def _build_logged_requests(
    request_id: str, model: ServedModel, stored: TensorTree, predictions: list[dict[str, Any]]
) -> list[LoggedRequest]:
    """Return the entries of the request log; each row is one entry."""
    ids = make_ids(request_id, len(predictions), is_list=len(predictions) > 1)
    sent = [(encode_row(stored, row), TENSORS) for row in range(len(predictions))]
    return build_logged_requests(model, ids, sent, stored, predictions)


def _parse_outputs(request: Mapping[str, Any], specs: list[TensorSpec]) -> list[tuple[TensorSpec, bool]]:
    parameters = _parameters(request, "the request")
    everywhere = _flag(parameters, "binary_data_output", "the request")
    requested = request.get("outputs", [])
    if not isinstance(requested, list):
        raise RequestError(400, "outputs: a list is required")
    if not requested:
        return [(spec, everywhere) for spec in specs]
    known = {spec.name: spec for spec in specs}
    wanted: list[tuple[TensorSpec, bool]] = []
    for index, each in enumerate(requested):
        name = each.get("name") if isinstance(each, Mapping) else None
        if not isinstance(name, str) or name not in known or any(spec.name == name for spec, _ in wanted):
            raise RequestError(400, f"outputs[{index}].name: one of {', '.join(known)} is required, each at most once")
        own = _parameters(each, f"output '{name}'")
        if unknown := [key for key in own if key.startswith(("shared_memory", "classification"))]:
            raise RequestError(400, f"output '{name}': {unknown[0][:40]} is not supported")
        binary = _flag(own, "binary_data", f"output '{name}'") if "binary_data" in own else everywhere
        wanted.append((known[name], binary))
    return wanted


def _parameters(entry: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise RequestError(400, f"{field}: parameters is not an object")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, field: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(400, f"{field}: {name} is neither true nor false")
    return value


def _build_response(
    infer_request: _InferRequest, request_id: str, model: ServedModel, outputs: Tensor, described: list[dict[str, Any]]
) -> Response:
    def values(spec: TensorSpec) -> Any:
        if spec.dtype == "bytes":
            return [json.dumps(each) for each in described]
        return compute_predictions(model.targets, outputs).float().numpy()

    parts = [encode_output(spec, values(spec), binary=binary) for spec, binary in infer_request.outputs]
    response: dict[str, Any] = {
        "model_name": model.name,
        "model_version": model.version,
        "id": infer_request.id or request_id,
    }
    if infer_request.id:  # client ids need not be unique, so feedback refers to the server's id
        response["parameters"] = {"feedback_id": request_id}
    response["outputs"] = [head for head, _ in parts]
    content = json.dumps(response, allow_nan=False).encode()
    if not any(binary for _, binary in infer_request.outputs):
        return Response(content, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(len(content))}
    binaries = b"".join(data for _, data in parts)
    return Response(content + binaries, headers=headers, media_type="application/octet-stream")
