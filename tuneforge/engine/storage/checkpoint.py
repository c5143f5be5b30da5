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
from tuneforge.engine.storage.run_dir import unwritten, write_whole
from tuneforge.engine.storage.safetensors_io import load_tensors, save_tensors
from tuneforge.errors import FolderError, TuneforgeError
from tuneforge.plugin.serialization import from_json, to_json

FOLDER = "checkpoints"
PINNED = "pinned"
"""A file of this name in a checkpoint's folder, whatever it holds, keeps that checkpoint for good."""

_STATE, _TENSORS, _MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
_REFERENCE = "__tensor__"
_NAME = re.compile(r"\.?(\d{6,})(-step-\d+|\.part)")  # what else lies there is not ours to delete


@attrs.frozen
class Saved:
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
        run_folder: The run's folder.
        every_s: Seconds between two checkpoints.
        every_steps: Optimizer steps between two checkpoints; None: by the clock alone.
        keep: How many of the last ones are kept, each of another step.
        last: Optimizer steps, and what else is counted, when the last one was taken; empty where there is none.
        count: Saved so far by this process.
        spent_s: Seconds that saving took so far.
    """

    run_folder: Path
    every_s: float
    keep: int
    every_steps: int | None = None
    last: tuple[int, ...] = ()
    count: int = 0
    spent_s: float = 0.0
    _last_s: float = attrs.field(factory=time.monotonic)
    _known: dict[str, Saved] = attrs.field(factory=dict)

    def due(self, step: int, *, beside: tuple[int, ...] = ()) -> bool:
        """True where the last one is old enough, by the clock or by steps, or knows less than one of this same step.

        Args:
            step: Optimizer steps so far.
            beside: What else goes on while that number stays: epochs, steps of the strategy.
        """
        since = step - (self.last[0] if self.last else 0)
        if self.every_steps is not None and since >= self.every_steps:
            return True
        knows_less = self.last[:1] == (step,) and self.last != (step, *beside)
        return knows_less or time.monotonic() - self._last_s >= self.every_s

    def save(self, step: int, state: Mapping[str, Any], *, beside: tuple[int, ...] = (), best: bool = False) -> Path:
        """Write a checkpoint, verify it, and delete what nobody needs any more.

        Args:
            step: Optimizer steps so far.
            state: Plain data and tensors, nested.
            beside: As `due` is asked.
            best: It is taken at the end of an epoch that is the best of its phase so far.

        Raises:
            TryAgainError: The disk is full; earlier checkpoints are as they were.
            FolderError: The folder cannot be written, or what was written does not verify.
        """
        began = time.monotonic()
        folder = self.run_folder / FOLDER
        try:
            path = _write(folder, step, best, state)
            self._known[path.name] = verify(path)
            self._rotate(folder)
        except OSError as error:
            raise _write_error(folder, error) from error
        self.count += 1
        self.last, self._last_s = (step, *beside), time.monotonic()
        self.spent_s += self._last_s - began
        return path

    def _rotate(self, folder: Path) -> None:
        """Delete what is old, broken or half-written; the newest one has verified by now."""
        whole = [saved for path in _complete(folder) if (saved := self._sound(path)) is not None]
        kept = _worth_keeping(whole, self.keep)
        for path in _ours(folder):
            if path not in kept and not _pinned(path):
                faults.point("checkpoint.before-delete")
                (path / _MANIFEST).unlink(missing_ok=True)  # first, so that a half-deleted one is never taken for whole
                faults.point("checkpoint.while-deleting")
                shutil.rmtree(path)
                self._known.pop(path.name, None)

    def _sound(self, path: Path) -> Saved | None:
        """What a checkpoint is, or None where it is broken; each is read once by a process."""
        if path.name not in self._known:
            try:
                self._known[path.name] = verify(path)
            except FolderError:
                return None
        return self._known[path.name]


def newest(run_folder: Path, device: torch.device) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole, its state, and why newer ones were passed over.

    Nothing of a checkpoint is used before all of it has been verified.
    """
    passed_over: list[str] = []
    for path in reversed([path for path in _ours(run_folder / FOLDER) if not path.name.startswith(".")]):
        try:
            verify(path)
            return path, _read(path, device), passed_over
        except TuneforgeError as error:
            passed_over.append(f"{error.what}: {error.why}")
    return None, {}, passed_over


