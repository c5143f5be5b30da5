"""The processes of one run, which torchrun starts: what each works on, and how they communicate.

All ranks run the same strategy. Each training batch is split into one share per rank, and the gradients are summed with
each sample counted once, so that batches and results are those of a single process. Only rank 0 writes the run
directory. See docs/scale.md.
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

_BUCKET_BYTES = 25 << 20  # gradients summed at once, the default of torch's DistributedDataParallel
_TIMEOUT = timedelta(minutes=30)


@attrs.frozen
class ProcessGroup:
    """The processes of a run.

    Args:
        rank: Of this process, from 0.
        world_size: Number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_env(cls) -> ProcessGroup:
        """Join the processes that torchrun started together with this one; return a group of one if there are none.

        The backend is gloo for tensors on the CPU, and NCCL for those on CUDA.
        """
        if not distributed.is_available():
            return cls()
        if not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
                return cls()
            store, rank, size = next(distributed.rendezvous("env://", timeout=_TIMEOUT))  # type: ignore[attr-defined]
            # After a restart torchrun's store still has the addresses of the dead processes.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = distributed.PrefixStore(f"tuneforge/{attempt}", store)  # type: ignore[attr-defined]
            distributed.init_process_group(store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
            atexit.register(distributed.destroy_process_group)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main(self) -> bool:
        """True for rank 0, which writes files and logs to the terminal."""
        return self.rank == 0

    def num_local(self, total: int) -> int:
        """Return how many of `total` samples belong to this rank; shares differ by at most one.

        If there are too few samples for all ranks, some get none, so that no share is a single sample: BatchNorm cannot
        train on one.
        """
        busy = min(self.world_size, max(1, total // 2))
        return total // busy + (self.rank < total % busy) if self.rank < busy else 0

    def local_range(self, total: int) -> tuple[int, int]:
        """Return the range (from, to) of this rank's share of a global batch.

        A rank without a share gets up to two samples all the same, so that it makes the forward pass that collective
        operations wait for; their results are not counted.
        """
        before = sum(ProcessGroup(rank, self.world_size).num_local(total) for rank in range(self.rank))
        count = self.num_local(total)
        return (before, before + count) if count else (0, min(2, total))

    def local_indices(self, indices: Tensor) -> Tensor:
        """Return this rank's share of the rows of a global batch."""
        start, stop = self.local_range(len(indices))
        return indices[start:stop]

    def all_reduce_any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is True on any rank."""
        if self.world_size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        distributed.all_reduce(raised, op=distributed.ReduceOp.MAX)
        return tuple(map(bool, raised.tolist()))

    def broadcast_flag(self, flag: bool) -> bool:
        """Return the flag of rank 0, for decisions that depend on a clock or a disk."""
        return self.all_reduce_any(flag and self.is_main)[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the value of each rank, plain JSON data, by rank."""
        if self.world_size == 1:
            return [value]
        local = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor([len(local)]), [1] * self.world_size).tolist()
        text = bytes(self.all_gather(local, sizes).tolist())
        ends = [sum(sizes[: rank + 1]) for rank in range(self.world_size)]
        return [json.loads(text[end - size : end]) for end, size in zip(ends, sizes, strict=True)]

    def all_reduce(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the sum of each tensor over all ranks."""
        if self.world_size == 1:
            return tensors
        sums = tuple(each.contiguous().clone() for each in tensors)
        for each in sums:
            distributed.all_reduce(each)
        return sums

    def all_gather(self, local: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, in the order of the ranks.

        Args:
            local: This rank's rows (m, ...); those beyond its size are dropped.
            sizes: Number of rows of each rank.
        """
        if self.world_size == 1:
            return local
        padded = local.new_zeros((max(sizes), *local.shape[1:]))  # all_gather needs equal sizes
        padded[: sizes[self.rank]] = local[: sizes[self.rank]]
        sent = padded.reshape(-1).view(torch.uint8)  # as bytes, so that every type works
        parts = [torch.empty_like(sent) for _ in sizes]
        distributed.all_gather(parts, sent)
        gathered = (part.view(local.dtype).reshape(padded.shape) for part in parts)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def all_gather_batch(self, local: Tensor, total: int) -> Tensor:
        """Return the results (b, ...) for a global batch from those of each rank's share."""
        sizes = [ProcessGroup(rank, self.world_size).num_local(total) for rank in range(self.world_size)]
        return self.all_gather(local, sizes)

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of all ranks in place; a rank without a gradient of a tensor adds zeros.

        A tensor that has no gradient on any rank keeps none, so that the optimizer does not update it. Gradients of
        sharded tensors are skipped, because FSDP sums them in the backward pass.
        """
        parameters = [each for each in parameters if not is_sharded(each)]
        if self.world_size == 1 or not parameters:
            return
        held = torch.tensor([each.grad is not None for each in parameters], dtype=torch.int32)
        distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
        present = [each for each, has in zip(parameters, held.tolist(), strict=True) if has]
        for each in present:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
            elif each.grad.is_sparse:
                each.grad = each.grad.to_dense()
        pending = []
        for bucket in _buckets([each.grad for each in present if each.grad is not None]):
            flat = torch.cat([each.reshape(-1) for each in bucket])
            pending.append((bucket, flat, distributed.all_reduce(flat, async_op=True)))
        for bucket, flat, work in pending:
            work.wait()
            for gradient, part in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def average_buffers(self, statistics: Sequence[Tensor]) -> None:
        """Replace floating-point buffers by their mean over all ranks, in place; integer ones take rank 0's values."""
        if self.world_size == 1:
            return
        for each in statistics:
            if each.is_floating_point():
                (mean,) = self.all_reduce(each / self.world_size)
                each.copy_(mean)
            else:
                self.broadcast([each])

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Copy the values of rank 0 in place; a sharded tensor stays as it is."""
        if self.world_size > 1:
            for tensor in (each for each in tensors if not is_sharded(each)):
                tensor.copy_(self._broadcast_tensor(tensor))

    def _broadcast_tensor(self, tensor: Tensor) -> Tensor:
        """Return the values of rank 0, sent as bytes so that any type and layout works."""
        plain = tensor.detach().contiguous().clone()
        distributed.broadcast(plain.reshape(-1).view(torch.uint8), 0)
        return plain

    def check_equal(self, tensors: dict[str, Tensor]) -> None:
        """Check that every tensor that is replicated is bit-identical on all ranks.

        Raises:
            HaltError: Some differ; the message names them.
        """
        if self.world_size == 1:
            return
        different: list[str] = []
        for name, tensor in ((name, each) for name, each in tensors.items() if not is_sharded(each)):
            different += [] if bitwise_equal(self._broadcast_tensor(tensor), tensor) else [name]
        different = sorted({name for names in self.all_gather_object(different) for name in names})
        if different:
            raise HaltError(
                f"weights differ between ranks: {', '.join(different[:5])}",
                why=f"{len(different)} tensor(s) that should be bit-identical on all ranks are not",
                fix="look for code that draws its own random numbers, or reads what differs between processes",
            )

    def barrier(self) -> None:
        """Wait until all ranks have arrived."""
        if self.world_size > 1:
            distributed.barrier()


@contextlib.contextmanager
def open_run_dir(process_group: ProcessGroup, path: Path | None, *, resume: bool) -> Iterator[RunDir]:
    """Open the run directory on rank 0; the other ranks get its path and write nothing."""
    if not process_group.is_main:
        main_path = process_group.all_gather_object(None)[0]
        if main_path is None:
            raise FolderError("rank 0 could not open the run directory", fix="see the error of rank 0")
        yield RunDir(Path(main_path), writable=False)
        return
    with contextlib.ExitStack() as stack:
        try:
            run_dir = stack.enter_context(RunDir(path, resume=resume))
        except TuneforgeError:
            process_group.all_gather_object(None)
            raise
        process_group.all_gather_object(str(run_dir.path))
        yield run_dir


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield gradients of one type that are summed together, the last layers first."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in reversed(gradients):
        by_type.setdefault(gradient.dtype, []).append(gradient)
    for same_type in by_type.values():
        bucket: list[Tensor] = []
        size = 0
        for gradient in same_type:
            bucket.append(gradient)
            size += gradient.numel() * gradient.element_size()
            if size >= _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
