"""Raw values as tensors: arrays, tensors and nested lists of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import DataError

_KEPT_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.uint8, torch.bool)


def to_tensor(value: Any, *, where: str, float_dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a CPU tensor: floats get `float_dtype`, complex numbers complex64, integers int64.

    uint8 and booleans keep their dtype.

    Raises:
        DataError: The value is not an array of finite numbers, or is sparse.
    """
    require_dense(value, where=where)
    if type(value).__module__.partition(".")[0] == "PIL":
        raise DataError("a PIL image", where=where, fix="convert it to a tensor (torchvision.transforms.v2)")
    try:
        is_tensor = isinstance(value, Tensor)
        tensor = value.detach().cpu() if is_tensor else _from_array(np.asarray(value), float_dtype)
    except (TypeError, ValueError) as error:
        raise DataError(f"{type(value).__name__} is not an array of numbers", where=where, why=str(error)) from None
    if tensor.is_floating_point() or tensor.is_complex():
        tensor = tensor.to(torch.complex64 if tensor.is_complex() else float_dtype)
        if not tensor.isfinite().all():
            row = int((~tensor.isfinite()).nonzero()[0, 0]) if tensor.ndim else 0
            raise DataError("an input is NaN or Inf", where=f"{where}[{row}]", fix="replace or remove such values")
    return tensor if tensor.dtype in _KEPT_DTYPES else tensor.long()


def require_dense(value: Any, *, where: str) -> None:
    """Raise `DataError` if a value is a sparse matrix of scipy, or a sparse or jagged tensor."""
    is_scipy = any(cls.__module__.startswith("scipy.sparse") for cls in type(value).__mro__)
    if is_scipy or (isinstance(value, Tensor) and value.layout is not torch.strided):
        kind = type(value).__name__ if is_scipy else f"a tensor of layout {value.layout}"
        raise DataError(
            f"{kind} is sparse",
            where=where,
            why="samples are taken row by row from dense arrays",
            fix="give it dense: x.toarray() for scipy (OneHotEncoder(sparse_output=False)), x.to_dense() for torch",
        )


def require_one_input(value: Any, *, where: str) -> None:
    """Raise `DataError` if a sample is a tuple or list of tensors or arrays, which would be stacked into one input."""
    if not isinstance(value, (tuple, list)):
        return
    if any(isinstance(each, (Tensor, np.ndarray)) and each.ndim for each in value):
        names = ", ".join(f"'NAME{place}': value{place}" for place in range(1, min(len(value), 3) + 1))
        raise DataError(
            f"the inputs of a sample are a {type(value).__name__} of {len(value)}",
            where=where,
            why="they are one tensor, or a mapping whose tensors forward() takes by keyword",
            fix=f"return a mapping by the names of the arguments of forward(): {{{names}}}; or stack them",
        )


def _from_array(array: NDArray[Any], float_dtype: torch.dtype) -> Tensor:
    if array.dtype.kind not in "biufc":
        raise TypeError(f"its dtype is {array.dtype}; use --data table-csv for text columns")
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"the integer {array.max()} does not fit into int64")
    kept = array.dtype == np.uint8 or array.dtype.kind == "b"
    floats = np.float64 if float_dtype == torch.float64 else np.float32
    dtype = array.dtype if kept else {"f": floats, "c": np.complex64}.get(array.dtype.kind, np.int64)
    return torch.from_numpy(np.require(array, dtype=dtype, requirements=("C", "W")))  # torch warns about read-only ones
