"""Write the images of the test split as files, for programs that do not use tuneforge."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Split, Targets
from tuneforge.engine.data.loader import fetch_batches, iter_sequential
from tuneforge.errors import DataError, FolderError


def write_images(split: Split, targets: Targets, directory: Path) -> int:
    """Write every image of a split as `CLASS/NUMBER.png`, lossless, and return their number.

    Names of classes are written as in a URL, so that any name can be a folder's.

    Raises:
        DataError: The samples are not 8-bit images with one class each.
        FolderError: There is something in the folder already.
    """
    from PIL import Image

    if directory.exists() and any(directory.iterdir()):
        raise FolderError(f"'{directory}' is not empty", where="--images", fix="name another directory")
    for rows, stored in fetch_batches(split, iter_sequential(len(split), 256), workers=0):
        if not isinstance(stored, Tensor) or stored.dtype != torch.uint8 or stored.shape[1:2] not in ((1,), (3,)):
            raise DataError("the inputs are not images", where="--images", fix="omit the flag")
        for row, image in zip(rows.tolist(), stored, strict=True):
            path = directory / quote(targets.describe_label(split.targets[row]), safe=" ") / f"{row:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).squeeze(2).numpy())).save(path)
    return len(split)
