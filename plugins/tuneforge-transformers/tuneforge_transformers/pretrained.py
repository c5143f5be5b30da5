"""Find the directory of a pretrained model, locally or on the hub, and read its configuration files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneforge import FolderError, TryAgainError, UnsafeFileError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG_FILES = ("*.json", "1_Pooling/config.json")
"""Files that describe the architecture."""

MODEL_FILES = (*CONFIG_FILES, "*.safetensors")
"""The same and the weights; never pickled ones."""

TOKENIZER_FILES = ("*.json", "vocab.txt", "merges.txt", "*.spm", "sentencepiece.bpe.model", "spiece.model")
"""Files that a tokenizer is loaded from."""


def resolve_model_directory(name: str, *, revision: str, files: Sequence[str], where: str) -> Path:
    """Return the local directory of a model, downloading it from the hub if `name` is not a directory.

    Args:
        name: A directory, or the name of a repository on the hub.
        revision: Branch, tag or commit of the repository.
        files: Patterns of the files that are needed.
        where: The flag that error messages name.

    Raises:
        UsageError: There is no such directory, and `name` is not a valid repository name.
        TryAgainError: The hub cannot be reached, or has no such repository.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"there is no folder '{name}'", where=where, fix="check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of several libraries
        raise TryAgainError(
            f"there is no folder '{name}', and no model of that name could be downloaded from the hub",
            where=where,
            why=str(error).partition("\n")[0],
            fix="check the name and the network, or give a local folder",
        ) from None


def read_config_text(folder: Path) -> str:
    """Return the content of config.json as one line of JSON.

    Raises:
        FolderError: There is none, or it is not JSON.
    """
    try:
        return json.dumps(json.loads((folder / "config.json").read_text(encoding="utf-8")), sort_keys=True)
    except (OSError, ValueError) as error:
        raise FolderError(
            f"'{folder}' is not the folder of a transformers model",
            where="config.json",
            why=str(error),
            fix="give a folder that save_pretrained wrote",
        ) from None


def parse_config(text: str) -> PreTrainedConfig:
    """Parse the result of `read_config_text`; code that the configuration refers to is never run.

    Raises:
        UsageError: transformers has no such architecture.
    """
    from transformers import CONFIG_MAPPING

    table = json.loads(text)
    kind = table.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UsageError(
            f"transformers has no architecture '{kind}'",
            where="config.json, model_type",
            why="models that need code of their own are not loaded",
            fix="use a model of transformers itself",
        )
    config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(table)
    return config


def uses_mean_pooling(folder: Path) -> bool:
    """Return True if a sentence-transformers model's configuration asks for the mean over the tokens."""
    try:
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(pooling.get("pooling_mode_mean_tokens") or pooling.get("pooling_mode") == "mean")


def require_safetensors(folder: Path) -> None:
    """Raise unless the directory contains safetensors weights.

    Raises:
        UnsafeFileError: The directory contains only pickled weights.
        FolderError: The directory contains no weights.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise UnsafeFileError(
            f"'{pickled[0]}' is not read",
            where=str(folder),
            why="pickled weights can run any code when they are opened",
            fix="use a revision with .safetensors, or convert them: tuneforge import",
        )
    raise FolderError(f"'{folder}' has no .safetensors weights", fix="give a folder that save_pretrained wrote")


def read_image_normalization(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return normalization mean and std of a vision model; None if preprocessor_config.json does not have them."""
    try:
        table: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if "image_mean" not in table or "image_std" not in table or table.get("do_normalize") is False:
        return None
    return tuple(table["image_mean"]), tuple(table["image_std"])


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Suppress the log messages and progress bars of transformers."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
