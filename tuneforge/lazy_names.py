"""Public names of a package that are imported when first used, so that importing the package stays cheap."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build what a package's `__init__` needs to import its public names on first use.

    The names stand in the stub beside it, which type checkers read as well: a line
    `from package.module import name as name` for each.

    Args:
        package: The package's `__name__`.
        file: The package's `__file__`.

    Returns:
        `__getattr__`, `__dir__` and `__all__` of the package.
    """
    with open(os.path.splitext(file)[0] + ".pyi", encoding="utf-8") as stub:
        imports = [line.split() for line in stub if line.startswith("from ")]
    module_of = {words[-1]: words[1] for words in imports}
    public = sorted(module_of)

    def get_name(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    return get_name, lambda: public, public
