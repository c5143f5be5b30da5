"""Execute a `HeadFit` step: solve the head on features of the frozen backbone (a linear probe)."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Targets
from tuneforge.engine.feature_cache.build import CachePlan, try_build_feature_cache
from tuneforge.engine.loop.evaluation import compute_head_features, evaluate
from tuneforge.engine.loop.freeze_start import begin_freeze_check
from tuneforge.engine.model.freezing import freeze, select
from tuneforge.engine.model.fsdp import full_tensor, shard_like
from tuneforge.engine.model.inspection import preserve_state
from tuneforge.errors import DataError
from tuneforge.plugin.results import StrategyStepResult
from tuneforge.plugin.steps import HeadFit


def fit_head(run: Run, step: HeadFit) -> StrategyStepResult:
    """Execute a `HeadFit` step: compute the features once, solve the head to convergence and load it.

    Raises:
        DataError: The targets have no solver for a head, the head is not a linear layer, or the sampler of the data
            does not draw each sample once.
    """
    sampler = run.data.train_sampler
    if sampler is not None and not sampler.each_once:
        raise DataError(
            f"'{step.name}' solves the head on each training sample once, and the sampler of the data draws otherwise",
            fix="use a strategy without HeadFit, or data without a sampler",
        )
    if ties := run.model.head_ties():
        raise DataError(
            f"'{step.name}' cannot solve the head '{run.model.head}', which is tied to {', '.join(ties.values())}",
            why="the features that it is solved on would change with it",
            fix="use a strategy without HeadFit",
        )
    trainable = select(run.model, ["head"])
    freeze(run.model, trainable)
    modes = [(module, False) for module in run.model.module.modules()]
    freeze_check = begin_freeze_check(run, trainable, modes)
    feature_cache = try_build_feature_cache(run, modes, CachePlan(epochs=1))
    # The tail may be an exported graph of operations, without a head module whose inputs could be captured.
    if feature_cache is not None and any(each is run.model.head_module() for each in feature_cache.eval_tail.modules()):
        run.forward_pass.feature_cache = feature_cache
        traced_state, feature_cache.traced_state = feature_cache.traced_state, None
    features, targets = compute_head_features(run, run.data.train)  # adds a hook to the head
    if feature_cache is not None and run.forward_pass.feature_cache is feature_cache:
        feature_cache.traced_state = traced_state
    # BLAS would start a thread for each core, whatever the number of threads of PyTorch.
    with threadpool_limits(torch.get_num_threads(), user_api="blas"):
        weight, bias = run.data.targets.fit_head(features, targets, l2=step.l2)
    _load_head(run.model.head_module(), weight, bias, features)
    run.optimization.reset_state()
    val, run.forward_pass.feature_cache = evaluate(run, run.data.val, "val"), None
    never_updated = freeze_check.finish(run.model)
    sizes = {name: parameter.numel() for name, parameter in run.model.parameters().items()}
    num_trainable = sum(sizes[name] for name in trainable)
    return StrategyStepResult(
        step_name=step.name,
        reason=f"head solved on {len(features)} frozen features",
        val=val,
        num_trainable=num_trainable,
        num_frozen=sum(sizes.values()) - num_trainable,
        never_updated=never_updated,
    )


def can_fit_head(run: Run) -> bool:
    """Return whether `fit_head` can solve the head: a linear layer on one vector per sample, and targets with a solver.

    One forward pass of the example tells what the head is called with; the model is left as it was.
    """
    captured: list[Tensor] = []
    data, head = run.data, run.model.head_module()
    rows = data.targets.group_by_class(data.train.targets).values()
    if (
        not isinstance(head, (nn.Linear, nn.Conv2d))
        or not {"weight", "bias"} <= dict(head.named_parameters(recurse=False)).keys()
        or not {f"{run.model.head}.{name}" for name in ("weight", "bias")}.isdisjoint(run.model.user_frozen)
        or run.model.head_ties()
        or (data.train_sampler is not None and not data.train_sampler.each_once)
        or type(data.targets).fit_head is Targets.fit_head
        or (rows and sum(len(each) > 0 for each in rows) < 2)
    ):
        return False
    handle = head.register_forward_pre_hook(lambda module, args: captured.extend(args[:1]))
    try:
        with preserve_state(run.model.module), torch.no_grad():
            run.model.module.eval()
            run.forward(run.example)
    finally:
        handle.remove()
    size = head.weight.numel() // head.weight.shape[0]
    return [each.flatten(1).shape[1] for each in captured] == [size] and len(captured[0]) == 2


def _load_head(head: nn.Module, weight: Tensor, bias: Tensor, features: Tensor) -> None:
    """Copy a solved weight and bias into the head, and check that the head then holds them.

    Raises:
        DataError: The head is not a linear layer with a bias, or its weight is computed from other parameters.
    """
    if isinstance(head, (nn.Linear, nn.Conv2d)) and head.bias is not None and head.weight.numel() == weight.numel():
        with torch.no_grad():
            head.weight.copy_(shard_like(head.weight, weight.reshape(head.weight.shape)))
            head.bias.copy_(shard_like(head.bias, bias))
        loaded = full_tensor(head.weight.detach()).reshape(weight.shape).to(weight)
        # A parametrized weight (such as weight norm) is computed anew and ignores the copy.
        if torch.allclose(loaded, weight, rtol=max(1e-3, torch.finfo(head.weight.dtype).eps), atol=1e-6):
            return
    raise DataError(
        f"the head, a {type(head).__name__} on {tuple(features.shape)} features, cannot be solved",
        why="HeadFit needs a linear layer (or 1x1 convolution) with a bias, whose weight is a parameter",
        fix="use a strategy without HeadFit",
    )
