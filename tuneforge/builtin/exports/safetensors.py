"""`safetensors`: the weights, and the files of the run from which the model is built."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tuneforge import component, load
from tuneforge.exporting import ExportFormat, make_forward

if TYPE_CHECKING:
    from tuneforge import Predictor
    from tuneforge.exporting import Forward

COPIED_FILES = ("run.json", "status.json", "model.json", "model.safetensors")
"""Files of a run directory from which a model is built."""

GRAPH_FILES = ("graph.json", "graph.safetensors")
"""Further ones, where the model was given as a Python object."""


@component(api=1)
class SafetensorsFormat(ExportFormat):
    """Weights as safetensors, with JSON files that describe the network; needs torch and tuneforge."""

    backend = "torch"
    float32 = False

    def write(self, predictor: Predictor, directory: Path) -> None:
        """Copy the files of the run directory."""
        kept = [name for name in GRAPH_FILES if (predictor.run_dir / name).exists()]
        for name in (*COPIED_FILES, *kept):
            shutil.copyfile(predictor.run_dir / name, directory / name)

    def load(self, directory: Path, *, device_name: str) -> Forward:
        """Build the network and load its weights."""
        return make_forward(load(directory, device_name=device_name))
