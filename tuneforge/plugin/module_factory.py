"""A function that builds a module, or the class of one, as a component: its parameters become options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tuneforge.plugin.declaration import API_VERSION, component, get_options, option
from tuneforge.plugin.hookspecs import hookimpl
from tuneforge.plugin.serialization import to_plain_data

_OPTION_TYPES = (int, float, bool, str, Path)


def component_of_factory(factory: Callable[..., Any]) -> type:
    """Return a component class whose `model_adapt` calls a factory with the values of the options.

    Args:
        factory: A function that returns a module or a `Model`, or a class of modules. A parameter without a default is
            a required option.
    """
    namespace: dict[str, Any] = {"__module__": factory.__module__, "__qualname__": factory.__qualname__}
    namespace |= {"__doc__": inspect.getdoc(factory) or f"The module that {factory.__qualname__} builds."}
    annotations: dict[str, Any] = {}
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and _is_plain(parameter.default):
            given = {} if parameter.default is parameter.empty else {"default": parameter.default}
            annotations[parameter.name] = _option_type(factory, parameter)
            namespace[parameter.name] = option(
                **given, help=f"The argument {parameter.name} of {factory.__qualname__}."
            )

    def model_adapt(self: Any, run: Any) -> Any:
        return run.as_model(factory(**{name: getattr(self, name) for name in get_options(type(self))}))

    namespace |= {"__annotations__": annotations, "model_adapt": hookimpl(model_adapt)}
    return component(api=API_VERSION)(type(factory.__name__, (), namespace))


def is_module_factory(value: Any) -> bool:
    """Return True for a function, and for a class of modules; not for a component or an instance."""
    is_component = hasattr(value, "__tuneforge_api__")
    return not is_component and (inspect.isfunction(value) or (inspect.isclass(value) and hasattr(value, "forward")))


def _is_plain(default: Any) -> bool:
    """Return True if a configuration can hold the value; other parameters keep their default."""
    try:
        return (
            default is inspect.Parameter.empty
            or to_plain_data(default) is default
            or isinstance(default, (list, tuple))
        )
    except TypeError:
        return False


def _option_type(factory: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the annotation of a parameter, the type of its default, or Any where text cannot give its value."""
    try:
        hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError):
        hints = {}
    kind = hints.get(parameter.name, type(parameter.default))
    return kind if kind in _OPTION_TYPES or typing.get_origin(kind) is Literal else Any
