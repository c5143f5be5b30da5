"""Rows 1 to 9 and 11 to 13 for a library, in terms of `case.Peer`; row 10 is in each library's module.

Rows 14 to 16 are in `around.py`, rows 17 to 20 in `killed.py`. For a library that does not freeze (`freezes =
False`), rows 5, 7 and 8 are tested on a run that trains all layers.

Each function returns if the library passes, and raises `Fails` or `NotThereError` if not.
"""

import contextlib
import io
import logging
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import around
import killed
import numpy as np
import torch
from case import (
    STEPS_AN_EPOCH,
    Fails,
    KilledError,
    Net,
    PassesWithNote,
    Peer,
    Plan,
    Witness,
    changed,
    network,
    seeded,
    state_of,
    watched,
)
from torch import Tensor

BORDER = STEPS_AN_EPOCH
KILLS = {BORDER - 1: "1 step before", BORDER: "at", BORDER + 1: "1 step after", 2 * BORDER: "1 epoch after"}
"""Training steps after which the process is killed, and their position relative to the boundary of the two phases."""


def whole(peer: Peer, plan: Plan, *, net: Net | None = None) -> tuple[Net, Witness]:
    """Return an uninterrupted run."""
    net = network() if net is None else net
    with TemporaryDirectory() as folder, watched(net, plan) as witness:
        seeded()
        peer.fit(net, plan, Path(folder))
    return net, witness


def interrupted(peer: Peer, plan: Plan, kill_at: int, *, fresh: Callable[[], Net] = network) -> tuple[Net, Witness]:
    """Return a run that is killed and resumed as documented, with a new network and the seeds set again."""
    with TemporaryDirectory() as folder:
        net = network()
        with watched(net, plan, kill_at=kill_at), contextlib.suppress(KilledError):
            seeded()
            peer.fit(net, plan, Path(folder))
            raise Fails("it was not killed")
        net = fresh()
        with watched(net, plan) as witness:
            seeded()
            peer.fit(net, plan, Path(folder), resume=True)
        return net, witness


def apart(one: Net, other: Net) -> list[str]:
    """Return the names of the parameters in which two runs differ by more than rounding."""
    ended = dict(other.named_parameters())
    return [name for name, each in one.named_parameters() if not torch.allclose(each, ended[name], 1e-4, 1e-6)]


def plan_for(peer: Peer, **given: Any) -> Plan:
    """Return a plan of two phases, or of one for a library that does not freeze."""
    return Plan(**given) if getattr(peer, "freezes", True) else Plan(phases=("all",) * 3, **given)


def row_1(peer: Peer) -> None:
    """A run that is killed around the boundary and resumed ends with the same weights."""
    plan, wrong = Plan(), []
    expected, _ = whole(peer, plan)
    for kill_at, place in KILLS.items():
        try:
            net, witness = interrupted(peer, plan, kill_at)
        except Exception as error:  # noqa: BLE001 - whatever a tool raises here, it is a row that it fails
            wrong.append(f"{place}: {type(error).__name__}")
            continue
        if differing := apart(expected, net):
            wrong.append(f"{place}: {_how(net, witness, differing)}")
    if wrong:
        raise Fails("killed " + "; ".join(wrong))


def _how(net: Net, witness: Witness, differing: list[str]) -> str:
    backbone = {name for name, _ in net.backbone.named_parameters(prefix="backbone")}
    still = witness.starts and not backbone & set(changed(witness.starts[0], state_of(net)))
    return "the backbone is frozen again" if still else f"{len(differing)} tensors end differently"


def row_2(peer: Peer) -> None:
    """BatchNorm layers of the frozen backbone keep their statistics, also over validation, and normalize with them."""
    plan = Plan(phases=("head", "head", "all"))
    _, witness = whole(peer, plan)
    moved = [name for name in changed(witness.starts[0], witness.starts[2]) if "running" in name]
    faults = [f"{len(moved)} statistics of frozen BatchNorm change"] if moved else []
    if faults := [*faults, *(each for each in witness.faults if "norm" in each)]:
        raise Fails("; ".join(faults))


