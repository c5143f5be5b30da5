"""Layer groups of a transformer: its embeddings, each layer of its encoder, and the head."""

from __future__ import annotations

from torch import nn

from tuneforge import LayerGroup
from tuneforge_transformers.networks import get_base_prefix


def find_layer_groups(module: nn.Module, head: str) -> tuple[LayerGroup, ...]:
    """`embeddings`, `layer1`, `layer2`, ... and `head`, each parameter in one of them.

    A layer is a member of a list of modules that holds parameters, and no such list lies around it. What comes before
    the first is `embeddings`; what comes between two belongs to the one before it; a pooler or a last norm, which
    comes after all of them, belongs to `head`, because many published weights lack it.

    Args:
        module: The network.
        head: Path of the layer that answers.
    """
    layers = _find_layer_paths(module)
    places = {path: f"layer{number}" for number, path in enumerate(layers, start=1)}
    members: dict[str, list[str]] = {"embeddings": [], **{name: [] for name in places.values()}, "head": []}
    names = [name for name, _ in module.named_parameters()]
    last = max((place for place, name in enumerate(names) if _find_containing_layer(name, layers)), default=-1)
    present = "embeddings"
    for place, name in enumerate(names):
        inside = _find_containing_layer(name, layers)
        if inside:
            present = places[inside]
            members[present] = [*members[present], inside] if inside not in members[present] else members[present]
            continue
        after = place > last >= 0 or name.startswith(f"{head}.") or not name.startswith(f"{get_base_prefix(module)}.")
        members["head" if after else present].append(_find_owner(module, name))
    return tuple(LayerGroup(name, dict.fromkeys(paths)) for name, paths in members.items() if paths)


def _find_layer_paths(module: nn.Module) -> list[str]:
    """Paths of the members of the outermost lists of modules that hold parameters."""
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
    """The module that holds a parameter, where it holds no other module; else the parameter itself."""
    path = name.rpartition(".")[0]
    return path if not list(module.get_submodule(path).children()) else name
