"""Public names for type checkers; `__init__.py` imports them when first used."""

from tuneforge.engine.data.dataset import concatenate_inputs as concatenate_inputs
from tuneforge.engine.data.dataset import stack_inputs as stack_inputs
from tuneforge.engine.storage.atomic import atomic_write as atomic_write
from tuneforge.engine.storage.atomic import fsync_path as fsync_path
from tuneforge.engine.storage.atomic import write_json as write_json
from tuneforge.engine.storage.run_files import read_json as read_json
from tuneforge.engine.storage.safetensors_io import load_tensors as load_tensors
from tuneforge.engine.storage.safetensors_io import save_tensors as save_tensors
from tuneforge.exporting.atomic_dir import atomic_directory as atomic_directory
from tuneforge.exporting.atomic_dir import publish as publish
from tuneforge.exporting.atomic_dir import verify_manifest as verify_manifest
from tuneforge.exporting.bundle import InferenceModel as InferenceModel
from tuneforge.exporting.bundle import load_bundle as load_bundle
from tuneforge.exporting.bundle import load_inference_model as load_inference_model
from tuneforge.exporting.exporter import export as export
from tuneforge.exporting.formats import ExportFormat as ExportFormat
from tuneforge.exporting.formats import Forward as Forward
from tuneforge.exporting.formats import compute_predictions as compute_predictions
from tuneforge.exporting.formats import make_forward as make_forward

__all__: list[str]
