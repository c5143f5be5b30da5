"""Checkpoints: a nested structure of plain data and tensors, saved all or nothing, found broken before it is used.

A checkpoint is a folder under `checkpoints/` with `state.json` (plain data, tensors by reference),
`tensors.safetensors` (each tensor once, however often it is referred to) and, written last, `manifest.json` (what the
checkpoint is, and size and SHA-256 of both). It is built under a temporary name, flushed, and renamed. An old one is
deleted when a newer one has verified, unless it holds a file named `pinned`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.run_dir import atomic_write, write_error
from tuneforge.engine.storage.safetensors_io import load_tensors, save_tensors
from tuneforge.errors import FolderError, TuneforgeError
from tuneforge.plugin.serialization import from_json, to_json

CHECKPOINTS_DIR = "checkpoints"
PINNED = "pinned"
"""A file of this name in a checkpoint's folder, whatever it holds, keeps that checkpoint for good."""

_STATE, _TENSORS, _MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
_REFERENCE = "__tensor__"
_NAME = re.compile(r"\.?(\d{6,})(-step-\d+|\.part)")  # what else lies there is not ours to delete


@attrs.frozen
class CheckpointInfo:
    """A checkpoint that has verified.

    Args:
        path: Its folder.
        step: Optimizer steps that it holds.
        best: It was taken at the end of an epoch that was the best of its phase so far.
    """

    path: Path
    step: int
    best: bool


@attrs.define(eq=False)
class Checkpoints:
    """The checkpoints of one run. Kept are the last ones, the newest one of a best epoch, and those that are pinned.

    Args:
        run_dir: The run's folder.
        interval_s: Seconds between two checkpoints.
        interval_steps: Optimizer steps between two checkpoints; None: by the clock alone.
        keep_last: How many of the last ones are kept, each of another step.
        last_counters: Optimizer steps, and what else is counted, when the last one was taken; empty where there is
            none.
        num_saved: Saved so far by this process.
        spent_s: Seconds that saving took so far.
    """

    run_dir: Path
    interval_s: float
    keep_last: int
    interval_steps: int | None = None
    last_counters: tuple[int, ...] = ()
    num_saved: int = 0
    spent_s: float = 0.0
    _last_saved_s: float = attrs.field(factory=time.monotonic)
    _verified: dict[str, CheckpointInfo] = attrs.field(factory=dict)

    def is_due(self, step: int, *, other_counters: tuple[int, ...] = ()) -> bool:
        """True where the last one is old enough, by the clock or by steps, or knows less than one of this same step.

        Args:
            step: Optimizer steps so far.
            other_counters: What else goes on while that number stays: epochs, steps of the strategy.
        """
        since = step - (self.last_counters[0] if self.last_counters else 0)
        if self.interval_steps is not None and since >= self.interval_steps:
            return True
        knows_less = self.last_counters[:1] == (step,) and self.last_counters != (step, *other_counters)
        return knows_less or time.monotonic() - self._last_saved_s >= self.interval_s

    def save(
        self, step: int, state: Mapping[str, Any], *, other_counters: tuple[int, ...] = (), best: bool = False
    ) -> Path:
        """Write a checkpoint, verify it, and delete what nobody needs any more.

        Args:
            step: Optimizer steps so far.
            state: Plain data and tensors, nested.
            other_counters: As `is_due` is asked.
            best: It is taken at the end of an epoch that is the best of its phase so far.

        Raises:
            TryAgainError: The disk is full; earlier checkpoints are as they were.
            FolderError: The folder cannot be written, or what was written does not verify.
        """
        began = time.monotonic()
        folder = self.run_dir / CHECKPOINTS_DIR
        try:
            path = _write(folder, step, best, state)
            self._verified[path.name] = verify(path)
            self._rotate(folder)
        except OSError as error:
            raise _write_error(folder, error) from error
        self.num_saved += 1
        self.last_counters, self._last_saved_s = (step, *other_counters), time.monotonic()
        self.spent_s += self._last_saved_s - began
        return path

    def _rotate(self, folder: Path) -> None:
        """Delete what is old, broken or half-written; the newest one has verified by now."""
        whole = [saved for path in _list_complete(folder) if (saved := self._verify_once(path)) is not None]
        kept = _paths_to_keep(whole, self.keep_last)
        for path in _list_checkpoints(folder):
            if path not in kept and not _is_pinned(path):
                faults.point("checkpoint.before-delete")
                (path / _MANIFEST).unlink(missing_ok=True)  # first, so that a half-deleted one is never taken for whole
                faults.point("checkpoint.while-deleting")
                shutil.rmtree(path)
                self._verified.pop(path.name, None)

    def _verify_once(self, path: Path) -> CheckpointInfo | None:
        """What a checkpoint is, or None where it is broken; each is read once by a process."""
        if path.name not in self._verified:
            try:
                self._verified[path.name] = verify(path)
            except FolderError:
                return None
        return self._verified[path.name]


