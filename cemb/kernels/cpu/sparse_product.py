"""Products of sparse matrices with tall dense ones.

Each stored cell reads a row of the dense factor, and loading that takes the time. The factor is cut both
ways, into blocks of rows and panels of 16 columns, so that what a block of cells reads stays in a core's
second-level cache, 256 KiB of float32 for 4,096 rows, and what it adds to stays in registers.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from numba import prange

from cemb.kernels.checks import check_array
from cemb.kernels.cpu import simd
from cemb.kernels.cpu.simd import LANES
from cemb.kernels.cpu.threads import jit, launch, parallel


class Blocks(NamedTuple):
    """A sparse matrix by blocks of columns, in a block by rows; rows without a cell in it are left out.

    Block b has the segments from ``first_segments[b]`` to ``first_segments[b + 1]``. Segment s is of row
    ``rows[s]``, and its cells are those from ``starts[s]`` to ``starts[s + 1]``, their columns counted from
    the block's first.
    """

    block_columns: int
    num_columns: int
    first_segments: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    columns: npt.NDArray[np.uint16]
    values: npt.NDArray[Any]
    row_ends: npt.NDArray[np.int64]  # cells up to the end of each row, by which threads share the rows

    @classmethod
    def of(cls, matrix: sp.csr_array | sp.csc_array, block_columns: int) -> "Blocks":
        by_column = sp.csc_array(matrix)
        rows, cells, columns, values = [], [], [], []
        for first in range(0, matrix.shape[1], block_columns):
            block = by_column[:, first : first + block_columns].tocsr()
            counts = np.diff(block.indptr)
            rows.append(np.flatnonzero(counts).astype(np.int32))
            cells.append(counts[rows[-1]].astype(np.int64))
            columns.append(block.indices.astype(np.uint16))
            values.append(block.data)
        per_row = np.bincount(by_column.indices, minlength=matrix.shape[0])
        return cls(
            block_columns,
            matrix.shape[1],
            np.cumsum([0, *map(len, rows)]),
            np.concatenate(rows),
            np.concatenate([[0], *cells]).cumsum(),
            np.concatenate(columns),
            np.concatenate(values),
            per_row.cumsum(),
        )

    def chunks(self, num_threads: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Bounds of the threads' chunks, of about as many cells: rows ``[threads + 1]``.

        And the segments that begin there, ``[threads + 1, blocks]``.
        """
        bounds = np.searchsorted(self.row_ends, np.linspace(0, self.row_ends[-1], num_threads + 1))
        bounds[0], bounds[-1] = 0, len(self.row_ends)
        ranges = zip(self.first_segments[:-1], self.first_segments[1:], strict=True)
        segments = [low + np.searchsorted(self.rows[low:high], bounds) for low, high in ranges]
        return bounds, np.stack(segments, axis=1)


class Workspace(NamedTuple):
    """Workspace of a product: the panels of the factor and of the sums, float32 or float64."""

    factor: npt.NDArray[Any]  # [panels, columns * 16]
    sums: npt.NDArray[Any]  # [panels, rows * 16]


def num_panels(dim: int) -> int:
    """Panels of a factor of `dim` columns."""
    return -(-dim // LANES)


@jit()
def _lay_out_chunk(t, num_threads, dense, factor):
    """Lay the thread's rows of `dense` out in the panels of `factor`."""
    num_columns, dim = dense.shape
    for i in range(num_columns * t // num_threads, num_columns * (t + 1) // num_threads):
        for p in range(factor.shape[0]):
            for k in range(LANES):
                j = p * LANES + k
                factor[p, i * LANES + k] = dense[i, j] if j < dim else 0


@jit()
def _multiply_chunk(bounds, segments, blocks, workspace, out):
    """Write the rows from ``bounds[0]`` to ``bounds[1]`` of the product, of `segments` ``[2, blocks]``."""
    factor, sums = workspace
    for p in range(factor.shape[0]):
        totals = sums[p]
        totals[bounds[0] * LANES : bounds[1] * LANES] = 0
        for b in range(segments.shape[1]):
            rows = factor[p][b * blocks.block_columns * LANES :]
            for s in range(segments[0, b], segments[1, b]):
                simd.add_gathered(
                    totals,
                    np.int64(blocks.rows[s]) * LANES,
                    rows,
                    blocks.columns,
                    blocks.values,
                    blocks.starts[s],
                    blocks.starts[s + 1],
                )
    for i in range(bounds[0], bounds[1]):
        for p in range(factor.shape[0]):
            for k in range(min(LANES, out.shape[1] - p * LANES)):
                out[i, p * LANES + k] = sums[p, i * LANES + k]


@parallel
def _product(dense, out, workspace, bounds, segments, blocks):
    """`product`, a chunk of the rows a thread."""
    num_threads = bounds.shape[0] - 1
    for t in prange(num_threads):
        _lay_out_chunk(np.int64(t), num_threads, dense, workspace.factor)
    for t in prange(num_threads):
        _multiply_chunk(bounds[t : t + 2], segments[t : t + 2], blocks, workspace, out)


def product(blocks: Blocks, dense: npt.NDArray[Any], workspace: Workspace, out: npt.NDArray[Any]) -> None:
    """Write the matrix times `dense` ``[columns, dim]``, C-contiguous, into `out` ``[rows, dim]``.

    Sums of a row are always in the same order, so the result is the same for any number of threads.
    """
    dim, dtype, num_rows = dense.shape[-1], blocks.values.dtype, len(blocks.row_ends)
    check_array("dense", dense, (blocks.num_columns, dim), dtype)
    check_array("out", out, (num_rows, dim), dtype)
    panels = num_panels(dim)
    check_array("workspace.factor", workspace.factor, (panels, blocks.num_columns * LANES), dtype)
    check_array("workspace.sums", workspace.sums, (panels, num_rows * LANES), dtype)
    with launch() as num_threads:
        _product(dense, out, workspace, *blocks.chunks(num_threads), blocks)
