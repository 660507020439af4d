"""Pointwise mutual information: from counts, and at random with a real matrix's values."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from numba import get_num_threads
from tqdm import tqdm

from cemb import files
from cemb.checks import check_integers, check_reals
from cemb.kernels.cache import cached
from cemb.pmi.csr import CsrFolder, CsrWriter
from cemb.pmi.threads import in_order


@dataclass(frozen=True)
class PmiOptions:
    """How counts become PMI; see `pmi_matrix`. Raises ValueError for options that make no sense."""

    context_smoothing: float = 0.75
    num_negative: int = 1
    positive: bool = True
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_reals("(0, 1]", context_smoothing=self.context_smoothing)
        check_integers(1, num_negative=self.num_negative, top_k=self.top_k)


def canonical(matrix: sp.csr_array | sp.csc_array) -> sp.csr_array:
    """A matrix in CSR with its columns sorted, each cell stored once, and none that is zero.

    It is the same object if it is so already, and else a copy, in which cells that were listed twice are
    summed. Raises ValueError for values that are not finite and indices outside the matrix.
    """
    matrix.check_format(full_check=True)
    if matrix.nnz and not np.isfinite([matrix.data.min(), matrix.data.max()]).all():
        raise ValueError(
            f"a matrix must be finite, got values from {matrix.data.min()} to {matrix.data.max()}"
        )
    by_row = matrix if matrix.format == "csr" else sp.csr_array(matrix)
    if by_row.has_canonical_format and by_row.data.all():
        return by_row
    by_row = by_row.copy()
    by_row.sum_duplicates()
    by_row.eliminate_zeros()
    return by_row


class _Sums:
    """Sums of words and of contexts, added up block by block; of integers in integers."""

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any]):
        kind = np.int64 if np.issubdtype(dtype, np.integer) else np.float64
        self.words, self.contexts = np.zeros(shape[0], kind), np.zeros(shape[1], kind)

    def add(self, first: int, counts: sp.csr_array) -> None:
        if counts.nnz and counts.data.min() < 0:
            raise ValueError(f"counts must not be negative, got {counts.data.min()}")
        filled = np.flatnonzero(np.diff(counts.indptr))
        self.words[first + filled] = np.add.reduceat(
            counts.data, counts.indptr[filled], dtype=self.words.dtype
        )
        np.add.at(self.contexts, counts.indices, counts.data)

    def logs(
        self, smoothing: float, shift: float
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
        """Logarithms of words and of smoothed contexts, and what is added to all cells."""
        contexts = self.contexts.astype(np.float64)
        smoothed = np.power(contexts, smoothing, where=contexts > 0, out=np.zeros_like(contexts))
        with np.errstate(divide="ignore"):
            word_logs, context_logs = np.log(self.words.astype(np.float64)), np.log(smoothed)
        return word_logs, context_logs, np.log(smoothed.sum()) - shift


@cached(nogil=True)
def _keep_largest(
    columns: npt.NDArray[Any], values: npt.NDArray[np.float64], top_k: int, row_cells: npt.NDArray[np.int64]
) -> int:
    """Move the `top_k` largest cells of each row to the front; returns their number."""
    start = end = 0
    for row in range(row_cells.shape[0]):
        stop = start + row_cells[row]
        before, smallest, ties = end, -np.inf, row_cells[row]
        if row_cells[row] > top_k:
            smallest = np.partition(values[start:stop], stop - start - top_k)[stop - start - top_k]
            ties = top_k
            for k in range(start, stop):
                ties -= values[k] > smallest
        for k in range(start, stop):
            if values[k] > smallest or (values[k] == smallest and ties > 0):
                ties -= values[k] == smallest
                columns[end], values[end] = columns[k], values[k]
                end += 1
        start, row_cells[row] = stop, end - before
    return end


def _pmi_block(
    counts: sp.csr_array,
    first: int,
    logs: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float],
    options: PmiOptions,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Cells of each row ``[rows]``, columns and float32 values of a block of rows that starts at `first`."""
    word_logs, context_logs, constant = logs
    with np.errstate(divide="ignore"):
        values = np.log(counts.data, dtype=np.float64)
    values -= np.repeat(word_logs[first : first + counts.shape[0]], np.diff(counts.indptr))
    values -= context_logs[counts.indices]
    values += constant
    is_cell = values > 0 if options.positive else np.full(len(values), True)
    columns, values = counts.indices[is_cell], values[is_cell]
    row_cells = np.diff(np.append(0, np.cumsum(is_cell))[counts.indptr])
    if options.top_k:
        found = _keep_largest(columns, values, options.top_k, row_cells)
        columns, values = columns[:found], values[:found]
    return row_cells, columns, values.astype(np.float32)


def _check_found(num_cells: int, num_negative: int) -> None:
    if num_cells == 0:
        raise ValueError(f"no cell is positive after a shift by log num_negative={num_negative}")


def _check_counted(shape: tuple[int, int], sums: _Sums) -> None:
    if not sums.words.any():
        raise ValueError(f"no pair was counted: the {shape[0]} × {shape[1]} counts are all zero")


