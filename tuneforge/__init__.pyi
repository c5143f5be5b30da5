"""Public names for type checkers; `__init__.py` imports them when first used."""

from tuneforge.comparison.lr_range_test import lr_find as lr_find
from tuneforge.comparison.study import compare as compare
from tuneforge.engine.context.run import Run as Run
from tuneforge.engine.data.dataset import Batch as Batch
from tuneforge.engine.data.dataset import Data as Data
from tuneforge.engine.data.dataset import Inputs as Inputs
from tuneforge.engine.data.dataset import Source as Source
from tuneforge.engine.data.dataset import Split as Split
from tuneforge.engine.data.dataset import Targets as Targets
from tuneforge.engine.data.dataset import TensorTree as TensorTree
from tuneforge.engine.data.dataset import map_inputs as map_inputs
from tuneforge.engine.data.sampler import SampleRNG as SampleRNG
from tuneforge.engine.loop.metric_set import Metrics as Metrics
from tuneforge.engine.model.model import LayerGroup as LayerGroup
from tuneforge.engine.model.model import Model as Model
from tuneforge.engine.session.engine import Engine as Engine
from tuneforge.engine.session.engine import Result as Result
from tuneforge.engine.session.predictor import Predictor as Predictor
from tuneforge.engine.session.predictor import evaluate as evaluate
from tuneforge.engine.session.predictor import load as load
from tuneforge.engine.session.predictor import predict as predict
from tuneforge.errors import DataError as DataError
from tuneforge.errors import FolderError as FolderError
from tuneforge.errors import HaltError as HaltError
from tuneforge.errors import MissingDependencyError as MissingDependencyError
from tuneforge.errors import OptionError as OptionError
from tuneforge.errors import PluginError as PluginError
from tuneforge.errors import PluginLoadError as PluginLoadError
from tuneforge.errors import SelectorError as SelectorError
from tuneforge.errors import StoppedError as StoppedError
from tuneforge.errors import TryAgainError as TryAgainError
from tuneforge.errors import TuneforgeError as TuneforgeError
from tuneforge.errors import UnknownNameError as UnknownNameError
from tuneforge.errors import UnsafeFileError as UnsafeFileError
from tuneforge.errors import UsageError as UsageError
from tuneforge.exporting.exporter import export as export
from tuneforge.plugin.declaration import between as between
from tuneforge.plugin.declaration import component as component
from tuneforge.plugin.declaration import ge as ge
from tuneforge.plugin.declaration import gt as gt
from tuneforge.plugin.declaration import option as option
from tuneforge.plugin.hookspecs import hookimpl as hookimpl
from tuneforge.plugin.results import StrategyStepResult as StrategyStepResult
from tuneforge.plugin.results import TaskInfo as TaskInfo
from tuneforge.plugin.steps import Diagnosis as Diagnosis
from tuneforge.plugin.steps import HeadFit as HeadFit
from tuneforge.plugin.steps import Phase as Phase
from tuneforge.plugin.steps import WeightAverage as WeightAverage
from tuneforge.plugin.steps import use as use

__all__: list[str]
__version__: str
