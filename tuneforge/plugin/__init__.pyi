"""Public names for type checkers; `__init__.py` imports them when first used."""

from tuneforge.errors import ExitCode as ExitCode
from tuneforge.plugin.command_options import ComponentCommand as ComponentCommand
from tuneforge.plugin.command_options import build_config as build_config
from tuneforge.plugin.command_options import component_options as component_options
from tuneforge.plugin.command_options import flags_to_table as flags_to_table
from tuneforge.plugin.command_options import run_options as run_options
from tuneforge.plugin.commands import CommandEntry as CommandEntry
from tuneforge.plugin.commands import installed_commands as installed_commands
from tuneforge.plugin.config import RunConfig as RunConfig
from tuneforge.plugin.config import parse_budget as parse_budget
from tuneforge.plugin.declaration import Check as Check
from tuneforge.plugin.declaration import Option as Option
from tuneforge.plugin.declaration import between as between
from tuneforge.plugin.declaration import build_component as build_component
from tuneforge.plugin.declaration import component as component
from tuneforge.plugin.declaration import ge as ge
from tuneforge.plugin.declaration import get_option_values as get_option_values
from tuneforge.plugin.declaration import get_options as get_options
from tuneforge.plugin.declaration import gt as gt
from tuneforge.plugin.declaration import option as option
from tuneforge.plugin.hookspecs import hookimpl as hookimpl
from tuneforge.plugin.parameter_types import FiniteFloatRange as FiniteFloatRange
from tuneforge.plugin.parameter_types import json_option as json_option
from tuneforge.plugin.registry import ComponentEntry as ComponentEntry
from tuneforge.plugin.registry import find_component as find_component
from tuneforge.plugin.registry import list_components as list_components
from tuneforge.plugin.registry import load_component as load_component
from tuneforge.plugin.results import AnyStrategyStepResult as AnyStrategyStepResult
from tuneforge.plugin.results import Diagnostics as Diagnostics
from tuneforge.plugin.results import LayerGroupInfo as LayerGroupInfo
from tuneforge.plugin.results import StrategyStepResult as StrategyStepResult
from tuneforge.plugin.results import TaskInfo as TaskInfo
from tuneforge.plugin.serialization import from_json as from_json
from tuneforge.plugin.serialization import to_json as to_json
from tuneforge.plugin.steps import ComponentSpec as ComponentSpec
from tuneforge.plugin.steps import Diagnosis as Diagnosis
from tuneforge.plugin.steps import HeadFit as HeadFit
from tuneforge.plugin.steps import Phase as Phase
from tuneforge.plugin.steps import StrategyStep as StrategyStep
from tuneforge.plugin.steps import StrategySteps as StrategySteps
from tuneforge.plugin.steps import WeightAverage as WeightAverage
from tuneforge.plugin.steps import use as use
from tuneforge.sandbox import LimitError as LimitError
from tuneforge.sandbox import Sandbox as Sandbox

__all__: list[str]
