"""tuneforge: fine-tuning as a conversation between a strategy, which says what to do, and an engine, which does it.

Public names are resolved when first used, so that `import tuneforge` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tuneforge.builtin.datasets.tables.arrays import data_of as data_of
    from tuneforge.comparison.lr_range_test import lr_find as lr_find
    from tuneforge.comparison.study import compare as compare
    from tuneforge.engine.context.run import Run as Run
    from tuneforge.engine.data.dataset import (
        Batch as Batch,
    )
    from tuneforge.engine.data.dataset import (
        Data as Data,
    )
    from tuneforge.engine.data.dataset import (
        Inputable as Inputable,
    )
    from tuneforge.engine.data.dataset import (
        Inputs as Inputs,
    )
    from tuneforge.engine.data.dataset import (
        Source as Source,
    )
    from tuneforge.engine.data.dataset import (
        Split as Split,
    )
    from tuneforge.engine.data.dataset import (
        Targets as Targets,
    )
    from tuneforge.engine.data.dataset import (
        map_inputs as map_inputs,
    )
    from tuneforge.engine.data.sampler import Noise as Noise
    from tuneforge.engine.loop.metric_set import Metrics as Metrics
    from tuneforge.engine.model.model import Group as Group
    from tuneforge.engine.model.model import Model as Model
    from tuneforge.engine.session.engine import Engine as Engine
    from tuneforge.engine.session.engine import Result as Result
    from tuneforge.engine.session.predictor import Tuned as Tuned
    from tuneforge.engine.session.predictor import evaluate as evaluate
    from tuneforge.engine.session.predictor import load as load
    from tuneforge.engine.session.predictor import predict as predict
    from tuneforge.engine.session.predictor import with_data as with_data
    from tuneforge.engine.storage.safetensors_io import load_tensors as load_tensors
    from tuneforge.engine.storage.safetensors_io import save_tensors as save_tensors
    from tuneforge.errors import (
        DataError as DataError,
    )
    from tuneforge.errors import (
        FolderError as FolderError,
    )
    from tuneforge.errors import (
        HaltError as HaltError,
    )
    from tuneforge.errors import (
        MissingDependencyError as MissingDependencyError,
    )
    from tuneforge.errors import (
        OptionError as OptionError,
    )
    from tuneforge.errors import (
        PluginError as PluginError,
    )
    from tuneforge.errors import (
        PluginLoadError as PluginLoadError,
    )
    from tuneforge.errors import (
        SelectorError as SelectorError,
    )
    from tuneforge.errors import (
        StoppedError as StoppedError,
    )
    from tuneforge.errors import (
        TryAgainError as TryAgainError,
    )
    from tuneforge.errors import (
        TuneforgeError as TuneforgeError,
    )
    from tuneforge.errors import (
        UnknownNameError as UnknownNameError,
    )
    from tuneforge.errors import (
        UnsafeFileError as UnsafeFileError,
    )
    from tuneforge.errors import (
        UsageError as UsageError,
    )
    from tuneforge.errors import (
        close_match as close_match,
    )
    from tuneforge.exporting.bundle import Servable as Servable
    from tuneforge.exporting.bundle import load_bundle as load_bundle
    from tuneforge.exporting.bundle import servable_of as servable_of
    from tuneforge.exporting.exporter import export as export
    from tuneforge.exporting.formats import ExportFormat as ExportFormat
    from tuneforge.exporting.formats import Forward as Forward
    from tuneforge.exporting.formats import answers_of as answers_of
    from tuneforge.exporting.formats import forward_of as forward_of
    from tuneforge.plugin.component import (
        Check as Check,
    )
    from tuneforge.plugin.component import (
        between as between,
    )
    from tuneforge.plugin.component import (
        component as component,
    )
    from tuneforge.plugin.component import (
        ge as ge,
    )
    from tuneforge.plugin.component import (
        gt as gt,
    )
    from tuneforge.plugin.component import (
        option as option,
    )
    from tuneforge.plugin.config import RunConfig as RunConfig
    from tuneforge.plugin.hookspecs import hookimpl as hookimpl
    from tuneforge.plugin.results import (
        Answer as Answer,
    )
    from tuneforge.plugin.results import (
        Brief as Brief,
    )
    from tuneforge.plugin.results import (
        GroupInfo as GroupInfo,
    )
    from tuneforge.plugin.results import (
        Readings as Readings,
    )
    from tuneforge.plugin.results import (
        Report as Report,
    )
    from tuneforge.plugin.steps import (
        Blend as Blend,
    )
    from tuneforge.plugin.steps import (
        Fit as Fit,
    )
    from tuneforge.plugin.steps import (
        Phase as Phase,
    )
    from tuneforge.plugin.steps import (
        Probe as Probe,
    )
    from tuneforge.plugin.steps import (
        Step as Step,
    )
    from tuneforge.plugin.steps import (
        Steps as Steps,
    )
    from tuneforge.plugin.steps import (
        Use as Use,
    )
    from tuneforge.plugin.steps import (
        use as use,
    )
    from tuneforge.report.report import write_page as write_page
    from tuneforge.sandbox import Limited as Limited
    from tuneforge.sandbox import LimitError as LimitError
    from tuneforge.ship.champion.gate import Rules as Rules
    from tuneforge.ship.champion.gate import judge as judge
    from tuneforge.ship.champion.promote import promote as promote
    from tuneforge.ship.champion.store import Store as Store
    from tuneforge.ship.serve import serve as serve

_HOMES = {
    "tuneforge.errors": (
        "TuneforgeError",
        "UsageError",
        "UnknownNameError",
        "OptionError",
        "SelectorError",
        "StoppedError",
        "PluginError",
        "PluginLoadError",
        "DataError",
        "MissingDependencyError",
        "HaltError",
        "FolderError",
        "TryAgainError",
        "UnsafeFileError",
        "close_match",
    ),
    "tuneforge.sandbox": ("LimitError", "Limited"),
    "tuneforge.plugin.component": (
        "component",
        "option",
        "Check",
        "gt",
        "ge",
        "between",
    ),
    "tuneforge.plugin.hookspecs": ("hookimpl",),
    "tuneforge.plugin.steps": ("Phase", "Fit", "Probe", "Blend", "Step", "Steps", "Use", "use"),
    "tuneforge.plugin.results": ("Report", "Readings", "Brief", "GroupInfo", "Answer"),
    "tuneforge.plugin.config": ("RunConfig",),
    "tuneforge.engine.data.dataset": (
        "Batch",
        "Data",
        "Inputs",
        "Source",
        "Split",
        "Targets",
        "Inputable",
        "map_inputs",
    ),
    "tuneforge.engine.data.sampler": ("Noise",),
    "tuneforge.engine.loop.metric_set": ("Metrics",),
    "tuneforge.engine.model.model": (
        "Group",
        "Model",
    ),
    "tuneforge.engine.context.run": ("Run",),
    "tuneforge.engine.session.engine": (
        "Engine",
        "Result",
    ),
    "tuneforge.engine.storage.safetensors_io": (
        "load_tensors",
        "save_tensors",
    ),
    "tuneforge.engine.session.predictor": (
        "Tuned",
        "evaluate",
        "load",
        "predict",
        "with_data",
    ),
    "tuneforge.comparison.lr_range_test": ("lr_find",),
    "tuneforge.report.report": ("write_page",),
    "tuneforge.comparison.study": ("compare",),
    "tuneforge.builtin.datasets.tables.arrays": ("data_of",),
    "tuneforge.exporting.bundle": (
        "Servable",
        "load_bundle",
        "servable_of",
    ),
    "tuneforge.exporting.exporter": ("export",),
    "tuneforge.ship.champion.gate": (
        "Rules",
        "judge",
    ),
    "tuneforge.ship.champion.promote": ("promote",),
    "tuneforge.ship.serve": ("serve",),
    "tuneforge.ship.champion.store": ("Store",),
    "tuneforge.exporting.formats": (
        "ExportFormat",
        "Forward",
        "answers_of",
        "forward_of",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tuneforge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
