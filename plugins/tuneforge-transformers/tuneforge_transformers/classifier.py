"""The model `transformers`: a classifier of the transformers library, for texts or images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from tuneforge import Model, PluginError, UsageError, component, hookimpl, option
from tuneforge_transformers import pretrained as source
from tuneforge_transformers.groups import find_layer_groups
from tuneforge_transformers.networks import (
    InputKind,
    Pooling,
    build_image_network,
    build_text_network,
    find_head_path,
    init_head,
    load_network,
)
from tuneforge_transformers.text import ATTENTION_MASK, INPUT_IDS

if TYPE_CHECKING:
    from tuneforge import Run

_WHERE = "--model.pretrained"


@component(api=1)
class Transformers:
    """A classifier of the transformers library, for texts or images, depending on the data.

    Layer groups are `embeddings`, `layer1`, `layer2`, ... and `head`, to which poolers and last norms belong. Only
    safetensors weights are read, and no code of the model's repository is run. Rows of a head in the weights are kept
    by label name; without a head in the weights, a randomly initialized one is added.
    """

    pretrained: str = option(help="Folder with config.json and .safetensors weights, or a repository on the hub.")
    pooling: Literal["auto", "own", "mean"] = option(
        default="auto",
        help="Features of a text: own (those of the architecture's own classifier) or mean (over its tokens). "
        "Auto: mean if a sentence-transformers configuration asks for it.",
    )
    revision: str = option(default="main", help="Branch, tag or commit of a repository on the hub.")
    config: str = option(
        default="",
        help="Content of config.json; filled in from the folder, so that the run directory is self-contained.",
    )

    def __attrs_post_init__(self) -> None:
        """Read config.json, so that errors are raised early and the run directory contains it."""
        if self.config:
            return
        folder = self._resolve_directory(source.CONFIG_FILES)
        object.__setattr__(self, "config", source.read_config_text(folder))
        if self.pooling == "auto":
            object.__setattr__(self, "pooling", "mean" if source.uses_mean_pooling(folder) else "own")

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Load the network with the head of its weights; the adapter `head` then fits the head to the data.

        Raises:
            PluginError: There is a model already.
            UsageError: The architecture does not classify such data, or the weights do not fit the configuration.
            UnsafeFileError: The weights are pickled.
        """
        if model is not None:
            raise PluginError(
                "transformers builds a model; it cannot adapt one", where="--model", fix="name it with --model"
            )
        kind = _infer_input_kind(run.example)
        pooling: Pooling = "mean" if self.pooling == "mean" and kind == "text" else "own"
        size, labels = run.data.targets.num_outputs, run.data.targets.labels
        if run.restoring:
            if kind == "text":
                module = build_text_network(self.config, num_outputs=size, pooling=pooling)
            else:
                module = build_image_network(self.config, num_outputs=size)
            return _build_model(module, labels=labels)
        folder = self._resolve_directory(source.MODEL_FILES)
        source.require_safetensors(folder)
        module, missing = load_network(folder, self.config, kind, num_outputs=size, pooling=pooling)
        if kind == "image":
            _compare_normalization(run, folder)
        return _set_up_head(_build_model(module), missing, labels, size)

    def _resolve_directory(self, files: tuple[str, ...]) -> Path:
        return source.resolve_model_directory(self.pretrained, revision=self.revision, files=files, where=_WHERE)


def _build_model(module: nn.Module, *, labels: tuple[str, ...] = ()) -> Model:
    head = find_head_path(module)
    return Model(module, groups=find_layer_groups(module, head), head=head, labels=labels)


def _set_up_head(model: Model, missing: set[str], labels: tuple[str, ...], size: int) -> Model:
    """Return the model with the labels of its pretrained head, or with a randomly initialized head for the data.

    Raises:
        UsageError: Tensors below the head are missing.
    """
    names = model.parameters()
    below = sorted(name for name in missing if name in names and model.depth_of(name) > 0)
    if below:
        raise UsageError(
            f"the weights lack {len(below)} tensor(s) below the head: {', '.join(below[:4])}",
            where=_WHERE,
            why="weights and config.json are of different models",
            fix="give the folder that both were saved to",
        )
    if f"{model.head}.weight" not in missing:
        known = _read_labels(model.module)
        return Model(model.module, groups=model.groups, head=model.head, labels=known, pretrained_labels=known)
    initialized = sorted(name for name in missing if name in names)
    sized = model.with_head(init_head(_get_head(model).in_features, size), labels=labels)
    others = [name for name in initialized if not name.startswith(f"{model.head}.")]
    change = f"head: randomly initialized, {size} outputs"
    return sized.with_change(change + (f"; also randomly initialized: {', '.join(others)}" if others else ""))


def _get_head(model: Model) -> nn.Linear:
    module = model.head_module()
    assert isinstance(module, nn.Linear)  # find_head_path returns linear layers only
    return module


def _read_labels(module: Any) -> tuple[str, ...]:
    """Return the labels of the configuration; empty if they are only placeholders such as LABEL_0."""
    names = tuple(str(module.config.id2label[index]) for index in range(module.config.num_labels))
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _infer_input_kind(example: Any) -> InputKind:
    """Return the kind of input of a batch.

    Raises:
        UsageError: The inputs are neither texts nor images.
    """
    if isinstance(example, Mapping) and set(example) == {INPUT_IDS, ATTENTION_MASK}:
        return "text"
    if isinstance(example, Tensor) and example.ndim == 4:
        return "image"
    raise UsageError(
        "transformers takes texts or images, and the inputs are neither",
        where="--model transformers",
        why="a text is input_ids and attention_mask, an image one tensor (channels, height, width)",
        fix="use --data text or --data image-folder, or another --model",
    )


def _compare_normalization(run: Run, folder: Path) -> None:
    """Log if the images are normalized by another mean and std than those of the pretrained model."""
    known = source.read_image_normalization(folder)
    given = tuple(getattr(run.data.inputs, name, None) for name in ("mean", "std"))
    if known is None or None in given or known == given:
        return
    mean, std = (",".join(f"{value:g}" for value in values) for values in known)
    run.log(
        f"note: the pretrained model uses other normalization than the data: "
        f"--data.mean {mean} --data.std {std} would make them equal"
    )
