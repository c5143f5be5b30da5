"""Only one thread of the server computes on every core; the others keep to one core.

libgomp lets the threads of a team spin for their next work only while the process has no more such threads than cores.
A second team, of a thread that loads or decodes, ends that, and the threads of every operator of a forward pass then
have to be woken: a sample of resnet18 at 64x64 took 10.6 ms instead of 7.2 ms on two cores.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def limit_to_one_thread() -> Any:
    """Let torch compute with one thread in the calling thread, and only there.

    Returns:
        An object whose `restore_original_limits()` undoes the limit, if called in the same thread.
    """
    torch.get_num_threads()  # torch sets up its threads on first use, which would undo a limit set before
    return _thread_pools().limit(limits=1, user_api="openmp")


@cache
def _thread_pools() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
