"""Numba kernels of optimizers that visit only what a gradient touches, see `cemb.kernels.runs`, or all of a
pool in order, see `cemb.kernels.buckets`. The arithmetic is that of `cemb.kernels.rules`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb import hashing
from cemb.kernels import buckets, cpu, lanes, rowwise, rules, runs

_LANES = lanes.LANES
_PAGE = 1024  # values of float32; hardware prefetches no further
_AHEAD = 16  # runs on their way


@njit(inline="always")
def _prefetch(rule: Any, weight: Any, first_state: Any, second_state: Any, start: Any, length: Any) -> None:
    """Ask for a run of weights and of the states that a rule has."""
    cpu._prefetch_run(weight, start, length)
    if rule != rules.SGD:
        cpu._prefetch_run(first_state, start, length)
    if rule == rules.ADAM:
        cpu._prefetch_run(second_state, start, length)


@njit(inline="always")
def _update_slice(
    rule: Any, constants: Any, weight: Any, first_state: Any, second_state: Any, values: Any
) -> None:
    """Update consecutive weights with their gradient."""
    n = values.shape[0]
    for low in range(0, n, _PAGE):
        high = min(low + _PAGE, n)
        _prefetch(rule, weight, first_state, second_state, high, _PAGE)
        for x in range(low, high, _LANES):
            mask = cpu._mask(high - x)
            rules.update(rule, constants, weight, first_state, second_state, x, values, x, mask)


@njit(nogil=True)
def _update_runs_share(
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    constants: Any,
    values: Any,
    starts: Any,
    offsets: Any,
    count: Any,
) -> None:
    for run in range(-_AHEAD, count):
        ahead = run + _AHEAD
        if ahead < count:
            length = min(offsets[ahead + 1] - offsets[ahead], _PAGE)
            _prefetch(rule, weight, first_state, second_state, starts[ahead], length)
        if run < 0:
            continue
        start, first, length = starts[run], offsets[run], offsets[run + 1] - offsets[run]
        for k in range(0, length, _LANES):
            mask = cpu._mask(length - k)
            rules.update(
                rule, constants, weight, first_state, second_state, start + k, values, first + k, mask
            )


@njit(parallel=True, cache=True, nogil=True)
def _update_runs(
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    constants: Any,
    values: Any,
    starts: Any,
    offsets: Any,
    counts: Any,
) -> None:
    for t in prange(counts.shape[0]):
        own = starts[t], offsets[t], counts[t]
        _update_runs_share(weight, first_state, second_state, rule, constants, values, *own)


@njit(parallel=True, cache=True, nogil=True)
def _update_dense(
    weight: Any, first_state: Any, second_state: Any, rule: Any, constants: Any, gradient: Any, threads: Any
) -> None:
    for t in prange(threads):
        low, high = weight.shape[0] * t // threads, weight.shape[0] * (t + 1) // threads
        first, second = first_state[low:high], second_state[low:high]
        _update_slice(rule, constants, weight[low:high], first, second, gradient[low:high])


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
        sums = np.zeros(1 << buckets.SLICE_BITS, weight.dtype)
        for b in range(slices * t // threads, slices * (t + 1) // threads):
            for x in range(starts[b], starts[b + 1]):
                sums[np.int64(entries[x, 1])] += entries[x, 0]
            low = b << buckets.SLICE_BITS
            high = min(low + (1 << buckets.SLICE_BITS), weight.shape[0])
            first, second = first_state[low:high], second_state[low:high]
            _update_slice(rule, constants, weight[low:high], first, second, sums[: high - low])
            sums[:] = 0


@njit(nogil=True)
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
    overlapping: Any,
    threads: Any,
    table: Any,
) -> None:
    n, blocks = pairs.shape[0], table.num_blocks
    keys, places, signs = cpu._tile_memory(table)
    begin, end = n * t // threads, n * (t + 1) // threads
    cpu._find(table, pairs, begin, min(begin + cpu._TILE, end), keys, places, signs, 0)
    for low in range(begin, end, cpu._TILE):
        high = min(low + cpu._TILE, end)
        slot = (low - begin) & cpu._RING
        cpu._find(table, pairs, high, min(high + cpu._TILE, end), keys, places, signs, cpu._TILE - slot)
        for i in range(low, high):
            here, ahead = slot + i - low, (slot + i - low + cpu._AHEAD) & cpu._RING
            for b in range(blocks):
                first, length = b * table.block_size, cpu._block_length(table, b)
                if i + cpu._AHEAD < end:
                    for side in range(2):
                        _prefetch(rule, weight, first_state, second_state, places[side, b, ahead], length)
                factor = factors[i] * (signs[0, b, here] * signs[1, b, here])
                word, context = places[0, b, here], places[1, b, here]
                word_alone, context_alone = overlapping[i, 0, b] == 0, overlapping[i, 1, b] == 0
                row, unpaired = kept[i], cpu._unpaired(length)
                if unpaired:
                    rules.exchange(
                        rule,
                        constants,
                        weight,
                        first_state,
                        second_state,
                        word,
                        context,
                        factor,
                        word_alone,
                        context_alone,
                        lanes.bits_from(row, first),
                        cpu._mask(length),
                    )
                for k in range(unpaired, length - _LANES, 2 * _LANES):
                    step = min(_LANES, length - _LANES - k)
                    rules.exchange_two(
                        rule,
                        constants,
                        weight,
                        first_state,
                        second_state,
                        word + k,
                        context + k,
                        factor,
                        word_alone,
                        context_alone,
                        lanes.bits_from(row, first + k),
                        step,
                        lanes.bits_from(row, first + k + step),
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
    overlapping: Any,
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
            overlapping,
            threads,
            table,
        )


# All of a step in one launch: what Python does between launches, it does with cold caches.
@njit(cache=True, nogil=True)
def _update_pairs(
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    constants: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    room: Any,
    table: Any,
) -> None:
    moved = weight, first_state, second_state, rule, constants
    (values, starts, offsets, counts), keys, overlapping, listed = room
    # Sums first, then what stands alone, then the sums' steps: each needs weights the next one moves.
    gradient = values, starts, offsets, counts
    runs._sum_overlapping(weight, pairs, kept, factors, listed, False, overlapping, *gradient, keys, table)
    _update_alone(*moved, pairs, kept, factors, overlapping, counts.shape[0], table)
    _update_runs(*moved, *gradient)


def _constants(weight: npt.NDArray[Any], rule: rules.Rule) -> tuple[Any, ...]:
    return tuple(weight.dtype.type(constant) for constant in rule[1:])


def _arguments(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: rules.Rule
) -> tuple[Any, ...]:
    first, second = [*states, weight, weight][:2]  # what the rule does not use stands in for none
    return weight, first, second, rule.kind, _constants(weight, rule)


def update_runs(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: rules.Rule, gradient: runs.Runs
) -> None:
    """Update weights and states at the runs of a gradient."""
    if rule.kind == rules.ROWWISE_ADAGRAD:
        rowwise.update_runs(weight, states[0], _constants(weight, rule), gradient)
        return
    with cpu._launch:
        cpu._set_threads()
        _update_runs(*_arguments(weight, states, rule), *gradient)


def update_dense(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: rules.Rule, gradient: npt.NDArray[Any]
) -> None:
    """Update all weights and states with a dense gradient."""
    if rule.kind == rules.ROWWISE_ADAGRAD:
        rowwise.update_dense(weight, states[0], _constants(weight, rule), gradient)
        return
    with cpu._launch:
        threads = cpu._set_threads()
        _update_dense(*_arguments(weight, states, rule), gradient, threads)


def update_buckets(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: rules.Rule, gradient: buckets.Buckets
) -> None:
    """Update all weights and states; where the buckets of a gradient have no entry, it is zero."""
    with cpu._launch:
        threads = cpu._set_threads()
        _update_buckets(*_arguments(weight, states, rule), gradient.entries, gradient.starts, threads)


def update_pairs(
    weight: npt.NDArray[Any],
    states: Sequence[npt.NDArray[Any]],
    rule: rules.Rule,
    pairs: npt.NDArray[np.int64],
    kept: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    spec: hashing.HashSpec | hashing.FullSpec,
    context_offset: int,
    room: runs.Room | None,
) -> runs.Room:
    """Update weights and states with the gradient of ``Σ factors[i] · score[i]``, before dropout's scale.

    Blocks that overlap no other are updated in passing, the others by their sums, see `cemb.kernels.runs`.
    The weights must still be what they were in the forward pass. Returns `room`, or a larger one for the
    same table. Raises ValueError as `runs.pair_runs`, and for row-wise Adagrad if not every row has a state.
    """
    with cpu._launch:
        room = runs.Room.fitting(room, len(pairs), spec, weight.dtype, cpu._set_threads())
        batch = (pairs, kept, factors, room, cpu.Geometry.of(spec, context_offset))
        if rule.kind == rules.ROWWISE_ADAGRAD:
            rowwise.update_pairs(weight, states[0], _constants(weight, rule), *batch)
        else:
            _update_pairs(*_arguments(weight, states, rule), *batch)
        return room
