"""Numba kernels: the hash is computed where it is used, so no index ever reaches memory.

Inputs are flat, contiguous numpy arrays that `cemb.ops` has already validated. Compiled code is cached on
disk. Numba's threading layers may not all be entered by two threads at once (`workqueue` aborts), so
launches hold a lock.

Constants are typed once and every operand is uint64: Numba promotes uint32 arithmetic to uint64 and mixed
signed arithmetic to float64, either of which would send indices wild.
"""

import threading

import numba
import numpy as np
import torch
from numba import njit, prange

from cemb import hashing

_MULTIPLIER_1 = np.uint64(hashing.MULTIPLIER_1)
_MULTIPLIER_2 = np.uint64(hashing.MULTIPLIER_2)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_ONE = np.uint64(1)

# Up to this pool size each thread adds into a pool of its own (16 MiB in float32, near the last-level
# cache); above it, clearing and summing private pools costs more than hashing every key once per thread.
PRIVATE_POOL_LIMIT = 2**22

_launch = threading.Lock()


def _set_threads() -> int:
    """Use as many threads as torch does; returns that number."""
    threads = max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(threads)
    return threads


@njit(inline="always")
def _mix(x):
    x = (x ^ (x >> _S30)) * _MULTIPLIER_1
    x = (x ^ (x >> _S27)) * _MULTIPLIER_2
    return x ^ (x >> _S31)


@njit(inline="always")
def _first_key(row, table_offset, num_blocks, salt):
    return (np.uint64(row) + table_offset) * num_blocks + salt


@njit(inline="always")
def _start(h, num_starts):
    return np.int64(((h >> _S32) * num_starts) >> _S32)


@njit(inline="always")
def _sign(h, sign_mask, like):
    return like.dtype.type(np.int64(1) - np.int64((h & sign_mask) << _ONE))


@njit(parallel=True, cache=True, nogil=True)
def _lookup(weight, ids, out, block_size, table_offset, num_blocks, num_starts, salt, sign_mask):
    dim = out.shape[1]
    blocks = np.int64(num_blocks)
    for i in prange(ids.shape[0]):
        key = _first_key(ids[i], table_offset, num_blocks, salt)
        if block_size == 1:
            for j in range(dim):
                h = _mix(key + np.uint64(j))
                out[i, j] = _sign(h, sign_mask, out) * weight[_start(h, num_starts)]
        else:
            for b in range(blocks):
                h = _mix(key + np.uint64(b))
                start, sign = _start(h, num_starts), _sign(h, sign_mask, out)
                first = b * block_size
                for k in range(min(block_size, dim - first)):
                    out[i, first + k] = sign * weight[start + k]


@njit(inline="always")
def _add_row(grad, i, target, key, block_size, blocks, num_starts, sign_mask):
    dim = grad.shape[1]
    if block_size == 1:
        for j in range(dim):
            h = _mix(key + np.uint64(j))
            target[_start(h, num_starts)] += _sign(h, sign_mask, grad) * grad[i, j]
    else:
        for b in range(blocks):
            h = _mix(key + np.uint64(b))
            start, sign = _start(h, num_starts), _sign(h, sign_mask, grad)
            first = b * block_size
            for k in range(min(block_size, dim - first)):
                target[start + k] += sign * grad[i, first + k]


