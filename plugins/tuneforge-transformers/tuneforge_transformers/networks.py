"""Networks from the classes of the transformers library that take tensors and return logits.

The library drops an attention mask without padding. The outputs for a text would then depend on the rest of its batch,
and a trace would differ from the model, so the mask is always passed as an attention bias.

Shapes: b texts in a batch, t tokens of each, k outputs.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tuneforge import PluginError, UsageError
from tuneforge_transformers.pretrained import parse_config, silence_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

InputKind = Literal["text", "image"]
Pooling = Literal["own", "mean"]


class MeanPoolingClassifier(nn.Module):
    """An encoder, the mean of its last hidden states over the tokens that are not padding, and a linear head.

    Args:
        encoder: A base model of transformers; its attribute has the library's name, such as `bert`.
        num_outputs: Number of outputs k.
    """

    def __init__(self, encoder: PreTrainedModel, num_outputs: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.base_model_prefix = encoder.base_model_prefix
        self.add_module(self.base_model_prefix, encoder)
        self.dropout = nn.Dropout(_get_dropout(encoder.config))
        self.classifier = init_head(encoder.config.hidden_size, num_outputs)
        self.uses_attention_bias = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute logits (b, k) from ids and mask (b, t)."""
        mask = _make_attention_bias(attention_mask) if self.uses_attention_bias else attention_mask
        hidden = self.get_submodule(self.base_model_prefix)(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weights = attention_mask.to(hidden.dtype).unsqueeze(2)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits


def build_text_network(config: str, *, num_outputs: int, pooling: Pooling) -> nn.Module:
    """Build a randomly initialized network for texts."""
    described = parse_config(config)
    if pooling == "mean":
        base = _find_model_class(described, "base")
        network: nn.Module = MeanPoolingClassifier(base(described, **_pooler_arguments(base)), num_outputs)
    else:
        network = _build_from_config(_make_text_class(_find_model_class(described, "text")), described, num_outputs)
    return _detect_bias_support(network)


def build_image_network(config: str, *, num_outputs: int) -> nn.Module:
    """Build a randomly initialized network for images."""
    described = parse_config(config)
    return _build_from_config(_make_image_class(_find_model_class(described, "image")), described, num_outputs)


def load_network(
    folder: Path, config: str, kind: InputKind, *, num_outputs: int, pooling: Pooling
) -> tuple[nn.Module, set[str]]:
    """Load a network from a directory.

    Args:
        folder: Directory with .safetensors weights.
        config: Content of its config.json.
        kind: Kind of input.
        num_outputs: Number of outputs of a mean-pooled network, whose head is randomly initialized. Other networks have
            the outputs of their weights.
        pooling: How the hidden states of a text become its features.

    Returns:
        The network, and the names of the tensors that the weights lack.

    Raises:
        UsageError: The weights do not fit the configuration.
    """
    described = parse_config(config)
    if pooling == "mean":
        base = _find_model_class(described, "base")
        encoder, missing = _load_pretrained(base, folder, described, **_pooler_arguments(base))
        network: nn.Module = MeanPoolingClassifier(encoder, num_outputs)
        prefix = encoder.base_model_prefix
        return _detect_bias_support(network), {f"{prefix}.{name}" for name in missing} | {
            "classifier.weight",
            "classifier.bias",
        }
    wrap = _make_text_class if kind == "text" else _make_image_class
    network, missing = _load_pretrained(wrap(_find_model_class(described, kind)), folder, described)
    return (_detect_bias_support(network) if kind == "text" else network), missing


def init_head(num_features: int, num_outputs: int) -> nn.Linear:
    """Return a linear layer whose initial outputs are near 0, so that the initial predictions are nearly uniform."""
    head = nn.Linear(num_features, num_outputs)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def find_head_path(module: nn.Module) -> str:
    """Return the path of the head: the last linear layer outside the base model.

    Raises:
        PluginError: There is no such layer.
    """
    base = get_base_prefix(module)
    linear = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not f"{name}.".startswith(f"{base}.")
    ]
    if not linear:
        raise PluginError(
            f"{type(module).__name__} has no linear layer after its base model",
            where="--model transformers",
            fix="use a model whose classification head ends in one",
        )
    return str(linear[-1])


