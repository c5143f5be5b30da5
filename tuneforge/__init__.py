"""tuneforge: fine-tuning as a conversation between a strategy, which says what to do, and an engine, which does it.

Public names are resolved when first used, so that `import tuneforge` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "tuneforge.errors": (
        "TuneforgeError", "UsageError", "UnknownNameError", "OptionError", "SelectorError", "PluginError",
        "PluginLoadError", "DataError", "MissingDependencyError", "HaltError", "FolderError", "TryAgainError",
        "UnsafeFileError",
    ),
    "tuneforge.plugin.component": ("component", "option", "Check", "gt", "ge", "between"),
    "tuneforge.plugin.hookspecs": ("hookimpl",),
    "tuneforge.plugin.steps": (
        "Phase", "Fit", "Probe", "Blend", "Report", "Readings", "Brief", "GroupInfo", "Step", "Answer", "Use", "use",
    ),
    "tuneforge.plugin.config": ("RunConfig",),
    "tuneforge.engine.data": ("Batch", "Data", "Inputs", "Source", "Split", "Targets", "Inputable", "map_inputs"),
    "tuneforge.engine.order": ("Noise",),
    "tuneforge.engine.evaluation": ("Metrics",),
    "tuneforge.engine.model": ("Group", "Model"),
    "tuneforge.engine.run": ("Run",),
    "tuneforge.engine.engine": ("Engine", "Result"),
    "tuneforge.engine.folder": ("load_tensors", "save_tensors"),
    "tuneforge.engine.tuned": ("Tuned", "evaluate", "load", "predict"),
    "tuneforge.judge.page": ("write_page",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tuneforge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
