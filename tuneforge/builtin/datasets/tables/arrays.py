"""Data in memory: numpy arrays, tensors, mappings of them, a torch Dataset or a DataLoader.

`data_from_arrays(x, y)` returns a component for `Engine(data=...)`. The kind of the targets follows from their dtype:

=============================================  =================  =========================================
y                                              targets            note
=============================================  =================  =========================================
text, booleans, integers (n,)                  ClassTargets       class names are the values, or `names`
floats (n,) or (n, k)                          RegressionTargets  standardized with the training split
0 and 1 with several columns (n, k)            MultilabelTargets
=============================================  =================  =========================================

Shapes: n samples, b in a batch, f features.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tuneforge import (
    Data,
    DataError,
    Inputs,
    OptionError,
    Split,
    Targets,
    TensorTree,
    UsageError,
    component,
    hookimpl,
    map_inputs,
    option,
)
from tuneforge.builtin.checks import FRACTION_OR_ZERO, POSITIVE_NUMBERS, RARE_CLASSES_HELP
from tuneforge.builtin.datasets.group_splits import split_groups
from tuneforge.builtin.datasets.row_splits import find_rare, group_rows_by_class, split_rows
from tuneforge.builtin.datasets.tables.loader_parts import LoaderOrder, LoaderParts
from tuneforge.builtin.datasets.tables.raw_tensors import require_one_input, to_tensor
from tuneforge.builtin.datasets.tables.sample_arrays import (
    ArraySamples,
    describe_tensors,
    find_unlike_scales,
    read_samples,
    targets_argument_name,
)
from tuneforge.builtin.datasets.tables.target_arrays import (
    TargetKind,
    encode_classes,
    fit_number_targets,
    infer_class_names,
    infer_target_kind,
    standardize,
)
from tuneforge.builtin.targets import ClassTargets, MultilabelTargets, RegressionTargets
from tuneforge.errors import suggest_name

if TYPE_CHECKING:
    from tuneforge import Run

_WORD_BY_DTYPE_KIND = {"U": "text", "b": "booleans", "i": "integers", "u": "integers", "f": "floats"}


@component(api=1)
class TensorInputs(Inputs):
    """Tensors as inputs: one per sample, or several by name.

    Floats and integers (such as token ids) are unchanged; uint8 becomes float32, because no layer takes it.
    """

    shapes: dict[str, tuple[int, ...]] = option(
        default={}, help="Shape of each tensor of a sample by name; '' for a single one; -1 for any size."
    )
    dtypes: dict[str, str] = option(default={}, help="Dtypes by name, such as float32 or int64.")
    means: tuple[float, ...] = option(default=(), help="Mean per feature or channel of a single tensor.")
    scales: tuple[float, ...] = option(
        default=(), help="Std per feature or channel of a single tensor.", check=POSITIVE_NUMBERS
    )

    def decode(self, raw: Any) -> TensorTree:
        """Return the tensor of a sample, or the tensors of a mapping.

        Args:
            raw: Nested lists, an array or a tensor, or a mapping of them; JSON text or an .npy file as bytes or a path.

        Raises:
            DataError: It is none of these, or names, shapes or values are invalid.
        """
        if isinstance(raw, (bytes, Path)):
            raw = _load_json_or_npy(raw)
        if not isinstance(raw, Mapping):
            if self.shapes and set(self.shapes) != {""}:
                raise DataError("this is not a mapping", fix=f"give a mapping of {', '.join(self.shapes)}")
            return self._decode_tensor("", raw)
        self._check_names(raw)
        return {name: self._decode_tensor(name, raw[name]) for name in self.shapes or raw}

    def preprocess(self, samples: TensorTree) -> Any:
        """Return the model inputs of stored tensors."""
        return map_inputs(samples, self._preprocess_tensor)

    def _preprocess_tensor(self, tensor: Tensor) -> Tensor:
        tensor = tensor.float() if tensor.dtype == torch.uint8 else tensor
        if not self.means:
            return tensor
        along = (-1, *[1] * (tensor.ndim - 2))
        dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
        means, scales = (tensor.new_tensor(each, dtype=dtype).view(along) for each in (self.means, self.scales))
        return (tensor - means) / scales

    def _check_names(self, raw: Mapping[str, Any]) -> None:
        if set(self.shapes) == {""}:
            raise DataError("this is a mapping", why="a sample is one list of numbers", fix="give the list")
        if self.shapes and set(raw) != set(self.shapes):
            strange = sorted(set(raw) - set(self.shapes), key=str)
            raise DataError(
                f"unknown input '{strange[0]}'" if strange else f"'{min(set(self.shapes) - set(raw))}' is missing",
                why=f"the model takes {', '.join(self.shapes)}",
                fix=suggest_name(str(strange[0]), self.shapes) if strange else "give every input",
            )

    def _decode_tensor(self, name: str, value: Any) -> Tensor:
        where = f"input '{name}'" if name else ""
        require_one_input(value, where=where)
        dtype = getattr(torch, self.dtypes[name]) if name in self.dtypes else torch.float32
        tensor = to_tensor(value, where=where, float_dtype=dtype if dtype == torch.float64 else torch.float32)
        if name in self.dtypes:
            tensor = _cast_tensor(tensor, dtype, where)
        if name in self.shapes and not shapes_agree(tuple(tensor.shape), self.shapes[name]):
            raise DataError(
                f"a sample of shape {tuple(tensor.shape)}", where=where, fix=f"give shape {self.shapes[name]}"
            )
        return tensor


@component(api=1)
class ArrayData:
    """Arrays or datasets in memory as a run's data, created by `data_from_arrays`."""

    in_memory = True  # so a run directory cannot rebuild it

    val: float = option(
        default=0.2, help="Fraction of the samples for validation, if none are given.", check=FRACTION_OR_ZERO
    )
    test: float = option(
        default=0.2, help="Fraction of the samples for the test split, if none are given.", check=FRACTION_OR_ZERO
    )
    rare_classes: Literal["raise", "train", "drop"] = option(default="raise", help=RARE_CLASSES_HELP)
    names: tuple[str, ...] = option(default=(), help="Names of the classes by index, of the labels or of the numbers.")
    units: tuple[str, ...] = option(default=("",), help="Units of the numbers, or one for all.")
    standardize: bool = option(default=False, help="Standardize each feature with mean and std of the training split.")

    def __attrs_post_init__(self) -> None:
        if self.val + self.test >= 1:
            raise OptionError(f"val {self.val} and test {self.test} leave nothing for training", fix="lower them")

    @classmethod
    def from_object(cls, source: Any) -> ArrayData:
        """Return the component for a pair (x, y), a torch Dataset or a DataLoader.

        Raises:
            UsageError: It is none of these.
        """
        if isinstance(source, tuple) and len(source) == 2:
            return data_from_arrays(*source)
        if isinstance(source, (Dataset, DataLoader)):
            return data_from_arrays(source)
        raise UsageError(
            f"{type(source).__name__} is not a data source",
            where="--data",
            fix="give a name, a pair (x, y), a torch Dataset, a DataLoader, or data_from_arrays(x, y, ...)",
        )

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read the targets and split the samples.

        A restored run keeps its classes and scales.

        Raises:
            DataError: The samples cannot be used.
        """
        given: dict[str, tuple[Any, Any]] = getattr(self, "_given", {})
        if not given:
            raise DataError(
                "the arrays are missing",
                why="a run directory does not hold them",
                fix="pass them again: data_from_arrays(x, y)",
            )
        parts = {split: read_samples(x, y, split, run.float_dtype) for split, (x, y) in given.items()}
        shares = {split: 0.0 if split in parts else share for split, share in (("val", self.val), ("test", self.test))}
        known = run.data if run.restoring else None
        return _DataBuilder(self, parts, known, getattr(self, "_groups", None)).build(
            shares, run.data_seed, single_split=run.single_split
        )


def data_from_arrays(
    x: Any,
    y: Any = None,
    *,
    val: float = 0.2,
    test: float = 0.2,
    x_val: Any = None,
    y_val: Any = None,
    x_test: Any = None,
    y_test: Any = None,
    names: Sequence[str] = (),
    units: Sequence[str] = ("",),
    standardize: bool = False,
    rare_classes: Literal["raise", "train", "drop"] = "raise",
    groups: Any = None,
) -> ArrayData:
    """Return a data source from arrays, tensors, a Dataset or a DataLoader.

    Args:
        x: Inputs of all samples (n, ...): an array, a tensor or a mapping of them; or a torch Dataset of pairs
            (input, target), or a DataLoader, whose sampler, batch size, `drop_last` and `collate_fn` are used. A
            sampler of a subset decides which samples are used at all.
        y: Targets (n,) or (n, k); None with a Dataset.
        val: Fraction of the samples for validation, stratified by class, unless `x_val` is given.
        test: Fraction of the samples for the test split, unless `x_test` is given.
        x_val: Inputs for validation, as `x`.
        y_val: Targets for validation.
        x_test: Inputs for the test split, as `x`.
        y_test: Targets for the test split.
        names: Names of the classes, if `y` has their indices or for another order; names of the labels or numbers.
        units: Units of the numbers.
        standardize: Standardize each feature (or channel: the first axis of a sample) with mean and standard deviation
            of the training split, which are stored with the model. Only for one tensor of floats per sample.
        rare_classes: What to do about a class with too few samples for every split: raise an error, train on all of
            them, or drop it.
        groups: Group of each sample (n,), such as a patient; all samples of a group are in the same split.
    """
    arrays = ArrayData(
        val=val,
        test=test,
        rare_classes=rare_classes,
        names=tuple(names),
        units=tuple(units),
        standardize=standardize,
    )
    given = {"train": (x, y), "val": (x_val, y_val), "test": (x_test, y_test)}
    # The arrays are not options, which need a text for files and flags, so they are set on the frozen instance.
    present = {split: (x, y) for split, (x, y) in given.items() if not (x is None and y is None)}
    object.__setattr__(arrays, "_given", present)
    object.__setattr__(arrays, "_groups", groups)
    if isinstance(x, DataLoader):
        parts = LoaderParts.read(x, "x")
        object.__setattr__(arrays, "run_settings", {"batch_size": parts.batch_size})
        object.__setattr__(arrays, "run_defaults", {"num_workers": parts.num_workers})
    return arrays


class _DataBuilder:
    """Builds `Data` from samples and their targets.

    Args:
        options: Options of the data source.
        parts: Samples by split; a missing `val` or `test` is drawn from `train`.
        restored: Data of a restored run, or None.
        groups: Group of each sample that is split, or None.
    """

    def __init__(
        self, options: ArrayData, parts: dict[str, ArraySamples], restored: Data | None, groups: Any = None
    ) -> None:
        self.options, self.samples_by_split, self.restored = options, parts, restored
        self.target_kind: TargetKind = infer_target_kind(parts["train"].targets, where="y")
        self.groups = None if groups is None else np.asarray(groups).astype(str)
        if self.groups is not None and self.groups.shape != (len(parts["train"].targets),):
            raise DataError(
                f"groups of shape {self.groups.shape}", where="groups", fix="give one group per sample of x, (n,)"
            )
        self._dropped = np.zeros(len(parts["train"].targets), dtype=bool)
        self._rare_notes: list[str] = []

    def build(self, shares: dict[str, float], seed: int, *, single_split: bool) -> Data:
        """Return the data; splits with a fraction are drawn from train, or are train if there is to be one split."""
        if single_split:
            shares = dict.fromkeys(shares, 0.0)
        train = self.samples_by_split["train"]
        num_splits = 1 + sum(share > 0 for share in shares.values())
        if self.target_kind == "classes" and self.options.rare_classes != "raise":
            self._find_rare(num_splits)
        targets, pools = self._build_targets(num_splits=1 if self.groups is not None else num_splits)
        rows = self._split(pools, shares, seed)
        if isinstance(targets, RegressionTargets) and self.restored is None:
            targets = fit_number_targets(
                train.targets[rows[0].numpy()], names=targets.names, units=targets.units, where="y"
            )
        order = None
        if train.loader is not None:
            order = LoaderOrder.from_parts(train.loader, train.dataset_rows(rows[0]), len(train.targets))
        drawn = dict(zip(("train", "val", "test"), rows, strict=True))
        splits = {
            split: self._build_split(split, chosen, targets)
            for split, chosen in drawn.items()
            if not single_split or len(chosen) or split in self.samples_by_split
        }
        notes = [note for part in self.samples_by_split.values() for note in part.notes]
        is_new = self.restored is None and not self.options.standardize
        scale_notes = find_unlike_scales(train.inputs, rows[0]) if is_new else []
        return Data(
            train=splits["train"],
            val=splits["val"] if "val" in splits else splits["train"],
            test=splits["test"] if "test" in splits else splits["train"],
            inputs=self._build_inputs(rows[0]),
            targets=targets,
            notes=(*notes, *self._rare_notes, *scale_notes, self._describe_targets(targets)),
            train_sampler=order,
        )

    def _split(self, pools: list[Tensor], shares: dict[str, float], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows of train, val and test: by group, or stratified by class."""
        keep_few = self.target_kind == "classes" and self.options.rare_classes == "train"
        if self.groups is None:
            return split_rows(pools, val=shares["val"], test=shares["test"], seed=seed, where="y", keep_few=keep_few)
        kept = torch.cat(pools).sort().values
        rows = split_groups(
            self.groups[kept.numpy()].tolist(), val=shares["val"], test=shares["test"], seed=seed, where="groups"
        )
        train, val, test = (kept[part] for part in rows)
        return train, val, test

    def _find_rare(self, num_splits: int) -> None:
        rare, names = find_rare(self.samples_by_split["train"].targets, num_splits)
        if not names:
            return
        drop = self.options.rare_classes == "drop"
        self._dropped = rare if drop else self._dropped
        done = "left out" if drop else "in training alone, and not evaluated"
        self._rare_notes = [f"classes with fewer than {num_splits} samples are {done}: {names}"]

    def _build_targets(self, *, num_splits: int) -> tuple[Targets, list[Tensor]]:
        """Return the targets, and the groups of rows to split: those of each class, or all rows."""
        raw, names = self.samples_by_split["train"].targets, self.options.names
        known = None if self.restored is None else self.restored.targets
        everything = [torch.arange(len(raw))]
        if self.target_kind == "classes":
            classes = (
                known
                if isinstance(known, ClassTargets)
                else ClassTargets(names=names or infer_class_names(raw[~self._dropped]))
            )
            kept = torch.from_numpy(np.flatnonzero(~self._dropped))
            pools = group_rows_by_class(
                self._encode_targets("train", classes)[kept],
                classes,
                num_splits=num_splits,
                allow_empty=known is not None,
                allow_few=self.options.rare_classes == "train",
                where="y",
            )
            return classes, [kept[rows] for rows in pools]
        columns = raw.reshape(len(raw), -1).shape[1]
        if names and len(names) != columns:
            raise DataError(
                f"{len(names)} names for {columns} column(s) of targets", where="names", fix="name each once"
            )
        if self.target_kind == "label-sets":
            return MultilabelTargets(names=names or tuple(map(str, range(columns)))), everything
        if isinstance(known, RegressionTargets) and known.num_outputs == columns:
            return known, everything
        default = ("value",) if columns == 1 else tuple(f"value{index}" for index in range(columns))
        return RegressionTargets(names=names or default, units=self.options.units), everything

    def _encode_targets(self, split: str, targets: Targets) -> Tensor:
        """Return the encoded targets of a given split.

        Raises:
            DataError: They differ in kind or shape from the training targets, or have an unknown class.
        """
        raw, where = self.samples_by_split[split].targets, targets_argument_name(split)
        if not self._has_same_kind(raw):
            train = self.samples_by_split["train"].targets
            raise DataError(
                f"targets of dtype {raw.dtype} and shape {raw.shape}",
                where=where,
                why=f"the training targets have dtype {train.dtype} and shape {train.shape}",
                fix="give the same kind of targets for every split",
            )
        if isinstance(targets, ClassTargets):
            by_name = not self.options.names or raw.dtype.kind == "U"
            kept = ~self._dropped if split == "train" else np.ones(len(raw), dtype=bool)
            codes = torch.full((len(raw),), -1)
            codes[torch.from_numpy(kept)] = encode_classes(raw[kept], targets.names, by_name=by_name, where=where)
            return codes
        return (
            standardize(raw, targets)
            if isinstance(targets, RegressionTargets)
            else torch.from_numpy(raw.astype(np.float32))
        )

    def _has_same_kind(self, raw: NDArray[Any]) -> bool:
        """Return True if the targets have the kind and width of the training targets."""
        if raw.shape[1:] != self.samples_by_split["train"].targets.shape[1:]:
            return False
        if self.target_kind == "numbers":  # a small split may happen to have only 0 and 1
            return raw.dtype.kind == "f"
        return infer_target_kind(raw, where="") == self.target_kind

    def _build_split(self, split: str, rows: Tensor, targets: Targets) -> Split:
        if split in self.samples_by_split and split != "train":
            return Split(self.samples_by_split[split].inputs, self._encode_targets(split, targets))
        samples, stored = self.samples_by_split["train"], self._encode_targets("train", targets)
        ids = [str(row) for row in samples.dataset_rows(torch.arange(len(stored))).tolist()]
        return Split(samples.inputs, stored, ids=ids).subset(rows)

    def _build_inputs(self, rows: Tensor) -> TensorInputs:
        """Return the inputs, from one sample of each split.

        Raises:
            DataError: Samples of the splits differ in name, shape or dtype.
        """
        train = describe_tensors(self.samples_by_split["train"].inputs)
        for split, part in self.samples_by_split.items():
            shapes, dtypes = describe_tensors(part.inputs)
            same = part.collated or all(shapes_agree(shapes.get(name, ()), shape) for name, shape in train[0].items())
            if dtypes != train[1] or not same:
                raise DataError(
                    f"samples of shape {_format_shapes(shapes)}",
                    where=f"x_{split}",
                    why=f"the training samples have shape {_format_shapes(train[0])}, and dtypes must be equal too",
                    fix="prepare all splits in the same way",
                )
        known = None if self.restored is None else self.restored.inputs
        means, scales = (
            (known.means, known.scales) if isinstance(known, TensorInputs) else self._compute_mean_and_scale(rows)
        )
        return TensorInputs(shapes=train[0], dtypes=train[1], means=means, scales=scales)

    def _compute_mean_and_scale(self, rows: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each feature over the training rows, if requested."""
        inputs = self.samples_by_split["train"].inputs
        if not self.options.standardize:
            return (), ()
        if (
            not isinstance(inputs, Tensor)
            or inputs.ndim < 2
            or inputs.dtype not in (torch.float32, torch.float64, torch.uint8)
        ):
            raise DataError(
                "only one tensor of numbers per sample can be standardized",
                where="standardize",
                fix="turn it off, or standardize x before",
            )
        features = inputs[rows].double().transpose(0, 1).flatten(1)
        means, scales = features.mean(1), features.std(1, correction=0)
        return tuple(means.tolist()), tuple(scales.where(scales > 1e-12 * means.abs(), 1.0).tolist())

    def _describe_targets(self, targets: Targets) -> str:
        kind = _WORD_BY_DTYPE_KIND[self.samples_by_split["train"].targets.dtype.kind]
        if self.target_kind == "numbers":
            read_as = f"numbers ({targets.num_outputs} per sample)"
            return f"targets that are {kind} are read as {read_as}; give integers for classes"
        if self.target_kind == "label-sets":
            return f"a matrix of 0 and 1 is read as {targets.num_outputs} labels (multi-label)"
        return f"targets that are {kind} are read as {targets.num_outputs} classes"


def _cast_tensor(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    cast = tensor.to(dtype)
    if not dtype.is_floating_point and not torch.equal(cast.to(tensor.dtype), tensor):
        raise DataError("a number is not an integer", where=where, why=f"this input is {dtype}", fix="give integers")
    return cast


def _load_json_or_npy(raw: bytes | Path) -> Any:
    """Return the content of a JSON or .npy file, without unpickling."""
    try:
        content = raw.read_bytes() if isinstance(raw, Path) else raw
        if content.startswith(b"\x93NUMPY"):
            return np.load(io.BytesIO(content), allow_pickle=False)  # noqa: TID251 - no unpickling
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        where = str(raw) if isinstance(raw, Path) else ""
        raise DataError("neither JSON nor an .npy file of numbers", where=where, why=str(error)) from None


def shapes_agree(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return True if a shape is the expected one, in which -1 stands for any size."""
    return len(shape) == len(expected) and all(size in (given, -1) for given, size in zip(shape, expected, strict=True))


def _format_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}".strip() for name, shape in shapes.items())
