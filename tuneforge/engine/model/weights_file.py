"""The weights file of a run: parameters, persistent buffers and the extra state of modules, as safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tuneforge.engine.model.extra_state import get_extra_states, set_extra_states
from tuneforge.engine.storage.checkpoint import pack, unpack
from tuneforge.engine.storage.safetensors_io import load_state_dict, load_tensors, save_tensors
from tuneforge.errors import PluginError
from tuneforge.plugin.serialization import from_json, to_json

_EXTRA_STATES = "extra_states"


def write_weights(path: Path, state: Mapping[str, Tensor], module: nn.Module, *, labels: Sequence[str]) -> None:
    """Write the weights of a module.

    Args:
        path: The file to write or replace.
        state: What `get_state_dict` returned for the module, gathered if it is sharded.
        module: The module, whose extra state is stored too.
        labels: The names of the outputs.

    Raises:
        PluginError: An extra state is neither plain data nor tensors.
        TryAgainError: The disk is full.
    """
    tensors, text = _pack_extra_states(module)
    save_tensors({**state, **tensors}, path, metadata={"labels": labels, **({_EXTRA_STATES: text} if text else {})})


def load_weights(path: Path, module: nn.Module) -> None:
    """Load what `write_weights` wrote into a module, in place.

    Raises:
        FolderError: The file is missing, or does not fit the module.
        UnsafeFileError: It is not a safetensors file.
        PluginError: A module does not take its extra state.
    """
    tensors, metadata = load_tensors(path)
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{_EXTRA_STATES}.")}
    load_state_dict(module, weights, where=str(path))
    if _EXTRA_STATES in metadata:
        own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name not in weights}
        set_extra_states(module, unpack(from_json(metadata[_EXTRA_STATES]), own))


def check_extra_states(module: nn.Module) -> None:
    """Check that the extra state of every module can be stored and loaded again.

    Raises:
        PluginError: It is neither plain data nor tensors, or the module has no `set_extra_state`.
    """
    _pack_extra_states(module)
    for path in get_extra_states(module):
        child = module.get_submodule(path)
        if type(child).set_extra_state is nn.Module.set_extra_state:
            raise PluginError(
                f"{type(child).__name__} '{path}' has get_extra_state and no set_extra_state",
                why="what is stored with the weights could not be loaded again",
                fix="define both",
            )


def _pack_extra_states(module: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of the extra states by name, and the rest as JSON; both empty if no module has one."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    packed: dict[str, Any] = {
        path: pack(state, tensors, names, f"the extra state of module '{path}'")
        for path, state in get_extra_states(module).items()
    }
    return {f"{_EXTRA_STATES}.{name}": tensor for name, tensor in tensors.items()}, to_json(packed) if packed else ""
