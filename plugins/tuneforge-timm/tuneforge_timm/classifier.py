"""The model `timm`: any classification network of the timm library, pretrained by default.

This module only declares options, so that `--help` needs no torch.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tuneforge import OptionError, PluginError, UnknownNameError, UsageError, component, hookimpl, option
from tuneforge.errors import suggest_name

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

    from tuneforge import Model, Run
    from tuneforge.plugin import ImagePreprocessing
    from tuneforge_timm.networks import ImageSize, Network
    from tuneforge_timm.weight_files import LocalWeights

_WHERE = "--model.weights"


@component(api=1)
class Timm:
    """A classification network of timm, with the layer groups of timm's own layer-wise learning rate decay.

    Weights are found in the cache of the hub, in torch's folder of checkpoints, or in an installed package, and are
    downloaded otherwise. Only safetensors are read; a file of torch.save is converted in a sandbox.
    """

    arch: str = option(
        default="resnet18", help="Name in timm, such as resnet18, or with the tag of its weights: resnet18.a1_in1k."
    )
    weights: str = option(
        default="DEFAULT",
        help="`DEFAULT`, a tag of timm such as `a1_in1k`, an installed package of weights, a .safetensors file, or "
        "`none` for random weights.",
    )

    def __attrs_post_init__(self) -> None:
        """Check that the two names of the weights agree.

        Raises:
            OptionError: They differ.
        """
        tag = self.arch.partition(".")[2]
        if tag and self.weights not in ("DEFAULT", "none", tag, self.arch) and not _is_file(self.weights):
            raise OptionError(
                f"arch '{self.arch}' names the weights '{tag}', and weights names '{self.weights}'",
                fix="name the weights once",
            )

    @staticmethod
    def find_local_weights(arch: str) -> str | None:
        """Return where pretrained weights are on this machine, as one phrase, or None if they would be downloaded.

        Args:
            arch: An architecture, which stands for its default weights, or `ARCH.TAG`.

        Raises:
            UnknownNameError: timm has no such architecture or weights.
        """
        from tuneforge_timm.networks import find_pretrained_config
        from tuneforge_timm.weight_files import find_local_weights

        local = find_local_weights(find_pretrained_config(arch))
        return None if local is None else local.source

    @property
    def is_pretrained(self) -> bool:
        """True unless all weights are randomly initialized; then the default strategy is `full`."""
        return self.weights != "none"

    @hookimpl
    def model_inputs(self, run: Run) -> ImagePreprocessing | None:
        """Return the evaluation transform of the weights; None for random weights.

        Raises:
            UnknownNameError: timm has no such architecture, or the architecture no such weights.
            UsageError: It has no pretrained weights, or the package is of another architecture.
            UnsafeFileError: The weights are pickled.
            TryAgainError: The weights are not on this machine and cannot be downloaded.
        """
        from tuneforge_timm.networks import check_classifier
        from tuneforge_timm.preprocessing import describe_preprocessing

        config, _ = self._resolve(restoring=run.restoring)
        check_classifier(config)
        return None if self.weights == "none" else describe_preprocessing(config)

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Build the network with the head of its weights, which the adapter `head` resizes to the data.

        Raises:
            PluginError: There is a model already.
            UnknownNameError: timm has no such architecture, or the architecture no such weights.
            UsageError: It has no classifier, cannot take images of this size, or the weights are of another network.
            UnsafeFileError: The weights are pickled.
            TryAgainError: The weights are not on this machine and cannot be downloaded.
        """
        from tuneforge_timm.networks import build_network, build_pretrained_network, check_image_size

        if model is not None:
            raise PluginError(
                "timm builds a model; it cannot adapt one", where="--model", fix="use it as --model, and adapters such "
                "as head as --adapt",
            )  # fmt: skip
        config, local = self._resolve(restoring=run.restoring)
        size, num_outputs = _get_image_size(run), run.data.targets.num_outputs
        if local is None:
            network = build_network(config, num_outputs=num_outputs, image_size=size, seed=run.config.seed)
            labels: tuple[str, ...] | None = None
        else:
            tensors, names = local.read()
            network, has_head = build_pretrained_network(
                config, tensors, num_outputs=num_outputs, image_size=size, seed=run.config.seed, where=_WHERE
            )
            labels = _label_head(network, config, names, local) if has_head else None
        if not run.restoring:
            check_image_size(network, config, size)
            run.log(_describe(self.arch, config, local, self.weights))
        return _make_model(network, run, labels, pretrained=self.weights != "none")

    def _resolve(self, *, restoring: bool) -> tuple[PretrainedCfg, LocalWeights | None]:
        """Return timm's configuration of the weights, and their file; None for random weights and in a restored run.

        Raises:
            UnknownNameError: timm has no such architecture, or `weights` is neither a tag nor a file.
            TryAgainError: The weights are not on this machine and cannot be downloaded.
        """
        from tuneforge_timm.networks import find_pretrained_config, list_tags
        from tuneforge_timm.packaged_weights import installed_weights
        from tuneforge_timm.weight_files import LocalWeights, find_or_download_weights, open_weights_file

        arch = self.arch.partition(".")[0]
        config = find_pretrained_config(self.arch)
        if self.weights == "none" or (restoring and _is_file(self.weights)):
            return config, None
        if _is_file(self.weights):
            return config, open_weights_file(Path(self.weights), where=_WHERE)
        for package in installed_weights():
            if package.distribution == self.weights:
                if package.arch != arch:
                    raise _wrong_package_error(package.distribution, package.arch, arch)
                found = LocalWeights(package.path, f"the package {package.distribution}", package)
                return find_pretrained_config(f"{arch}.{package.tag}"), None if restoring else found
        if self.weights != "DEFAULT":
            tag = self.weights.removeprefix(f"{arch}.")
            if tag not in list_tags(arch):
                raise _unknown_weights_error(self.weights, arch, list_tags(arch))
            config = find_pretrained_config(f"{arch}.{tag}")
        return config, None if restoring else find_or_download_weights(config, where=f"{_WHERE} {self.weights}")


