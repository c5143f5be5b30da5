"""Layer groups of a transformer: embeddings, each layer of the encoder, head."""

from __future__ import annotations

from torch import nn

from tuneforge import LayerGroup
from tuneforge_transformers.networks import get_base_prefix


def find_layer_groups(module: nn.Module, head: str) -> tuple[LayerGroup, ...]:
    """Return the groups `embeddings`, `layer1`, `layer2`, ... and `head`; each parameter is in one of them.

    A layer is a member of an outermost `nn.ModuleList` with parameters. Parameters before the first layer belong to
    `embeddings`, and those between two layers to the layer before them. A pooler or a last norm, which comes after all
    layers, belongs to `head`, because many published weights lack it.

    Args:
        module: The network.
        head: Path of the last linear layer.
    """
    layers = _find_layer_paths(module)
    group_names = {path: f"layer{number}" for number, path in enumerate(layers, start=1)}
    members: dict[str, list[str]] = {"embeddings": [], **{name: [] for name in group_names.values()}, "head": []}
    names = [name for name, _ in module.named_parameters()]
    last = max((index for index, name in enumerate(names) if _find_containing_layer(name, layers)), default=-1)
    current = "embeddings"
    for index, name in enumerate(names):
        layer = _find_containing_layer(name, layers)
        if layer:
            current = group_names[layer]
            members[current] = [*members[current], layer] if layer not in members[current] else members[current]
            continue
        is_head = index > last >= 0 or name.startswith(f"{head}.") or not name.startswith(f"{get_base_prefix(module)}.")
        members["head" if is_head else current].append(_find_owner(module, name))
    return tuple(LayerGroup(name, dict.fromkeys(paths)) for name, paths in members.items() if paths)


def _find_layer_paths(module: nn.Module) -> list[str]:
    """Return the paths of the members of the outermost module lists with parameters."""
    lists = [
        path
        for path, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and next(child.parameters(), None) is not None
    ]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    return [f"{path}.{name}" for path in outermost for name, _ in module.get_submodule(path).named_children()]


def _find_containing_layer(name: str, layers: list[str]) -> str:
    return next((path for path in layers if name.startswith(f"{path}.")), "")


def _find_owner(module: nn.Module, name: str) -> str:
    """Return the path of the parameter's module if that has no children, else the name of the parameter."""
    path = name.rpartition(".")[0]
    return path if not list(module.get_submodule(path).children()) else name
