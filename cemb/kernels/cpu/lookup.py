"""Numba kernels that look rows up and, their transpose, scatter gradients into the pool."""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb.hashing import Spec
from cemb.kernels.cpu import simd, threads
from cemb.kernels.cpu.locate import (
    FIRST,
    Geometry,
    block_length,
    find_row,
    is_single,
    key_of,
    locate_block,
    place_workspace,
)
from cemb.kernels.cpu.simd import ALL_LANES, LANES, first_lanes


@njit(parallel=True, cache=True, nogil=True)
def _lookup(weight, ids, out, num_threads, table):
    """`lookup`, a chunk of the rows a thread."""
    rows = ids.shape[0]
    for t in prange(num_threads):
        places, signs = place_workspace(table.dim)[0], np.ones(table.dim, out.dtype)
        for i in range(rows * t // num_threads, rows * (t + 1) // num_threads):
            key = key_of(table, ids[i] + table.word_offset)
            if is_single(table):
                find_row(places, signs, key, table)
                for j in range(table.dim):
                    out[i, j] = signs[j] * simd.value_at(weight, np.int64(places[FIRST + j]))
                continue
            for b in range(table.num_blocks):
                start, sign = locate_block(table, key, b)
                first, length = b * table.block_size, block_length(table, b)
                simd.scale(out[i], first, weight, start, sign, first_lanes(length))
                for follows in range(LANES, length, LANES):
                    k = min(follows, length - LANES)
                    simd.scale(out[i], first + k, weight, start + k, sign, ALL_LANES)


@njit(parallel=True, cache=True, nogil=True)
def _scatter_private(grad, ids, pool, private, table):
    """Thread 0 adds to `pool`, the others to `private` ``[threads - 1, pool_size]``, summed after."""
    num_threads = private.shape[0] + 1
    rows = ids.shape[0]
    for t in prange(num_threads):
        target = pool if t == 0 else private[t - 1]
        if t > 0:
            target[:] = 0
        places, signs = place_workspace(table.dim)[0], np.ones(table.dim, pool.dtype)
        for i in range(rows * t // num_threads, rows * (t + 1) // num_threads):
            key = key_of(table, ids[i] + table.word_offset)
            if is_single(table):
                find_row(places, signs, key, table)
                for j in range(table.dim):
                    target[np.int64(places[FIRST + j])] += signs[j] * grad[i, j]
                continue
            for b in range(table.num_blocks):
                start, sign = locate_block(table, key, b)
                first, length = b * table.block_size, block_length(table, b)
                for k in range(0, length, LANES):
                    mask = first_lanes(length - k)
                    simd.add_scaled(target, start + k, grad[i], first + k, sign, mask, mask)
    for t in prange(num_threads):
        low, high = pool.shape[0] * t // num_threads, pool.shape[0] * (t + 1) // num_threads
        for other in range(num_threads - 1):
            for p in range(low, high):
                pool[p] += private[other, p]


@njit(parallel=True, cache=True, nogil=True)
def _scatter_owned(grad, ids, pool, num_threads, table):
    """Each thread goes through all rows and adds what falls in its slice of `pool` ``[pool_size]``."""
    size = pool.shape[0]
    for t in prange(num_threads):
        low, high = size * t // num_threads, size * (t + 1) // num_threads
        places, signs = place_workspace(table.dim)[0], np.ones(table.dim, pool.dtype)
        own = np.empty(table.dim + 1, np.int64)  # columns whose places lie in this thread's slice
        for i in range(ids.shape[0]):
            key = key_of(table, ids[i] + table.word_offset)
            if is_single(table):
                find_row(places, signs, key, table)
                count = 0
                for j in range(table.dim):
                    own[count] = j
                    # Arithmetic in place of a branch, which could not be predicted.
                    count += np.int64(places[FIRST + j] >= low) & np.int64(places[FIRST + j] < high)
                for x in range(count):
                    j = own[x]
                    pool[np.int64(places[FIRST + j])] += signs[j] * grad[i, j]
                continue
            for b in range(table.num_blocks):
                start, sign = locate_block(table, key, b)
                first, length = b * table.block_size, block_length(table, b)
                begin, end = max(0, low - start), min(length, high - start)
                for k in range(begin, end, LANES):
                    mask = first_lanes(end - k)
                    simd.add_scaled(pool, start + k, grad[i], first + k, sign, mask, mask)


def lookup(weight: npt.NDArray[Any], ids: npt.NDArray[np.int64], spec: Spec, out: npt.NDArray[Any]) -> None:
    """Write rows `ids` ``[n]`` of the table in `weight` ``[pool_size]`` into `out` ``[n, embedding_dim]``.

    `out` is float64 for a float64 pool, else float32. Deterministic for any number of threads.
    """
    with threads.launch() as num_threads:
        _lookup(weight, ids, out, num_threads, Geometry.of(spec))


def scatter(grad: npt.NDArray[Any], ids: npt.NDArray[np.int64], spec: Spec, pool: npt.NDArray[Any]) -> None:
    """The transpose of `lookup`: add `grad` ``[n, embedding_dim]`` into the zeroed `pool` ``[pool_size]``.

    Deterministic for a given number of threads up to `threads.PRIVATE_POOL_LIMIT`, and above it for any
    number: each thread adds to a slice of the pool of its own, and sees every row in order.
    """
    with threads.launch() as num_threads:
        table = Geometry.of(spec)
        if num_threads > 1 and pool.size > threads.PRIVATE_POOL_LIMIT:
            _scatter_owned(grad, ids, pool, num_threads, table)
        else:
            private = threads.private_pools(num_threads - 1, pool.size, pool.dtype)
            _scatter_private(grad, ids, pool, private, table)
