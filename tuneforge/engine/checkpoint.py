"""Checkpoints: a nested structure of plain data and tensors, saved all or nothing, found broken before it is used.

A checkpoint is a folder under `checkpoints/` with `state.json` (plain data, tensors by reference),
`tensors.safetensors` (each tensor once, however often it is referred to) and, written last, `manifest.json` (size and
SHA-256 of both). It is built under a temporary name, flushed, and renamed. An old one is deleted when a newer one has
verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine import faults
from tuneforge.engine.folder import load_tensors, save_tensors, write_whole
from tuneforge.errors import FolderError, TuneforgeError
from tuneforge.plugin.steps import from_json, to_json

FOLDER = "checkpoints"
_STATE, _TENSORS, _MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
_REFERENCE = "__tensor__"


@attrs.define(eq=False)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_folder: The run's folder.
        every_s: Seconds between two checkpoints.
        keep: How many are kept.
        count: Saved so far by this process.
        spent_s: Seconds that saving took so far.
    """

    run_folder: Path
    every_s: float
    keep: int
    count: int = 0
    spent_s: float = 0.0
    _last: float = attrs.field(factory=time.monotonic)

    @property
    def due(self) -> bool:
        """True where the last one is old enough."""
        return time.monotonic() - self._last >= self.every_s

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, verify it, and delete those that are too old.

        Args:
            step: Optimizer steps so far; names the folder, in which a later one of the same step replaces an earlier.
            state: Plain data and tensors, nested.

        Raises:
            TryAgainError: The disk is full; earlier checkpoints are as they were.
        """
        began = time.monotonic()
        folder = self.run_folder / FOLDER
        folder.mkdir(exist_ok=True)
        number = 1 + max((_number(path) for path in _complete(folder)), default=0)
        temporary, final = folder / f".{number:06d}.part", folder / f"{number:06d}-step-{step}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _write(temporary, state)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        faults.point("checkpoint.before-rename")
        temporary.rename(final)
        _flush(folder)
        faults.point("checkpoint.after-rename")
        verify(final)
        for old in sorted(_complete(folder), key=_number)[: -self.keep]:
            faults.point("checkpoint.before-delete")
            (old / _MANIFEST).unlink()  # first, so that a half-deleted one is never taken for a whole one
            shutil.rmtree(old)
        self.count += 1
        self._last = time.monotonic()
        self.spent_s += self._last - began
        return final


def newest(run_folder: Path, device: torch.device) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole, its state, and why newer ones were passed over.

    Nothing of a checkpoint is used before all of it has been verified.
    """
    passed_over: list[str] = []
    for path in sorted(_all(run_folder / FOLDER), key=_number, reverse=True):
        try:
            verify(path)
            return path, _read(path, device), passed_over
        except TuneforgeError as error:
            passed_over.append(str(error))
    return None, {}, passed_over


def verify(path: Path) -> None:
    """See that every file is there, of the right size and the right content.

    Raises:
        FolderError: Something is missing or changed; the message names the file.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        sealed = manifest["seal"] == _seal(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, _MANIFEST, f"{type(error).__name__}: {error}") from None
    if not sealed or set(files) != {_STATE, _TENSORS}:
        raise _broken(path, _MANIFEST, "it does not agree with itself")
    for name, (size, digest) in files.items():
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise _broken(path, name, error.strerror or str(error)) from None
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            raise _broken(path, name, f"{len(content)} bytes of {size}, and not those that were written")


def clear(run_folder: Path) -> None:
    """Delete all checkpoints, because the run is done."""
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)


def pack(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """Plain data in which each tensor is a reference; a tensor met twice is stored once."""
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = f"t{len(names):06d}"
            tensors[names[id(value)]] = value
        return {_REFERENCE: names[id(value)]}
    if isinstance(value, Mapping):
        return {key: pack(item, tensors, names) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(item, tensors, names) for item in value]
    return value


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given: mappings as dict, sequences as list."""
    if isinstance(value, Mapping):
        if set(value) == {_REFERENCE}:
            return tensors[value[_REFERENCE]]
        return {key: unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [unpack(item, tensors) for item in value]
    return value


def _write(folder: Path, state: Mapping[str, Any]) -> None:
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    text = to_json(pack(state, tensors, {}))
    faults.point("checkpoint.begin")
    save_tensors(tensors, folder / _TENSORS)
    faults.point("checkpoint.tensors-written")
    write_whole(folder / _STATE, text)
    faults.point("checkpoint.state-written")
    files = {}
    for name in (_STATE, _TENSORS):
        content = (folder / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_whole(folder / _MANIFEST, json.dumps({"files": files, "seal": _seal(files)}, sort_keys=True))
    _flush(folder)
    faults.point("checkpoint.manifest-written")


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    tensors, _ = load_tensors(path / _TENSORS)
    placed = {name: tensor.to(device) for name, tensor in tensors.items()}
    state: dict[str, Any] = unpack(from_json((path / _STATE).read_text(encoding="utf-8")), placed)
    return state


def _seal(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _complete(folder: Path) -> list[Path]:
    return [path for path in _all(folder) if (path / _MANIFEST).exists()]


def _number(path: Path) -> int:
    head = path.name.partition("-")[0]
    return int(head) if head.isdigit() else 0


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _broken(path: Path, name: str, why: str) -> FolderError:
    return FolderError(
        f"checkpoint '{path.name}' is broken", where=str(path / name), why=why, fix="an older one is used"
    )
