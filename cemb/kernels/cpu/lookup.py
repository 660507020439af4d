"""Kernels that look rows up and, their transpose, scatter gradients into the pool."""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import prange

from cemb.hashing import Spec
from cemb.kernels.checks import check_array
from cemb.kernels.cpu import locate, simd
from cemb.kernels.cpu.locate import (
    FIRST,
    Geometry,
    block_length,
    check_pool,
    find_row,
    is_single,
    key_of,
    locate_block,
    place_workspace,
)
from cemb.kernels.cpu.threads import jit, launch, parallel, scratch


@jit()
def _lookup_chunk(t, num_threads, weight, ids, out, table):
    """Write the thread's rows."""
    n = ids.shape[0]
    places, signs = place_workspace(table.dim)[0], np.ones(table.dim, out.dtype)
    for i in range(n * t // num_threads, n * (t + 1) // num_threads):
        key = key_of(table, ids[i] + table.word_offset)
        if is_single(table):
            find_row(places, signs, key, table)
            for j in range(table.dim):
                out[i, j] = signs[j] * simd.value_at(weight, np.int64(places[FIRST + j]))
            continue
        for b in range(table.num_blocks):
            start, sign = locate_block(table, key, b)
            first, length = b * table.block_size, block_length(table, b)
            simd.copy_scaled(out[i], first, weight, start, sign, None, length)


@parallel
def _lookup(num_threads, weight, ids, out, table):
    """`lookup`, a chunk of the rows a thread."""
    for t in prange(num_threads):
        _lookup_chunk(np.int64(t), num_threads, weight, ids, out, table)


@jit()
def _scatter_chunk(pool, low, high, grad, ids, table):
    """Add what rows `ids` have between `low` and `high` of `pool`, in order."""
    places, signs = place_workspace(table.dim)[0], np.ones(table.dim, pool.dtype)
    inside = np.empty(table.dim + 1, np.int64)  # columns whose places lie there
    for i in range(ids.shape[0]):
        key = key_of(table, ids[i] + table.word_offset)
        if is_single(table):
            find_row(places, signs, key, table)
            count = 0
            for j in range(table.dim):
                inside[count] = j
                # Arithmetic in place of a branch, which could not be predicted.
                count += np.int64(places[FIRST + j] >= low) & np.int64(places[FIRST + j] < high)
            for x in range(count):
                j = inside[x]
                pool[np.int64(places[FIRST + j])] += signs[j] * grad[i, j]
            continue
        for b in range(table.num_blocks):
            start, sign = locate_block(table, key, b)
            first, length = b * table.block_size, block_length(table, b)
            begin, end = max(0, low - start), min(length, high - start)
            if begin < end:
                simd.add_scaled(pool, start + begin, grad[i], first + begin, sign, end - begin, None)


@jit()
def _sum_chunk(t, pool, private):
    """Add the thread's slice of the other threads' pools to `pool`."""
    num_threads, size = private.shape[0] + 1, pool.shape[0]
    for other in range(num_threads - 1):
        for p in range(size * t // num_threads, size * (t + 1) // num_threads):
            pool[p] += private[other, p]


@parallel
def _scatter_private(grad, ids, pool, private, table):
    """Thread 0 adds to `pool`, the others to `private` ``[threads - 1, pool_size]``, summed after."""
    num_threads, n, size = private.shape[0] + 1, ids.shape[0], pool.shape[0]
    for t in prange(num_threads):
        begin, end = n * t // num_threads, n * (t + 1) // num_threads
        target = pool if t == 0 else private[t - 1]
        if t > 0:
            target[:] = 0
        _scatter_chunk(target, 0, size, grad[begin:end], ids[begin:end], table)
    for t in prange(num_threads):
        _sum_chunk(np.int64(t), pool, private)


@parallel
def _scatter_owned(num_threads, grad, ids, pool, table):
    """Each thread goes through all rows and adds what falls in its slice of `pool` ``[pool_size]``."""
    size = pool.shape[0]
    for t in prange(num_threads):
        _scatter_chunk(pool, size * t // num_threads, size * (t + 1) // num_threads, grad, ids, table)


def lookup(weight: npt.NDArray[Any], ids: npt.NDArray[np.int64], spec: Spec, out: npt.NDArray[Any]) -> None:
    """Write rows `ids` ``[n]`` of the table in `weight` ``[pool_size]`` into `out` ``[n, embedding_dim]``.

    `out` is float64 for a float64 pool, else float32. Deterministic for any number of threads.
    """
    check_array("ids", ids, (len(ids),), np.int64)
    check_array("out", out, (len(ids), spec.embedding_dim), np.float32, np.float64)
    check_pool("weight", weight, spec, out.dtype)
    with launch() as num_threads:
        _lookup(num_threads, weight, ids, out, Geometry.of(spec))


def scatter(grad: npt.NDArray[Any], ids: npt.NDArray[np.int64], spec: Spec, pool: npt.NDArray[Any]) -> None:
    """The transpose of `lookup`: add `grad` ``[n, embedding_dim]`` into the zeroed `pool` ``[pool_size]``.

    Deterministic for a given number of threads up to `PRIVATE_POOL_LIMIT` of `cemb.kernels.cpu.locate`, and
    above it for any number: each thread adds to a slice of the pool of its own, and sees every row in order.
    """
    check_array("ids", ids, (len(ids),), np.int64)
    check_array("pool", pool, (spec.pool_size,), np.float32, np.float64)
    check_array("grad", grad, (len(ids), spec.embedding_dim), pool.dtype)
    with launch() as num_threads:
        table = Geometry.of(spec)
        if num_threads > 1 and pool.size > locate.PRIVATE_POOL_LIMIT:
            _scatter_owned(num_threads, grad, ids, pool, table)
        else:
            private = scratch("private pools", (num_threads - 1, pool.size), pool.dtype)
            _scatter_private(grad, ids, pool, private, table)
