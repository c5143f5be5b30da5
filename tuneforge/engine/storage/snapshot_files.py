"""Snapshots of the weights on disk: each is written once and kept beside the checkpoints, which only refer to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.storage.atomic import size_and_sha256
from tuneforge.engine.storage.safetensors_io import load_tensors, save_tensors
from tuneforge.errors import FolderError

SNAPSHOTS_DIR = "snapshots"


@attrs.define(eq=False)
class SnapshotFiles:
    """Where the tensors of each snapshot are; one that several snapshots share is written with the first of them.

    Args:
        directory: Holds the files.
        num_files: Files that were written.
        files: Size and SHA-256 of each file that a snapshot needs.
        parts: For each snapshot, the names of its tensors by the file that holds them.
    """

    directory: Path
    num_files: int = 0
    files: dict[str, tuple[int, str]] = attrs.field(factory=dict)
    parts: dict[str, dict[str, list[str]]] = attrs.field(factory=dict)

    def add(self, snapshots: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Choose a file for each tensor that is not on disk yet, and forget snapshots that are not among these.

        Returns:
            The tensors to write, by file.
        """
        self.parts = {name: parts for name, parts in self.parts.items() if name in snapshots}
        to_write: dict[str, dict[str, Tensor]] = {}
        for name in [name for name in snapshots if name not in self.parts]:
            known = {
                id(snapshots[other][key]): file
                for other, parts in self.parts.items()
                for file, keys in parts.items()
                for key in keys
            }
            new_file = f"{self.num_files + 1:04d}.safetensors"
            parts: dict[str, list[str]] = {}
            for key, tensor in snapshots[name].items():
                parts.setdefault(known.get(id(tensor), new_file), []).append(key)
            if new_file in parts:
                to_write[new_file] = {key: snapshots[name][key] for key in parts[new_file]}
                self.num_files += 1
            self.parts[name] = parts
        return to_write

    def write(self, tensors_by_file: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write what `add` returned.

        Raises:
            TryAgainError: The disk is full.
        """
        for file, tensors in tensors_by_file.items():
            self.directory.mkdir(exist_ok=True)
            save_tensors(tensors, self.directory / file)
            self.files[file] = size_and_sha256(self.directory / file)
        needed = {file for parts in self.parts.values() for file in parts}
        self.files = {file: measured for file, measured in self.files.items() if file in needed}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold of this."""
        return {"num_files": self.num_files, "files": self.files, "parts": self.parts}

    def load(self, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """Return all snapshots; a tensor that several have in common is shared again.

        Raises:
            FolderError: A file is missing, or is not what was written.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        for file, measured in self.files.items():
            path = self.directory / file
            try:
                intact = size_and_sha256(path) == measured
            except OSError:
                intact = False
            if not intact:
                raise FolderError(
                    "a snapshot of the weights is damaged",
                    where=str(path),
                    why="it is missing, or not what was written",
                    fix="tuneforge resume uses a checkpoint that does not need it",
                )
            tensors[file] = {name: each.to(device) for name, each in load_tensors(path)[0].items()}
        return {
            name: {key: tensors[file][key] for file, keys in parts.items() for key in keys}
            for name, parts in self.parts.items()
        }
