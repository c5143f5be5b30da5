"""Base class of the estimators: options, and a run of the engine in `fit`.

Shapes: n samples, f features, c channels, h and w pixels, k outputs.
"""
# ruff: noqa: N803 - `X` is scikit-learn's name for samples, and callers pass it by keyword

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

import tuneforge as tf
from tuneforge.builtin.datasets.images.image_inputs import ImageInputs
from tuneforge.builtin.datasets.row_splits import split_train_val
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import compute_mean_and_scale
from tuneforge.engine.model.extra_state import get_extra_states, set_extra_states
from tuneforge.engine.storage.safetensors_io import get_state_dict, load_state_dict
from tuneforge.sklearn.model_state import SavableEstimator

_NESTED_PARAMS = ("model", "strategy")  # parameters with nested options
FLOAT32_TOLERANCE = 1e-6
"""Tolerance for constant columns: rounding to float32 gives them a small standard deviation."""

_BATCH_ROWS = 256  # of a table per forward pass


class TunedEstimator(SavableEstimator):
    """Options, and a run of the engine in `fit`; the constructor only stores options."""

    def __init__(
        self,
        model: Any = None,
        strategy: Any = "lp-ft",
        *,
        model_options: Mapping[str, Any] | None = None,
        strategy_options: Mapping[str, Any] | None = None,
        adapt: Sequence[Any] = (),
        augment: Sequence[Any] = (),
        callbacks: Sequence[Any] = (),
        optimizer: Any = None,
        schedule: Any = None,
        batch_size: int = 32,
        validation_fraction: float = 0.1,
        standardize: bool = True,
        partial_lr: float = 1e-4,
        device: str = "auto",
        settings: Mapping[str, Any] | None = None,
        runs_dir: Any = None,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.model_options = model_options
        self.strategy_options = strategy_options
        self.adapt = adapt
        self.augment = augment
        self.callbacks = callbacks
        self.optimizer = optimizer
        self.schedule = schedule
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.standardize = standardize
        self.partial_lr = partial_lr
        self.device = device
        self.settings = settings
        self.runs_dir = runs_dir
        self.random_state = random_state
        self.verbose = verbose

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters; with `deep`, also the given options as `strategy__NAME` and `model__NAME`."""
        params: dict[str, Any] = super().get_params(deep=deep)
        for part in _NESTED_PARAMS if deep else ():
            given = params[f"{part}_options"]
            params |= {f"{part}__{name}": value for name, value in given.items()} if isinstance(given, Mapping) else {}
        return params

    def set_params(self, **params: Any) -> Self:
        """Set parameters; `strategy__NAME` and `model__NAME` set a single option."""
        nested = {
            key: value for key, value in params.items() if key.partition("__")[0] in _NESTED_PARAMS and "__" in key
        }
        super().set_params(**{key: value for key, value in params.items() if key not in nested})
        for key, value in nested.items():
            part, _, name = key.partition("__")
            setattr(self, f"{part}_options", {**(getattr(self, f"{part}_options") or {}), name: value})
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = False
        return tags

    def _validate_samples(self, X: Any, y: Any = "no_validation", *, reset: bool, **rules: Any) -> Any:
        """Return samples as float32 (n, f) or (n, ...), or uint8 images (n, c, h, w); with targets, a pair.

        Raises:
            ValueError: They are non-finite, or differ in shape or dtype from the samples of `fit`.
        """
        images = getattr(X, "dtype", None) == np.uint8 and getattr(X, "ndim", 0) == 4
        rules |= {"dtype": np.uint8 if images else np.float32, "allow_nd": True, "reset": reset}
        checked = validate_data(self, X, y, **rules)
        rows = checked[0] if isinstance(checked, tuple) else checked
        found = (tuple(rows.shape[1:]), str(rows.dtype))
        if reset:
            self._shape, self._dtype = found
        elif found != (self._shape, self._dtype):
            raise ValueError(
                f"samples of shape {found[0]} as {found[1]}; {type(self).__name__} was fitted with samples of shape "
                f"{self._shape} as {self._dtype}"
            )
        return checked

    def _run_engine(self, samples: NDArray[Any], y: NDArray[Any], *, first: bool) -> None:
        """Run the strategy in the first run, else one epoch from the current weights."""
        seed = self._draw_seed()
        data = self._build_data(samples, y, seed, first=first)
        strategy: Any = (
            self._resolve_component("strategy", default="lp-ft")
            if first
            else [tf.Phase("all", epochs=1, lr=self.partial_lr)]
        )
        onwards = [] if first else [InitialWeights.from_model(self.predictor_.model)]
        with self._make_run_dir() as place:
            result = tf.Engine(
                data=data,
                model=self._resolve_component("model", default="mlp" if len(self._shape) == 1 else None),
                adapt=self.adapt,
                strategy=strategy,
                schedule=self.schedule,
                optimizer=self.optimizer,
                callbacks=[*self.callbacks, *onwards],
                augment=self.augment,
                log=print if self.verbose else None,
                batch_size=self.batch_size,
                device=self.device,
                seed=seed,
                out=place,
                **{"page": False, "cache": "memory", **(self.settings or {})},
            ).run()
            self._load_run_dir(result.run_dir)

    def _build_data(self, samples: NDArray[Any], y: NDArray[Any], seed: int, *, first: bool) -> tf.Data:
        """Return the data; in the first run, inputs and targets get the statistics of the training rows."""
        train, val = split_validation(self._group_rows(y), val_fraction=self.validation_fraction, seed=seed)
        inputs = self._build_inputs(samples, train) if first else self.predictor_.inputs
        targets = self._build_targets(y, train) if first else self.predictor_.targets
        stored, encoded = torch.from_numpy(np.array(samples)), self._encode_targets(y, targets)
        split, held = (
            tf.Split(stored[rows], encoded[rows], ids=list(map(str, rows.tolist()))) for rows in (train, val)
        )
        note = "there is no separate test split: the metrics of test are those of val"
        return tf.Data(split, held, held, inputs=inputs, targets=targets, notes=(note,))

    def _resolve_component(self, part: str, *, default: str | None = None) -> Any:
        """Return the component of `model` or `strategy` with its options, or a copy of an object.

        Raises:
            UsageError: There is no name and no default, or there are options for an object.
        """
        asked, options = getattr(self, part), dict(getattr(self, f"{part}_options") or {})
        asked = default if asked is None else asked
        if asked is None:
            raise tf.UsageError(
                f"samples of shape {self._shape} need a {part}",
                where=part,
                why="only tables have a default",
                fix="give a module, or the name of one, such as digit-cnn",
            )
        if isinstance(asked, str):
            return tf.use(asked, **options)
        if options:
            raise tf.UsageError(
                f"{part}_options need a name, and {part} is an object", where=part, fix="set them on the object"
            )
        return copy.deepcopy(asked)

    def _build_inputs(self, samples: NDArray[Any], train: Tensor) -> tf.Inputs:
        """Return the inputs; table rows are standardized with the training rows."""
        if samples.dtype == np.uint8 and samples.shape[1] in (1, 3):
            return ImageInputs(ops=("grayscale",) if samples.shape[1] == 1 else (), channels=samples.shape[1])
        shapes, dtypes = {"": tuple(samples.shape[1:])}, {"": str(samples.dtype)}
        if not self.standardize or samples.ndim != 2:
            return TensorInputs(shapes=shapes, dtypes=dtypes)
        means, scales = compute_mean_and_scale(samples[train.numpy()], tolerance=FLOAT32_TOLERANCE)
        return TensorInputs(shapes=shapes, dtypes=dtypes, means=tuple(means.tolist()), scales=tuple(scales.tolist()))

    def _compute_outputs(self, X: Any) -> NDArray[np.float64]:
        """Return the outputs (n, k). Batches of table rows are padded, because rounding depends on the batch size."""
        check_is_fitted(self, "predictor_")
        samples = torch.from_numpy(np.array(self._validate_samples(X, reset=False)))
        run = self.predictor_.run
        outputs = []
        with torch.inference_mode():
            for chunk in torch.split(samples, _BATCH_ROWS):
                missing = _BATCH_ROWS - len(chunk) if samples.ndim == 2 else 0
                padded = torch.cat([chunk, chunk[-1:].expand(missing, *chunk.shape[1:])]) if missing else chunk
                outputs.append(run.forward(run.prepare_inputs(padded))[: len(chunk)].double().cpu())
        outputs_nk: NDArray[np.float64] = torch.cat(outputs).numpy()
        return outputs_nk

    def _draw_seed(self) -> int:
        generator = check_random_state(self.random_state)
        plain = isinstance(self.random_state, (int, np.integer))
        return int(self.random_state) if plain else int(generator.randint(2**31 - 1))

    @contextlib.contextmanager
    def _make_run_dir(self) -> Iterator[Path]:
        """Yield a new run directory, in `runs_dir` or temporary."""
        if self.runs_dir is None:
            with tempfile.TemporaryDirectory(prefix="tuneforge-") as place:
                yield Path(place) / "run"
            return
        for number in itertools.count(1):
            self.run_dir_ = Path(self.runs_dir) / f"run-{number}"
            with contextlib.suppress(FileExistsError):
                self.run_dir_.mkdir(parents=True)
                break
        yield self.run_dir_

    def _group_rows(self, y: NDArray[Any]) -> list[Tensor]:
        """Return the groups of rows that are split in the same proportion."""
        raise NotImplementedError

    def _build_targets(self, y: NDArray[Any], train: Tensor) -> tf.Targets:
        """Return the targets, with statistics of the training rows."""
        raise NotImplementedError

    def _encode_targets(self, y: NDArray[Any], targets: Any) -> Tensor:
        """Return the encoded targets."""
        raise NotImplementedError


@tf.component(api=1)
class InitialWeights:
    """Loads weights from memory into the model, after all adapters and callbacks."""

    @classmethod
    def from_model(cls, model: tf.Model) -> InitialWeights:
        """Return a component with the current weights of a model."""
        made = cls()
        # Tensors are not options, which need a text for files and flags, so they are set on the frozen instance.
        state = {name: tensor.clone() for name, tensor in get_state_dict(model.module).items()}
        object.__setattr__(made, "_state", state)
        object.__setattr__(made, "_extra_states", copy.deepcopy(get_extra_states(model.module)))
        return made

    @tf.hookimpl(wrapper=True)
    def model_adapt(self, run: tf.Run) -> Generator[None, tf.Model, tf.Model]:
        """Load the weights; all rows of the head count as pretrained."""
        model = yield
        if run.restoring:
            return model
        state: dict[str, Tensor] = getattr(self, "_state")  # noqa: B009 - no field of the component
        load_state_dict(model.module, state, where="the fitted weights")
        set_extra_states(model.module, getattr(self, "_extra_states"))  # noqa: B009 - as above
        return attrs.evolve(model, pretrained_labels=model.labels, pretrained=True)


def split_validation(groups: Sequence[Tensor], *, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split rows into training and validation; where nothing can be held out, all rows serve for both.

    Raises:
        OptionError: The fraction is not in [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise tf.OptionError(
            f"a validation fraction of {val_fraction!r}",
            where="validation_fraction",
            fix="give a number from 0 to below 1",
        )
    train, val = split_train_val(groups, val=val_fraction, seed=seed, where="y")
    return train, val if len(val) else train
