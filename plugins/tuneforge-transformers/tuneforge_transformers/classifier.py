"""`--model transformers`: a classifier of the transformers library, for texts or pictures."""

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
    """A classifier of the transformers library, for texts or pictures, whichever the data holds.

    Layer groups are `embeddings`, `layer1`, `layer2`, ... and `head`, to which poolers and last norms belong. Only
    safetensors weights are read, and no code that a model brings is run. A head that came with the weights keeps its
    rows by label name; where there is none, a fresh one is put on.
    """

    pretrained: str = option(help="A folder with config.json and .safetensors weights, or a repository on the hub.")
    pooling: Literal["auto", "own", "mean"] = option(
        default="auto",
        help="Features of a text: as the architecture's own classifier takes them (own), or the mean over its tokens; "
        "auto: the mean where a sentence-transformers model says so.",
    )
    revision: str = option(default="main", help="Of a repository on the hub: a branch, a tag or a commit.")
    config: str = option(default="", help="Its config.json; filled in, so that a run's folder can be used without it.")

    def __attrs_post_init__(self) -> None:
        """Read the description, so that what is wrong is found at once, and the run's folder holds it."""
        if self.config:
            return
        folder = self._resolve_directory(source.CONFIG_FILES)
        object.__setattr__(self, "config", source.read_config_text(folder))
        if self.pooling == "auto":
            object.__setattr__(self, "pooling", "mean" if source.uses_mean_pooling(folder) else "own")

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Build the network with the head that its weights have; the adapter `head` fits it to the data.

        Raises:
            PluginError: It is not the first of the chain.
            UsageError: The architecture does not classify such data, or weights and configuration do not fit.
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
    """The model with its labels where its head came with the weights, else with a fresh head for the data.

    Raises:
        UsageError: More is missing than a head.
    """
    names = model.parameters()
    below = sorted(name for name in missing if name in names and model.depth_of(name) > 0)
    if below:
        raise UsageError(
            f"the weights lack {len(below)} tensor(s) below the head: {', '.join(below[:4])}",
            where=_WHERE,
            why="weights and config.json are not of one model",
            fix="give the folder that both were saved to",
        )
    if f"{model.head}.weight" not in missing:
        known = _read_labels(model.module)
        return Model(model.module, groups=model.groups, head=model.head, labels=known, pretrained_labels=known)
    fresh = sorted(name for name in missing if name in names)
    sized = model.with_head(init_head(_get_head(model).in_features, size), labels=labels)
    others = [name for name in fresh if not name.startswith(f"{model.head}.")]
    sentence = f"head: fresh, {size} outputs" + (f"; fresh before it: {', '.join(others)}" if others else "")
    return sized.with_change(sentence)


def _get_head(model: Model) -> nn.Linear:
    module = model.head_module()
    assert isinstance(module, nn.Linear)  # as find_head_path chose it
    return module


def _read_labels(module: Any) -> tuple[str, ...]:
    """The names that the configuration gives the outputs; none where it only counts them."""
    names = tuple(str(module.config.id2label[index]) for index in range(module.config.num_labels))
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _infer_input_kind(example: Any) -> InputKind:
    """What the data holds.

    Raises:
        UsageError: Neither texts nor pictures.
    """
    if isinstance(example, Mapping) and set(example) == {INPUT_IDS, ATTENTION_MASK}:
        return "text"
    if isinstance(example, Tensor) and example.ndim == 4:
        return "image"
    raise UsageError(
        "transformers takes texts or pictures, and the inputs are neither",
        where="--model transformers",
        why="a text is input_ids and attention_mask, a picture one tensor (channels, height, width)",
        fix="use --data text or --data image-folder, or another --model",
    )


def _compare_normalization(run: Run, folder: Path) -> None:
    """Say where pictures come otherwise normalised than the model was trained with."""
    known = source.read_image_normalization(folder)
    given = tuple(getattr(run.data.inputs, name, None) for name in ("mean", "std"))
    if known is None or None in given or known == given:
        return
    mean, std = (",".join(f"{value:g}" for value in values) for values in known)
    run.log(
        f"note: the model was trained on pictures with mean {mean} and deviation {std}, the data has other ones: "
        f"--data.mean {mean} --data.std {std} makes them equal"
    )
