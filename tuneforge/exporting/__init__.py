"""Export of a finished run: bundles, formats, the parity check, loading for inference, and reference data.

Names are imported when first used.
"""

from tuneforge.lazy_names import lazy_names

_NAMES_OF_MODULE = {
    "tuneforge.engine.data.dataset": (
        "concatenate_inputs",
        "named_tensors",
        "stack_inputs",
    ),
    "tuneforge.engine.loop.evaluation": ("compute_head_features",),
    "tuneforge.engine.storage.atomic": (
        "atomic_write",
        "fsync_path",
        "nonfinite_to_none",
        "write_json",
    ),
    "tuneforge.engine.storage.run_files": (
        "is_run_dir",
        "read_json",
    ),
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
        "BUNDLE",
        "InferenceModel",
        "list_backends",
        "load_bundle",
        "load_inference_model",
        "MODEL_CARD",
    ),
    "tuneforge.exporting.data_preparation": (
        "compute_metrics",
        "prepare_bundle_data",
        "prepare_data",
        "prepare_run_data",
    ),
    "tuneforge.exporting.exporter": ("export",),
    "tuneforge.exporting.formats": (
        "compute_predictions",
        "ExportFormat",
        "Forward",
        "make_forward",
    ),
    "tuneforge.exporting.parity": ("ParityError",),
    "tuneforge.exporting.reference_outputs": (
        "ReferenceData",
        "summarize_inputs",
    ),
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES_OF_MODULE)
