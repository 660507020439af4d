"""Numba kernels of pair scores and their gradients: no index and no vector of a pair ever reaches memory.

Inputs are contiguous numpy arrays that `cemb.ops` has validated; bfloat16 arrives as the uint16 of its bits,
and everything computed from it is float32. Kernels take, beside the `Geometry` of a table:

    weight            the pool [pool_size], or the values of a full table [rows * dim]
    pairs             int64 [n, 2], row numbers of words and contexts
    dropout_mask      uint16 [n, mask_width], see `cemb.kernels.cpu.dropout`
    grad              [n], the loss's derivatives by the scores
    scale             1/(1 - p)^2, the factor of components that survive dropout
    labels            (targets [n], sample weights [n] or [1]) of a squared error, scored in the same pass
    dropout_hash      (salt, threshold), by which masks are drawn in that pass

Numba compiles what stands inside a `prange` twice, so in large kernels the chunk of a thread is a function of
its own. It takes numpy's error model, which `prange` implies: tests for zero divisors would keep loops from
vector registers. A chunk's number `t` is made int64, since Numba types it in two ways.

Kernels work on tiles of pairs: all places of a tile are found before any is used, and a workspace written in
one loop is read in a later one, since a load that spans earlier stores waits for them. Where blocks are used
pair by pair, each use prefetches the block a pair or a few ahead: outstanding misses are limited, and a whole
tile's at once would stall.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb.hashing import PairDropout, Spec
from cemb.kernels.cpu import simd, threads
from cemb.kernels.cpu.dropout import (
    draw_in_launch,
    draw_rows,
    expand_mask,
    hash_workspace,
    last_or_empty,
    mask_width,
    remember,
)
from cemb.kernels.cpu.locate import (
    FIRST,
    ONE,
    RING,
    TILE,
    Geometry,
    block_length,
    block_start,
    find_places,
    find_tile,
    is_single,
    key_of,
    mix,
    place_workspace,
    row_of,
    tile_workspace,
)
from cemb.kernels.cpu.simd import (
    ALL_LANES,
    FASTMATH,
    LANES,
    first_lanes,
    head_length,
    prefetch_ends,
    prefetch_pair,
    prefetch_segment,
)

# Pairs ahead that are prefetched: of blocks in memory, and of blocks in a cache that cores share.
PREFETCH_FAR, PREFETCH_NEAR = 6, 1


def _second_level_cache() -> int:
    """Bytes of a core's second-level cache, where Linux says so; else those of many."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii")
        return 1024 * int(size.strip().removesuffix("K"))
    except (OSError, ValueError):
        return 2**20


