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
from cemb.optim import SquaredError
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
    """Batches of (word, context) pairs, with a matrix's cells as targets; `len` of them are an epoch.

    Every stored cell comes once an epoch, in random order. A share of each batch are negative samples:
    cells drawn from the whole matrix, almost all of them zero. What a batch holds follows from seed and step
    alone, so that training may begin at any of them, and several processes may each take a part.

    Args:
        matrix: ``[words, contexts]``; what `cemb.pmi.matrix.canonical` makes of it counts.
        batch_size: pairs a batch; the last batch of an epoch may be smaller.
        negative_share: share of a batch that is negative samples, in [0, 1).
        context_shares: how likely negative samples have which context, positive ``[contexts]``; uniform if
            None, as words always are. Frequent contexts have long vectors, whose errors weigh most.
        weighted: also yield sample weights, with which a batch's sum of squared errors has as its expectation
            the error of all cells divided by the number of words. They are 0 for negative samples that hit a
            stored cell, since those are all in the other part.
        seed: of the order and the negative samples.
        part: ``(rank, number of ranks)``: every so many'th pair of each batch, from the rank'th on. Parts are
            equal up to one pair; only their own cells are looked up.
        device: where batches go.

    Raises ValueError for a `batch_size` or share that leaves no stored cell, or no negative sample where
    `weighted`, for a matrix that is not finite, and for a rank that is not below their number.
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
        part: tuple[int, int] = (0, 1),
        device: torch.device | str | None = None,
    ):
        check_integers(1, batch_size=batch_size)
        check_reals("[0, 1)", negative_share=negative_share)
        check_integers(1, number_of_ranks=part[1])
        check_integers(0, part[1] - 1, rank=part[0])
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
        self.device, self.seed, self.part = device, seed, part
        self._rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int32), np.diff(matrix.indptr))
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None  # of cells, in the epoch that is read

    def __len__(self) -> int:
        num_cells: int = self.matrix.nnz
        return math.ceil(num_cells / self.num_positive)

    def _rng(self, *place: int) -> np.random.Generator:
        """The generator of an epoch's order, or of the negative samples of an epoch's batch."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=place))

    def _cells(self, step: int) -> tuple[npt.NDArray[np.int64], int]:
        """The stored cells of a whole batch, and how many negative samples it has."""
        epoch, index = divmod(step, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._rng(epoch).permutation(self.matrix.nnz)
        cells = self._order[1][index * self.num_positive : (index + 1) * self.num_positive]
        num_negative = self.num_negative * len(cells) // self.num_positive
        return cells, max(1, num_negative) if self.weighted else num_negative

    def epoch(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch, from 0 on."""
        return map(self.batch, range(number * len(self), (number + 1) * len(self)))

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The part of the batch of a step, counted over all epochs.

        Returns ``(pairs, targets)`` or ``(pairs, targets, sample_weights)``: int64 ``[n, 2]``, float32
        ``[n]``.
        """
        cells, num_negative = self._cells(step)
        num_cells, (rank, num_ranks) = len(cells), self.part
        rng = self._rng(*divmod(step, len(self)))
        drawn = [rng.integers(self.matrix.shape[0], size=num_negative), rng.random(num_negative)]
        cells = cells[rank::num_ranks]
        rows, places = (values[(rank - num_cells) % num_ranks :: num_ranks] for values in drawn)
        columns = np.searchsorted(self._sums, places * self._sums[-1], side="right")
        pairs = np.empty((len(cells) + len(rows), 2), np.int64)
        pairs[: len(cells), 0] = self._rows[cells]
        pairs[: len(cells), 1] = self.matrix.indices[cells]
        pairs[len(cells) :, 0] = rows
        pairs[len(cells) :, 1] = columns
        targets = np.empty(len(pairs), np.float32)
        targets[: len(cells)] = self.matrix.data[cells]
        matrix = self.matrix
        _read_cells(matrix.indptr, matrix.indices, matrix.data, *pairs[len(cells) :].T, targets[len(cells) :])
        batch: list[npt.NDArray[Any]] = [pairs, targets]
        if self.weighted:
            sample_weights = np.full(len(pairs), matrix.nnz / num_cells / matrix.shape[0], np.float32)
            sample_weights[len(cells) :] = self._sums[-1] / (num_negative * self.context_shares[columns])
            sample_weights[len(cells) :][targets[len(cells) :] != 0] = 0
            batch.append(sample_weights)
        return tuple(torch.from_numpy(array).to(self.device) for array in batch)

    def scaled_to_whole(self, loss: SquaredError, step: int) -> SquaredError:
        """What a loss of the part adds to that of the step's whole batch: of all parts, it is their sum."""
        if self.weighted or self.part[1] == 1:
            return loss
        cells, num_negative = self._cells(step)
        share = len(loss.targets) / (len(cells) + num_negative)
        weights = loss.sample_weights
        if weights is None:
            weights = torch.full_like(loss.targets, 1 / max(1, len(loss.targets)))
        return SquaredError(loss.targets, share * weights)
