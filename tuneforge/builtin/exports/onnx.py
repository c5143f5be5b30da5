"""`onnx`: a graph for any ONNX runtime, with preprocessing.

Shapes: b in a batch, k outputs.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuneforge import MissingDependencyError, PluginError, component
from tuneforge.exporting import ExportFormat, compute_predictions

if TYPE_CHECKING:
    from tuneforge import Predictor, TensorTree
    from tuneforge.exporting import Forward

ONNX_FILE = "model.onnx"
INPUT, OUTPUTS, PREDICTIONS = "input", "outputs", "predictions"
"""Names in the graph: a single stored input, the model outputs, and probabilities or numbers."""


@component(api=1)
class OnnxFormat(ExportFormat):
    """A graph from stored inputs (such as uint8 pixels) to probabilities or numbers; needs only onnxruntime."""

    backend = "onnxruntime"

    def write(self, predictor: Predictor, directory: Path) -> None:
        """Export with a batch of two and a dynamic batch axis.

        Raises:
            MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
            PluginError: The network has no graph for any batch size, or onnxruntime cannot run it: bfloat16 weights.
        """
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _import_package(package)
        stored = predictor.run.data.train.fetch(torch.tensor([0, 0]))
        name = type(predictor.model.module).__name__
        try:
            program = _trace(predictor, dict(stored) if isinstance(stored, Mapping) else {"": stored})
        except Exception as error:
            raise _export_error(name, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
        fixed = [given.shape[0] for given in program.model.graph.inputs if isinstance(given.shape[0], int)]
        if fixed:
            raise _export_error(name, f"its graph takes only a batch of {fixed[0]}")
        program.save(directory / ONNX_FILE)
        try:
            self.load(directory, device_name="cpu")
        except Exception as error:
            raise _export_error(name, f"onnxruntime cannot run its graph: {error}") from error

    def load(self, directory: Path, *, device_name: str) -> Forward:
        """Open the graph in onnxruntime on the CPU."""
        del device_name  # the extra `export` installs the CPU package of onnxruntime
        runtime = _import_package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(directory / ONNX_FILE, options, providers=["CPUExecutionProvider"])

        def forward(stored: TensorTree) -> Tensor:
            named = stored if isinstance(stored, Mapping) else {INPUT: stored}
            (outputs,) = session.run([OUTPUTS], {name: tensor.numpy() for name, tensor in named.items()})
            return torch.from_numpy(outputs)

        return forward


class ExportModule(nn.Module):
    """A module from stored inputs to outputs and predictions, both (b, k).

    Args:
        predictor: Predictor on the CPU, in fp32.
        names: Names of the stored inputs; "" for a single one.
    """

    def __init__(self, predictor: Predictor, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = predictor.model.module
        self._predictor, self._names = predictor, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and predictions."""
        stored: TensorTree = tensors[0] if self._names == ("",) else dict(zip(self._names, tensors, strict=True))
        outputs: Tensor = self._predictor.run.forward(self._predictor.inputs.preprocess(stored)).float()
        return outputs, compute_predictions(self._predictor.targets, outputs)


def _trace(predictor: Predictor, stored: dict[str, Tensor]) -> Any:
    """Return the graph of a batch of stored inputs, for any batch size."""
    batch = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used", UserWarning)  # with several inputs
        return torch.onnx.export(
            ExportModule(predictor, tuple(stored)).eval(),
            tuple(stored.values()),
            dynamo=True,
            input_names=[name or INPUT for name in stored],
            output_names=[OUTPUTS, PREDICTIONS],
            dynamic_shapes=(tuple(batch for _ in stored),),
            verbose=False,
        )


def _export_error(name: str, why: str) -> PluginError:
    return PluginError(f"{name} cannot be written as ONNX", why=why, fix="export it as safetensors")


def _import_package(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingDependencyError(
            f"{package} is not installed", where="--format onnx", fix="pip install 'tuneforge[export]'"
        ) from None
