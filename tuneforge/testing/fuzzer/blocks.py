"""The blocks of random networks: each holds one construct of PyTorch that a cache, a resume or a freeze can get wrong.

Shapes: each block maps (b, WIDTH) to (b, WIDTH).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 16


class ReverseGradient(torch.autograd.Function):
    """The identity, with a gradient of the opposite sign (domain-adversarial training)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return the values."""
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the negative gradient."""
        return -gradients[0]


class ScaledTanh(nn.Module):
    """An activation without parameters, which a network may hold as TorchScript."""

    def forward(self, values: Tensor) -> Tensor:
        """Return 1.5 * tanh(values)."""
        return 1.5 * torch.tanh(values)


@attrs.frozen
class BlockKind:
    """One kind of block.

    Args:
        compute: Returns the output of the block for (block, inputs).
        members: Makes a submodule, by its name; every block also has `linear`.
        buffers: Shape of each buffer of zeros, by name.
        attributes: Plain attributes at the beginning.
        prepare: Called once with the new block, to register hooks.
        per_sample: False if the output of a sample depends on other samples, on random numbers or on earlier calls.
        bias: False if `linear` is followed by a batch norm, where the gradient of a bias is rounding noise.
    """

    compute: Callable[[Any, Any], Any]
    members: Mapping[str, Callable[[], nn.Module]] = attrs.field(factory=dict)
    buffers: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict)
    attributes: Mapping[str, Any] = attrs.field(factory=dict)
    prepare: Callable[[FuzzBlock], Any] = lambda block: None
    per_sample: bool = True
    bias: bool = True


class FuzzBlock(nn.Module):
    """A block of some kind: (b, WIDTH) -> (b, WIDTH)."""

    def __init__(self, kind: BlockKind) -> None:
        super().__init__()
        self.compute = kind.compute
        self.linear: Any = nn.Linear(WIDTH, WIDTH, bias=kind.bias)
        for name, build in kind.members.items():
            self.add_module(name, build())
        for name, shape in kind.buffers.items():
            self.register_buffer(name, torch.zeros(shape))
        for name, value in kind.attributes.items():
            setattr(self, name, value)
        kind.prepare(self)

    def forward(self, values: Tensor) -> Tensor:
        """Return the output of the kind."""
        output: Tensor = self.compute(self, values)
        return output


def _normalized(norm: Callable[[], nn.Module], **fields: Any) -> BlockKind:
    return BlockKind(lambda block, x: torch.relu(block.norm(block.linear(x))), {"norm": norm}, **fields)


def _hooked(prepare: Callable[[FuzzBlock], Any]) -> BlockKind:
    return BlockKind(lambda block, x: torch.tanh(block.linear(x)), prepare=prepare)


def _functional_batchnorm(block: Any, x: Any) -> Any:
    return F.batch_norm(block.linear(x), block.mean, block.variance + 1.0, training=block.training, momentum=0.2)


def _functional_batchnorm_in_place(block: Any, x: Any) -> Any:
    return F.batch_norm(block.linear(x), block.mean, block.variance, training=block.training, eps=1.0, momentum=0.2)


def _add_noise(block: Any, x: Any) -> Any:
    x = torch.tanh(block.linear(x))
    return x + 0.1 * torch.randn_like(x) if block.training else x


def _drop_layer(block: Any, x: Any) -> Any:
    if block.training and float(torch.rand(())) < 0.3:
        return x
    return torch.tanh(block.linear(x))


def _scale_at_random(block: Any, x: Any) -> Any:
    x = torch.tanh(block.linear(x))
    return x * (0.8 + 0.2 * random.random() + 0.2 * np.random.rand()) if block.training else x  # noqa: S311 - not for security


def _decay_in_place(block: Any, x: Any) -> Any:
    if block.training:
        with torch.no_grad():
            block.linear.bias.mul_(0.95)
    return torch.tanh(block.linear(x))


def _center_in_place(block: Any, x: Any) -> Any:
    x = torch.tanh(block.linear(x))
    if block.training:
        with torch.no_grad():
            block.center.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return x - block.center


def _center_by_assignment(block: Any, x: Any) -> Any:
    x = torch.tanh(block.linear(x))
    if block.training:
        block.center = 0.9 * block.center + 0.1 * x.detach().mean(0)
    return x - block.center


def _count_in_attribute(block: Any, x: Any) -> Any:
    block.passes += block.training
    return torch.tanh(block.linear(x)) * (1 + block.passes / 20)


