"""Training on several processes, which torchrun starts: ranks hold the same model and each part of a batch.

A rank's gradients are those of its part's share of the loss, so that their sum over ranks is the gradient of
the whole batch. They are summed by torch.distributed, on the CPU, by gloo. A gradient that is dense goes
whole, which for a pool is little; of a sparse one go the rows that the part reads, not the table.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cemb import processes

# A machine that is cut off is noticed after this time; a process that ends, at once.
_TIMEOUT = timedelta(minutes=10)


class RankLostError(RuntimeError):
    """Another rank does not answer, or not any more."""


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join torchrun's other processes; yields rank and number of ranks, (0, 1) without torchrun.

    What takes long and needs no other rank should be done before, for ranks wait ten minutes for each other.
    """
    rank, num_ranks = processes.rank_and_number()
    if num_ranks == 1:
        yield 0, 1
        return
    try:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    except RuntimeError as error:
        why = f"rank {rank} of {num_ranks} could not join the others, of which one may have ended"
        raise RankLostError(processes.with_remedy(f"{why} ({_said(error)})")) from None
    yield rank, num_ranks
    # After an error the connections stay until the process ends, so that it is told before others miss it.
    dist.destroy_process_group()


@contextmanager
def _rank_lost_errors() -> Iterator[None]:
    """Say what it means that a collective fails."""
    try:
        yield
    except RuntimeError as error:
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        why = f"rank {rank} of {num_ranks} lost its connection to another process, which has ended"
        raise RankLostError(processes.with_remedy(f"{why} ({_said(error)})")) from None


def _said(error: RuntimeError) -> str:
    """What torch says: it begins with a line of its source, and ends with advice."""
    said = str(error).splitlines()[0].partition(". ")[0]
    return said.partition("] ")[2] if said.startswith("[") else said


def gradient_bytes(gradient: Tensor) -> int:
    """What a rank hands over of a gradient: its values, and of a sparse one the numbers of its rows."""
    if gradient.is_sparse:
        return gradient_bytes(gradient._indices()) + gradient_bytes(gradient._values())
    return gradient.numel() * gradient.element_size()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> int:
    """Replace gradients by their sums over all ranks; returns the bytes that this one handed over.

    Sums of sparse gradients are sparse and coalesced. Where a rank has none, its part had no pair. Sums have
    the same bits on all ranks, and always for the same number of ranks. Raises `RankLostError`.
    """
    sent = 0
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = gradient.coalesce() if gradient.is_sparse else gradient
        sent += gradient_bytes(parameter.grad)
        with _rank_lost_errors():
            dist.all_reduce(parameter.grad)
    return sent


def sum_numbers(*numbers: float) -> list[float]:
    """The sums of numbers over all ranks. Raises `RankLostError`."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    with _rank_lost_errors():
        dist.all_reduce(sums)
    return sums.tolist()


def from_rank_0(content: bytes) -> bytes:
    """What rank 0 gives, on all ranks. Raises `RankLostError`."""
    if not dist.is_initialized():
        return content
    size = torch.tensor(len(content))
    with _rank_lost_errors():
        dist.broadcast(size, 0)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if dist.get_rank() == 0:
            buffer.numpy()[:] = np.frombuffer(content, np.uint8)
        dist.broadcast(buffer, 0)
    return buffer.numpy().tobytes()


def check_equal(model: nn.Module) -> None:
    """Raise RuntimeError unless a model has the same bits on all ranks."""
    digest = hashlib.sha256()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    with _rank_lost_errors():
        dist.all_gather(found, own)
    others = [rank for rank, digest in enumerate(found) if not torch.equal(digest, found[0])]
    if others:
        raise RuntimeError(
            f"ranks {', '.join(map(str, others))} ended with other values than rank 0, so that none is kept: "
            "do all machines have the same processors, versions of packages and threads?"
        )
