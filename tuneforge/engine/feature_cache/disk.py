"""The feature cache on disk: entries by key, shared between runs and processes; the least recently used are deleted.

An entry is a directory named by its key, with one raw file per tensor and `entry.json` (shapes, types, SHA-256). It is
written under a temporary name and renamed, so that an incomplete entry is never found. Each file is verified before it
is used; a damaged entry is deleted as if it had never existed. Nothing is flushed to the disk: an entry that a power
failure damages is merely computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.storage import fault_injection

_ENTRY = "entry.json"
_STALE_AFTER_S = 24 * 3600.0
_BLOCK_BYTES = 1 << 22
_KEY = re.compile("[0-9a-f]{64}")


@attrs.frozen
class CacheEntry:
    """One entry.

    Args:
        path: Its directory.
        num_bytes: Its size on disk.
        last_used: When it was last used, in seconds since the epoch.
        metadata: What it holds, for people.
    """

    path: Path
    num_bytes: int
    last_used: float
    metadata: Mapping[str, Any]


def default_cache_dir() -> Path:
    """Return `$TUNEFORGE_CACHE`, or else `tuneforge` in the user's cache directory."""
    named = os.environ.get("TUNEFORGE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuneforge"


@attrs.frozen
class DiskCache:
    """Features on disk.

    Args:
        directory: Holds the entries under `features/`; created with the first entry. No other file in it is touched.
        limit_mb: Size of all entries in MB above which the least recently used are deleted.
    """

    directory: Path
    limit_mb: int

    def entry_dir(self, key: str) -> Path:
        """Return the directory of the entry with this key, whether it exists or not."""
        return self.directory / "features" / key

    def get(self, key: str, *, use_mmap: bool) -> tuple[tuple[Tensor, ...] | None, str]:
        """Return the tensors of an entry (None if there is none), and a message if the entry was damaged.

        Args:
            key: 64 hexadecimal digits.
            use_mmap: Map the files into memory, whose pages the system can drop, instead of reading them.
        """
        path = self.entry_dir(key)
        try:
            manifest = _read_manifest(path)
            tensors = tuple(
                _read_tensor(path / str(each["file"]), each, use_mmap=use_mmap) for each in manifest["tensors"]
            )
        except FileNotFoundError:
            return None, ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            shutil.rmtree(path, ignore_errors=True)
            return None, f"feature cache: entry {key[:12]} was damaged ({error}), so its features are computed again"
        with contextlib.suppress(OSError):  # another process may have deleted it; open files stay readable
            os.utime(path)
        return tensors, ""

    def put(self, key: str, blocks: Iterable[tuple[Tensor, ...]], metadata: Mapping[str, Any]) -> None:
        """Write an entry: tensors that arrive in blocks along their first axis.

        Raises:
            OSError: The disk is full, or the directory is not writable; nothing is left behind.
        """
        final = self.entry_dir(key)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{key}.{os.getpid()}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            fault_injection.point("cache.begin")
            tensors = _write_blocks(temporary, blocks)
            fault_injection.point("cache.values-written")
            content = {"metadata": dict(metadata), "tensors": tensors}
            text = json.dumps({**content, "checksum": _checksum(content)}, sort_keys=True)
            (temporary / _ENTRY).write_text(text, encoding="utf-8")
            fault_injection.point("cache.before-rename")
            _rename_into_place(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fault_injection.point("cache.after-rename")
        self.trim(keep=key)

    def entries(self) -> list[CacheEntry]:
        """Return all complete entries, the least recently used first."""
        return sorted(filter(None, map(_read_entry, self._entry_dirs())), key=lambda entry: entry.last_used)

    def trim(self, *, keep: str = "") -> None:
        """Delete the least recently used entries until the rest fits the limit, and what dead processes have left."""
        for path in self._entry_dirs():
            if _read_entry(path) is None:
                shutil.rmtree(path, ignore_errors=True)
        entries = self.entries()
        total = sum(entry.num_bytes for entry in entries)
        for entry in entries:
            if total > self.limit_mb * 2**20 and entry.path.name != keep:
                shutil.rmtree(entry.path, ignore_errors=True)
                total -= entry.num_bytes
        for path in self._temporary_dirs():
            if not _is_being_written(path):
                shutil.rmtree(path, ignore_errors=True)

    def clear(self, key_prefixes: Sequence[str] = ()) -> int:
        """Delete all entries, or those whose keys begin with a prefix, and return the number of bytes freed."""
        chosen = [each for each in self._entry_dirs() if not key_prefixes or each.name.startswith(tuple(key_prefixes))]
        freed = sum(entry.num_bytes for entry in map(_read_entry, chosen) if entry is not None)
        for path in [*chosen, *(self._temporary_dirs() if not key_prefixes else [])]:
            shutil.rmtree(path, ignore_errors=True)
        return freed

    def _entry_dirs(self) -> list[Path]:
        return [path for path in self.entry_dir("").glob("*") if path.is_dir() and _KEY.fullmatch(path.name)]

    def _temporary_dirs(self) -> list[Path]:
        return [path for path in self.entry_dir("").glob(".*.part") if _KEY.fullmatch(path.name.split(".")[1])]


def _rename_into_place(temporary: Path, final: Path) -> None:
    """Rename; if another process was faster, keep its entry, which has the same bits."""
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def _write_blocks(directory: Path, blocks: Iterable[tuple[Tensor, ...]]) -> list[dict[str, Any]]:
    files: list[IO[bytes]] = []
    digests: list[Any] = []
    manifests: list[dict[str, Any]] = []
    with contextlib.ExitStack() as opened:  # on a full disk closing fails too; the other files still close
        for block in blocks:
            if not files:
                names = [f"values-{index}.bin" for index in range(len(block))]
                files = [opened.enter_context((directory / name).open("wb")) for name in names]
                digests = [hashlib.sha256() for _ in block]
                manifests = [
                    {"file": name, "shape": [0, *value.shape[1:]], "dtype": str(value.dtype).removeprefix("torch.")}
                    for name, value in zip(names, block, strict=True)
                ]
            for file, digest, manifest, value in zip(files, digests, manifests, block, strict=True):
                data = _bytes_of(value)
                file.write(data)
                digest.update(data)
                manifest["shape"][0] += len(value)
    for manifest, digest in zip(manifests, digests, strict=True):
        manifest["sha256"] = digest.hexdigest()
    return manifests


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / _ENTRY).read_text(encoding="utf-8"))
    checksum = manifest.pop("checksum")
    if checksum != _checksum(manifest) or not manifest["tensors"]:
        raise ValueError(f"the checksum of {_ENTRY} does not match")
    return manifest


