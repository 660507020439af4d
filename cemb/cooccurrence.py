"""Windowed co-occurrence counts of a token stream, as a sparse matrix."""

import numpy as np
import scipy.sparse as sp
from numba import get_num_threads, njit, prange

DISTANCE_WEIGHTINGS = ("flat", "harmonic")


@njit(parallel=True, cache=True)
def _count_row_cells(token_ids, positions, row_ptr, window_size, symmetric, workers):
    """Distinct contexts of each word."""
    vocab_size = row_ptr.shape[0] - 1
    cells = np.zeros(vocab_size, np.int64)
    for worker in prange(workers):
        last_row = np.full(vocab_size, -1, np.int64)
        # Rows are dealt out in turn: neighbouring ids have similar counts, so the load is even.
        for row in range(worker, vocab_size, workers):
            found = 0
            for p in positions[row_ptr[row] : row_ptr[row + 1]]:
                low = max(0, p - window_size) if symmetric else p + 1
                for q in range(low, min(token_ids.shape[0], p + window_size + 1)):
                    if q != p and last_row[token_ids[q]] != row:
                        last_row[token_ids[q]] = row
                        found += 1
            cells[row] = found
    return cells


@njit(parallel=True, cache=True)
def _fill_rows(
    token_ids, positions, row_ptr, window_size, symmetric, weights, workers, indptr, indices, data
):
    vocab_size = row_ptr.shape[0] - 1
    for worker in prange(workers):
        total = np.zeros(vocab_size, np.float64)
        for row in range(worker, vocab_size, workers):
            found = indptr[row]
            for p in positions[row_ptr[row] : row_ptr[row + 1]]:
                low = max(0, p - window_size) if symmetric else p + 1
                for q in range(low, min(token_ids.shape[0], p + window_size + 1)):
                    if q != p:
                        context = token_ids[q]
                        if total[context] == 0.0:
                            indices[found] = context
                            found += 1
                        total[context] += weights[abs(q - p)]
            columns = indices[indptr[row] : indptr[row + 1]]
            columns.sort()
            for k in range(columns.shape[0]):
                data[indptr[row] + k] = total[columns[k]]
                total[columns[k]] = 0.0


def count_cooccurrences(
    token_ids: np.ndarray,
    *,
    vocab_size: int,
    window_size: int = 5,
    distance_weighting: str = "flat",
    symmetric: bool = True,
) -> sp.csr_array:
    """Count how often context c stands within `window_size` tokens of word w.

    Args:
        token_ids: integers in [0, vocab_size), ``[tokens]``.
        distance_weighting: ``"flat"`` counts 1 per pair, ``"harmonic"`` 1/distance.
        symmetric: count contexts on both sides; otherwise only those that follow the word.

    Returns:
        float64 CSR ``[vocab_size, vocab_size]`` with sorted columns, the same for any number of threads.
        With n tokens the counts sum to ``Σ_k (n − k)·weight(k)`` over k = 1 … window_size, twice that if
        symmetric; flat counts are exact below 2^53.

    Not to be called from two threads at once where Numba's threading layer is `workqueue`.

    Raises:
        ValueError: an unknown weighting, a window below 1, or an id out of range.
    """
    if distance_weighting not in DISTANCE_WEIGHTINGS:
        raise ValueError(
            f"distance_weighting must be one of {', '.join(DISTANCE_WEIGHTINGS)}, got {distance_weighting!r}"
        )
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    token_ids = np.asarray(token_ids)
    if token_ids.size and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        raise ValueError(
            f"token ids must lie in [0, {vocab_size}), got ids from {token_ids.min()} to {token_ids.max()}"
        )
    token_ids = np.ascontiguousarray(token_ids, dtype=np.int32)
    distances = np.arange(window_size + 1, dtype=np.float64)
    weights = np.ones(window_size + 1) if distance_weighting == "flat" else 1 / np.maximum(distances, 1)
    positions = np.argsort(token_ids, kind="stable")
    row_ptr = np.zeros(vocab_size + 1, np.int64)
    np.cumsum(np.bincount(token_ids, minlength=vocab_size), out=row_ptr[1:])
    window = (token_ids, positions, row_ptr, window_size, symmetric)
    workers = get_num_threads()
    indptr = np.zeros(vocab_size + 1, np.int64)
    np.cumsum(_count_row_cells(*window, workers), out=indptr[1:])
    indices = np.empty(indptr[-1], np.int32)
    data = np.empty(indptr[-1], np.float64)
    _fill_rows(*window, weights, workers, indptr, indices, data)
    return sp.csr_array((data, indices, indptr), shape=(vocab_size, vocab_size))
