"""Numba kernels of optimizers that visit only the runs of a gradient, see `cemb.kernels.cpu.Runs`.

The values of consecutive runs are consecutive, so arithmetic is done on a tile of them at once; only
weights and state are gathered and scattered.
"""

import numpy as np
from numba import njit, prange

from cemb.kernels import cpu, lanes

_LANES = lanes.LANES
_TILE = 1024  # values


@njit(inline="always")
def _pieces(starts, offsets, run, done, end, piece_starts, piece_ends):
    """Cut a tile from the runs: pieces with their starts, and their ends within the tile.

    `done` is how many values of `run` earlier tiles had. Returns the number of pieces, the number of
    values, and the next run and done.
    """
    pieces = total = 0
    while run < end and total < _TILE and pieces < piece_starts.shape[0]:
        left = offsets[run + 1] - offsets[run] - done
        length = min(left, _TILE - total)
        piece_starts[pieces] = starts[run] + done
        total += length
        piece_ends[pieces] = total
        pieces += 1
        if length == left:
            run, done = run + 1, 0
        else:
            done += length
    return pieces, total, run, done


@njit(inline="always")
def _prefetch(array, piece_starts, piece_ends, pieces):
    before = 0
    for p in range(pieces):
        cpu._prefetch_run(array, piece_starts[p], piece_ends[p] - before)
        before = piece_ends[p]


@njit(inline="always")
def _gather(array, piece_starts, piece_ends, pieces, scratch, one):
    before = 0
    for p in range(pieces):
        length = piece_ends[p] - before
        for k in range(0, length, _LANES):
            lanes.scale(scratch, before + k, array, piece_starts[p] + k, one, cpu._mask(length - k))
        before = piece_ends[p]


@njit(inline="always")
def _scatter(scratch, piece_starts, piece_ends, pieces, array, one):
    before = 0
    for p in range(pieces):
        length = piece_ends[p] - before
        for k in range(0, length, _LANES):
            lanes.scale(array, piece_starts[p] + k, scratch, before + k, one, cpu._mask(length - k))
        before = piece_ends[p]


@njit(inline="always")
def _add(scratch, first, piece_starts, piece_ends, pieces, array, factor):
    before = 0
    for p in range(pieces):
        length = piece_ends[p] - before
        for k in range(0, length, _LANES):
            mask = cpu._mask(length - k)
            lanes.add_scaled(array, piece_starts[p] + k, scratch, first + before + k, factor, mask)
        before = piece_ends[p]


@njit(parallel=True, cache=True, nogil=True)
def _sgd(weight, values, starts_of, offsets_of, counts, learning_rate, clear):
    for t in prange(counts.shape[0]):
        piece_starts, piece_ends = np.empty(_TILE // 8, np.int64), np.empty(_TILE // 8, np.int64)
        starts, offsets, end = starts_of[t], offsets_of[t], counts[t]
        run, done, first = 0, np.int64(0), offsets[0]
        while run < end:
            pieces, total, run, done = _pieces(starts, offsets, run, done, end, piece_starts, piece_ends)
            _prefetch(weight, piece_starts, piece_ends, pieces)
            _add(values, first, piece_starts, piece_ends, pieces, weight, -learning_rate)
            if clear:
                values[first : first + total] = 0
            first += total


@njit(parallel=True, cache=True, nogil=True)
def _adagrad(weight, state, values, starts_of, offsets_of, counts, learning_rate, eps, clear):
    one = learning_rate / learning_rate
    for t in prange(counts.shape[0]):
        piece_starts, piece_ends = np.empty(_TILE // 8, np.int64), np.empty(_TILE // 8, np.int64)
        sums, moves = np.empty(_TILE, weight.dtype), np.empty(_TILE, weight.dtype)
        starts, offsets, end = starts_of[t], offsets_of[t], counts[t]
        run, done, first = 0, np.int64(0), offsets[0]
        while run < end:
            pieces, total, run, done = _pieces(starts, offsets, run, done, end, piece_starts, piece_ends)
            _prefetch(weight, piece_starts, piece_ends, pieces)
            _prefetch(state, piece_starts, piece_ends, pieces)
            _gather(state, piece_starts, piece_ends, pieces, sums, one)
            for x in range(total):
                value = values[first + x]
                sums[x] += value * value
                moves[x] = value / (np.sqrt(sums[x]) + eps)
            _scatter(sums, piece_starts, piece_ends, pieces, state, one)
            _add(moves, 0, piece_starts, piece_ends, pieces, weight, -learning_rate)
            if clear:
                values[first : first + total] = 0
            first += total


@njit(parallel=True, cache=True, nogil=True)
def _adam(weight, mean, square, values, starts_of, offsets_of, counts, step_size, beta1, beta2, eps, clear):
    one = step_size / step_size
    for t in prange(counts.shape[0]):
        piece_starts, piece_ends = np.empty(_TILE // 8, np.int64), np.empty(_TILE // 8, np.int64)
        means, squares = np.empty(_TILE, weight.dtype), np.empty(_TILE, weight.dtype)
        moves = np.empty(_TILE, weight.dtype)
        starts, offsets, end = starts_of[t], offsets_of[t], counts[t]
        run, done, first = 0, np.int64(0), offsets[0]
        while run < end:
            pieces, total, run, done = _pieces(starts, offsets, run, done, end, piece_starts, piece_ends)
            _prefetch(weight, piece_starts, piece_ends, pieces)
            _prefetch(mean, piece_starts, piece_ends, pieces)
            _prefetch(square, piece_starts, piece_ends, pieces)
            _gather(mean, piece_starts, piece_ends, pieces, means, one)
            _gather(square, piece_starts, piece_ends, pieces, squares, one)
            for x in range(total):
                value = values[first + x]
                means[x] += (one - beta1) * (value - means[x])
                squares[x] += (one - beta2) * (value * value - squares[x])
                moves[x] = means[x] / (np.sqrt(squares[x]) + eps)
            _scatter(means, piece_starts, piece_ends, pieces, mean, one)
            _scatter(squares, piece_starts, piece_ends, pieces, square, one)
            _add(moves, 0, piece_starts, piece_ends, pieces, weight, -step_size)
            if clear:
                values[first : first + total] = 0
            first += total


def sgd(weight: np.ndarray, runs: cpu.Runs, learning_rate: float, *, clear: bool) -> None:
    """``weight -= learning_rate · g`` at the runs of g; `clear` then zeroes the values of the runs."""
    with cpu._launch:
        cpu._set_threads()
        _sgd(weight, *runs, weight.dtype.type(learning_rate), clear)


def adagrad(
    weight: np.ndarray, state: np.ndarray, runs: cpu.Runs, learning_rate: float, eps: float, *, clear: bool
) -> None:
    """``state += g²; weight -= learning_rate · g / (√state + eps)`` at the runs of g."""
    with cpu._launch:
        cpu._set_threads()
        number = weight.dtype.type
        _adagrad(weight, state, *runs, number(learning_rate), number(eps), clear)


def adam(
    weight: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    runs: cpu.Runs,
    step_size: float,
    betas: tuple[float, float],
    eps: float,
    *,
    clear: bool,
) -> None:
    """Adam's moments and ``weight -= step_size · mean / (√square + eps)`` at the runs of g."""
    with cpu._launch:
        cpu._set_threads()
        number = weight.dtype.type
        beta1, beta2 = (number(beta) for beta in betas)
        _adam(weight, mean, square, *runs, number(step_size), beta1, beta2, number(eps), clear)
