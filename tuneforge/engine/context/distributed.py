"""The processes of one run, started by torchrun: what each works on, and what they tell one another.

All of them go through the same story with the same strategy. A training batch is cut into one share a rank, and the
gradients are summed, each sample counted once, so that the global batches and what is learnt from them are those of one
process. Rank 0 alone writes the folder. See docs/scale.md.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, distributed, nn

from tuneforge.engine.model.fsdp import is_sharded
from tuneforge.engine.model.module_state import bitwise_equal
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.errors import FolderError, HaltError, TuneforgeError

_BUCKET_BYTES = 25 << 20  # bytes of gradients that travel together, as torch's DistributedDataParallel has it
_TIMEOUT = timedelta(minutes=30)


@attrs.frozen
class ProcessGroup:
    """The processes of a run; alone, where there is one.

    Args:
        rank: Of this process, from 0.
        world_size: How many there are.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_env(cls) -> ProcessGroup:
        """Those that torchrun started beside this one, once they have met; or this process alone.

        They meet through gloo for tensors on the CPU, and NCCL for those on CUDA.
        """
        if not distributed.is_available():
            return cls()
        if not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
                return cls()
            store, rank, size = next(distributed.rendezvous("env://", timeout=_TIMEOUT))  # type: ignore[attr-defined]
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store, with dead addresses
            store = distributed.PrefixStore(f"tuneforge/{attempt}", store)  # type: ignore[attr-defined]
            distributed.init_process_group(store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
            atexit.register(distributed.destroy_process_group)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_single(self) -> bool:
        """True where there is nobody to ask."""
        return self.world_size == 1

    @property
    def is_main(self) -> bool:
        """True for the one that writes and speaks."""
        return self.rank == 0

    def num_local(self, total: int) -> int:
        """Of so many samples, how many are this rank's; shares differ by one at most.

        Where there are too few for all, some have none, so that no share is a single sample: a norm needs two.
        """
        busy = min(self.world_size, max(1, total // 2))
        return total // busy + (self.rank < total % busy) if self.rank < busy else 0

    def local_range(self, total: int) -> tuple[int, int]:
        """This rank's part of a global batch, from and to; where there are too few for all, one to keep in step."""
        before = sum(ProcessGroup(rank, self.world_size).num_local(total) for rank in range(self.rank))
        count = self.num_local(total)
        return (before, before + count) if count else (0, min(2, total))

    def local_indices(self, indices: Tensor) -> Tensor:
        """This rank's part of the rows of a global batch."""
        start, stop = self.local_range(len(indices))
        return indices[start:stop]

    def all_reduce_any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is raised on any rank."""
        if self.is_single:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        distributed.all_reduce(raised, op=distributed.ReduceOp.MAX)
        return tuple(map(bool, raised.tolist()))

    def broadcast_flag(self, flag: bool) -> bool:
        """What rank 0 says, for whatever depends on a clock or a disk."""
        return self.all_reduce_any(flag and self.is_main)[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """What each rank says, plain JSON data, by rank."""
        if self.is_single:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor([len(own)]), [1] * self.world_size).tolist()
        text = bytes(self.all_gather(own, sizes).tolist())
        ends = [sum(sizes[: place + 1]) for place in range(self.world_size)]
        return [json.loads(text[end - size : end]) for end, size in zip(ends, sizes, strict=True)]

    def all_reduce(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The sum over all ranks, of each."""
        if self.is_single:
            return tensors
        sums = tuple(each.contiguous().clone() for each in tensors)
        for each in sums:
            distributed.all_reduce(each)
        return sums

    def all_gather(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all ranks, one rank after the other.

        Args:
            local: This rank's rows (m, ...); what exceeds its size is left out.
            sizes: Rows of each rank.
        """
        if self.is_single:
            return local
        most = max(sizes)
        padded = local.new_zeros((most, *local.shape[1:]))
        padded[: sizes[self.rank]] = local[: sizes[self.rank]]
        sent = padded.reshape(-1).view(torch.uint8)  # as bytes, so that any type will do
        parts = [torch.empty_like(sent) for _ in sizes]
        distributed.all_gather(parts, sent)
        whole = (part.view(local.dtype).reshape(padded.shape) for part in parts)
        return torch.cat([part[:size] for part, size in zip(whole, sizes, strict=True)])

    def all_gather_batch(self, local: Tensor, total: int) -> Tensor:
        """Results (b, ...) for a global batch, from those of each rank's share."""
        sizes = [ProcessGroup(rank, self.world_size).num_local(total) for rank in range(self.world_size)]
        return self.all_gather(local, sizes)

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all ranks, in place; a rank that has none of a tensor adds nothing.

        A tensor that no rank has a gradient of keeps none, so that an optimizer leaves it alone. Those of sharded
        tensors are summed in the backward pass.
        """
        parameters = [each for each in parameters if not is_sharded(each)]
        if self.is_single or not parameters:
            return
        held = torch.tensor([each.grad is not None for each in parameters], dtype=torch.int32)
        distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
        present = [each for each, has in zip(parameters, held.tolist(), strict=True) if has]
        for each in present:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
            elif each.grad.is_sparse:
                each.grad = each.grad.to_dense()
        waiting = []
        for bucket in _buckets([each.grad for each in present if each.grad is not None]):
            flat = torch.cat([each.reshape(-1) for each in bucket])
            waiting.append((bucket, flat, distributed.all_reduce(flat, async_op=True)))
        for bucket, flat, work in waiting:
            work.wait()
            for gradient, part in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def average_buffers(self, statistics: Sequence[Tensor]) -> None:
        """Give every rank the mean of its statistics and those of the others, in place; whole numbers follow rank 0."""
        if self.is_single:
            return
        for each in statistics:
            if each.is_floating_point():
                (mean,) = self.all_reduce(each / self.world_size)
                each.copy_(mean)
            else:
                self.broadcast([each])

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Take rank 0's values, in place; of a sharded tensor each rank keeps its part."""
        if not self.is_single:
            for tensor in (each for each in tensors if not is_sharded(each)):
                tensor.copy_(self._broadcast_tensor(tensor))

    def _broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, sent as bytes, so that any type and any layout will do."""
        plain = tensor.detach().contiguous().clone()
        distributed.broadcast(plain.reshape(-1).view(torch.uint8), 0)
        return plain

    def check_equal(self, tensors: dict[str, Tensor]) -> None:
        """See that all ranks hold the same bits of what each holds whole.

        Raises:
            HaltError: They have drifted apart; the message names tensors.
        """
        if self.is_single:
            return
        apart = []
        for name, tensor in ((name, each) for name, each in tensors.items() if not is_sharded(each)):
            apart += [] if bitwise_equal(self._broadcast_tensor(tensor), tensor) else [name]
        apart = sorted({name for names in self.all_gather_object(apart) for name in names})
        if apart:
            raise HaltError(
                f"the ranks have drifted apart: {', '.join(apart[:5])}",
                why=f"{len(apart)} tensor(s) differ between processes that should hold the same",
                fix="look for code that draws at random, or reads something that differs between the processes",
            )

    def barrier(self) -> None:
        """Go on when all are here."""
        if not self.is_single:
            distributed.barrier()


@contextlib.contextmanager
def open_run_dir(process_group: ProcessGroup, path: Path | None, *, resume: bool) -> Iterator[RunDir]:
    """The run's folder, which rank 0 opens; the others are told where it is, and write nothing."""
    if not process_group.is_main:
        told = process_group.all_gather_object(None)[0]
        if told is None:
            raise FolderError("rank 0 could not open the run's folder", fix="see what rank 0 says")
        yield RunDir(Path(told), writable=False)
        return
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(RunDir(path, resume=resume))
        except TuneforgeError:
            process_group.all_gather_object(None)
            raise
        process_group.all_gather_object(str(place.path))
        yield place


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients that travel together, of one type, the last layers first."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in reversed(gradients):
        by_type.setdefault(gradient.dtype, []).append(gradient)
    for alike in by_type.values():
        bucket: list[Tensor] = []
        size = 0
        for gradient in alike:
            bucket.append(gradient)
            size += gradient.numel() * gradient.element_size()
            if size >= _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
