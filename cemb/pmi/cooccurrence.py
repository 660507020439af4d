"""Windowed co-occurrence counts of a token stream, as a sparse matrix: the kernels, and counting in memory.

A row is counted at once: the positions of its word are looked up, and what stands around them is added up
in a dense row that stays in cache. A bitmap of the columns seen gives them back in order, so nothing is
sorted. Weights are integers over a common denominator, so sums are exact and independent of their order.

Kernels release Python's lock and use no threading of Numba's, so they may run on any threads at once.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from llvmlite import ir
from numba import get_num_threads, njit, types
from numba.extending import intrinsic

from cemb import hashing
from cemb.checks import check_integers, check_reals
from cemb.kernels.cache import cached
from cemb.kernels.checks import check_array
from cemb.kernels.cpu.simd import prefetch
from cemb.pmi.csr import row_blocks
from cemb.pmi.threads import in_order

DISTANCE_WEIGHTINGS = ("flat", "harmonic")
DistanceWeighting: TypeAlias = Literal[*DISTANCE_WEIGHTINGS]  # type: ignore[valid-type]
BORDER = -1  # in place of an id: windows do not cross it
LARGEST_TOTAL = 2**63 - 1
LARGEST_WINDOW = 2**16

# Columns that one byte of `Row.touched` stands for, as a power of two: 16 words of `Row.bits`.
_TOUCHED_SHIFT = 10
_WIDE_FROM = 2**31  # cells, whose places then take 64 bits
_BLOCK_CELLS = 2**20  # more would leave the cache before they are copied
_PREFETCH = 32  # positions ahead
_ONE, _S6, _S27, _S30, _S31 = (np.uint64(value) for value in (1, 6, 27, 30, 31))
_S_TOUCHED, _LOW6 = np.uint64(_TOUCHED_SHIFT), np.uint64(63)
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(hashing.MULTIPLIER_1), np.uint64(hashing.MULTIPLIER_2)


@dataclass(frozen=True)
class Windows:
    """Which pairs of tokens count, and how much.

    Args:
        window_size: tokens to each side, from 1 to `LARGEST_WINDOW`.
        distance_weighting: ``"flat"`` counts 1 per pair, ``"harmonic"`` 1/distance.
        symmetric: count contexts on both sides; otherwise only those that follow the word.

    Raises:
        ValueError: an unknown weighting, or a window out of range.
        OverflowError: a harmonic window whose weights 64 bits do not hold.
    """

    window_size: int = 5
    distance_weighting: DistanceWeighting = "flat"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.distance_weighting not in DISTANCE_WEIGHTINGS:
            raise ValueError(
                f"distance_weighting must be one of {', '.join(DISTANCE_WEIGHTINGS)}, "
                f"got {self.distance_weighting!r}"
            )
        check_integers(1, LARGEST_WINDOW, window_size=self.window_size)
        _ = self.denominator  # which refuses what is too large

    @property
    def denominator(self) -> int:
        """Weights are multiples of one over this, which is 1, or lcm(1 … window_size) for harmonic ones."""
        found = 1
        for distance in range(1, self.window_size + 1 if self.distance_weighting == "harmonic" else 1):
            found = math.lcm(found, distance)
            if found > LARGEST_TOTAL:
                raise OverflowError(self._too_large("counts"))
        return found

    def _too_large(self, counts: str) -> str:
        return (
            f"{counts} with window_size={self.window_size} and {self.distance_weighting} weights may exceed "
            "2^63; use a smaller window"
        )

    @property
    def weights(self) -> list[int]:
        """Of the distances 0 … window_size, times `denominator`; distance 0 does not count."""
        flat = self.distance_weighting == "flat"
        return [0, *(1 if flat else self.denominator // k for k in range(1, self.window_size + 1))]

    def largest_total(self, num_tokens: int) -> int:
        """What no cell can exceed, times `denominator`.

        Raises OverflowError where that does not fit a signed integer of 64 bits.
        """
        total = num_tokens * sum(self.weights) * (1 + self.symmetric)
        if total > LARGEST_TOTAL:
            raise OverflowError(self._too_large(f"counts of {num_tokens:,} tokens"))
        return total


def keep_thresholds(word_counts: npt.NDArray[Any], subsample_threshold: float) -> npt.NDArray[np.uint64]:
    """For each word the hash up to which its tokens are kept, uint64 ``[words]``.

    A word of relative frequency f is kept with probability ``min(1, √(t/f) + t/f)``, t being the
    threshold, as word2vec does (Mikolov et al., "Distributed representations of words and phrases and
    their compositionality", NeurIPS 2013; the formula is its program's).

    Raises ValueError for a threshold that is not above 0.
    """
    check_reals("(0, inf)", subsample_threshold=subsample_threshold)
    counts = np.maximum(np.asarray(word_counts, np.float64), 1)
    ratio = subsample_threshold * max(np.asarray(word_counts).sum(), 1) / counts
    share = np.sqrt(ratio) + ratio
    thresholds = np.full(len(share), 2**64 - 1, np.uint64)
    rare = share < 1
    thresholds[rare] = (share[rare] * 2.0**64).astype(np.uint64)
    return thresholds


@cached(nogil=True)
def _subsample(
    token_ids: npt.NDArray[Any],
    first_position: int,
    thresholds: npt.NDArray[np.uint64],
    salt: np.uint64,
    kept: npt.NDArray[np.int32],
) -> int:
    found = 0
    for i in range(token_ids.shape[0]):
        word = token_ids[i]
        keep = word < 0
        if not keep:
            x = np.uint64(first_position + i) + salt
            x = (x ^ (x >> _S30)) * _MULTIPLIER_1
            x = (x ^ (x >> _S27)) * _MULTIPLIER_2
            keep = (x ^ (x >> _S31)) <= thresholds[word]
        if keep:
            kept[found] = word
            found += 1
    return found


def subsample(
    token_ids: npt.NDArray[Any], thresholds: npt.NDArray[np.uint64], *, seed: int = 0, first_position: int = 0
) -> npt.NDArray[np.int32]:
    """The tokens ``[kept]`` of a piece of a stream that subsampling keeps, int32; borders all stay.

    ``mix(position + mix(seed + GOLDEN))`` of `cemb.hashing` decides, position being that in the whole
    stream, so that it does not matter how the stream is cut. `thresholds` ``[words]`` are of
    `keep_thresholds`. Raises ValueError for ids without one.
    """
    check_ids(token_ids, len(thresholds))
    check_array("thresholds", thresholds, (len(thresholds),), np.uint64)
    kept = np.empty(len(token_ids), np.int32)
    salt = np.uint64(hashing.mix(seed + hashing.GOLDEN))
    return kept[: _subsample(token_ids, first_position, thresholds, salt, kept)]


@intrinsic
def _trailing_zeros(typing: Any, x: Any) -> tuple[Any, Callable[..., Any]]:
    """Position of the lowest bit set of an integer that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@cached(nogil=True)
def _index_positions(
    padded: npt.NDArray[np.uint32],
    first: int,
    last: int,
    row_ptr: npt.NDArray[np.int64],
    positions: npt.NDArray[np.uint32],
) -> None:
    """Where each word stands in ``padded[first:last]``; words from ``len(row_ptr) - 1`` on are borders."""
    vocab_size = row_ptr.shape[0] - 1
    row_ptr[:] = 0
    for p in range(first, last):
        if padded[p] < vocab_size:
            row_ptr[padded[p] + 1] += 1
    for row in range(vocab_size):
        row_ptr[row + 1] += row_ptr[row]
    # Each row's start moves to its end, which is the next one's start.
    for p in range(first, last):
        word = padded[p]
        if word < vocab_size:
            positions[row_ptr[word]] = p
            row_ptr[word] += 1
    for row in range(vocab_size, 0, -1):
        row_ptr[row] = row_ptr[row - 1]
    row_ptr[0] = 0


class Row:
    """A dense row of totals ``[vocab_size + 1]`` and a bitmap of the columns added to; zero between uses.

    The last column takes what stands at borders and is never given out.
    """

    def __init__(self, vocab_size: int, dtype: np.dtype[Any]):
        self.totals = np.zeros(vocab_size + 1, dtype)
        self.bits = np.zeros((vocab_size >> 6) + 1, np.uint64)
        self.touched = np.zeros((vocab_size >> _TOUCHED_SHIFT) + 1, np.uint8)

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        return self.totals, self.bits, self.touched

    @staticmethod
    def num_bytes(vocab_size: int, dtype: np.dtype[Any]) -> int:
        return vocab_size * (np.dtype(dtype).itemsize + 1)


@njit(nogil=True, inline="always")
def _add(
    totals: npt.NDArray[Any],
    bits: npt.NDArray[np.uint64],
    touched: npt.NDArray[np.uint8],
    column: np.uint64,
    weight: Any,
) -> None:
    totals[column] += weight
    bits[column >> _S6] |= _ONE << (column & _LOW6)
    touched[column >> _S_TOUCHED] = 1


@cached(nogil=True)
def add_cells(
    totals: npt.NDArray[Any],
    bits: npt.NDArray[np.uint64],
    touched: npt.NDArray[np.uint8],
    columns: npt.NDArray[np.int32],
    values: npt.NDArray[Any],
) -> None:
    """Add cells to a row."""
    for k in range(columns.shape[0]):
        _add(totals, bits, touched, np.uint64(columns[k]), values[k])


@cached(nogil=True)
def emit(
    totals: npt.NDArray[Any],
    bits: npt.NDArray[np.uint64],
    touched: npt.NDArray[np.uint8],
    columns: npt.NDArray[np.int32],
    values: npt.NDArray[Any],
    found: int,
) -> int:
    """Move a row's cells, in order of their columns, behind the `found` ones there; returns their number."""
    vocab_size = np.uint64(totals.shape[0] - 1)
    totals[vocab_size] = 0
    bits[vocab_size >> _S6] &= ~(_ONE << (vocab_size & _LOW6))
    for part in range(touched.shape[0]):
        if touched[part]:
            touched[part] = 0
            for word in range(part << 4, min((part + 1) << 4, bits.shape[0])):
                left = bits[word]
                bits[word] = 0
                while left:
                    column = (np.uint64(word) << _S6) + _trailing_zeros(left)
                    left &= left - _ONE
                    columns[found] = column
                    values[found] = totals[column]
                    totals[column] = 0
                    found += 1
    return found


@cached(nogil=True)
def _count_rows(
    padded: npt.NDArray[np.uint32],
    positions: npt.NDArray[np.uint32],
    row_ptr: npt.NDArray[np.int64],
    row: int,
    last_row: int,
    window_size: int,
    weights: npt.NDArray[Any],
    symmetric: bool,
    has_borders: bool,
    totals: npt.NDArray[Any],
    bits: npt.NDArray[np.uint64],
    touched: npt.NDArray[np.uint8],
    row_cells: npt.NDArray[Any],
    columns: npt.NDArray[np.int32],
    values: npt.NDArray[Any],
) -> tuple[int, int]:
    """Count rows from `row` on while their cells are sure to fit; returns the next row and the cells."""
    vocab_size = row_ptr.shape[0] - 1
    border = padded.dtype.type(vocab_size)
    reach = min(window_size, 16)  # 16 ids to a cache line; the hardware finds the lines after it
    found = 0
    while row < last_row:
        first, last = row_ptr[row], row_ptr[row + 1]
        if found + min(vocab_size, (last - first) * 2 * window_size) > columns.shape[0]:
            break
        before = found
        for k in range(first, last):
            ahead = positions[min(k + _PREFETCH, positions.shape[0] - 1)]
            prefetch(padded, ahead - reach)
            prefetch(padded, ahead + reach)
            p = np.uint64(positions[k])
            if has_borders:
                for d in range(1, window_size + 1):
                    context = padded[p + np.uint64(d)]
                    if context == border:
                        break
                    _add(totals, bits, touched, np.uint64(context), weights[d])
                if symmetric:
                    for d in range(1, window_size + 1):
                        context = padded[p - np.uint64(d)]
                        if context == border:
                            break
                        _add(totals, bits, touched, np.uint64(context), weights[d])
            else:
                for d in range(1, window_size + 1):
                    _add(totals, bits, touched, np.uint64(padded[p + np.uint64(d)]), weights[d])
                if symmetric:
                    for d in range(1, window_size + 1):
                        _add(totals, bits, touched, np.uint64(padded[p - np.uint64(d)]), weights[d])
        if last > first:
            found = emit(totals, bits, touched, columns, values, found)
        row_cells[row] = found - before
        row += 1
    return row, found


class PositionIndex:
    """A piece of a stream, ready to be counted by rows.

    Args:
        padded: int32 ``[window_size + tokens + window_size]``: the piece between what stands before and
            after it, with `BORDER` where nothing does. It is overwritten and kept.
        dtype: of totals, unsigned and wide enough, as `total_dtype` gives it.
    """

    def __init__(
        self, padded: npt.NDArray[np.int32], vocab_size: int, windows: Windows, dtype: np.dtype[Any]
    ):
        margin = windows.window_size
        check_array("padded", padded, (len(padded),), np.int32)
        check_ids(padded, vocab_size)
        inside = padded >= 0
        first, last = inside.argmax(), len(inside) - inside[::-1].argmax()
        self.has_borders = not inside[first:last].all()  # at the ends nothing lies beyond them
        padded[~inside] = vocab_size
        self._padded = padded.view(np.uint32)
        self._windows = windows
        self.row_ptr = np.empty(vocab_size + 1, np.int64)
        self._positions = np.empty(len(padded) - 2 * margin, np.uint32)
        _index_positions(self._padded, margin, len(padded) - margin, self.row_ptr, self._positions)
        self._weights = np.array(windows.weights, dtype)

    def count_rows(
        self,
        first: int,
        last: int,
        row: Row,
        row_cells: npt.NDArray[Any],
        columns: npt.NDArray[np.int32],
        values: npt.NDArray[Any],
    ) -> tuple[int, int]:
        """Count rows from `first` on, up to `last` or as many as `columns` surely holds.

        Returns the row to go on with and the number of cells. `columns` must hold `vocab_size` cells, else
        ValueError.
        """
        vocab_size, dtype = len(self.row_ptr) - 1, self._weights.dtype
        check_integers(0, vocab_size, first=first, last=last)
        check_integers(vocab_size, num_columns=len(columns))
        check_array("row.totals", row.totals, (vocab_size + 1,), dtype)
        check_array("row_cells", row_cells, (vocab_size,), np.int64, np.uint32)
        check_array("columns", columns, columns.shape, np.int32)
        check_array("values", values, columns.shape, dtype)
        counted: tuple[int, int] = _count_rows(
            self._padded, self._positions, self.row_ptr, first, last,
            self._windows.window_size, self._weights, self._windows.symmetric, self.has_borders,
            *row.arrays, row_cells, columns, values,
        )  # fmt: skip
        return counted


class _Workspace:
    """Workspace of one block: columns, values and a row."""

    def __init__(self, num_cells: int, vocab_size: int, dtype: np.dtype[Any]):
        self.columns, self.values = np.empty(num_cells, np.int32), np.empty(num_cells, dtype)
        self.row = Row(vocab_size, dtype)


def total_dtype(largest_total: int) -> np.dtype[Any]:
    """The unsigned integers that totals take."""
    return np.dtype(np.uint32 if largest_total < 2**32 else np.uint64)


def check_ids(token_ids: npt.NDArray[Any], vocab_size: int) -> None:
    """Raise ValueError unless all ids lie in ``[0, vocab_size)`` or are `BORDER`."""
    if token_ids.size and not (token_ids.min() >= BORDER and token_ids.max() < vocab_size):
        raise ValueError(
            f"token ids must lie in [0, {vocab_size}), or be {BORDER} for a border, "
            f"got ids from {token_ids.min()} to {token_ids.max()}"
        )


def count_cooccurrences(
    token_ids: npt.NDArray[Any],
    *,
    vocab_size: int,
    window_size: int = 5,
    distance_weighting: str = "flat",
    symmetric: bool = True,
    subsample_threshold: float | None = None,
    seed: int = 0,
) -> sp.csr_array:
    """Count how often context c stands within `window_size` tokens of word w.

    Args:
        token_ids: integers in [0, vocab_size), or −1 for a border that windows do not cross, ``[tokens]``.
        distance_weighting: ``"flat"`` counts 1 per pair, ``"harmonic"`` 1/distance.
        symmetric: count contexts on both sides; otherwise only those that follow the word.
        subsample_threshold: remove tokens of frequent words at random before windows are laid; see
            `keep_thresholds` and `subsample`. None keeps all.
        seed: of subsampling.

    Returns:
        float64 CSR ``[vocab_size, vocab_size]`` with sorted columns, the same bits for any number of threads:
        sums are of integers, and harmonic ones are divided once, at the end. Without borders, n tokens'
        counts sum to ``Σ_k (n − k)·weight(k)`` over k = 1 … window_size, twice that if symmetric. Where the
        result may be too large for memory, `cemb.pmi.out_of_core.count` puts it on disk.

    Raises:
        ValueError: an unknown weighting, a window or an id out of range.
        OverflowError: totals that 64 bits might not hold.
    """
    windows = Windows(window_size, distance_weighting, symmetric)
    check_integers(1, vocab_size=vocab_size)
    token_ids = np.asarray(token_ids)
    check_ids(token_ids, vocab_size)
    if subsample_threshold is not None:
        word_counts = np.bincount(token_ids[token_ids >= 0], minlength=vocab_size)
        token_ids = subsample(token_ids, keep_thresholds(word_counts, subsample_threshold), seed=seed)
    padded = np.full(len(token_ids) + 2 * window_size, BORDER, np.int32)
    padded[window_size : len(padded) - window_size] = token_ids
    dtype = total_dtype(windows.largest_total(len(token_ids)))
    index = PositionIndex(padded, vocab_size, windows, dtype)
    bounds = np.minimum(np.diff(index.row_ptr) * 2 * window_size, vocab_size)
    ends = np.concatenate([[0], np.cumsum(bounds)])
    block_cells = max(vocab_size, _BLOCK_CELLS)
    row_cells = np.zeros(vocab_size, np.int64)

    def count_block(block_and_workspace: tuple[tuple[int, int], _Workspace]) -> tuple[_Workspace, int]:
        (first, last), workspace = block_and_workspace
        _, found = index.count_rows(
            first, last, workspace.row, row_cells, workspace.columns, workspace.values
        )
        return workspace, found

    # Only what is written of these takes memory, so that the bound costs none.
    indices, data, end = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float64), 0
    threads = get_num_threads()
    workspaces = [_Workspace(block_cells, vocab_size, dtype) for _ in range(threads + 1)]
    blocks = ((block, workspaces.pop()) for block in row_blocks(ends, block_cells))
    with ThreadPoolExecutor(threads) as pool:
        for workspace, found in in_order(pool, count_block, blocks, threads):
            indices[end : end + found] = workspace.columns[:found]
            np.divide(workspace.values[:found], windows.denominator, out=data[end : end + found])
            end += found
            workspaces.append(workspace)
    indices.resize(end, refcheck=False)
    data.resize(end, refcheck=False)
    indptr: npt.NDArray[Any] = np.zeros(vocab_size + 1, np.int64)
    np.cumsum(row_cells, out=indptr[1:])
    indptr = indptr.astype(np.int32) if end < _WIDE_FROM else indptr
    return sp.csr_array((data, indices, indptr), shape=(vocab_size, vocab_size))
