"""Which version of which model answers: loaded, warmed and checked beside the old one, then put in its place.

A request keeps the version that it met first: it is decoded, computed and described by that one, whatever happens to
the model meanwhile. An old version goes when its last answer is out.
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
    """A version that answers.

    Args:
        model: What computes.
        name: Of the model.
        version: Its number in a store; elsewhere the beginning of a digest of its weights.
    """

    model: InferenceModel
    name: str
    version: str

    @property
    def inputs(self) -> Inputs:
        """How raw things become tensors."""
        return self.model.inputs

    @property
    def targets(self) -> Targets:
        """How answers are read."""
        return self.model.targets

    @property
    def about(self) -> dict[str, str]:
        """Name, version and backend."""
        return {"name": self.name, "version": self.version, "backend": self.model.backend}

    def outputs(self, stored: TensorTree) -> Tensor:
        """Outputs (b, k) of stored inputs (b, ...)."""
        return self.model.outputs(stored)

    def example(self, rows: int) -> TensorTree:
        """Stored inputs of nothing in particular, of the right shapes and types."""
        tensors = {
            name: torch.zeros(rows, *shape, dtype=getattr(torch, dtype))
            for name, (shape, dtype) in self.model.input_specs.items()
        }
        return tensors.get("", tensors)


@attrs.frozen
class ModelSource:
    """Where the versions of a model come from.

    Args:
        name: Of the model.
        path: A bundle, a run's folder, or a model of a store.
    """

    name: str
    path: Path

    @property
    def in_registry(self) -> bool:
        """True where a pointer says which version is the champion."""
        return (self.path / CHAMPION).is_file()

    def latest_version(self) -> str:
        """The version that ought to answer; empty where there is only one."""
        return str(read_json(self.path / CHAMPION)["version"]) if self.in_registry else ""

    def version_dir(self, version: str) -> Path:
        """The folder of a version."""
        return self.path / version if version else self.path


def find_model_sources(path: Path) -> list[ModelSource]:
    """What a path offers: one model, or all those of a store.

    Raises:
        FolderError: There is none.
    """
    if any((path / name).is_file() for name in (CHAMPION, BUNDLE)) or is_run_dir(path):
        return [ModelSource(path.absolute().name, path)]
    found = [ModelSource(each.name, each) for each in sorted(path.glob("*")) if (each / CHAMPION).is_file()]
    if not found:
        raise FolderError(
            f"there is nothing to serve in '{path}'",
            why="it is neither a finished run, nor a bundle, nor a store with a champion",
            fix="name a run's folder (tuneforge run), a bundle (tuneforge export) or a store (tuneforge promote)",
        )
    return found


@attrs.define(eq=False)
class _Slot:
    """One model's place: what answers now, what was asked last, and why it is not there."""

    source: ModelSource
    current: ServedModel | None = None
    last_version: str | None = None
    reason: str = ""
    is_unloaded: bool = False
    lock: threading.Lock = attrs.field(factory=threading.Lock)


