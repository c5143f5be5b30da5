"""`--adapt lora`: low-rank adaptation through peft, merged into plain weights at the end.

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
    """Train a low-rank change of the encoder's projections, and the head; every other weight stays as it is.

    A projection W answers with (W + alpha / rank * B A) x, where A is (rank, inputs) and B is (outputs, rank), 0 at the
    start. What lies outside the base model (the classifier) trains in full, as with peft's own classification task.
    Before the test split is looked at, B A is added into W: the run's weights are those of the plain model, so that
    `predict`, `evaluate` and `export` need no peft.
    """

    rank: int = option(default=8, help="Rank of the change.", check=ge(1))
    alpha: float = option(default=16.0, help="The change is scaled by alpha / rank.", check=gt(0))
    dropout: float = option(
        default=0.0, help="Share of a change's inputs that is dropped in training.", check=_FRACTION
    )
    target_modules: tuple[str, ...] = option(
        default=(),
        help="Ends of the names of the layers to change, such as query,value; empty: peft's choice, else "
        "queries and values.",
    )
    num_top_layers: int | None = option(
        default=None,
        help="Only in so many layers nearest the head; those below are a frozen prefix.",
        check=ge(1),
    )
    modules_to_save: tuple[str, ...] = option(default=(), help="Paths of further modules that train in full.")

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Put the changes in; the groups stay what they were.

        Where a finished run is only looked at, the weights are plain already, and nothing is done.

        Raises:
            PluginError: There is no model, or it is none of transformers.
            UsageError: No layer has such a name.
            MissingDependencyError: peft is not installed.
        """
        if model is None or not hasattr(model.module, "config"):
            raise PluginError(
                "lora changes a model of the transformers library", where="--adapt lora", fix="use --model transformers"
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
                "the changes find no place in the model",
                where="--lora.target-modules",
                why=str(error).partition("\n")[0],
                fix="name ends of paths of linear layers, such as query,value",
            ) from None
        self._freeze_base(model)
        added = sum(p.numel() for name, p in model.parameters().items() if _is_lora_parameter(name))
        return model.with_change(
            f"lora: rank {self.rank}, {added:,} parameters in {len(_find_lora_layers(model.module))} layers"
        )

    @hookimpl
    def evaluation_started(self, run: Run) -> None:
        """Add the changes into the weights before the test split, which is looked at when nothing trains any more."""
        if run.eval_split == "test" and run.phase is None:
            merge_lora(run.model.module)

    def _choose_layers(self, model: Model) -> list[int] | None:
        """Numbers of the layers that change, from 0; None for all."""
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
        """Let train what was added, what lies outside the base model, and what the user names."""
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
    """Add the changes into the weights of their layers and put those back in their places, in place."""
    for path, layer in _find_lora_layers(module).items():
        layer.merge()
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, layer.get_base_layer())


def _find_lora_layers(module: nn.Module) -> dict[str, Any]:
    """Layers that hold a change, by path; none where peft was never asked."""
    return {path: child for path, child in module.named_modules() if hasattr(child, "get_base_layer")}


def _choose_target_modules(module: Any) -> list[str] | None:
    """Ends of the names of the queries and values, where peft has no choice of its own for the architecture."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOSEN

    if module.config.model_type in CHOSEN:
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
