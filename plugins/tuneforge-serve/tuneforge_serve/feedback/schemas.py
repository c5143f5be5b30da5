"""What the records of production hold: requests with their answers, and labels."""

from __future__ import annotations

import json
import time
from typing import Any

import attrs
from safetensors import SafetensorError
from safetensors.torch import load, save

from tuneforge.engine.data.dataset import Inputs, TensorTree, named_tensors
from tuneforge.errors import DataError

TENSORS = "application/x-safetensors"
"""The content type of an input that was sent in its stored form."""

_STORED = "stored/"


@attrs.frozen
class LoggedRequest:
    """One thing that was asked and what was answered.

    Args:
        id: The request's, by which a label finds it.
        version: The model that answered.
        body: The input as it was sent.
        content_type: What the body is, such as `image/png`; `TENSORS` for what came in its stored form.
        prediction: Plain data; `class` and `probability`, where it has them, are what it is ranked and judged by.
        time: Seconds since 1970.
        features: What drift is measured on, float32 bytes; None where nobody asked.
        content_digest: A digest of what the model saw, so that one picture sent in two ways counts as one; by default
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
        """The stored form of the input, without a sample axis.

        Raises:
            DataError: It cannot be decoded.
        """
        if self.content_type != TENSORS:
            return inputs.decode(json.loads(self.body) if self.content_type == "application/json" else self.body)
        try:
            found = {name.removeprefix(_STORED): tensor for name, tensor in load(self.body).items()}
        except SafetensorError as error:
            raise DataError(f"the tensors of request '{self.id}' cannot be read", why=str(error)) from None
        return found.get("", found)


def encode_row(stored: TensorTree, row: int) -> bytes:
    """One row of stored inputs (b, ...) as the body of an exchange of type `TENSORS`."""
    return save({_STORED + name: tensor[row].contiguous() for name, tensor in named_tensors(stored).items()})


@attrs.frozen
class LabelRecord:
    """A label as it stands in the file.

    Args:
        id: The request's.
        class_name: The class that is right.
        previous_class: The label before it; None where it is the first.
        held_out: True where the sample is for the gate alone.
        agrees: Whether the answer had been this class; None where the answer named none.
    """

    id: str
    class_name: str
    previous_class: str | None
    held_out: bool
    agrees: bool | None


@attrs.frozen
class LabeledRequest:
    """A labelled sample, for training or for the gate.

    Args:
        request: The request and its answer.
        label: The class that is right.
        held_out: True where it is for the gate alone.
        label_number: How many labels had been given when this one was, itself counted.
    """

    request: LoggedRequest
    label: str
    held_out: bool
    label_number: int = 0


@attrs.frozen
class RequestLogStats:
    """What the file holds.

    Args:
        num_requests: Requests kept.
        num_labeled: Requests with a label.
        num_held_out: Labelled requests that are set aside.
        num_labels: Labels ever given, relabelling included.
        used_bytes: Size of the file in use.
    """

    num_requests: int
    num_labeled: int
    num_held_out: int
    num_labels: int
    used_bytes: int
