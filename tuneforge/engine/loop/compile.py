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

from tuneforge.engine.context.run import Features, Run
from tuneforge.engine.feature_cache.graph_split import Modes
from tuneforge.engine.model.freezing import set_modes, untouched
from tuneforge.engine.model.model import answer_of, call
from tuneforge.errors import UsageError

_TRIALS = 5


def compiled(run: Run, plan: Modes) -> Callable[..., Any]:
    """Compile what a phase trains, see that it gives what the plain one gives, and say whether that pays.

    Args:
        run: In a phase that is about to train, its prefix known.
        plan: The modes of the phase.

    Raises:
        UsageError: It cannot be compiled here, or gives something else.
    """
    torch.compiler.reset()
    plain = run.model.module if run.prefix is None else run.prefix.training
    inputs = _full_batch(run)
    with untouched(run.model.module):
        set_modes(plan)
        expected, plain_s = _tried(run, plain, inputs)
        noisy = not torch.equal(expected, _tried(run, plain, inputs, trials=1, seed=1)[0])
        began = time.perf_counter()
        fast: Callable[..., Any] = torch.compile(plain)
        try:
            given, _ = _tried(run, fast, inputs, trials=1)
        except Exception as error:
            raise UsageError(
                f"the model cannot be compiled ({type(error).__name__})",
                where="--compile",
                why=str(error).partition("\n")[0],
                fix="run without --compile",
            ) from error
        compile_s = time.perf_counter() - began - plain_s
        _, fast_s = _tried(run, fast, inputs)
    if not noisy and not torch.allclose(given, expected, rtol=1e-2, atol=1e-3):
        raise UsageError(
            "the compiled model gives other answers than the plain one",
            where="--compile",
            why=f"they differ by up to {float((given - expected).abs().max()):.3g}",
            fix="run without --compile",
        )
    _say(run, compile_s, plain_s - fast_s)
    return fast


def _say(run: Run, compile_s: float, gain_s: float) -> None:
    saved = gain_s * (run.total_steps - run.steps_done) * run.config.accumulate
    pays = "" if saved > compile_s else ", so it does not pay here"
    run.note(f"  compiled in {compile_s:.1f} s; over the phase's batches it saves about {saved:.1f} s{pays}")


def _full_batch(run: Run) -> Any:
    rows = torch.arange(run.config.batch_size) % len(run.data.train)
    kept = None if run.prefix is None else run.prefix.values(run.data.train, rows)
    return kept if kept is not None else run.ready(run.data.train.fetch(rows))


def _tried(run: Run, network: Any, inputs: Any, *, trials: int = _TRIALS, seed: int = 0) -> tuple[Tensor, float]:
    """The answer, and the seconds of a forward and backward pass (the least of several); no gradient stays."""
    seconds = []
    for _ in range(trials):
        run.reseed(seed)
        began = time.perf_counter()
        with run.autocast():
            output = answer_of(network(*inputs.values) if isinstance(inputs, Features) else call(network, inputs))
        output.float().square().mean().backward()
        seconds.append(time.perf_counter() - began)
        for parameter in run.model.module.parameters():
            parameter.grad = None
    return output.detach().float(), min(seconds)
