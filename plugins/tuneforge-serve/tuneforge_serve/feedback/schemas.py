"""The entries of the request log: requests with their predictions, and labels."""

from __future__ import annotations

import json
import time
from typing import Any

import attrs
from safetensors import SafetensorError
from safetensors.torch import load, save

from tuneforge import Inputs, TensorTree
from tuneforge.errors import DataError
from tuneforge.exporting import named_tensors

TENSORS = "application/x-safetensors"
"""The content type of an input that was sent as stored tensors."""

_STORED = "stored/"


@attrs.frozen
class LoggedRequest:
    """One input and its prediction.

    Args:
        id: The id of the request, by which a label refers to it.
        version: The version of the model.
        body: The input as it was sent.
        content_type: The type of the body, such as `image/png`; `TENSORS` for stored tensors.
        prediction: JSON data; `class` and `probability`, if there, are used for the review order and the accuracy.
        time: Seconds since 1970.
        features: The features that drift is tested on, float32 bytes; None without them.
        content_digest: A digest of the stored input, so that one image sent in two encodings counts once; by default
            the SHA-256 of the body.
    """

    id: str
    version: str
    body: bytes
    content_type: str
    prediction: dict[str, Any]
    time: float = attrs.field(factory=time.time)
    features: bytes | None = None
    content_digest: str = ""

    def decode(self, inputs: Inputs) -> TensorTree:
        """Return the stored form of the input, without a sample axis.

        Raises:
            DataError: The input cannot be decoded.
        """
        if self.content_type != TENSORS:
            return inputs.decode(json.loads(self.body) if self.content_type == "application/json" else self.body)
        try:
            found = {name.removeprefix(_STORED): tensor for name, tensor in load(self.body).items()}
        except SafetensorError as error:
            raise DataError(f"the tensors of request '{self.id}' cannot be read", why=str(error)) from None
        return found.get("", found)


def encode_row(stored: TensorTree, row: int) -> bytes:
    """Return one row of stored inputs (b, ...) as the body of a request of type `TENSORS`."""
    return save({_STORED + name: tensor[row].contiguous() for name, tensor in named_tensors(stored).items()})


@attrs.frozen
class LabelRecord:
    """A label in the request log.

    Args:
        id: The id of the request.
        class_name: The label.
        previous_class: The previous label; None for the first one.
        held_out: True if the sample is held out for the gate.
        agrees: Whether the prediction was this class; None if the prediction was not a class.
    """

    id: str
    class_name: str
    previous_class: str | None
    held_out: bool
    agrees: bool | None


@attrs.frozen
class LabeledRequest:
    """A labeled sample, for training or for the gate.

    Args:
        request: The request and its prediction.
        label: The label.
        held_out: True if the sample is held out for the gate.
        label_number: The position of the label among all labels ever given, from 1.
    """

    request: LoggedRequest
    label: str
    held_out: bool
    label_number: int = 0


@attrs.frozen
class RequestLogStats:
    """The size of a request log.

    Args:
        num_requests: The number of requests.
        num_labeled: The number of labeled requests.
        num_held_out: The number of labeled requests that are held out for the gate.
        num_labels: The number of labels ever given, corrections included.
        used_bytes: The used size of the file.
    """

    num_requests: int
    num_labeled: int
    num_held_out: int
    num_labels: int
    used_bytes: int
