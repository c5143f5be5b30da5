"""`onnx`: a graph for any ONNX runtime, preprocessing included.

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

from tuneforge import ExportFormat, MissingDependencyError, PluginError, answers_of, component

if TYPE_CHECKING:
    from tuneforge import Forward, Inputable, Tuned

FILE = "model.onnx"
INPUT, OUTPUTS, ANSWERS = "input", "outputs", "answers"
"""Names in the graph: of a single stored input, of what targets describe, and of probabilities or numbers."""


@component(api=1)
class Onnx(ExportFormat):
    """A graph from stored inputs (uint8 pixels, say) to probabilities or numbers; needs onnxruntime alone."""

    backend = "onnxruntime"

    def write(self, tuned: Tuned, folder: Path) -> None:
        """Trace with a batch of two, whose axis is dynamic.

        Raises:
            MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
            PluginError: The network cannot be written as a graph for any batch.
        """
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _imported(package)
        stored = tuned.run.data.train.fetch(torch.tensor([0, 0]))
        name = type(tuned.model.module).__name__
        try:
            program = _traced(tuned, dict(stored) if isinstance(stored, Mapping) else {"": stored})
        except Exception as error:
            raise _refused(name, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
        fixed = [given.shape[0] for given in program.model.graph.inputs if isinstance(given.shape[0], int)]
        if fixed:
            raise _refused(name, f"its graph takes a batch of {fixed[0]} and no other")
        program.save(folder / FILE)

    def opened(self, folder: Path, *, device_name: str) -> Forward:
        """Open the graph in onnxruntime, on the CPU."""
        del device_name  # onnxruntime's CPU package is what the extra installs
        runtime = _imported("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])

        def forward(stored: Inputable) -> Tensor:
            named = stored if isinstance(stored, Mapping) else {INPUT: stored}
            (outputs,) = session.run([OUTPUTS], {name: tensor.numpy() for name, tensor in named.items()})
            return torch.from_numpy(outputs)

        return forward


class Graph(nn.Module):
    """From stored inputs to outputs and answers, both (b, k).

    Args:
        tuned: On the CPU, in float32.
        names: Of the stored inputs; "" where there is one.
    """

    def __init__(self, tuned: Tuned, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = tuned.model.module
        self._tuned, self._names = tuned, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and answers."""
        stored: Inputable = tensors[0] if self._names == ("",) else dict(zip(self._names, tensors, strict=True))
        outputs: Tensor = self._tuned.run.forward(self._tuned.inputs.ready(stored)).float()
        return outputs, answers_of(self._tuned.targets, outputs)


def _traced(tuned: Tuned, stored: dict[str, Tensor]) -> Any:
    """The graph of a batch of stored inputs, for any batch."""
    batch = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used", UserWarning)  # of several inputs
        return torch.onnx.export(
            Graph(tuned, tuple(stored)).eval(),
            tuple(stored.values()),
            dynamo=True,
            input_names=[name or INPUT for name in stored],
            output_names=[OUTPUTS, ANSWERS],
            dynamic_shapes=(tuple(batch for _ in stored),),
            verbose=False,
        )


def _refused(name: str, why: str) -> PluginError:
    return PluginError(f"{name} cannot be written as ONNX", why=why, fix="export it as safetensors")


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingDependencyError(
            f"{package} is not installed", where="--to onnx", fix="pip install 'tuneforge[export]'"
        ) from None