def verify(path: Path) -> Saved:
    """See that every file is there, of the right size and the right content.

    Returns:
        What the checkpoint is.

    Raises:
        FolderError: Something is missing or changed; the message names the file.
    """
    try:
        content = (path / _MANIFEST).read_bytes()
        manifest = json.loads(content)
        if content != _sealed({key: value for key, value in manifest.items() if key != "seal"}):
            raise ValueError("it does not agree with itself")
        entries = {name: manifest["files"][name] for name in (_STATE, _TENSORS)}
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        saved = Saved(path, manifest["step"], manifest["best"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, _MANIFEST, f"{type(error).__name__}: {error}") from None
    for name, (size, digest) in files.items():
        try:
            found_size, found_digest = _measured(path / name)
        except OSError as error:
            raise _broken(path, name, error.strerror or str(error)) from None
        if found_size != size:
            raise _broken(path, name, f"it has {found_size} bytes, and {size} were written")
        if found_digest != digest:
            raise _broken(path, name, "its content is not what was written")
    return saved


def clear(run_folder: Path) -> None:
    """Delete the checkpoints of a run that is done, but for those that are pinned."""
    folder = run_folder / FOLDER
    for path in _ours(folder):
        if not _pinned(path):
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


def _write(folder: Path, step: int, best: bool, state: Mapping[str, Any]) -> Path:
    """A new checkpoint under its final name, everything flushed."""
    folder.mkdir(exist_ok=True)
    number = 1 + max(map(_number, _ours(folder)), default=0)
    temporary, final = folder / f".{number:06d}.part", folder / f"{number:06d}-step-{step}"
    try:
        _fill(temporary, step, best, state)
        faults.point("checkpoint.before-rename")
        temporary.rename(final)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # at once, because the disk may be full
        raise
    faults.point("checkpoint.renamed")
    _flush(folder)
    faults.point("checkpoint.after-rename")
    return final


def _fill(folder: Path, step: int, best: bool, state: Mapping[str, Any]) -> None:
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    text = to_json(pack(state, tensors, {}))
    faults.point("checkpoint.begin")
    save_tensors(tensors, folder / _TENSORS)
    faults.point("checkpoint.tensors-written")
    write_whole(folder / _STATE, text)
    faults.point("checkpoint.state-written")
    measured = {name: _measured(folder / name) for name in (_STATE, _TENSORS)}
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in measured.items()}
    write_whole(folder / _MANIFEST, _sealed({"files": files, "step": step, "best": best}))
    faults.point("checkpoint.manifest-written")
    _flush(folder)
    faults.point("checkpoint.flushed")


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    tensors, _ = load_tensors(path / _TENSORS)
    placed = {name: tensor.to(device) for name, tensor in tensors.items()}
    state: dict[str, Any] = unpack(from_json((path / _STATE).read_text(encoding="utf-8")), placed)
    return state


def _sealed(about: Mapping[str, Any]) -> bytes:
    """The one text of a manifest, so that not even a blank in it can change unseen."""
    seal = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return json.dumps({**about, "seal": seal}, sort_keys=True).encode()


def _measured(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file; memory stays flat."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _worth_keeping(whole: Iterable[Saved], keep: int) -> set[Path]:
    """The last ones, each of another step, and the newest one of a best epoch; `whole` is sorted, the newest last."""
    by_step: dict[int, Path] = {}
    best: list[Path] = []
    for saved in whole:
        by_step.pop(saved.step, None)  # so that the newest of a step stands where it belongs
        by_step[saved.step] = saved.path
        best = [saved.path] if saved.best else best
    return {*list(by_step.values())[-keep:], *best}


def _ours(folder: Path) -> list[Path]:
    """Every checkpoint, whole or not, in order of their numbers."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=_number)


def _complete(folder: Path) -> list[Path]:
    return [path for path in _ours(folder) if not path.name.startswith(".") and (path / _MANIFEST).exists()]


def _pinned(path: Path) -> bool:
    return (path / PINNED).exists()


def _number(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _broken(path: Path, name: str, why: str) -> FolderError:
    return FolderError(
        f"checkpoint '{path.name}' is broken at {name}",
        where=str(path / name),
        why=why,
        fix="tuneforge resume goes on from the one before",
    )


def _write_error(folder: Path, error: OSError) -> TuneforgeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return unwritten(folder, error)
    why = error.strerror or str(error)
    return FolderError(f"cannot write a checkpoint to '{folder}'", why=why, fix="see that the run's folder is writable")