def _count_in_buffer(block: Any, x: Any) -> Any:
    if block.training:
        block.passes += 1
    return torch.tanh(block.linear(x)) * (1 + block.passes / 20)


def _count_evaluations(block: Any, x: Any) -> Any:
    block.passes += not block.training
    return torch.tanh(block.linear(x))


def _gate_without_gradient(block: Any, x: Any) -> Any:
    with torch.no_grad():
        gate = torch.sigmoid(block.gate(x))
    return torch.tanh(block.linear(x)) * gate


def _gate_with_set_grad_enabled(block: Any, x: Any) -> Any:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    gate = torch.sigmoid(block.gate(x))
    torch.set_grad_enabled(before)
    return torch.tanh(block.linear(x)) * gate


def _write_rare_values(block: Any, x: Any) -> Any:
    x = x.clone()
    x[:, 0].clamp_(max=1.2)
    return torch.tanh(block.linear(x))


def _write_by_mask(block: Any, x: Any) -> Any:
    x = x.clone()
    x[x > 1.2] = 0.0
    return torch.tanh(block.linear(x))


def _add_in_place(block: Any, x: Any) -> Any:
    x = block.linear(x)
    x += 0.5
    return torch.nn.functional.relu(x, inplace=True)


def _write_to_input(block: Any, x: Any) -> Any:
    output = torch.tanh(block.linear(x.clone()))
    return output + x.mul_(0.5) if not x.requires_grad else output + x * 0.5


def _branch_on_values(block: Any, x: Any) -> Any:
    return torch.tanh(block.linear(x)) if float(x.detach().abs().sum()) < 1e9 else x


def _branch_on_mode(block: Any, x: Any) -> Any:
    x = torch.tanh(block.linear(x))
    if block.training:
        return x * 1.1
    return x


def _loop_over_shape(block: Any, x: Any) -> Any:
    columns = [torch.tanh(x[:, i]) if x.shape[1] > i else x[:, 0] for i in range(x.shape[1])]
    return block.linear(torch.stack(columns, 1))


def _hook_on_tensor(block: Any, x: Any) -> Any:
    x = torch.tanh(block.linear(x))
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * 0.5)
    return x


def _attend(block: Any, x: Any) -> Any:
    tokens = block.linear(x).reshape(-1, 4, 4)
    mixed, _ = block.attention(tokens, tokens, tokens, need_weights=False)
    return x + mixed.reshape(-1, WIDTH)


def _rarely_shift(block: Any, x: Any) -> Any:
    rare = (x[:, :1] > 1.3).to(x.dtype)
    return torch.tanh(block.linear(x)) * (1 + rare)


def _remember_output(block: Any, x: Any) -> Any:
    output = torch.tanh(block.linear(x))
    block.last = output.detach()
    return output


def _zero(block: FuzzBlock) -> Any:
    return block.linear.register_full_backward_pre_hook(lambda module, gradients: tuple(0 * each for each in gradients))


def _halve(block: FuzzBlock) -> Any:
    return block.linear.register_full_backward_hook(lambda module, inputs, outputs: tuple(
        None if each is None else each * 0.5 for each in inputs
    ))  # fmt: skip


_CENTER: dict[str, Any] = {"buffers": {"center": (WIDTH,)}, "per_sample": False}