@njit(parallel=True, cache=True, nogil=True)
def _scatter_private(
    grad, ids, pool, private, block_size, table_offset, num_blocks, num_starts, salt, sign_mask
):
    threads = private.shape[0] + 1
    blocks = np.int64(num_blocks)
    rows = ids.shape[0]
    for t in prange(threads):
        target = pool if t == 0 else private[t - 1]
        for i in range(rows * t // threads, rows * (t + 1) // threads):
            key = _first_key(ids[i], table_offset, num_blocks, salt)
            _add_row(grad, i, target, key, block_size, blocks, num_starts, sign_mask)
    if threads > 1:
        for p in prange(pool.shape[0]):
            for t in range(threads - 1):
                pool[p] += private[t, p]


@njit(parallel=True, cache=True, nogil=True)
def _scatter_owned(
    grad, ids, pool, threads, block_size, table_offset, num_blocks, num_starts, salt, sign_mask
):
    dim = grad.shape[1]
    blocks = np.int64(num_blocks)
    pool_size = pool.shape[0]
    for t in prange(threads):
        low, high = pool_size * t // threads, pool_size * (t + 1) // threads
        for i in range(ids.shape[0]):
            key = _first_key(ids[i], table_offset, num_blocks, salt)
            for b in range(blocks):
                h = _mix(key + np.uint64(b))
                start = _start(h, num_starts)
                first = b * block_size
                length = min(block_size, dim - first)
                if start < high and start + length > low:
                    sign = _sign(h, sign_mask, grad)
                    for k in range(max(0, low - start), min(length, high - start)):
                        pool[start + k] += sign * grad[i, first + k]


def _constants(spec: hashing.HashSpec):
    return (
        spec.block_size,
        np.uint64(spec.table_offset),
        np.uint64(spec.num_blocks),
        np.uint64(spec.num_starts),
        np.uint64(spec.salt),
        np.uint64(spec.signed),
    )


def lookup(weight: np.ndarray, ids: np.ndarray, spec: hashing.HashSpec, out: np.ndarray) -> None:
    """Write rows `ids` ``[n]`` of the hashed table into `out` ``[n, embedding_dim]``."""
    with _launch:
        _set_threads()
        _lookup(weight, ids, out, *_constants(spec))


def scatter(grad: np.ndarray, ids: np.ndarray, spec: hashing.HashSpec, pool: np.ndarray) -> None:
    """The transpose of `lookup`: add `grad` ``[n, embedding_dim]`` into the zeroed `pool` ``[pool_size]``.

    Deterministic for a given number of threads up to `PRIVATE_POOL_LIMIT`, and for any number above it,
    where each thread owns a slice of the pool and sees every row in order.
    """
    with _launch:
        threads = _set_threads()
        if threads > 1 and spec.pool_size > PRIVATE_POOL_LIMIT:
            _scatter_owned(grad, ids, pool, threads, *_constants(spec))
        else:
            private = np.zeros((threads - 1, spec.pool_size), dtype=grad.dtype)
            _scatter_private(grad, ids, pool, private, *_constants(spec))


@njit(inline="always")
def _keep(key, j, threshold):
    return (_mix(key + np.uint64(j)) >> _S32) >= threshold


# Reassociation lets the sum over a row use vector registers.
@njit(parallel=True, cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def _pair_scores(vectors, scores, salt, threshold, scale):
    dim = vectors.shape[2]
    for i in prange(vectors.shape[0]):
        key = salt + np.uint64(i) * np.uint64(dim)
        total = scores.dtype.type(0)
        for j in range(dim):
            product = vectors[i, 0, j] * vectors[i, 1, j]
            total += product if _keep(key, j, threshold) else scores.dtype.type(0)
        scores[i] = total * scale


@njit(parallel=True, cache=True, nogil=True)
def _pair_scores_backward(grad, vectors, out, salt, threshold, scale):
    dim = vectors.shape[2]
    for i in prange(vectors.shape[0]):
        key = salt + np.uint64(i) * np.uint64(dim)
        factor = grad[i] * scale
        for j in range(dim):
            kept = factor if _keep(key, j, threshold) else grad.dtype.type(0)
            out[i, 0, j] = kept * vectors[i, 1, j]
            out[i, 1, j] = kept * vectors[i, 0, j]


def _dropout_constants(dropout: hashing.PairDropout, dtype: np.dtype):
    return np.uint64(dropout.salt), np.uint64(dropout.threshold), dtype.type(dropout.scale)


def pair_scores(vectors: np.ndarray, dropout: hashing.PairDropout, scores: np.ndarray) -> None:
    """Write the dot product of each pair of `vectors` ``[n, 2, dim]`` after dropout into `scores` ``[n]``."""
    with _launch:
        _set_threads()
        _pair_scores(vectors, scores, *_dropout_constants(dropout, vectors.dtype))


def pair_scores_backward(
    grad: np.ndarray, vectors: np.ndarray, dropout: hashing.PairDropout, out: np.ndarray
) -> None:
    """Write the gradient of `pair_scores` with respect to `vectors` into `out` ``[n, 2, dim]``."""
    with _launch:
        _set_threads()
        _pair_scores_backward(grad, vectors, out, *_dropout_constants(dropout, vectors.dtype))
