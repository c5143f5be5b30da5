"""Pretrained weights of torchvision by name: where they are on this machine, and what images they expect."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import attrs
import torch
from torch import Tensor
from torchvision import models

from tuneforge import TryAgainError, UnknownNameError, UnsafeFileError
from tuneforge.convert import convert_weights
from tuneforge.errors import suggest_name
from tuneforge.exporting import load_tensors
from tuneforge.plugin import ImagePreprocessing

_WHERE = "--model.weights"
_DEFAULT_NAMES = ("default", "download")
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".pth.tar")


@attrs.frozen
class PretrainedWeights:
    """A file of weights.

    Args:
        path: The file.
        source: Where it comes from, as one phrase for the log.
        published: The weights of torchvision that it holds, or is taken for.
        is_assumed: True for a file that does not say which weights it holds.
    """

    path: Path
    source: str
    published: Any
    is_assumed: bool = False

    @property
    def name(self) -> str:
        """The name for messages, such as `ResNet18_Weights.IMAGENET1K_V1`."""
        return f"{self.path.name} (taken for {self.published})" if self.is_assumed else str(self.published)

    def read(self) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
        """Return the tensors by name, and the names of their classes if known; a .pth file is read in a sandbox.

        Raises:
            FolderError: The file is missing.
            UnsafeFileError: It asks for code to be run.
            DataError: It is corrupt or holds no weights.
        """
        if self.path.suffix == ".safetensors":
            tensors, metadata = load_tensors(self.path)
        else:
            with tempfile.TemporaryDirectory() as folder:
                converted = convert_weights(self.path, Path(folder) / "model.safetensors")
                tensors, metadata = load_tensors(converted.path)
        return tensors, tuple(metadata.get("labels") or (() if self.is_assumed else self.published.meta["categories"]))

    def describe_preprocessing(self) -> ImagePreprocessing:
        """Return the evaluation transform of torchvision for these weights."""
        transform = self.published.transforms()
        (size,), (resize,) = transform.crop_size, transform.resize_size
        return ImagePreprocessing(
            name=self.name,
            size=(size, size),
            resize=resize,
            interpolation=transform.interpolation.value,
            mean=tuple(transform.mean),
            std=tuple(transform.std),
        )


def find_weights(arch: str, weights: str) -> PretrainedWeights | None:
    """Return the file of weights, if it is on this machine; None if it would have to be downloaded.

    Args:
        arch: The architecture.
        weights: `DEFAULT`, a name that torchvision gives to weights of the architecture, or a file.

    Raises:
        UnknownNameError: It is neither.
        UnsafeFileError: The file is a pickle by its name.
    """
    if is_file(weights):
        path = Path(weights)
        if path.name.lower().endswith(_PICKLE_SUFFIXES):
            raise UnsafeFileError(
                f"'{path.name}' is a pickle file",
                where=_WHERE,
                why="unpickling weights can run arbitrary code",
                fix=f"convert it once: tuneforge import {shlex.quote(str(path))}",
            )
        return _identify(arch, path)
    published = _find_published(arch, weights)
    for path in _checkpoint_paths(published):
        if path.is_file():
            return PretrainedWeights(path, str(path), published)
    return None


def download_weights(arch: str, weights: str) -> PretrainedWeights:
    """Download weights into torch's folder of checkpoints, where torchvision looks for them too.

    Raises:
        UnknownNameError: torchvision has no weights of this name.
        TryAgainError: They cannot be downloaded.
    """
    published = _find_published(arch, weights)
    path = _checkpoint_paths(published)[-1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(published.url, str(path), hash_prefix=digest, progress=False)
    except (URLError, OSError, RuntimeError) as error:
        raise TryAgainError(
            f"the weights {published} are not on this machine and cannot be downloaded",
            where=f"{_WHERE} {weights}",
            why=str(error),
            fix=f"copy {published.url} to {path.parent}, or convert it where there is a network (tuneforge import "
            f"{path.name}) and give the result: --model.weights FILE.safetensors; or train from random weights: "
            "--model.weights none",
        ) from error
    return PretrainedWeights(path, published.url, published)


def is_file(weights: str) -> bool:
    """Return True if the option names a file rather than weights of torchvision."""
    path = Path(weights)
    return "/" in weights or path.is_file() or path.name.lower().endswith((".safetensors", *_PICKLE_SUFFIXES))


def _find_published(arch: str, weights: str) -> Any:
    """Return torchvision's description of weights by name; their class may be written in front, as torchvision does."""
    known = models.get_model_weights(arch)
    if weights.lower() in _DEFAULT_NAMES:
        return known.DEFAULT
    owner, _, name = weights.rpartition(".")
    if name in known.__members__ and owner in ("", known.__name__):
        return known[name]
    names = [*known.__members__, "DEFAULT", "none"]
    raise UnknownNameError(
        f"torchvision has no weights '{weights}' of {arch}",
        where=_WHERE,
        why=f"there are {', '.join(names[:-2])}; and it is no file",
        fix=suggest_name(weights, names),
    )


def _checkpoint_paths(published: Any) -> list[Path]:
    """Return the files in which weights are looked for: one converted by `tuneforge import`, then torch's own."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(published.url).path).name
    return [path.with_suffix(".safetensors"), path]


def _identify(arch: str, path: Path) -> PretrainedWeights:
    """Return a file of the user with the weights that it holds: by its name, or by the classes that it names.

    One that does not say is taken for the default weights, so that its images are prepared as for these.

    Raises:
        FolderError: There is no such file.
    """
    known = list(_default_first(models.get_model_weights(arch)))
    source = f"the file {path}"
    for each in known:
        if path.stem == Path(urlparse(each.url).path).stem:
            return PretrainedWeights(path, source, each)
    labels = tuple(load_tensors(path)[1].get("labels") or ())
    for each in known:
        if labels and tuple(each.meta["categories"]) == labels:
            return PretrainedWeights(path, source, each)
    return PretrainedWeights(path, source, known[0], is_assumed=True)


def _default_first(known: Any) -> Iterator[Any]:
    yield known.DEFAULT
    yield from (each for each in known if each is not known.DEFAULT)
