"""File and class names as text that any terminal, JSON file or page can hold."""

from __future__ import annotations

import os
from pathlib import Path


def shown(name: str | bytes | Path) -> str:
    """A name with its odd bytes and controls escaped, so that it can be printed and written anywhere."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
