"""The plugin API: components, options, strategy steps, commands and the registry. It does not import torch.

Names are imported on first use; `__init__.pyi` lists them for type checkers.
"""

from tuneforge.lazy_names import lazy_names

_NAMES_OF_MODULE = {
    "tuneforge.errors": ("ExitCode",),
    "tuneforge.plugin.command_options": (
        "ComponentCommand",
        "build_config",
        "component_options",
        "flags_to_table",
        "run_options",
    ),
    "tuneforge.plugin.commands": (
        "CommandEntry",
        "installed_commands",
    ),
    "tuneforge.plugin.config": (
        "RunConfig",
        "parse_budget",
    ),
    "tuneforge.plugin.declaration": (
        "Check",
        "Option",
        "between",
        "build_component",
        "component",
        "ge",
        "get_option_values",
        "get_options",
        "gt",
        "option",
    ),
    "tuneforge.plugin.hookspecs": ("hookimpl",),
    "tuneforge.plugin.image_decoding": (
        "IMAGE_FORMATS",
        "MAX_IMAGE_BYTES",
        "MAX_IMAGE_PIXELS",
        "convert_to_upright",
    ),
    "tuneforge.plugin.image_scan": (
        "ImageScan",
        "scan_images",
    ),
    "tuneforge.plugin.parameter_types": (
        "FiniteFloatRange",
        "json_option",
    ),
    "tuneforge.plugin.registry": (
        "ComponentEntry",
        "find_component",
        "list_components",
        "load_component",
    ),
    "tuneforge.plugin.results": (
        "AnyStrategyStepResult",
        "Diagnostics",
        "LayerGroupInfo",
        "StrategyStepResult",
        "TaskInfo",
    ),
    "tuneforge.plugin.serialization": (
        "from_json",
        "to_json",
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
    "tuneforge.plugin.table_file": (
        "TableFile",
        "TableRow",
        "parse_json",
        "read_json_rows",
    ),
    "tuneforge.sandbox": (
        "LimitError",
        "Sandbox",
    ),
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES_OF_MODULE)
