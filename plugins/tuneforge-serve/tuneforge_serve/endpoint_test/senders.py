"""Send samples of a split to a server, and turn its predictions back into model outputs.

Shapes: b samples of a request, k outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
import torch
from torch import Tensor

from tuneforge import Split, Targets
from tuneforge.errors import DataError
from tuneforge.exporting import named_tensors
from tuneforge_serve.endpoint_test.http_client import ServerClient

_DATATYPES = {
    torch.uint8: "UINT8", torch.bool: "BOOL", torch.int64: "INT64", torch.int32: "INT32",
    torch.float32: "FP32", torch.float64: "FP64",
}  # fmt: skip

_NO_STORE = {"Cache-Control": "no-store"}  # keeps the test out of the request log


@attrs.frozen(eq=False)
class EndpointResponse:
    """The response to one request.

    Args:
        split: The name of the split.
        outputs: Model outputs (b, k), float64.
        version: The version of the model.
        latency_s: Seconds from the request to the response.
    """

    split: str
    outputs: Tensor
    version: str
    latency_s: float


EndpointRequest = tuple[str, Split, Tensor]
"""The name of a split, the split, and the rows to send, int64 (b,)."""

Send = Callable[[str, Split, Tensor], EndpointResponse]
"""Sends the rows of an `EndpointRequest`."""


@attrs.frozen
class ModelMetadata:
    """What a server says about a model.

    Args:
        name: The name of the model.
        input_name: The name of its first input.
        labels: The class names; empty if the server lists none.
    """

    name: str
    input_name: str
    labels: tuple[str, ...]


def make_file_sender(server: ServerClient, targets: Targets, files: Mapping[str, Sequence[Path]]) -> Send:
    """Return a function that sends the file of one sample to `/predict`.

    Args:
        server: The server.
        targets: Describe the outputs.
        files: The file of each sample, by split.
    """

    def send(name: str, split: Split, rows: Tensor) -> EndpointResponse:
        content = files[name][int(rows)].read_bytes()
        headers = {"Content-Type": "application/octet-stream", **_NO_STORE}
        prediction, latency_s = server.request("POST", "/predict", content, headers)
        outputs = to_outputs(targets, prediction)[None]
        return EndpointResponse(name, outputs, str(prediction.get("version", "")), latency_s)

    return send


def make_v2_sender(server: ServerClient, targets: Targets, model: ModelMetadata) -> Send:
    """Return a function that sends the stored tensors of samples by the Open Inference Protocol."""
    path = f"/v2/models/{quote(model.name)}/infer"

    def send(name: str, split: Split, rows: Tensor) -> EndpointResponse:
        tensors = named_tensors(split.fetch(rows))
        inputs = [_encode_tensor(key or model.input_name, tensor) for key, tensor in tensors.items()]
        headers = {"Content-Type": "application/json", **_NO_STORE}
        response, latency_s = server.request("POST", path, json.dumps({"inputs": inputs}).encode(), headers)
        outputs = _decode_outputs(response, targets, model.labels)
        if len(outputs) != len(rows):
            raise DataError(f"{len(outputs)} predictions for {len(rows)} samples", where=server.url)
        return EndpointResponse(name, outputs, str(response.get("model_version", "")), latency_s)

    return send


def fetch_model_metadata(server: ServerClient, name: str | None) -> ModelMetadata:
    """Return what a server says about a model; about the first one in its list if `name` is None."""
    if name is None:
        index, _ = server.request("POST", "/v2/repository/index", b"{}", {"Content-Type": "application/json"})
        if not index:
            raise DataError("the server has no model", where=server.url, fix="promote one")
        name = str(index[0]["name"])
    metadata, _ = server.request("GET", f"/v2/models/{quote(name)}")
    return ModelMetadata(name, metadata["inputs"][0]["name"], tuple(metadata.get("parameters", {}).get("labels", ())))


def to_outputs(targets: Targets, description: Mapping[str, Any]) -> Tensor:
    """Return the model output (k,), float64, that `Targets.describe` turns into `description`.

    The output consists of the logarithms of the probabilities, or of standardized numbers.

    Raises:
        DataError: The description has other classes than the targets.
    """
    by_name = description.get("probabilities")
    if by_name is not None and set(by_name) != set(targets.labels):
        extra, missing = sorted(set(by_name) - set(targets.labels)), sorted(set(targets.labels) - set(by_name))
        raise DataError(
            "the server's classes are not those of the data",
            why=f"only on the server: {', '.join(extra) or 'none'}; only in the data: {', '.join(missing) or 'none'}",
            fix="serve the model of this run, or pass the data of the model",
        )
    if by_name is not None:
        values = [math.nan if by_name[name] is None else float(by_name[name]) for name in targets.labels]
        return _to_logits(torch.tensor(values, dtype=torch.float64), exclusive="class" in description)
    values = description.get("values", description.get("value"))
    encoded = targets.encode(values)
    return torch.tensor(encoded if isinstance(encoded, list) else [encoded], dtype=torch.float64)


def _to_logits(probabilities: Tensor, *, exclusive: bool) -> Tensor:
    """Return outputs whose softmax (if exclusive) or sigmoid is `probabilities`."""
    tiny = torch.finfo(torch.float64).tiny
    scores = probabilities.clamp_min(tiny).log()
    return scores if exclusive else scores - torch.log1p(-probabilities.clamp_max(1 - 1e-16))


def _encode_tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    """Encode a tensor as the JSON of the Open Inference Protocol."""
    return {
        "name": name,
        "datatype": _DATATYPES[tensor.dtype],
        "shape": list(tensor.shape),
        "data": tensor.flatten().tolist(),
    }


def _decode_outputs(response: Mapping[str, Any], targets: Targets, labels: Sequence[str]) -> Tensor:
    """Return model outputs (b, k) for the probabilities or numbers in the first output tensor.

    Args:
        response: The response of the server.
        targets: Describe the outputs.
        labels: The server's classes in its order; empty if it lists none, which then are those of the data.
    """
    first = response["outputs"][0]
    values = torch.tensor(first["data"], dtype=torch.float64).reshape(first["shape"])
    if values.ndim != 2 or values.shape[1] != targets.num_outputs or (labels and set(labels) != set(targets.labels)):
        raise DataError(
            f"the server's output has the shape {tuple(first['shape'])}",
            why=f"the data has {targets.num_outputs} class(es) or number(s): {', '.join(targets.labels)}",
            fix="serve the model of this run, or pass the data of the model",
        )
    if targets.labels:
        ordered = values[:, [labels.index(name) for name in targets.labels]] if labels else values
        return _to_logits(ordered, exclusive="class" in targets.describe(ordered[0]))
    return torch.tensor([targets.encode(row) for row in values.tolist()], dtype=torch.float64).reshape(values.shape)
