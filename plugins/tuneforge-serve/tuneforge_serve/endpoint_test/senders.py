"""What sends samples of a split to a server, and reads what it answers as outputs of a model.

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

from tuneforge.engine.data.dataset import Split, Subset, Targets, named_tensors
from tuneforge.errors import DataError
from tuneforge_serve.endpoint_test.http_client import ClientConnection, ServerClient

_DATATYPES = {
    torch.uint8: "UINT8", torch.bool: "BOOL", torch.int64: "INT64", torch.int32: "INT32",
    torch.float32: "FP32", torch.float64: "FP64",
}  # fmt: skip

_NO_STORE = {"Cache_Control": "no-store"}  # a test is no part of what production asked


@attrs.frozen(eq=False)
class EndpointResponse:
    """The answer to one request: the split that it is of, outputs (b, k) in float64, version and latency."""

    split: str
    outputs: Tensor
    version: str
    seconds: float


EndpointRequest = tuple[str, Split, Tensor]
"""What one request asks: a split's name, the split, and rows of it, int64 (b,)."""

Send = Callable[[ClientConnection, str, Split, Tensor], EndpointResponse]


def make_file_sender(targets: Targets) -> Send:
    """What sends the file of a sample as it is."""

    def send(connection: ClientConnection, name: str, split: Split, rows: Tensor) -> EndpointResponse:
        paths = list_sample_files(split.subset(rows))
        assert paths is not None
        content = paths[0].read_bytes()
        answer, seconds = connection.request(
            "POST", "/predict", content, Content_Type="application/octet-stream", **_NO_STORE
        )
        return EndpointResponse(name, to_outputs(targets, answer)[None], str(answer.get("version", "")), seconds)

    return send


def make_v2_sender(server: ServerClient, targets: Targets, model: ModelMetadata) -> Send:
    """What sends rows of a split in their stored form."""
    path = f"/v2/models/{quote(model.name)}/infer"

    def send(connection: ClientConnection, name: str, split: Split, rows: Tensor) -> EndpointResponse:
        inputs = [
            _v2_tensor(key or model.input_name, tensor) for key, tensor in named_tensors(split.fetch(rows)).items()
        ]
        body = json.dumps({"inputs": inputs}).encode()
        answer, seconds = connection.request("POST", path, body, Content_Type="application/json", **_NO_STORE)
        outputs = _v2_outputs(answer, targets, model.labels)
        if len(outputs) != len(rows):
            raise DataError(f"{len(outputs)} answers to {len(rows)} samples", where=server.url)
        return EndpointResponse(name, outputs, str(answer.get("model_version", "")), seconds)

    return send


@attrs.frozen
class ModelMetadata:
    """What a server says of its model: name, what a single input is called, its classes (empty where it says none)."""

    name: str
    input_name: str
    labels: tuple[str, ...]


def fetch_model_metadata(server: ServerClient, name: str | None) -> ModelMetadata:
    """What a server says of a model; of the first that it lists, where none is named."""
    connection = server.connect()
    try:
        if name is None:
            listed, _ = connection.request("POST", "/v2/repository/index", b"{}", Content_Type="application/json")
            if not listed:
                raise DataError("the server has no model", where=server.url, fix="promote one")
            name = str(listed[0]["name"])
        metadata, _ = connection.request("GET", f"/v2/models/{quote(name)}")
    finally:
        connection.close()
    return ModelMetadata(name, metadata["inputs"][0]["name"], tuple(metadata.get("parameters", {}).get("labels", ())))


def list_sample_files(split: Split) -> list[Path] | None:
    """The file of each sample; None where they are not read from files."""
    source: Any = split.source
    rows = torch.arange(len(split))
    while isinstance(source, Subset):
        source, rows = source.source, source.indices[rows]
    paths = getattr(getattr(source, "source", source), "paths", None)  # of files, or of files with replacements
    return None if paths is None else [Path(paths[row]) for row in rows.tolist()]


def to_outputs(targets: Targets, description: Mapping[str, Any]) -> Tensor:
    """A model output (k,), float64, that `Targets.describe` would describe so: logarithms of probabilities, or numbers.

    Raises:
        DataError: The description is not of these targets.
    """
    by_name = description.get("probabilities")
    if by_name is not None and set(by_name) != set(targets.labels):
        extra, missing = sorted(set(by_name) - set(targets.labels)), sorted(set(targets.labels) - set(by_name))
        raise DataError(
            "the server's classes are not those of the data",
            why=f"only there: {', '.join(extra) or 'none'}; only in the data: {', '.join(missing) or 'none'}",
            fix="serve the model of this run, or name its data",
        )
    if by_name is not None:
        values = [math.nan if by_name[name] is None else float(by_name[name]) for name in targets.labels]
        return _to_logits(torch.tensor(values, dtype=torch.float64), exclusive="class" in description)
    values = description.get("values", description.get("value"))
    encoded = targets.encode(values)
    return torch.tensor(encoded if isinstance(encoded, list) else [encoded], dtype=torch.float64)


def _to_logits(probabilities: Tensor, *, exclusive: bool) -> Tensor:
    """Outputs whose softmax (exclusive) or sigmoid gives these probabilities."""
    tiny = torch.finfo(torch.float64).tiny
    scores = probabilities.clamp_min(tiny).log()
    return scores if exclusive else scores - torch.log1p(-probabilities.clamp_max(1 - 1e-16))


def _v2_tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    """A tensor as the Open Inference Protocol writes it in JSON."""
    return {
        "name": name,
        "datatype": _DATATYPES[tensor.dtype],
        "shape": list(tensor.shape),
        "data": tensor.flatten().tolist(),
    }


def _v2_outputs(answer: Mapping[str, Any], targets: Targets, labels: Sequence[str]) -> Tensor:
    """Model outputs (b, k) for the answers, probabilities or numbers in their unit, in the first output tensor.

    Args:
        answer: Of the server.
        targets: How outputs are read.
        labels: The server's classes in its order; empty where it does not say: those of the data then.
    """
    first = answer["outputs"][0]
    values = torch.tensor(first["data"], dtype=torch.float64).reshape(first["shape"])
    if values.ndim != 2 or values.shape[1] != targets.num_outputs or (labels and set(labels) != set(targets.labels)):
        raise DataError(
            f"the server answers with shape {tuple(first['shape'])}",
            why=f"the data has {targets.num_outputs} class(es) or number(s): {', '.join(targets.labels)}",
            fix="serve the model of this run, or name its data",
        )
    if targets.labels:
        ordered = values[:, [labels.index(name) for name in targets.labels]] if labels else values
        return _to_logits(ordered, exclusive="class" in targets.describe(ordered[0]))
    return torch.tensor([targets.encode(row) for row in values.tolist()], dtype=torch.float64).reshape(values.shape)
