"""Data that is already in Python: numpy arrays, tensors, mappings of them, a torch Dataset or a DataLoader.

`data_from_arrays(x, y)` gives a component for `Engine(data=...)`. What the answers are follows from their type:

=============================================  ===========  ==========================================
answers                                        targets      note
=============================================  ===========  ==========================================
text, truth values, integers (n,)              Classes      named by themselves, or by `names`
floats (n,) or (n, k)                          Numbers      standardised by the training split alone
a matrix of 0 and 1 with several columns       LabelSets
=============================================  ===========  ==========================================

Shapes: n samples, b in a batch, f features.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    Source,
    Split,
    Targets,
    TensorTree,
    UsageError,
    component,
    hookimpl,
    map_inputs,
    option,
)
from tuneforge.builtin.checks import FRACTION_OR_ZERO, POSITIVE_NUMBERS
from tuneforge.builtin.datasets.row_splits import group_rows_by_class, split_rows
from tuneforge.builtin.datasets.tables.sample_arrays import (
    ArraySamples,
    describe_tensors,
    read_samples,
    targets_argument_name,
    to_tensor,
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

_WORD_BY_DTYPE_KIND = {"U": "text", "b": "truth values", "i": "integers", "u": "integers", "f": "floats"}


@component(api=1)
class TensorInputs(Inputs):
    """Numbers as they are: one tensor a sample, or several by name.

    Floats and integers pass unchanged (integers are ids); uint8 becomes float32, because no layer takes it.
    """

    shapes: dict[str, tuple[int, ...]] = option(
        default={}, help="Shape of a sample's tensors by name; '' names a single one."
    )
    dtypes: dict[str, str] = option(default={}, help="Their types, such as float32 or int64.")
    means: tuple[float, ...] = option(default=(), help="Of a single tensor: what is subtracted along its first axis.")
    scales: tuple[float, ...] = option(
        default=(), help="Of a single tensor: what it is then divided by.", check=POSITIVE_NUMBERS
    )

    def decode(self, raw: Any) -> TensorTree:
        """The tensor of a list of numbers, or the tensors of a mapping of lists.

        Args:
            raw: Nested lists, an array or a tensor, or a mapping of them; JSON text or an .npy file as bytes or a path.

        Raises:
            DataError: It is none of these, or names, shapes or numbers do not fit.
        """
        if isinstance(raw, (bytes, Path)):
            raw = _load_json_or_npy(raw)
        if not isinstance(raw, Mapping):
            if self.shapes and set(self.shapes) != {""}:
                raise DataError("this is no mapping", fix=f"give a mapping of {', '.join(self.shapes)}")
            return self._decode_tensor("", raw)
        self._check_names(raw)
        return {name: self._decode_tensor(name, raw[name]) for name in self.shapes or raw}

    def preprocess(self, samples: TensorTree) -> Any:
        """Stored tensors of a batch as the model takes them."""
        return map_inputs(samples, self._preprocess_tensor)

    def _preprocess_tensor(self, tensor: Tensor) -> Tensor:
        tensor = tensor.float() if tensor.dtype == torch.uint8 else tensor
        if not self.means:
            return tensor
        along = (-1, *[1] * (tensor.ndim - 2))
        means, scales = (torch.tensor(each, device=tensor.device).view(along) for each in (self.means, self.scales))
        return (tensor - means) / scales

    def _check_names(self, raw: Mapping[str, Any]) -> None:
        if set(self.shapes) == {""}:
            raise DataError("this is a mapping", why="a sample is one list of numbers", fix="give the list itself")
        if self.shapes and set(raw) != set(self.shapes):
            strange = sorted(set(raw) - set(self.shapes), key=str)
            raise DataError(
                f"'{strange[0]}' is none of the inputs"
                if strange
                else f"'{min(set(self.shapes) - set(raw))}' is missing",
                why=f"the model takes {', '.join(self.shapes)}",
                fix=suggest_name(str(strange[0]), self.shapes) if strange else "give every input",
            )

    def _decode_tensor(self, name: str, value: Any) -> Tensor:
        where = f"input '{name}'" if name else ""
        tensor = to_tensor(value, where=where)
        if name in self.dtypes:
            tensor = _cast_tensor(tensor, getattr(torch, self.dtypes[name]), where)
        if name in self.shapes and tuple(tensor.shape) != self.shapes[name]:
            raise DataError(
                f"a sample of shape {tuple(tensor.shape)}", where=where, fix=f"give shape {self.shapes[name]}"
            )
        return tensor


@component(api=1)
class ArrayData:
    """Live arrays or datasets as a run's data. Made by `data_from_arrays`: the objects themselves are no options."""

    val: float = option(
        default=0.2, help="Share of the samples for validation, where none are given.", check=FRACTION_OR_ZERO
    )
    test: float = option(
        default=0.2, help="Share of the samples for the test, where none are given.", check=FRACTION_OR_ZERO
    )
    names: tuple[str, ...] = option(default=(), help="Of the classes by index, of the labels or of the numbers.")
    units: tuple[str, ...] = option(default=("",), help="Of the numbers; one for all of them will do.")
    standardize: bool = option(
        default=False, help="Bring each feature to mean 0 and deviation 1 over the training split."
    )

    def __attrs_post_init__(self) -> None:
        if self.val + self.test >= 1:
            raise OptionError(f"val {self.val} and test {self.test} leave nothing to train on", fix="lower them")

    @classmethod
    def from_object(cls, source: Any) -> ArrayData:
        """The component for a pair (x, y), a torch Dataset or a DataLoader, with the defaults of `data_from_arrays`.

        Raises:
            UsageError: It is none of these.
        """
        if isinstance(source, tuple) and len(source) == 2:
            return data_from_arrays(*source)
        if isinstance(source, (Dataset, DataLoader)):
            return data_from_arrays(source)
        raise UsageError(
            f"{type(source).__name__} is no data source",
            where="--data",
            fix="give a name, a pair (x, y), a torch Dataset, a DataLoader, or data_from_arrays(x, y, ...)",
        )

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read the answers, divide the samples and describe both.

        Where a tuned model looks at other arrays, its classes and scales are kept.

        Raises:
            DataError: The samples cannot be used as they are; the message says which and what to do.
        """
        given: dict[str, tuple[Any, Any]] = getattr(self, "_given", {})
        if not given:
            raise DataError(
                "the arrays are missing",
                why="a run directory does not hold them",
                fix="pass them again: data_from_arrays(x, y)",
            )
        parts = {split: read_samples(x, y, split) for split, (x, y) in given.items()}
        shares = {split: 0.0 if split in parts else share for split, share in (("val", self.val), ("test", self.test))}
        known = run.data if run.restoring else None
        return _DataBuilder(self, parts, known).build(shares, run.data_seed)


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
) -> ArrayData:
    """Data for a run from what is already in Python.

    Args:
        x: Inputs of all samples (n, ...): an array, a tensor or a mapping of them; or a torch Dataset of pairs
            (input, answer), or a DataLoader, whose dataset is taken: order and batch size are the run's.
        y: Answers (n,) or (n, k); None with a Dataset.
        val: Share of the samples for validation, unless `x_val` is given; of each class its share.
        test: Share of the samples for the test, unless `x_test` is given.
        x_val: Inputs for validation, as `x`.
        y_val: Their answers.
        x_test: Inputs for the test, as `x`.
        y_test: Their answers.
        names: Of the classes, where `y` holds their indices, or in the order wanted; of the labels or numbers.
        units: Of the numbers.
        standardize: Bring each feature (or channel: the first axis of a sample) to mean 0 and standard deviation 1
            over the training split; the numbers are stored with the model. Only for one tensor of floats a sample.
    """
    arrays = ArrayData(val=val, test=test, names=tuple(names), units=tuple(units), standardize=standardize)
    given = {"train": (x, y), "val": (x_val, y_val), "test": (x_test, y_test)}
    # Live objects are no options: they have no text for a file or a flag. So they are set past the frozen class.
    present = {split: (x, y) for split, (x, y) in given.items() if not (x is None and y is None)}
    object.__setattr__(arrays, "_given", present)
    return arrays


class _DataBuilder:
    """What the samples are, once the answers of all of them are known.

    Args:
        options: As the user gave them.
        samples_by_split: The samples by split; what `val` or `test` lacks is drawn from `train`.
        restored: The data of a tuned model that looks at these samples, or None.
    """

    def __init__(self, options: ArrayData, parts: dict[str, ArraySamples], restored: Data | None) -> None:
        self.options, self.samples_by_split, self.restored = options, parts, restored
        self.target_kind: TargetKind = infer_target_kind(parts["train"].targets, where="y")

    def build(self, shares: dict[str, float], seed: int) -> Data:
        """The splits; those with a share are drawn from what is given to train."""
        train = self.samples_by_split["train"]
        targets, pools = self._build_targets(num_splits=1 + sum(share > 0 for share in shares.values()))
        rows = split_rows(pools, val=shares["val"], test=shares["test"], seed=seed, where="y")
        if isinstance(targets, RegressionTargets) and self.restored is None:
            targets = fit_number_targets(
                train.targets[rows[0].numpy()], names=targets.names, units=targets.units, where="y"
            )
        drawn = dict(zip(("train", "val", "test"), rows, strict=True))
        splits = {split: self._build_split(split, chosen, targets) for split, chosen in drawn.items()}
        notes = [note for part in self.samples_by_split.values() for note in part.notes]
        return Data(
            train=splits["train"],
            val=splits["val"],
            test=splits["test"],
            inputs=self._build_inputs(rows[0]),
            targets=targets,
            notes=(*notes, self._describe_targets(targets)),
        )

    def _build_targets(self, *, num_splits: int) -> tuple[Targets, list[Tensor]]:
        """The targets, and the rows that are divided alike: those of a class, or all."""
        answers, names = self.samples_by_split["train"].targets, self.options.names
        known = None if self.restored is None else self.restored.targets
        everything = [torch.arange(len(answers))]
        if self.target_kind == "classes":
            classes = (
                known if isinstance(known, ClassTargets) else ClassTargets(names=names or infer_class_names(answers))
            )
            pools = group_rows_by_class(
                self._encode_targets("train", classes),
                classes,
                num_splits=num_splits,
                allow_empty=known is not None,
                where="y",
            )
            return classes, pools
        columns = answers.reshape(len(answers), -1).shape[1]
        if names and len(names) != columns:
            raise DataError(
                f"{len(names)} names for {columns} column(s) of answers", where="names", fix="name each once"
            )
        if self.target_kind == "label-sets":
            return MultilabelTargets(names=names or tuple(map(str, range(columns)))), everything
        if isinstance(known, RegressionTargets) and known.num_outputs == columns:
            return known, everything
        default = ("value",) if columns == 1 else tuple(f"value{index}" for index in range(columns))
        return RegressionTargets(names=names or default, units=self.options.units), everything

    def _encode_targets(self, split: str, targets: Targets) -> Tensor:
        """The targets of a given part, as the split stores them.

        Raises:
            DataError: They are of another kind or shape than the training answers, or of an unknown class.
        """
        answers, where = self.samples_by_split[split].targets, targets_argument_name(split)
        if not self._has_same_kind(answers):
            train = self.samples_by_split["train"].targets
            raise DataError(
                f"answers of type {answers.dtype} and shape {answers.shape}",
                where=where,
                why=f"those to train on have type {train.dtype} and shape {train.shape}",
                fix="give the same kind of answers for every split",
            )
        if isinstance(targets, ClassTargets):
            by_name = not self.options.names or answers.dtype.kind == "U"
            return encode_classes(answers, targets.names, by_name=by_name, where=where)
        return (
            standardize(answers, targets)
            if isinstance(targets, RegressionTargets)
            else torch.from_numpy(answers.astype(np.float32))
        )

    def _has_same_kind(self, answers: NDArray[Any]) -> bool:
        """True where the answers are of the kind and width of those to train on."""
        if answers.shape[1:] != self.samples_by_split["train"].targets.shape[1:]:
            return False
        if self.target_kind == "numbers":  # of which a few may happen to be 0 and 1 throughout
            return answers.dtype.kind == "f"
        return infer_target_kind(answers, where="") == self.target_kind

    def _build_split(self, split: str, rows: Tensor, targets: Targets) -> Split:
        if split in self.samples_by_split and split != "train":
            return Split(self.samples_by_split[split].inputs, self._encode_targets(split, targets))
        inputs, stored = self.samples_by_split["train"].inputs, self._encode_targets("train", targets)
        if isinstance(inputs, Source):
            return Split(inputs, stored).subset(rows)
        taken = map_inputs(inputs, lambda tensor: tensor.index_select(0, rows))
        return Split(taken, stored[rows], ids=[str(row) for row in rows.tolist()])

    def _build_inputs(self, rows: Tensor) -> TensorInputs:
        """The contract of the inputs, read off one sample of each part.

        Raises:
            DataError: Samples of the parts differ in name, shape or type.
        """
        train = describe_tensors(self.samples_by_split["train"].inputs)
        for split, part in self.samples_by_split.items():
            shapes, dtypes = describe_tensors(part.inputs)
            if (shapes, dtypes) != train:
                raise DataError(
                    f"samples of shape {_format_shapes(shapes)}",
                    where=f"x_{split}",
                    why=f"those to train on have shape {_format_shapes(train[0])}, and types must be equal too",
                    fix="prepare every split in the same way",
                )
        known = None if self.restored is None else self.restored.inputs
        means, scales = (
            (known.means, known.scales) if isinstance(known, TensorInputs) else self._compute_mean_and_scale(rows)
        )
        return TensorInputs(shapes=train[0], dtypes=train[1], means=means, scales=scales)

    def _compute_mean_and_scale(self, rows: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means and deviations of each feature over the training rows; nothing where they are not asked for."""
        inputs = self.samples_by_split["train"].inputs
        if not self.options.standardize:
            return (), ()
        if not isinstance(inputs, Tensor) or inputs.ndim < 2 or inputs.dtype not in (torch.float32, torch.uint8):
            raise DataError(
                "only one tensor of numbers a sample can be standardised",
                where="standardise",
                fix="leave it out, or standardise x before",
            )
        features = inputs[rows].double().transpose(0, 1).flatten(1)
        means, scales = features.mean(1), features.std(1, correction=0)
        return tuple(means.tolist()), tuple(scales.where(scales > 1e-12 * means.abs(), 1.0).tolist())

    def _describe_targets(self, targets: Targets) -> str:
        kind = _WORD_BY_DTYPE_KIND[self.samples_by_split["train"].targets.dtype.kind]
        if self.target_kind == "numbers":
            read_as = f"numbers ({targets.num_outputs} a sample)"
            return f"answers that are {kind} are read as {read_as}; give integers for classes"
        if self.target_kind == "label-sets":
            return f"a matrix of 0 and 1 is read as {targets.num_outputs} labels, any of which may hold"
        return f"answers that are {kind} are read as {targets.num_outputs} classes"


def _cast_tensor(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    cast = tensor.to(dtype)
    if not dtype.is_floating_point and not torch.equal(cast.to(tensor.dtype), tensor):
        raise DataError(
            "a number that is not whole", where=where, why=f"this input is {dtype}", fix="give whole numbers"
        )
    return cast


def _load_json_or_npy(raw: bytes | Path) -> Any:
    """What a file of JSON or an .npy file holds; a pickle inside it is never opened."""
    try:
        content = raw.read_bytes() if isinstance(raw, Path) else raw
        if content.startswith(b"\x93NUMPY"):
            return np.load(io.BytesIO(content), allow_pickle=False)  # noqa: TID251 - which never opens a pickle
        return json.loads(content)
    except (OSError, ValueError) as error:
        where = str(raw) if isinstance(raw, Path) else ""
        raise DataError("neither JSON nor an .npy file of numbers", where=where, why=str(error)) from None


def _format_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}".strip() for name, shape in shapes.items())
