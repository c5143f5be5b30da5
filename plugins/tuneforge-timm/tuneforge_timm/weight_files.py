"""Find pretrained weights on this machine or on the hub, and read them without executing anything in them."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import attrs
import torch
from timm.models import PretrainedCfg
from torch import Tensor

from tuneforge import TryAgainError, UnsafeFileError, UsageError
from tuneforge.convert import convert_weights
from tuneforge.exporting import load_tensors
from tuneforge_timm.packaged_weights import PackagedWeights, find_packaged_weights

_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
_HUB_FILE = "model.safetensors"


@attrs.frozen
class LocalWeights:
    """A file of weights on this machine.

    Args:
        path: The file.
        source: Where it comes from, as one phrase for the log.
        package: The package that offers it; None otherwise.
    """

    path: Path
    source: str
    package: PackagedWeights | None = None

    def read(self) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
        """Return the weights by the names that timm has for them, and the names of their classes if the file has them.

        A file of torch.save is converted in a sandbox first.

        Raises:
            FolderError: The file is missing.
            UnsafeFileError: It asks for code to be run, or is not the file that was published.
            DataError: It is corrupt or holds no weights.
        """
        if self.package is not None:
            self.package.verify(self.path)
        if self.path.suffix == ".safetensors":
            tensors, metadata = load_tensors(self.path)
        else:
            with tempfile.TemporaryDirectory() as folder:
                converted = convert_weights(self.path, Path(folder) / _HUB_FILE)
                tensors, metadata = load_tensors(converted.path)
        if self.package is not None and self.package.rename is not None:
            tensors = self.package.rename(tensors)
        return tensors, tuple(metadata.get("labels", ()))


def find_local_weights(config: PretrainedCfg) -> LocalWeights | None:
    """Return the file of pretrained weights, if it is on this machine: in a cache, or in an installed package.

    Args:
        config: timm's configuration of the weights.
    """
    return _find_in_hub_cache(config) or _find_checkpoint(config) or _find_in_package(config)


def find_or_download_weights(config: PretrainedCfg, *, where: str) -> LocalWeights:
    """Return the file of pretrained weights, from this machine or else from the hub.

    Args:
        config: timm's configuration of the weights.
        where: The flag that error messages name.

    Raises:
        UsageError: timm has no weights of this architecture.
        TryAgainError: They are not on this machine and cannot be downloaded.
    """
    local = find_local_weights(config)
    if local is not None:
        return local
    if not config.hf_hub_id and not config.url:
        raise UsageError(
            f"timm has no pretrained weights of {config.architecture}",
            where=where,
            fix="give a file with --model.weights FILE.safetensors, or train from random weights: --model.weights none",
        )
    if not config.hf_hub_id:
        raise _missing_error(config, f"timm names {config.url}, which is not a safetensors file", where)
    return _download(config, where=where)


def open_weights_file(path: Path, *, where: str) -> LocalWeights:
    """Return a file that the user gave.

    Raises:
        UnsafeFileError: It is a pickle by its name.
    """
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise UnsafeFileError(
            f"'{path.name}' is a pickle file",
            where=where,
            why="unpickling weights can run arbitrary code",
            fix=f"convert it once: tuneforge import {shlex.quote(str(path))}",
        )
    return LocalWeights(path, f"the file {path}")


def name_of(config: PretrainedCfg) -> str:
    """Return the name of weights in timm, such as `resnet18.a1_in1k`."""
    return f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)


def _find_in_hub_cache(config: PretrainedCfg) -> LocalWeights | None:
    from huggingface_hub import try_to_load_from_cache

    if not config.hf_hub_id:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    found = try_to_load_from_cache(repository, _HUB_FILE, revision=revision or None)
    return LocalWeights(Path(found), "the hub's cache") if isinstance(found, str) else None


def _find_checkpoint(config: PretrainedCfg) -> LocalWeights | None:
    """Return a file in torch's folder of checkpoints: `ARCH.TAG.safetensors`, or the .pth file of timm's address."""
    names = [f"{name_of(config)}.safetensors"]
    if isinstance(config.url, str) and config.url and not config.custom_load:
        names.append(Path(urlparse(config.url).path).name)
    paths = [_checkpoint_folder() / name for name in names]
    return next((LocalWeights(path, str(path)) for path in paths if path.is_file()), None)


def _find_in_package(config: PretrainedCfg) -> LocalWeights | None:
    package = find_packaged_weights(str(config.architecture), config.tag or "")
    return None if package is None else LocalWeights(package.path, f"the package {package.distribution}", package)


def _download(config: PretrainedCfg, *, where: str) -> LocalWeights:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    repository, _, revision = str(config.hf_hub_id).partition("@")
    try:
        # Without a network this fails at once, and the download would retry for 23 seconds.
        get_hf_file_metadata(hf_hub_url(repository, _HUB_FILE, revision=revision or None))
        path = hf_hub_download(repository, _HUB_FILE, revision=revision or None)
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of several libraries
        raise _missing_error(config, str(error).partition("\n")[0], where) from None
    return LocalWeights(Path(path), f"huggingface.co/{repository}")


def _missing_error(config: PretrainedCfg, why: str, where: str) -> TryAgainError:
    target = _checkpoint_folder() / f"{name_of(config)}.safetensors"
    if config.hf_hub_id:
        source = f"{_HUB_FILE} of huggingface.co/{config.hf_hub_id} to {target}"
        get = f"hf download {config.hf_hub_id} {_HUB_FILE}"
    else:
        source = f"the file to {target}"
        get = f"tuneforge import {Path(urlparse(str(config.url)).path).name}"
    return TryAgainError(
        f"the weights {name_of(config)} are not on this machine and cannot be downloaded",
        where=where,
        why=why,
        fix=f"copy {source} (where there is a network: {get}), or name a file with --model.weights "
        "FILE.safetensors; a .pth file is converted by: tuneforge import FILE.pth",
    )


def _checkpoint_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"
