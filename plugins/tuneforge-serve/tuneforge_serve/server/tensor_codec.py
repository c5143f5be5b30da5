"""Tensors of the Open Inference Protocol, in JSON or as binary data after it.

Shapes: b samples of a request, k outputs.
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
_SINGLE_INPUT_NAME = "input"  # the name of a model's only input
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
"""The datatype of the protocol for each dtype."""

_KINDS = {"bool": "b", "float16": "iuf", "float32": "iuf", "float64": "iuf"}


@attrs.frozen
class TensorSpec:
    """An input or output of a model.

    Args:
        name: The name in requests and responses.
        dtype: The dtype of torch and numpy, or `bytes`.
        shape: The shape without the batch axis.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def datatype(self) -> str:
        """The datatype of the protocol."""
        return DATATYPES.get(self.dtype, BYTES)

    def to_metadata(self) -> dict[str, Any]:
        """Return the metadata of the protocol; the batch size is variable."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.shape]}


def list_input_specs(model: ServedModel) -> dict[str, TensorSpec]:
    """Return the inputs of a model, by the names of its stored tensors."""
    return {
        name: TensorSpec(name or _SINGLE_INPUT_NAME, dtype, shape)
        for name, (shape, dtype) in model.model.input_specs.items()
    }


def list_output_specs(model: ServedModel) -> list[TensorSpec]:
    """Return the outputs of a model: probabilities or numbers, and each described prediction as JSON text."""
    first = "probabilities" if model.targets.labels else "values"
    return [TensorSpec(first, "float32", (model.targets.num_outputs,)), TensorSpec("prediction", "bytes", ())]


def parse_json(content: bytes, field: str) -> Any:
    """Parse JSON strictly: without NaN and Inf.

    Raises:
        RequestError: It is not valid JSON.
    """
    try:
        return json.loads(content, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(400, f"{field} is not valid JSON: {why}") from None


def split_body(body: bytes, header_length: str | None) -> tuple[Any, memoryview]:
    """Return the JSON object of a request, and the binary tensors after it.

    Raises:
        RequestError: The length in the header is wrong, or the request is not a JSON object.
    """
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit()) or int(header_length[:12]) > len(body):
            raise RequestError(400, "Inference-Header-Content-Length is not a length within the body")
        length = int(header_length)
    request = parse_json(body[:length], "the request")
    if not isinstance(request, Mapping):
        raise RequestError(400, "the request is not a JSON object")
    return request, memoryview(body)[length:]


def read_inputs(request: Mapping[str, Any], binary: memoryview, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Return the input tensors (b, ...) by name.

    Raises:
        RequestError: An input is missing, unknown, duplicated, or has a wrong dtype, shape or size.
    """
    given = request.get("inputs")
    if not isinstance(given, list) or not given:
        raise RequestError(400, "inputs: a list of tensors is required")
    known = {spec.name: spec for spec in specs}
    found: dict[str, Tensor] = {}
    for index, each in enumerate(given):
        name = each.get("name") if isinstance(each, Mapping) else None
        if not isinstance(name, str) or name not in known or name in found:
            raise RequestError(400, f"inputs[{index}].name: each of {', '.join(known)} is required once")
        used = _binary_size(each, f"input '{name}'")
        data = None if used is None else binary[:used]
        found[name] = _decode_input(each, known[name], data)
        binary = binary[used or 0 :]
    if len(binary):
        raise RequestError(400, f"{len(binary)} bytes follow the last binary tensor")
    if len(found) < len(known):
        raise RequestError(400, f"inputs: {', '.join(sorted(set(known) - set(found)))} is missing")
    if len({len(tensor) for tensor in found.values()}) != 1:
        raise RequestError(400, "inputs: the batch sizes differ")
    return found


def require_finite(tensor: Tensor, field: str, *, status: int = 400) -> None:
    """Check that a tensor is finite.

    Raises:
        RequestError: It contains NaN or Inf.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise RequestError(status, f"{field}: NaN and Inf are not allowed")


def encode_output(spec: TensorSpec, values: Any, *, binary: bool) -> tuple[dict[str, Any], bytes]:
    """Encode an output as JSON, and as bytes if it is binary.

    Args:
        spec: The output.
        values: A float32 array (b, ...), or a list of b strings.
        binary: Whether the data follow the JSON as binary data.
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
    raise ValueError(f"{text} is not a number")


def _to_json_data(values: Any) -> list[Any]:
    """Return flat JSON data; NaN and Inf become null."""
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
        raise RequestError(400, f"{field}: parameters is not an object")
    if any(name.startswith("shared_memory") for name in parameters):
        raise RequestError(400, f"{field}: shared memory is not supported")
    size = parameters.get("binary_data_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise RequestError(400, f"{field}: binary_data_size is not a number of bytes")
    return size


def _decode_input(entry: Mapping[str, Any], spec: TensorSpec, data: memoryview | None) -> Tensor:
    field = f"input '{spec.name}'"
    if entry.get("datatype") != spec.datatype:
        raise RequestError(400, f"{field}: datatype {str(entry.get('datatype'))[:20]!r} is not {spec.datatype}")
    shape = _parse_shape(entry.get("shape"), spec, field)
    if (data is None) == ("data" not in entry):
        raise RequestError(400, f"{field}: either data or binary_data_size is required")
    array = _from_json(entry["data"], spec, field) if data is None else _from_bytes(data, spec, field)
    if array.size != math.prod(shape):
        raise RequestError(400, f"{field}: {array.size} elements do not fill the shape {shape}")
    tensor = torch.from_numpy(array.reshape(shape))
    require_finite(tensor, field)
    return tensor


def _parse_shape(value: Any, spec: TensorSpec, field: str) -> list[int]:
    whole = isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)
    if not whole or len(value) != len(spec.shape) + 1 or tuple(value[1:]) != spec.shape or value[0] < 1:
        raise RequestError(400, f"{field}: shape {str(value)[:60]} is not [batch, {', '.join(map(str, spec.shape))}]")
    return list(value)


def _from_bytes(data: memoryview, spec: TensorSpec, field: str) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    if len(data) % dtype.itemsize:
        raise RequestError(400, f"{field}: {len(data)} bytes are not a multiple of the size of {spec.datatype}")
    array = np.frombuffer(data, dtype)
    if spec.dtype == "bool":
        return np.array(np.frombuffer(data, np.uint8) != 0)
    return array.astype(np.dtype(spec.dtype))  # a writable copy in the byte order of the machine


def _from_json(data: Any, spec: TensorSpec, field: str) -> NDArray[Any]:
    """Return flat or nested numbers as an array, and check dtype and range."""
    fault = RequestError(400, f"{field}: data is not a list of {spec.datatype}")
    if not isinstance(data, list):
        raise fault
    try:
        array = np.array(data)
    except (ValueError, OverflowError):  # ragged lists, and numbers too large for any dtype
        raise fault from None
    if not array.size:
        return np.zeros(0, spec.dtype)
    if array.dtype.kind not in _KINDS.get(spec.dtype, "iu"):
        raise fault
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iu" and not (np.iinfo(dtype).min <= array.min() and array.max() <= np.iinfo(dtype).max):
        raise RequestError(400, f"{field}: data is out of range for {spec.datatype}")
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which is refused later
        return array.astype(dtype)
