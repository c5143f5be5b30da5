"""`npz`: arrays in a file of numpy."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tuneforge import Data, DataError, component, hookimpl, option
from tuneforge.builtin.checks import FRACTION_OR_ZERO
from tuneforge.builtin.datasets.tables.arrays import data_from_arrays

if TYPE_CHECKING:
    from tuneforge import Run

_INPUT_NAMES = ("x", "x_train", "inputs", "images", "features", "data")
_TARGET_NAMES = ("y", "y_train", "targets", "target", "labels", "label")


@component(api=1)
class Npz:
    """Inputs and targets from an .npz file; arrays `x_val`, `y_val`, `x_test` and `y_test` are these splits, if there.

    Text, booleans and integers are classes, floats are numbers to predict. Arrays of Python objects are refused,
    because reading them would execute code.
    """

    path: Path = option(help="The file.")
    inputs: str | None = option(default=None, help="Name of the inputs (n, ...); default: x, images, features or data.")
    targets: str | None = option(default=None, help="Name of the targets (n,) or (n, k); default: y, target or labels.")
    val: float = option(default=0.2, help="Fraction of the samples for validation; 0 for none.", check=FRACTION_OR_ZERO)
    test: float = option(
        default=0.2, help="Fraction of the samples for the test split; 0 for none.", check=FRACTION_OR_ZERO
    )
    standardize: bool = option(default=False, help="Standardize each feature by mean and std of the training split.")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read the arrays, and split them.

        Raises:
            DataError: The file cannot be read, it is not clear which arrays are meant, or the arrays are unusable.
        """
        arrays = self._read()
        x = self._find(arrays, self.inputs, _INPUT_NAMES, "inputs")
        y = self._find(arrays, self.targets, _TARGET_NAMES, "targets")
        further: dict[str, Any] = {
            f"{axis}_{split}": arrays.get(f"{name.removesuffix('_train')}_{split}")
            for axis, name in (("x", x), ("y", y))
            for split in ("val", "test")
        }
        source = data_from_arrays(
            arrays[x], arrays[y], val=self.val, test=self.test, standardize=self.standardize, **further
        )
        data: Data = source.data_prepare(run)
        return data

    def _read(self) -> dict[str, Any]:
        try:
            with np.load(self.path, allow_pickle=False) as file:  # noqa: TID251 - allow_pickle=False
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
            raise DataError(
                f"'{self.path}' cannot be read as arrays",
                where="--data.path",
                why=str(error),
                fix="write it with numpy.savez(file, x=..., y=...), without arrays of Python objects",
            ) from None

    def _find(self, arrays: dict[str, Any], name: str | None, usual: Sequence[str], option_name: str) -> str:
        found = [each for each in arrays if each == name or (name is None and each.lower() in usual)]
        if len(found) == 1:
            return found[0]
        raise DataError(
            f"it is not clear which array of '{self.path}' has the {option_name}",
            where=f"--data.{option_name}",
            why=f"it has {', '.join(f'{each} {array.shape}' for each, array in arrays.items()) or 'none'}",
            fix=f"name it: --data.{option_name} NAME",
        )
