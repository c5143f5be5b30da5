"""`safetensors`: the weights with what builds the model, for torch."""

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
"""What of a run folder builds the model again."""


@component(api=1)
class SafetensorsFormat(ExportFormat):
    """Weights as safetensors, and in JSON what builds the network; needs torch and tuneforge."""

    backend = "torch"
    float32 = False

    def write(self, predictor: Predictor, directory: Path) -> None:
        """Copy what the run left."""
        for name in COPIED_FILES:
            shutil.copyfile(predictor.run_dir / name, directory / name)

    def load(self, directory: Path, *, device_name: str) -> Forward:
        """Build the network and load the weights."""
        return make_forward(load(directory, device_name=device_name))