class ModelManager:
    """The models of a server by name.

    Args:
        sources: Where they come from.
        backend: `auto` opens every form that a version has, and keeps the one that answers a lone row fastest.
        device_name: Where torch computes.
        max_batch_size: Rows of the largest batch, for warming up.
        on_load: Is called after each attempt to load, with the model's name and whether it answers now.
        discover: Gives the sources that there are now; those with a new name are served too.
        compute: Calls something in the thread that computes answers; a new version is warmed there.
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
        """The name that `/predict` takes where none is given."""
        return next(iter(self._slots))

    def get(self, name: str, version: str | None = None) -> ServedModel:
        """The version that answers now.

        Raises:
            RequestError: There is no such model, or it answers in another version.
        """
        slot = self._slot(name)
        model = slot.current
        if model is None:
            raise RequestError(404, f"model '{name}' is not loaded" + (f": {slot.reason}" if slot.reason else ""))
        if version is not None and version != model.version:
            raise RequestError(404, f"model '{name}' answers in version '{model.version}', not '{version[:80]}'")
        return model

    def list_loaded(self) -> list[ServedModel]:
        """Every version that answers now."""
        return [slot.current for slot in self._slots.values() if slot.current is not None]

    def index(self) -> list[dict[str, str]]:
        """Each model with its version, state and reason, as the protocol lists them."""
        rows = []
        for name, slot in self._slots.items():
            version = {} if slot.current is None else {"version": slot.current.version}
            state = "UNAVAILABLE" if slot.current is None else "READY"
            rows.append({"name": name, **version, "state": state, "reason": slot.reason})
        return rows

    def reason(self, name: str) -> str:
        """Why the newest version of a model does not answer; empty where it does."""
        return self._slot(name).reason

    def load(self, name: str) -> ServedModel:
        """Load the newest version beside the old one and let it take over.

        Raises:
            TuneforgeError: It cannot be loaded, or disagrees with its own recorded answers; the old one goes on.
        """
        if name not in self._slots:
            self._add_new_models()
        slot = self._slot(name)
        with slot.lock:
            slot.is_unloaded = False
            return self._load(slot)

    def unload(self, name: str) -> None:
        """Let a model answer no more."""
        slot = self._slot(name)
        with slot.lock:
            slot.current, slot.is_unloaded, slot.reason = None, True, "unloaded"
        LOG.info("model '%s' is unloaded", name)

    def start_polling(self, interval_s: float) -> None:
        """Follow the champions' pointers in a thread, until `close`."""
        self._poll_thread = threading.Thread(target=self._poll, args=(interval_s,), name="watch", daemon=True)
        self._poll_thread.start()

    def close(self) -> None:
        """Stop watching; a load that is going on ends first."""
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
        """Give every name that was promoted first while the server runs its place; the mapping is replaced whole."""
        with self._discover_lock:
            try:
                new = {each.name: _Slot(each) for each in self._discover() if each.name not in self._slots}
            except (TuneforgeError, OSError):  # a store that cannot be read now is read again
                return
            self._slots = {**self._slots, **new}
        for name in new:
            LOG.info("model '%s' is new in the store", name)

    def _load_if_changed(self, slot: _Slot) -> None:
        """Load what the pointer names, where that is new. What was refused is tried again only when it is asked for."""
        try:
            newest = slot.source.latest_version()
            if newest == slot.last_version:
                return
            with slot.lock:
                if not (slot.is_unloaded or newest == slot.last_version or self._stopped.is_set()):
                    self._load(slot)
        except Exception:  # noqa: BLE001 - logged where it was refused; a pointer that cannot be read is read again
            return

    def _load(self, slot: _Slot) -> ServedModel:
        name, old = slot.source.name, slot.current
        version = slot.source.latest_version()
        slot.last_version = version
        began = time.perf_counter()
        try:
            served = self._load_and_verify(slot.source, version)
        except Exception as error:
            slot.reason = f"version '{version or 'new'}' was refused: {_public_reason(error)}"
            going_on = "nothing answers" if old is None else f"version '{old.version}' goes on"
            LOG.error("model '%s': %s; %s (%s)", name, slot.reason, going_on, error, exc_info=_is_unexpected(error))
            self._on_load(name, False)
            raise
        slot.current, slot.reason = served, ""
        before = "" if old is None else f" in place of '{old.version}'"
        took = time.perf_counter() - began
        LOG.info("model '%s' answers in version '%s'%s (%s, %.1f s)", name, served.version, before, _via(served), took)
        self._on_load(name, True)
        return served

    def _load_and_verify(self, source: ModelSource, version: str) -> ServedModel:
        """A version that is loaded, warm, and agrees with its recorded answers."""
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
        """Seconds that a lone row takes, after every kernel has been used once, also at the largest batch."""

        def seconds(rows: int) -> float:
            example, began = model.example(rows), time.perf_counter()
            check_num_outputs(model.outputs(example), rows)
            return time.perf_counter() - began

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
    """Eight hexadecimal digits that stand for a bundle's or a run's content."""
    found = (directory / name for name in ("manifest.json", "model.safetensors"))
    content = next(path for path in found if path.is_file())
    return hashlib.sha256(content.read_bytes()).hexdigest()[:8]


def _via(model: ServedModel) -> str:
    return f"by {model.model.backend}"


def _public_reason(error: Exception) -> str:
    """Why a version was refused, as any client may read it: the log alone has paths."""
    if isinstance(error, HaltError):
        return "it disagrees with its own recorded answers"
    if isinstance(error, MissingDependencyError):
        return error.what
    return "its files are missing, damaged or unreadable"


def _is_unexpected(error: Exception) -> bool:
    return not isinstance(error, TuneforgeError)
