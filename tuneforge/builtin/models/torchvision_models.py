"""Classification models of torchvision, with weights and layer groups."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from tuneforge import (
    LayerGroup,
    Model,
    PluginError,
    UnknownNameError,
    UsageError,
    component,
    hookimpl,
    option,
)
from tuneforge.builtin.models.heads import get_head_layer, resize_head
from tuneforge.builtin.models.torchvision_weights import PretrainedWeights, download_weights, find_weights, is_file
from tuneforge.builtin.seeding import seeded_rng
from tuneforge.errors import suggest_name

if TYPE_CHECKING:
    from tuneforge import Run
    from tuneforge.plugin import ImagePreprocessing

StateDict = dict[str, Tensor]

LAYER_GROUPS_BY_CLASS: Mapping[str, tuple[str, ...]] = {
    "AlexNet": ("features/", "classifier.*"),
    "ConvNeXt": ("features.*", "head=classifier.0"),
    "DenseNet": (
        "stem=features.conv0,features.norm0",
        "block1=features.denseblock1,features.transition1",
        "block2=features.denseblock2,features.transition2",
        "block3=features.denseblock3,features.transition3",
        "block4=features.denseblock4,features.norm5",
    ),
    "EfficientNet": ("features.*",),
    "GoogLeNet": ("stem=conv1,conv2,conv3", "inception*"),
    "Inception3": (
        "stem=Conv2d_1a_3x3,Conv2d_2a_3x3,Conv2d_2b_3x3,Conv2d_3b_1x1,Conv2d_4a_3x3",
        "Mixed_*",
    ),
    "MNASNet": (
        "stem=layers.0,layers.1,layers.3,layers.4,layers.6,layers.7",
        "layers.[89]",
        "layers.1[0-3]",
        "top=layers.14,layers.15",
    ),
    "MaxVit": ("stem", "blocks.*", "classifier=classifier.2,classifier.3"),
    "MobileNetV2": ("features.*",),
    "MobileNetV3": ("features.*", "classifier.*"),
    "RegNet": ("stem", "trunk_output.*"),
    "ResNet": ("stem=conv1,bn1", "layer*"),
    "ShuffleNetV2": ("stem=conv1", "stage*", "conv5"),
    "SqueezeNet": ("features.*",),
    "SwinTransformer": ("features.*", "head=norm"),
    "VGG": ("features/", "classifier.*"),
    "VisionTransformer": (
        "embeddings=class_token,conv_proj,encoder.pos_embedding",
        "encoder.layers.*",
        "head=encoder.ln",
    ),
}
"""Layer groups from input to output, by class of the network.

`path` is a group; `path.*` (a glob) is a group for each child with parameters; `path/` one for each stage between two
poolings; `name=path,path` merges several into one; `head=` adds paths to the group of the head, such as a last norm.
"""

_MIN_TENSORS = 16  # those of the smallest network, alexnet
_AUXILIARY_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")
_OLD_DENSENET_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")


@component(api=1)
class TorchvisionModel:
    """A classification model of torchvision, pretrained by default.

    Weights by name are found in torch's folder of checkpoints, as a .safetensors file of `tuneforge import` or as
    torch's own .pth file, which is read in a sandbox; otherwise they are downloaded.
    """

    arch: str = option(default="resnet18", help="Name of the architecture in torchvision.models.")
    weights: str = option(
        default="DEFAULT",
        help="`DEFAULT`, a name that torchvision gives to weights of the architecture, such as `IMAGENET1K_V2`, a "
        ".safetensors file, or `none` for random weights.",
    )

    @staticmethod
    def find_local_weights(arch: str) -> str | None:
        """Return where pretrained weights are on this machine, as one phrase, or None if they would be downloaded.

        Raises:
            UnknownNameError: torchvision has no such architecture.
        """
        _require_known_arch(arch)
        found = find_weights(arch, "DEFAULT")
        return None if found is None else found.source

    @property
    def is_pretrained(self) -> bool:
        """True unless all weights are randomly initialized; then the default strategy is `full`."""
        return self.weights != "none"

    @hookimpl
    def model_inputs(self, run: Run) -> ImagePreprocessing | None:
        """Return the evaluation transform of the weights, or of the default ones for a file; None for random weights.

        Raises:
            UnknownNameError: torchvision has no such architecture, or no such weights of it.
            UsageError: The file holds the weights of another network.
            UnsafeFileError: The weights are pickled.
            TryAgainError: The weights cannot be downloaded.
        """
        _require_known_arch(self.arch)
        if self.weights == "none" or (run.restoring and is_file(self.weights) and not Path(self.weights).exists()):
            return None
        weights = self._get_weights(run)
        if weights is None:
            return None
        if is_file(self.weights):
            _check_fit(self.arch, weights.read()[0])
        return weights.describe_preprocessing()

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Build the network with the head of its weights, which the adapter `head` resizes to the data.

        Raises:
            PluginError: There is a model already.
            UnknownNameError: torchvision has no such architecture.
            UsageError: It cannot take images of this size, or the weights are not those of this network.
            UnsafeFileError: The weights are pickled.
            TryAgainError: The weights cannot be downloaded.
        """
        if model is not None:
            raise PluginError(
                "torchvision builds a model; it cannot adapt one",
                where="--model",
                fix="use it as --model, and adapters such as head as --adapt",
            )
        _require_known_arch(self.arch)
        side = _get_image_size(run)
        weights = None if run.restoring or self.weights == "none" else self._get_weights(run)
        state, labels = (None, ()) if weights is None else weights.read()
        with seeded_rng(run.config.seed):
            module = _build_network(self.arch, run.data.targets.num_outputs, side, pretrained=self.weights != "none")
        if not run.restoring:
            _require_fitting_size(module, self.arch, side)
        head = find_head_path(module)
        if state is not None and weights is not None:
            run.log(f"weights of {self.arch}: {weights.name}, from {weights.source}")
            return _load_weights(module, head, state, labels, run)
        if not run.restoring:
            run.log(
                f"note: all weights of {self.arch} are randomly initialized; for pretrained weights use "
                "--model.weights DEFAULT"
            )
        return Model(
            module,
            groups=find_layer_groups(module, head),
            head=head,
            labels=run.data.targets.labels,
            pretrained=self.weights != "none",
        )

    def _get_weights(self, run: Run) -> PretrainedWeights | None:
        """Return the weights, downloaded if they must be; None in a restored run that does not have them."""
        found = find_weights(self.arch, self.weights)
        if found is not None:
            return found
        if not run.restoring:
            run.log(f"downloading the weights of {self.arch}")
            return download_weights(self.arch, self.weights)
        return None


