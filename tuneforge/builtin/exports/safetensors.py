"""`safetensors`: the weights with what builds the model, for torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tuneforge import ExportFormat, component, forward_of, load

if TYPE_CHECKING:
    from tuneforge import Forward, Tuned

FILES = ("run.json", "status.json", "model.json", "model.safetensors")
"""What of a run folder builds the model again."""


@component(api=1)
class Safetensors(ExportFormat):
    """Weights as safetensors, and in JSON what builds the network; needs torch and tuneforge."""

    backend = "torch"
    float32 = False

    def write(self, tuned: Tuned, folder: Path) -> None:
        """Copy what the run left."""
        for name in FILES:
            shutil.copyfile(tuned.path / name, folder / name)

    def opened(self, folder: Path, *, device_name: str) -> Forward:
        """Build the network and load the weights."""
        return forward_of(load(folder, device_name=device_name))