def row_3(peer: Peer) -> None:
    """Dropout of the frozen backbone is off."""
    plan = Plan()
    _, witness = whole(peer, plan, net=network(0.5))
    if faults := [each for each in witness.faults if "dropout" in each]:
        raise Fails(faults[0])


def row_4(peer: Peer) -> None:
    """Frozen weights do not change by weight decay and momentum, also when they are frozen again after training."""
    wrong = []
    for optimizer in ("adamw", "sgd"):
        plan = Plan(("head", "all", *peer_again(peer), "all"), optimizer, decay=0.5)
        net, witness = whole(peer, plan)
        ends = [*witness.starts[1:], state_of(net)]
        for epoch, what in enumerate(plan.phases):
            moved = [name for name in changed(witness.starts[epoch], ends[epoch]) if name in _weights(net)]
            if what == "head" and moved:
                wrong.append(f"{optimizer}, {'frozen again' if epoch else 'frozen first'}: {len(moved)} tensors move")
    if wrong:
        raise Fails("; ".join(wrong))


def peer_again(peer: Peer) -> tuple[str, ...]:
    """Add a phase that freezes the backbone again, if the library can."""
    return ("head",) if getattr(peer, "freezes_again", True) else ()


def _weights(net: Net) -> set[str]:
    """Return the names of the backbone's weights and biases, without BatchNorm, which row 2 tests."""
    return {f"backbone.{name}" for name in ("stem.0.weight", "stem.0.bias")} | {
        f"backbone.twins.{name}" for name, _ in net.backbone.get_submodule("twins").named_parameters()
    }


def row_5(peer: Peer) -> None:
    """Each schedule works across the boundary, and through a resume in the epoch after it."""
    wrong, refused, resumes = [], [], not _resumed_apart(peer, plan_for(peer))
    for schedule in peer.schedules():
        try:
            whole(peer, plan_for(peer, schedule=schedule))
            if resumes and _resumed_apart(peer, plan_for(peer, schedule=schedule)):
                wrong.append(f"{schedule}: resumed, it ends differently")
        except Exception as error:  # noqa: BLE001 - whatever a tool raises here, it is a row that it fails
            if "support" in str(error):
                refused.append(schedule)
            else:
                wrong.append(f"{schedule}: {type(error).__name__}: {str(error).partition(chr(10))[0][:60]}")
    if not resumes:
        wrong.append("no resume ends where it should (row 1)")
    if wrong:
        raise Fails("; ".join(wrong))
    if refused:
        raise PassesWithNote(f"{', '.join(refused)} is refused as not supported")


def _resumed_apart(peer: Peer, plan: Plan) -> list[str]:
    """Return what differs at the end of a run that is killed an epoch after the boundary."""
    expected, _ = whole(peer, plan)
    return apart(expected, interrupted(peer, plan, 2 * BORDER)[0])


def row_6(peer: Peer) -> None:
    """Two equal biases that are unfrozen together, each block with its own learning rate, both train."""
    net, witness = whole(peer, Plan(apart=True))
    still = {"backbone.twins.one.bias", "backbone.twins.two.bias"} - set(changed(witness.starts[1], state_of(net)))
    if still:
        raise Fails(f"never trained: {', '.join(sorted(still))}")


def row_7(peer: Peer) -> None:
    """After a resume with modules registered in another order, every tensor ends with the same values."""
    plan = plan_for(peer)
    expected, _ = whole(peer, plan)
    straight, _ = interrupted(peer, plan, 2 * BORDER)
    if apart(expected, straight):
        raise Fails("not even in the same order (row 1)")
    net, _ = interrupted(peer, plan, 2 * BORDER, fresh=lambda: network(backwards=True))
    if apart(expected, net):
        raise Fails("moments land by position, without an error: the run ends differently")


def row_8(peer: Peer) -> None:
    """After a resume, the order of samples is that of the uninterrupted run."""
    plan = plan_for(peer, shuffle=True)
    _, expected = whole(peer, plan)
    epochs = [expected.batches[start : start + BORDER] for start in range(0, 3 * BORDER, BORDER)]
    wrong = []
    for kill_at, place in {2 * BORDER: "at an epoch's boundary", 2 * BORDER + 1: "within an epoch"}.items():
        _, witness = interrupted(peer, plan, kill_at)
        count = len(witness.batches)
        if witness.batches != expected.batches[-count:]:
            again = witness.batches[-BORDER:] == epochs[0]
            wrong.append(f"{place}: {'the order of epoch 0 again' if again else 'another order'}")
    if wrong:
        raise Fails("killed " + "; ".join(wrong))


