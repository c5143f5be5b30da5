"""Tensors as the Open Inference Protocol writes them, in JSON or as bytes after it.

Shapes: b rows of a request, k outputs.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge_serve.server.model_manager import ServedModel
from tuneforge_serve.server.request_body import RequestError

BYTES = "BYTES"
_SINGLE_INPUT_NAME = "input"  # what a model's single tensor is called
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
"""The protocol's name of each type that a model may store."""

_KINDS = {"bool": "b", "float16": "iuf", "float32": "iuf", "float64": "iuf"}


@attrs.frozen
class TensorSpec:
    """A tensor of a model.

    Args:
        name: In requests and answers.
        dtype: As torch and numpy name it, or `bytes`.
        shape: Without the rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def datatype(self) -> str:
        """The protocol's name of the type."""
        return DATATYPES.get(self.dtype, BYTES)

    def to_metadata(self) -> dict[str, Any]:
        """As the metadata list it; the rows may be any number."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.shape]}


def list_input_specs(model: ServedModel) -> dict[str, TensorSpec]:
    """The model's stored tensors by their name in the inputs contract, as the protocol names them."""
    return {
        name: TensorSpec(name or _SINGLE_INPUT_NAME, dtype, shape)
        for name, (shape, dtype) in model.model.input_specs.items()
    }


def list_output_specs(model: ServedModel) -> list[TensorSpec]:
    """What a model gives: probabilities or numbers, and each answer as JSON text for people."""
    first = "probabilities" if model.targets.labels else "values"
    return [TensorSpec(first, "float32", (model.targets.num_outputs,)), TensorSpec("answer", "bytes", ())]


def parse_json(content: bytes, field: str) -> Any:
    """JSON from outside, strictly: no NaN, no infinity, no bottomless nesting.

    Raises:
        RequestError: It is no such JSON.
    """
    try:
        return json.loads(content, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(400, f"{field} is no valid JSON: {why}") from None


def split_body(body: bytes, header_length: str | None) -> tuple[Any, memoryview]:
    """The JSON object of a request, and the binary tensors after it.

    Raises:
        RequestError: The length that the header names does not fit, or it is no JSON object.
    """
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit()) or int(header_length[:12]) > len(body):
            raise RequestError(400, "Inference-Header-Content-Length is no length within the body")
        length = int(header_length)
    request = parse_json(body[:length], "the request")
    if not isinstance(request, Mapping):
        raise RequestError(400, "the request is no JSON object")
    return request, memoryview(body)[length:]


