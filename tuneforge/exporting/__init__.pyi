"""Public names for type checkers; `__init__.py` imports them when first used."""

from tuneforge.engine.data.dataset import concatenate_inputs as concatenate_inputs
from tuneforge.engine.data.dataset import named_tensors as named_tensors
from tuneforge.engine.data.dataset import stack_inputs as stack_inputs
from tuneforge.engine.loop.evaluation import compute_head_features as compute_head_features
from tuneforge.engine.storage.atomic import atomic_write as atomic_write
from tuneforge.engine.storage.atomic import fsync_path as fsync_path
from tuneforge.engine.storage.atomic import nonfinite_to_none as nonfinite_to_none
from tuneforge.engine.storage.atomic import write_json as write_json
from tuneforge.engine.storage.run_files import is_run_dir as is_run_dir
from tuneforge.engine.storage.run_files import read_json as read_json
from tuneforge.engine.storage.safetensors_io import load_tensors as load_tensors
from tuneforge.engine.storage.safetensors_io import save_tensors as save_tensors
from tuneforge.exporting.atomic_dir import atomic_directory as atomic_directory
from tuneforge.exporting.atomic_dir import publish as publish
from tuneforge.exporting.atomic_dir import verify_manifest as verify_manifest
from tuneforge.exporting.bundle import BUNDLE as BUNDLE
from tuneforge.exporting.bundle import MODEL_CARD as MODEL_CARD
from tuneforge.exporting.bundle import InferenceModel as InferenceModel
from tuneforge.exporting.bundle import list_backends as list_backends
from tuneforge.exporting.bundle import load_bundle as load_bundle
from tuneforge.exporting.bundle import load_inference_model as load_inference_model
from tuneforge.exporting.data_preparation import compute_metrics as compute_metrics
from tuneforge.exporting.data_preparation import prepare_bundle_data as prepare_bundle_data
from tuneforge.exporting.data_preparation import prepare_data as prepare_data
from tuneforge.exporting.data_preparation import prepare_run_data as prepare_run_data
from tuneforge.exporting.exporter import export as export
from tuneforge.exporting.formats import ExportFormat as ExportFormat
from tuneforge.exporting.formats import Forward as Forward
from tuneforge.exporting.formats import compute_predictions as compute_predictions
from tuneforge.exporting.formats import make_forward as make_forward
from tuneforge.exporting.parity import ParityError as ParityError
from tuneforge.exporting.reference_outputs import ReferenceData as ReferenceData
from tuneforge.exporting.reference_outputs import summarize_inputs as summarize_inputs

__all__: list[str]
