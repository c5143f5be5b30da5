"""The adapter `lora`: low-rank adaptation through peft, merged into the weights at the end.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tuneforge import MissingDependencyError, Model, PluginError, UsageError, component, ge, gt, hookimpl, option
from tuneforge.plugin import Check
from tuneforge_transformers.networks import get_base_prefix

if TYPE_CHECKING:
    from tuneforge import Run

_QUERY_AND_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"), ("Wqkv",))
_FRACTION = Check(
    "at least 0 and less than 1", lambda value: bool(0 <= value < 1), {"minimum": 0, "exclusiveMaximum": 1}
)


@component(api=1)
class LoRA:
    """Train low-rank factors of the encoder's projections and the head; freeze all other weights.

    A projection computes (W + alpha / rank * B A) x, where A is (rank, inputs) and B is (outputs, rank), initially 0.
    Modules outside the base model (the classifier) train in full, as with peft's own classification task. B A is merged
    into W before the test split is evaluated: the run's weights are those of the plain model, so that `predict`,
    `evaluate` and `export` do not need peft.
    """

    rank: int = option(default=8, help="Rank of the factors.", check=ge(1))
    alpha: float = option(default=16.0, help="The product of the factors is scaled by alpha / rank.", check=gt(0))
    dropout: float = option(default=0.0, help="Dropout probability of the inputs of the factors.", check=_FRACTION)
    target_modules: tuple[str, ...] = option(
        default=(),
        help="Suffixes of the names of the layers to adapt, such as query,value. Empty: peft's default for the "
        "architecture, else queries and values.",
    )
    num_top_layers: int | None = option(
        default=None,
        help="Number of layers nearest the head to adapt; those below are frozen. None: all.",
        check=ge(1),
    )
    modules_to_save: tuple[str, ...] = option(default=(), help="Paths of further modules to train in full.")

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Inject the factors into the model; its layer groups stay the same.

        The weights of a finished run are merged already, so its model is returned as it is.

        Raises:
            PluginError: There is no model, or it is not one of transformers.
            UsageError: No layer has such a name.
            MissingDependencyError: peft is not installed.
        """
        if model is None or not hasattr(model.module, "config"):
            raise PluginError(
                "lora adapts a model of the transformers library", where="--adapt lora", fix="use --model transformers"
            )
        if run.restoring and run.run_dir is None:
            return model
        peft = _import_peft()
        settings = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules) or _choose_target_modules(model.module),
            layers_to_transform=self._choose_layers(model),
        )
        try:
            peft.inject_adapter_in_model(settings, model.module)
        except ValueError as error:
            raise UsageError(
                "the model has no layer to adapt",
                where="--lora.target-modules",
                why=str(error).partition("\n")[0],
                fix="name suffixes of the paths of linear layers, such as query,value",
            ) from None
        self._freeze_base(model)
        added = sum(p.numel() for name, p in model.parameters().items() if _is_lora_parameter(name))
        return model.with_change(
            f"lora: rank {self.rank}, {added:,} parameters in {len(_find_lora_layers(model.module))} layers"
        )

    @hookimpl
    def evaluation_started(self, run: Run) -> None:
        """Merge the factors before the test split is evaluated, when no phase follows."""
        if run.eval_split == "test" and run.phase is None:
            merge_lora(run.model.module)

    def _choose_layers(self, model: Model) -> list[int] | None:
        """Return the indices of the layers to adapt; None for all."""
        if self.num_top_layers is None:
            return None
        count = sum(group.name.startswith("layer") for group in model.groups)
        if self.num_top_layers > count:
            raise UsageError(
                f"the model has {count} layers, not {self.num_top_layers}",
                where="--lora.num-top-layers",
                fix=f"give at most {count}",
            )
        return list(range(count - self.num_top_layers, count))

    def _freeze_base(self, model: Model) -> None:
        """Freeze all parameters but the factors, those outside the base model, and those of `modules_to_save`."""
        base = get_base_prefix(model.module)
        for path in self.modules_to_save:
            if not any(name.startswith(f"{path}.") for name in model.parameters()):
                raise UsageError(f"the model has no module '{path}' with parameters", where="--lora.modules-to-save")
        for name, parameter in model.parameters().items():
            in_full = not name.startswith(f"{base}.") or any(
                name.startswith(f"{path}.") for path in self.modules_to_save
            )
            parameter.requires_grad_(in_full or _is_lora_parameter(name))


def merge_lora(module: nn.Module) -> None:
    """Merge the factors into the weights and replace the adapted layers by the plain ones, in place."""
    for path, layer in _find_lora_layers(module).items():
        layer.merge()
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, layer.get_base_layer())


def _find_lora_layers(module: nn.Module) -> dict[str, Any]:
    """Return the adapted layers by path."""
    return {path: child for path, child in module.named_modules() if hasattr(child, "get_base_layer")}


def _choose_target_modules(module: Any) -> list[str] | None:
    """Return suffixes of the queries and values; None if peft has a default for the architecture."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if module.config.model_type in DEFAULTS:
        return None
    ends = {name.rpartition(".")[2] for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    return next((list(names) for names in _QUERY_AND_VALUE if ends.issuperset(names)), None)


def _is_lora_parameter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "--adapt lora needs peft",
            why=str(error),
            fix="install it: pip install 'tuneforge-transformers[lora]'",
        ) from None
    return peft
