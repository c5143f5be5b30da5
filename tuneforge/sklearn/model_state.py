"""Persistence of estimators: the text files of their run directory and the weights, on disk or in a pickle."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import nn

import tuneforge as tf
from tuneforge.engine.model.weights_file import write_weights
from tuneforge.engine.storage import run_dir as folder
from tuneforge.engine.storage.safetensors_io import get_state_dict
from tuneforge.plugin.serialization import from_json, to_json

ESTIMATOR_FILE = "estimator.json"
"""File of a saved estimator beside those of a run."""

_TEXT_SUFFIXES = (".json", ".jsonl", ".txt", ".html")


class SavableEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """An estimator whose fitted state is the content of a run directory."""

    _fitted_attributes: ClassVar[tuple[str, ...]] = ("n_features_in_", "feature_names_in_", "_shape", "_dtype")
    """Attributes that `fit` sets."""

    predictor_: tf.Predictor
    _text_files: dict[str, str]

    @property
    def report_(self) -> dict[str, Any]:
        """Return the `report.json` of the last run; its test split is the validation split."""
        check_is_fitted(self, "predictor_")
        report: dict[str, Any] = json.loads(self._text_files[folder.REPORT])
        return report

    def save(self, path: str | Path) -> None:
        """Save the fitted estimator in a new folder, as safetensors, JSON and text, without pickle.

        The folder is a run directory, so `tuneforge predict`, `evaluate` and `report` accept it.

        Raises:
            FolderError: The folder exists and is not empty.
        """
        check_is_fitted(self, "predictor_")
        path = Path(path)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise tf.FolderError(f"'{path}' exists and is not empty", where="path", fix="name a new folder")
        path.mkdir(parents=True, exist_ok=True)
        self._write_text_files(path)
        self._write_weights(path)
        folder.write_json(path / ESTIMATOR_FILE, self._to_record())

    @classmethod
    def load(cls, path: str | Path, *, objects: Mapping[str, Any] | None = None) -> Self:
        """Load an estimator that `save` wrote.

        Args:
            path: The folder.
            objects: Parameters that are Python objects, such as `{"model": module}`, which JSON cannot store.

        Raises:
            FolderError: There is no estimator, or an object is missing.
            UsageError: The estimator is of another class.
        """
        path, objects = Path(path), dict(objects or {})
        record = folder.read_json(path / ESTIMATOR_FILE)
        if record["class"] != cls.__name__:
            raise tf.UsageError(
                f"'{path}' holds a {record['class']}", where="path", fix=f"use {record['class']}.load(...)"
            )
        if missing := sorted(set(record["objects"]) - set(objects)):
            raise tf.FolderError(
                f"the estimator had Python objects as parameters: {', '.join(missing)}",
                where=str(path),
                why="a folder stores names and options, not objects",
                fix=f"pass them: objects={{{missing[0]!r}: ...}}",
            )
        made = cls(**{**_to_dict(from_json(record["params"])), **objects})
        for name, value in record["fitted_attributes"].items():
            setattr(made, name, _decode_attribute(value))
        made._load_run_dir(path)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes, with the weights as an array of the bytes of a safetensors file."""
        state: dict[str, Any] = dict(super().__getstate__())
        if "predictor_" in state:
            del state["predictor_"]
            with tempfile.TemporaryDirectory() as place:
                self._write_weights(Path(place))
                state["_weights"] = np.fromfile(Path(place) / folder.WEIGHTS, np.uint8)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes, and build the model with its weights."""
        state = dict(state)
        weights = state.pop("_weights", None)
        super().__setstate__(state)
        if weights is not None:
            with tempfile.TemporaryDirectory() as place:
                self._write_text_files(Path(place))
                (Path(place) / folder.WEIGHTS).write_bytes(weights.tobytes())
                self.predictor_ = self._load_predictor(Path(place))

    def _write_text_files(self, path: Path) -> None:
        for name, text in self._text_files.items():
            (path / name).write_text(text, encoding="utf-8")

    def _write_weights(self, path: Path) -> None:
        model = self.predictor_.model
        write_weights(path / folder.WEIGHTS, get_state_dict(model.module), model.module, labels=model.labels)

    def _to_record(self) -> dict[str, Any]:
        """Return the content of `estimator.json`."""
        params = self.get_params(deep=False)
        plain = {name: value for name, value in params.items() if _is_serializable(value)}
        fitted = {name: getattr(self, name) for name in self._fitted_attributes if hasattr(self, name)}
        return {
            "tuneforge": tf.__version__,
            "class": type(self).__name__,
            "params": to_json(plain),
            "objects": sorted(set(params) - set(plain)),
            "fitted_attributes": {name: _encode_attribute(value) for name, value in fitted.items()},
        }

    def _load_predictor(self, path: Path) -> tf.Predictor:
        """Return the predictor of a run directory."""
        given = copy.deepcopy(self.model) if isinstance(self.model, (nn.Module, tf.Model)) else None
        return tf.load(path, model=given, device_name=self.device)

    def _load_run_dir(self, path: Path) -> None:
        """Read the text files and the predictor of a run directory."""
        self._text_files = _read_text_files(path)
        self.predictor_ = self._load_predictor(path)


def _read_text_files(path: Path) -> dict[str, str]:
    """Return the text files of a run directory by name."""
    files = [file for file in sorted(path.iterdir()) if file.suffix in _TEXT_SUFFIXES and file.name != ESTIMATOR_FILE]
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def _is_serializable(value: Any) -> bool:
    try:
        to_json(value)
    except (TypeError, ValueError):
        return False
    return True


def _to_dict(value: Any) -> Any:
    """Return plain data with dicts in place of read-only mappings."""
    return {key: _to_dict(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _encode_attribute(value: Any) -> Any:
    """Return a JSON value of an attribute; arrays include their dtype."""
    if isinstance(value, np.ndarray):
        return {"values": value.tolist(), "dtype": str(value.dtype)}
    return {"tuple": list(value)} if isinstance(value, tuple) else value


def _decode_attribute(value: Any) -> Any:
    """Return the attribute of a value of `_encode_attribute`."""
    if not isinstance(value, dict):
        return value
    return tuple(value["tuple"]) if "tuple" in value else np.array(value["values"], dtype=value["dtype"])
