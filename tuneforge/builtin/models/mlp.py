"""`mlp`: a multilayer perceptron for rows of numbers.

Shapes: b in a batch, f features, k outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tuneforge import DataError, LayerGroup, Model, PluginError, component, hookimpl, option
from tuneforge.builtin.checks import FRACTION_OR_ZERO
from tuneforge.builtin.models.state_dict import load_matching_weights
from tuneforge.builtin.seeding import seeded_rng
from tuneforge.exporting import load_tensors
from tuneforge.plugin import Check

if TYPE_CHECKING:
    from tuneforge import Run

_WIDTHS = Check("numbers of at least 1", lambda widths: all(width >= 1 for width in widths))


@component(api=1)
class MLP:
    """A multilayer perceptron for rows of numbers: linear layers with ReLU, and a linear head."""

    hidden: tuple[int, ...] = option(default=(64, 64), help="Width of each hidden layer.", check=_WIDTHS)
    dropout: float = option(
        default=0.0,
        help="Dropout probability of each hidden layer.",
        check=FRACTION_OR_ZERO,
    )
    weights: Path | None = option(default=None, help="A safetensors file of such a network, such as that of a run.")

    @property
    def is_pretrained(self) -> bool:
        """True unless all weights are randomly initialized; then the default strategy is `full`."""
        return self.weights is not None

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Build the network for the data, with a layer group per hidden layer and the head.

        Raises:
            PluginError: There is a model already.
            DataError: The inputs are not rows of numbers.
            UsageError: The weights are not those of this network.
        """
        if model is not None:
            raise PluginError("mlp builds a model; it cannot adapt one", where="--model", fix="use it as --model")
        example = run.example
        if not isinstance(example, Tensor) or example.ndim != 2 or not example.is_floating_point():
            found = f"{example.dtype} {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
            raise DataError(
                "mlp takes one row of floats per sample",
                where="--model mlp",
                why=f"a batch is {found}",
                fix="use another model",
            )
        targets = run.data.targets
        if self.weights is not None and not run.restoring:
            return self._load_model(self.weights, example.shape[1])
        return self._build_model(example.shape[1], targets.num_outputs, targets.labels, seed=run.config.seed)

    def _build_model(self, num_features: int, num_outputs: int, labels: tuple[str, ...], *, seed: int) -> Model:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        with seeded_rng(seed):
            for number, width in enumerate(self.hidden, start=1):
                parts = [nn.Linear(num_features, width), nn.ReLU(), *[nn.Dropout(self.dropout)] * (self.dropout > 0)]
                layers[f"layer{number}"], num_features = nn.Sequential(*parts), width
            layers["head"] = nn.Linear(num_features, num_outputs)
        groups = [LayerGroup(name, (name,)) for name in layers]
        return Model(nn.Sequential(layers), groups=groups, head="head", labels=labels, pretrained=False)

    def _load_model(self, path: Path, num_features: int) -> Model:
        """Return a network with the weights of a file and their outputs, which the adapter `head` resizes."""
        tensors, metadata = load_tensors(path)
        labels = tuple(metadata.get("labels", ()))
        model = self._build_model(num_features, len(tensors.get("head.bias", labels)), labels, seed=0)
        fix = "give hidden the widths that the weights were made with, and data with the same features"
        load_matching_weights(model.module, tensors, path, kind="this mlp", fix=fix)
        return Model(model.module, groups=model.groups, head="head", labels=labels, pretrained_labels=labels)
