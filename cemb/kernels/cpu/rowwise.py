"""Numba kernels of row-wise Adagrad on full tables: a row has one state, see `cemb.kernels.cpu.rules`.

A row's whole gradient must be known before any of its values changes, so it is written out first.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb.kernels.cpu import rules, simd
from cemb.kernels.cpu.conflicts import Workspace, decode, find_conflicts
from cemb.kernels.cpu.locate import S32, Geometry, row_of
from cemb.kernels.cpu.pairs import PREFETCH_FAR
from cemb.kernels.cpu.simd import ALL_LANES, FASTMATH, LANES, first_lanes, head_length, prefetch_segment
from cemb.kernels.cpu.threads import launch


@njit(inline="always")
def _prefetch_row(weight, state, row, dim):
    """Prefetch a row of `weight` and its state."""
    prefetch_segment(weight, row * dim, dim)
    simd.prefetch(state, row)


@njit(inline="always")
def _update_row(weight, state, rule, row, gradient, first, dim):
    """Step a row of `weight` ``[rows * dim]`` and `state` ``[rows]`` by ``gradient[first : first + dim]``."""
    squares = weight.dtype.type(0)
    for x in range(first, first + dim):
        squares += gradient[x] * gradient[x]
    state[row] += squares / weight.dtype.type(dim)
    rate = rule.rate / (np.sqrt(state[row]) + rule.eps)
    place, head = row * dim, head_length(dim)
    if head:
        mask = first_lanes(dim)
        simd.add_scaled(weight, place, gradient, first, -rate, mask, mask)
    for k in range(head, dim - LANES, 2 * LANES):
        step = min(LANES, dim - LANES - k)
        simd.add_scaled_two(weight, place + k, gradient, first + k, -rate, ALL_LANES, step, ALL_LANES)


@njit(nogil=True, error_model="numpy", fastmath=FASTMATH)
def _conflict_free_chunk(
    t, weight, state, rule, pairs, dropout_mask, factors, terms, ranks, num_threads, table
):
    """Step those of the thread's rows that do not conflict; write the gradients of others to `terms`."""
    n, dim = pairs.shape[0], table.dim
    gradients = np.empty((2, dim), weight.dtype)
    begin, end = n * t // num_threads, n * (t + 1) // num_threads
    rank = np.int64(2 * begin)
    for i in range(begin, end):
        follows = min(i + PREFETCH_FAR, end - 1)
        for side in range(2):
            _prefetch_row(weight, state, row_of(table, pairs, follows, side), dim)
            partner, gradient = row_of(table, pairs, i, 1 - side) * dim, gradients[side]
            if ranks[i, side, 0] >= 0:
                ranks[i, side, 0], gradient = rank, terms[rank * dim : (rank + 1) * dim]
                rank += 1
            bits = simd.bits_from(dropout_mask[i], 0) & first_lanes(dim)
            simd.append_scaled(gradient, 0, weight, partner, factors[i], bits, 0, first_lanes(dim))
            for column in range(LANES, dim, LANES):
                k = min(column, dim - LANES)
                bits = simd.bits_from(dropout_mask[i], k)
                simd.append_scaled(gradient, k, weight, partner + k, factors[i], bits, 0, ALL_LANES)
        for side in range(2):
            if ranks[i, side, 0] < 0:
                row = row_of(table, pairs, i, side)
                _update_row(weight, state, rule, row, gradients[side], 0, dim)


@njit(parallel=True, cache=True, nogil=True)
def _conflict_free(weight, state, rule, pairs, dropout_mask, factors, terms, ranks, num_threads, table):
    """`_conflict_free_chunk` on all threads."""
    for t in prange(num_threads):
        batch = pairs, dropout_mask, factors
        _conflict_free_chunk(np.int64(t), weight, state, rule, *batch, terms, ranks, num_threads, table)


@njit(nogil=True, error_model="numpy", fastmath=FASTMATH)
def _conflicting_chunk(t, weight, state, rule, terms, ranks, keys, cuts, counts, dim):
    """Sum the terms of the conflicting rows in the thread's slice, and step these."""
    gradient = np.zeros(dim, weight.dtype)
    for x in range(counts[t]):
        ahead = min(x + PREFETCH_FAR, counts[t] - 1)
        _prefetch_row(weight, state, cuts[t] + np.int64(keys[t, 0, ahead] >> S32), dim)
        i, side, _ = decode(keys[t, 0, ahead], 0)
        prefetch_segment(terms, dim * np.int64(ranks[i, side, 0]), dim)
        row = cuts[t] + np.int64(keys[t, 0, x] >> S32)
        i, side, _ = decode(keys[t, 0, x], 0)
        term = dim * np.int64(ranks[i, side, 0])
        for k in range(dim):
            gradient[k] += terms[term + k]
        if x + 1 == counts[t] or keys[t, 0, x + 1] >> S32 != keys[t, 0, x] >> S32:
            _update_row(weight, state, rule, row, gradient, 0, dim)
            gradient[:] = 0


@njit(parallel=True, cache=True, nogil=True)
def _conflicting(weight, state, rule, terms, ranks, keys, cuts, counts):
    """`_conflicting_chunk` on all threads."""
    dim = weight.shape[0] // state.shape[0]
    for t in prange(counts.shape[0]):
        _conflicting_chunk(np.int64(t), weight, state, rule, terms, ranks, keys, cuts, counts, dim)


@njit(parallel=True, cache=True, nogil=True, fastmath=FASTMATH)
def _dense(weight, state, rule, gradient):
    """`update_dense`, row by row."""
    dim = weight.shape[0] // state.shape[0]
    for row in prange(state.shape[0]):
        _update_row(weight, state, rule, np.int64(row), gradient, np.int64(row) * dim, dim)


@njit(cache=True, nogil=True)
def _pairs(weight, state, rule, pairs, dropout_mask, factors, workspace, table):
    """`update_pairs` in one launch."""
    terms, ranks, keys, entries, cuts, counts = workspace
    find_conflicts(pairs, False, ranks, keys, entries, cuts, counts, state.shape[0], table)
    _conflict_free(weight, state, rule, pairs, dropout_mask, factors, terms, ranks, counts.shape[0], table)
    _conflicting(weight, state, rule, terms, ranks, keys, cuts, counts)


def update_dense(
    weight: npt.NDArray[Any], state: npt.NDArray[Any], rule: rules.Rule, gradient: npt.NDArray[Any]
) -> None:
    """Step weights ``[rows * dim]`` and states ``[rows]`` by a dense gradient ``[rows * dim]``."""
    with launch():
        _dense(weight, state, rule, gradient)


def update_pairs(
    weight: npt.NDArray[Any],
    state: npt.NDArray[Any],
    rule: rules.Rule,
    pairs: npt.NDArray[np.int64],
    dropout_mask: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    workspace: Workspace,
    table: Geometry,
) -> None:
    """As `cemb.kernels.cpu.updates.update_pairs`, from which it is called, inside its launch."""
    if len(state) * table.dim != len(weight):
        raise ValueError(
            f"row-wise Adagrad needs a state for each of the table's {len(weight) // table.dim} rows, got "
            f"{len(state)}: the parameter must have the table's shape"
        )
    _pairs(weight, state, rule, pairs, dropout_mask, factors, workspace, table)
