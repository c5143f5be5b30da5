"""Export of a finished run: bundles, formats, the parity check, and reading a bundle again.

Names are imported when first used.
"""

from tuneforge.lazy_names import lazy_names

_NAMES_OF_MODULE = {
    "tuneforge.engine.data.dataset": (
        "concatenate_inputs",
        "stack_inputs",
    ),
    "tuneforge.engine.storage.atomic": (
        "atomic_write",
        "fsync_path",
        "write_json",
    ),
    "tuneforge.engine.storage.run_files": ("read_json",),
    "tuneforge.engine.storage.safetensors_io": (
        "load_tensors",
        "save_tensors",
    ),
    "tuneforge.exporting.atomic_dir": (
        "atomic_directory",
        "publish",
        "verify_manifest",
    ),
    "tuneforge.exporting.bundle": (
        "InferenceModel",
        "load_bundle",
        "load_inference_model",
    ),
    "tuneforge.exporting.exporter": ("export",),
    "tuneforge.exporting.formats": (
        "ExportFormat",
        "Forward",
        "compute_predictions",
        "make_forward",
    ),
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES_OF_MODULE)
