"""Random programs: from a seed, a network, data, a strategy and the settings of a run, as plain data."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch

from tuneforge import HeadFit, Phase, WeightAverage, use
from tuneforge.plugin import ComponentSpec, StrategyStep
from tuneforge.plugin.serialization import from_json, mapping_field, register_serializable, to_json
from tuneforge.testing.fuzzer.blocks import BLOCKS
from tuneforge.testing.fuzzer.network import TRAITS, FuzzNetwork, build_network
from tuneforge.testing.fuzzer.samples import INPUTS, NUM_CLASSES, SOURCES, build_data

LOSSES = ("default", "label-smoothing", "class-weights", "batch-weights", "two-passes", "side-loss")
CALLBACKS = ("grad-clip", "ema")

_PER_SAMPLE_BLOCKS = tuple(name for name, kind in BLOCKS.items() if kind.per_sample)
_RARE_BLOCKS = (
    "batch-norm-without-statistics", "batch-mean", "counter-of-evaluations", "last-output", "branch-on-values",
    "tensor-hook", "backward-pre-hook", "backward-hook", "forward-hook", "forward-pre-hook", "masked-write",
    "in-place-input", "loop-over-shape", "autocast", "no-grad-gate", "set-grad-enabled-gate",
)  # fmt: skip
"""Kinds with which a frozen network is not cached, or only by `torch.export`: at most one per program."""

_STRATEGIES: Sequence[tuple[str, Mapping[str, Any], int]] = (
    ("full", {"epochs": 2}, 1),
    ("head-only", {"epochs": 3}, 3),
    ("freeze-then-unfreeze", {"head_epochs": 2, "epochs": 1}, 3),
    ("gradual-unfreeze", {"epochs": 1}, 3),
    ("layer-decay", {"epochs": 2}, 1),
    ("lp-ft", {"epochs": 1}, 2),
    ("wise-ft", {"epochs": 1, "weights": (0.0, 0.5, 1.0)}, 1),
    ("bias-only", {"epochs": 2}, 1),
    ("l2-sp", {"epochs": 1}, 1),
)
_SELECTORS: Sequence[tuple[tuple[str, ...], int]] = (
    (("head",), 3), (("groups[-2:]",), 3), (("groups[-3:]",), 1), (("all",), 1), (("biases", "head"), 1),
    (("body.0", "head"), 1), (("body",), 1), (("last block", "head"), 4),
)  # fmt: skip


@register_serializable
@attrs.frozen
class FuzzProgram:
    """What one seed draws; JSON stores it without loss.

    Args:
        seed: Seed of weights, samples and the run.
        blocks: Kinds of the network's blocks (`blocks.BLOCKS`).
        traits: Traits of the network (`network.TRAITS`).
        inputs: Sort of inputs (`samples.INPUTS`).
        source: Where samples come from (`samples.SOURCES`).
        num_train: Training samples.
        num_val: Validation samples.
        strategy: Steps, or a built-in strategy.
        loss: One of `LOSSES`.
        regression: True for numbers as targets, False for classes.
        callbacks: Names of callbacks.
        settings: Settings of `Engine`.
        micro_batch: Samples per pass of the run with micro-batches.
        position: Where the run is interrupted, or a tensor overwritten, as a fraction of it in [0, 1).
    """

    seed: int
    blocks: tuple[str, ...] = ("linear",)
    traits: tuple[str, ...] = ()
    inputs: str = "vectors"
    source: str = "arrays"
    num_train: int = 24
    num_val: int = 8
    strategy: ComponentSpec | tuple[StrategyStep, ...] = (Phase("head", train="head", epochs=2),)
    loss: str = "default"
    regression: bool = False
    callbacks: tuple[str, ...] = ()
    settings: Mapping[str, Any] = mapping_field()
    micro_batch: int = 2
    position: float = 0.5

    @property
    def per_sample(self) -> bool:
        """True if a sample's gradient depends on nothing but the sample, so that a batch may be computed in parts."""
        return (
            all(BLOCKS[kind].per_sample for kind in self.blocks)
            and self.inputs != "images"  # its stem has BatchNorm
            and not self.in_bfloat16
            and not self.source.endswith("random")
        )

    def in_float64(self) -> FuzzProgram:
        """Return the program in float64, unless a part of it computes in bfloat16."""
        traits = self.traits if self.in_bfloat16 else tuple(sorted({*self.traits, "float64"}))
        return attrs.evolve(self, traits=traits)

    @property
    def in_bfloat16(self) -> bool:
        """True if a part of the network computes in bfloat16, whose rounding depends on the batch."""
        return "autocast" in self.blocks or self.settings.get("precision") == "bf16"

    def kinds(self) -> list[str]:
        """Return everything that was drawn, in words, to count what was compared."""
        strategy = self.strategy
        steps = [strategy.name] if isinstance(strategy, ComponentSpec) else [type(each).__name__ for each in strategy]
        parts = (*self.blocks, *self.traits, self.inputs, self.source, *steps, f"loss {self.loss}", *self.callbacks)
        settings = (f"{name} {getattr(value, 'name', value)}" for name, value in self.settings.items())
        return sorted({*parts, *settings} - {f"batch_size {self.settings.get('batch_size')}"})

    def build_network(self) -> FuzzNetwork:
        """Return a new network with the weights at the beginning."""
        num_outputs = 1 if self.regression else NUM_CLASSES
        traits = {*self.traits, "side-loss"} if self.loss == "side-loss" else self.traits
        return build_network(self.blocks, tuple(traits), self.inputs, num_outputs, seed=self.seed)

    def build_data(self) -> Any:
        """Return a new data source."""
        return build_data(
            self.inputs, self.source, num_train=self.num_train, num_val=self.num_val, regression=self.regression,
            dtype=torch.float64 if "float64" in self.traits else torch.float32, seed=self.seed,
        )  # fmt: skip

    def to_json(self) -> str:
        """Return the program as one line of JSON, without fields that have their defaults."""
        return json.dumps(_drop_defaults(json.loads(to_json(self))))

    @classmethod
    def from_json(cls, text: str) -> FuzzProgram:
        """Return the program that `to_json` wrote."""
        program = from_json(text)
        assert isinstance(program, cls)
        return program


