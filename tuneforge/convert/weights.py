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

from tuneforge.errors import DataError, FolderError, TuneforgeError, UnsafeFileError, UsageError, escape_name
from tuneforge.sandbox import LimitError, Sandbox

MAX_MB, TIMEOUT_S = 4096, 120.0
_PROCESS_OVERHEAD_MB = 1024  # of the process itself, beside the tensors that it holds twice
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,511}")


@attrs.frozen
class ConvertedWeights:
    """What came out of a foreign file.

    Args:
        path: The safetensors file.
        num_tensors: How many it holds.
        num_bytes: Of all tensors.
        state_dict_key: The key of the file that they were found under; empty where they are the whole of it.
        shared_tensors: Further names of tensors that are kept once, and the name that each is kept under.
        skipped_names: Names of what was no tensor.
    """

    path: Path
    num_tensors: int
    num_bytes: int
    state_dict_key: str
    shared_tensors: dict[str, str]
    skipped_names: Sequence[str]


def convert_weights(
    path: Path,
    out: Path,
    *,
    key: str | None = None,
    max_mb: int = MAX_MB,
    timeout_s: float = TIMEOUT_S,
    overwrite: bool = False,
) -> ConvertedWeights:
    """Read a foreign file of weights without running anything in it, and write them as safetensors.

    Args:
        path: A file that `torch.save` has written.
        out: The file to write.
        key: Where the weights are in it, such as `model`; None: found by the usual names.
        max_mb: Most memory for the tensors, in MB; a larger file is refused before it is read.
        timeout_s: Time that reading may take.
        overwrite: Write over a file that is there.

    Raises:
        UsageError: The file is safetensors already.
        UnsafeFileError: The file asks for code to be run, or is not what it claims to be.
        DataError: It is broken, too large, or holds no weights.
        FolderError: The result cannot be written, or something is there.
    """
    _require_file(path, max_mb)
    _refuse_safetensors(path)
    if os.path.lexists(out) and not overwrite:
        raise FolderError(
            f"'{escape_name(out)}' is there already", where="--out", fix="name another file, or give --force"
        )
    with _temporary_file_for(out) as temporary:
        with Sandbox(
            "tuneforge.convert.restricted_unpickler:unpack",
            memory_mb=_PROCESS_OVERHEAD_MB + 2 * max_mb,
            timeout_s=timeout_s,
            writable_path=temporary,
            max_file_bytes=(max_mb + 64) * 2**20,
        ) as process:
            result = _run_sandboxed(process, path, temporary, key, max_mb)
        num_tensors, num_bytes = _verify_output(temporary, result["shared_tensors"], path)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(out)
    return ConvertedWeights(
        out, num_tensors, num_bytes, result["state_dict_key"], result["shared_tensors"], result["skipped_names"]
    )


def require_tensor_name(name: Any) -> str:
    """A tensor's name, where it is one.

    Raises:
        UnsafeFileError: It is no text, or could be taken for a path.
    """
    if isinstance(name, str) and _NAME.fullmatch(name) and ".." not in name:
        return name
    raise UnsafeFileError(
        f"'{escape_name(str(name)[:80])}' is no name of a tensor",
        why="letters, digits and _ . : - are, without two dots in a row; anything else could be taken for a path",
        fix="rename it where the file was made",
    )


def _run_sandboxed(process: Sandbox, path: Path, temporary: Path, key: str | None, max_mb: int) -> dict[str, Any]:
    try:
        result: dict[str, Any] = process.call(
            path=os.path.abspath(path), out=str(temporary), key=key, max_bytes=max_mb * 2**20
        )
    except LimitError as error:
        raise DataError(
            f"'{escape_name(path.name)}' cannot be read within limits",
            where=escape_name(path.parent),
            why=error.what,
            fix="get the weights as safetensors, or give a larger --max-mb or --timeout-s if you trust the file",
        ) from None
    except TuneforgeError as error:
        fix = error.fix or "get the weights as safetensors from their author"
        raise type(error)(
            f"'{escape_name(path.name)}' is refused: {escape_name(error.what)}",
            where=escape_name(path.parent),
            why=error.why,
            fix=fix,
        ) from None
    return result


def _require_file(path: Path, max_mb: int) -> None:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read '{escape_name(path)}'", where="FILE", why=why, fix="check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"'{escape_name(path)}' is a folder", where="FILE", fix="name a file of weights")
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFileError(f"'{escape_name(path)}' is no file", where="FILE", fix="name a file of weights")
    if status.st_size > max_mb * 2**20:
        raise DataError(
            f"'{escape_name(path)}' is {status.st_size / 2**20:,.0f} MB large",
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
        f"'{escape_name(path)}' is safetensors already",
        where="FILE",
        why="a run reads it as it is",
        fix=f"tuneforge run --model torchvision --model.weights {shlex.quote(escape_name(path))} ...",
    )


@contextlib.contextmanager
def _temporary_file_for(out: Path) -> Any:
    """A new, empty file beside `out` that nobody could have planted; gone afterwards, unless it took its place."""
    if out.suffix != ".safetensors" or out.is_dir():
        raise UsageError(
            f"'{escape_name(out)}' is no name for safetensors", where="--out", fix="let it end in .safetensors"
        )
    try:
        number, name = tempfile.mkstemp(prefix=".import-", suffix=".part", dir=os.path.abspath(out.parent))
    except OSError as error:
        why = error.strerror or ""
        raise FolderError(
            f"cannot write '{escape_name(out)}'", where="--out", why=why, fix="name another place"
        ) from None
    os.close(number)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


def _verify_output(temporary: Path, shared: dict[str, str], path: Path) -> tuple[int, int]:
    """Number and bytes of the tensors in a file that the process wrote, which has to be safetensors with good names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(temporary, framework="np") as file:
            names = [require_tensor_name(name) for name in file.keys()]  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise UnsafeFileError(f"'{escape_name(path.name)}' gave no valid safetensors file", why=str(error)) from None
    for name, kept in shared.items():
        require_tensor_name(name)
        if kept not in names:
            raise UnsafeFileError(f"'{escape_name(path.name)}' gave a name for a tensor that is not there")
    return len(names), temporary.stat().st_size
