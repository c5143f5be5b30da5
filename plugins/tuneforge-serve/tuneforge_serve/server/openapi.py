"""The description of the server: OpenAPI 3.1, written for the models that it serves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tuneforge
from tuneforge_serve.feedback.request_log import MAX_CLASS_NAME_LENGTH
from tuneforge_serve.server.limits import Limits
from tuneforge_serve.server.model_manager import ServedModel
from tuneforge_serve.server.tensor_codec import TensorSpec, list_input_specs, list_output_specs

_ERRORS = {
    400: "The request is malformed; the message names the field.",
    401: "The token is missing or wrong.",
    403: "The request names another host, or comes from another site's page.",
    404: "There is no such model, version or request, or it is not loaded.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    415: "The body is a form, or compressed.",
    422: "The input is none that the model takes; the message says why.",
    503: "Too much waits already; Retry-After says when to come back.",
}
_BODY = (400, 408, 413, 415, 503)  # what any body may meet
_PREDICT_ERRORS = (*_BODY, 404, 422)
_TEXT = {"type": "string"}
_ERROR = {"$ref": "#/components/schemas/Error"}
_NUMBER, _NUMBER_OR_NONE = {"type": "number"}, {"type": ["number", "null"]}
_TEXT_OR_NONE = {"type": ["string", "null"]}
_FLAG, _FLAG_OR_NONE = {"type": "boolean"}, {"type": ["boolean", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
_ID = {"X-Request-Id": {"description": "The number of the request.", "schema": _TEXT}}


def build_document(models: Sequence[ServedModel], limits: Limits, *, feedback: bool = False) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        models: The models that answer; the first one is the example.
        limits: Bounds of the server.
        feedback: Whether the server keeps requests and takes labels for them.
    """
    names = [each.name for each in models]
    inputs = list(list_input_specs(models[0]).values()) if models else []
    outputs = list_output_specs(models[0]) if models else []
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tuneforge",
            "version": tuneforge.__version__,
            "description": f"Serves {', '.join(names) or 'no model at the moment'}. A body has at most "
            f"{limits.max_body_bytes:,} bytes; an answer takes at most {limits.request_timeout_s:g} s.",
        },
        "paths": {
            **_people(names),
            **_health(),
            **_models(names, inputs, outputs),
            **_repository(names),
            **(_feedback() if feedback else {}),
        },
        "components": {
            "schemas": {
                "Error": _object({"error": _TEXT}),
                "Answer": _prediction_schema(),
                "Inference": _inference(outputs),
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _people(names: list[str]) -> dict[str, Any]:
    model = {"name": "model", "in": "query", "required": False, "schema": _name(names)}
    picture = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
    several = _object({"inputs": {"type": "array", "minItems": 1, "items": {}}})
    answer = {"anyOf": [{"$ref": "#/components/schemas/Answer"}, _object({"predictions": {"type": "array"}})]}
    predict = _operation("predict", "The answer for an input.", answer, errors=_PREDICT_ERRORS, params=[model])
    predict["requestBody"] = {
        "required": True,
        "description": "One input: the bytes of a picture, or a row as JSON. Several: an object with inputs, a list, "
        "where a text is the base64 of a file.",
        "content": {"application/octet-stream": picture, "application/json": {"schema": {"anyOf": [several, {}]}}},
    }
    page = _operation("page", "Draw or drop a picture and see the answer.", _TEXT, "text/html", errors=(404,))
    page["parameters"] = [model]
    return {
        "/": {"get": page},
        "/docs": {"get": _operation("docs", "This description for people.", _TEXT, "text/html")},
        "/openapi.json": {"get": _operation("openapi", "This description.", {"type": "object"})},
        "/metrics": {"get": _operation("metrics", "Counts for Prometheus.", _TEXT, "text/plain")},
        "/predict": {"post": predict},
    }


def _health() -> dict[str, Any]:
    ready, live = (_object({name: {"type": "boolean"}}) for name in ("ready", "live"))
    about = _object({"name": _TEXT, "version": _TEXT, "extensions": {"type": "array", "items": _TEXT}})
    asked = _operation("ready", "Whether requests are welcome.", ready)
    asked["responses"]["400"] = {"description": "They are not.", **_content(ready)}
    return {
        "/v2": {"get": _operation("server", "Name, version and extensions.", about)},
        "/v2/health/live": {"get": _operation("live", "Whether the server answers.", live)},
        "/v2/health/ready": {"get": asked},
    }


def _models(names: list[str], inputs: list[TensorSpec], outputs: list[TensorSpec]) -> dict[str, Any]:
    tensor = _object({"name": _TEXT, "datatype": _TEXT, "shape": {"type": "array", "items": {"type": "integer"}}})
    tensors = {"type": "array", "items": tensor}
    about = _object({"name": _TEXT, "versions": {"type": "array"}, "inputs": tensors, "outputs": tensors})
    ready = _object({"name": _TEXT, "ready": {"type": "boolean"}})
    inference = {"$ref": "#/components/schemas/Inference"}
    paths: dict[str, Any] = {}
    for path, word in (("/v2/models/{name}", ""), ("/v2/models/{name}/versions/{version}", "_version")):
        params = [_path("name", _name(names)), *([_path("version", _TEXT)] if word else [])]
        infer = _operation(
            f"infer{word}", "Answers for stored tensors.", inference, errors=_PREDICT_ERRORS, params=params
        )
        infer["requestBody"] = {"required": True, **_content(_request(inputs, outputs))}
        show = _operation(f"model{word}", "What a model takes and gives.", about, errors=(404,), params=params)
        asked = _operation(f"model_ready{word}", "Whether it answers.", ready, errors=(404,), params=params)
        paths |= {path: {"get": show}, f"{path}/ready": {"get": asked}, f"{path}/infer": {"post": infer}}
    return paths


def _repository(names: list[str]) -> dict[str, Any]:
    row = _object({"name": _TEXT, "state": {"enum": ["READY", "UNAVAILABLE"]}, "reason": _TEXT})
    row["properties"]["version"] = _TEXT
    rows, none = {"type": "array", "items": row}, {"type": "object", "maxProperties": 0}
    params, errors = [_path("name", _name(names))], (*_BODY, 404)
    loaded = _object({"name": _TEXT, "version": _TEXT})
    index = _operation("index", "The models, and whether each answers.", rows, errors=_BODY)
    load = _operation(
        "load", "Load the newest version; the old one goes on if that fails.", loaded, errors=errors, params=params
    )
    unload = _operation("unload", "Let a model answer no more.", _object({"name": _TEXT}), errors=errors, params=params)
    index["requestBody"] = _content(_object({"ready": {"type": "boolean"}}, required=False))
    load["requestBody"] = _content(_object({"parameters": none}, required=False))
    unload["requestBody"] = _content(_object({"parameters": {"type": "object"}}, required=False))
    return {
        "/v2/repository/index": {"post": index},
        "/v2/repository/models/{name}/load": {"post": load},
        "/v2/repository/models/{name}/unload": {"post": unload},
    }


def _feedback() -> dict[str, Any]:
    given = _object(
        {"id": {**_TEXT, "minLength": 1}, "class": {**_TEXT, "minLength": 1, "maxLength": MAX_CLASS_NAME_LENGTH}}
    )
    taken = _object(
        {"id": _TEXT, "class": _TEXT, "previous": _TEXT_OR_NONE, "held_out": _FLAG, "agrees": _FLAG_OR_NONE}
    )
    label = _operation(
        "label", "Say which class is right; the answer comes once it is on the disk.", taken, errors=_PREDICT_ERRORS
    )
    label["requestBody"] = {"required": True, **_content({**given, "additionalProperties": False})}
    skip = {"name": "skip", "in": "query", "schema": {"type": "array", "items": _TEXT}}
    likely = {"type": "array", "items": {"type": "array", "items": {"type": ["string", "number", "null"]}}}
    shown = _object({"id": _TEXT_OR_NONE, "left": _COUNT, "num_labeled": _COUNT})
    shown["properties"] |= {
        "class": _TEXT_OR_NONE,
        "probability": _NUMBER_OR_NONE,
        "likely_classes": likely,
        "version": _TEXT,
    }
    shown["properties"] |= {"classes": {"type": "array", "items": _TEXT}, "time": {"type": "number"}}
    shown["properties"] |= {"image": _TEXT_OR_NONE, "text": _TEXT_OR_NONE}
    next_ = _operation("next", "The least certain answer without a label.", shown, errors=(503,), params=[skip])
    return {
        "/feedback": {"post": label},
        "/review": {"get": _operation("review", "See uncertain answers and label them.", _TEXT, "text/html")},
        "/review/next": {"get": next_},
        "/monitoring": {
            "get": _operation("monitoring", "How each model does at work.", _monitoring_schema(), errors=(503,))
        },
    }


def _monitoring_schema() -> dict[str, Any]:
    """Accuracy on what got labelled, and drift from the reference; null where too little is known."""
    interval = {"num_correct": _COUNT, "total": _COUNT, "low": _NUMBER, "high": _NUMBER, "proportion": _NUMBER_OR_NONE}
    drift = _object({"statistic": _NUMBER, "p_value": _NUMBER, "feature_index": _COUNT, "num_requests": _COUNT})
    maybe_drift = {"anyOf": [drift, {"type": "null"}]}
    model = _object({"model": _TEXT, "version": _TEXT, "accuracy": _object(interval)})
    drifts = {"confidence_drift": maybe_drift, "input_drift": maybe_drift}
    model["required"] += list(drifts)
    model["properties"] |= {**drifts, "mean_confidence": _NUMBER_OR_NONE, "has_drift": _FLAG}
    request_log = _object(
        {"requests": _COUNT, "num_labeled": _COUNT, "held_out": _COUNT, "bytes": _COUNT, "full": _FLAG}
    )
    return _object({"models": {"type": "array", "items": model}, "request_log": request_log})


def _operation(
    name: str,
    summary: str,
    schema: Any,
    media_type: str = "application/json",
    *,
    errors: Sequence[int] = (),
    params: Sequence[Any] = (),
) -> dict[str, Any]:
    answers = {"200": {"description": "The answer.", "headers": _ID, **_content(schema, media_type)}}
    for status in (*errors, 401, 403):
        answers[str(status)] = {"description": _ERRORS[status], "headers": _ID, **_content(_ERROR)}
    return {"operationId": name, "summary": summary, "parameters": list(params), "responses": answers}


def _content(schema: Any, media_type: str = "application/json") -> dict[str, Any]:
    return {"content": {media_type: {"schema": schema}}}


def _object(properties: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **({"required": list(properties)} if required else {})}


def _path(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _name(names: list[str]) -> dict[str, Any]:
    return {"type": "string", "enum": names} if names else _TEXT


def _prediction_schema() -> dict[str, Any]:
    """One answer of `/predict`: what the targets say, which model said it, and times in milliseconds."""
    answer = _object({"id": _TEXT, "model": _TEXT, "version": _TEXT, "ms": {"type": "number"}})
    by_name = {"type": "object", "additionalProperties": _NUMBER_OR_NONE}
    answer["properties"] |= {"class": {"type": ["string", "null"]}, "probability": _NUMBER_OR_NONE}
    answer["properties"] |= {"probabilities": by_name, "value": _NUMBER_OR_NONE, "unit": _TEXT}
    return answer


def _request(inputs: list[TensorSpec], outputs: list[TensorSpec]) -> dict[str, Any]:
    """An inference request with tensors as JSON."""
    tensors = {
        "type": "array",
        "minItems": len(inputs),
        "maxItems": len(inputs),
        "items": {"anyOf": list(map(_tensor, inputs))},
    }
    chosen = _object({"name": {"enum": [spec.name for spec in outputs]}})
    request = _object({"inputs": tensors})
    request["properties"] |= {
        "id": {"type": "string", "maxLength": 256},
        "outputs": {"type": "array", "items": chosen, "uniqueItems": True},
    }
    return request


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    """A tensor of one row; more rows have as many times the elements."""
    count = math.prod(spec.shape)
    whole = spec.datatype.startswith(("INT", "UINT"))
    element: dict[str, Any] = (
        {"type": "boolean"} if spec.datatype == "BOOL" else {"type": "integer" if whole else "number"}
    )
    if spec.datatype == "UINT8":
        element = {"type": "integer", "minimum": 0, "maximum": 255}
    return _object(
        {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype},
            "shape": {"const": [1, *spec.shape]},
            "data": {"type": "array", "items": element, "minItems": count, "maxItems": count},
        }
    )


def _inference(outputs: list[TensorSpec]) -> dict[str, Any]:
    tensor = _object(
        {
            "name": {"enum": [spec.name for spec in outputs]},
            "datatype": {"enum": ["FP32", "BYTES"]},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "data": {"type": "array"},
        }
    )
    answer = {"model_name": _TEXT, "model_version": _TEXT, "id": _TEXT, "outputs": {"type": "array", "items": tensor}}
    described = _object(answer)
    described["properties"]["parameters"] = _object({"feedback_id": _TEXT})
    return described