def _read_tensor(path: Path, manifest: Mapping[str, Any], *, use_mmap: bool) -> Tensor:
    dtype, shape = getattr(torch, manifest["dtype"]), tuple(manifest["shape"])
    content: Any = None if use_mmap else bytearray(path.stat().st_size)
    with path.open("rb") as file:
        digest = _hash_file(file) if use_mmap else _read(file, content)
        if digest != manifest["sha256"]:
            raise ValueError(f"{path.name} is not what was written")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if use_mmap else content
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a read-only buffer; nothing writes into it
        return torch.frombuffer(content, dtype=dtype).reshape(shape)


def _read(file: IO[bytes], content: bytearray) -> str:
    """Fill `content` from the file, and return its SHA-256."""
    file.readinto(content)  # type: ignore[attr-defined]  # a file opened for reading bytes has it
    return hashlib.sha256(content).hexdigest()


def _hash_file(file: IO[bytes]) -> str:
    """Return the SHA-256 of a file, read in blocks so that memory does not grow with it."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _checksum(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_entry(path: Path) -> CacheEntry | None:
    try:
        metadata = _read_manifest(path)["metadata"]
        size = sum(file.stat().st_size for file in path.iterdir())
        return CacheEntry(path, size, path.stat().st_mtime, metadata)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_being_written(part: Path) -> bool:
    """Return True if the process that writes a temporary directory may still be alive."""
    try:
        os.kill(int(part.name.split(".")[-2]), 0)
        return time.time() - part.stat().st_mtime < _STALE_AFTER_S
    except (ProcessLookupError, FileNotFoundError):
        return False
    except (OSError, ValueError):
        return True
