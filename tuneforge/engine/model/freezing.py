"""Which parameters a selector matches, how they are frozen, and which mode each module has while a phase trains."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from tuneforge.engine.model.dataflow import find_trainable_inputs
from tuneforge.engine.model.model import NORMS, LayerGroup, Model
from tuneforge.engine.model.modes import Modes, get_modes, set_modes
from tuneforge.errors import SelectorError, suggest_name


def select(model: Model, selectors: Iterable[str]) -> list[str]:
    """Return the names of the parameters that any of the selectors matches, in the model's order.

    A tied parameter is matched under each of its names, so `"head"` matches a weight that the head shares with another
    layer.

    Args:
        model: Whose parameters.
        selectors: `"head"`, `"all"`, `"norms"`, `"biases"`, the name of a layer group, `"groups[i]"` or a slice of
            groups, the path of a module, a glob over parameter names, or `"re:..."`; a leading `!` excludes.

    Raises:
        SelectorError: A selector matches nothing; the message lists similar names.
    """
    listed, aliases = list(selectors), model.aliases()
    chosen: set[str] = set(model.parameters()) if listed and listed[0].startswith("!") else set()
    for selector in listed:
        names = [aliases[name] for name in _match_selector(model, selector.removeprefix("!"), list(aliases))]
        if not names:
            raise _no_match_error(model, selector)
        chosen = chosen - set(names) if selector.startswith("!") else chosen | set(names)
    chosen -= set(model.user_frozen)
    if not chosen:
        raise _no_match_error(model, " and ".join(listed))
    return [name for name in model.parameters() if name in chosen]


def freeze(model: Model, trainable: Iterable[str]) -> None:
    """Make exactly the parameters in `trainable` require a gradient, and drop the gradients of all."""
    wanted = set(trainable)
    for name, parameter in model.parameters().items():
        parameter.requires_grad_(name in wanted)
        parameter.grad = None


def compute_modes(model: Model, example: Any, *, batchnorm_stats: str) -> Modes:
    """Return the mode that each module has while the phase trains: (module, training).

    Where nothing is frozen, every module is in training mode. Otherwise a module is in eval mode if all its parameters
    are frozen, or if it has none and no trainable parameter lies before it in the dataflow, and a norm layer with a
    frozen parameter does not update its running statistics, unless `batchnorm_stats` is `"updating"`. In both cases a
    module that the model's own `train()` leaves in eval mode stays there.

    Args:
        model: The model, after `freeze`.
        example: Prepared inputs, with which the dataflow is observed; the model is left as it was.
        batchnorm_stats: The phase's setting, `"frozen"`, `"all-frozen"` or `"updating"`.
    """
    modules = list(model.module.modules())
    held_in_eval = _find_held_in_eval(model.module)
    if batchnorm_stats == "all-frozen":
        held_in_eval |= {each for each in modules if isinstance(each, nn.modules.batchnorm._NormBase)}
    if all(parameter.requires_grad for parameter in model.module.parameters()):
        return [(module, module not in held_in_eval) for module in modules]
    reached = find_trainable_inputs(model.module, example)
    parents = {child: parent for parent in modules for child in parent.children()}
    return [
        (module, module not in held_in_eval and _should_train(module, reached, parents, batchnorm_stats))
        for module in modules
    ]


def _find_held_in_eval(module: nn.Module) -> set[nn.Module]:
    """Return the modules that `module.train()` leaves in eval mode, because a class overrides it."""
    before = get_modes(module)
    try:
        module.train()
        return {child for child, training in get_modes(module) if not training}
    finally:
        set_modes(before)


def _match_selector(model: Model, selector: str, names: list[str]) -> list[str]:
    groups = _match_groups(model, selector)
    if groups is not None:
        return [name for name in names if any(group.contains(name) for group in groups)]
    if selector == "norms":
        inside = [path for path, module in model.module.named_modules() if isinstance(module, NORMS)]
        return [name for name in names if name.rpartition(".")[0] in inside]
    if selector == "biases":
        return [name for name in names if name.rpartition(".")[2] == "bias"]
    if selector.startswith("re:"):
        return [name for name in names if re.search(_compile_pattern(selector), name)]
    below = [name for name in names if name.startswith(selector + ".")]
    if below:
        return below
    return [name for name in names if fnmatch.fnmatchcase(name, selector)]


def _match_groups(model: Model, selector: str) -> list[LayerGroup] | None:
    """Return the layer groups that a selector names, or None if it is not a name or a slice of groups."""
    if selector == "all":
        return list(model.groups)
    if selector == "head":
        return [model.groups[-1]]
    sliced = re.fullmatch(r"groups\[(-?\d*)(:?)(-?\d*)\]", selector)
    if sliced and (sliced[1] or sliced[2]):
        start, stop = (int(part) if part else None for part in (sliced[1], sliced[3]))
        if not sliced[2]:
            start = start or 0
            stop = start + 1 or None
        return list(model.groups[start:stop])
    named = [group for group in model.groups if group.name == selector]
    return named or None


def _compile_pattern(selector: str) -> re.Pattern[str]:
    try:
        return re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise SelectorError(f"selector {selector!r} is not a regular expression", why=str(error)) from None


def _no_match_error(model: Model, selector: str) -> SelectorError:
    if selector.removeprefix("!") in ("norms", "biases"):
        what = "norm with parameters" if "norms" in selector else "bias"
        return SelectorError(
            f"selector '{selector}' matches no parameter",
            why=f"the model has no {what}",
            fix=f"train head, all, or a layer group: {', '.join(group.name for group in model.groups)}",
        )
    known = ["head", "all", "norms", "biases", *(group.name for group in model.groups), *model.parameters()]
    groups = ", ".join(group.name for group in model.groups)
    return SelectorError(
        f"selector {selector!r} matches no parameter",
        where=f"layer groups: {groups}",
        why="a phase that matches nothing would silently train nothing",
        fix=suggest_name(selector, known)
        if len(known) < 12 or _has_close_match(selector, known)
        else "use a group, a slice or a glob",
    )


def _has_close_match(selector: str, known: list[str]) -> bool:
    return suggest_name(selector, known).startswith("did you mean")


def _should_train(
    module: nn.Module, reached: dict[nn.Module, bool], parents: dict[nn.Module, nn.Module], batchnorm_stats: str
) -> bool:
    own = list(module.parameters(recurse=False))
    if isinstance(module, NORMS) and batchnorm_stats == "updating":
        return True
    if isinstance(module, NORMS) and own:
        return all(parameter.requires_grad for parameter in own)
    if any(True for _ in module.parameters()):
        return any(parameter.requires_grad for parameter in module.parameters())
    if module in reached:
        return reached[module]
    # The module did not run: it gets the mode of its parent.
    parent = parents.get(module, module)
    return any(parameter.requires_grad for parameter in parent.parameters())
