"""The compiled forward pass of a phase (`--compile`): opt-in, because it changes the last bits.

What is compiled depends on what is frozen, so each phase compiles afresh; a graph kept from the phase before would go
on without gradients for what has been thawed since. Batches of full size train through it; the last one of an epoch,
and evaluation, run as always. Noise inside the model is drawn otherwise, though from the same seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tuneforge.engine.context.forward import Features
from tuneforge.engine.context.run import Run
from tuneforge.engine.model.model import call_module, extract_logits
from tuneforge.engine.model.modes import Modes, preserve_modes_and_buffers, set_modes
from tuneforge.errors import UsageError

_NUM_TIMINGS = 5


def compile_forward(run: Run, modes: Modes) -> Callable[..., Any]:
    """Compile what a phase trains, see that it gives what the plain one gives, and say whether that pays.

    Args:
        run: In a phase that is about to train, its prefix known.
        modes: The modes of the phase.

    Raises:
        UsageError: It cannot be compiled here, or gives something else.
    """
    torch.compiler.reset()
    feature_cache = run.forward_pass.feature_cache
    plain = run.model.module if feature_cache is None else feature_cache.train_tail
    inputs = _full_batch(run)
    with preserve_modes_and_buffers(run.model.module):
        set_modes(modes)
        expected, plain_s = _time_pass(run, plain, inputs)
        noisy = not torch.equal(expected, _time_pass(run, plain, inputs, trials=1, seed=1)[0])
        began = time.perf_counter()
        fast: Callable[..., Any] = torch.compile(plain)
        try:
            actual, _ = _time_pass(run, fast, inputs, trials=1)
        except Exception as error:
            raise UsageError(
                f"the model cannot be compiled ({type(error).__name__})",
                where="--compile",
                why=str(error).partition("\n")[0],
                fix="run without --compile",
            ) from error
        compile_s = time.perf_counter() - began - plain_s
        _, fast_s = _time_pass(run, fast, inputs)
    if not noisy and not torch.allclose(actual, expected, rtol=1e-2, atol=1e-3):
        raise UsageError(
            "the compiled model gives other answers than the plain one",
            where="--compile",
            why=f"they differ by up to {float((actual - expected).abs().max()):.3g}",
            fix="run without --compile",
        )
    _log_speedup(run, compile_s, plain_s - fast_s)
    return fast


def _log_speedup(run: Run, compile_s: float, saved_s: float) -> None:
    saved = saved_s * (run.total_steps - run.steps_done) * run.config.grad_accum_steps
    pays = "" if saved > compile_s else ", so it does not pay here"
    run.log(f"  compiled in {compile_s:.1f} s; over the phase's batches it saves about {saved:.1f} s{pays}")


def _full_batch(run: Run) -> Any:
    indices = torch.arange(run.config.batch_size) % len(run.data.train)
    feature_cache = run.forward_pass.feature_cache
    features = None if feature_cache is None else feature_cache.get_features(run.data.train, indices)
    return features if features is not None else run.prepare_inputs(run.data.train.fetch(indices))


def _time_pass(
    run: Run, network: Any, inputs: Any, *, trials: int = _NUM_TIMINGS, seed: int = 0
) -> tuple[Tensor, float]:
    """The answer, and the seconds of a forward and backward pass (the least of several); no gradient stays."""
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
