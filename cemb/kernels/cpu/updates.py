"""Numba kernels of optimizer steps: sparse updates of the blocks of a batch, and dense ones of a whole pool.

A sparse update knows which blocks conflict, see `cemb.kernels.cpu.conflicts`; a dense one goes through the
pool in order, by a gradient that is an array, `cemb.kernels.cpu.buckets` or the threads' private pools. The
arithmetic is that of `cemb.kernels.cpu.rules`. Beside the arguments that `cemb.kernels.cpu.pairs` lists,
kernels take a rule and two states like `weight`, of which it uses those that it has.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb.hashing import PairDropout, Spec
from cemb.kernels.cpu import buckets, rowwise, rules, simd, threads
from cemb.kernels.cpu.conflicts import Workspace, bit_length, decode, find_conflicts, first_listed
from cemb.kernels.cpu.dropout import draw_rows, hash_workspace, mask_width
from cemb.kernels.cpu.locate import (
    RING,
    S32,
    TILE,
    Geometry,
    block_length,
    find_tile,
    is_single,
    tile_workspace,
)
from cemb.kernels.cpu.pairs import (
    PREFETCH_FAR,
    differentiate,
    pair_private_chunk,
    pair_private_single_chunk,
    score_tile,
    squared_loss,
)
from cemb.kernels.cpu.simd import ALL_LANES, LANES, first_lanes, head_length, prefetch_pair, prefetch_segment

_PAGE = 1024  # values of float32; hardware prefetches no further
_PREFETCH_TERMS = 16  # blocks ahead whose terms are prefetched


@njit(inline="always")
def _prefetch(rule, weight, first_state, second_state, start, length):
    """Prefetch a segment of the weights and of the states that a rule has."""
    prefetch_segment(weight, start, length)
    if rules.num_states(rule) > 0:
        prefetch_segment(first_state, start, length)
    if rules.num_states(rule) > 1:
        prefetch_segment(second_state, start, length)


@njit(inline="always")
def _update_slice(rule, weight, first_state, second_state, values):
    """Step weights and states ``[n]`` by their gradient `values` ``[n]``."""
    n = values.shape[0]
    for low in range(0, n, _PAGE):
        high = min(low + _PAGE, n)
        _prefetch(rule, weight, first_state, second_state, high, _PAGE)
        for x in range(low, high, LANES):
            mask = first_lanes(high - x)
            rules.update(rule, weight, first_state, second_state, x, values, x, mask)


@njit(parallel=True, cache=True, nogil=True)
def _update_dense(weight, first_state, second_state, rule, gradient, num_threads):
    """`update_dense`, a slice of the weights a thread."""
    for t in prange(num_threads):
        low, high = weight.shape[0] * t // num_threads, weight.shape[0] * (t + 1) // num_threads
        first, second = first_state[low:high], second_state[low:high]
        _update_slice(rule, weight[low:high], first, second, gradient[low:high])


@njit(parallel=True, cache=True, nogil=True)
def _fit_private(weight, first_state, second_state, rule, private, pairs, scale, table, labels, dropout_hash):
    """`fit_pairs_dense`: gradients in `private` pools, then a slice of the weights a thread."""
    num_threads = private.shape[0]
    errors = np.empty(pairs.shape[0], weight.dtype)
    for t in prange(num_threads):
        chunk = np.int64(t)
        if is_single(table):
            pair_private_single_chunk(
                chunk, num_threads, private[t], weight, pairs, None, None, scale, table, labels, errors,
                dropout_hash,
            )  # fmt: skip
        else:
            private[t] = 0
            pair_private_chunk(
                chunk, num_threads, private[t], weight, pairs, None, None, scale, table, labels, errors,
                dropout_hash,
            )  # fmt: skip
    for t in prange(num_threads):
        low, high = weight.shape[0] * t // num_threads, weight.shape[0] * (t + 1) // num_threads
        for page in range(low, high, _PAGE):
            after = min(page + _PAGE, high)
            first, second = first_state[page:after], second_state[page:after]
            _update_slice(rule, weight[page:after], first, second, _sums(private, page, after, table))
    return squared_loss(errors, labels[1])


@njit(nogil=True)
def _sums(private, low, high, table):
    """The gradient ``[high - low]`` of the weights from `low` to `high`, summed over the threads' pools."""
    sums = np.zeros(high - low, private.dtype)
    for t in range(private.shape[0]):
        if is_single(table):
            for p in range(low, high):
                sums[p - low] += private[t, 2 * p + 1]
        else:
            for p in range(low, high):
                sums[p - low] += private[t, p]
    return sums


