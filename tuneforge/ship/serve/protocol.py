"""The Open Inference Protocol (version 2) over REST, with the extensions for binary tensors and the repository."""

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
from tuneforge.engine.data.dataset import Inputable
from tuneforge.exporting.formats import answers_of
from tuneforge.ship.circle.exchanges import TENSORS, Exchange, as_body
from tuneforge.ship.serve.bounds import Refusal
from tuneforge.ship.serve.desk import Desk
from tuneforge.ship.serve.kept import exchanges, ids_of, may_be_kept
from tuneforge.ship.serve.models import Served
from tuneforge.ship.serve.tensors import Spec, inputs_of, outputs_of, parsed, read_inputs, split_body, written

EXTENSIONS = ["binary_tensor_data", "model_repository"]


class Protocol:
    """The routes under `/v2`.

    Args:
        desk: Takes requests in and brings answers.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def routes(self) -> list[Route]:
        """Paths and what answers them."""
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
        """Name, version and extensions."""
        return JSONResponse({"name": "tuneforge", "version": tuneforge.__version__, "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        """Whether the process answers at all."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Whether requests are welcome: some model answers, and the server is not about to stop."""
        ready = bool(self._desk.models.all_current()) and not self._desk.stopping
        return JSONResponse({"ready": ready}, 200 if ready else 400)

    async def metadata(self, request: Request) -> Response:
        """What a model takes and gives."""
        served = self._served(request)
        about = {
            "name": served.name,
            "versions": [served.version],
            "platform": f"tuneforge_{served.servable.backend}",
            "inputs": [spec.described() for spec in inputs_of(served).values()],
            "outputs": [spec.described() for spec in outputs_of(served)],
        }
        labels = list(served.targets.labels)
        return JSONResponse({**about, "parameters": {"labels": labels}} if labels else about)

    async def model_ready(self, request: Request) -> Response:
        """Whether a model answers, in that version where one is named."""
        return JSONResponse({"name": self._served(request).name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """Answers for tensors in their stored form."""
        served, desk = self._served(request), self._desk
        with desk.bodies.held() as holding:
            body = await desk.bodies.read(request, holding)
            length = request.headers.get("inference-header-content-length")
            (asked, stored), computed = await desk.ask(served, lambda: _asked(body, length, served))
            keeping = desk.keeper.records is not None and may_be_kept(request)

            def answer() -> Response:
                described = [served.targets.describe(row) for row in computed.outputs] if asked.told or keeping else []
                if keeping:
                    desk.keeper.keep(_kept(request.state.id, served, stored, described))
                return _answer(asked, request.state.id, served, computed.outputs, described)

            return await (desk.aside(answer) if keeping else desk.by_size(answer, computed.outputs.numel()))

    async def index(self, request: Request) -> Response:
        """The models, and whether each answers."""
        asked = await self._options(request)
        ready = asked.get("ready", False)
        if not isinstance(ready, bool):
            raise Refusal(400, "ready: true or false is needed")
        rows = self._desk.models.index()
        return JSONResponse([row for row in rows if row["state"] == "READY" or not ready])

    async def load(self, request: Request) -> Response:
        """Load a model's newest version; where that fails, the old one goes on."""
        parameters = (await self._options(request)).get("parameters", {})
        if not isinstance(parameters, Mapping) or parameters:
            raise Refusal(400, "parameters: a model is loaded as it was promoted, no other content is taken")
        name = request.path_params["name"]
        try:
            served = await self._desk.slowly(lambda: self._desk.models.load(name))
        except Refusal:
            raise
        except Exception:  # noqa: BLE001 - logged where the version was refused, with what a client need not know
            reason = self._desk.models.reason(name) or "its pointer cannot be read"
            raise Refusal(400, f"model '{name}' was not loaded: {reason}") from None
        return JSONResponse({"name": served.name, "version": served.version})

    async def unload(self, request: Request) -> Response:
        """Let a model answer no more; what waits for it is answered."""
        await self._options(request)
        name = request.path_params["name"]
        await self._desk.slowly(lambda: self._desk.models.unload(name))
        return JSONResponse({"name": name})

    def _served(self, request: Request) -> Served:
        return self._desk.models.current(request.path_params["name"], request.path_params.get("version"))

    async def _options(self, request: Request) -> Mapping[str, Any]:
        """The JSON object of a request of the repository, which may be empty."""
        with self._desk.bodies.held() as holding:
            body = await self._desk.bodies.read(request, holding)
        asked = parsed(body, "the request") if body.strip() else {}
        if not isinstance(asked, Mapping):
            raise Refusal(400, "the request is no JSON object")
        return asked


@attrs.frozen
class _Asked:
    """What a request wants.

    Args:
        id: That the client gave it; empty where it gave none.
        outputs: Each with whether it is wanted as bytes.
    """

    id: str
    outputs: list[tuple[Spec, bool]]

    @property
    def told(self) -> bool:
        """True where the answer for people is wanted."""
        return any(spec.dtype == "bytes" for spec, _ in self.outputs)


def _asked(body: bytes, header_length: str | None, served: Served) -> tuple[tuple[_Asked, Inputable], Inputable]:
    """The checked request, and its stored tensors (b, ...)."""
    request, binary = split_body(body, header_length)
    identity = request.get("id", "")
    if not isinstance(identity, str) or len(identity) > 256:
        raise Refusal(400, "id: a text of at most 256 characters is needed")
    wanted = _wanted(request, outputs_of(served))
    specs = inputs_of(served)
    found = read_inputs(request, binary, list(specs.values()))
    named = {name: found[spec.name] for name, spec in specs.items()}
    stored = named[""] if set(named) == {""} else named
    return (_Asked(identity, wanted), stored), stored


def _kept(identity: str, served: Served, stored: Inputable, answers: list[dict[str, Any]]) -> list[Exchange]:
    """What the records keep of a request; each row is an input of its own."""
    ids = ids_of(identity, len(answers), several=len(answers) > 1)
    sent = [(as_body(stored, row), TENSORS) for row in range(len(answers))]
    return exchanges(served, ids, sent, stored, answers)


def _wanted(request: Mapping[str, Any], specs: list[Spec]) -> list[tuple[Spec, bool]]:
    parameters = _parameters(request, "the request")
    everywhere = _flag(parameters, "binary_data_output", "the request")
    given = request.get("outputs", [])
    if not isinstance(given, list):
        raise Refusal(400, "outputs: a list is needed")
    if not given:
        return [(spec, everywhere) for spec in specs]
    known = {spec.name: spec for spec in specs}
    wanted: list[tuple[Spec, bool]] = []
    for place, each in enumerate(given):
        name = each.get("name") if isinstance(each, Mapping) else None
        if not isinstance(name, str) or name not in known or any(spec.name == name for spec, _ in wanted):
            raise Refusal(400, f"outputs[{place}].name: some of {', '.join(known)} is needed, each once")
        own = _parameters(each, f"output '{name}'")
        if unknown := [key for key in own if key.startswith(("shared_memory", "classification"))]:
            raise Refusal(400, f"output '{name}': {unknown[0][:40]} is not supported")
        binary = _flag(own, "binary_data", f"output '{name}'") if "binary_data" in own else everywhere
        wanted.append((known[name], binary))
    return wanted


def _parameters(given: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    parameters = given.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise Refusal(400, f"{field}: parameters is no object")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, field: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(400, f"{field}: {name} is neither true nor false")
    return value


def _answer(asked: _Asked, identity: str, served: Served, outputs: Tensor, described: list[dict[str, Any]]) -> Response:
    def values(spec: Spec) -> Any:
        if spec.dtype == "bytes":
            return [json.dumps(each) for each in described]
        return answers_of(served.targets, outputs).float().numpy()

    parts = [written(spec, values(spec), binary=binary) for spec, binary in asked.outputs]
    answer: dict[str, Any] = {"model_name": served.name, "model_version": served.version, "id": asked.id or identity}
    if asked.id:  # clients use their ids again and again, so feedback goes by ours
        answer["parameters"] = {"feedback_id": identity}
    answer["outputs"] = [head for head, _ in parts]
    content = json.dumps(answer, allow_nan=False).encode()
    if not any(binary for _, binary in asked.outputs):
        return Response(content, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(len(content))}
    binaries = b"".join(data for _, data in parts)
    return Response(content + binaries, headers=headers, media_type="application/octet-stream")