# Up to so many values a pool lies in a core's own cache, whose latency a gather hides; larger ones need
# more loads in flight.
_GATHER_LIMIT = min(_second_level_cache() // 4, 2**19)


@njit(inline="always")
def find_single(factors, places, dropout_mask, factor, ones, table, word, context):
    """`find_places` of a pair at block size 1, and `factors` ``[dim]``: `factor`, signed, or 0 by dropout."""
    expand_mask(factors, dropout_mask, factor, ones)
    find_places(places[0], word, table)
    find_places(places[1], context, table)
    if table.sign_mask:
        for j in range(table.dim):
            if (mix(word + np.uint64(j)) ^ mix(context + np.uint64(j))) & ONE:
                factors[j] = -factors[j]


@njit(inline="always")
def _score_single(weight, factors, table, word, context):
    """Score of a pair at block size 1. It stores nothing, so that the loop uses vector registers."""
    total = factors.dtype.type(0)
    for j in range(table.dim):
        h, g = mix(word + np.uint64(j)), mix(context + np.uint64(j))
        product = simd.value_at(weight, block_start(table, h)) * simd.value_at(weight, block_start(table, g))
        total += factors[j] * (product if (h ^ g) & table.sign_mask == 0 else -product)
    return total


@njit(nogil=True, fastmath=FASTMATH)
def _sum_rows(terms, sums):
    """Sums ``[n]`` of the rows of `terms` ``[>= n, dim]``."""
    for i in range(sums.shape[0]):
        total = sums.dtype.type(0)
        for j in range(terms.shape[1]):
            total += terms[i, j]
        sums[i] = total


@njit(inline="always")
def score_tile(weight, dropout_mask, scores, terms, scale, places, signs, slot, distance, table):
    """Write the scores ``[n <= TILE]`` of the pairs whose places stand from `slot` on.

    Blocks are prefetched `distance` pairs ahead; `terms` ``[TILE, dim]`` is a workspace.
    """
    for i in range(scores.shape[0]):
        here, ahead = slot + i, (slot + i + distance) & RING
        for b in range(table.num_blocks):
            word, context = places[0, b, here], places[1, b, here]
            next_word, next_context = places[0, b, ahead], places[1, b, ahead]
            first, length = b * table.block_size, block_length(table, b)
            prefetch_ends(weight, next_word, next_context, length)
            factor = scale * (signs[0, b, here] * signs[1, b, here])
            mask = first_lanes(length)
            bits = simd.bits_from(dropout_mask[i], first) & mask
            simd.multiply(terms[i], first, weight, word, weight, context, factor, bits, mask)
            for follows in range(LANES, length, LANES):
                k = min(follows, length - LANES)
                prefetch_pair(weight, next_word + k, next_context + k)
                bits = simd.bits_from(dropout_mask[i], first + k)
                simd.multiply(
                    terms[i], first + k, weight, word + k, weight, context + k, factor, bits, ALL_LANES
                )
    _sum_rows(terms, scores)


@njit(inline="always")
def differentiate(errors, slopes, labels, first):
    """Turn the scores of the pairs from `first` on, in `errors` ``[n]``, into errors, and write `slopes`.

    These, ``[n]``, are the derivatives of the weighted squared errors by the scores.
    """
    targets, sample_weights = labels
    last = sample_weights.shape[0] - 1
    for i in range(errors.shape[0]):
        errors[i] -= targets[first + i]
        slopes[i] = 2 * sample_weights[min(first + i, last)] * errors[i]


@njit(nogil=True, fastmath=FASTMATH)
def squared_loss(errors, sample_weights):
    """``Σ sample_weights[i] · errors[i]²`` in float64; sample weights are ``[n]``, or ``[1]`` for all."""
    last = sample_weights.shape[0] - 1
    total = 0.0
    for i in range(errors.shape[0]):
        total += np.float64(sample_weights[min(i, last)]) * np.float64(errors[i]) ** 2
    return total


@njit(nogil=True, error_model="numpy", fastmath=FASTMATH)
def _pair_scores_chunk(
    t, weight, pairs, dropout_mask, scores, scale, num_threads, is_drawn, salt, threshold, table
):
    """Write the scores of the thread's pairs; draws their dropout mask unless `is_drawn`."""
    n, dim = pairs.shape[0], table.dim
    ones = np.ones(LANES, scores.dtype)
    terms = np.zeros((TILE, dim), scores.dtype)
    pair_places = place_workspace(dim)
    hashes = hash_workspace(dim)
    keys, places, signs = tile_workspace(table)
    distance = PREFETCH_FAR if weight.shape[0] > threads.PRIVATE_POOL_LIMIT else PREFETCH_NEAR
    begin, end = n * t // num_threads, n * (t + 1) // num_threads
    if not is_single(table):
        find_tile(table, pairs, begin, min(begin + TILE, end), keys, places, signs, 0)
    for low in range(begin, end, TILE):
        high = min(low + TILE, end)
        if not is_drawn:
            draw_rows(dropout_mask[low:high], hashes, low, dim, salt, threshold)
        if is_single(table) and (weight.shape[0] > _GATHER_LIMIT or not simd.has_gather()):
            # Places first, see `find_places`.
            for i in range(low, high):
                word = key_of(table, row_of(table, pairs, i, 0))
                context = key_of(table, row_of(table, pairs, i, 1))
                find_single(terms[0], pair_places, dropout_mask[i], scale, ones, table, word, context)
                total = scores.dtype.type(0)
                for j in range(dim):
                    left = simd.value_at(weight, np.int64(pair_places[0, FIRST + j]))
                    total += terms[0, j] * left * simd.value_at(weight, np.int64(pair_places[1, FIRST + j]))
                scores[i] = total
            continue
        if is_single(table):
            for i in range(low, high):
                expand_mask(terms[i - low], dropout_mask[i], scale, ones)
            for i in range(low, high):
                word = key_of(table, row_of(table, pairs, i, 0))
                context = key_of(table, row_of(table, pairs, i, 1))
                scores[i] = _score_single(weight, terms[i - low], table, word, context)
            continue
        slot = (low - begin) & RING
        find_tile(table, pairs, high, min(high + TILE, end), keys, places, signs, TILE - slot)
        tile = dropout_mask[low:high], scores[low:high]
        score_tile(weight, tile[0], tile[1], terms, scale, places, signs, slot, distance, table)


@njit(parallel=True, cache=True, nogil=True)
def _pair_scores(weight, pairs, dropout_mask, scores, scale, num_threads, is_drawn, salt, threshold, table):
    """`pair_scores`, a chunk of the pairs a thread."""
    for t in prange(num_threads):
        _pair_scores_chunk(
            np.int64(t), weight, pairs, dropout_mask, scores, scale, num_threads, is_drawn, salt, threshold,
            table,
        )  # fmt: skip


@njit(nogil=True, error_model="numpy", fastmath=FASTMATH)
def pair_private_chunk(
    t, num_threads, target, weight, pairs, dropout_mask, grad, scale, table, labels, errors, dropout_hash
):
    """Add to `target` ``[pool_size]`` the gradient of ``Σ grad[i] · score[i]`` over the thread's pairs.

    With `labels`, that of their weighted squared errors; it writes `errors` ``[n]`` then, and `dropout_mask`
    and `grad` are None.
    """
    n = pairs.shape[0]
    terms = np.zeros((TILE, table.dim), target.dtype)
    hashes, drawn_masks = hash_workspace(table.dim), np.empty((TILE, mask_width(table.dim)), np.uint16)
    slopes = np.empty(TILE, target.dtype)
    keys, places, signs = tile_workspace(table)
    begin, end = n * t // num_threads, n * (t + 1) // num_threads
    find_tile(table, pairs, begin, min(begin + TILE, end), keys, places, signs, 0)
    for low in range(begin, end, TILE):
        high = min(low + TILE, end)
        slot = (low - begin) & RING
        find_tile(table, pairs, high, min(high + TILE, end), keys, places, signs, TILE - slot)
        if dropout_mask is not None:
            tile_mask, tile_grad = dropout_mask[low:high], grad[low:high]
        if labels is not None:
            tile_mask, tile_grad, tile_errors = (
                drawn_masks[: high - low],
                slopes[: high - low],
                errors[low:high],
            )
            draw_rows(tile_mask, hashes, low, table.dim, dropout_hash[0], dropout_hash[1])
            score_tile(
                weight, tile_mask, tile_errors, terms, scale, places, signs, slot, PREFETCH_NEAR, table
            )
            differentiate(tile_errors, tile_grad, labels, low)
        for i in range(high - low):
            here, ahead = slot + i, (slot + i + PREFETCH_NEAR) & RING
            for b in range(table.num_blocks):
                word, context = places[0, b, here], places[1, b, here]
                next_word, next_context = places[0, b, ahead], places[1, b, ahead]
                first, length = b * table.block_size, block_length(table, b)
                prefetch_ends(weight, next_word, next_context, length)
                prefetch_ends(target, next_word, next_context, length)
                factor = tile_grad[i] * scale * (signs[0, b, here] * signs[1, b, here])
                row, head = tile_mask[i], head_length(length)
                if head:
                    mask = first_lanes(length)
                    bits = simd.bits_from(row, first) & mask
                    simd.add_scaled(target, word, weight, context, factor, bits, mask)
                    simd.add_scaled(target, context, weight, word, factor, bits, mask)
                for k in range(head, length - LANES, 2 * LANES):
                    step = min(LANES, length - LANES - k)
                    for m in (k, k + step):
                        prefetch_pair(weight, next_word + m, next_context + m)
                        prefetch_pair(target, next_word + m, next_context + m)
                    bits, after = simd.bits_from(row, first + k), simd.bits_from(row, first + k + step)
                    simd.add_scaled_two(target, word + k, weight, context + k, factor, bits, step, after)
                    simd.add_scaled_two(target, context + k, weight, word + k, factor, bits, step, after)


@njit(parallel=True, cache=True, nogil=True)
def _pair_private(weight, pairs, dropout_mask, grad, scale, pool, private, table):
    """Thread 0 adds to `pool`, the others to `private` ``[threads - 1, pool_size]``, summed after."""
    num_threads = private.shape[0] + 1
    for t in prange(num_threads):
        target = pool if t == 0 else private[t - 1]
        if t > 0:
            target[:] = 0
        pair_private_chunk(
            np.int64(t), num_threads, target, weight, pairs, dropout_mask, grad, scale, table, None, None,
            None,
        )  # fmt: skip
    for t in prange(num_threads):
        low, high = pool.shape[0] * t // num_threads, pool.shape[0] * (t + 1) // num_threads
        for other in range(num_threads - 1):
            for p in range(low, high):
                pool[p] += private[other, p]


@njit(nogil=True, error_model="numpy", fastmath=FASTMATH)
def pair_private_single_chunk(
    t, num_threads, both, weight, pairs, dropout_mask, grad, scale, table, labels, errors, dropout_hash
):
    """`pair_private_chunk` at block size 1; weights and gradient alternate in `both` ``[2 * pool_size]``.

    It copies the weights in and clears the gradient first.
    """
    n, dim = pairs.shape[0], table.dim
    # Side by side, so that one cache line brings both.
    for p in range(weight.shape[0]):
        both[2 * p] = simd.value_at(weight, p)
        both[2 * p + 1] = 0
    ones = np.ones(LANES, both.dtype)
    hashes, drawn_masks = hash_workspace(dim), np.empty((1, mask_width(dim)), np.uint16)
    slopes = np.empty(1, both.dtype)
    factors, places = np.empty(dim, both.dtype), place_workspace(dim)
    found, terms = np.empty((2, dim), both.dtype), np.empty((2, dim), both.dtype)
    for i in range(n * t // num_threads, n * (t + 1) // num_threads):
        word, context = key_of(table, row_of(table, pairs, i, 0)), key_of(table, row_of(table, pairs, i, 1))
        if dropout_mask is not None:
            row = dropout_mask[i]
        if labels is not None:
            row = drawn_masks[0]
            draw_rows(drawn_masks, hashes, i, dim, dropout_hash[0], dropout_hash[1])
        find_single(factors, places, row, scale, ones, table, word, context)
        for j in range(dim):
            found[0, j] = both[2 * np.int64(places[0, FIRST + j])]
            found[1, j] = both[2 * np.int64(places[1, FIRST + j])]
        if grad is not None:
            slope = grad[i]
        if labels is not None:
            total = both.dtype.type(0)
            for j in range(dim):
                total += factors[j] * found[0, j] * found[1, j]
            errors[i] = total
            differentiate(errors[i : i + 1], slopes, labels, i)
            slope = slopes[0]
        for j in range(dim):
            factor = slope * factors[j]
            terms[0, j], terms[1, j] = factor * found[1, j], factor * found[0, j]
        for j in range(dim):
            both[2 * np.int64(places[0, FIRST + j]) + 1] += terms[0, j]
            both[2 * np.int64(places[1, FIRST + j]) + 1] += terms[1, j]


@njit(parallel=True, cache=True, nogil=True)
def _pair_private_single(weight, pairs, dropout_mask, grad, scale, pool, private, table):
    """`_pair_private` at block size 1; `private` is ``[threads, 2 * pool_size]``."""
    num_threads = private.shape[0]
    for t in prange(num_threads):
        pair_private_single_chunk(
            np.int64(t), num_threads, private[t], weight, pairs, dropout_mask, grad, scale, table, None, None,
            None,
        )  # fmt: skip
    for t in prange(num_threads):
        low, high = pool.shape[0] * t // num_threads, pool.shape[0] * (t + 1) // num_threads
        for other in range(num_threads):
            for p in range(low, high):
                pool[p] += private[other, 2 * p + 1]


@njit(parallel=True, cache=True, nogil=True, fastmath=FASTMATH)
def _pair_owned_single(weight, pairs, dropout_mask, grad, scale, pool, num_threads, table):
    """`_pair_owned` at block size 1."""
    n, size, dim = pairs.shape[0], pool.shape[0], table.dim
    for t in prange(num_threads):
        low_end, high_end = size * t // num_threads, size * (t + 1) // num_threads
        ones = np.ones(LANES, pool.dtype)
        factors, places = np.empty(dim, pool.dtype), place_workspace(dim)
        # Of each value in this thread's slice: its place, its partner's, and the factor.
        own, partner = np.empty(2 * TILE * dim + 1, np.uint32), np.empty(2 * TILE * dim + 1, np.uint32)
        term = np.empty(2 * TILE * dim + 1, pool.dtype)
        for low in range(0, n, TILE):
            count = 0
            for i in range(low, min(low + TILE, n)):
                word, context = (
                    key_of(table, row_of(table, pairs, i, 0)),
                    key_of(table, row_of(table, pairs, i, 1)),
                )
                find_single(factors, places, dropout_mask[i], grad[i] * scale, ones, table, word, context)
                for side in range(2):
                    for j in range(dim):
                        place = np.int64(places[side, FIRST + j])
                        own[count], partner[count], term[count] = (
                            place,
                            places[1 - side, FIRST + j],
                            factors[j],
                        )
                        # Arithmetic in place of a branch, which could not be predicted.
                        count += np.int64(place >= low_end) & np.int64(place < high_end)
            for x in range(count):
                simd.prefetch(pool, np.int64(own[x]))
                simd.prefetch(weight, np.int64(partner[x]))
            for x in range(count):
                pool[np.int64(own[x])] += term[x] * simd.value_at(weight, np.int64(partner[x]))


# Without fast math, as `cemb.kernels.cpu.updates`.
@njit(parallel=True, cache=True, nogil=True)
def _pair_owned(weight, pairs, dropout_mask, grad, scale, pool, num_threads, table):
    """Each thread goes through all pairs and adds what falls in its slice of `pool` ``[pool_size]``."""
    n, size = pairs.shape[0], pool.shape[0]
    for t in prange(num_threads):
        low_end, high_end = size * t // num_threads, size * (t + 1) // num_threads
        keys, places, signs = tile_workspace(table)
        # Of each block that reaches into this thread's slice: side, block, and pair within the tile.
        found = np.empty((2 * TILE * table.num_blocks + 1, 3), np.int64)
        for low in range(0, n, TILE):
            high = min(low + TILE, n)
            find_tile(table, pairs, low, high, keys, places, signs, 0)
            count = 0
            for side in range(2):
                for b in range(table.num_blocks):
                    for i in range(high - low):
                        place = places[side, b, i]
                        found[count, 0], found[count, 1], found[count, 2] = side, b, i
                        # Arithmetic in place of a branch, which could not be predicted.
                        count += np.int64(place < high_end) & np.int64(
                            place + block_length(table, b) > low_end
                        )
            for x in range(count):
                side, b, i = found[x, 0], found[x, 1], found[x, 2]
                prefetch_segment(pool, places[side, b, i], block_length(table, b))
                prefetch_segment(weight, places[1 - side, b, i], block_length(table, b))
            for x in range(count):
                side, b, i = found[x, 0], found[x, 1], found[x, 2]
                place, partner = places[side, b, i], places[1 - side, b, i]
                first, length = b * table.block_size, block_length(table, b)
                factor = grad[low + i] * scale * (signs[0, b, i] * signs[1, b, i])
                begin, end = max(0, low_end - place), min(length, high_end - place)
                for k in range(begin, end, LANES):
                    mask = first_lanes(end - k)
                    bits = simd.bits_from(dropout_mask[low + i], first + k) & mask
                    simd.add_scaled(pool, place + k, weight, partner + k, factor, bits, mask)


def pair_scores(
    weight: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    spec: Spec,
    context_offset: int,
    dropout: PairDropout,
    scores: npt.NDArray[Any],
) -> None:
    """Write the dot products of the rows `pairs` ``[n, 2]`` after dropout into `scores` ``[n]``.

    `weight` is ``[pool_size]``; `scores` float64 for a float64 pool, else float32. Deterministic for any
    number of threads.
    """
    with threads.launch() as num_threads:
        dropout_mask, is_drawn = last_or_empty(len(pairs), spec.embedding_dim, dropout)
        drawing = (is_drawn, np.uint64(dropout.salt), dropout.threshold)
        scale, table = scores.dtype.type(dropout.scale), Geometry.of(spec, context_offset)
        _pair_scores(weight, pairs, dropout_mask, scores, scale, num_threads, *drawing, table)
        remember(dropout_mask, spec.embedding_dim, dropout)


def pair_scores_backward(
    grad: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    spec: Spec,
    context_offset: int,
    dropout: PairDropout,
    pool: npt.NDArray[Any],
) -> None:
    """Add the gradient of ``Σ grad[i] · score[i]`` by `weight` into the zeroed `pool` ``[pool_size]``.

    `grad` is ``[n]``, of the pool's dtype. Deterministic as `cemb.kernels.cpu.lookup.scatter` is.
    """
    with threads.launch() as num_threads:
        dropout_mask = draw_in_launch(len(pairs), spec.embedding_dim, dropout, num_threads)
        arguments = (weight, pairs, dropout_mask, grad, pool.dtype.type(dropout.scale), pool)
        table = Geometry.of(spec, context_offset)
        if num_threads > 1 and pool.size > threads.PRIVATE_POOL_LIMIT:
            (_pair_owned_single if spec.is_single else _pair_owned)(*arguments, num_threads, table)
        elif spec.is_single:
            private = threads.private_pools(num_threads, 2 * pool.size, pool.dtype)
            _pair_private_single(*arguments, private, table)
        else:
            private = threads.private_pools(num_threads - 1, pool.size, pool.dtype)
            _pair_private(*arguments, private, table)


@njit(parallel=True, cache=True, nogil=True, fastmath=FASTMATH)
def _vector_scores(vectors, dropout_mask, scores, scale, num_threads):
    """`vector_scores`, a chunk of the pairs a thread."""
    n, dim = vectors.shape[0], vectors.shape[2]
    for t in prange(num_threads):
        ones = np.ones(LANES, scores.dtype)
        factors = np.empty((TILE, dim), scores.dtype)
        end = n * (t + 1) // num_threads
        for low in range(n * t // num_threads, end, TILE):
            for i in range(low, min(low + TILE, end)):
                expand_mask(factors[i - low], dropout_mask[i], scale, ones)
            for i in range(low, min(low + TILE, end)):
                total = scores.dtype.type(0)
                for j in range(dim):
                    total += factors[i - low, j] * vectors[i, 0, j] * vectors[i, 1, j]
                scores[i] = total


@njit(parallel=True, cache=True, nogil=True)
def _vector_scores_backward(grad, vectors, dropout_mask, out, scale):
    """`vector_scores_backward`, pair by pair."""
    dim = vectors.shape[2]
    for i in prange(vectors.shape[0]):
        factor = grad[i] * scale
        words, contexts = vectors[i, 0], vectors[i, 1]
        for k in range(0, dim, LANES):
            mask = first_lanes(dim - k)
            bits = simd.bits_from(dropout_mask[i], k)
            simd.append_scaled(out[i, 0], k, contexts, k, factor, bits & mask, 0, mask)
            simd.append_scaled(out[i, 1], k, words, k, factor, bits & mask, 0, mask)


def vector_scores(vectors: npt.NDArray[Any], dropout: PairDropout, scores: npt.NDArray[Any]) -> None:
    """Write the dot products of `vectors` ``[n, 2, dim]``, float32 or float64, into `scores` ``[n]``.

    Deterministic for any number of threads, as is the gradient.
    """
    with threads.launch() as num_threads:
        dropout_mask = draw_in_launch(len(vectors), vectors.shape[2], dropout, num_threads)
        _vector_scores(vectors, dropout_mask, scores, scores.dtype.type(dropout.scale), num_threads)


def vector_scores_backward(
    grad: npt.NDArray[Any], vectors: npt.NDArray[Any], dropout: PairDropout, out: npt.NDArray[Any]
) -> None:
    """Write the gradient of `vector_scores`, given `grad` ``[n]``, into `out` ``[n, 2, dim]``."""
    with threads.launch() as num_threads:
        dropout_mask = draw_in_launch(len(vectors), vectors.shape[2], dropout, num_threads)
        _vector_scores_backward(grad, vectors, dropout_mask, out, out.dtype.type(dropout.scale))
