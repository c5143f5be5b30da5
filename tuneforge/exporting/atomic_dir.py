"""Folders that are written all or nothing: built beside their place, listed with hashes, flushed, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneforge.engine.storage import fault_injection as faults
from tuneforge.engine.storage.atomic import fsync_path, is_disk_full, size_and_sha256, write_json
from tuneforge.errors import FolderError, TryAgainError, TuneforgeError

MANIFEST = "manifest.json"
_PART = ".part"


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final`; when the block ends without an error, it is sealed and becomes `final`.

    Raises:
        FolderError: There is something at `final` already, or the place cannot be written.
        TryAgainError: The disk is full.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FolderError(f"'{final}' is not empty", why="nothing is written over", fix="name another folder")
    temporary = final.parent / f".{final.name}.{os.getpid()}{_PART}"
    made = [each for each in final.parents if not each.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        write_manifest(temporary)
        faults.point("bundle.sealed")
        publish(temporary, final)
    except OSError as error:
        raise _write_error(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for each in made:
            with contextlib.suppress(OSError):  # it is gone, or it holds something
                each.rmdir()


def write_manifest(folder: Path) -> None:
    """List every file with its size and SHA-256, flush all of it."""
    files = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and each.name != MANIFEST):
        size, digest = size_and_sha256(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": digest}
    write_json(folder / MANIFEST, {"files": files})
    for path in (*sorted(folder.rglob("*")), folder):
        fsync_path(path)


def publish(temporary: Path, final: Path) -> None:
    """Rename a sealed folder to its name, durably or not at all."""
    temporary.rename(final)
    try:
        fsync_path(final.parent)
    except OSError:
        shutil.rmtree(final, ignore_errors=True)  # which needs no space
        raise


def verify_manifest(folder: Path) -> None:
    """See that every file is there and holds what was written.

    Raises:
        FolderError: Something is missing or changed; the message names the file.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken_error(folder, MANIFEST, f"{type(error).__name__}: {error}") from None
    for name, measured in expected.items():
        try:
            found = size_and_sha256(folder / name)
        except OSError as error:
            raise _broken_error(folder, name, error.strerror or str(error)) from None
        if found != measured:
            raise _broken_error(folder, name, "its content is not what was written")


def _broken_error(folder: Path, name: str, why: str) -> FolderError:
    return FolderError(
        f"the bundle '{folder}' is broken at {name}", where=str(folder / name), why=why, fix="export or copy it again"
    )


def _write_error(path: Path, error: OSError) -> TuneforgeError:
    why = error.strerror or str(error)
    if is_disk_full(error):
        return TryAgainError(f"cannot write '{path}'", why=why, fix="free some space and try again")
    return FolderError(f"cannot write '{path}'", why=why, fix="name a folder that you may write to")
