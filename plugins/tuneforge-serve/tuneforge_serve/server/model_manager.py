"""The served models: a new version is loaded, warmed up and checked beside the old one, then replaces it.

A request keeps the version it started with for decoding, the forward pass and the description, whatever is loaded
in the meantime. An old version is freed after its last response.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import attrs
import torch
from torch import Tensor

from tuneforge import Inputs, Targets, TensorTree
from tuneforge.errors import FolderError, HaltError, MissingDependencyError, TuneforgeError
from tuneforge.exporting import BUNDLE, InferenceModel, is_run_dir, list_backends, load_inference_model, read_json
from tuneforge_serve.registry.model_registry import CHAMPION
from tuneforge_serve.server.dynamic_batcher import check_num_outputs
from tuneforge_serve.server.request_body import RequestError
from tuneforge_serve.server.threads import limit_to_one_thread

LOG = logging.getLogger("tuneforge.serve")
_MAX_TIMED_RUNS, _MAX_TIMED_S = 15, 0.3


@attrs.frozen(eq=False)
class ServedModel:
    """A loaded version of a model.

    Args:
        model: The loaded model.
        name: The name of the model.
        version: The version number in a registry; elsewhere the start of a digest of the weights.
    """

    model: InferenceModel
    name: str
    version: str

    @property
    def inputs(self) -> Inputs:
        """The preprocessing of the model."""
        return self.model.inputs

    @property
    def targets(self) -> Targets:
        """The targets of the model."""
        return self.model.targets

    @property
    def about(self) -> dict[str, str]:
        """Name, version and backend of the model."""
        return {"name": self.name, "version": self.version, "backend": self.model.backend}

    def outputs(self, stored: TensorTree) -> Tensor:
        """Compute the outputs (b, k) of stored inputs (b, ...)."""
        return self.model.outputs(stored)

    def example(self, num_samples: int) -> TensorTree:
        """Return stored inputs of zeros."""
        tensors = {
            name: torch.zeros(num_samples, *shape, dtype=getattr(torch, dtype))
            for name, (shape, dtype) in self.model.input_specs.items()
        }
        return tensors.get("", tensors)


@attrs.frozen
class ModelSource:
    """The source of the versions of a model.

    Args:
        name: The name of the model.
        path: A bundle, a run directory, or a model of a registry.
    """

    name: str
    path: Path

    @property
    def in_registry(self) -> bool:
        """True if the model belongs to a registry."""
        return (self.path / CHAMPION).is_file()

    def latest_version(self) -> str:
        """Return the champion's version; an empty string outside a registry."""
        return str(read_json(self.path / CHAMPION)["version"]) if self.in_registry else ""

    def version_dir(self, version: str) -> Path:
        """Return the directory of a version."""
        return self.path / version if version else self.path


def find_model_sources(path: Path) -> list[ModelSource]:
    """Return the model at a path, or all models of a registry.

    Raises:
        FolderError: There is no model.
    """
    if any((path / name).is_file() for name in (CHAMPION, BUNDLE)) or is_run_dir(path):
        return [ModelSource(path.absolute().name, path)]
    found = [ModelSource(each.name, each) for each in sorted(path.glob("*")) if (each / CHAMPION).is_file()]
    if not found:
        raise FolderError(
            f"there is nothing to serve in '{path}'",
            why="it is not a finished run, a bundle, or a registry with a champion",
            fix="pass a run (tuneforge run), a bundle (tuneforge export) or a registry (tuneforge promote)",
        )
    return found


@attrs.define(eq=False)
class _Slot:
    """The state of one model: the loaded version, the last version tried, and why it is not loaded."""

    source: ModelSource
    current: ServedModel | None = None
    last_version: str | None = None
    reason: str = ""
    is_unloaded: bool = False
    lock: threading.Lock = attrs.field(factory=threading.Lock)


