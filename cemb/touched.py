"""Gradients of `cemb.ops.pair_scores` that hold only what a step touched."""

import ctypes
import mmap

import numpy as np
import torch
from torch import Tensor

from cemb.hashing import FullSpec, HashSpec, PairDropout
from cemb.kernels import cpu, updates

# Shorter blocks touch most cache lines of a large pool at real batch sizes, so all of it is visited.
MIN_BLOCK_SIZE = 8
_HUGE_PAGES_FROM = 2**24  # bytes


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """Ask Linux for huge pages under a large CPU tensor that has not been written yet; returns it.

    Random rows of a large table otherwise miss the address cache too. Elsewhere it does nothing.
    """
    size = tensor.numel() * tensor.element_size()
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and tensor.device.type == "cpu" and size >= _HUGE_PAGES_FROM:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice only: if the system refuses it, everything works as before.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
    return tensor


class TouchedGradient:
    """The gradient of one pool or full table since it was last cleared, as runs of its values.

    Blocks shorter than `MIN_BLOCK_SIZE` make it a dense one, kept in memory of its own from step to step.
    Deterministic for any number of threads.
    """

    def __init__(self):
        self.runs: cpu.Runs | None = None
        self.is_dense = False
        self._dense: np.ndarray | None = None
        self._room: cpu.Room | None = None
        self._geometry = None
        self._seen: list[tuple[np.ndarray, ...]] = []

    def add(
        self,
        grad: np.ndarray,
        weight: np.ndarray,
        pairs: Tensor,
        spec: HashSpec | FullSpec,
        context_offset: int,
        dropout: PairDropout,
    ) -> None:
        """Add the gradient of ``Σ grad[i] · score[i]`` of pairs ``[n, 2]`` with respect to `weight`.

        Raises RuntimeError if pairs of another table were added since the last clearing.
        """
        if self.runs is not None and self._geometry != (spec, context_offset):
            raise RuntimeError(
                f"a touched gradient is of one table at a time: it has pairs of {self._geometry[0]}, and got "
                f"pairs of {spec}; step in between, or use torch.optim, whose gradients add up"
            )
        self._geometry = spec, context_offset
        self.is_dense = isinstance(spec, HashSpec) and spec.block_size < MIN_BLOCK_SIZE
        if self.is_dense:
            if self._dense is None:
                zeros = torch.empty(weight.size, dtype=torch.from_numpy(grad).dtype)
                self._dense = advise_huge_pages(zeros).zero_().numpy()
            cpu.pair_scores_backward(grad, weight, pairs.numpy(), spec, context_offset, dropout, self._dense)
            self.runs = whole(self._dense)
            return
        kept = cpu.draw(len(pairs), spec.embedding_dim, dropout)
        self._seen.append((pairs.numpy(), kept, grad * grad.dtype.type(dropout.scale)))
        # The weights have not moved, so what came before is summed again with the new, in one pass.
        seen = self._seen[0] if len(self._seen) == 1 else map(np.concatenate, zip(*self._seen, strict=True))
        self._room = cpu.pair_runs(weight, *seen, spec, context_offset, self._room)
        self.runs = self._room.runs

    def clear(self) -> None:
        """Forget the gradient; its memory is kept for the next."""
        if self.is_dense and self.runs is not None:
            self._dense[:] = 0
        self.forget()

    def forget(self) -> None:
        """As `clear`, where the values of a dense gradient are already zero."""
        self.runs = None
        self._seen = []

    def add_to(self, dense: np.ndarray) -> None:
        """Add the gradient to a dense one."""
        if self.runs is not None:
            updates.sgd(dense, self.runs, -1.0, clear=False)


def whole(values: np.ndarray) -> cpu.Runs:
    """A dense gradient as runs: one slice for each thread."""
    threads = cpu.num_threads()
    borders = np.arange(threads + 1) * values.size // threads
    bounds = np.stack((borders[:-1], borders[1:]), axis=1)
    return cpu.Runs(values, bounds, bounds, np.ones(threads, np.int64))
