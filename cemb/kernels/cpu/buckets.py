"""Gradients of pair scores at block size 1 in a large pool: single values, in buckets by slice of the pool.

Each value of a row lies on a cache line of its own, and loading that takes longer than all that is done with
it. So it is loaded once: scoring keeps the values, their gradients are written to buckets, one for each slice
of the pool that fits in a core's cache, and an optimizer goes through the pool slice by slice. The buckets
are far smaller than a dense gradient of the pool.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import prange

from cemb.hashing import Spec
from cemb.kernels.cpu import rules, simd
from cemb.kernels.cpu.locate import FIRST, find_places, key_of, place_workspace, row_of
from cemb.kernels.cpu.pairs import find_pair, pair_workspace
from cemb.kernels.cpu.threads import FASTMATH, jit, parallel, scratch

# Values of a slice, as a power of two: 512 KiB of float32, half of a usual second-level cache.
SLICE_BITS = 17


class Buckets(NamedTuple):
    """A gradient as single values, and the values that it is made of.

    Bucket b has the ``entries[starts[b]:starts[b + 1]]``: a value, and its place in slice b of the pool as a
    number of the same dtype, which is exact.
    """

    values: npt.NDArray[Any]  # float32 or float64 [pairs, 2, dim], of the pairs' rows
    entries: npt.NDArray[Any]  # of the same dtype [2 * pairs * dim, 2]
    starts: npt.NDArray[np.int64]  # [buckets + 1]
    next_entries: npt.NDArray[np.int64]  # [threads, buckets]: where a thread writes next

    @classmethod
    def of(cls, num_pairs: int, spec: Spec, dtype: np.dtype[Any], num_threads: int) -> "Buckets":
        """In scratch memory."""
        slices = ((spec.pool_size - 1) >> SLICE_BITS) + 1
        return cls(
            scratch("values", (num_pairs, 2, spec.embedding_dim), dtype),
            scratch("bucket entries", (2 * num_pairs * spec.embedding_dim, 2), dtype),
            np.zeros(slices + 1, np.int64),
            np.zeros((num_threads, slices), np.int64),
        )


@jit(fastmath=FASTMATH)
def _score_chunk(t, num_threads, weight, batch, scores, values, table):
    """Write the scores ``[n]`` of the thread's pairs, and their values ``[n, 2, dim]``."""
    n, dim = batch.pairs.shape[0], table.dim
    workspace = pair_workspace(dim, values)
    for i in range(n * t // num_threads, n * (t + 1) // num_threads):
        factors, places = find_pair(workspace, batch, i, batch.scale, table)
        for side in range(2):
            for j in range(dim):
                values[i, side, j] = simd.value_at(weight, np.int64(places[side, FIRST + j]))
        total = scores.dtype.type(0)
        for j in range(dim):
            total += factors[j] * values[i, 0, j] * values[i, 1, j]
        scores[i] = total


@jit()
def _count_chunk(t, num_threads, pairs, counts, table):
    """Count the values of the thread's pairs in each slice into `counts` ``[slices]``."""
    n = pairs.shape[0]
    counts[:] = 0
    places = place_workspace(table.dim)
    for i in range(n * t // num_threads, n * (t + 1) // num_threads):
        for side in range(2):
            find_places(places[side], key_of(table, row_of(table, pairs, i, side)), table)
        for side in range(2):
            for j in range(table.dim):
                counts[np.int64(places[side, FIRST + j]) >> SLICE_BITS] += 1


@jit(fastmath=FASTMATH)
def _fill_chunk(t, num_threads, batch, buckets, table):
    """Write the entries of the thread's pairs, in their order."""
    n, dim = batch.pairs.shape[0], table.dim
    values, entries, following = buckets.values, buckets.entries, buckets.next_entries[t]
    in_slice = np.int64((1 << SLICE_BITS) - 1)
    workspace = pair_workspace(dim, values)
    for i in range(n * t // num_threads, n * (t + 1) // num_threads):
        factors, places = find_pair(workspace, batch, i, batch.slopes[i] * batch.scale, table)
        for j in range(dim):
            for side in range(2):
                place = np.int64(places[side, FIRST + j])
                x = following[place >> SLICE_BITS]
                following[place >> SLICE_BITS] = x + 1
                entries[x, 0] = factors[j] * values[i, 1 - side, j]
                entries[x, 1] = place & in_slice


@jit()
def _update_chunk(t, num_threads, rule, stepped, buckets, table):
    """Sum the entries of some slices of the pool, and step what lies in these."""
    slices, size = buckets.starts.shape[0] - 1, stepped.weight.shape[0]
    sums = np.zeros(1 << SLICE_BITS, buckets.entries.dtype)
    for b in range(slices * t // num_threads, slices * (t + 1) // num_threads):
        for x in range(buckets.starts[b], buckets.starts[b + 1]):
            sums[np.int64(buckets.entries[x, 1])] += buckets.entries[x, 0]
        low = b << SLICE_BITS
        length = min(1 << SLICE_BITS, size - low)
        rules.update(rule, stepped, low, sums, 0, length)
        sums[:] = 0


@jit()
def _place(buckets):
    """Turn counts into places: entries stand by bucket, and in it by thread."""
    at = np.int64(0)
    for b in range(buckets.next_entries.shape[1]):
        for t in range(buckets.next_entries.shape[0]):
            count = buckets.next_entries[t, b]
            buckets.next_entries[t, b] = at
            at += count
        buckets.starts[b + 1] = at


@parallel
def score(num_threads, weight, batch, scores, buckets, table):
    """Write the scores ``[n]`` of the pairs, and their values to `buckets`."""
    for t in prange(num_threads):
        _score_chunk(np.int64(t), num_threads, weight, batch, scores, buckets.values, table)


@parallel
def step(rule, stepped, batch, buckets, table):
    """Step by the gradient of ``Σ slopes[i] · score[i]``, from the values that `score` kept.

    Entries of a bucket are in the order of the pairs, so sums are the same for any number of threads.
    """
    num_threads = buckets.next_entries.shape[0]
    for phase in range(3):
        if phase == 1:
            _place(buckets)
        for t in prange(num_threads):
            if phase == 0:
                _count_chunk(np.int64(t), num_threads, batch.pairs, buckets.next_entries[t], table)
            elif phase == 1:
                _fill_chunk(np.int64(t), num_threads, batch, buckets, table)
            else:
                _update_chunk(np.int64(t), num_threads, rule, stepped, buckets, table)
