"""Layer groups of a network of timm, from the matcher that timm's own layer-wise learning rate decay uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import group_parameters
from torch import nn

from tuneforge import LayerGroup, Model


def find_layer_groups(module: nn.Module, head: str) -> tuple[LayerGroup, ...]:
    """Return the layer groups from input to output; the last one is `head`.

    They are those of `timm.optim.param_groups_layer_decay`, so that a decay of learning rates by layer group gives
    timm's rates. A class of timm without a matcher gets the groups that any module gets, from its structure.

    Args:
        module: The network, with a classifier.
        head: Path of its output layer.
    """
    numbers = _match_parameters(module)
    if not numbers:
        return tuple(Model.from_module(module, head=head).groups)
    last = max(numbers.values())
    for name in numbers:
        if name.startswith(f"{head}."):
            numbers[name] = last
    members = _members_by_path(numbers)
    paths: list[list[str]] = [[] for _ in range(last + 1)]
    for name, number in numbers.items():
        path = next(path for path in _ancestors(name) if members[path] == {number})
        if path not in paths[number]:
            paths[number].append(path)
    names = _name_groups(paths)
    return tuple(LayerGroup(name, prefixes) for name, prefixes in zip(names, paths, strict=True))


def _match_parameters(module: Any) -> dict[str, int]:
    """Return the number of the layer group of each parameter, from 0 at the input; empty without a matcher."""
    if not hasattr(module, "group_matcher"):
        return {}
    numbers: Mapping[str, int] = group_parameters(module, module.group_matcher(coarse=False), reverse=True)
    return {name: numbers[name] for name, _ in module.named_parameters()}


def _members_by_path(numbers: Mapping[str, int]) -> dict[str, set[int]]:
    """Return the numbers of the groups below each path of a module or parameter."""
    members: dict[str, set[int]] = {}
    for name, number in numbers.items():
        for path in _ancestors(name):
            members.setdefault(path, set()).add(number)
    return members


def _ancestors(name: str) -> list[str]:
    """Return the paths of the modules that contain a parameter, from the outermost, and its own."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _name_groups(paths: list[list[str]]) -> list[str]:
    """Return a name for each group: its first path, `stem` for the first group if it has several, `head` for the last.

    A first path is unique, because a path lies in one group only.
    """
    names = [group[0] for group in paths]
    if len(paths[0]) > 1 and "stem" not in names:
        names[0] = "stem"
    return [*("pre-head" if name == "head" else name for name in names[:-1]), "head"]