class ModelManager:
    """The models of a server by name.

    Args:
        sources: The sources of the models.
        backend: `auto` loads every format of a version, and keeps the fastest one for a single sample.
        device_name: The device that torch computes on.
        max_batch_size: The largest batch, for the warm-up.
        on_load: Called after each attempt to load, with the model's name and whether it succeeded.
        discover: Returns the current sources; models with a new name are served too.
        compute: Calls a function in the thread of the forward passes, where a new version is warmed up.
    """

    def __init__(
        self,
        sources: list[ModelSource],
        *,
        backend: str = "auto",
        device_name: str = "auto",
        max_batch_size: int = 32,
        on_load: Callable[[str, bool], None] = lambda name, done: None,
        discover: Callable[[], Sequence[ModelSource]] = lambda: (),
        compute: Callable[[Callable[[], float]], float] = lambda work: work(),
    ) -> None:
        self._compute = compute
        self._slots = {each.name: _Slot(each) for each in sources}
        self._backend, self._device_name, self._max_batch_size, self._on_load = (
            backend,
            device_name,
            max_batch_size,
            on_load,
        )
        self._discover, self._discover_lock = discover, threading.Lock()
        self._stopped = threading.Event()
        self._poll_thread: threading.Thread | None = None

    @property
    def default_name(self) -> str:
        """The model that `/predict` uses by default."""
        return next(iter(self._slots))

    def get(self, name: str, version: str | None = None) -> ServedModel:
        """Return the loaded version of a model.

        Raises:
            RequestError: There is no such model, or another version is loaded.
        """
        slot = self._slot(name)
        model = slot.current
        if model is None:
            raise RequestError(404, f"model '{name}' is not loaded" + (f": {slot.reason}" if slot.reason else ""))
        if version is not None and version != model.version:
            raise RequestError(404, f"model '{name}' has version '{model.version}', not '{version[:80]}'")
        return model

    def list_loaded(self) -> list[ServedModel]:
        """Return every loaded version."""
        return [slot.current for slot in self._slots.values() if slot.current is not None]

    def index(self) -> list[dict[str, str]]:
        """Return the repository index of the protocol: each model with its version, state and reason."""
        rows = []
        for name, slot in self._slots.items():
            version = {} if slot.current is None else {"version": slot.current.version}
            state = "UNAVAILABLE" if slot.current is None else "READY"
            rows.append({"name": name, **version, "state": state, "reason": slot.reason})
        return rows

    def reason(self, name: str) -> str:
        """Return why the champion of a model is not loaded; an empty string if it is."""
        return self._slot(name).reason

    def load(self, name: str) -> ServedModel:
        """Load the champion beside the old version, and replace that.

        Raises:
            TuneforgeError: It cannot be loaded, or its outputs differ from its reference outputs.
        """
        if name not in self._slots:
            self._add_new_models()
        slot = self._slot(name)
        with slot.lock:
            slot.is_unloaded = False
            return self._load(slot)

    def unload(self, name: str) -> None:
        """Unload a model."""
        slot = self._slot(name)
        with slot.lock:
            slot.current, slot.is_unloaded, slot.reason = None, True, "unloaded"
        LOG.info("model '%s' is unloaded", name)

    def start_polling(self, interval_s: float) -> None:
        """Check for new champions in a thread, until `close`."""
        self._poll_thread = threading.Thread(target=self._poll, args=(interval_s,), name="registry-poll", daemon=True)
        self._poll_thread.start()

    def close(self) -> None:
        """Stop the thread, after a load in progress."""
        self._stopped.set()
        if self._poll_thread is not None:
            self._poll_thread.join()

    def _poll(self, interval_s: float) -> None:
        limit_to_one_thread()
        while not self._stopped.wait(interval_s):
            self._add_new_models()
            for slot in self._slots.values():
                self._load_if_changed(slot)

    def _add_new_models(self) -> None:
        """Add models that were promoted for the first time while the server runs."""
        with self._discover_lock:
            try:
                new = {each.name: _Slot(each) for each in self._discover() if each.name not in self._slots}
            except (TuneforgeError, OSError):  # the registry is read again at the next poll
                return
            self._slots = {**self._slots, **new}
        for name in new:
            LOG.info("model '%s' is new in the registry", name)

    def _load_if_changed(self, slot: _Slot) -> None:
        """Load a new champion. A refused version is tried again on request only."""
        try:
            champion = slot.source.latest_version()
            if champion == slot.last_version:
                return
            with slot.lock:
                if not (slot.is_unloaded or champion == slot.last_version or self._stopped.is_set()):
                    self._load(slot)
        except Exception:  # noqa: BLE001 - `_load` logs it, and an unreadable champion.json is read again
            return

    def _load(self, slot: _Slot) -> ServedModel:
        name, old = slot.source.name, slot.current
        version = slot.source.latest_version()
        slot.last_version = version
        start = time.perf_counter()
        try:
            served = self._load_and_verify(slot.source, version)
        except Exception as error:
            slot.reason = f"version '{version or 'new'}' was refused: {_public_reason(error)}"
            remaining = "no version is loaded" if old is None else f"version '{old.version}' stays"
            LOG.error("model '%s': %s; %s (%s)", name, slot.reason, remaining, error, exc_info=_is_unexpected(error))
            self._on_load(name, False)
            raise
        slot.current, slot.reason = served, ""
        before = "" if old is None else f" replaces '{old.version}'"
        seconds = time.perf_counter() - start
        LOG.info(
            "model '%s' version '%s'%s: loaded in %.1f s (%s)",
            name,
            served.version,
            before,
            seconds,
            served.model.backend,
        )
        self._on_load(name, True)
        return served

    def _load_and_verify(self, source: ModelSource, version: str) -> ServedModel:
        """Load a version, check it against its reference outputs, and warm it up."""
        version_dir = source.version_dir(version)
        name, version = source.name, version or _identify_version(version_dir)
        best: tuple[float, ServedModel] | None = None
        for backend in self._backends(version_dir):
            try:
                model = load_inference_model(
                    version_dir, backend=backend, device_name=self._device_name, name=name, version=version
                )
            except MissingDependencyError:
                if best is None and backend == self._backends(version_dir)[-1]:
                    raise
                continue
            candidate = ServedModel(model, name, version)
            model.verify()
            speed = self._warm_up(candidate)
            if best is None or speed < best[0]:
                best = (speed, candidate)
        assert best is not None
        return best[1]

    def _warm_up(self, model: ServedModel) -> float:
        """Run every batch size once, and return the median seconds of a single sample."""

        def seconds(rows: int) -> float:
            example, start = model.example(rows), time.perf_counter()
            check_num_outputs(model.outputs(example), rows)
            return time.perf_counter() - start

        for rows in dict.fromkeys((self._max_batch_size, 2, 1)):
            self._compute(partial(seconds, rows))
        times: list[float] = []
        while len(times) < _MAX_TIMED_RUNS and sum(times) < _MAX_TIMED_S:
            times.append(self._compute(partial(seconds, 1)))
        return median(times)

    def _backends(self, folder: Path) -> list[str]:
        return list(dict.fromkeys(list_backends(folder))) if self._backend == "auto" else [self._backend]

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            raise RequestError(404, f"there is no model '{name[:80]}'")
        return self._slots[name]


def _identify_version(directory: Path) -> str:
    """Return the version number of a directory inside a registry; a digest of its content elsewhere."""
    in_registry = (directory.absolute().parent / CHAMPION).is_file()
    return directory.name if in_registry else hash_version(directory)


def hash_version(directory: Path) -> str:
    """Return eight hexadecimal digits of a digest of a bundle or a run."""
    found = (directory / name for name in ("manifest.json", "model.safetensors"))
    content = next(path for path in found if path.is_file())
    return hashlib.sha256(content.read_bytes()).hexdigest()[:8]


def _public_reason(error: Exception) -> str:
    """Return why a version was refused, without paths, because clients may read it."""
    if isinstance(error, HaltError):
        return "its outputs differ from its reference outputs"
    if isinstance(error, MissingDependencyError):
        return error.what
    return "its files are missing, damaged or unreadable"


def _is_unexpected(error: Exception) -> bool:
    return not isinstance(error, TuneforgeError)
