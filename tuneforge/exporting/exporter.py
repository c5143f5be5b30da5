"""Export of a finished run as a bundle, after a parity check of the exported model.

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

import tuneforge
from tuneforge.engine.data.dataset import Data, Split
from tuneforge.engine.session.predictor import Predictor, load
from tuneforge.engine.storage import run_dir as names
from tuneforge.errors import UsageError
from tuneforge.exporting import model_card as card
from tuneforge.exporting import reference_outputs
from tuneforge.exporting.atomic_dir import atomic_directory
from tuneforge.exporting.bundle import BUNDLE, LAYOUT_VERSION, MODEL_CARD, load_format
from tuneforge.exporting.data_preparation import prepare_run_data
from tuneforge.exporting.formats import ExportFormat, make_forward
from tuneforge.exporting.parity import ParityResult, require_parity
from tuneforge.exporting.thumbnails import write_images
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
    reference_splits: Sequence[Split] = (),
    image_dir: str | Path | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a bundle of a finished run.

    Args:
        run: The run directory.
        to: Export formats by name; each is checked separately.
        out: The bundle directory, which must be new or empty; None is `bundles/` and the name of the run.
        name: The name of the model; by default that of the run.
        data: The data of the run, if it was given as an object; None prepares it again.
        model: The module, if the run was given it as an object.
        reference_splits: Further samples, not trained on, such as what production sent: drift is measured from them
            too.
        image_dir: A directory to write the images of the test split to, as they are stored; None writes none.
        log: Called with each log line.

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
    bundle_dir = Path(out) if out is not None else Path("bundles") / run.absolute().name
    if not to or len(set(to)) != len(to):
        raise UsageError("each export format is named once", where="--format", fix="name one or more formats")
    formats = {each: load_format(each) for each in to}
    predictor = load(run, model=model, device_name="cpu")
    prepared = _with_test(prepare_run_data(predictor, data))
    with atomic_directory(bundle_dir) as directory:
        parities = {
            each: _write_and_verify(each, form, run, model, prepared, directory, log) for each, form in formats.items()
        }
        _save_reference_data(directory, predictor, prepared, reference_splits)
        _write_record_and_card(directory, _build_record(predictor, name or run.absolute().name, formats, parities))
        if image_dir is not None:
            write_images(prepared.test, predictor.targets, Path(image_dir))
    return bundle_dir


def _with_test(data: Data) -> Data:
    """Return the data with the training split in place of an empty test split, for the comparison of outputs."""
    return data if len(data.test) else attrs.evolve(data, test=data.train)


def describe_parity(parity: ParityResult) -> str:
    """Format the result of the parity check."""
    ties = f", {parity.num_near_ties} near-ties" if parity.num_near_ties else ""
    return (
        f"answers as the tuned model does, {parity.num_samples} test samples in batches of "
        f"{', '.join(map(str, parity.batch_sizes))}: off by at most {parity.max_deviation:.1e}{ties}"
    )


def _write_and_verify(
    name: str, form: ExportFormat, run: Path, model: Any, data: Data, directory: Path, log: Callable[[str], None]
) -> ParityResult:
    """Write one format, load it and compare it with the run."""
    predictor = load(run, model=model, device_name="cpu")
    if form.float32:
        predictor.run.forward_pass.precision = "fp32"
        predictor.run.forward_pass.set_memory_format(predictor.model.module, channels_last=False)
    form.write(predictor, directory)
    opened = form.load(directory, device_name="cpu")
    parity = require_parity(name, make_forward(predictor), opened, predictor.targets, data.test)
    log(f"{name}: {describe_parity(parity)}")
    return parity


def _save_reference_data(directory: Path, predictor: Predictor, data: Data, reference_splits: Sequence[Split]) -> None:
    reference_data = reference_outputs.build_reference_data(
        make_forward(predictor), predictor.targets, train=data.train, test=data.test, reference_splits=reference_splits
    )
    reference_data.save(directory)


def _write_record_and_card(directory: Path, record: Mapping[str, Any]) -> None:
    names.write_json(directory / BUNDLE, record)
    names.atomic_write(directory / MODEL_CARD, card.render_card(record))


def _build_record(
    predictor: Predictor, name: str, formats: dict[str, ExportFormat], parities: dict[str, ParityResult]
) -> dict[str, Any]:
    """Return the content of `bundle.json`."""
    report, model = (names.read_json(predictor.run_dir / each) for each in (names.REPORT, names.MODEL))
    run_record = names.read_json(predictor.run_dir / names.RUN)
    return {
        "bundle": LAYOUT_VERSION,
        "tuneforge": tuneforge.__version__,
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "formats": {each: _build_format_record(each, form, parities[each]) for each, form in formats.items()},
        **{
            key: model[key]
            for key in ("inputs", "targets", "input_specs", "labels", "fingerprints", "changes", "notes")
        },
        "metrics": report["splits"],
        **{key: report[key] for key in ("primary_metrics", "num_samples", "strategy")},
        "run": {"run_dir": predictor.run_dir.absolute().name, **run_record},
        "versions": {"python": platform.python_version(), **_package_versions()},
    }


def _build_format_record(name: str, form: ExportFormat, parity: ParityResult) -> dict[str, Any]:
    entry = registry.find_entry_of_class("export", type(form))
    shipped_by = {"distribution": entry.distribution, "version": entry.version}
    return {"backend": form.backend, **shipped_by, "parity": {**attrs.asdict(parity), "passed": parity.passed}}


def _package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect predictions."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
