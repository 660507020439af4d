"""Gradients of `cemb.ops.pair_scores` that hold only what a step touched."""

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cemb.hashing import FullSpec, HashSpec, PairDropout
from cemb.kernels import cpu, runs, updates

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
    """The gradient of one pool or full table since it was last cleared, as the pairs that it comes from.

    It is worked out when a step needs it, and most of it then only in passing: the weights, and the pairs,
    must stay as they are until then. Blocks shorter than `MIN_BLOCK_SIZE` make it a dense one, kept in memory
    of its own from step to step. Deterministic for any number of threads.
    """

    def __init__(self):
        self._dense: np.ndarray | None = None
        self._is_dense = False
        self._seen: list[tuple[np.ndarray, ...]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._geometry = None
        self._room: runs.Room | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the last clearing."""
        return not self._seen

    def add(
        self,
        grad: Tensor,
        weight: Tensor,
        pairs: Tensor,
        spec: HashSpec | FullSpec,
        context_offset: int,
        dropout: PairDropout,
    ) -> None:
        """Add the gradient of ``Σ grad[i] · score[i]`` of pairs ``[n, 2]`` with respect to `weight`.

        Raises RuntimeError if pairs of another table were added since the last clearing.
        """
        if self._seen and self._geometry != (spec, context_offset):
            raise RuntimeError(
                f"a touched gradient is of one table at a time: it has pairs of {self._geometry[0]}, and got "
                f"pairs of {spec}; step in between, or use torch.optim, whose gradients add up"
            )
        if self._geometry != (spec, context_offset):
            self._geometry, self._room = (spec, context_offset), None
        self._is_dense = isinstance(spec, HashSpec) and spec.block_size < MIN_BLOCK_SIZE
        self._versions += [(tensor, tensor._version) for tensor in (weight, pairs)]
        values, ids = weight.detach().view(-1).numpy(), pairs.long().contiguous().numpy()
        grad = grad.detach().contiguous().numpy()
        if self._is_dense:
            if self._dense is None:
                zeros = torch.empty(weight.numel(), dtype=weight.dtype)
                self._dense = advise_huge_pages(zeros).zero_().numpy()
            cpu.pair_scores_backward(grad, values, ids, spec, context_offset, dropout, self._dense)
            self._seen.append(())
        else:
            kept = cpu.draw(len(ids), spec.embedding_dim, dropout)
            self._seen.append((ids, kept, grad * grad.dtype.type(dropout.scale)))

    def _batch(self) -> tuple[np.ndarray, ...]:
        """All pairs seen, with what dropout keeps of them and their factors."""
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"a tensor of shape {list(tensor.shape)} that a gradient needs was changed in place "
                    f"after the backward pass (version {tensor._version}, expected {version}); step first"
                )
        if len(self._seen) == 1:
            return self._seen[0]
        return tuple(map(np.concatenate, zip(*self._seen, strict=True)))

    def clear(self) -> None:
        """Forget the gradient; its memory is kept for the next."""
        if self._is_dense and self._seen:
            self._dense[:] = 0
        self._forget()

    def _forget(self) -> None:
        self._seen, self._versions = [], []

    def add_to(self, dense: np.ndarray, weight: np.ndarray) -> None:
        """Add the gradient, with respect to `weight`, to a dense one."""
        if self.is_empty:
            return
        if self._is_dense:
            dense += self._dense
            return
        self._room = runs.pair_runs(weight, *self._batch(), *self._geometry, self._room)
        updates.update_runs(dense, (), updates.Rule(updates.SGD, -1.0), self._room.runs, clear=False)

    def update(self, weight: np.ndarray, states: Sequence[np.ndarray], rule: updates.Rule) -> None:
        """Update weights and an optimizer's states by `rule`, and forget the gradient."""
        if self._is_dense:
            updates.update_runs(weight, states, rule, whole(self._dense), clear=True)
        else:
            batch = self._batch()
            spec, context_offset = self._geometry
            # Sums first, then what stands alone, then the sums' steps: each needs weights the next one moves.
            self._room = runs.pair_runs(weight, *batch, spec, context_offset, self._room, is_whole=False)
            updates.update_alone(weight, states, rule, *batch, self._room.alone, spec, context_offset)
            updates.update_runs(weight, states, rule, self._room.runs, clear=False)
        self._forget()


def whole(values: np.ndarray) -> runs.Runs:
    """A dense gradient as runs: one slice for each thread."""
    threads = cpu.num_threads()
    borders = np.arange(threads + 1) * values.size // threads
    bounds = np.stack((borders[:-1], borders[1:]), axis=1)
    return runs.Runs(values, bounds, bounds, np.ones(threads, np.int64))