def find_arch(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the network of torchvision whose tensors these are by name and shape, except for the head; else None."""
    if len(tensors) < _MIN_TENSORS:
        return None
    shapes = {_rename_densenet_key(name): tensor.shape for name, tensor in tensors.items()}
    for arch in models.list_models(module=models):
        try:
            with torch.device("meta"):
                arguments = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
                module = models.get_model(arch, **arguments)
        except NotImplementedError:  # regnet computes its sizes with tensors
            continue
        ignored = (f"{find_head_path(module)}.", *_AUXILIARY_PREFIXES)
        known = {name: tensor.shape for name, tensor in module.state_dict().items() if not name.startswith(ignored)}
        if all(shapes.get(name) == shape for name, shape in known.items() if not name.endswith("num_batches_tracked")):
            return str(arch)
    return None


def find_head_path(module: nn.Module) -> str:
    """Return the path of the output layer: the last linear layer, or in SqueezeNet the last 1x1 convolution."""
    named = list(module.named_modules())
    linear = [name for name, child in named if isinstance(child, nn.Linear)]
    convs = [name for name, child in named if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1)]
    path: str = (linear or convs)[-1]
    return path


def find_layer_groups(module: nn.Module, head: str) -> tuple[LayerGroup, ...]:
    """Return layer groups from input to output; for an unknown class, those of its top-level children."""
    patterns = LAYER_GROUPS_BY_CLASS.get(type(module).__name__)
    if patterns is None:
        return tuple(Model.from_module(module, head=head).groups)
    groups: list[LayerGroup] = []
    of_head = [head]
    for pattern in patterns:
        name, _, paths = pattern.rpartition("=")
        if name == "head":
            of_head = [*paths.split(","), head]
        elif name:
            groups.append(LayerGroup(name, paths.split(",")))
        elif pattern.endswith("/"):
            groups += _split_into_stages(module, pattern.removesuffix("/"))
        else:
            groups += [LayerGroup(path, (path,)) for path in _match_children(module, pattern) if path != head]
    return (*groups, LayerGroup("head", of_head))


def _match_children(module: nn.Module, pattern: str) -> list[str]:
    """Return the paths of the children with parameters that a glob matches, in order."""
    parent, _, glob = pattern.rpartition(".")
    return [
        f"{parent}.{name}".lstrip(".")
        for name, child in module.get_submodule(parent).named_children()
        if fnmatch.fnmatchcase(name, glob) and next(child.parameters(), None) is not None
    ]


def _split_into_stages(module: nn.Module, parent: str) -> list[LayerGroup]:
    """Return a group for each sequence of layers up to a pooling."""
    stages: list[list[str]] = [[]]
    for name, child in module.get_submodule(parent).named_children():
        if isinstance(child, nn.MaxPool2d):
            stages.append([])
        elif next(child.parameters(), None) is not None:
            stages[-1].append(f"{parent}.{name}")
    return [LayerGroup(f"stage{number}", paths) for number, paths in enumerate(filter(None, stages), start=1)]


def _build_network(arch: str, num_outputs: int, side: tuple[int, int], *, pretrained: bool) -> nn.Module:
    """Return the network; if `pretrained`, with the input rescaling that torchvision's weights expect."""
    arguments: dict[str, Any] = {"num_classes": num_outputs}
    if arch in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": not pretrained, "transform_input": pretrained}
    if arch.startswith("vit_"):
        arguments["image_size"] = side[0]
    if arch.startswith("maxvit"):
        arguments["input_size"] = side
    try:
        module: nn.Module = models.get_model(arch, **arguments)
    except (ValueError, AssertionError) as error:
        raise _image_size_error(arch, side, error) from None
    return module


def _load_weights(
    module: nn.Module, head: str, state: Mapping[str, Tensor], labels: tuple[str, ...], run: Run
) -> Model:
    """Return the model with weights; if they have no head, it is randomly initialized for the data.

    Raises:
        UsageError: Names or shapes outside of the head differ.
    """
    state = {
        _rename_densenet_key(name): tensor for name, tensor in state.items() if not name.startswith(_AUXILIARY_PREFIXES)
    }
    known = f"{head}.weight" in state
    model = Model(module, groups=find_layer_groups(module, head), head=head, labels=run.data.targets.labels)
    if known:
        rows = len(state[f"{head}.weight"])
        labels = labels if len(labels) == rows else ()
        sized = resize_head(get_head_layer(model), rows, {}, seed=run.config.seed)
        model = model.with_head(sized, labels=labels, pretrained_labels=labels)
    if isinstance(module, models.VisionTransformer) and "encoder.pos_embedding" in state:
        state = interpolate_embeddings(module.image_size, module.patch_size, state)
    _require_same_tensors(module, head, state)
    module.load_state_dict(state, strict=False)
    return model


def _check_fit(arch: str, tensors: Mapping[str, Tensor]) -> None:
    """Compare weights with the architecture, before data is read; position embeddings of another size are resampled.

    Raises:
        UsageError: Names or shapes outside of the head differ.
    """
    side = _get_native_image_size(arch)
    try:
        with torch.device("meta"):
            module = _build_network(arch, 1000, (side, side), pretrained=True)
    except NotImplementedError:  # regnet computes its sizes with tensors; its weights are checked when they are loaded
        return
    head = find_head_path(module)
    state = {
        _rename_densenet_key(name): tensor
        for name, tensor in tensors.items()
        if not name.startswith((f"{head}.", *_AUXILIARY_PREFIXES))
    }
    if "encoder.pos_embedding" in state:
        state["encoder.pos_embedding"] = module.get_parameter("encoder.pos_embedding")
    _require_same_tensors(module, head, state)


def _require_same_tensors(module: nn.Module, head: str, state: Mapping[str, Tensor]) -> None:
    own = module.state_dict()
    known = f"{head}.weight" in state
    needed = {name for name in own if known or not name.startswith(f"{head}.")}
    missing = [name for name in sorted(needed - state.keys()) if not name.endswith("num_batches_tracked")]
    wrong = [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
    if missing or wrong or state.keys() - own.keys():
        raise _mismatch_error(type(module).__name__, missing, sorted(state.keys() - own.keys()), wrong)


def _rename_densenet_key(name: str) -> str:
    """Return the name that a tensor of old DenseNet weights has in PyTorch today."""
    found = _OLD_DENSENET_KEY.match(name)
    return found[1] + found[2] if found else name


def _mismatch_error(kind: str, missing: list[str], foreign: list[str], wrong: list[str]) -> UsageError:
    differences = {"missing": missing, "not in the network": foreign, "with another shape": wrong}
    return UsageError(
        f"the weights are not those of this {kind}",
        where="--model.weights",
        why="; ".join(f"{what}: {', '.join(names[:4])} ({len(names)})" for what, names in differences.items() if names),
        fix="use the --model.arch of the file",
    )


def _require_known_arch(arch: str) -> None:
    known = models.list_models(module=models)
    if arch not in known:
        raise UnknownNameError(
            f"torchvision has no classification model '{arch}'",
            where="--model.arch",
            fix=suggest_name(arch, known),
        )


def _get_image_size(run: Run) -> tuple[int, int]:
    """Return height and width of the images."""
    example = run.example
    if isinstance(example, Tensor) and example.ndim == 4:
        return int(example.shape[2]), int(example.shape[3])
    raise UsageError(
        "torchvision models take images, and the inputs are not images",
        where="--model torchvision",
        why="an image is a tensor (channels, height, width)",
        fix="use another --model for this data",
    )


def _get_native_image_size(arch: str) -> int:
    return int(models.get_model_weights(arch).DEFAULT.transforms.keywords["crop_size"])


def _require_fitting_size(module: nn.Module, arch: str, side: tuple[int, int]) -> None:
    """Run one black image, if images are smaller than those the network was designed for.

    Raises:
        UsageError: The images are too small.
    """
    if min(side) >= _get_native_image_size(arch):
        return
    training = module.training
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, 3, *side))
    except (RuntimeError, AssertionError) as error:
        raise _image_size_error(arch, side, error) from None
    finally:
        module.train(training)


def _image_size_error(arch: str, side: tuple[int, int], error: Exception) -> UsageError:
    return UsageError(
        f"{arch} cannot take images of {side[1]}x{side[0]} pixels",
        where="--model torchvision",
        why=str(error).partition("\n")[0],
        fix=f"use --data.size {_get_native_image_size(arch)}",
    )
