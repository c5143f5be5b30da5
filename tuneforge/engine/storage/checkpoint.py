"""Checkpoints: nested plain data and tensors, saved atomically and verified before anything of them is used.

A checkpoint is a directory under `checkpoints/` with `state.json` (plain data, tensors by reference),
`tensors.safetensors` (each tensor once, however often it is referred to) and, written last, `manifest.json` (step, and
size and SHA-256 of both files). It is built under a temporary name, flushed to the disk, and renamed. An old checkpoint
is deleted once a newer one has been verified, unless it holds a file named `pinned`.
"""

from __future__ import annotations

import hashlib
import json
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
from tuneforge.engine.storage.atomic import atomic_write, fsync_path, is_disk_full, size_and_sha256, write_error
from tuneforge.engine.storage.safetensors_io import load_tensors, save_tensors
from tuneforge.engine.storage.snapshot_files import SNAPSHOTS_DIR, SnapshotFiles
from tuneforge.errors import FolderError, PluginError, TuneforgeError
from tuneforge.plugin.serialization import from_json, to_json, to_plain_data

CHECKPOINTS_DIR = "checkpoints"
PINNED = "pinned"
"""A checkpoint whose directory holds a file of this name, whatever its content, is never deleted."""

_STATE, _TENSORS, _MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
_REFERENCE, _TUPLE = "__tensor__", "__tuple__"
_NAME = re.compile(r"\.?(\d{6,})(-step-\d+|\.part)")  # other files in the directory are the user's: never deleted


@attrs.frozen
class CheckpointInfo:
    """A checkpoint that has been verified.

    Args:
        path: Its directory.
        step: Optimizer steps taken before it was saved.
        best: True if it was saved at the end of the best epoch of its phase so far.
    """

    path: Path
    step: int
    best: bool


@attrs.define(eq=False)
class Checkpoints:
    """The checkpoints of one run. Kept are the last ones, the newest one of a best epoch, and those that are pinned.

    Args:
        run_dir: The run directory.
        interval_s: Seconds between two checkpoints.
        keep_last: How many of the last checkpoints are kept, each of another step.
        interval_steps: Optimizer steps between two checkpoints; None to go by the clock alone.
        last_counters: Optimizer steps, and the other counters, of the last checkpoint; empty if there is none.
        num_saved: Checkpoints that this process has saved.
        spent_s: Seconds that this process has spent on saving.
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
        """Return True if the last checkpoint is old enough, or is of this same step but outdated.

        Args:
            step: Optimizer steps so far.
            other_counters: What may advance while `step` stays the same: epochs and strategy steps.
        """
        since = step - (self.last_counters[0] if self.last_counters else 0)
        if self.interval_steps is not None and since >= self.interval_steps:
            return True
        # The last checkpoint may have been saved before the epoch's evaluation, which would then run a second time.
        is_outdated = self.last_counters[:1] == (step,) and self.last_counters != (step, *other_counters)
        return is_outdated or time.monotonic() - self._last_saved_s >= self.interval_s

    def save(
        self, step: int, state: Mapping[str, Any], *, other_counters: tuple[int, ...] = (), best: bool = False
    ) -> Path:
        """Write a checkpoint, verify it, and delete those that are no longer needed.

        Args:
            step: Optimizer steps so far.
            state: Nested plain data and tensors.
            other_counters: As for `is_due`.
            best: True at the end of the best epoch of the phase so far.

        Returns:
            The checkpoint's directory.

        Raises:
            TryAgainError: The disk is full; earlier checkpoints are unchanged.
            PluginError: The state holds something that is neither plain data nor a tensor.
            FolderError: The directory cannot be written, or the files are not what was written.
        """
        began = time.monotonic()
        directory = self.run_dir / CHECKPOINTS_DIR
        try:
            path = _write(directory, step, best, state)
            self._verified[path.name] = verify(path)
            self._rotate(directory)
        except OSError as error:
            raise _write_error(directory, error) from error
        self.num_saved += 1
        self.last_counters, self._last_saved_s = (step, *other_counters), time.monotonic()
        self.spent_s += self._last_saved_s - began
        return path

    def _rotate(self, directory: Path) -> None:
        """Delete old, damaged and incomplete checkpoints; the newest one has been verified by now."""
        verified = [info for path in _list_complete(directory) if (info := self._verify_once(path)) is not None]
        paths_to_keep = _paths_to_keep(verified, self.keep_last)
        for path in _list_checkpoints(directory):
            if path not in paths_to_keep and not _is_pinned(path):
                faults.point("checkpoint.before-delete")
                # The manifest goes first: a checkpoint that is only half deleted must not look complete.
                (path / _MANIFEST).unlink(missing_ok=True)
                faults.point("checkpoint.while-deleting")
                shutil.rmtree(path)
                self._verified.pop(path.name, None)

    def _verify_once(self, path: Path) -> CheckpointInfo | None:
        """Return what a checkpoint holds, or None if it is damaged; a process reads each one only once."""
        if path.name not in self._verified:
            try:
                self._verified[path.name] = verify(path)
            except FolderError:
                return None
        return self._verified[path.name]


def load_latest(run_dir: Path, device: torch.device) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Load the newest checkpoint that is not damaged; nothing of it is used before all of it has been verified.

    Args:
        run_dir: The run directory.
        device: Where the tensors are loaded to.

    Returns:
        The checkpoint's directory (None if there is none), its state with the snapshots that it needs, and why newer
        checkpoints were skipped.
    """
    skipped: list[str] = []
    for path in reversed(_list_checkpoints(run_dir / CHECKPOINTS_DIR)):
        if path.name.startswith("."):  # a process was killed before it renamed this one
            continue
        try:
            verify(path)
            state = _read_state(path, device)
            if "snapshot_files" in state:
                files = state["snapshot_files"] = SnapshotFiles(run_dir / SNAPSHOTS_DIR, **state["snapshot_files"])
                state["snapshots"] = files.load(device)
            return path, state, skipped
        except TuneforgeError as error:
            skipped.append(f"{error.what}: {error.why}")
    return None, {}, skipped


