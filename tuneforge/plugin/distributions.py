"""The entry points of installed distributions, read without importing `importlib.metadata`, which is slow to start."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import NamedTuple


class InstalledEntryPoint(NamedTuple):
    """An entry point of an installed distribution.

    Args:
        group: Its group, such as `tuneforge.callback`.
        name: Its name.
        target: `package.module:attribute`.
        distribution: The distribution that ships it.
        version: The version of that distribution.
    """

    group: str
    name: str
    target: str
    distribution: str
    version: str


def read_entry_points(prefix: str) -> Iterator[InstalledEntryPoint]:
    """Yield the entry points whose group begins with `prefix`, in the order of `sys.path`.

    An earlier folder of the path hides a distribution of the same name in a later one, as for imports. A distribution
    whose files cannot be read is skipped, because it must not hide the others.
    """
    seen: set[str] = set()
    for folder in dict.fromkeys(sys.path):
        for text, metadata in _read_folder(folder or ".", prefix):
            name, version = (_header(metadata, key) for key in ("Name", "Version"))
            if name and name not in seen:
                seen.add(name)
                points = [(group, *point) for group, *point in _parse(text) if group.startswith(prefix)]
                yield from (InstalledEntryPoint(group, key, value, name, version) for group, key, value in points)


def _read_folder(folder: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield `entry_points.txt` and the metadata of each distribution in a folder that mentions the prefix."""
    if os.path.isfile(folder):
        yield from _read_archive(folder, prefix)
        return
    try:
        names = sorted(each for each in os.listdir(folder) if each.endswith((".dist-info", ".egg-info")))
    except OSError:
        return
    for name in names:
        try:
            text = _read_file(folder, name, "entry_points.txt")
            if prefix in text:
                yield text, _read_file(folder, name, "METADATA" if name.endswith(".dist-info") else "PKG-INFO")
        except (OSError, UnicodeDecodeError):
            continue


def _read_file(*path: str) -> str:
    with open(os.path.join(*path), encoding="utf-8") as file:  # importing pathlib would take 3 ms
        return file.read()


def _read_archive(path: str, prefix: str) -> Iterator[tuple[str, str]]:
    from importlib.metadata import distributions  # a zip archive on the path is rare, and its import takes 20 ms

    for each in distributions(path=[path]):
        text = each.read_text("entry_points.txt") or ""
        if prefix in text:
            yield text, each.read_text("METADATA") or each.read_text("PKG-INFO") or ""


def _header(metadata: str, key: str) -> str:
    lines = metadata.partition("\n\n")[0].splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{key}:")), "")


def _parse(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (group, name, target) of each line `name = target` below a `[group]`."""
    group = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
        elif "=" in line and not line.startswith(("#", ";")):
            name, _, target = line.partition("=")
            yield group, name.strip(), target.partition("[")[0].strip()
