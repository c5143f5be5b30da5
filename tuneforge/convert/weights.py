"""Foreign weights: a `.pth` file becomes safetensors in a process with limits, or is refused.

Nothing else of tuneforge opens a pickle. What the process gives back is not trusted either: the file that it wrote is
read as safetensors, and its names are checked again, before it gets its place.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from tuneforge.builtin.datasets.images.sample_names import shown
from tuneforge.errors import DataError, FolderError, TuneforgeError, UnsafeFileError, UsageError
from tuneforge.sandbox import Limited, LimitError

MAX_MB, SECONDS = 4096, 120.0
_PROCESS_MB = 1024  # of the process itself, beside the tensors that it holds twice
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,511}")


@attrs.frozen
class Imported:
    """What came out of a foreign file.

    Args:
        path: The safetensors file.
        tensors: How many it holds.
        bytes: Of all tensors.
        under: The key of the file that they were found under; empty where they are the whole of it.
        same: Further names of tensors that are kept once, and the name that each is kept under.
        left_out: Names of what was no tensor.
    """

    path: Path
    tensors: int
    bytes: int
    under: str
    same: dict[str, str]
    left_out: Sequence[str]


def import_weights(
    path: Path,
    out: Path,
    *,
    key: str | None = None,
    max_mb: int = MAX_MB,
    seconds: float = SECONDS,
    replace: bool = False,
) -> Imported:
    """Read a foreign file of weights without running anything in it, and write them as safetensors.

    Args:
        path: A file that `torch.save` has written.
        out: The file to write.
        key: Where the weights are in it, such as `model`; None: found by the usual names.
        max_mb: Most memory for the tensors, in MB; a larger file is refused before it is read.
        seconds: Time that reading may take.
        replace: Write over a file that is there.

    Raises:
        UsageError: The file is safetensors already.
        UnsafeFileError: The file asks for code to be run, or is not what it claims to be.
        DataError: It is broken, too large, or holds no weights.
        FolderError: The result cannot be written, or something is there.
    """
    _require_file(path, max_mb)
    _refuse_safetensors(path)
    if os.path.lexists(out) and not replace:
        raise FolderError(f"'{shown(out)}' is there already", where="--out", fix="name another file, or give --force")
    with _place_for(out) as temporary:
        with Limited(
            "tuneforge.convert.restricted_unpickler:unpack",
            memory_mb=_PROCESS_MB + 2 * max_mb,
            seconds=seconds,
            writes=temporary,
            largest=(max_mb + 64) * 2**20,
        ) as process:
            told = _asked(process, path, temporary, key, max_mb)
        tensors, size = _verified(temporary, told["same"], path)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(out)
    return Imported(out, tensors, size, told["under"], told["same"], told["left_out"])


def checked_name(name: Any) -> str:
    """A tensor's name, where it is one.

    Raises:
        UnsafeFileError: It is no text, or could be taken for a path.
    """
    if isinstance(name, str) and _NAME.fullmatch(name) and ".." not in name:
        return name
    raise UnsafeFileError(
        f"'{shown(str(name)[:80])}' is no name of a tensor",
        why="letters, digits and _ . : - are, without two dots in a row; anything else could be taken for a path",
        fix="rename it where the file was made",
    )


def _asked(process: Limited, path: Path, temporary: Path, key: str | None, max_mb: int) -> dict[str, Any]:
    try:
        told: dict[str, Any] = process.ask(
            path=os.path.abspath(path), out=str(temporary), key=key, max_bytes=max_mb * 2**20
        )
    except LimitError as error:
        raise DataError(
            f"'{shown(path.name)}' cannot be read within limits",
            where=shown(path.parent),
            why=error.what,
            fix="get the weights as safetensors, or give a larger --max-mb or --seconds if you trust the file",
        ) from None
    except TuneforgeError as error:
        fix = error.fix or "get the weights as safetensors from their author"
        raise type(error)(
            f"'{shown(path.name)}' is refused: {shown(error.what)}", where=shown(path.parent), why=error.why, fix=fix
        ) from None
    return told


def _require_file(path: Path, max_mb: int) -> None:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read '{shown(path)}'", where="FILE", why=why, fix="check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"'{shown(path)}' is a folder", where="FILE", fix="name a file of weights")
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFileError(f"'{shown(path)}' is no file", where="FILE", fix="name a file of weights")
    if status.st_size > max_mb * 2**20:
        raise DataError(
            f"'{shown(path)}' is {status.st_size / 2**20:,.0f} MB large",
            where="FILE",
            why=f"at most {max_mb:,} MB are read",
            fix="give a larger --max-mb",
        )


def _refuse_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError):
        return
    raise UsageError(
        f"'{shown(path)}' is safetensors already",
        where="FILE",
        why="a run reads it as it is",
        fix=f"tuneforge run --model torchvision --model.weights {shlex.quote(shown(path))} ...",
    )


@contextlib.contextmanager
def _place_for(out: Path) -> Any:
    """A new, empty file beside `out` that nobody could have planted; gone afterwards, unless it took its place."""
    if out.suffix != ".safetensors" or out.is_dir():
        raise UsageError(f"'{shown(out)}' is no name for safetensors", where="--out", fix="let it end in .safetensors")
    try:
        number, name = tempfile.mkstemp(prefix=".import-", suffix=".part", dir=os.path.abspath(out.parent))
    except OSError as error:
        why = error.strerror or ""
        raise FolderError(f"cannot write '{shown(out)}'", where="--out", why=why, fix="name another place") from None
    os.close(number)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def _verified(temporary: Path, same: dict[str, str], path: Path) -> tuple[int, int]:
    """Number and bytes of the tensors in a file that the process wrote, which has to be safetensors with good names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(temporary, framework="np") as file:
            names = [checked_name(name) for name in file.keys()]  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise UnsafeFileError(f"'{shown(path.name)}' gave no valid safetensors file", why=str(error)) from None
    for name, kept in same.items():
        checked_name(name)
        if kept not in names:
            raise UnsafeFileError(f"'{shown(path.name)}' gave a name for a tensor that is not there")
    return len(names), temporary.stat().st_size
