"""Public names of a package that are imported when first used, so that importing the package stays cheap."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, names_of_module: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build what a package's `__init__` needs to import its public names on first use.

    Args:
        package: The package's `__name__`.
        names_of_module: The public names, by the module that defines them.

    Returns:
        `__getattr__`, `__dir__` and `__all__` of the package.
    """
    module_of = {name: module for module, names in names_of_module.items() for name in names}
    public = sorted(module_of)

    def get_name(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    return get_name, lambda: public, public