def read_inputs(request: Mapping[str, Any], binary: memoryview, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """The input tensors (b, ...) by name.

    Raises:
        RequestError: An input is missing, unknown, there twice, or not of its type, shape or size.
    """
    given = request.get("inputs")
    if not isinstance(given, list) or not given:
        raise RequestError(400, "inputs: a list of tensors is needed")
    known = {spec.name: spec for spec in specs}
    found: dict[str, Tensor] = {}
    for place, each in enumerate(given):
        name = each.get("name") if isinstance(each, Mapping) else None
        if not isinstance(name, str) or name not in known or name in found:
            raise RequestError(400, f"inputs[{place}].name: each of {', '.join(known)} is needed once")
        used = _binary_size(each, f"input '{name}'")
        data = None if used is None else binary[:used]
        found[name] = _decode_input(each, known[name], data)
        binary = binary[used or 0 :]
    if len(binary):
        raise RequestError(400, f"{len(binary)} bytes follow the last binary tensor")
    if len(found) < len(known):
        raise RequestError(400, f"inputs: {', '.join(sorted(set(known) - set(found)))} is missing")
    if len({len(tensor) for tensor in found.values()}) != 1:
        raise RequestError(400, "inputs: the numbers of rows differ")
    return found


def require_finite(tensor: Tensor, field: str, *, status: int = 400) -> None:
    """See that a tensor holds numbers.

    Raises:
        RequestError: It holds NaN or infinity.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise RequestError(status, f"{field}: NaN and infinity are no inputs")


def encode_output(spec: TensorSpec, values: Any, *, binary: bool) -> tuple[dict[str, Any], bytes]:
    """An output of the answer, and its bytes where it is binary.

    Args:
        spec: Of the output.
        values: A float32 array (b, ...), or a list of b texts.
        binary: Whether the data follow the JSON as bytes.
    """
    shape = [len(values), *spec.shape]
    head: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": shape}
    if not binary:
        return {**head, "data": _to_json_data(values)}, b""
    content = (
        _pack_strings(values) if isinstance(values, list) else values.astype(values.dtype.newbyteorder("<")).tobytes()
    )
    return {**head, "parameters": {"binary_data_size": len(content)}}, content


def _reject_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _to_json_data(values: Any) -> list[Any]:
    """Flat JSON data; what is no number becomes null."""
    if isinstance(values, list):
        return values
    flat: list[Any] = values.reshape(-1).tolist()
    return [each if math.isfinite(each) else None for each in flat]


def _pack_strings(texts: list[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(struct.pack("<I", len(each)) + each for each in encoded)


def _binary_size(entry: Mapping[str, Any], field: str) -> int | None:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise RequestError(400, f"{field}: parameters is no object")
    if any(name.startswith("shared_memory") for name in parameters):
        raise RequestError(400, f"{field}: shared memory is not supported")
    size = parameters.get("binary_data_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise RequestError(400, f"{field}: binary_data_size is no number of bytes")
    return size


def _decode_input(entry: Mapping[str, Any], spec: TensorSpec, data: memoryview | None) -> Tensor:
    field = f"input '{spec.name}'"
    if entry.get("datatype") != spec.datatype:
        raise RequestError(400, f"{field}: datatype {str(entry.get('datatype'))[:20]!r} is not {spec.datatype}")
    shape = _parse_shape(entry.get("shape"), spec, field)
    if (data is None) == ("data" not in entry):
        raise RequestError(400, f"{field}: either data or binary_data_size is needed")
    array = _from_json(entry["data"], spec, field) if data is None else _from_bytes(data, spec, field)
    if array.size != math.prod(shape):
        raise RequestError(400, f"{field}: {array.size} elements do not fill the shape {shape}")
    tensor = torch.from_numpy(array.reshape(shape))
    require_finite(tensor, field)
    return tensor


def _parse_shape(value: Any, spec: TensorSpec, field: str) -> list[int]:
    whole = isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)
    if not whole or len(value) != len(spec.shape) + 1 or tuple(value[1:]) != spec.shape or value[0] < 1:
        raise RequestError(400, f"{field}: shape {str(value)[:60]} is not [rows, {', '.join(map(str, spec.shape))}]")
    return list(value)


def _from_bytes(data: memoryview, spec: TensorSpec, field: str) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    if len(data) % dtype.itemsize:
        raise RequestError(400, f"{field}: {len(data)} bytes are no whole number of {spec.datatype}")
    array = np.frombuffer(data, dtype)
    if spec.dtype == "bool":
        return np.array(np.frombuffer(data, np.uint8) != 0)
    return array.astype(np.dtype(spec.dtype))  # a copy in the machine's byte order, which torch may write to


def _from_json(data: Any, spec: TensorSpec, field: str) -> NDArray[Any]:
    """Numbers, flat or nested, of the type and within its range."""
    fault = RequestError(400, f"{field}: data is no list of {spec.datatype}")
    if not isinstance(data, list):
        raise fault
    try:
        array = np.array(data)
    except (ValueError, OverflowError):  # lists of unequal length, and numbers beyond any type
        raise fault from None
    if not array.size:
        return np.zeros(0, spec.dtype)
    if array.dtype.kind not in _KINDS.get(spec.dtype, "iu"):
        raise fault
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iu" and not (np.iinfo(dtype).min <= array.min() and array.max() <= np.iinfo(dtype).max):
        raise RequestError(400, f"{field}: data leaves the range of {spec.datatype}")
    with np.errstate(over="ignore"):  # what a smaller type cannot hold becomes infinite, which is refused after
        return array.astype(dtype)