def pmi_matrix(
    counts: sp.csr_array,
    *,
    context_smoothing: float = 0.75,
    num_negative: int = 1,
    positive: bool = True,
    top_k: int | None = None,
) -> sp.csr_array:
    """Shifted (positive) PMI with smoothed contexts, of the cells that were counted.

    ``log(#(w,c) · Σ_c' #(c')^α / (#(w) · #(c)^α)) − log(num_negative)`` with α = `context_smoothing`, as
    Levy, Goldberg and Dagan define it ("Improving distributional similarity with lessons learned from word
    embeddings", TACL 2015). Unseen cells are 0; `positive` drops cells at or below 0. A common factor of
    all counts makes no difference.

    Args:
        counts: non-negative ``[words, contexts]``, integers or floats; cells listed twice are summed.
        top_k: keep only so many cells of each row, the largest; of equal ones the first. None keeps all.

    Returns:
        float32 CSR of the same shape, computed in float64.

    Raises:
        ValueError: options out of range, counts that are negative or not finite, or no cell left.
    """
    options = PmiOptions(context_smoothing, num_negative, positive, top_k)
    counts = canonical(sp.csr_array(counts))
    sums = _Sums(counts.shape, counts.dtype)
    sums.add(0, counts)
    _check_counted(counts.shape, sums)
    logs = sums.logs(context_smoothing, np.log(num_negative))
    row_cells, columns, values = _pmi_block(counts, 0, logs, options)
    _check_found(len(values), num_negative)
    indptr = np.zeros(counts.shape[0] + 1, counts.indptr.dtype)
    np.cumsum(row_cells, out=indptr[1:])
    return sp.csr_array((values, columns, indptr), shape=counts.shape)


def write_pmi(
    counts: CsrFolder,
    out: str | Path,
    *,
    context_smoothing: float = 0.75,
    num_negative: int = 1,
    positive: bool = True,
    top_k: int | None = None,
    memory: int = 2**31,
) -> CsrFolder:
    """`pmi_matrix` of counts in a folder into another folder, the same bits, row block by row block.

    Args:
        out: the folder to make; it takes its name when it is whole.
        memory: bytes it may take, besides what it needs for each word and context.

    Raises:
        ValueError: options out of range, counts that are negative or not finite, or no cell left.
        OSError: the disk is full.
    """
    out = Path(out)
    check_integers(0, memory=memory)
    options = PmiOptions(context_smoothing, num_negative, positive, top_k)
    if out.exists():
        raise FileExistsError(f"{str(out)!r} is there already; remove it or name another folder")
    threads = get_num_threads()
    # A block's cells take 12 bytes as read, and 24 on the way to PMI; one is read ahead for each thread.
    max_cells = min(max(memory // (48 * (threads + 1)), 2**12), 2**20)
    sums = _Sums(counts.shape, counts.dtype)

    def blocks() -> Iterator[tuple[int, sp.csr_array]]:
        return ((first, canonical(block)) for first, block in counts.blocks(max_cells))

    with tqdm(total=2 * counts.num_cells, desc="PMI", unit=" cells", unit_scale=True) as progress:
        for first, block in blocks():
            sums.add(first, block)
            progress.update(block.nnz)
        _check_counted(counts.shape, sums)
        logs = sums.logs(context_smoothing, np.log(num_negative))

        def convert(first_and_block: tuple[int, sp.csr_array]) -> tuple[int, tuple[npt.NDArray[Any], ...]]:
            first, block = first_and_block
            return block.nnz, _pmi_block(block, first, logs, options)

        with (
            files.disk_errors(out),
            files.atomic_directory(out) as work,
            CsrWriter(work, counts.shape[1], np.float32, counts.num_cells) as writer,
            ThreadPoolExecutor(threads) as pool,
        ):
            for size, rows in in_order(pool, convert, blocks(), threads):
                writer.append(*rows)
                progress.update(size)
            _check_found(writer.num_cells, num_negative)
            writer.finish(kind="pmi", **asdict(options))
    return CsrFolder(out)


def value_histogram(matrix: sp.csr_array, num_bins: int = 64) -> dict[str, list[float]]:
    """Histogram of a matrix's stored values: ``edges`` ``[bins + 1]`` and ``shares`` ``[bins]`` of sum 1."""
    check_integers(1, num_bins=num_bins)
    counts, edges = np.histogram(matrix.data, bins=num_bins)
    return {"edges": edges.tolist(), "shares": (counts / counts.sum()).tolist()}


def stored_histogram() -> dict[str, list[float]]:
    """`value_histogram` of the default corpus's positive PMI matrix, stored with the package."""
    histogram: dict[str, list[float]] = json.loads(
        resources.files("cemb").joinpath("data/pmi_histogram.json").read_text()
    )
    return histogram


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
    check_integers(2, num_words=num_words)
    check_reals("(0, 1]", density=density)
    num_pairs = round(density * num_words**2 / 2)
    possible = num_words * (num_words - 1) // 2
    if not 1 <= num_pairs <= possible // 2:
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
