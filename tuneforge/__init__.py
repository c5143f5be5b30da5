"""Fine-tune PyTorch models with strategies, verified freezing, exact resume and plugins.

Public names are imported when first used, so that `import tuneforge` imports no torch; `__init__.pyi` names them for
type checkers.
"""

from tuneforge.lazy_names import lazy_names

__version__ = "0.1.0"

_NAMES_OF_MODULE = {
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
        "evaluate",
        "load",
        "predict",
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
    ),
    "tuneforge.exporting.exporter": ("export",),
    "tuneforge.plugin.declaration": (
        "between",
        "component",
        "ge",
        "gt",
        "option",
    ),
    "tuneforge.plugin.hookspecs": ("hookimpl",),
    "tuneforge.plugin.results": (
        "StrategyStepResult",
        "TaskInfo",
    ),
    "tuneforge.plugin.steps": (
        "Diagnosis",
        "HeadFit",
        "Phase",
        "WeightAverage",
        "use",
    ),
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES_OF_MODULE)
__all__ += ["__version__"]