def _drop_defaults(value: Any) -> Any:
    """Return the JSON value of a step or a program without the fields that have their defaults."""
    if isinstance(value, list):
        return [_drop_defaults(each) for each in value]
    if not isinstance(value, dict) or value.get("$kind") not in _DEFAULTS:
        return value
    defaults = _DEFAULTS[value["$kind"]]
    kept = {key: each for key, each in value.items() if key == "$kind" or each != defaults.get(key, _DEFAULTS)}
    return {key: _drop_defaults(each) for key, each in kept.items()}


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    type(each).__name__: json.loads(to_json(each)) for each in (FuzzProgram(-1), Phase("", steps=2**40))
}


_TRAIT_SHARES = {"float64": 0.5, "max-norm": 0.4, "temperature": 0.15}


def draw_program(seed: int) -> FuzzProgram:
    """Return the program of a seed, the same on every machine."""
    draw = random.Random(seed)  # noqa: S311 - not for security
    kinds = _PER_SAMPLE_BLOCKS if draw.random() < 0.5 else tuple(BLOCKS)
    blocks = _draw_blocks(draw, kinds)
    inputs = draw.choices(INPUTS, (5, 2, 2, 2))[0]
    traits = {trait for trait in TRAITS if draw.random() < _TRAIT_SHARES.get(trait, 0.08)}
    loss = draw.choices(LOSSES, (11, 2, 2, 1, 1, 1))[0]
    regression = loss in ("default", "side-loss") and draw.random() < 0.15
    batch_size = draw.choice((4, 6, 8))
    num_batches = draw.randint(2, 4)
    adaptive = draw.random() < 0.2
    return FuzzProgram(
        seed,
        blocks=blocks,
        traits=tuple(sorted(traits - (set() if inputs == "tokens" else {"max-norm"}))),
        inputs=inputs,
        source=draw.choices(SOURCES, (8, 3, 3, 1, 1, 1))[0],
        num_train=num_batches * batch_size + draw.choice((0, 1, 2, 3)),
        num_val=draw.choice((5, 8, 9)),
        strategy=_draw_strategy(draw, len(blocks), adaptive, regression),
        loss=loss,
        regression=regression,
        callbacks=tuple(each for each in CALLBACKS if draw.random() < 0.12),
        settings={"batch_size": batch_size, **_draw_settings(draw, adaptive)},
        micro_batch=draw.choice((1, 2, 3)),
        position=draw.random(),
    )


