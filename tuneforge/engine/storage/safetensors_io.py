"""Safetensors files, written one tensor at a time so that a large model is never in memory twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuneforge.engine.storage.atomic import atomic_write
from tuneforge.errors import FolderError, UnsafeFileError, UsageError

_METADATA_KEY = "tuneforge"  # the format does not fix the order of metadata keys, so a single key holds everything
_DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The format's names of the types, in the order in which its own library writes them: the widest first, which aligns
every tensor."""


def is_storable(tensor: Tensor) -> bool:
    """Return True if the format has the dtype and the layout of a tensor."""
    return tensor.dtype in _DTYPES and tensor.layout is torch.strided


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors, atomically; equal tensors and metadata give identical files.

    Args:
        tensors: By name; values are stored bit-exactly, strides are not.
        path: The file to write or replace.
        metadata: Plain data stored with the tensors.

    Raises:
        UsageError: A tensor has a type that safetensors does not support, such as complex128.
        TryAgainError: The disk is full.
    """
    for name, tensor in tensors.items():
        if not is_storable(tensor):
            raise UsageError(
                f"'{name}' cannot be stored as safetensors",
                where=str(path),
                why=f"its type is {tensor.dtype} and its layout {tensor.layout}",
                fix="convert it to another type first",
            )
    positions = list(_DTYPES)
    ordered = dict(sorted(tensors.items(), key=lambda item: (positions.index(item[1].dtype), item[0])))
    atomic_write(path, _serialize(ordered, json.dumps(metadata or {}, sort_keys=True)))


def _serialize(tensors: Mapping[str, Tensor], metadata: str) -> Iterator[bytes | memoryview]:
    """Yield the parts of the file: the length of the header, the header, and each tensor's bytes."""
    header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: metadata}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        # A conjugated or negated view shares its memory with the original: its bytes are not yet the values.
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        yield plain.reshape(-1).view(torch.uint8).numpy().data


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata from safetensors.

    Raises:
        FolderError: The file is missing.
        UnsafeFileError: It is not a safetensors file; a pickle is never opened.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FolderError(f"there is no weights file '{path.name}'", where=str(path.parent), fix="check the path")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise UnsafeFileError(
            f"'{path.name}' is not a valid safetensors file",
            where=str(path.parent),
            why=str(error),
            fix="give a safetensors file, because other formats can run code when they are opened",
        ) from None
    return tensors, metadata


def get_state_dict(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; a tied tensor is listed once, under its first name."""
    seen: dict[int, str] = {}
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] != "_extra_state" and id(tensor) not in seen:
            seen[id(tensor)] = name
            state[name] = tensor.detach()
    return state


def load_state_dict(module: torch.nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Copy all parameters and persistent buffers into a module, in place.

    Args:
        module: The module to change.
        state: As `get_state_dict` returns it.
        where: The file that the message of an error names.

    Raises:
        FolderError: Names or shapes differ; the message lists them.
    """
    own = get_state_dict(module)
    wrong = sorted(set(own) ^ set(state)) + sorted(
        name for name in set(own) & set(state) if own[name].shape != state[name].shape
    )
    if wrong:
        raise FolderError(
            f"weights do not fit the model: {', '.join(wrong[:5])}",
            where=where,
            why=f"{len(wrong)} name(s) or shape(s) differ",
            fix="build the model with the options that it was trained with",
        )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