def get_base_prefix(module: nn.Module) -> str:
    """Return the path of the base model, which is everything but the head."""
    return str(getattr(module, "base_model_prefix", ""))


def _build_from_config(cls: Any, config: Any, num_outputs: int) -> nn.Module:
    config.num_labels = num_outputs
    with silence_transformers():
        module: nn.Module = cls._from_config(config, dtype=torch.float32)
    return module


def _load_pretrained(cls: Any, folder: Path, config: Any, **arguments: Any) -> tuple[Any, set[str]]:
    """Load a model from safetensors weights; also return the names of the tensors that they lack."""
    from safetensors import SafetensorError

    with silence_transformers():
        try:
            model, info = cls.from_pretrained(
                folder, config=config, use_safetensors=True, local_files_only=True, trust_remote_code=False,
                dtype=torch.float32, output_loading_info=True, **arguments,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UsageError(
                f"the weights in '{folder}' cannot be read",
                where="--model.pretrained",
                why=str(error).strip().partition("\n")[0],
                fix="give a folder whose config.json and weights belong together",
            ) from None
    return model, set(info["missing_keys"])


def _find_model_class(config: Any, kind: Literal["text", "image", "base"]) -> Any:
    from transformers.models.auto import modeling_auto

    mapping = {
        "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        "base": modeling_auto.MODEL_MAPPING,
    }[kind]
    if type(config) not in mapping:
        what = {"text": "texts", "image": "images", "base": "hidden states"}[kind]
        raise UsageError(
            f"transformers has no {config.model_type} that classifies {what}",
            where="--model transformers",
            why="the data and the model must be of one kind",
            fix="name another model, or other --data",
        )
    return mapping[type(config)]


def _make_text_class(cls: Any) -> Any:
    """Return a subclass that takes ids and mask and returns logits only."""

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor) -> Any:
        mask = _make_attention_bias(attention_mask) if self.uses_attention_bias else attention_mask
        return cls.forward(self, input_ids=input_ids, attention_mask=mask).logits

    return type(cls.__name__, (cls,), {"forward": forward, "uses_attention_bias": False, "__module__": cls.__module__})


def _make_image_class(cls: Any) -> Any:
    """Return a subclass that takes pixels and returns logits only."""

    def forward(self: Any, pixel_values: Tensor) -> Any:
        return cls.forward(self, pixel_values=pixel_values).logits

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _detect_bias_support(network: Any) -> nn.Module:
    """Set `uses_attention_bias` to whether the network returns the same outputs for a bias as for the mask."""
    ids = torch.arange(10, 18).repeat(2, 1) % network.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    training = network.training
    network.eval()
    with torch.no_grad():
        expected = network(ids, mask)
        network.uses_attention_bias = True
        try:
            network.uses_attention_bias = torch.allclose(network(ids, mask), expected, rtol=1e-4, atol=1e-5)
        except Exception:  # noqa: BLE001 - an architecture that takes no bias may raise anything
            network.uses_attention_bias = False
    module: nn.Module = network.train(training)
    return module


def _make_attention_bias(mask: Tensor) -> Tensor:
    """Return the bias of the attention scores (b, 1, 1, t): 0, or the lowest fp32 number at padding."""
    lowest = torch.finfo(torch.float32).min
    return (1.0 - mask[:, None, None, :].to(torch.float32)) * lowest


def _pooler_arguments(cls: Any) -> dict[str, bool]:
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls.__init__).parameters else {}


def _get_dropout(config: Any) -> float:
    """Return the dropout probability before the head, whose name differs between architectures."""
    table = json.loads(config.to_json_string(use_diff=False))
    names = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout")
    return float(next((table[name] for name in names if table.get(name) is not None), 0.1))