BLOCKS: Mapping[str, BlockKind] = {
    "linear": BlockKind(lambda block, x: torch.relu(block.linear(x))),
    "residual": BlockKind(lambda block, x: x + torch.tanh(block.linear(x))),
    "batch-norm": _normalized(lambda: nn.BatchNorm1d(WIDTH), per_sample=False, bias=False),
    "batch-norm-without-affine": _normalized(lambda: nn.BatchNorm1d(WIDTH, affine=False), per_sample=False, bias=False),
    "batch-norm-without-statistics": _normalized(
        lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False), per_sample=False, bias=False
    ),
    "batch-norm-average": _normalized(lambda: nn.BatchNorm1d(WIDTH, momentum=None), per_sample=False, bias=False),
    "layer-norm": _normalized(lambda: nn.LayerNorm(WIDTH)),
    "group-norm": _normalized(lambda: nn.GroupNorm(4, WIDTH)),
    "rms-norm": _normalized(lambda: nn.RMSNorm(WIDTH)),
    "functional-batch-norm": BlockKind(
        _functional_batchnorm_in_place, buffers={"mean": (WIDTH,), "variance": (WIDTH,)}, per_sample=False, bias=False
    ),
    "functional-batch-norm-of-sum": BlockKind(
        _functional_batchnorm, buffers={"mean": (WIDTH,), "variance": (WIDTH,)}, per_sample=False, bias=False
    ),
    "dropout": _normalized(lambda: nn.Dropout(0.3), per_sample=False),
    "functional-dropout": BlockKind(
        lambda block, x: F.dropout(torch.relu(block.linear(x)), 0.3, block.training), per_sample=False
    ),
    "dropout-in-evaluation": BlockKind(
        lambda block, x: F.dropout(torch.tanh(block.linear(x)), 0.1, True), per_sample=False
    ),
    "noise": BlockKind(_add_noise, per_sample=False),
    "layer-drop": BlockKind(_drop_layer, per_sample=False),
    "python-random": BlockKind(_scale_at_random, per_sample=False),
    "parameter-in-place": BlockKind(_decay_in_place, per_sample=False),
    "buffer-in-place": BlockKind(_center_in_place, **_CENTER),
    "buffer-assigned": BlockKind(_center_by_assignment, **_CENTER),
    "tensor-attribute": BlockKind(_center_by_assignment, attributes={"center": torch.zeros(WIDTH)}, per_sample=False),
    "counter": BlockKind(_count_in_attribute, attributes={"passes": 0}, per_sample=False),
    "counter-buffer": BlockKind(_count_in_buffer, buffers={"passes": ()}, per_sample=False),
    "counter-of-evaluations": BlockKind(_count_evaluations, attributes={"passes": 0}, per_sample=False),
    "last-output": BlockKind(_remember_output, attributes={"last": None}, per_sample=False),
    "no-grad-gate": BlockKind(_gate_without_gradient, {"gate": lambda: nn.Linear(WIDTH, WIDTH)}),
    "set-grad-enabled-gate": BlockKind(_gate_with_set_grad_enabled, {"gate": lambda: nn.Linear(WIDTH, WIDTH)}),
    "detach": BlockKind(lambda block, x: x * torch.sigmoid(block.linear(x)).detach()),
    "reversed-gradient": BlockKind(lambda block, x: ReverseGradient.apply(torch.tanh(block.linear(x)))),
    "straight-through": BlockKind(lambda block, x: x + (torch.tanh(block.linear(x)) - x).detach()),
    "rare-write": BlockKind(_write_rare_values),
    "masked-write": BlockKind(_write_by_mask),
    "rare-shift": BlockKind(_rarely_shift),
    "in-place": BlockKind(_add_in_place),
    "in-place-input": BlockKind(_write_to_input),
    "branch-on-values": BlockKind(_branch_on_values),
    "branch-on-mode": BlockKind(_branch_on_mode),
    "loop-over-shape": BlockKind(_loop_over_shape),
    "batch-mean": BlockKind(lambda block, x: torch.tanh(block.linear(x - x.mean(0))), per_sample=False),
    "autocast": BlockKind(lambda block, x: _in_bfloat16(block, x)),
    "checkpoint": BlockKind(lambda block, x: checkpoint(torch.tanh, block.linear(x), use_reentrant=False)),
    "tensor-hook": BlockKind(_hook_on_tensor),
    "backward-pre-hook": _hooked(_zero),
    "backward-hook": _hooked(_halve),
    "forward-hook": _hooked(
        lambda block: block.linear.register_forward_hook(lambda module, args, output: output * 0.5)
    ),
    "forward-pre-hook": _hooked(
        lambda block: block.linear.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    ),
    "parameter-hook": _hooked(lambda block: block.linear.weight.register_hook(lambda gradient: gradient * 0.5)),
    "weight-norm": BlockKind(
        lambda block, x: torch.tanh(block.linear(x)),
        prepare=lambda block: nn.utils.parametrizations.weight_norm(block.linear),
    ),
    "spectral-norm": BlockKind(
        lambda block, x: torch.tanh(block.linear(x)),
        prepare=lambda block: nn.utils.parametrizations.spectral_norm(block.linear),
        per_sample=False,
    ),
    "script": BlockKind(
        lambda block, x: block.activation(block.linear(x)), {"activation": lambda: torch.jit.script(ScaledTanh())}
    ),
    "attention": BlockKind(_attend, {"attention": lambda: nn.MultiheadAttention(4, 2, bias=False, batch_first=True)}),
}
"""Every kind of block by name."""


def _in_bfloat16(block: Any, x: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block.linear(x)
    return torch.tanh(output.to(x.dtype))
