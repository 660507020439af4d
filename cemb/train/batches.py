"""Mini-batches of pairs from a sparse matrix."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

from cemb.checks import check_integers, check_reals
from cemb.kernels.cache import cached
from cemb.pmi.matrix import canonical


@cached(nogil=True)
def _read_cells(indptr: Any, indices: Any, data: Any, rows: Any, columns: Any, out: Any) -> None:
    """Write what a CSR matrix of sorted columns holds at each row and column; zero where no cell is stored.

    scipy would look all cells over at each call, to see whether they are sorted.
    """
    for i in range(len(rows)):
        column, low, high = columns[i], indptr[rows[i]], indptr[rows[i] + 1]
        end = high
        while low < high:
            middle = (low + high) >> 1
            if indices[middle] < column:
                low = middle + 1
            else:
                high = middle
        out[i] = data[low] if low < end and indices[low] == column else 0


class PairBatches:
    """Batches of (word, context) pairs, with a matrix's cells as targets; one iteration is one epoch.

    Every stored cell comes once an epoch, in random order. A share of each batch are negative samples:
    cells drawn from the whole matrix, almost all of them zero.

    Args:
        matrix: ``[words, contexts]``; what `cemb.pmi.matrix.canonical` makes of it counts.
        batch_size: pairs a batch; the last batch of an epoch may be smaller.
        negative_share: share of a batch that is negative samples, in [0, 1).
        context_shares: how likely negative samples have which context, positive ``[contexts]``; uniform if
            None, as words always are. Frequent contexts have long vectors, whose errors weigh most.
        weighted: also yield sample weights, with which a batch's sum of squared errors has as its expectation
            the error of all cells divided by the number of words. They are 0 for negative samples that hit a
            stored cell, since those are all in the other part.
        seed: of the order and the negative samples; each epoch continues the sequence.
        device: where batches go.

    Yields ``(pairs, targets)`` or ``(pairs, targets, sample_weights)``: int64 ``[n, 2]``, float32 ``[n]``.
    ValueError for a `batch_size` or share that leaves no stored cell, or no negative sample where `weighted`,
    and for a matrix that is not finite.
    """

    def __init__(
        self,
        matrix: sp.csr_array,
        batch_size: int,
        *,
        negative_share: float = 0.5,
        context_shares: npt.NDArray[np.float64] | None = None,
        weighted: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        check_integers(1, batch_size=batch_size)
        check_reals("[0, 1)", negative_share=negative_share)
        self.num_negative = round(batch_size * negative_share)
        self.num_positive = batch_size - self.num_negative
        if self.num_positive < 1:
            raise ValueError(
                f"batch_size={batch_size} with negative_share={negative_share} leaves no stored cell"
            )
        if weighted and self.num_negative == 0:
            raise ValueError(
                f"batch_size={batch_size} with negative_share={negative_share} leaves no negative sample, "
                "without which weights cannot stand for cells that are not stored"
            )
        matrix = canonical(matrix)
        if matrix.nnz == 0:
            raise ValueError("the matrix stores no cell")
        self.matrix = matrix
        self.weighted = weighted
        num_contexts = matrix.shape[1]
        self.context_shares = (
            np.full(num_contexts, 1 / num_contexts) if context_shares is None else context_shares
        )
        shares = self.context_shares
        if len(shares) != num_contexts or not np.all((shares > 0) & np.isfinite(shares)):
            raise ValueError(f"context_shares must be {num_contexts} positive numbers")
        self._sums = np.cumsum(self.context_shares)
        self.device = device
        self._rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int32), np.diff(matrix.indptr))
        self._rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        num_cells: int = self.matrix.nnz
        return math.ceil(num_cells / self.num_positive)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = self._rng.permutation(self.matrix.nnz)
        for first in range(0, len(order), self.num_positive):
            yield self._batch(order[first : first + self.num_positive])

    def _batch(self, cells: npt.NDArray[np.int64]) -> tuple[Tensor, ...]:
        num_negative = self.num_negative * len(cells) // self.num_positive
        if self.weighted:
            num_negative = max(1, num_negative)
        pairs = np.empty((len(cells) + num_negative, 2), np.int64)
        pairs[: len(cells), 0] = self._rows[cells]
        pairs[: len(cells), 1] = self.matrix.indices[cells]
        pairs[len(cells) :, 0] = self._rng.integers(self.matrix.shape[0], size=num_negative)
        drawn = np.searchsorted(self._sums, self._rng.random(num_negative) * self._sums[-1], side="right")
        pairs[len(cells) :, 1] = drawn
        targets = np.empty(len(pairs), np.float32)
        targets[: len(cells)] = self.matrix.data[cells]
        negatives = pairs[len(cells) :].T
        matrix = self.matrix
        _read_cells(matrix.indptr, matrix.indices, matrix.data, *negatives, targets[len(cells) :])
        batch: list[npt.NDArray[Any]] = [pairs, targets]
        if self.weighted:
            sample_weights = np.full(
                len(pairs), self.matrix.nnz / len(cells) / self.matrix.shape[0], np.float32
            )
            sample_weights[len(cells) :] = self._sums[-1] / (num_negative * self.context_shares[drawn])
            sample_weights[len(cells) :][targets[len(cells) :] != 0] = 0
            batch.append(sample_weights)
        return tuple(torch.from_numpy(array).to(self.device) for array in batch)
