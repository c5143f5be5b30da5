"""Files that are written atomically: after a crash, a full disk or a kill, a file is the old one or the new one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuneforge.engine.storage.run_files import is_run_dir
from tuneforge.errors import FolderError, TryAgainError, TuneforgeError

TEMPORARY_SUFFIX = ".part"


def atomic_write(path: Path, content: bytes | str | Iterable[bytes | memoryview]) -> None:
    """Write a file, at once or in parts, so that a reader sees the old content or the new one, never a mix.

    The content is flushed to the disk before the rename: a file system may write the rename first, and a power failure
    between the two would leave an empty file under the final name. To make the rename itself survive a power failure,
    call `fsync_path` on the directory.

    Raises:
        TryAgainError: The disk is full.
        FolderError: The file cannot be written.
    """
    encoded = content.encode() if isinstance(content, str) else content
    # The process id in the name keeps two processes from writing into one temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.writelines([encoded] if isinstance(encoded, bytes) else encoded)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, atomically; NaN and Inf become null, because JSON does not have them."""
    atomic_write(path, json.dumps(nonfinite_to_none(value), indent=1, sort_keys=False, allow_nan=False) + "\n")


def nonfinite_to_none(value: Any) -> Any:
    """Return plain data with None in place of each NaN or Inf."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): nonfinite_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nonfinite_to_none(item) for item in value]
    return value


def fsync_path(path: Path) -> None:
    """Flush a file to the disk; for a directory, the names of the files in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_and_sha256(path: Path) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of a file, read in blocks so that memory does not grow with it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def is_disk_full(error: OSError) -> bool:
    """Return True where the disk, or the user's quota of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_error(path: Path, error: OSError) -> TuneforgeError:
    """Return the error to raise for a failed write: `TryAgainError` for a full disk, else `FolderError`."""
    why = error.strerror or str(error)
    if not is_disk_full(error):
        fix = "name a directory that you may write to"
        return FolderError(f"cannot write '{path}'", where="--out", why=why, fix=fix)
    run = next((each for each in (path, *path.parents) if is_run_dir(each)), None)
    then = "try again" if run is None else f"go on with: tuneforge resume {shlex.quote(str(run))}"
    return TryAgainError(
        f"cannot write '{path}'",
        where=str(path.parent),
        why=why,
        fix=f"free some space there (old runs; features: tuneforge cache clear), then {then}",
    )
