"""Read a file that `torch.save` has written; runs in a process with limits, and nowhere else.

This is the one place of tuneforge where a pickle is opened: by torch's reader that makes tensors and plain containers
and nothing else (`weights_only`), after the archive around it has been looked at.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tuneforge.convert.weights import require_tensor_name
from tuneforge.errors import DataError, UnsafeFileError, escape_name

_KEYS = ("state_dict", "model_state_dict", "model", "net", "module", "weights", "params", "ema")
_MAX_MEMBERS = 100_000
_PROTOCOLS = [bytes([number]) for number in range(6)]
_IMPORT_OPCODES = ("GLOBAL", "STACK_GLOBAL", "INST")
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6, as a pickle


def unpack(*, path: str, out: str, key: str | None, max_bytes: int) -> dict[str, Any]:
    """Read the weights of a file, and write them as safetensors.

    Args:
        path: The file.
        out: Where to write; the one file that this process may write.
        key: Where the weights are; None: found by the usual names.
        max_bytes: Most of all tensors together.

    Raises:
        UnsafeFileError: It asks for code to be run, or is not what it claims to be.
        DataError: It is broken, too large, or holds no weights.
    """
    _check_container(Path(path), max_bytes)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)  # noqa: TID251 - see above
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a hostile file makes the reader raise whatever it likes
        raise UnsafeFileError("it cannot be read safely", why=_error_reason(error)) from None
    state_dict, state_dict_key = _find_state_dict(content, key)
    tensors, shared_tensors, skipped_names = _select_tensors(state_dict, max_bytes)
    _write(tensors, shared_tensors, out)
    return {"state_dict_key": state_dict_key, "shared_tensors": shared_tensors, "skipped_names": skipped_names}


def _check_container(path: Path, max_bytes: int) -> None:
    """Refuse what is neither of the two containers, and archives that unpack to more than they are."""
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
    if start == _LEGACY_MAGIC:
        return
    if not start.startswith(b"PK\x03\x04"):
        if _is_pickle(path):
            raise UnsafeFileError("it is a bare pickle, which can run code when opened", why="torch.save writes none")
        raise DataError("it is not what torch.save writes", why="it begins with neither of its two headers")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise DataError("the archive is broken", why=str(error)) from None
    names = [member.filename for member in members]
    if not any(name.endswith("data.pkl") for name in names):
        raise DataError("it is an archive, but not one that torch.save writes", why="it holds no data.pkl")
    if len(names) > _MAX_MEMBERS or len(set(names)) != len(names):
        raise UnsafeFileError("the archive has too many members, or two of one name")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise UnsafeFileError("the archive is compressed or encrypted, which torch.save never does")
        if member.filename.startswith(("/", "\\")) or ".." in member.filename.replace("\\", "/").split("/"):
            raise UnsafeFileError("the archive holds a name that leads out of it")
    if sum(member.file_size for member in members) > min(max_bytes, path.stat().st_size):
        raise UnsafeFileError("the archive claims to hold more than it is")


def _is_pickle(path: Path) -> bool:
    """True where a file says that it is a pickle, or can be read as one that names something to import; none is run."""
    named = False
    with path.open("rb") as file:
        if file.read(1) == b"\x80" and file.read(1) in _PROTOCOLS:
            return True
        file.seek(0)
        try:
            for code, _, _ in pickletools.genops(file):
                named = named or code.name in _IMPORT_OPCODES
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - what is no pickle makes it raise whatever it likes
            return False
    return named


def _find_state_dict(content: Any, key: str | None) -> tuple[Mapping[Any, Any], str]:
    """The mapping of names to tensors in what was read, and the key that it lies under."""
    if not isinstance(content, Mapping):
        raise DataError(f"it holds a {type(content).__name__}, not weights by name")
    if key is not None:
        if not isinstance(content.get(key), Mapping):
            raise DataError(f"it has no weights under '{key}'", fix=f"it has {_list_keys(content)}")
        return content[key], key
    if any(isinstance(value, Tensor) for value in content.values()):
        return content, ""
    for each in _KEYS:
        if isinstance(content.get(each), Mapping):
            return content[each], each
    raise DataError("it holds no weights by name", fix=f"say where they are with --key; it has {_list_keys(content)}")


def _select_tensors(
    state_dict: Mapping[Any, Any], max_bytes: int
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Tensors by name, each memory once; further names of the same one; names of what was no tensor."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    skipped: list[str] = []
    first: dict[tuple[Any, ...], str] = {}
    total = 0
    for name, value in state_dict.items():
        checked = require_tensor_name(name)
        if not isinstance(value, Tensor):
            skipped.append(checked)
            continue
        tensor = _require_plain_tensor(checked, value)
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and memory in first:
            shared[checked] = first[memory]
            continue
        first[memory] = checked
        total += tensor.numel() * tensor.element_size()
        if total > max_bytes:
            raise DataError(f"its tensors take more than {max_bytes / 2**20:,.0f} MB", fix="give a larger --max-mb")
        tensors[checked] = tensor
    if not tensors:
        raise DataError("it holds no tensor")
    return tensors, shared, skipped


def _require_plain_tensor(name: str, tensor: Tensor) -> Tensor:
    """A tensor that is nothing but numbers in memory, of which it has as many as it says."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    if not plain or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise UnsafeFileError(f"'{name}' is no plain tensor", why=f"it is a {type(tensor).__name__} on {tensor.device}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UnsafeFileError(f"'{name}' claims to be larger than what the file holds of it")
    return tensor.detach()


def _write(tensors: Mapping[str, Tensor], shared: Mapping[str, str], out: str) -> None:
    """Write safetensors as `save_tensors` does, but into the one file that may be written."""
    plain = {name: tensor.contiguous().clone() for name, tensor in sorted(tensors.items())}
    content = save(plain, metadata={"tuneforge": json.dumps({"shared_tensors": shared}, sort_keys=True)})
    Path(out).write_bytes(content)


def _error_reason(error: BaseException) -> str:
    """What torch's reader found, without its advice to read the file unsafely."""
    _, marker, found = str(error).partition("WeightsUnpickler error:")
    first = (found if marker else str(error)).strip().partition("\n")[0].partition(". ")[0]
    return escape_name(first[:200]) if first and "weights_only" not in first else type(error).__name__


def _list_keys(content: Mapping[Any, Any]) -> str:
    return ", ".join(str(each)[:40] for each in list(content)[:10]) or "nothing"
