"""Gradients of pair scores at block size 1 in a large pool: single values, in buckets by slice of the pool.

Each value of a row lies on a cache line of its own, and loading that takes longer than all that is done with
it. So it is loaded once: the forward pass keeps the values, their gradients are written to buckets, one for
each slice of the pool that fits in a core's cache, and an optimizer goes through the pool slice by slice, see
`cemb.kernels.cpu.updates.update_buckets`. The buckets are far smaller than a dense gradient of the pool.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb.hashing import PairDropout, Spec
from cemb.kernels.cpu.dropout import draw_in_launch
from cemb.kernels.cpu.locate import FIRST, Geometry, find_places, key_of, place_workspace, row_of
from cemb.kernels.cpu.pairs import find_single
from cemb.kernels.cpu.simd import FASTMATH, LANES
from cemb.kernels.cpu.threads import launch

# Values of a slice, as a power of two: 512 KiB of float32, half of a usual second-level cache.
SLICE_BITS = 17


class Buckets(NamedTuple):
    """A gradient as single values; its memory is reused from step to step.

    Bucket b has the ``entries[starts[b]:starts[b + 1]]``: a value, and its place in slice b of the pool as a
    number of the same dtype, which is exact.
    """

    entries: npt.NDArray[Any]  # float32 or float64 [2 * pairs * dim, 2]
    starts: npt.NDArray[np.int64]  # [buckets + 1]
    next_entries: npt.NDArray[np.int64]  # [threads, buckets]: where a thread writes next

    @classmethod
    def of(cls, num_pairs: int, spec: Spec, dtype: np.dtype[Any], num_threads: int) -> "Buckets":
        slices = ((spec.pool_size - 1) >> SLICE_BITS) + 1
        return cls(
            np.empty((2 * num_pairs * spec.embedding_dim, 2), dtype),
            np.zeros(slices + 1, np.int64),
            np.zeros((num_threads, slices), np.int64),
        )

    def fits(self, num_pairs: int, spec: Spec, num_threads: int) -> bool:
        """Whether it holds so many pairs of the table it was made for."""
        return (
            len(self.next_entries) == num_threads and len(self.entries) >= 2 * num_pairs * spec.embedding_dim
        )


@njit(parallel=True, cache=True, nogil=True, fastmath=FASTMATH)
def _pair_scores(weight, pairs, dropout_mask, scores, values, scale, num_threads, table):
    """Write `scores` ``[n]`` and the pairs' `values` ``[n, 2, dim]``."""
    n, dim = pairs.shape[0], table.dim
    for t in prange(num_threads):
        ones = np.ones(LANES, weight.dtype)
        factors, places = np.empty(dim, weight.dtype), place_workspace(dim)
        for i in range(n * t // num_threads, n * (t + 1) // num_threads):
            word = key_of(table, row_of(table, pairs, i, 0))
            context = key_of(table, row_of(table, pairs, i, 1))
            find_single(factors, places, dropout_mask[i], scale, ones, table, word, context)
            for side in range(2):
                for j in range(dim):
                    values[i, side, j] = weight[np.int64(places[side, FIRST + j])]
            total = weight.dtype.type(0)
            for j in range(dim):
                total += factors[j] * values[i, 0, j] * values[i, 1, j]
            scores[i] = total


@njit(parallel=True, cache=True, nogil=True)
def _count(pairs, counts, table):
    """Count the values of each thread's pairs in each slice into `counts` ``[threads, slices]``."""
    n, dim, num_threads = pairs.shape[0], table.dim, counts.shape[0]
    for t in prange(num_threads):
        found = counts[t]
        found[:] = 0
        places = place_workspace(dim)
        for i in range(n * t // num_threads, n * (t + 1) // num_threads):
            for side in range(2):
                key = key_of(table, row_of(table, pairs, i, side))
                find_places(places[side], key, table)
            for side in range(2):
                for j in range(dim):
                    found[np.int64(places[side, FIRST + j]) >> SLICE_BITS] += 1


@njit(parallel=True, cache=True, nogil=True, fastmath=FASTMATH)
def _fill(pairs, dropout_mask, factors, values, entries, next_entries, table):
    """Write the `entries` of each thread's pairs, from `next_entries` ``[threads, slices]`` on."""
    n, dim, num_threads = pairs.shape[0], table.dim, next_entries.shape[0]
    in_slice = np.int64((1 << SLICE_BITS) - 1)
    for t in prange(num_threads):
        following = next_entries[t]
        ones = np.ones(LANES, entries.dtype)
        terms, places = np.empty(dim, entries.dtype), place_workspace(dim)
        for i in range(n * t // num_threads, n * (t + 1) // num_threads):
            word = key_of(table, row_of(table, pairs, i, 0))
            context = key_of(table, row_of(table, pairs, i, 1))
            find_single(terms, places, dropout_mask[i], factors[i], ones, table, word, context)
            for j in range(dim):
                for side in range(2):
                    place = np.int64(places[side, FIRST + j])
                    x = following[place >> SLICE_BITS]
                    following[place >> SLICE_BITS] = x + 1
                    entries[x, 0] = terms[j] * values[i, 1 - side, j]
                    entries[x, 1] = place & in_slice


def pair_scores(
    weight: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    spec: Spec,
    context_offset: int,
    dropout: PairDropout,
    scores: npt.NDArray[Any],
    values: npt.NDArray[Any],
) -> None:
    """`cemb.kernels.cpu.pairs.pair_scores` that keeps the pairs' values, before signs and dropout.

    It writes them to `values` ``[n, 2, embedding_dim]``, of weight's dtype, float32 or float64.
    """
    with launch() as num_threads:
        dropout_mask = draw_in_launch(len(pairs), spec.embedding_dim, dropout, num_threads)
        scale, table = weight.dtype.type(dropout.scale), Geometry.of(spec, context_offset)
        _pair_scores(weight, pairs, dropout_mask, scores, values, scale, num_threads, table)


def pair_buckets(
    pairs: npt.NDArray[np.int64],
    dropout_mask: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    values: npt.NDArray[Any],
    spec: Spec,
    context_offset: int,
    workspace: Buckets | None,
) -> Buckets:
    """The gradient of ``Σ factors[i] · score[i]``, before dropout's scale, from `values` of `pair_scores`.

    `pairs` are ``[n, 2]``, `dropout_mask` ``[n, mask_width]``, `factors` ``[n]``. Entries of a bucket are in
    the order of the pairs, so that sums are the same for any number of threads. Writes to `workspace`, which
    must be of the same table, or if it is too small to a new one; returns it.
    """
    with launch() as num_threads:
        if workspace is None or not workspace.fits(len(pairs), spec, num_threads):
            workspace = Buckets.of(len(pairs), spec, factors.dtype, num_threads)
        table = Geometry.of(spec, context_offset)
        _count(pairs, workspace.next_entries, table)
        # By bucket, then by thread.
        ends = np.cumsum(workspace.next_entries.T).reshape(workspace.next_entries.shape[::-1]).T
        workspace.starts[1:] = ends[-1]
        workspace.next_entries[:] = ends - workspace.next_entries
        _fill(pairs, dropout_mask, factors, values, workspace.entries, workspace.next_entries, table)
        return workspace
