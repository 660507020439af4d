"""Pointwise mutual information: from counts, and at random with a real matrix's values."""

import json
from importlib import resources

import numpy as np
import scipy.sparse as sp


def pmi_matrix(
    counts: sp.csr_array,
    *,
    context_smoothing: float = 0.75,
    num_negative: int = 1,
    positive: bool = True,
) -> sp.csr_array:
    """Shifted (positive) PMI with smoothed contexts, of the cells that were counted.

    ``log(#(w,c) · Σ_c' #(c')^α / (#(w) · #(c)^α)) − log(num_negative)`` with α = `context_smoothing`, as
    Levy, Goldberg and Dagan define it ("Improving distributional similarity with lessons learned from word
    embeddings", TACL 2015). Unseen cells are 0; `positive` drops cells at or below 0.

    Args:
        counts: non-negative ``[words, contexts]``.

    Returns:
        float32 CSR of the same shape, computed in float64.
    """
    if not 0 < context_smoothing <= 1:
        raise ValueError(f"context_smoothing must lie in (0, 1], got {context_smoothing}")
    if num_negative < 1:
        raise ValueError(f"num_negative must be at least 1, got {num_negative}")
    counts = sp.csr_array(counts, dtype=np.float64, copy=True)  # zeros are dropped in place below
    counts.eliminate_zeros()
    if counts.nnz == 0:
        raise ValueError(
            f"no pair was counted: the {counts.shape[0]} × {counts.shape[1]} counts are all zero"
        )
    word_sums = counts.sum(axis=1)
    context_sums = counts.sum(axis=0)
    smoothed = np.power(
        context_sums, context_smoothing, where=context_sums > 0, out=np.zeros_like(context_sums)
    )
    with np.errstate(divide="ignore"):
        word_logs, context_logs = np.log(word_sums), np.log(smoothed)
    values = np.log(counts.data)
    values -= np.repeat(word_logs, np.diff(counts.indptr))
    values -= context_logs[counts.indices]
    values += np.log(smoothed.sum()) - np.log(num_negative)
    matrix = sp.csr_array((values, counts.indices, counts.indptr), shape=counts.shape)
    if positive:
        matrix.data[matrix.data < 0] = 0
        matrix.eliminate_zeros()
        if matrix.nnz == 0:
            raise ValueError(f"no cell is positive after a shift by log num_negative={num_negative}")
    return matrix.astype(np.float32)


def value_histogram(matrix: sp.csr_array, num_bins: int = 64) -> dict[str, list[float]]:
    """Histogram of a matrix's stored values: ``edges`` ``[bins + 1]`` and ``shares`` ``[bins]`` of sum 1."""
    counts, edges = np.histogram(matrix.data, bins=num_bins)
    return {"edges": edges.tolist(), "shares": (counts / counts.sum()).tolist()}


def stored_histogram() -> dict[str, list[float]]:
    """`value_histogram` of the default corpus's positive PMI matrix, stored with the package."""
    return json.loads(resources.files("cemb").joinpath("data/pmi_histogram.json").read_text())


def synthetic_pmi(
    num_words: int,
    density: float,
    *,
    seed: int = 0,
    histogram: dict[str, list[float]] | None = None,
) -> sp.csr_array:
    """A random symmetric matrix whose values follow a real PMI matrix's histogram.

    Cells off the diagonal are drawn uniformly without repetition, values uniformly within the bins of
    `histogram` (`stored_histogram` unless given).

    Args:
        num_words: rows and columns.
        density: share of all cells that hold a value; ``2·round(density·num_words²/2)`` cells do.

    Returns:
        float32 CSR ``[num_words, num_words]``, the same for the same seed. Memory peaks near 40 bytes a
        stored cell.
    """
    if num_words < 2:
        raise ValueError(f"num_words must be at least 2, got {num_words}")
    num_pairs = round(density * num_words**2 / 2)
    possible = num_words * (num_words - 1) // 2
    if not 0 < density <= 1 or not 1 <= num_pairs <= possible // 2:
        raise ValueError(
            f"density={density} asks for {num_pairs} pairs of {num_words} words; "
            f"give one that asks for 1 to {possible // 2}, half of all pairs"
        )
    histogram = histogram or stored_histogram()
    rng = np.random.default_rng(seed)
    keys = np.empty(0, np.int64)
    while keys.size < num_pairs:
        missing = num_pairs - keys.size
        rows = rng.integers(num_words, size=missing + missing // 8 + 16)
        columns = rng.integers(num_words, size=rows.size)
        rows, columns = np.minimum(rows, columns), np.maximum(rows, columns)
        drawn = (rows * num_words + columns)[rows != columns]
        # Keep the order of drawing, so that cutting to size leaves a uniform sample.
        merged = np.concatenate([keys, drawn])
        _, first = np.unique(merged, return_index=True)
        keys = merged[np.sort(first)][:num_pairs]
    rows, columns = np.divmod(keys, num_words)
    edges, shares = np.array(histogram["edges"]), np.array(histogram["shares"])
    bins = rng.choice(len(shares), size=num_pairs, p=shares / shares.sum())
    values = rng.uniform(edges[bins], edges[bins + 1]).astype(np.float32)
    upper = sp.coo_array(
        (values, (rows.astype(np.int32), columns.astype(np.int32))), shape=(num_words, num_words)
    )
    return sp.csr_array(upper + upper.T)
