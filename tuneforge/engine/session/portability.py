"""What another process needs of a run that was given Python objects: kept if possible, else said at the start.

A model that names and options cannot rebuild is kept as a graph (`engine/model/module_graph.py`) in `graph.json`, with
constants in `graph.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import map_inputs
from tuneforge.engine.model.graph_codec import NotPortableError
from tuneforge.engine.model.model import LayerGroup, Model
from tuneforge.engine.model.module_graph import ModuleGraph
from tuneforge.engine.session.components import KEY_BY_HOOK, is_object
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.engine.storage.run_files import GRAPH, GRAPH_CONSTANTS, MODEL, WEIGHTS, read_json
from tuneforge.engine.storage.safetensors_io import load_tensors, save_tensors
from tuneforge.errors import FolderError
from tuneforge.plugin.hooks import RegisteredComponent, find_hook_methods

_KEYWORDS = {"metrics": "metrics=[...]", "callback": "callbacks=[...]", "adapt": "adapt=[...]"}


@attrs.define(eq=False)
class Portability:
    """Whether a run can be used where its Python objects are not.

    Args:
        run: A run with data and model.
        local: The components that another process cannot build, by configuration key.
        graph: The graph of the model, if it has to be kept and can be.
        reason: Why it cannot, in a clause; "" if it can, or if it need not be kept.
    """

    run: Run
    local: dict[str, list[RegisteredComponent]]
    graph: ModuleGraph | None = None
    reason: str = ""

    @classmethod
    def of_run(cls, run: Run, members: Iterable[tuple[str, RegisteredComponent]]) -> Portability:
        """Find what another process could not build, and trace the model if that concerns it.

        Args:
            run: A run with data and model, before training.
            members: The components with the hooks that they were chosen for.
        """
        local: dict[str, list[RegisteredComponent]] = {}
        for hook, member in members:
            if _is_local(member):
                local.setdefault(KEY_BY_HOOK.get(hook, hook), []).append(member)
        found = cls(run, local)
        if any(_adapts_model(member) for group in local.values() for member in group):
            found.trace()
        return found

    def trace(self) -> None:
        """Trace the model, or record why that is impossible."""
        self.graph, self.reason = None, ""
        try:
            if self.run.sharded:
                raise NotPortableError("its weights are sharded")
            self.graph = ModuleGraph.trace(self.run.model.module, self.run.example)
        except NotPortableError as error:
            self.reason = str(error)

    def format_notes(self) -> Iterator[str]:
        """Yield what has to be known before training about the use of the run elsewhere."""
        if self.reason:
            yield (
                f"note: the model is not kept in the run directory, because {self.reason}; so predict, evaluate, "
                "export and serve need the object again: load(path, model=module). A function that builds it can be "
                'named instead, as model="module:factory"'
            )
        for kind, contract in (("inputs", self.run.data.inputs), ("targets", self.run.data.targets)):
            if _is_local_class(type(contract)):
                yield (
                    f"note: the {kind} are of class {type(contract).__qualname__} of the program itself, so no other "
                    "process can predict with this run; move the class into a module that can be imported"
                )
        if self.local:
            keywords = ", ".join(_KEYWORDS.get(key, f"{key}=...") for key in self.local)
            again = [f"Engine.resume(path, {keywords})"]
            again += ["evaluate(path, data=...) and export(path, data=...)"] if "data" in self.local else []
            again += ["evaluate(path, metrics=[...])"] if "metrics" in self.local else []
            yield (
                f"note: Python objects ({', '.join(self.local)}) are not kept in the run directory, so these need them "
                f"again: {', '.join(again)}"
            )

    def write(self, run_dir: RunDir) -> None:
        """Write the graph of the trained model, after a check that it still computes what the model computes."""
        graph = self.graph
        if graph is None or not run_dir.writable:
            return
        model, example = self.run.model, self.run.example
        batches = [example, map_inputs(example, lambda tensor: torch.cat([tensor[:1], tensor]))]
        try:
            graph.check(model.module, batches)
        except NotPortableError:  # an attribute has changed in training
            self.trace()
            graph = self.graph
        if graph is None:
            self.run.log(f"warning: the model is not kept in the run directory, because {self.reason}")
            return
        record = {
            "head": model.head,
            "labels": list(model.labels),
            "groups": [[group.name, list(group.prefixes)] for group in model.groups],
            "graph": graph.to_record(),
        }
        save_tensors(graph.constants, run_dir.path / GRAPH_CONSTANTS)
        run_dir.write_text(GRAPH, json.dumps(record))


def read_kept_model(run_dir: Path) -> Model | None:
    """Return the model that a run directory holds as a graph, with its weights; None if it holds none.

    Raises:
        FolderError: A file is missing or damaged, or the graph calls something that is not a function of tensors.
    """
    if not (run_dir / GRAPH).exists():
        return None
    record = read_json(run_dir / GRAPH, "graph", "head", "labels", "groups")
    constants, _ = load_tensors(run_dir / GRAPH_CONSTANTS)
    weights, _ = load_tensors(run_dir / WEIGHTS)
    try:
        module = ModuleGraph.from_record(record["graph"], constants).build(weights)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FolderError(
            f"cannot read '{GRAPH}'", where=str(run_dir), why=str(error), fix="restore the file, or train again"
        ) from None
    groups = [LayerGroup(name, prefixes) for name, prefixes in record["groups"]]
    return Model(module, groups=groups, head=record["head"], labels=record["labels"])


def missing_model_error(run_dir: Path) -> FolderError:
    """Return the error for a run whose model was an object that is not given again."""
    reason = read_json(run_dir / MODEL).get("not_kept") or "the run directory holds names and options, not objects"
    return FolderError(
        "the model of the run was a Python object, and is not kept in the run directory",
        where=str(run_dir),
        why=reason,
        fix='give it again, load(path, model=module), or train with a function by name, model="module:factory"',
    )


def _is_local(member: RegisteredComponent) -> bool:
    """Return True for what only this program has: an object, a class of a script, or data in memory."""
    in_memory: Any = getattr(member.component, "in_memory", False)
    return is_object(member.name) or member.name.startswith("__main__:") or in_memory is True


def _is_local_class(cls: type) -> bool:
    return cls.__module__ == "__main__" or "<locals>" in cls.__qualname__


def _adapts_model(member: RegisteredComponent) -> bool:
    return any(hook == "model_adapt" for _, hook, _ in find_hook_methods(type(member.component), member.label))