def row_9(peer: Peer) -> None:
    """Unfrozen layers train when the network is compiled."""
    net = network()
    before = state_of(net)
    with TemporaryDirectory() as folder:
        seeded()
        peer.fit(net, Plan(compiled=True), Path(folder))
    still = _weights(net) - set(changed(before, state_of(net)))
    if still:
        raise Fails(f"{len(still)} unfrozen tensors never train")


def row_10(peer: Peer) -> None:
    """Two ranks stay equal across the boundary."""
    with TemporaryDirectory() as folder:
        peer.ranks(Path(folder))


def row_11(peer: Peer) -> None:
    """The learning-rate finder leaves weights, buffers, modes and random generators as they were."""
    net = network(0.5)
    before, modes, random_before = state_of(net), [module.training for module in net.modules()], _random_state()
    with TemporaryDirectory() as folder:
        peer.rates(net, Path(folder))
    wrong = [f"{len(moved)} tensors"] if (moved := changed(before, state_of(net))) else []
    wrong += ["modes"] if modes != [module.training for module in net.modules()] else []
    after = _random_state()
    wrong += [name for name, state in random_before.items() if not np.array_equal(state, after[name])]
    if wrong:
        raise Fails(f"changes {', '.join(wrong)}")


def _random_state() -> dict[str, np.ndarray]:
    keys = np.random.get_state()[1]
    return {
        "torch's random state": torch.get_rng_state().numpy(),
        "numpy's random state": np.array(keys),
        "Python's random state": np.array(random.getstate()[1]),
    }


def row_12(peer: Peer) -> None:
    """A pattern that matches nothing is refused, and near names are suggested."""
    with TemporaryDirectory() as folder:
        said = ""
        try:
            said = peer.pattern(network(), Path(folder))
        except (Fails, KilledError):
            raise
        except Exception as error:
            if type(error).__name__ == "NotThereError":
                raise
            if "backbone.stem" in str(error) or "did you mean" in str(error).lower():
                return
            raise PassesWithNote("refused; no near name is offered") from error
        raise Fails(said or "ignored in silence")


def row_13(peer: Peer) -> None:
    """When early stopping ends a phase or training, the reason is printed or logged."""
    if _speaks(peer, asked=False):
        return
    if _speaks(peer, asked=True):
        raise PassesWithNote("if asked to (verbose=True)")
    raise Fails("early stopping ends training and nothing says so")


def _speaks(peer: Peer, *, asked: bool) -> bool:
    """Return whether output or log says that early stopping ended a phase or training."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    loggers = [logging.getLogger(), *map(logging.getLogger, SPEAKERS)]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with TemporaryDirectory() as folder, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            peer.reasons(network(), Path(folder), asked=asked)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    return any(word in out.getvalue().lower() for word in REASONS)


SPEAKERS = ("lightning", "lightning.pytorch", "finetuning_scheduler", "transformers", "accelerate")
"""Loggers that may not propagate their records."""

REASONS = ("early stop", "not improve", "did not improve", "no improvement", "stopping since")
"""Words by which a library may say that it stopped because nothing improved."""

ROWS: dict[int, Callable[[Peer], None]] = {
    1: row_1, 2: row_2, 3: row_3, 4: row_4, 5: row_5, 6: row_6, 7: row_7, 8: row_8, 9: row_9, 10: row_10,
    11: row_11, 12: row_12, 13: row_13, 14: around.row_14, 15: around.row_15, 16: around.row_16, 17: killed.row_17,
    18: killed.row_18, 19: killed.row_19, 20: killed.row_20,
}  # fmt: skip
OF_FREEZING = (1, 2, 3, 4, 6, 9, 10, 12)
"""Rows that do not apply to a library that does not freeze."""


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names of the parameters in which two ranks differ."""
    return [name for name, each in one.items() if not torch.allclose(each, other[name], 1e-5, 1e-7)]
