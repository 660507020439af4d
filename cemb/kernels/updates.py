"""Numba kernels of optimizers that visit only what a gradient touches, see `cemb.kernels.overlaps`, or all of
a pool in order, see `cemb.kernels.buckets`. The arithmetic is that of `cemb.kernels.rules`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb import hashing
from cemb.kernels import buckets, cpu, lanes, overlaps, rowwise, rules

_LANES = lanes.LANES
_PAGE = 1024  # values of float32; hardware prefetches no further
_AHEAD = 16  # blocks to be summed that are on their way


@njit(inline="always")
def _prefetch(rule: Any, weight: Any, first_state: Any, second_state: Any, start: Any, length: Any) -> None:
    """Ask for a run of weights and of the states that a rule has."""
    cpu._prefetch_run(weight, start, length)
    if rules.num_states(rule) > 0:
        cpu._prefetch_run(first_state, start, length)
    if rules.num_states(rule) > 1:
        cpu._prefetch_run(second_state, start, length)


@njit(inline="always")
def _update_slice(rule: Any, weight: Any, first_state: Any, second_state: Any, values: Any) -> None:
    """Update consecutive weights with their gradient."""
    n = values.shape[0]
    for low in range(0, n, _PAGE):
        high = min(low + _PAGE, n)
        _prefetch(rule, weight, first_state, second_state, high, _PAGE)
        for x in range(low, high, _LANES):
            mask = cpu._mask(high - x)
            rules.update(rule, weight, first_state, second_state, x, values, x, mask)


@njit(parallel=True, cache=True, nogil=True)
def _update_dense(
    weight: Any, first_state: Any, second_state: Any, rule: Any, gradient: Any, threads: Any
) -> None:
    for t in prange(threads):
        low, high = weight.shape[0] * t // threads, weight.shape[0] * (t + 1) // threads
        first, second = first_state[low:high], second_state[low:high]
        _update_slice(rule, weight[low:high], first, second, gradient[low:high])


@njit(parallel=True, cache=True, nogil=True)
def _fit_privately(
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    private: Any,
    pairs: Any,
    scale: Any,
    table: Any,
    cells: Any,
    dropping: Any,
) -> Any:
    threads = private.shape[0]
    errors = np.empty(pairs.shape[0], weight.dtype)
    for t in prange(threads):
        share = np.int64(t)
        if cpu._is_single(table):
            cpu._pair_private_single_share(
                share, threads, private[t], weight, pairs, None, None, scale, table, cells, errors, dropping
            )
        else:
            private[t] = 0
            cpu._pair_private_share(
                share, threads, private[t], weight, pairs, None, None, scale, table, cells, errors, dropping
            )
    for t in prange(threads):
        low, high = weight.shape[0] * t // threads, weight.shape[0] * (t + 1) // threads
        for page in range(low, high, _PAGE):
            after = min(page + _PAGE, high)
            first, second = first_state[page:after], second_state[page:after]
            _update_slice(rule, weight[page:after], first, second, _sums(private, page, after, table))
    return cpu._loss(errors, cells[1])


@njit(nogil=True)
def _sums(private: Any, low: Any, high: Any, table: Any) -> Any:
    """Sums of all threads' gradients of the weights from `low` to `high`."""
    sums = np.zeros(high - low, private.dtype)
    for t in range(private.shape[0]):
        if cpu._is_single(table):
            for p in range(low, high):
                sums[p - low] += private[t, 2 * p + 1]
        else:
            for p in range(low, high):
                sums[p - low] += private[t, p]
    return sums


