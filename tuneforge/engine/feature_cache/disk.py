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

from tuneforge.engine.storage import fault_injection as faults

_ENTRY = "entry.json"
_STALE_S = 24 * 3600.0
_BLOCK = 1 << 22
_KEY = re.compile("[0-9a-f]{64}")


@attrs.frozen
class Entry:
    """What is stored under one key.

    Args:
        path: Its folder.
        num_bytes: Size on disk.
        used: When it was last used, in seconds since the epoch.
        about: What it holds, for people.
    """

    path: Path
    num_bytes: int
    used: float
    about: Mapping[str, Any]


def default_folder() -> Path:
    """Where features are kept: `$TUNEFORGE_CACHE`, else `tuneforge` in the user's cache folder."""
    named = os.environ.get("TUNEFORGE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuneforge"


@attrs.frozen
class Store:
    """Features on disk.

    Args:
        folder: Holds the entries under `features/`; made when the first is written. Nothing else in it is touched.
        limit_mb: Size of all entries above which the least recently used are deleted, in MB.
    """

    folder: Path
    limit_mb: int

    def path_of(self, key: str) -> Path:
        """Where the entry of a key lies, if it is there."""
        return self.folder / "features" / key

    def get(self, key: str, *, mapped: bool) -> tuple[tuple[Tensor, ...] | None, str]:
        """The tensors under a key, or None; and what to say where an entry was found broken.

        Args:
            key: 64 hexadecimal digits.
            mapped: Map the files into memory, where the system can drop them, instead of reading them.
        """
        path = self.path_of(key)
        try:
            described = _described(path)
            tensors = tuple(_tensor(path / str(each["file"]), each, mapped=mapped) for each in described["tensors"])
        except FileNotFoundError:
            return None, ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            shutil.rmtree(path, ignore_errors=True)
            return None, f"entry {key[:12]} of the cache was broken ({error}), so it is made again"
        with contextlib.suppress(OSError):  # another process may just have deleted it; what is open stays readable
            os.utime(path)
        return tensors, ""

    def put(self, key: str, blocks: Iterable[tuple[Tensor, ...]], about: Mapping[str, Any]) -> None:
        """Write an entry: tensors that come in blocks along their first axis.

        Raises:
            OSError: The disk is full, or the folder cannot be written; nothing is left behind.
        """
        final = self.path_of(key)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{key}.{os.getpid()}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            faults.point("cache.begin")
            described = _write(temporary, blocks)
            faults.point("cache.values-written")
            content = {"about": dict(about), "tensors": described}
            text = json.dumps({**content, "seal": _seal(content)}, sort_keys=True)
            (temporary / _ENTRY).write_text(text, encoding="utf-8")
            faults.point("cache.before-rename")
            _take(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        faults.point("cache.after-rename")
        self.trim(keep=key)

    def entries(self) -> list[Entry]:
        """All whole entries, the least recently used first."""
        return sorted(filter(None, map(_entry, self._folders())), key=lambda entry: entry.used)

    def trim(self, *, keep: str = "") -> None:
        """Delete what is least recently used until the rest fits the limit; and what dead processes left."""
        for path in self._folders():
            if _entry(path) is None:
                shutil.rmtree(path, ignore_errors=True)
        entries = self.entries()
        total = sum(entry.num_bytes for entry in entries)
        for entry in entries:
            if total > self.limit_mb * 2**20 and entry.path.name != keep:
                shutil.rmtree(entry.path, ignore_errors=True)
                total -= entry.num_bytes
        for path in self._parts():
            if not _alive(path):
                shutil.rmtree(path, ignore_errors=True)

    def clear(self, beginnings: Sequence[str] = ()) -> int:
        """Delete everything, or the entries whose keys begin so; how many bytes that were."""
        chosen = [each for each in self._folders() if not beginnings or each.name.startswith(tuple(beginnings))]
        freed = sum(entry.num_bytes for entry in map(_entry, chosen) if entry is not None)
        for path in [*chosen, *(self._parts() if not beginnings else [])]:
            shutil.rmtree(path, ignore_errors=True)
        return freed

    def _folders(self) -> list[Path]:
        return [path for path in self.path_of("").glob("*") if path.is_dir() and _KEY.fullmatch(path.name)]

    def _parts(self) -> list[Path]:
        return [path for path in self.path_of("").glob(".*.part") if _KEY.fullmatch(path.name.split(".")[1])]


def _take(temporary: Path, final: Path) -> None:
    """Rename; where another process was faster, its entry stays, because it holds the same bits."""
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, blocks: Iterable[tuple[Tensor, ...]]) -> list[dict[str, Any]]:
    files: list[IO[bytes]] = []
    digests: list[Any] = []
    described: list[dict[str, Any]] = []
    with contextlib.ExitStack() as opened:  # on a full disk closing one fails too, and the others still close
        for block in blocks:
            if not files:
                names = [f"values-{place}.bin" for place in range(len(block))]
                files = [opened.enter_context((folder / name).open("wb")) for name in names]
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


def _described(path: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((path / _ENTRY).read_text(encoding="utf-8"))
    seal = described.pop("seal")
    if seal != _seal(described) or not described["tensors"]:
        raise ValueError(f"{_ENTRY} does not agree with itself")
    return described


def _tensor(path: Path, described: Mapping[str, Any], *, mapped: bool) -> Tensor:
    dtype, shape = getattr(torch, described["dtype"]), tuple(described["shape"])
    content: Any = None if mapped else bytearray(path.stat().st_size)
    with path.open("rb") as file:
        digest = _digest_of(file) if mapped else _read(file, content)
        if digest != described["sha256"]:
            raise ValueError(f"{path.name} is not what was written")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else content
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a mapped file cannot be written: nothing writes into it
        return torch.frombuffer(content, dtype=dtype).reshape(shape)


def _read(file: IO[bytes], content: bytearray) -> str:
    """Fill `content`; its digest."""
    file.readinto(content)  # type: ignore[attr-defined]  # a file opened for reading bytes has it
    return hashlib.sha256(content).hexdigest()


def _digest_of(file: IO[bytes]) -> str:
    """The digest, read in pieces, so that memory does not grow with the file."""
    digest = hashlib.sha256()
    while piece := file.read(_BLOCK):
        digest.update(piece)
    return digest.hexdigest()


def _seal(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _entry(path: Path) -> Entry | None:
    try:
        about = _described(path)["about"]
        size = sum(file.stat().st_size for file in path.iterdir())
        return Entry(path, size, path.stat().st_mtime, about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _alive(part: Path) -> bool:
    """True where the process that writes a temporary folder may still be at it."""
    try:
        os.kill(int(part.name.split(".")[-2]), 0)
        return time.time() - part.stat().st_mtime < _STALE_S
    except (ProcessLookupError, FileNotFoundError):
        return False
    except (OSError, ValueError):
        return True
