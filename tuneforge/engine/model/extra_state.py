"""The extra state of modules: what their `get_extra_state` returns, beside parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tuneforge.errors import PluginError


def get_extra_states(module: nn.Module) -> dict[str, Any]:
    """Return the extra state of each module that defines `get_extra_state`, by module path."""
    return {
        path: child.get_extra_state()
        for path, child in module.named_modules()
        if type(child).get_extra_state is not nn.Module.get_extra_state
    }


def set_extra_states(module: nn.Module, states: Mapping[str, Any]) -> None:
    """Give each module the extra state that `get_extra_states` returned for it.

    Raises:
        PluginError: A module has no `set_extra_state`, or it raises an error.
    """
    for path, state in states.items():
        child = module.get_submodule(path)
        try:
            child.set_extra_state(state)
        except Exception as error:
            raise PluginError(
                f"set_extra_state of {type(child).__name__} '{path}' failed",
                why=f"{type(error).__name__}: {error}",
                fix="define get_extra_state and set_extra_state together; the second gets what the first returned",
            ) from error