def verify(path: Path) -> CheckpointInfo:
    """Check that every file of a checkpoint has the size and the SHA-256 that were recorded.

    Returns:
        The checkpoint's step, and whether it is of a best epoch.

    Raises:
        FolderError: A file is missing or differs; the message names it.
    """
    try:
        content = (path / _MANIFEST).read_bytes()
        manifest = json.loads(content)
        if content != _serialize_manifest({key: value for key, value in manifest.items() if key != "checksum"}):
            raise ValueError("its checksum does not match")
        entries = {name: manifest["files"][name] for name in (_STATE, _TENSORS)}
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        info = CheckpointInfo(path, manifest["step"], manifest["best"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt_error(path, _MANIFEST, f"{type(error).__name__}: {error}") from None
    for name, (size, digest) in files.items():
        try:
            found_size, found_digest = size_and_sha256(path / name)
        except OSError as error:
            raise _corrupt_error(path, name, error.strerror or str(error)) from None
        if found_size != size:
            raise _corrupt_error(path, name, f"it has {found_size} bytes, and {size} were written")
        if found_digest != digest:
            raise _corrupt_error(path, name, "its content is not what was written")
    return info


def delete_unpinned(run_dir: Path) -> None:
    """Delete the checkpoints of a finished run, except those that are pinned, and the snapshots that no one needs."""
    directory = run_dir / CHECKPOINTS_DIR
    for path in _list_checkpoints(directory):
        if not _is_pinned(path):
            shutil.rmtree(path, ignore_errors=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    if not directory.is_dir():
        shutil.rmtree(run_dir / SNAPSHOTS_DIR, ignore_errors=True)


def pack(value: Any, tensors: dict[str, Tensor], names: dict[int, str], where: str = "state") -> Any:
    """Return plain data with a reference in place of each tensor.

    Args:
        value: Nested mappings, lists, tuples, plain data and tensors.
        tensors: Receives the tensors by name.
        names: Names of the tensors seen so far, by `id`: a tensor that occurs twice is stored once.
        where: The place of the value, for the message of an error.

    Raises:
        PluginError: The value is neither plain data nor a tensor.
    """
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = f"t{len(names):06d}"
            tensors[names[id(value)]] = value
        return {_REFERENCE: names[id(value)]}
    if isinstance(value, Mapping):
        return {_plain(key, where): pack(item, tensors, names, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        packed = [pack(item, tensors, names, where) for item in value]
        return {_TUPLE: packed} if isinstance(value, tuple) else packed
    return _plain(value, where)


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `pack` was given, with mappings as dict."""
    if isinstance(value, Mapping):
        if set(value) == {_REFERENCE}:
            return tensors[value[_REFERENCE]]
        if set(value) == {_TUPLE}:
            return tuple(unpack(item, tensors) for item in value[_TUPLE])
        return {key: unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [unpack(item, tensors) for item in value]
    return value


def _plain(value: Any, where: str) -> Any:
    try:
        return to_plain_data(value)
    except TypeError as error:
        raise PluginError(
            f"a checkpoint cannot hold {value!r:.80}",
            where=where,
            why=str(error),
            fix="keep tensors, numbers and text there, in lists, tuples and mappings",
        ) from None


def _write(directory: Path, step: int, best: bool, state: Mapping[str, Any]) -> Path:
    """Write a new checkpoint and return its directory, with everything flushed to the disk."""
    directory.mkdir(exist_ok=True)
    number = 1 + max(map(_number, _list_checkpoints(directory)), default=0)
    temporary, final = directory / f".{number:06d}.part", directory / f"{number:06d}-step-{step}"
    try:
        _write_files(temporary, step, best, state)
        faults.point("checkpoint.before-rename")
        temporary.rename(final)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # now rather than at the next start: the disk may be full
        raise
    faults.point("checkpoint.renamed")
    fsync_path(directory)  # without this a power failure may undo the rename
    faults.point("checkpoint.after-rename")
    return final


def _write_files(directory: Path, step: int, best: bool, state: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint, the manifest last: a checkpoint with a manifest has all its other files."""
    directory.mkdir()
    tensors: dict[str, Tensor] = {}
    text = to_json(pack(state, tensors, {}))
    faults.point("checkpoint.begin")
    save_tensors(tensors, directory / _TENSORS)
    faults.point("checkpoint.tensors-written")
    atomic_write(directory / _STATE, text)
    faults.point("checkpoint.state-written")
    measured = {name: size_and_sha256(directory / name) for name in (_STATE, _TENSORS)}
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in measured.items()}
    atomic_write(directory / _MANIFEST, _serialize_manifest({"files": files, "step": step, "best": best}))
    faults.point("checkpoint.manifest-written")
    fsync_path(directory)  # the names must be on the disk before the directory gets its final name
    faults.point("checkpoint.flushed")


def _read_state(path: Path, device: torch.device) -> dict[str, Any]:
    tensors, _ = load_tensors(path / _TENSORS)
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    state: dict[str, Any] = unpack(from_json((path / _STATE).read_text(encoding="utf-8")), on_device)
    return state


def _serialize_manifest(content: Mapping[str, Any]) -> bytes:
    """Return the only valid text of a manifest, with its checksum, so that a single changed byte is detected."""
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, sort_keys=True).encode()


def _paths_to_keep(verified: Iterable[CheckpointInfo], keep_last: int) -> set[Path]:
    """Return the last checkpoints, each of another step, and the newest one of a best epoch.

    Args:
        verified: From the oldest to the newest.
        keep_last: How many steps are kept.
    """
    by_step: dict[int, Path] = {}
    best: list[Path] = []
    for info in verified:
        by_step.pop(info.step, None)  # a dictionary keeps the place of a key that is overwritten
        by_step[info.step] = info.path
        best = [info.path] if info.best else best
    return {*list(by_step.values())[-keep_last:], *best}


def _list_checkpoints(directory: Path) -> list[Path]:
    """Return the directories of all checkpoints, complete or not, in order of their numbers."""
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


def _corrupt_error(path: Path, name: str, why: str) -> FolderError:
    return FolderError(
        f"checkpoint '{path.name}' is damaged at {name}",
        where=str(path / name),
        why=why,
        fix="tuneforge resume uses the checkpoint before it",
    )


def _write_error(directory: Path, error: OSError) -> TuneforgeError:
    if is_disk_full(error):
        return write_error(directory, error)
    why = error.strerror or str(error)
    fix = "make the run directory writable"
    return FolderError(f"cannot write a checkpoint to '{directory}'", why=why, fix=fix)
