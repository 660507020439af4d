"""Numba kernels of optimizers that visit only what a gradient touches, see `cemb.kernels.runs`, or all of a
pool in order, see `cemb.kernels.buckets`.

What is touched comes in pieces: the gradient of several is laid out in a row, so arithmetic is done on a
tile of them at once; only weights and state are gathered and scattered.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb import hashing
from cemb.kernels import buckets, cpu, lanes, runs

SGD, ADAGRAD, ADAM = range(3)

_LANES = lanes.LANES
_TILE = 1024  # values
_GROUP = 8  # pairs whose blocks are updated together


@njit(inline="always")
def _pieces(
    starts: Any, offsets: Any, run: Any, done: Any, end: Any, piece_starts: Any, piece_ends: Any
) -> tuple[Any, Any, Any, Any]:
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
def _prefetch(array: Any, piece_starts: Any, piece_ends: Any, pieces: Any) -> None:
    before = 0
    for p in range(pieces):
        cpu._prefetch_run(array, piece_starts[p], piece_ends[p] - before)
        before = piece_ends[p]


@njit(inline="always")
def _gather(array: Any, piece_starts: Any, piece_ends: Any, pieces: Any, scratch: Any, one: Any) -> None:
    before = 0
    for p in range(pieces):
        length = piece_ends[p] - before
        for k in range(0, length, _LANES):
            lanes.scale(scratch, before + k, array, piece_starts[p] + k, one, cpu._mask(length - k))
        before = piece_ends[p]


@njit(inline="always")
def _scatter(scratch: Any, piece_starts: Any, piece_ends: Any, pieces: Any, array: Any, one: Any) -> None:
    before = 0
    for p in range(pieces):
        length = piece_ends[p] - before
        for k in range(0, length, _LANES):
            lanes.scale(array, piece_starts[p] + k, scratch, before + k, one, cpu._mask(length - k))
        before = piece_ends[p]


@njit(inline="always")
def _add(
    scratch: Any, first: Any, piece_starts: Any, piece_ends: Any, pieces: Any, array: Any, factor: Any
) -> None:
    before = 0
    for p in range(pieces):
        length = piece_ends[p] - before
        for k in range(0, length, _LANES):
            mask = cpu._mask(length - k)
            lanes.add_scaled(array, piece_starts[p] + k, scratch, first + before + k, factor, mask, mask)
        before = piece_ends[p]


@njit(inline="always")
def _advance(
    rule: Any, constants: Any, values: Any, first: Any, moves: Any, means: Any, squares: Any, total: Any
) -> None:
    """Advance states by a gradient ``values[first:first + total]``; `moves` is what the rate multiplies."""
    one = values.dtype.type(1)
    _, eps, beta1, beta2 = constants
    if rule == ADAGRAD:
        for x in range(total):
            value = values[first + x]
            squares[x] += value * value
            moves[x] = value / (np.sqrt(squares[x]) + eps)
    else:
        for x in range(total):
            value = values[first + x]
            means[x] += (one - beta1) * (value - means[x])
            squares[x] += (one - beta2) * (value * value - squares[x])
            moves[x] = means[x] / (np.sqrt(squares[x]) + eps)


@njit(inline="always")
def _apply(
    rule: Any,
    constants: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    values: Any,
    first: Any,
    piece_starts: Any,
    piece_ends: Any,
    pieces: Any,
    total: Any,
    scratch: Any,
) -> None:
    """Update the pieces with their gradient ``values[first:first + total]``."""
    one, rate = weight.dtype.type(1), constants[0]
    if rule == SGD:
        _add(values, first, piece_starts, piece_ends, pieces, weight, -rate)
        return
    moves, means, squares = scratch[0], scratch[1], scratch[2]
    if rule == ADAGRAD:
        _gather(first_state, piece_starts, piece_ends, pieces, squares, one)
        _advance(rule, constants, values, first, moves, means, squares, total)
        _scatter(squares, piece_starts, piece_ends, pieces, first_state, one)
    else:
        _gather(first_state, piece_starts, piece_ends, pieces, means, one)
        _gather(second_state, piece_starts, piece_ends, pieces, squares, one)
        _advance(rule, constants, values, first, moves, means, squares, total)
        _scatter(means, piece_starts, piece_ends, pieces, first_state, one)
        _scatter(squares, piece_starts, piece_ends, pieces, second_state, one)
    _add(moves, 0, piece_starts, piece_ends, pieces, weight, -rate)


@njit(inline="always")
def _apply_slice(
    rule: Any, constants: Any, weight: Any, first_state: Any, second_state: Any, values: Any, moves: Any
) -> None:
    """Update consecutive weights with their gradient."""
    rate = constants[0]
    for low in range(0, values.shape[0], _TILE):
        high = min(low + _TILE, values.shape[0])
        # Hardware prefetches no further than a page, which is a tile of float32.
        cpu._prefetch_run(weight, high, _TILE)
        if rule != SGD:
            cpu._prefetch_run(first_state, high, _TILE)
        if rule == ADAM:
            cpu._prefetch_run(second_state, high, _TILE)
        weights, gradient = weight[low:high], values[low:high]
        if rule == SGD:
            for x in range(weights.shape[0]):
                weights[x] -= rate * gradient[x]
            continue
        # Adagrad has but squares.
        means = first_state[low:high]
        squares = means if rule == ADAGRAD else second_state[low:high]
        _advance(rule, constants, gradient, 0, moves, means, squares, weights.shape[0])
        for x in range(weights.shape[0]):
            weights[x] -= rate * moves[x]


@njit(nogil=True, error_model="numpy")
def _update_runs_share(
    t: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    constants: Any,
    values: Any,
    starts_of: Any,
    offsets_of: Any,
    counts: Any,
) -> None:
    piece_starts, piece_ends = np.empty(_TILE // 8, np.int64), np.empty(_TILE // 8, np.int64)
    scratch = np.empty((3, _TILE), weight.dtype)
    starts, offsets, end = starts_of[t], offsets_of[t], counts[t]
    run, done, first = 0, np.int64(0), offsets[0]
    while run < end:
        pieces, total, run, done = _pieces(starts, offsets, run, done, end, piece_starts, piece_ends)
        _prefetch(weight, piece_starts, piece_ends, pieces)
        if rule != SGD:
            _prefetch(first_state, piece_starts, piece_ends, pieces)
        if rule == ADAM:
            _prefetch(second_state, piece_starts, piece_ends, pieces)
        _apply(
            rule,
            constants,
            weight,
            first_state,
            second_state,
            values,
            first,
            piece_starts,
            piece_ends,
            pieces,
            total,
            scratch,
        )
        first += total


@njit(parallel=True, cache=True, nogil=True)
def _update_runs(
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    constants: Any,
    values: Any,
    starts_of: Any,
    offsets_of: Any,
    counts: Any,
) -> None:
    for t in prange(counts.shape[0]):
        _update_runs_share(
            np.int64(t),
            weight,
            first_state,
            second_state,
            rule,
            constants,
            values,
            starts_of,
            offsets_of,
            counts,
        )


@njit(parallel=True, cache=True, nogil=True)
def _update_dense(
    weight: Any, first_state: Any, second_state: Any, rule: Any, constants: Any, gradient: Any, threads: Any
) -> None:
    for t in prange(threads):
        low, high = weight.shape[0] * t // threads, weight.shape[0] * (t + 1) // threads
        moves = np.empty(_TILE, weight.dtype)
        first, second = first_state[low:high], second_state[low:high]
        _apply_slice(rule, constants, weight[low:high], first, second, gradient[low:high], moves)


@njit(parallel=True, cache=True, nogil=True)
def _update_buckets(
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    constants: Any,
    entries: Any,
    starts: Any,
    threads: Any,
) -> None:
    slices = starts.shape[0] - 1
    for t in prange(threads):
        sums, moves = np.zeros(1 << buckets.SLICE_BITS, weight.dtype), np.empty(_TILE, weight.dtype)
        for b in range(slices * t // threads, slices * (t + 1) // threads):
            for x in range(starts[b], starts[b + 1]):
                sums[np.int64(entries[x, 1])] += entries[x, 0]
            low = b << buckets.SLICE_BITS
            high = min(low + (1 << buckets.SLICE_BITS), weight.shape[0])
            first, second = first_state[low:high], second_state[low:high]
            _apply_slice(rule, constants, weight[low:high], first, second, sums[: high - low], moves)
            sums[:] = 0


# Not inlined: that doubled the time that `_update_alone` takes to compile.
@njit(nogil=True)
def _prefetch_states(
    rule: Any, weight: Any, first_state: Any, second_state: Any, places: Any, i: Any, table: Any
) -> None:
    cpu._prefetch_pair(weight, places, i, table)
    if rule != SGD:
        cpu._prefetch_pair(first_state, places, i, table)
    if rule == ADAM:
        cpu._prefetch_pair(second_state, places, i, table)


@njit(nogil=True, error_model="numpy")
def _update_alone_share(
    t: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    constants: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    alone: Any,
    threads: Any,
    table: Any,
) -> None:
    n, blocks = pairs.shape[0], table.num_blocks
    values, scratch = np.empty(_GROUP * 2 * table.dim, weight.dtype), np.empty((3, 1), weight.dtype)
    if rule != SGD:
        scratch = np.empty((3, _GROUP * 2 * table.dim), weight.dtype)
    piece_starts, piece_ends = (
        np.empty(_GROUP * 2 * blocks, np.int64),
        np.empty(_GROUP * 2 * blocks, np.int64),
    )
    # Of two tiles: while one is computed, the other's blocks are on their way.
    keys, places, signs = cpu._tile_memory(table)
    _, next_places, next_signs = cpu._tile_memory(table)
    begin, end = n * t // threads, n * (t + 1) // threads
    high = min(begin + cpu._TILE, end)
    cpu._find(table, pairs, begin, high, keys, next_places, next_signs)
    for i in range(high - begin):
        _prefetch_states(rule, weight, first_state, second_state, next_places, i, table)
    for low in range(begin, end, cpu._TILE):
        high = min(low + cpu._TILE, end)
        places, next_places, signs, next_signs = next_places, places, next_signs, signs
        following = min(high + cpu._TILE, end)
        cpu._find(table, pairs, high, following, keys, next_places, next_signs)
        for group in range(0, high - low, _GROUP):
            pieces = total = 0
            for i in range(group, min(group + _GROUP, high - low)):
                if high + i < following:
                    _prefetch_states(rule, weight, first_state, second_state, next_places, i, table)
                for b in range(blocks):
                    first, length = b * table.block_size, cpu._block_length(table, b)
                    factor = factors[low + i] * (signs[0, b, i] * signs[1, b, i])
                    for side in range(2):
                        place, partner = places[side, b, i], places[1 - side, b, i]
                        if not alone[low + i, side, b]:
                            continue
                        for k in range(0, length, _LANES):
                            mask = cpu._mask(length - k)
                            bits = lanes.bits_from(kept[low + i], first + k) & mask
                            lanes.append_scaled(values, total + k, weight, partner + k, factor, bits, 0, mask)
                        total += length
                        piece_starts[pieces], piece_ends[pieces] = place, total
                        pieces += 1
            _apply(
                rule,
                constants,
                weight,
                first_state,
                second_state,
                values,
                0,
                piece_starts,
                piece_ends,
                pieces,
                total,
                scratch,
            )


@njit(parallel=True, cache=True, nogil=True)
def _update_alone(
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    constants: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    alone: Any,
    threads: Any,
    table: Any,
) -> None:
    for t in prange(threads):
        _update_alone_share(
            np.int64(t),
            weight,
            first_state,
            second_state,
            rule,
            constants,
            pairs,
            kept,
            factors,
            alone,
            threads,
            table,
        )


class Rule(NamedTuple):
    """What an optimizer does with a gradient g.

    - ``SGD``: ``weight -= rate · g``
    - ``ADAGRAD``, one state: ``sum += g²; weight -= rate · g / (√sum + eps)``
    - ``ADAM``, two states: the moments ``mean`` and ``square`` move by ``1 − beta`` of the way to g and g²,
      and ``weight -= rate · mean / (√square + eps)``
    """

    kind: int
    rate: float
    eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0


def _arguments(weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: Rule) -> tuple[Any, ...]:
    constants = tuple(weight.dtype.type(constant) for constant in rule[1:])
    first, second = [*states, weight, weight][:2]  # what the rule does not use stands in for none
    return weight, first, second, rule.kind, constants


def update_runs(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: Rule, gradient: runs.Runs
) -> None:
    """Update weights and states at the runs of a gradient."""
    with cpu._launch:
        cpu._set_threads()
        _update_runs(*_arguments(weight, states, rule), *gradient)


def update_dense(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: Rule, gradient: npt.NDArray[Any]
) -> None:
    """Update all weights and states with a dense gradient."""
    with cpu._launch:
        threads = cpu._set_threads()
        _update_dense(*_arguments(weight, states, rule), gradient, threads)


def update_buckets(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: Rule, gradient: buckets.Buckets
) -> None:
    """Update all weights and states; where the buckets of a gradient have no entry, it is zero."""
    with cpu._launch:
        threads = cpu._set_threads()
        _update_buckets(*_arguments(weight, states, rule), gradient.entries, gradient.starts, threads)


def update_alone(
    weight: npt.NDArray[Any],
    states: Sequence[npt.NDArray[Any]],
    rule: Rule,
    pairs: npt.NDArray[np.int64],
    kept: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    alone: npt.NDArray[np.uint8],
    spec: hashing.HashSpec | hashing.FullSpec,
    context_offset: int,
) -> None:
    """Update weights and states at the blocks that stand alone, see `cemb.kernels.runs.Room`.

    Their gradients are those of ``Σ factors[i] · score[i]``, before dropout's scale. The weights of all other
    blocks must still be what they were in the forward pass.
    """
    with cpu._launch:
        threads = cpu._set_threads()
        batch = (pairs, kept, factors, alone, threads)
        _update_alone(*_arguments(weight, states, rule), *batch, cpu.Geometry.of(spec, context_offset))
