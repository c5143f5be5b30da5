"""Fine-tune PyTorch models with strategies, verified freezing, exact resume and plugins.

Public names are imported when first used, so that `import tuneforge` imports no torch. `__init__.pyi` names them for type
checkers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULE_OF_NAMES = {
    "tuneforge.builtin.datasets.tables.arrays": ("data_from_arrays",),
    "tuneforge.comparison.lr_range_test": ("lr_find",),
    "tuneforge.comparison.study": ("compare",),
    "tuneforge.engine.context.run": ("Run",),
    "tuneforge.engine.data.dataset": (
        "Batch",
        "Data",
        "Inputs",
        "Source",
        "Split",
        "Targets",
        "TensorTree",
        "map_inputs",
    ),
    "tuneforge.engine.data.sampler": ("SampleRNG",),
    "tuneforge.engine.loop.metric_set": ("Metrics",),
    "tuneforge.engine.model.model": (
        "LayerGroup",
        "Model",
    ),
    "tuneforge.engine.session.engine": (
        "Engine",
        "Result",
    ),
    "tuneforge.engine.session.predictor": (
        "Predictor",
        "attach_data",
        "evaluate",
        "load",
        "predict",
    ),
    "tuneforge.engine.storage.safetensors_io": (
        "load_tensors",
        "save_tensors",
    ),
    "tuneforge.errors": (
        "DataError",
        "FolderError",
        "HaltError",
        "MissingDependencyError",
        "OptionError",
        "PluginError",
        "PluginLoadError",
        "SelectorError",
        "StoppedError",
        "TryAgainError",
        "TuneforgeError",
        "UnknownNameError",
        "UnsafeFileError",
        "UsageError",
        "suggest_name",
    ),
    "tuneforge.exporting.bundle": (
        "InferenceModel",
        "load_bundle",
        "load_inference_model",
    ),
    "tuneforge.exporting.exporter": ("export",),
    "tuneforge.exporting.formats": (
        "ExportFormat",
        "Forward",
        "compute_predictions",
        "make_forward",
    ),
    "tuneforge.plugin.component": (
        "Check",
        "between",
        "component",
        "ge",
        "gt",
        "option",
    ),
    "tuneforge.plugin.config": ("RunConfig",),
    "tuneforge.plugin.hookspecs": ("hookimpl",),
    "tuneforge.plugin.results": (
        "AnyStrategyStepResult",
        "Diagnostics",
        "LayerGroupInfo",
        "StrategyStepResult",
        "TaskInfo",
    ),
    "tuneforge.plugin.steps": (
        "ComponentSpec",
        "Diagnosis",
        "HeadFit",
        "Phase",
        "StrategyStep",
        "StrategySteps",
        "WeightAverage",
        "use",
    ),
    "tuneforge.report.report": ("write_report",),
    "tuneforge.sandbox": (
        "LimitError",
        "Sandbox",
    ),
    "tuneforge.ship.champion.gate": (
        "GateRules",
        "run_gate",
    ),
    "tuneforge.ship.champion.promote": ("promote",),
    "tuneforge.ship.champion.store": ("ModelRegistry",),
    "tuneforge.ship.serve": ("serve",),
}
_MODULE_OF = {name: module for module, names in _MODULE_OF_NAMES.items() for name in names}

__all__ = [*sorted(_MODULE_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tuneforge' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
