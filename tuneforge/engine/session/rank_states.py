"""What differs between the ranks of a run in the middle of an epoch, so that a checkpoint holds it for each of them.

Statistics that forward updates are averaged over the ranks at the end of an epoch, and plain attributes never are. The
generators of Python and numpy, from which a model may draw in forward, are seeded once at the start of a run.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuneforge.engine.context.distributed import ProcessGroup
from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.phase_progress import PhaseProgress
from tuneforge.engine.model.module_state import restore_state
from tuneforge.engine.storage.checkpoint import pack, unpack


def get_rank_states(run: Run, attributes: dict[str, Any], progress: PhaseProgress | None) -> list[dict[str, Any]]:
    """Return the buffers that the phase updates, changed plain attributes and random states of each rank, by rank."""
    updating = [] if progress is None else progress.backward_pass.updating_modules
    own = {id(buffer) for module in updating for buffer in module.buffers(recurse=False)}
    is_alone = run.process_group.world_size == 1  # the checkpoint holds the buffers of rank 0 anyway
    buffers = {} if is_alone else {name: each for name, each in run.model.module.named_buffers() if id(each) in own}
    return _all_gather_state(
        run.process_group, {"buffers": buffers, "attributes": attributes, "generators": _get_generators()}
    )


def restore_rank_buffers(run: Run, states: list[dict[str, Any]]) -> None:
    """Restore the buffers of this rank; with another number of ranks, those of rank 0 stay."""
    if len(states) == run.process_group.world_size:
        restore_state(run.model.module, states[run.process_group.rank]["buffers"])


def restore_generators(state: dict[str, Any]) -> None:
    """Restore the generators of Python and numpy from the state of a rank."""
    version, numbers, *rest = state["generators"]["python"]
    random.setstate((version, tuple(numbers.tolist()), *rest))
    name, keys, *rest = state["generators"]["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def _get_generators() -> dict[str, Any]:
    version, numbers, *rest = random.getstate()
    python = [version, torch.tensor(numbers), *rest]
    name, keys, *rest = np.random.get_state(legacy=True)
    return {"python": python, "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest]}


def get_own_state(run: Run, states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the state of this rank, or of rank 0 where it did not take part."""
    return states[run.process_group.rank if run.process_group.rank < len(states) else 0]


def _all_gather_state(process_group: ProcessGroup, state: dict[str, Any]) -> list[Any]:
    """Return the state of each rank: plain data and tensors."""
    if process_group.world_size == 1:
        return [state]
    tensors: dict[str, Tensor] = {}
    packed = pack(state, tensors, {})
    layout = {name: [str(each.dtype).removeprefix("torch."), list(each.shape)] for name, each in tensors.items()}
    content = [each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in tensors.values()]
    described = process_group.all_gather_object([packed, layout])
    sizes = [sum(map(_num_bytes, layout.values())) for _, layout in described]
    gathered = process_group.all_gather(torch.cat([torch.empty(0, dtype=torch.uint8), *content]), sizes)
    states = []
    for (plain, specs), rows in zip(described, torch.split(gathered, sizes), strict=True):
        parts = torch.split(rows, list(map(_num_bytes, specs.values())))
        restored = {
            name: part.clone().view(getattr(torch, dtype)).reshape(shape)
            for (name, (dtype, shape)), part in zip(specs.items(), parts, strict=True)
        }
        states.append(unpack(plain, restored))
    return states


def _num_bytes(spec: tuple[str, list[int]]) -> int:
    dtype, shape = spec
    return int(getattr(torch, dtype).itemsize) * math.prod(shape)
