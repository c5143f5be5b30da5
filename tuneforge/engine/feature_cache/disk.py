"""The store of features on disk: whole entries by key, shared between runs and processes, the least recently used go.

An entry is a folder named by its key, with one raw file a tensor and `entry.json` (shapes, types, sizes, SHA-256). It
is written under a temporary name and renamed, so half of one is never found; each file is verified before it is used,
and what is broken is deleted, as if it had never been there.
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
    """What is stored under one key.

    Args:
        path: Its folder.
        num_bytes: Size on disk.
        last_used: When it was last used, in seconds since the epoch.
        metadata: What it holds, for people.
    """

    path: Path
    num_bytes: int
    last_used: float
    metadata: Mapping[str, Any]


def default_cache_dir() -> Path:
    """Where features are kept: `$TUNEFORGE_CACHE`, else `tuneforge` in the user's cache folder."""
    named = os.environ.get("TUNEFORGE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuneforge"


@attrs.frozen
class DiskCache:
    """Features on disk.

    Args:
        directory: Holds the entries under `features/`; made when the first is written. Nothing else in it is touched.
        limit_mb: Size of all entries above which the least recently used are deleted, in MB.
    """

    directory: Path
    limit_mb: int

    def entry_dir(self, key: str) -> Path:
        """Where the entry of a key lies, if it is there."""
        return self.directory / "features" / key

    def get(self, key: str, *, use_mmap: bool) -> tuple[tuple[Tensor, ...] | None, str]:
        """The tensors under a key, or None; and what to say where an entry was found broken.

        Args:
            key: 64 hexadecimal digits.
            use_mmap: Map the files into memory, where the system can drop them, instead of reading them.
        """
        path = self.entry_dir(key)
        try:
            described = _read_manifest(path)
            tensors = tuple(
                _read_tensor(path / str(each["file"]), each, use_mmap=use_mmap) for each in described["tensors"]
            )
        except FileNotFoundError:
            return None, ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            shutil.rmtree(path, ignore_errors=True)
            return None, f"entry {key[:12]} of the cache was broken ({error}), so it is made again"
        with contextlib.suppress(OSError):  # another process may just have deleted it; what is open stays readable
            os.utime(path)
        return tensors, ""

    def put(self, key: str, blocks: Iterable[tuple[Tensor, ...]], metadata: Mapping[str, Any]) -> None:
        """Write an entry: tensors that come in blocks along their first axis.

        Raises:
            OSError: The disk is full, or the folder cannot be written; nothing is left behind.
        """
        final = self.entry_dir(key)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{key}.{os.getpid()}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            fault_injection.point("cache.begin")
            described = _write_blocks(temporary, blocks)
            fault_injection.point("cache.values-written")
            content = {"metadata": dict(metadata), "tensors": described}
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
        """All whole entries, the least recently used first."""
        return sorted(filter(None, map(_read_entry, self._entry_dirs())), key=lambda entry: entry.last_used)

    def trim(self, *, keep: str = "") -> None:
        """Delete what is least recently used until the rest fits the limit; and what dead processes left."""
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
        """Delete everything, or the entries whose keys begin so; how many bytes that were."""
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
    """Rename; where another process was faster, its entry stays, because it holds the same bits."""
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def _write_blocks(directory: Path, blocks: Iterable[tuple[Tensor, ...]]) -> list[dict[str, Any]]:
    files: list[IO[bytes]] = []
    digests: list[Any] = []
    described: list[dict[str, Any]] = []
    with contextlib.ExitStack() as opened:  # on a full disk closing one fails too, and the others still close
        for block in blocks:
            if not files:
                names = [f"values-{place}.bin" for place in range(len(block))]
                files = [opened.enter_context((directory / name).open("wb")) for name in names]
                digests = [hashlib.sha256() for _ in block]
                described = [
                    {"file": name, "shape": [0, *value.shape[1:]], "dtype": str(value.dtype).removeprefix("torch.")}
                    for name, value in zip(names, block, strict=True)
                ]
            for file, digest, each, value in zip(files, digests, described, block, strict=True):
                data = _bytes_of(value)
                file.write(data)
                digest.update(data)
                each["shape"][0] += len(value)
    for each, digest in zip(described, digests, strict=True):
        each["sha256"] = digest.hexdigest()
    return described


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_manifest(path: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((path / _ENTRY).read_text(encoding="utf-8"))
    checksum = described.pop("checksum")
    if checksum != _checksum(described) or not described["tensors"]:
        raise ValueError(f"{_ENTRY} does not agree with itself")
    return described


def _read_tensor(path: Path, described: Mapping[str, Any], *, use_mmap: bool) -> Tensor:
    dtype, shape = getattr(torch, described["dtype"]), tuple(described["shape"])
    content: Any = None if use_mmap else bytearray(path.stat().st_size)
    with path.open("rb") as file:
        digest = _hash_file(file) if use_mmap else _read(file, content)
        if digest != described["sha256"]:
            raise ValueError(f"{path.name} is not what was written")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if use_mmap else content
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a mapped file cannot be written: nothing writes into it
        return torch.frombuffer(content, dtype=dtype).reshape(shape)


def _read(file: IO[bytes], content: bytearray) -> str:
    """Fill `content`; its digest."""
    file.readinto(content)  # type: ignore[attr-defined]  # a file opened for reading bytes has it
    return hashlib.sha256(content).hexdigest()


def _hash_file(file: IO[bytes]) -> str:
    """The digest, read in pieces, so that memory does not grow with the file."""
    digest = hashlib.sha256()
    while piece := file.read(_BLOCK_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _checksum(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _read_entry(path: Path) -> CacheEntry | None:
    try:
        metadata = _read_manifest(path)["metadata"]
        size = sum(file.stat().st_size for file in path.iterdir())
        return CacheEntry(path, size, path.stat().st_mtime, metadata)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_being_written(part: Path) -> bool:
    """True where the process that writes a temporary folder may still be at it."""
    try:
        os.kill(int(part.name.split(".")[-2]), 0)
        return time.time() - part.stat().st_mtime < _STALE_AFTER_S
    except (ProcessLookupError, FileNotFoundError):
        return False
    except (OSError, ValueError):
        return True
