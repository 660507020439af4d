"""Gradients of pair scores at block size 1 in a large pool: single values, in buckets by where they go.

Each value of a row lies on a cache line of its own, and fetching that takes longer than all that is done
with it. So it is fetched once: the forward pass keeps the values, their gradients are laid into buckets, one
for each slice of the pool that fits in a core's cache, and an optimizer goes through the pool slice by slice,
see `cemb.kernels.updates.update_buckets`. What is kept is far smaller than a pool's dense gradient.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb import hashing
from cemb.kernels import cpu

# Values of a slice, as a power of two: 512 KiB of float32, half of a usual second-level cache.
SLICE_BITS = 17


class Buckets(NamedTuple):
    """A gradient as single values, kept from step to step.

    Bucket b has the ``entries[starts[b]:starts[b + 1]]``: a value, and its place in slice b of the pool as a
    number of the same type, which is exact.
    """

    entries: npt.NDArray[Any]  # [2 * pairs * dim, 2]
    starts: npt.NDArray[np.int64]  # int64 [buckets + 1]
    next_entries: npt.NDArray[np.int64]  # int64 [threads, buckets]: where a thread writes next

    @classmethod
    def of(cls, num_pairs: int, spec: hashing.HashSpec, dtype: np.dtype[Any], threads: int) -> "Buckets":
        slices = ((spec.pool_size - 1) >> SLICE_BITS) + 1
        return cls(
            np.empty((2 * num_pairs * spec.embedding_dim, 2), dtype),
            np.zeros(slices + 1, np.int64),
            np.zeros((threads, slices), np.int64),
        )

    def fits(self, num_pairs: int, spec: hashing.HashSpec, threads: int) -> bool:
        """Whether it has room for so many pairs of the table it was made for."""
        return len(self.next_entries) == threads and len(self.entries) >= 2 * num_pairs * spec.embedding_dim


@njit(parallel=True, cache=True, nogil=True, fastmath=cpu._FAST)
def _pair_scores(
    weight: Any, pairs: Any, kept: Any, scores: Any, values: Any, scale: Any, threads: Any, table: Any
) -> None:
    n, dim = pairs.shape[0], table.dim
    for t in prange(threads):
        ones = np.ones(cpu._LANES, weight.dtype)
        factors, places = np.empty(dim, weight.dtype), cpu._place_memory(dim)
        for i in range(n * t // threads, n * (t + 1) // threads):
            word = cpu._key(table, cpu._row(table, pairs, i, 0))
            context = cpu._key(table, cpu._row(table, pairs, i, 1))
            cpu._find_single(factors, places, kept[i], scale, ones, table, word, context)
            for side in range(2):
                for j in range(dim):
                    values[i, side, j] = weight[np.int64(places[side, cpu._FIRST + j])]
            total = weight.dtype.type(0)
            for j in range(dim):
                total += factors[j] * values[i, 0, j] * values[i, 1, j]
            scores[i] = total


@njit(parallel=True, cache=True, nogil=True)
def _count(pairs: Any, counts: Any, table: Any) -> None:
    n, dim, threads = pairs.shape[0], table.dim, counts.shape[0]
    for t in prange(threads):
        found = counts[t]
        found[:] = 0
        places = cpu._place_memory(dim)
        for i in range(n * t // threads, n * (t + 1) // threads):
            for side in range(2):
                key = cpu._key(table, cpu._row(table, pairs, i, side))
                cpu._find_places(places[side], key, table)
            for side in range(2):
                for j in range(dim):
                    found[np.int64(places[side, cpu._FIRST + j]) >> SLICE_BITS] += 1


@njit(parallel=True, cache=True, nogil=True, fastmath=cpu._FAST)
def _fill(
    pairs: Any, kept: Any, factors: Any, values: Any, entries: Any, next_entries: Any, table: Any
) -> None:
    n, dim, threads = pairs.shape[0], table.dim, next_entries.shape[0]
    in_slice = np.int64((1 << SLICE_BITS) - 1)
    for t in prange(threads):
        following = next_entries[t]
        ones = np.ones(cpu._LANES, entries.dtype)
        terms, places = np.empty(dim, entries.dtype), cpu._place_memory(dim)
        for i in range(n * t // threads, n * (t + 1) // threads):
            word = cpu._key(table, cpu._row(table, pairs, i, 0))
            context = cpu._key(table, cpu._row(table, pairs, i, 1))
            cpu._find_single(terms, places, kept[i], factors[i], ones, table, word, context)
            for j in range(dim):
                for side in range(2):
                    place = np.int64(places[side, cpu._FIRST + j])
                    x = following[place >> SLICE_BITS]
                    following[place >> SLICE_BITS] = x + 1
                    entries[x, 0] = terms[j] * values[i, 1 - side, j]
                    entries[x, 1] = place & in_slice


def pair_scores(
    weight: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    spec: hashing.HashSpec,
    context_offset: int,
    dropout: hashing.PairDropout,
    scores: npt.NDArray[Any],
    values: npt.NDArray[Any],
) -> None:
    """`cemb.kernels.cpu.pair_scores` that keeps the pairs' values, before signs and dropout.

    They go to `values` ``[n, 2, embedding_dim]``.
    """
    with cpu._launch:
        threads = cpu._set_threads()
        kept = cpu._kept(len(pairs), spec.embedding_dim, dropout, threads)
        scale, table = weight.dtype.type(dropout.scale), cpu.Geometry.of(spec, context_offset)
        _pair_scores(weight, pairs, kept, scores, values, scale, threads, table)


def pair_buckets(
    pairs: npt.NDArray[np.int64],
    kept: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    values: npt.NDArray[Any],
    spec: hashing.HashSpec,
    context_offset: int,
    room: Buckets | None,
) -> Buckets:
    """The gradient of ``Σ factors[i] · score[i]``, before dropout's scale, from the `values` of the pairs.

    Entries of a bucket are in the order of the pairs, so that sums are deterministic for any number of
    threads. Returns `room`, or a larger one for the same table.
    """
    with cpu._launch:
        threads = cpu._set_threads()
        if room is None or not room.fits(len(pairs), spec, threads):
            room = Buckets.of(len(pairs), spec, factors.dtype, threads)
        table = cpu.Geometry.of(spec, context_offset)
        _count(pairs, room.next_entries, table)
        # By bucket, then by thread.
        ends = np.cumsum(room.next_entries.T).reshape(room.next_entries.shape[::-1]).T
        room.starts[1:] = ends[-1]
        room.next_entries[:] = ends - room.next_entries
        _fill(pairs, kept, factors, values, room.entries, room.next_entries, table)
        return room
