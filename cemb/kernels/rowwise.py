"""Numba kernels of row-wise Adagrad on full tables: a row has one state, see `cemb.kernels.rules`.

A row's whole gradient must be there before any of its values moves, so it is laid out first.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb.kernels import cpu, lanes, overlaps, rules


@njit(inline="always")
def _prefetch_row(weight: Any, state: Any, row: Any, dim: Any) -> None:
    cpu._prefetch_run(weight, row * dim, dim)
    lanes.prefetch(state, row)


@njit(inline="always")
def _update_row(weight: Any, state: Any, rule: Any, row: Any, gradient: Any, first: Any, dim: Any) -> None:
    """Step a row with ``gradient[first:first + dim]``."""
    squares = weight.dtype.type(0)
    for x in range(first, first + dim):
        squares += gradient[x] * gradient[x]
    state[row] += squares / weight.dtype.type(dim)
    rate = rule.rate / (np.sqrt(state[row]) + rule.eps)
    place, unpaired = row * dim, cpu._unpaired(dim)
    if unpaired:
        mask = cpu._mask(dim)
        lanes.add_scaled(weight, place, gradient, first, -rate, mask, mask)
    for k in range(unpaired, dim - cpu._LANES, 2 * cpu._LANES):
        step = min(cpu._LANES, dim - cpu._LANES - k)
        lanes.add_scaled_two(weight, place + k, gradient, first + k, -rate, cpu._ALL, step, cpu._ALL)


@njit(nogil=True, error_model="numpy", fastmath=cpu._FAST)
def _alone_share(
    t: Any,
    weight: Any,
    state: Any,
    rule: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    terms: Any,
    ranks: Any,
    threads: Any,
    table: Any,
) -> None:
    n, dim = pairs.shape[0], table.dim
    gradients = np.empty((2, dim), weight.dtype)
    begin, end = n * t // threads, n * (t + 1) // threads
    rank = np.int64(2 * begin)
    for i in range(begin, end):
        follows = min(i + cpu._AHEAD, end - 1)
        for side in range(2):
            _prefetch_row(weight, state, cpu._row(table, pairs, follows, side), dim)
            partner, gradient = cpu._row(table, pairs, i, 1 - side) * dim, gradients[side]
            if ranks[i, side, 0] >= 0:
                ranks[i, side, 0], gradient = rank, terms[rank * dim : (rank + 1) * dim]
                rank += 1
            bits = lanes.bits_from(kept[i], 0) & cpu._mask(dim)
            lanes.append_scaled(gradient, 0, weight, partner, factors[i], bits, 0, cpu._mask(dim))
            for column in range(cpu._LANES, dim, cpu._LANES):
                k = min(column, dim - cpu._LANES)
                bits = lanes.bits_from(kept[i], k)
                lanes.append_scaled(gradient, k, weight, partner + k, factors[i], bits, 0, cpu._ALL)
        for side in range(2):
            if ranks[i, side, 0] < 0:
                row = cpu._row(table, pairs, i, side)
                _update_row(weight, state, rule, row, gradients[side], 0, dim)


@njit(parallel=True, cache=True, nogil=True)
def _alone(
    weight: Any,
    state: Any,
    rule: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    terms: Any,
    ranks: Any,
    threads: Any,
    table: Any,
) -> None:
    for t in prange(threads):
        batch = pairs, kept, factors
        _alone_share(np.int64(t), weight, state, rule, *batch, terms, ranks, threads, table)


@njit(nogil=True, error_model="numpy", fastmath=cpu._FAST)
def _summed_share(
    t: Any,
    weight: Any,
    state: Any,
    rule: Any,
    terms: Any,
    ranks: Any,
    keys: Any,
    cuts: Any,
    counts: Any,
    dim: Any,
) -> None:
    gradient = np.zeros(dim, weight.dtype)
    for x in range(counts[t]):
        ahead = min(x + cpu._AHEAD, counts[t] - 1)
        _prefetch_row(weight, state, cuts[t] + np.int64(keys[t, 0, ahead] >> cpu._S32), dim)
        i, side, _ = overlaps._decode(keys[t, 0, ahead], 0)
        cpu._prefetch_run(terms, dim * np.int64(ranks[i, side, 0]), dim)
        row = cuts[t] + np.int64(keys[t, 0, x] >> cpu._S32)
        i, side, _ = overlaps._decode(keys[t, 0, x], 0)
        term = dim * np.int64(ranks[i, side, 0])
        for k in range(dim):
            gradient[k] += terms[term + k]
        if x + 1 == counts[t] or keys[t, 0, x + 1] >> cpu._S32 != keys[t, 0, x] >> cpu._S32:
            _update_row(weight, state, rule, row, gradient, 0, dim)
            gradient[:] = 0


@njit(parallel=True, cache=True, nogil=True)
def _summed(
    weight: Any,
    state: Any,
    rule: Any,
    terms: Any,
    ranks: Any,
    keys: Any,
    cuts: Any,
    counts: Any,
) -> None:
    dim = weight.shape[0] // state.shape[0]
    for t in prange(counts.shape[0]):
        _summed_share(np.int64(t), weight, state, rule, terms, ranks, keys, cuts, counts, dim)


@njit(parallel=True, cache=True, nogil=True, fastmath=cpu._FAST)
def _dense(weight: Any, state: Any, rule: Any, gradient: Any) -> None:
    dim = weight.shape[0] // state.shape[0]
    for row in prange(state.shape[0]):
        _update_row(weight, state, rule, np.int64(row), gradient, np.int64(row) * dim, dim)


@njit(cache=True, nogil=True)
def _pairs(
    weight: Any, state: Any, rule: Any, pairs: Any, kept: Any, factors: Any, room: Any, table: Any
) -> None:
    terms, ranks, keys, listed, cuts, counts = room
    overlaps._find_overlapping(pairs, False, ranks, keys, listed, cuts, counts, state.shape[0], table)
    _alone(weight, state, rule, pairs, kept, factors, terms, ranks, counts.shape[0], table)
    _summed(weight, state, rule, terms, ranks, keys, cuts, counts)


def update_dense(
    weight: npt.NDArray[Any],
    state: npt.NDArray[Any],
    rule: rules.Rule,
    gradient: npt.NDArray[Any],
) -> None:
    """Update all weights and states with a dense gradient."""
    with cpu._launch:
        cpu._set_threads()
        _dense(weight, state, rule, gradient)


def update_pairs(
    weight: npt.NDArray[Any],
    state: npt.NDArray[Any],
    rule: rules.Rule,
    pairs: npt.NDArray[np.int64],
    kept: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    room: overlaps.Room,
    table: cpu.Geometry,
) -> None:
    """As `cemb.kernels.updates.update_pairs`, which holds the lock."""
    if len(state) * table.dim != len(weight):
        raise ValueError(
            f"row-wise Adagrad needs a state for each of the table's {len(weight) // table.dim} rows, got "
            f"{len(state)}: the parameter must have the table's shape"
        )
    _pairs(weight, state, rule, pairs, kept, factors, room, table)
