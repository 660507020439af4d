"""Gradients of `cemb.ops.pair_scores` that hold only what a step touched."""

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cemb.hashing import PairDropout, Spec
from cemb.kernels.cpu import buckets, conflicts, rules, updates
from cemb.kernels.cpu.dropout import draw

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

    It is computed when a step needs it, most of it in the pass that updates: the weights, and the pairs, must
    stay as they are until then. At block size 1 it comes from the values that the forward pass kept, and the
    weights may change. Deterministic for any number of threads.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[npt.NDArray[Any], ...]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._geometry: tuple[Spec, int] | None = None
        self._workspace: conflicts.Workspace | None = None
        self._buckets: buckets.Buckets | None = None
        self._spare_values: npt.NDArray[Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the last clearing."""
        return not self._seen

    def values_workspace(self, num_pairs: int, spec: Spec, dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
        """Workspace ``[num_pairs, 2, embedding_dim]`` for the values that the forward pass keeps, or None."""
        if not spec.is_single:
            return None
        spare, self._spare_values = self._spare_values, None
        shape = (num_pairs, 2, spec.embedding_dim)
        if spare is not None and spare.shape == shape and spare.dtype == dtype:
            return spare
        return np.empty(shape, dtype)

    def add(
        self,
        grad: Tensor,
        weight: Tensor,
        pairs: Tensor,
        spec: Spec,
        context_offset: int,
        dropout: PairDropout,
        values: npt.NDArray[Any] | None,
    ) -> None:
        """Add the gradient of ``Σ grad[i] · score[i]`` of pairs ``[n, 2]`` with respect to `weight`.

        `values` is what the forward pass kept, see `values_workspace`. Raises RuntimeError if pairs of
        another table were added since the last clearing.
        """
        if self._seen and self._geometry and self._geometry != (spec, context_offset):
            raise RuntimeError(
                f"a touched gradient is of one table at a time: it has pairs of {self._geometry[0]}, and got "
                f"pairs of {spec}; step in between, or use torch.optim, whose gradients add up"
            )
        self._prepare(spec, context_offset)
        needed = (weight, pairs) if values is None else (pairs,)
        self._versions += [(tensor, tensor._version) for tensor in needed]
        ids = pairs.long().contiguous().numpy()
        factors = grad.detach().contiguous().numpy()
        dropout_mask = draw(len(ids), spec.embedding_dim, dropout)
        batch = (ids, dropout_mask, factors * factors.dtype.type(dropout.scale))
        self._seen.append(batch if values is None else (*batch, values))

    def _prepare(self, spec: Spec, context_offset: int) -> None:
        if self._geometry != (spec, context_offset):
            self._geometry, self._workspace, self._buckets = (spec, context_offset), None, None

    def fit(
        self,
        weight: npt.NDArray[Any],
        states: Sequence[npt.NDArray[Any]],
        rule: rules.Rule,
        pairs: npt.NDArray[np.int64],
        targets: npt.NDArray[Any],
        sample_weights: npt.NDArray[Any],
        spec: Spec,
        context_offset: int,
        dropout: PairDropout,
    ) -> float:
        """`cemb.kernels.cpu.updates.fit_pairs` in this gradient's workspace; returns the loss."""
        self._prepare(spec, context_offset)
        batch = pairs, targets, sample_weights, spec, context_offset, dropout
        loss, self._workspace = updates.fit_pairs(weight, states, rule, *batch, self._workspace)
        return loss

    def _batch(self) -> tuple[npt.NDArray[Any], ...]:
        """All pairs added, with their dropout mask, their factors, and at block size 1 their values."""
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
        if self._seen and self._geometry and self._geometry[0].is_single:
            *_, self._spare_values = self._seen[0]
        self._seen, self._versions = [], []

    def add_to(self, dense: npt.NDArray[Any], weight: npt.NDArray[Any]) -> None:
        """Add the gradient, with respect to `weight`, to a dense one."""
        if self.is_empty or self._geometry is None:
            return
        spec, context_offset = self._geometry
        if spec.is_single:
            pairs, dropout_mask, factors, values = self._batch()
            self._buckets = buckets.pair_buckets(
                pairs, dropout_mask, factors, values, spec, context_offset, self._buckets
            )
            updates.update_buckets(dense, (), rules.SGD(-1.0), self._buckets)
            return
        pairs, dropout_mask, factors = self._batch()
        self._workspace = updates.add_pairs(
            dense, weight, pairs, dropout_mask, factors, spec, context_offset, self._workspace
        )

    def update(self, weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: rules.Rule) -> None:
        """Update weights and an optimizer's states by `rule`, and forget the gradient."""
        batch = self._batch()
        assert self._geometry is not None
        spec, context_offset = self._geometry
        if spec.is_single:
            pairs, dropout_mask, factors, values = batch
            self._buckets = buckets.pair_buckets(
                pairs, dropout_mask, factors, values, spec, context_offset, self._buckets
            )
            updates.update_buckets(weight, states, rule, self._buckets)
        else:
            pairs, dropout_mask, factors = batch
            self._workspace = updates.update_pairs(
                weight, states, rule, pairs, dropout_mask, factors, spec, context_offset, self._workspace
            )
        self.clear()
