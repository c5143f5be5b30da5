"""Images that can no longer be read during training, and the samples that replace them. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuneforge import Run

REPLACEMENTS_FILE = "replacements.jsonl"
"""In a run directory: one JSON object for each image that was replaced by another."""


class ReplacementCount:
    """The metric `replacements`: the number of images of a split that were replaced; omitted where it is 0."""

    def __init__(self, run: Run) -> None:
        self._run, self._split = run, run.eval_split

    def update(self, outputs: Any, targets: Any) -> None:
        """Do nothing: images are replaced when they are read, before the forward pass."""

    def compute(self) -> dict[str, int]:
        """Return the metric, or nothing where no image of the split was replaced."""
        count = sum(line["split"] == self._split for line in _read_run_replacements(self._run))
        return {"replacements": count} if count else {}


def replacements_path(run: Run) -> Path | None:
    """Return the path of the run's `replacements.jsonl`, or None where the run writes no files."""
    return None if run.run_dir is None else run.run_dir / REPLACEMENTS_FILE


def read_replacements(path: Path) -> list[dict[str, str]]:
    """Return the entries that `ReplacingImageSource` wrote, in order, each image once."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({(line["split"], line["id"]): line for line in reversed(lines)}.values())[::-1]


def log_new_replacements(run: Run, state: dict[str, Any]) -> None:
    """Log the replacements since the last call; `state` counts those that have been logged."""
    lines = _read_run_replacements(run)
    for line in lines[state.get("logged", 0) :]:
        run.log(
            f"note: {line['split']}: '{line['id']}' can no longer be read ({line['why']}); "
            f"{line['replacement']} replaces it"
        )
    state["logged"] = len(lines)


def _read_run_replacements(run: Run) -> list[dict[str, str]]:
    path = replacements_path(run)
    return [] if path is None else read_replacements(path)
