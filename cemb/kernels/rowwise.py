"""Numba kernels of row-wise Adagrad on full tables: a row has one state, see `cemb.kernels.rules`.

A row's whole gradient must be there before any of its values moves, so it is laid out first.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb.kernels import cpu, lanes, runs

_AHEAD = 8  # rows on their way


@njit(inline="always")
def _prefetch_row(weight: Any, state: Any, row: Any, dim: Any) -> None:
    cpu._prefetch_run(weight, row * dim, dim)
    lanes.prefetch(state, row)


@njit(inline="always")
def _update_row(
    weight: Any, state: Any, constants: Any, row: Any, gradient: Any, first: Any, dim: Any
) -> None:
    """Step a row with ``gradient[first:first + dim]``."""
    squares = weight.dtype.type(0)
    for x in range(first, first + dim):
        squares += gradient[x] * gradient[x]
    state[row] += squares / weight.dtype.type(dim)
    rate = constants[0] / (np.sqrt(state[row]) + constants[1])
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
    constants: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    overlapping: Any,
    threads: Any,
    table: Any,
) -> None:
    n, dim = pairs.shape[0], table.dim
    gradients = np.empty((2, dim), weight.dtype)
    begin, end = n * t // threads, n * (t + 1) // threads
    for i in range(begin, end):
        for side in range(2):
            if i + cpu._AHEAD < end:
                _prefetch_row(weight, state, cpu._row(table, pairs, i + cpu._AHEAD, side), dim)
            partner = cpu._row(table, pairs, i, 1 - side) * dim
            bits = lanes.bits_from(kept[i], 0) & cpu._mask(dim)
            lanes.append_scaled(gradients[side], 0, weight, partner, factors[i], bits, 0, cpu._mask(dim))
            for follows in range(cpu._LANES, dim, cpu._LANES):
                k = min(follows, dim - cpu._LANES)
                bits = lanes.bits_from(kept[i], k)
                lanes.append_scaled(gradients[side], k, weight, partner + k, factors[i], bits, 0, cpu._ALL)
        for side in range(2):
            if not overlapping[i, side, 0]:
                row = cpu._row(table, pairs, i, side)
                _update_row(weight, state, constants, row, gradients[side], 0, dim)


@njit(parallel=True, cache=True, nogil=True)
def _alone(
    weight: Any,
    state: Any,
    constants: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    overlapping: Any,
    threads: Any,
    table: Any,
) -> None:
    for t in prange(threads):
        _alone_share(np.int64(t), weight, state, constants, pairs, kept, factors, overlapping, threads, table)


@njit(nogil=True, error_model="numpy", fastmath=cpu._FAST)
def _runs_share(
    weight: Any, state: Any, constants: Any, values: Any, starts: Any, offsets: Any, count: Any, dim: Any
) -> None:
    for run in range(count):
        if run + _AHEAD < count:
            _prefetch_row(weight, state, starts[run + _AHEAD] // dim, dim)
        row = starts[run] // dim  # runs are of whole rows
        for first in range(offsets[run], offsets[run + 1], dim):
            _update_row(weight, state, constants, row, values, first, dim)
            row += 1


@njit(parallel=True, cache=True, nogil=True)
def _runs(
    weight: Any,
    state: Any,
    constants: Any,
    values: Any,
    starts: Any,
    offsets: Any,
    counts: Any,
) -> None:
    dim = weight.shape[0] // state.shape[0]
    for t in prange(counts.shape[0]):
        _runs_share(weight, state, constants, values, starts[t], offsets[t], counts[t], dim)


@njit(parallel=True, cache=True, nogil=True, fastmath=cpu._FAST)
def _dense(weight: Any, state: Any, constants: Any, gradient: Any) -> None:
    dim = weight.shape[0] // state.shape[0]
    for row in prange(state.shape[0]):
        _update_row(weight, state, constants, np.int64(row), gradient, np.int64(row) * dim, dim)


@njit(cache=True, nogil=True)
def _pairs(
    weight: Any, state: Any, constants: Any, pairs: Any, kept: Any, factors: Any, room: Any, table: Any
) -> None:
    (values, starts, offsets, counts), keys, overlapping, listed = room
    gradient = values, starts, offsets, counts
    runs._sum_overlapping(weight, pairs, kept, factors, listed, False, overlapping, *gradient, keys, table)
    _alone(weight, state, constants, pairs, kept, factors, overlapping, counts.shape[0], table)
    _runs(weight, state, constants, *gradient)


def update_runs(
    weight: npt.NDArray[Any], state: npt.NDArray[Any], constants: tuple[Any, ...], gradient: runs.Runs
) -> None:
    """Update weights and states at the rows of a gradient."""
    with cpu._launch:
        cpu._set_threads()
        _runs(weight, state, constants, *gradient)


def update_dense(
    weight: npt.NDArray[Any],
    state: npt.NDArray[Any],
    constants: tuple[Any, ...],
    gradient: npt.NDArray[Any],
) -> None:
    """Update all weights and states with a dense gradient."""
    with cpu._launch:
        cpu._set_threads()
        _dense(weight, state, constants, gradient)


def update_pairs(
    weight: npt.NDArray[Any],
    state: npt.NDArray[Any],
    constants: tuple[Any, ...],
    pairs: npt.NDArray[np.int64],
    kept: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    room: runs.Room,
    table: cpu.Geometry,
) -> None:
    """As `cemb.kernels.updates.update_pairs`, which holds the lock."""
    if len(state) * table.dim != len(weight):
        raise ValueError(
            f"row-wise Adagrad needs a state for each of the table's {len(weight) // table.dim} rows, got "
            f"{len(state)}: the parameter must have the table's shape"
        )
    _pairs(weight, state, constants, pairs, kept, factors, room, table)
