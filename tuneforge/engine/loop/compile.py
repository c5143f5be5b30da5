"""Compile the forward pass of a phase with `torch.compile` (`--compile`).

It is off by default, because the results of a compiled model differ in the last bits, and it draws other random
numbers from the same seeds. Every phase compiles anew: a graph records which parameters are frozen, so the graph of the
previous phase would compute no gradients for layers unfrozen since. Only full training batches use the compiled model;
a smaller last batch would trigger a recompilation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tuneforge.engine.context.forward import Features
from tuneforge.engine.context.run import Run
from tuneforge.engine.model.inspection import preserve_state
from tuneforge.engine.model.model import call_module, extract_logits
from tuneforge.engine.model.modes import Modes, set_modes
from tuneforge.errors import UsageError

_NUM_TIMINGS = 5


def compile_forward(run: Run, modes: Modes) -> Callable[..., Any]:
    """Compile the part of the model that a phase runs, compare its outputs, and log the estimated saving.

    Args:
        run: The run, in a phase that is about to train, with its feature cache if it has one.
        modes: The mode of each module while the phase trains.

    Raises:
        UsageError: The model cannot be compiled, or the compiled model gives other outputs.
    """
    torch.compiler.reset()
    feature_cache = run.forward_pass.feature_cache
    eager = run.model.module if feature_cache is None else feature_cache.train_tail
    inputs = _full_batch(run)
    with preserve_state(run.model.module):
        set_modes(modes)
        expected, eager_s = _time_pass(run, eager, inputs)
        is_random = not torch.equal(expected, _time_pass(run, eager, inputs, trials=1, seed=1)[0])
        began = time.perf_counter()
        compiled: Callable[..., Any] = torch.compile(eager)
        try:
            actual, _ = _time_pass(run, compiled, inputs, trials=1)
        except Exception as error:
            raise UsageError(
                f"the model cannot be compiled ({type(error).__name__})",
                where="--compile",
                why=str(error).partition("\n")[0],
                fix="run without --compile",
            ) from error
        compile_s = time.perf_counter() - began - eager_s
        _, compiled_s = _time_pass(run, compiled, inputs)
    if not is_random and not torch.allclose(actual, expected, rtol=1e-2, atol=1e-3):
        raise UsageError(
            "the compiled model gives other outputs than the eager one",
            where="--compile",
            why=f"they differ by up to {float((actual - expected).abs().max()):.3g}",
            fix="run without --compile",
        )
    _log_speedup(run, compile_s, eager_s - compiled_s)
    return compiled


def _log_speedup(run: Run, compile_s: float, saved_s: float) -> None:
    saved = saved_s * (run.total_steps - run.steps_done) * run.config.grad_accum_steps
    slower = "" if saved > compile_s else ", less than it costs"
    run.log(f"  compile: {compile_s:.1f} s; estimated saving in this phase {saved:.1f} s{slower}")


def _full_batch(run: Run) -> Any:
    indices = torch.arange(run.batch_size) % len(run.data.train)
    feature_cache = run.forward_pass.feature_cache
    values = None if feature_cache is None else feature_cache.get_features(run.data.train, indices)
    if values is None:
        return run.prepare_inputs(run.data.train.fetch(indices))
    return Features(values, indices, lambda rows: run.prepare_inputs(run.data.train.fetch(rows)))


def _time_pass(
    run: Run, network: Any, inputs: Any, *, trials: int = _NUM_TIMINGS, seed: int = 0
) -> tuple[Tensor, float]:
    """Return the output, and the seconds of the fastest of several forward and backward passes; drop the gradients."""
    seconds = []
    for _ in range(trials):
        run.reseed(seed)
        began = time.perf_counter()
        with run.autocast():
            output = extract_logits(
                network(*inputs.values) if isinstance(inputs, Features) else call_module(network, inputs)
            )
        output.float().square().mean().backward()
        seconds.append(time.perf_counter() - began)
        for parameter in run.model.module.parameters():
            parameter.grad = None
    return output.detach().float(), min(seconds)