def _draw_blocks(draw: random.Random, kinds: Sequence[str]) -> tuple[str, ...]:
    blocks = [draw.choice([each for each in kinds if each not in _RARE_BLOCKS]) for _ in range(draw.randint(1, 4))]
    if draw.random() < 0.3:
        blocks[draw.randrange(len(blocks))] = draw.choice([each for each in kinds if each in _RARE_BLOCKS])
    return tuple(blocks)


def _draw_settings(draw: random.Random, adaptive: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"cache": draw.choice(("memory", "memory", "auto"))}
    if draw.random() < 0.2:
        settings["grad_accum_steps"] = 2
    if draw.random() < 0.08:
        settings["precision"] = "bf16"
    if draw.random() < 0.8:  # a run without checkpoints starts again, which shows little
        settings["checkpoint_steps"] = draw.choice((1, 2, 3))
    if adaptive:
        settings["optimizer"] = draw.choice((use("adamw"), use("torch", kind="Adagrad"), use("torch", kind="RMSprop")))
    return settings


def _draw_strategy(
    draw: random.Random, num_blocks: int, adaptive: bool, regression: bool
) -> ComponentSpec | tuple[StrategyStep, ...]:
    if draw.random() < 0.25:
        chosen = [each for each in _STRATEGIES if not regression or each[0] not in ("lp-ft",)]
        name, options, _ = draw.choices(chosen, [weight for *_, weight in chosen])[0]
        return use(name, **options)
    steps: list[StrategyStep] = [
        _draw_phase(draw, number, num_blocks, adaptive, regression) for number in range(draw.randint(1, 2))
    ]
    if draw.random() < 0.1:
        steps.insert(0, HeadFit("solve"))
    if draw.random() < 0.1 and isinstance(steps[0], Phase):  # the same cut with other weights before it
        steps.append(attrs.evolve(steps[0], name="again"))
    if draw.random() < 0.1:
        steps.append(WeightAverage("average", snapshots=("start", steps[-1].name), weights=(0.0, 0.5, 1.0)))
    return tuple(steps)


def _draw_phase(draw: random.Random, number: int, num_blocks: int, adaptive: bool, regression: bool) -> Phase:
    length: dict[str, Any] = {"epochs": draw.randint(1, 3)} if draw.random() < 0.7 else {"steps": draw.randint(2, 7)}
    options: dict[str, Any] = {}
    if draw.random() < 0.2:
        options["restore_best"] = True
    if draw.random() < 0.15:
        options["batchnorm_stats"] = "updating"
    if draw.random() < 0.15:
        options["layer_decay"] = 0.5
    if draw.random() < 0.15 and not regression:
        options[draw.choice(("class_weights", "sampling"))] = "balanced"
    optimizer = draw.choices((use("sgd", momentum=0.9), use("sgd", momentum=0.0), use("adamw")), (4, 2, 1))[0]
    selector = draw.choices([each for each, _ in _SELECTORS], [weight for _, weight in _SELECTORS])[0]
    return Phase(
        f"phase-{number}",
        train=tuple(f"body.{num_blocks - 1}" if each == "last block" else each for each in selector),
        lr=0.003 if adaptive or optimizer.name == "adamw" else 0.02 if optimizer.options["momentum"] else 0.05,
        schedule=draw.choice((use("constant"), use("cosine"), use("one-cycle"))),
        optimizer=optimizer,
        **length,
        **options,
    )
