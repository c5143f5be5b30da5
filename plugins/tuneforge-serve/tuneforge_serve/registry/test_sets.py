"""Test sets of new data, read from labeled files."""

from __future__ import annotations

from pathlib import Path

import torch

from tuneforge import Inputs, Split, Targets
from tuneforge.errors import DataError
from tuneforge.exporting import stack_inputs


def load_labeled_files(directory: Path, inputs: Inputs, targets: Targets) -> Split:
    """Load labeled files from one folder per class, stored as a model's inputs.

    Raises:
        DataError: There are no files, a file cannot be decoded, or a folder has the name of no class.
    """
    files = list_labeled_files(directory)
    stored = stack_inputs([inputs.decode(path) for path in files])
    labels = torch.tensor([targets.encode(path.parent.name) for path in files])
    return Split(stored, labels, ids=[str(path.relative_to(directory)) for path in files])


def list_labeled_files(directory: Path) -> list[Path]:
    """List the files of a directory with one folder per class.

    Raises:
        DataError: There are none.
    """
    files = [path for path in sorted(directory.glob("*/*")) if path.is_file() and not path.name.startswith(".")]
    if not files:
        raise DataError(
            f"'{directory}' contains no labeled files"
            if directory.is_dir()
            else f"there is no directory '{directory}'",
            where="--new-test-set",
            fix="pass a directory with one folder per class that contains files",
        )
    return files