@njit(parallel=True, cache=True, nogil=True)
def _update_buckets(
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
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
            _update_slice(rule, weight[low:high], first, second, sums[: high - low])
            sums[:] = 0


@njit(inline="always")
def _prefetch_two(
    rule: Any, is_near: Any, weight: Any, first_state: Any, second_state: Any, i: Any, j: Any
) -> None:
    """Ask for the cache lines of two weights, unless they are near, and of the states that a rule has."""
    if not is_near:
        cpu._prefetch_two(weight, i, j)
    if rules.num_states(rule) > 0:
        cpu._prefetch_two(first_state, i, j)
    if rules.num_states(rule) > 1:
        cpu._prefetch_two(second_state, i, j)


@njit(nogil=True, error_model="numpy")
def _update_alone_share(
    t: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    scale: Any,
    cells: Any,
    errors: Any,
    dropping: Any,
    terms: Any,
    ranks: Any,
    threads: Any,
    table: Any,
) -> None:
    n, blocks, size = pairs.shape[0], table.num_blocks, table.block_size
    keys, places, signs = cpu._tile_memory(table)
    begin, end = n * t // threads, n * (t + 1) // threads
    is_near = cells is not None  # what was just scored
    products = np.zeros((cpu._TILE, table.dim), weight.dtype)
    hashes = cpu._room_for_hashes(table.dim)
    drawn = np.empty((cpu._TILE, cpu._kept_width(table.dim)), np.uint16)
    slopes = np.empty(cpu._TILE, weight.dtype)
    cpu._find(table, pairs, begin, min(begin + cpu._TILE, end), keys, places, signs, 0)
    rank = np.int64(2 * blocks * begin)
    for low in range(begin, end, cpu._TILE):
        high = min(low + cpu._TILE, end)
        slot = (low - begin) & cpu._RING
        cpu._find(table, pairs, high, min(high + cpu._TILE, end), keys, places, signs, cpu._TILE - slot)
        if kept is not None:
            tile_kept, tile_factors = kept[low:high], factors[low:high]
        if cells is not None:
            # Of these pairs nothing was updated yet: blocks that overlap others' are left for later.
            tile_kept, tile_factors, tile_errors = drawn[: high - low], slopes[: high - low], errors[low:high]
            cpu._draw_rows(tile_kept, hashes, low, table.dim, dropping[0], dropping[1])
            cpu._score_tile(
                weight, tile_kept, tile_errors, products, scale, places, signs, slot, cpu._AHEAD, table
            )
            cpu._differentiate(tile_errors, tile_factors, cells, low)
        for i in range(low, high):
            here, ahead = slot + i - low, (slot + i - low + cpu._AHEAD) & cpu._RING
            for b in range(blocks):
                first, length = b * size, cpu._block_length(table, b)
                factor = tile_factors[i - low] * scale * (signs[0, b, here] * signs[1, b, here])
                word, context = places[0, b, here], places[1, b, here]
                word_term, context_term = np.int64(-size), np.int64(-size)
                if ranks[i, 0, b] >= 0:
                    ranks[i, 0, b], word_term = rank, size * rank
                    rank += 1
                if ranks[i, 1, b] >= 0:
                    ranks[i, 1, b], context_term = rank, size * rank
                    rank += 1
                row, unpaired = tile_kept[i - low], cpu._unpaired(length)
                next_word, next_context = places[0, b, ahead], places[1, b, ahead]
                last = lanes.num_read(length) - 1
                _prefetch_two(rule, is_near, weight, first_state, second_state, next_word, next_context)
                _prefetch_two(
                    rule, is_near, weight, first_state, second_state, next_word + last, next_context + last
                )
                if unpaired:
                    rules.exchange(
                        rule,
                        weight,
                        first_state,
                        second_state,
                        word,
                        context,
                        factor,
                        terms,
                        word_term,
                        context_term,
                        lanes.bits_from(row, first),
                        cpu._mask(length),
                    )
                for k in range(unpaired, length - _LANES, 2 * _LANES):
                    step = min(_LANES, length - _LANES - k)
                    _prefetch_two(
                        rule, is_near, weight, first_state, second_state, next_word + k, next_context + k
                    )
                    m = k + step
                    _prefetch_two(
                        rule, is_near, weight, first_state, second_state, next_word + m, next_context + m
                    )
                    rules.exchange_two(
                        rule,
                        weight,
                        first_state,
                        second_state,
                        word + k,
                        context + k,
                        factor,
                        terms,
                        word_term + k,
                        context_term + k,
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
    pairs: Any,
    kept: Any,
    factors: Any,
    scale: Any,
    cells: Any,
    errors: Any,
    dropping: Any,
    terms: Any,
    ranks: Any,
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
            pairs,
            kept,
            factors,
            scale,
            cells,
            errors,
            dropping,
            terms,
            ranks,
            threads,
            table,
        )


@njit(nogil=True)
def _step_runs(
    rule: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    sums: Any,
    starts: Any,
    offsets: Any,
    count: Any,
) -> None:
    """Step weights by their sums: those from ``starts[r]`` on by ``sums[offsets[r]:offsets[r + 1]]``."""
    for r in range(count):
        first, after = offsets[r], offsets[r + 1]
        for k in range(first, after, _LANES):
            start, mask = starts[r] + k - first, cpu._mask(after - k)
            rules.update(rule, weight, first_state, second_state, start, sums, k, mask)


# Not fast math: sums that are rounded once in whole vectors, and twice at ends, would make what comes out
# depend on where slices end, and with it on the number of threads.
@njit(nogil=True, error_model="numpy")
def _update_summed_share(
    t: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    terms: Any,
    ranks: Any,
    keys: Any,
    cuts: Any,
    counts: Any,
    table: Any,
) -> None:
    blocks, size = table.num_blocks, table.block_size
    block_bits = overlaps._num_bits(blocks)
    last_length = cpu._block_length(table, blocks - 1)
    unit = np.int64(table.dim if table.num_starts == 0 else 1)
    low_end, high_end = cuts[t] * unit, cuts[t + 1] * unit
    lowest = overlaps._lowest(cuts[t], table)
    # Sums of some runs of blocks that overlap: where these start in the pool, and where among the sums.
    sums = np.empty(_PAGE + 2 * size, weight.dtype)
    starts, offsets = np.empty(_PAGE, np.int64), np.empty(_PAGE + 1, np.int64)
    run, used, end, base = 0, np.int64(0), np.int64(-1), np.int64(0)
    for x in range(counts[t]):
        i, side, b = overlaps._decode(keys[t, 0, min(x + 2 * _AHEAD, counts[t] - 1)], block_bits)
        lanes.prefetch(ranks[i, side], b)
        ahead = min(x + _AHEAD, counts[t] - 1)
        i, side, b = overlaps._decode(keys[t, 0, ahead], block_bits)
        cpu._prefetch_run(terms, size * np.int64(ranks[i, side, b]), size)
        place = (np.int64(keys[t, 0, ahead] >> cpu._S32) + lowest) * unit
        _prefetch(rule, weight, first_state, second_state, place, size)
        i, side, b = overlaps._decode(keys[t, 0, x], block_bits)
        place = (np.int64(keys[t, 0, x] >> cpu._S32) + lowest) * unit
        length = last_length if b == blocks - 1 else size
        begin = max(0, low_end - place)
        length = min(length, high_end - place) - begin
        place, term = place + begin, size * np.int64(ranks[i, side, b]) + begin
        if length <= 0:
            continue
        is_new = place > end
        if used >= _PAGE:
            # Nothing is added any more to what is before `place`.
            final = used if is_new else base + place
            offsets[run] = final
            _step_runs(rule, weight, first_state, second_state, sums, starts, offsets, run)
            for k in range(final, used):
                sums[k - final] = sums[k]
            run, used, base = 0, used - final, -place
            if not is_new:
                run, starts[0], offsets[0] = 1, place, 0
        if is_new:
            base = used - place
            starts[run], offsets[run] = place, used
            run += 1
        overlap = 0 if is_new else end - place
        into, unpaired = base + place, cpu._unpaired(length)
        one, every = weight.dtype.type(1), cpu._ALL
        if unpaired:
            mask = cpu._mask(length)
            old = cpu._mask(overlap) & mask
            lanes.append_scaled(sums, into, terms, term, one, mask, old, mask)
        for k in range(unpaired, length - _LANES, 2 * _LANES):
            step = min(_LANES, length - _LANES - k)
            old, old_after = cpu._mask(overlap - k), cpu._mask(overlap - k - step)
            lanes.append_scaled_two(sums, into + k, terms, term + k, one, every, old, step, every, old_after)
        end = max(end, place + length)
        used = base + end
    offsets[run] = used
    _step_runs(rule, weight, first_state, second_state, sums, starts, offsets, run)


@njit(parallel=True, cache=True, nogil=True)
def _update_summed(
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    terms: Any,
    ranks: Any,
    keys: Any,
    cuts: Any,
    counts: Any,
    table: Any,
) -> None:
    for t in prange(counts.shape[0]):
        _update_summed_share(
            np.int64(t),
            weight,
            first_state,
            second_state,
            rule,
            terms,
            ranks,
            keys,
            cuts,
            counts,
            table,
        )


# All of a step in one launch: what Python does between launches, it does with cold caches.
@njit(cache=True, nogil=True)
def _update_pairs(
    weight: Any,
    first_state: Any,
    second_state: Any,
    rule: Any,
    target: Any,
    is_whole: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    scale: Any,
    cells: Any,
    dropping: Any,
    room: Any,
    table: Any,
) -> Any:
    """Step the weights with what overlaps nothing, and with the sums of all else, or of all, the target.

    With `cells`, see `cemb.kernels.cpu._differentiate`, returns the loss; `kept` and `factors` are None.
    """
    terms, ranks, keys, listed, cuts, counts = room
    unit = table.dim if table.num_starts == 0 else 1
    slices = keys, listed, cuts, counts
    overlaps._find_overlapping(pairs, is_whole, ranks, *slices, weight.shape[0] // unit, table)
    states = first_state, second_state, rule
    errors = np.empty(0 if cells is None else pairs.shape[0], weight.dtype)
    batch = pairs, kept, factors, scale, cells, errors, dropping
    _update_alone(weight, *states, *batch, terms, ranks, counts.shape[0], table)
    _update_summed(target, *states, terms, ranks, keys, cuts, counts, table)
    loss = 0.0
    if cells is not None:
        loss += cpu._loss(errors, cells[1])
    return loss


def _typed(rule: rules.Rule, weight: npt.NDArray[Any]) -> rules.Rule:
    """The rule with constants of the weights' type."""
    return type(rule)(*map(weight.dtype.type, rule))


def _arguments(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: rules.Rule
) -> tuple[Any, ...]:
    first, second = [*states, weight, weight][:2]  # what the rule does not use stands in for none
    return weight, first, second, _typed(rule, weight)


def update_dense(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: rules.Rule, gradient: npt.NDArray[Any]
) -> None:
    """Update all weights and states with a dense gradient."""
    if isinstance(rule, rules.RowwiseAdagrad):
        rowwise.update_dense(weight, states[0], _typed(rule, weight), gradient)
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
    room: overlaps.Room | None,
) -> overlaps.Room:
    """Update weights and states with the gradient of ``Σ factors[i] · score[i]``, before dropout's scale.

    Blocks that overlap no other are updated in passing, the others by their sums, see
    `cemb.kernels.overlaps`. The weights must still be what they were in the forward pass. Deterministic for
    any number of threads. Returns `room`, or a larger one for the same table.

    Raises ValueError as `overlaps.Room.fitting`, and for row-wise Adagrad if not every row has a state.
    """
    with cpu._launch:
        room = overlaps.Room.fitting(room, len(pairs), spec, weight.dtype, cpu._set_threads())
        batch, table = (pairs, kept, factors), cpu.Geometry.of(spec, context_offset)
        if isinstance(rule, rules.RowwiseAdagrad):
            rowwise.update_pairs(weight, states[0], _typed(rule, weight), *batch, room, table)
        else:
            loss = weight.dtype.type(1), None, None
            _update_pairs(*_arguments(weight, states, rule), weight, False, *batch, *loss, room, table)
        return room


def add_pairs(
    dense: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    kept: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    spec: hashing.HashSpec | hashing.FullSpec,
    context_offset: int,
    room: overlaps.Room | None,
) -> overlaps.Room:
    """Add to a dense gradient what `update_pairs` would update the weights with; returns and raises as it."""
    with cpu._launch:
        room = overlaps.Room.fitting(room, len(pairs), spec, weight.dtype, cpu._set_threads())
        batch, table = (pairs, kept, factors), cpu.Geometry.of(spec, context_offset)
        loss = weight.dtype.type(1), None, None
        _update_pairs(*_arguments(weight, (), rules.SGD(-1.0)), dense, True, *batch, *loss, room, table)
        return room


def fit_pairs(
    weight: npt.NDArray[Any],
    states: Sequence[npt.NDArray[Any]],
    rule: rules.Rule,
    pairs: npt.NDArray[np.int64],
    values: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    spec: hashing.HashSpec | hashing.FullSpec,
    context_offset: int,
    dropout: hashing.PairDropout,
    room: overlaps.Room | None,
) -> tuple[float, overlaps.Room]:
    """`update_pairs` with the gradient of ``Σ weights[i] (score[i] − values[i])²``; returns it and the room.

    A pair is scored when it is updated, so that it comes from memory once. `weights` are ``[n]``, or ``[1]``
    for all alike.
    """
    with cpu._launch:
        room = overlaps.Room.fitting(room, len(pairs), spec, weight.dtype, cpu._set_threads())
        batch = pairs, None, None, *_loss_arguments(weight, values, weights, dropout)
        arguments = _arguments(weight, states, rule)
        loss = _update_pairs(*arguments, weight, False, *batch, room, cpu.Geometry.of(spec, context_offset))
        return loss, room


def _loss_arguments(
    weight: npt.NDArray[Any],
    values: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    dropout: hashing.PairDropout,
) -> tuple[Any, ...]:
    scale = weight.dtype.type(dropout.scale)
    return scale, (values, weights), (np.uint64(dropout.salt), dropout.threshold)


def fit_pairs_of_all(
    weight: npt.NDArray[Any],
    states: Sequence[npt.NDArray[Any]],
    rule: rules.Rule,
    pairs: npt.NDArray[np.int64],
    values: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    spec: hashing.HashSpec | hashing.FullSpec,
    context_offset: int,
    dropout: hashing.PairDropout,
) -> float:
    """`fit_pairs` that updates all weights, as `update_dense`: for small pools, which every batch touches.

    Deterministic for a given number of threads.
    """
    with cpu._launch:
        threads, table = cpu._set_threads(), cpu.Geometry.of(spec, context_offset)
        private = cpu._private_pools(threads, (2 if cpu.is_single(spec) else 1) * weight.size, weight.dtype)
        scale, cells, dropping = _loss_arguments(weight, values, weights, dropout)
        batch = private, pairs, scale, table, cells, dropping
        loss: float = _fit_privately(*_arguments(weight, states, rule), *batch)
        return loss
