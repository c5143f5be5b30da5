"""Export: a tuned model leaves its run as a bundle, once it is proved to answer as before.

Everything is written into a temporary folder, which gets its name at the very end; a refusal leaves nothing behind.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import torch

import tuneforge
from tuneforge.engine.data.dataset import Data, Split
from tuneforge.engine.session.predictor import Tuned, load, with_data
from tuneforge.engine.storage import run_dir as names
from tuneforge.errors import DataError, UsageError
from tuneforge.exporting import model_card as card
from tuneforge.exporting import reference_outputs as evidence
from tuneforge.exporting.atomic_dir import building
from tuneforge.exporting.bundle import BUNDLE, CARD, FORMAT, format_of
from tuneforge.exporting.formats import ExportFormat, forward_of
from tuneforge.exporting.parity import Parity, require_parity
from tuneforge.exporting.thumbnails import write_pictures
from tuneforge.plugin import registry

_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "onnx", "onnxscript", "onnxruntime")


def export(
    run: str | Path,
    *,
    to: Sequence[str] = ("onnx",),
    out: str | Path | None = None,
    name: str = "",
    data: Any = None,
    model: Any = None,
    worlds: Sequence[Split] = (),
    pictures: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a bundle of a finished run.

    Args:
        run: The run's folder.
        to: Export formats by name; each is proved by itself.
        out: The bundle's folder, which must not exist or be empty; None: `bundles/` and the run's name.
        name: Of the model; by default the run's.
        data: The run's data, where it was given them as objects; None prepares them again.
        model: The module, where the run was given one as an object.
        worlds: Further samples, not trained on, such as what production sent: drift is measured from them too.
        pictures: A folder for the test split's pictures as files, as they are stored; None writes none.
        say: Where sentences for the user go.

    Returns:
        The bundle's folder.

    Raises:
        ParityError: What was written does not answer as the tuned model.
        DataError: The data is no longer what the run was tested on.
        MissingDependencyError: A package that the format needs is not installed.
        PluginError: The model cannot be written in that form.
        FolderError: The run is not done, or there is something at `out`.
    """
    run = Path(run)
    place = Path(out) if out is not None else Path("bundles") / run.absolute().name
    if not to or len(set(to)) != len(to):
        raise UsageError("each export format is named once", where="--to", fix="name one or more formats")
    formats = {each: format_of(each) for each in to}
    tuned = load(run, model=model, device_name="cpu")
    found = prepared(tuned, data)
    with building(place) as folder:
        written = {each: _written(each, form, run, model, found, folder, say) for each, form in formats.items()}
        _remember(folder, tuned, found, worlds)
        _describe(folder, _record(tuned, name or run.absolute().name, formats, written))
        if pictures is not None:
            write_pictures(found.test, tuned.targets, Path(pictures))
    return place


def prepared(tuned: Tuned, data: Any = None) -> Data:
    """The data that a run was tuned and tested on.

    Raises:
        DataError: They have changed since.
    """
    found = with_data(tuned, data=data).data
    recorded = names.read_json(tuned.path / names.MODEL)["fingerprints"]
    changed = [each for each in ("train", "test") if getattr(found, each).fingerprint() != recorded[each]]
    if changed:
        raise DataError(
            f"the {' and the '.join(changed)} split is not what the run was made with",
            where=str(tuned.path),
            why="its fingerprint is another one than in model.json, so the run's figures say nothing about it",
            fix="bring the data back as it was, or tune again",
        )
    return found


def sentence(parity: Parity) -> str:
    """How the comparison went, for people."""
    ties = f", {parity.near_ties} near-ties" if parity.near_ties else ""
    return (
        f"answers as the tuned model does, {parity.samples} test samples in batches of "
        f"{', '.join(map(str, parity.batches))}: off by at most {parity.largest:.1e}{ties}"
    )


def _written(
    name: str, form: ExportFormat, run: Path, model: Any, data: Data, folder: Path, say: Callable[[str], None]
) -> Parity:
    """Write one form, open it again and compare it with the run, freshly loaded."""
    tuned = load(run, model=model, device_name="cpu")
    if form.float32:
        plain = {"precision": "float32", "memory_format": "contiguous"}
        tuned.run.config = attrs.evolve(tuned.run.config, **plain)  # type: ignore[arg-type]  # of some other field
        tuned.model.module.to(memory_format=torch.contiguous_format)
    form.write(tuned, folder)
    opened = form.opened(folder, device_name="cpu")
    parity = require_parity(name, forward_of(tuned), opened, tuned.targets, data.test)
    say(f"{name}: {sentence(parity)}")
    return parity


def _remember(folder: Path, tuned: Tuned, found: Data, worlds: Sequence[Split]) -> None:
    known = evidence.gathered(forward_of(tuned), tuned.targets, train=found.train, test=found.test, worlds=worlds)
    known.save(folder)


def _describe(folder: Path, record: Mapping[str, Any]) -> None:
    names.write_json(folder / BUNDLE, record)
    names.write_whole(folder / CARD, card.text(record))


def _record(tuned: Tuned, name: str, formats: dict[str, ExportFormat], written: dict[str, Parity]) -> dict[str, Any]:
    """The content of `bundle.json`."""
    report, model = (names.read_json(tuned.path / each) for each in (names.REPORT, names.MODEL))
    told = names.read_json(tuned.path / names.RUN)
    return {
        "bundle": FORMAT,
        "tuneforge": tuneforge.__version__,
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "formats": {each: _form(each, form, written[each]) for each, form in formats.items()},
        **{key: model[key] for key in ("inputs", "targets", "stored", "labels", "fingerprints", "changes", "notes")},
        "figures": report["splits"],
        **{key: report[key] for key in ("headline", "samples", "strategy")},
        "run": {"folder": tuned.path.absolute().name, **told},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _form(name: str, form: ExportFormat, parity: Parity) -> dict[str, Any]:
    entry = registry.entry_for("export", type(form))
    shipped_by = {"distribution": entry.distribution, "version": entry.version}
    return {"backend": form.backend, **shipped_by, "parity": {**attrs.asdict(parity), "passed": parity.passed}}


def _versions() -> dict[str, str]:
    """Packages that have a hand in the answers, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
