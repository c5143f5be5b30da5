"""The dtypes in which a module takes its inputs, where those of the data do not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tuneforge.engine.data.tensor_tree import named_tensors

_MAX_INTEGER_INPUTS = 4  # each may be an index, or a number that the module takes as a float


def candidate_dtypes(module: nn.Module, example: Any) -> Iterator[dict[str, torch.dtype]]:
    """Yield dtypes to convert some inputs to, by name ("" for a single one): first few conversions, then more.

    Floats are converted to the dtype of the module's weights, and integers too where the module takes no integers.

    Args:
        module: The module.
        example: Prepared inputs.
    """
    if not isinstance(example, (Tensor, Mapping)):
        return
    tensors = named_tensors(example)
    integers = [name for name, each in tensors.items() if not each.is_floating_point() and not each.is_complex()]
    weights = dict.fromkeys(each.dtype for each in module.parameters() if each.is_floating_point())
    for dtype in weights or (torch.float32,):
        floats = {name: dtype for name, each in tensors.items() if each.is_floating_point() and each.dtype != dtype}
        for count in range(min(len(integers), _MAX_INTEGER_INPUTS) + 1):
            for chosen in itertools.combinations(integers, count):
                if converted := floats | dict.fromkeys(chosen, dtype):
                    yield converted


def describe_conversion(dtypes: Mapping[str, torch.dtype], example: Any) -> str:
    """Return a sentence on which inputs are converted, for the log.

    Args:
        dtypes: What `candidate_dtypes` yielded.
        example: Prepared inputs, before they are converted.
    """
    tensors = named_tensors(example)
    parts = [
        f"{f'input {name!r}' if name else 'the inputs'} from {_short(tensors[name].dtype)} to {_short(dtype)}"
        for name, dtype in dtypes.items()
    ]
    return f"converted to what the model takes: {', '.join(parts)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