@njit(parallel=True, cache=True, nogil=True)
def _update_buckets(weight, first_state, second_state, rule, entries, starts, num_threads):
    """`update_buckets`, some slices of the pool a thread."""
    slices = starts.shape[0] - 1
    for t in prange(num_threads):
        sums = np.zeros(1 << buckets.SLICE_BITS, weight.dtype)
        for b in range(slices * t // num_threads, slices * (t + 1) // num_threads):
            for x in range(starts[b], starts[b + 1]):
                sums[np.int64(entries[x, 1])] += entries[x, 0]
            low = b << buckets.SLICE_BITS
            high = min(low + (1 << buckets.SLICE_BITS), weight.shape[0])
            first, second = first_state[low:high], second_state[low:high]
            _update_slice(rule, weight[low:high], first, second, sums[: high - low])
            sums[:] = 0


@njit(inline="always")
def _prefetch_step(rule, is_cached, weight, first_state, second_state, i, j):
    """Prefetch the cache lines of two weights, unless they are cached, and of the states that a rule has."""
    if not is_cached:
        prefetch_pair(weight, i, j)
    if rules.num_states(rule) > 0:
        prefetch_pair(first_state, i, j)
    if rules.num_states(rule) > 1:
        prefetch_pair(second_state, i, j)


@njit(nogil=True, error_model="numpy")
def _update_conflict_free_chunk(
    t, weight, first_state, second_state, rule, pairs, dropout_mask, factors, scale, labels, errors,
    dropout_hash, terms, ranks, num_threads, table,
):  # fmt: skip
    """Step those of the thread's blocks that do not conflict; write the gradients of others to `terms`.

    With `labels`, a tile is scored before it is stepped, and its `errors` are written.
    """
    n, blocks, size = pairs.shape[0], table.num_blocks, table.block_size
    keys, places, signs = tile_workspace(table)
    begin, end = n * t // num_threads, n * (t + 1) // num_threads
    is_cached = labels is not None  # the weights of a tile were just scored
    products = np.zeros((TILE, table.dim), weight.dtype)
    hashes = hash_workspace(table.dim)
    drawn_masks = np.empty((TILE, mask_width(table.dim)), np.uint16)
    slopes = np.empty(TILE, weight.dtype)
    find_tile(table, pairs, begin, min(begin + TILE, end), keys, places, signs, 0)
    rank = np.int64(2 * blocks * begin)
    for low in range(begin, end, TILE):
        high = min(low + TILE, end)
        slot = (low - begin) & RING
        find_tile(table, pairs, high, min(high + TILE, end), keys, places, signs, TILE - slot)
        if dropout_mask is not None:
            tile_mask, tile_factors = dropout_mask[low:high], factors[low:high]
        if labels is not None:
            # Their weights are those of before the step: conflicting blocks are updated later.
            tile_mask, tile_factors, tile_errors = (
                drawn_masks[: high - low],
                slopes[: high - low],
                errors[low:high],
            )
            draw_rows(tile_mask, hashes, low, table.dim, dropout_hash[0], dropout_hash[1])
            score_tile(
                weight, tile_mask, tile_errors, products, scale, places, signs, slot, PREFETCH_FAR, table
            )
            differentiate(tile_errors, tile_factors, labels, low)
        for i in range(low, high):
            here, ahead = slot + i - low, (slot + i - low + PREFETCH_FAR) & RING
            for b in range(blocks):
                first, length = b * size, block_length(table, b)
                factor = tile_factors[i - low] * scale * (signs[0, b, here] * signs[1, b, here])
                word, context = places[0, b, here], places[1, b, here]
                word_term, context_term = np.int64(-size), np.int64(-size)
                if ranks[i, 0, b] >= 0:
                    ranks[i, 0, b], word_term = rank, size * rank
                    rank += 1
                if ranks[i, 1, b] >= 0:
                    ranks[i, 1, b], context_term = rank, size * rank
                    rank += 1
                row, head = tile_mask[i - low], head_length(length)
                next_word, next_context = places[0, b, ahead], places[1, b, ahead]
                last = simd.num_read(length) - 1
                _prefetch_step(rule, is_cached, weight, first_state, second_state, next_word, next_context)
                _prefetch_step(
                    rule, is_cached, weight, first_state, second_state, next_word + last, next_context + last
                )
                if head:
                    rules.exchange(
                        rule, weight, first_state, second_state, word, context, factor, terms, word_term,
                        context_term, simd.bits_from(row, first), first_lanes(length),
                    )  # fmt: skip
                for k in range(head, length - LANES, 2 * LANES):
                    step = min(LANES, length - LANES - k)
                    _prefetch_step(
                        rule, is_cached, weight, first_state, second_state, next_word + k, next_context + k
                    )
                    m = k + step
                    _prefetch_step(
                        rule, is_cached, weight, first_state, second_state, next_word + m, next_context + m
                    )
                    rules.exchange_two(
                        rule, weight, first_state, second_state, word + k, context + k, factor, terms,
                        word_term + k, context_term + k, simd.bits_from(row, first + k), step,
                        simd.bits_from(row, first + k + step),
                    )  # fmt: skip


@njit(parallel=True, cache=True, nogil=True)
def _update_conflict_free(
    weight, first_state, second_state, rule, pairs, dropout_mask, factors, scale, labels, errors,
    dropout_hash, terms, ranks, num_threads, table,
):  # fmt: skip
    """`_update_conflict_free_chunk` on all threads."""
    for t in prange(num_threads):
        _update_conflict_free_chunk(
            np.int64(t), weight, first_state, second_state, rule, pairs, dropout_mask, factors, scale, labels,
            errors, dropout_hash, terms, ranks, num_threads, table,
        )  # fmt: skip


@njit(nogil=True)
def _step_segments(rule, weight, first_state, second_state, sums, starts, offsets, count):
    """Step each segment r < count, from ``starts[r]`` on, by ``sums[offsets[r] : offsets[r + 1]]``."""
    for r in range(count):
        first, after = offsets[r], offsets[r + 1]
        for k in range(first, after, LANES):
            start, mask = starts[r] + k - first, first_lanes(after - k)
            rules.update(rule, weight, first_state, second_state, start, sums, k, mask)


# Without fast math, which contracts multiply and add in whole vectors and not at ends: results would depend
# on where slices end, and with it on the number of threads.
@njit(nogil=True, error_model="numpy")
def _update_conflicting_chunk(
    t, weight, first_state, second_state, rule, terms, ranks, keys, cuts, counts, table
):
    """Sum the terms of the conflicting blocks in the thread's slice, and step the weights under them."""
    blocks, size = table.num_blocks, table.block_size
    block_bits = bit_length(blocks)
    last_length = block_length(table, blocks - 1)
    unit = np.int64(table.dim if table.num_starts == 0 else 1)
    low_end, high_end = cuts[t] * unit, cuts[t + 1] * unit
    lowest = first_listed(cuts[t], table)
    # Sums of segments, each of blocks that overlap: where they start in the pool, and where among the sums.
    sums = np.empty(_PAGE + 2 * size, weight.dtype)
    starts, offsets = np.empty(_PAGE, np.int64), np.empty(_PAGE + 1, np.int64)
    segment, used, end, base = 0, np.int64(0), np.int64(-1), np.int64(0)
    for x in range(counts[t]):
        i, side, b = decode(keys[t, 0, min(x + 2 * _PREFETCH_TERMS, counts[t] - 1)], block_bits)
        simd.prefetch(ranks[i, side], b)
        ahead = min(x + _PREFETCH_TERMS, counts[t] - 1)
        i, side, b = decode(keys[t, 0, ahead], block_bits)
        prefetch_segment(terms, size * np.int64(ranks[i, side, b]), size)
        place = (np.int64(keys[t, 0, ahead] >> S32) + lowest) * unit
        _prefetch(rule, weight, first_state, second_state, place, size)
        i, side, b = decode(keys[t, 0, x], block_bits)
        place = (np.int64(keys[t, 0, x] >> S32) + lowest) * unit
        length = last_length if b == blocks - 1 else size
        begin = max(0, low_end - place)
        length = min(length, high_end - place) - begin
        place, term = place + begin, size * np.int64(ranks[i, side, b]) + begin
        if length <= 0:
            continue
        is_new = place > end
        if used >= _PAGE:
            # What lies before `place` is complete.
            final = used if is_new else base + place
            offsets[segment] = final
            _step_segments(rule, weight, first_state, second_state, sums, starts, offsets, segment)
            for k in range(final, used):
                sums[k - final] = sums[k]
            segment, used, base = 0, used - final, -place
            if not is_new:
                segment, starts[0], offsets[0] = 1, place, 0
        if is_new:
            base = used - place
            starts[segment], offsets[segment] = place, used
            segment += 1
        overlap = 0 if is_new else end - place
        into, head = base + place, head_length(length)
        one, every = weight.dtype.type(1), ALL_LANES
        if head:
            mask = first_lanes(length)
            accumulated = first_lanes(overlap) & mask
            simd.append_scaled(sums, into, terms, term, one, mask, accumulated, mask)
        for k in range(head, length - LANES, 2 * LANES):
            step = min(LANES, length - LANES - k)
            accumulated, next_accumulated = first_lanes(overlap - k), first_lanes(overlap - k - step)
            simd.append_scaled_two(
                sums, into + k, terms, term + k, one, every, accumulated, step, every, next_accumulated
            )
        end = max(end, place + length)
        used = base + end
    offsets[segment] = used
    _step_segments(rule, weight, first_state, second_state, sums, starts, offsets, segment)


@njit(parallel=True, cache=True, nogil=True)
def _update_conflicting(weight, first_state, second_state, rule, terms, ranks, keys, cuts, counts, table):
    """`_update_conflicting_chunk` on all threads."""
    for t in prange(counts.shape[0]):
        _update_conflicting_chunk(
            np.int64(t), weight, first_state, second_state, rule, terms, ranks, keys, cuts, counts, table
        )


# One launch for a whole step: Python between launches would run on cold caches.
@njit(cache=True, nogil=True)
def _update_pairs(
    weight, first_state, second_state, rule, target, take_all, pairs, dropout_mask, factors, scale, labels,
    dropout_hash, workspace, table,
):  # fmt: skip
    """Step `weight` by blocks without conflict, and `target` by the sums of conflicting ones.

    If `take_all`, all blocks count as conflicting. Returns the loss where there are `labels`, else 0;
    `dropout_mask` and `factors` are None then.
    """
    terms, ranks, keys, entries, cuts, counts = workspace
    unit = table.dim if table.num_starts == 0 else 1
    slices = keys, entries, cuts, counts
    find_conflicts(pairs, take_all, ranks, *slices, weight.shape[0] // unit, table)
    states = first_state, second_state, rule
    errors = np.empty(0 if labels is None else pairs.shape[0], weight.dtype)
    batch = pairs, dropout_mask, factors, scale, labels, errors, dropout_hash
    _update_conflict_free(weight, *states, *batch, terms, ranks, counts.shape[0], table)
    _update_conflicting(target, *states, terms, ranks, keys, cuts, counts, table)
    loss = 0.0
    if labels is not None:
        loss += squared_loss(errors, labels[1])
    return loss


def _typed(rule: rules.Rule, weight: npt.NDArray[Any]) -> rules.Rule:
    """The rule with constants of the weights' dtype."""
    return type(rule)(*map(weight.dtype.type, rule))


def _arguments(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: rules.Rule
) -> tuple[Any, ...]:
    first, second = [*states, weight, weight][:2]  # kernels read no state that a rule does not have
    return weight, first, second, _typed(rule, weight)


def update_dense(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: rules.Rule, gradient: npt.NDArray[Any]
) -> None:
    """Step all weights ``[n]`` and states, each ``[n]``, by a dense gradient ``[n]``.

    The states of row-wise Adagrad are ``[rows]``. Deterministic for any number of threads.
    """
    if isinstance(rule, rules.RowwiseAdagrad):
        rowwise.update_dense(weight, states[0], _typed(rule, weight), gradient)
        return
    with threads.launch() as num_threads:
        _update_dense(*_arguments(weight, states, rule), gradient, num_threads)


def update_buckets(
    weight: npt.NDArray[Any], states: Sequence[npt.NDArray[Any]], rule: rules.Rule, gradient: buckets.Buckets
) -> None:
    """`update_dense` by the gradient in buckets, which is 0 where these have no entry."""
    with threads.launch() as num_threads:
        _update_buckets(*_arguments(weight, states, rule), gradient.entries, gradient.starts, num_threads)


def update_pairs(
    weight: npt.NDArray[Any],
    states: Sequence[npt.NDArray[Any]],
    rule: rules.Rule,
    pairs: npt.NDArray[np.int64],
    dropout_mask: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    spec: Spec,
    context_offset: int,
    workspace: Workspace | None,
) -> Workspace:
    """A sparse update by the gradient of ``Σ factors[i] · score[i]``, before dropout's scale.

    Args:
        weight: the pool ``[pool_size]``, or a full table ``[rows * dim]``, float32 or float64, as in the
            forward pass.
        states: like `weight`, as many as the rule has; of row-wise Adagrad ``[rows]``.
        pairs: row numbers of words and contexts ``[n, 2]``.
        dropout_mask: ``[n, mask_width]``, see `cemb.kernels.cpu.dropout`.
        factors: ``[n]``, of weight's dtype.
        workspace: of an earlier call for the same table, if there is one.

    Returns:
        `workspace`, or a larger one. Deterministic for any number of threads.

    Raises:
        ValueError: as `Workspace.fitting`; not every row has a state of row-wise Adagrad.
    """
    with threads.launch() as num_threads:
        workspace = Workspace.fitting(workspace, len(pairs), spec, weight.dtype, num_threads)
        batch, table = (pairs, dropout_mask, factors), Geometry.of(spec, context_offset)
        if isinstance(rule, rules.RowwiseAdagrad):
            rowwise.update_pairs(weight, states[0], _typed(rule, weight), *batch, workspace, table)
        else:
            unscaled = weight.dtype.type(1), None, None
            arguments = _arguments(weight, states, rule)
            _update_pairs(*arguments, weight, False, *batch, *unscaled, workspace, table)
        return workspace


def add_pairs(
    dense: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    dropout_mask: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    spec: Spec,
    context_offset: int,
    workspace: Workspace | None,
) -> Workspace:
    """Add the gradient that `update_pairs` steps by to `dense`, which is like `weight`; returns as that."""
    with threads.launch() as num_threads:
        workspace = Workspace.fitting(workspace, len(pairs), spec, weight.dtype, num_threads)
        batch = pairs, dropout_mask, factors, weight.dtype.type(1), None, None
        arguments = _arguments(weight, (), rules.SGD(-1.0))
        _update_pairs(*arguments, dense, True, *batch, workspace, Geometry.of(spec, context_offset))
        return workspace


def fit_pairs(
    weight: npt.NDArray[Any],
    states: Sequence[npt.NDArray[Any]],
    rule: rules.Rule,
    pairs: npt.NDArray[np.int64],
    targets: npt.NDArray[Any],
    sample_weights: npt.NDArray[Any],
    spec: Spec,
    context_offset: int,
    dropout: PairDropout,
    workspace: Workspace | None,
) -> tuple[float, Workspace]:
    """`update_pairs` by the gradient of ``Σ sample_weights[i] (score[i] − targets[i])²``, in one pass.

    A pair is scored in the pass that updates it, so its blocks are loaded once. `targets` are ``[n]``,
    `sample_weights` ``[n]``, or ``[1]`` for all alike. Returns the loss before the step, and the workspace.
    """
    with threads.launch() as num_threads:
        workspace = Workspace.fitting(workspace, len(pairs), spec, weight.dtype, num_threads)
        batch = pairs, None, None, *_loss_arguments(weight, targets, sample_weights, dropout)
        arguments = _arguments(weight, states, rule)
        loss = _update_pairs(*arguments, weight, False, *batch, workspace, Geometry.of(spec, context_offset))
        return loss, workspace


def _loss_arguments(
    weight: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    sample_weights: npt.NDArray[Any],
    dropout: PairDropout,
) -> tuple[Any, ...]:
    scale = weight.dtype.type(dropout.scale)
    return scale, (targets, sample_weights), (np.uint64(dropout.salt), dropout.threshold)


def fit_pairs_dense(
    weight: npt.NDArray[Any],
    states: Sequence[npt.NDArray[Any]],
    rule: rules.Rule,
    pairs: npt.NDArray[np.int64],
    targets: npt.NDArray[Any],
    sample_weights: npt.NDArray[Any],
    spec: Spec,
    context_offset: int,
    dropout: PairDropout,
) -> float:
    """`fit_pairs` with a dense update: for small pools, all of which a batch reads.

    Deterministic for a given number of threads.
    """
    with threads.launch() as num_threads:
        size = (2 if spec.is_single else 1) * weight.size
        private = threads.private_pools(num_threads, size, weight.dtype)
        scale, labels, dropout_hash = _loss_arguments(weight, targets, sample_weights, dropout)
        batch = private, pairs, scale, Geometry.of(spec, context_offset), labels, dropout_hash
        loss: float = _fit_private(*_arguments(weight, states, rule), *batch)
        return loss