def _is_file(weights: str) -> bool:
    """Return True if the option names a file rather than weights by name."""
    path = Path(weights)
    return "/" in weights or path.is_file() or path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pkl")


def _get_image_size(run: Run) -> ImageSize:
    """Return height and width of the images.

    Raises:
        UsageError: The inputs are not images.
    """
    shape = getattr(run.example, "shape", ())
    if len(shape) == 4:
        return int(shape[2]), int(shape[3])
    raise UsageError(
        "networks of timm take images, and the inputs are not images",
        where="--model timm",
        why="an image is a tensor (channels, height, width)",
        fix="use another --model for this data",
    )


def _label_head(
    network: Network, config: PretrainedCfg, names: tuple[str, ...], local: LocalWeights
) -> tuple[str, ...]:
    """Return the names of the outputs of a pretrained head: of the file, or ImageNet's; empty if they are unknown."""
    from torchvision.models import ResNet18_Weights

    head = network.module.get_submodule(network.head)
    rows = len(head.weight)  # type: ignore[arg-type]  # a linear layer or a convolution
    imagenet = tuple(ResNet18_Weights.DEFAULT.meta["categories"])
    published = "in1k" in (config.tag or "") and not local.source.startswith("the file ")
    known = names or (imagenet if published else ())
    return known if len(known) == rows else ()


def _make_model(network: Network, run: Run, labels: tuple[str, ...] | None, *, pretrained: bool) -> Model:
    """Return the model; without `labels`, its head is randomly initialized for the data."""
    from tuneforge import Model

    model = Model(
        network.module,
        groups=network.groups,
        head=network.head,
        labels=run.data.targets.labels if labels is None else labels,
        pretrained_labels=labels or (),
        pretrained=pretrained,
    )
    return model.with_change(network.note) if network.note else model


def _describe(arch: str, config: PretrainedCfg, local: LocalWeights | None, weights: str) -> str:
    """Return a line for the log on the origin of the weights."""
    from tuneforge_timm.weight_files import name_of

    if local is None:
        return f"note: {arch} is randomly initialized, because weights are '{weights}'"
    name = config.architecture if local.source.startswith("the file ") else name_of(config)
    return f"weights of {name}: from {local.source}"


def _unknown_weights_error(weights: str, arch: str, tags: list[str]) -> UnknownNameError:
    known = [*tags, "DEFAULT", "none"]
    return UnknownNameError(
        f"there are no weights '{weights}' of {arch}",
        where=_WHERE,
        why=f"timm has {', '.join(tags) or 'none'}; it is no installed package of weights, and no file",
        fix=suggest_name(weights, known),
    )


def _wrong_package_error(distribution: str, package_arch: str, arch: str) -> UsageError:
    version = importlib.metadata.version(distribution)
    return UsageError(
        f"the package {distribution} {version} has the weights of {package_arch}, not of {arch}",
        where=_WHERE,
        fix=f"use --model.arch {package_arch}",
    )