def load_latest(run_dir: Path, device: torch.device) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole, its state, and why newer ones were passed over.

    Nothing of a checkpoint is used before all of it has been verified.
    """
    passed_over: list[str] = []
    for path in reversed(
        [path for path in _list_checkpoints(run_dir / CHECKPOINTS_DIR) if not path.name.startswith(".")]
    ):
        try:
            verify(path)
            return path, _read_state(path, device), passed_over
        except TuneforgeError as error:
            passed_over.append(f"{error.what}: {error.why}")
    return None, {}, passed_over


def verify(path: Path) -> CheckpointInfo:
    """See that every file is there, of the right size and the right content.

    Returns:
        What the checkpoint is.

    Raises:
        FolderError: Something is missing or changed; the message names the file.
    """
    try:
        content = (path / _MANIFEST).read_bytes()
        manifest = json.loads(content)
        if content != _serialize_manifest({key: value for key, value in manifest.items() if key != "checksum"}):
            raise ValueError("it does not agree with itself")
        entries = {name: manifest["files"][name] for name in (_STATE, _TENSORS)}
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        saved = CheckpointInfo(path, manifest["step"], manifest["best"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt_error(path, _MANIFEST, f"{type(error).__name__}: {error}") from None
    for name, (size, digest) in files.items():
        try:
            found_size, found_digest = _size_and_sha256(path / name)
        except OSError as error:
            raise _corrupt_error(path, name, error.strerror or str(error)) from None
        if found_size != size:
            raise _corrupt_error(path, name, f"it has {found_size} bytes, and {size} were written")
        if found_digest != digest:
            raise _corrupt_error(path, name, "its content is not what was written")
    return saved


def delete_unpinned(run_dir: Path) -> None:
    """Delete the checkpoints of a run that is done, but for those that are pinned."""
    folder = run_dir / CHECKPOINTS_DIR
    for path in _list_checkpoints(folder):
        if not _is_pinned(path):
            shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


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


def _write(directory: Path, step: int, best: bool, state: Mapping[str, Any]) -> Path:
    """A new checkpoint under its final name, everything flushed."""
    directory.mkdir(exist_ok=True)
    number = 1 + max(map(_number, _list_checkpoints(directory)), default=0)
    temporary, final = directory / f".{number:06d}.part", directory / f"{number:06d}-step-{step}"
    try:
        _write_files(temporary, step, best, state)
        faults.point("checkpoint.before-rename")
        temporary.rename(final)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # at once, because the disk may be full
        raise
    faults.point("checkpoint.renamed")
    _fsync_dir(directory)
    faults.point("checkpoint.after-rename")
    return final


def _write_files(directory: Path, step: int, best: bool, state: Mapping[str, Any]) -> None:
    directory.mkdir()
    tensors: dict[str, Tensor] = {}
    text = to_json(pack(state, tensors, {}))
    faults.point("checkpoint.begin")
    save_tensors(tensors, directory / _TENSORS)
    faults.point("checkpoint.tensors-written")
    atomic_write(directory / _STATE, text)
    faults.point("checkpoint.state-written")
    measured = {name: _size_and_sha256(directory / name) for name in (_STATE, _TENSORS)}
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in measured.items()}
    atomic_write(directory / _MANIFEST, _serialize_manifest({"files": files, "step": step, "best": best}))
    faults.point("checkpoint.manifest-written")
    _fsync_dir(directory)
    faults.point("checkpoint.flushed")


def _read_state(path: Path, device: torch.device) -> dict[str, Any]:
    tensors, _ = load_tensors(path / _TENSORS)
    placed = {name: tensor.to(device) for name, tensor in tensors.items()}
    state: dict[str, Any] = unpack(from_json((path / _STATE).read_text(encoding="utf-8")), placed)
    return state


def _serialize_manifest(about: Mapping[str, Any]) -> bytes:
    """The one text of a manifest, so that not even a blank in it can change unseen."""
    checksum = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return json.dumps({**about, "checksum": checksum}, sort_keys=True).encode()


def _size_and_sha256(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file; memory stays flat."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _paths_to_keep(verified: Iterable[CheckpointInfo], keep_last: int) -> set[Path]:
    """The last ones, each of another step, and the newest one of a best epoch; `verified` has the newest last."""
    by_step: dict[int, Path] = {}
    best: list[Path] = []
    for saved in verified:
        by_step.pop(saved.step, None)  # so that the newest of a step stands where it belongs
        by_step[saved.step] = saved.path
        best = [saved.path] if saved.best else best
    return {*list(by_step.values())[-keep_last:], *best}


def _list_checkpoints(directory: Path) -> list[Path]:
    """Every checkpoint, whole or not, in order of their numbers."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=_number)


def _list_complete(directory: Path) -> list[Path]:
    return [
        path for path in _list_checkpoints(directory) if not path.name.startswith(".") and (path / _MANIFEST).exists()
    ]


def _is_pinned(path: Path) -> bool:
    return (path / PINNED).exists()


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def _fsync_dir(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _corrupt_error(path: Path, name: str, why: str) -> FolderError:
    return FolderError(
        f"checkpoint '{path.name}' is broken at {name}",
        where=str(path / name),
        why=why,
        fix="tuneforge resume goes on from the one before",
    )


def _write_error(folder: Path, error: OSError) -> TuneforgeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return write_error(folder, error)
    why = error.strerror or str(error)
    return FolderError(f"cannot write a checkpoint to '{folder}'", why=why, fix="see that the run's folder is writable")
