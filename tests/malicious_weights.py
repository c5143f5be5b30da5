"""Made weight files that must be refused: pickles that run code, archives that lie, tensors that are not there.

The pickles are written opcode by opcode. Each that were opened by a careless reader would create a marker file.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
Maker = Callable[[Path], None]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def found(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"c" + f"{module}\n{attribute}\n".encode()


def called(name: str, *arguments: bytes) -> bytes:
    return found(name) + b"(" + b"".join(arguments) + b"tR"


def whole(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def weights(value: bytes) -> bytes:
    """A dictionary with one entry."""
    return whole(b"}" + text("w") + value + b"s")


def archive(content: bytes, *, others: dict[str, bytes] | None = None, how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as made:
        made.writestr("w/data.pkl", content)
        for name, data in {
            "w/byteorder": b"little",
            "w/version": b"3\n",
            "w/data/0": bytes(16),
            **(others or {}),
        }.items():
            made.writestr(name, data)
    return file.getvalue()


def legacy(content: bytes) -> bytes:
    protocol, system = whole(b"M\xe9\x03"), whole(b"}")
    return LEGACY_MAGIC + protocol + system + content + whole(b"]")


def tensor(size: tuple[int, ...], stride: tuple[int, ...], *, numel: int = 4, offset: int = 0) -> bytes:
    """What torch.save writes for a tensor over storage 0, with any size and stride."""
    storage = b"(" + text("storage") + found("torch.FloatStorage") + text("0") + text("cpu") + number(numel) + b"tQ"
    hooks = called("collections.OrderedDict")
    numbers = (b"(" + b"".join(map(number, each)) + b"t" for each in (size, stride))
    return called("torch._utils._rebuild_tensor_v2", storage, number(offset), *numbers, b"\x89", hooks)


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def calls(marker: Path) -> dict[str, bytes]:
    """Pickles that run something which creates the marker, by what they run."""
    shell, python = text(f"touch {marker}"), text(f"__import__('pathlib').Path({str(marker)!r}).touch()")
    path, one = text(str(marker)), number(1)
    nested = text(weights(called("os.system", shell)).decode("latin-1"))
    return {
        "os.system": called("os.system", shell),
        "posix.system": called("posix.system", shell),
        "nt.system": called("nt.system", shell),
        "os.popen": called("os.popen", shell),
        "os.mkdir": called("os.mkdir", path),
        "subprocess": called("subprocess.Popen", b"(" + text("touch") + path + b"l"),
        "subprocess.getoutput": called("subprocess.getoutput", shell),
        "exec": called("builtins.exec", python),
        "eval": called("builtins.eval", python),
        "__builtin__": called("__builtin__.eval", python),
        "open": called("builtins.open", path, text("w")),
        "compile": called("builtins.compile", python, text("x"), text("exec")),
        "import": called("builtins.__import__", text("antigravity")),
        "getattr": called("builtins.getattr", found("os.path"), text("os")),
        "path": called("pathlib.Path", path),
        "touch": called("pathlib.Path.touch", called("pathlib.PosixPath", path)),
        "runpy": called("runpy.run_path", path),
        "timeit": called("timeit.timeit", python, text("pass"), text("pass")),
        "pty": called("pty.spawn", shell),
        "socket": called("socket.create_connection", b"(" + text("127.0.0.1") + one + b"t"),
        "urlopen": called("urllib.request.urlopen", text("http://127.0.0.1:1/")),
        "partial": called("functools.partial", found("os.system"), shell),
        "attrgetter": called("operator.attrgetter", text("__class__")),
        "methodcaller": called("operator.methodcaller", text("touch")),
        "ctypes": called("ctypes.CDLL", text("libc.so.6")),
        "torch.load": called("torch.load", path),
        "torch.hub": called("torch.hub.load", path, text("x")),
        "torch.collect_env": called("torch.utils.collect_env.run", shell),
        "torch.package": called("torch.package.PackageImporter", path),
        "numpy.load": called("numpy.load", path),
        "numpy.reconstruct": called("numpy.core.multiarray._reconstruct", found("os.system"), b"(t", shell),
        "loads": called("pickle.loads", nested),
        "module": called("torch.nn.Linear", one, one),
        "stack-global": text("os") + text("system") + b"\x93(" + shell + b"tR",
        "inst": b"(" + shell + b"ios\nsystem\n",
        "obj": b"(" + found("os.system") + shell + b"o",
        "newobj": found("subprocess.Popen") + b"(" + shell + b"t\x81",
        "build": called("collections.OrderedDict") + b"}" + text("__reduce__") + found("os.system") + b"sb",
        "ext": b"\x82\x01",
        "persistent": b"(" + text("module") + found("os.system") + shell + b"tQ",
    }


def good() -> bytes:
    """What torch.save would have written: the others differ from it in what they are named after."""
    return archive(weights(tensor((4,), (1,))))


def lies() -> dict[str, bytes]:
    """Files that are not what they say, by what they say."""
    names = {"up": "../../x", "root": "/etc/x", "lines": "a\nb", "none": "", "long": "x" * 600, "space": "a b"}
    made = {f"key-{key}": archive(whole(b"}" + text(name) + tensor((4,), (1,)) + b"s")) for key, name in names.items()}
    return made | {
        "key-number": archive(whole(b"}" + number(7) + tensor((4,), (1,)) + b"s")),
        "huge": archive(weights(tensor((2**40,), (0,)))),
        "huge-storage": archive(weights(tensor((4,), (1,), numel=2**40))),
        "negative": archive(weights(tensor((-4,), (1,)))),
        "beyond": archive(weights(tensor((4,), (1,), offset=2**40))),
        "bomb": archive(weights(tensor((4,), (1,))), others={"w/data/1": bytes(50_000_000)}, how=zipfile.ZIP_DEFLATED),
        "climbs": archive(weights(tensor((4,), (1,))), others={"../../evil": b"x"}),
        "cut": good()[:400],
        "cut-late": good()[:-30],
        "cut-legacy": legacy(weights(tensor((4,), (1,))))[:40],
        "empty": b"",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(99),
        "bare": weights(tensor((4,), (1,))),
        "string-bomb": archive(whole(b"\x8d" + struct.pack("<Q", 2**62))),
        "list": archive(whole(b"]")),
    }


def special(folder: Path) -> dict[str, Path]:
    """Paths that are no files of their own, by what they are."""
    paths = {name: folder / f"{name}.pth" for name in ("fifo", "device", "loop", "nowhere", "folder")}
    os.mkfifo(paths["fifo"])
    paths["device"].symlink_to("/dev/zero")
    paths["loop"].symlink_to("loop.pth")
    paths["nowhere"].symlink_to("/nonexistent")
    paths["folder"].mkdir()
    return paths


def plant(folder: Path, marker: Path) -> dict[str, Path]:
    """All of them, by name: every call in an archive and some in the old container, the lies, and special paths."""
    content = {name: archive(weights(body)) for name, body in calls(marker).items()}
    some = ("os.system", "exec", "open", "subprocess")
    content |= {f"legacy-{name}": legacy(weights(calls(marker)[name])) for name in some}
    content |= lies() | {"tar": _tar()}
    paths = {name: folder / f"{name}.pth" for name in content}
    for name, path in paths.items():
        path.write_bytes(content[name])
    paths["module-saved"] = folder / "module-saved.pth"
    torch.save(torch.nn.Linear(2, 2), paths["module-saved"])  # noqa: TID251 - what has to be refused
    return paths | special(folder)


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        info = tarfile.TarInfo("../../storages")
        info.size = 4
        made.addfile(info, io.BytesIO(b"evil"))
    return file.getvalue()
