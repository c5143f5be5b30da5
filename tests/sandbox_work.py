"""What the tests of the process with limits let it do."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import time
from pathlib import Path


def doubled(*, number):
    return 2 * number


def sleeps(*, seconds):
    time.sleep(seconds)
    return "done"


def counts(*, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
    return "done"


def fills(*, megabytes):
    return len(bytearray(megabytes * 2**20)) // 2**20


def crashes():
    os.abort()


def writes(*, path, count):
    with open(path, "wb") as file:
        return file.write(bytes(count))


def environment():
    return sorted(os.environ)


def harms(*, act, path, port):
    acts = {
        "shell": lambda: os.system(f"rm {path}"),
        "process": lambda: subprocess.run(["rm", path], check=True),
        "fork": os.fork,
        "write": lambda: Path(path).write_text("theirs"),
        "remove": lambda: os.remove(path),
        "connect": lambda: socket.create_connection(("127.0.0.1", port)),
        "library": lambda: ctypes.CDLL(None),
    }
    if act != "swallowed":
        return acts[act]()
    try:
        acts["remove"]()
    except OSError:
        return "quiet"
