"""Build a network of timm for the images and classes of the data, randomly initialized or with weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import attrs
import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from tuneforge import LayerGroup, UnknownNameError, UsageError
from tuneforge.errors import suggest_name
from tuneforge_timm.layer_groups import find_layer_groups
from tuneforge_timm.merged_head import MergedHead
from tuneforge_timm.same_padding import make_same_padding_traceable

ImageSize = tuple[int, int]


@attrs.frozen(eq=False)
class Network:
    """A network with one output layer.

    Args:
        module: The network.
        head: Path of its output layer.
        groups: Its layer groups.
        note: What was changed about its heads, one sentence; empty if nothing was.
    """

    module: nn.Module
    head: str
    groups: tuple[LayerGroup, ...]
    note: str = ""


def find_pretrained_config(name: str) -> PretrainedCfg:
    """Return timm's configuration of pretrained weights: where they are, and what input they expect.

    Args:
        name: An architecture, which stands for its default weights, or `ARCH.TAG`.

    Raises:
        UnknownNameError: timm has no such architecture, or the architecture no such tag.
    """
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        known = timm.list_models()
        raise UnknownNameError(
            f"timm {timm.__version__} has no model '{arch}'", where="--model.arch", fix=suggest_name(arch, known)
        )
    tags = list_tags(arch)
    if tag and tag not in tags:
        raise UnknownNameError(
            f"timm has no weights '{tag}' of {arch}",
            where="--model.arch" if not tags else f"--model.weights, one of {', '.join(tags)}",
            fix=suggest_name(tag, tags) if tags else f"use --model.arch {arch} --model.weights none",
        )
    config: PretrainedCfg | None = timm.get_pretrained_cfg(name)
    return config or PretrainedCfg(architecture=arch)


def list_tags(arch: str) -> list[str]:
    """Return the tags of the pretrained weights of an architecture, that of the default weights first."""
    names = timm.list_pretrained(arch)
    default = timm.get_pretrained_cfg(arch)
    tags = [name.partition(".")[2] for name in names]
    first = default.tag if default is not None else None
    return sorted(tags, key=lambda tag: (tag != first, tag))


def build_network(config: PretrainedCfg, *, num_outputs: int, image_size: ImageSize, seed: int) -> Network:
    """Return a randomly initialized network.

    Args:
        config: Its configuration.
        num_outputs: Outputs of its head.
        image_size: Height and width of the images.
        seed: Seed of the weights.

    Raises:
        UsageError: It has no classifier, or cannot take images of this size.
    """
    with _seeded(seed):
        module = _create(config, image_size, num_classes=num_outputs)
        heads = _find_heads(module, config)
        return _merge_heads(module, heads, num_outputs)


def build_pretrained_network(
    config: PretrainedCfg,
    tensors: Mapping[str, Tensor],
    *,
    num_outputs: int,
    image_size: ImageSize,
    seed: int,
    where: str,
) -> tuple[Network, bool]:
    """Return a network with weights, and whether its head is that of the weights.

    Weights of another image size are resampled as timm does. Weights without a classifier get a randomly initialized
    head, and so do networks with several heads.

    Args:
        config: The configuration of the weights.
        tensors: The weights by name, as timm or the authors of the network name them.
        num_outputs: Outputs of a head that the weights lack.
        image_size: Height and width of the images.
        seed: Seed of a head that the weights lack.
        where: The flag that error messages name.

    Raises:
        UsageError: The weights are not those of this network; it has no classifier, or cannot take images of this size.
    """
    with _seeded(seed):
        heads = _find_heads(_create(config, image_size, meta=True, num_classes=num_outputs), config)
        rows = len(tensors[f"{heads[0]}.weight"]) if f"{heads[0]}.weight" in tensors else 0
        overlay = {"state_dict": dict(tensors), "custom_load": False, "num_classes": rows}
        module = _create(
            config, image_size, weights_where=where, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=rows
        )
        for holder in ("pretrained_cfg", "default_cfg"):
            getattr(module, holder).pop("state_dict", None)
        if rows == 0 or len(heads) > 1:
            module.reset_classifier(num_outputs)
            return _merge_heads(module, heads, num_outputs), False
    return _merge_heads(module, heads, rows), True


def check_image_size(network: Network, config: PretrainedCfg, image_size: ImageSize) -> None:
    """Run one black image, if images do not have the size that the network was trained on.

    Raises:
        UsageError: The network does not take it.
    """
    if image_size == tuple(config.input_size[1:]):
        return
    training = network.module.training
    try:
        with torch.no_grad():
            network.module.eval()(torch.zeros(1, 3, *image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _image_size_error(config, image_size, error) from None
    finally:
        network.module.train(training)


def _create(
    config: PretrainedCfg, image_size: ImageSize, *, meta: bool = False, weights_where: str = "", **arguments: Any
) -> Any:
    """Return what timm builds; a network of a fixed image size is built for that of the images."""
    if config.fixed_input_size:
        arguments["img_size"] = image_size
    try:
        with torch.device("meta") if meta else nullcontext():
            module = timm.create_model(config.architecture, pretrained_cfg=config.tag or None, **arguments)
    except Exception as error:  # noqa: BLE001 - networks and their weight filters raise what they like
        if weights_where and _is_about_weights(error):
            raise _mismatch_error(config, error, weights_where) from None
        raise _image_size_error(config, image_size, error) from None
    make_same_padding_traceable(module)
    return module


def check_classifier(config: PretrainedCfg) -> None:
    """Build the network on the meta device, and check that it classifies.

    Raises:
        UsageError: It has no classifier.
    """
    with torch.device("meta"):
        _find_heads(timm.create_model(config.architecture, num_classes=1), config)


def _find_heads(module: nn.Module, config: PretrainedCfg) -> Sequence[str]:
    """Return the paths of the output layers, from timm's configuration.

    Raises:
        UsageError: There is none.
    """
    paths = config.classifier or ()
    heads = (paths,) if isinstance(paths, str) else tuple(paths)
    known = dict(module.named_modules())
    if not heads or any(path not in known for path in heads):
        raise UsageError(
            f"{config.architecture} has no classifier",
            where="--model.arch",
            why="timm builds it as an encoder, whose output is a map of features",
            fix=f"choose a network that classifies: {_suggest_classifier(config.architecture or '')}",
        )
    return heads


def _suggest_classifier(encoder: str) -> str:
    name = encoder.removesuffix("_enc")
    return name if name != encoder and timm.is_model(name) else "resnet18"


def _merge_heads(module: Any, heads: Sequence[str], num_outputs: int) -> Network:
    groups = find_layer_groups(module, heads[0])
    if len(heads) == 1:
        return Network(module, heads[0], groups)
    if hasattr(module, "aux_head"):
        module.aux_head = None
        note = f"the head '{heads[1]}' is removed, and '{heads[0]}' alone computes the output"
        return Network(module, heads[0], groups, note)
    note = f"the heads {', '.join(heads)} are replaced by one, randomly initialized, on the features of all of them"
    *below, last = [LayerGroup(group.name, [f"network.{path}" for path in group.prefixes]) for group in groups]
    merged = (*below, LayerGroup("head", (*last.prefixes, "head")))
    return Network(MergedHead(module, heads, num_outputs), "head", merged, note)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        yield


def _is_about_weights(error: Exception) -> bool:
    return "state_dict" in str(error) or "size mismatch" in str(error) or isinstance(error, (KeyError, TypeError))


def _mismatch_error(config: PretrainedCfg, error: Exception, where: str) -> UsageError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UsageError(
        f"the weights are not those of {config.architecture}",
        where=where,
        why="; ".join(line[:160] for line in lines[1:3] or lines[:1]),
        fix="use the --model.arch of the file",
    )


def _image_size_error(config: PretrainedCfg, image_size: ImageSize, error: Exception) -> UsageError:
    height, width = config.input_size[1:]
    return UsageError(
        f"{config.architecture} cannot take images of {image_size[1]}x{image_size[0]} pixels",
        where="--model timm",
        why=str(error).partition("\n")[0],
        fix=f"use --data.size {max(height, width)}",
    )
