"""The loop over pairs of rows, which scores them, sums their gradients, and steps their weights.

No index and no vector of a pair ever reaches memory. Inputs are contiguous arrays that `cemb.ops` has
validated; bfloat16 arrives as the uint16 of its bits, and everything computed from it is float32.

The loop works on tiles of pairs: all places of a tile are found before any is used, and a workspace written
in one loop is read in a later one, since a load that spans earlier stores waits for them. While one tile is
computed, blocks of the next pairs are prefetched, a few pairs ahead: outstanding misses are limited, and a
whole tile's at once would stall. What a pair does to the table is a rule of `cemb.kernels.cpu.rules`: that of
an optimizer, or `Add` to sum gradients.

Numba compiles what stands inside a `prange` twice, so a thread's chunk is a function of its own.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import prange

from cemb.hashing import PairDropout, Spec
from cemb.kernels.checks import check_array
from cemb.kernels.cpu import rules, simd
from cemb.kernels.cpu.dropout import draw_rows, hash_workspace, mask_bits, mask_width
from cemb.kernels.cpu.locate import (
    FIRST,
    ONE,
    RING,
    TILE,
    Geometry,
    block_length,
    check_pool,
    find_places,
    find_tile,
    is_single,
    key_of,
    mix,
    place_workspace,
    row_of,
    tile_workspace,
)
from cemb.kernels.cpu.threads import FASTMATH, jit, launch, parallel


class Batch(NamedTuple):
    """Pairs, what is wanted of their scores, and their dropout."""

    pairs: npt.NDArray[np.int64]  # [n, 2], rows of words and contexts
    slopes: npt.NDArray[Any]  # [n], derivatives of the loss by the scores; [0] if it is a squared error
    targets: npt.NDArray[Any]  # [n], of a squared error, else [0]
    sample_weights: npt.NDArray[Any]  # [n], or [1] for all alike
    scale: Any  # of components that survive dropout, 1/(1 - p)^2
    salt: np.uint64  # and the threshold: of `PairDropout`
    threshold: int

    @classmethod
    def of(cls, pairs: npt.NDArray[np.int64], dropout: PairDropout, dtype: Any, **wanted: Any) -> "Batch":
        """A batch computed in `dtype`; `wanted` has slopes, or targets and sample weights."""
        none = np.empty(0, dtype)
        scale = np.dtype(dtype).type(dropout.scale)
        slopes, targets, weights = (wanted.get(name, none) for name in cls._fields[1:4])
        return cls(pairs, slopes, targets, weights, scale, np.uint64(dropout.salt), dropout.threshold)

    def check(self, dtype: Any) -> None:
        """Raise ValueError unless there are pairs, and slopes, or targets and sample weights, of a dtype."""
        n = len(self.pairs)
        check_array("pairs", self.pairs, (n, 2), np.int64)
        if len(self.slopes) or not len(self.targets):
            check_array("slopes", self.slopes, (n,), dtype)
        if len(self.targets):
            check_array("targets", self.targets, (n,), dtype)
            weights = self.sample_weights
            check_array("sample_weights", weights, (1 if len(weights) == 1 else n,), dtype)


@jit()
def differentiate(scores, slopes, batch, first):
    """Write the derivatives of the weighted squared errors of the pairs from `first` on, return their sum.

    `scores` and `slopes` are ``[pairs]``. Where the batch has slopes, these are copied.
    """
    loss = 0.0
    if batch.slopes.shape[0] > 0:
        for i in range(slopes.shape[0]):
            slopes[i] = batch.slopes[first + i]
        return loss
    last = batch.sample_weights.shape[0] - 1
    for i in range(slopes.shape[0]):
        weight, error = batch.sample_weights[min(first + i, last)], scores[i] - batch.targets[first + i]
        slopes[i] = 2 * weight * error
        loss += np.float64(weight) * np.float64(error) ** 2
    return loss


@jit(fastmath=FASTMATH)
def _sum_rows(terms, sums):
    """Sums ``[n]`` of the rows of `terms` ``[>= n, dim]``."""
    for i in range(sums.shape[0]):
        total = sums.dtype.type(0)
        for j in range(terms.shape[1]):
            total += terms[i, j]
        sums[i] = total


@jit()
def _score_tile(weight, scores, terms, mask, scale, tile, table):
    """Write the scores ``[n <= TILE]`` of a tile of pairs; `terms` ``[TILE, dim]`` is a workspace.

    `tile` is what `find_tile` found, and the slot of its first pair.
    """
    places, signs, slot = tile
    flat = terms.reshape(-1)
    for i in range(scores.shape[0]):
        here, ahead = slot + i, (slot + i + table.distance) & RING
        for b in range(table.num_blocks):
            first, length = b * table.block_size, block_length(table, b)
            sides = places[0, b, here], places[1, b, here], places[0, b, ahead], places[1, b, ahead]
            factor = scale * scores.dtype.type(signs[0, b, here] * signs[1, b, here])
            at = i * mask_bits(table.dim) + first
            simd.multiply(flat, i * table.dim + first, weight, sides, factor, (mask, at), length)
    _sum_rows(terms, scores)


@jit()
def pair_workspace(dim, like):
    """Workspace of one pair at block size 1: mask, hashes, ones, factors, places, and its two rows."""
    mask, hashes = np.empty(mask_width(dim), np.uint16), hash_workspace(dim)
    rows = np.empty((2, dim), like.dtype)
    return mask, hashes, np.ones(dim, like.dtype), np.empty(dim, like.dtype), place_workspace(dim), rows


@jit()
def find_pair(workspace, batch, i, factor, table):
    """Find the places of pair i, and factors ``[dim]``: `factor`, signed, or 0 by dropout; returns both."""
    mask, hashes, ones, factors, places, _ = workspace
    draw_rows(mask, 1, hashes, i, batch, table.dim)
    simd.copy_scaled(factors, 0, ones, 0, factor, (mask, 0), table.dim)
    word, context = (
        key_of(table, row_of(table, batch.pairs, i, 0)),
        key_of(table, row_of(table, batch.pairs, i, 1)),
    )
    find_places(places[0], word, table)
    find_places(places[1], context, table)
    if table.sign_mask:
        for j in range(table.dim):
            if (mix(word + np.uint64(j)) ^ mix(context + np.uint64(j))) & ONE:
                factors[j] = -factors[j]
    return factors, places


@jit(fastmath=FASTMATH)
def _score_chunk(t, num_threads, weight, batch, scores, table):
    """Write the scores of the thread's pairs."""
    n, dim = batch.pairs.shape[0], table.dim
    begin, end = n * t // num_threads, n * (t + 1) // num_threads
    if is_single(table):
        workspace = pair_workspace(dim, scores)
        for i in range(begin, end):
            factors, places = find_pair(workspace, batch, i, batch.scale, table)
            total = scores.dtype.type(0)
            for j in range(dim):
                left = simd.value_at(weight, np.int64(places[0, FIRST + j]))
                total += factors[j] * left * simd.value_at(weight, np.int64(places[1, FIRST + j]))
            scores[i] = total
        return
    mask, hashes = np.empty(TILE * mask_width(dim), np.uint16), hash_workspace(dim)
    terms = np.zeros((TILE, dim), scores.dtype)
    keys, places, signs = tile_workspace(table)
    find_tile(table, batch.pairs, begin, min(begin + TILE, end), keys, places, signs, 0)
    for low in range(begin, end, TILE):
        high = min(low + TILE, end)
        slot = (low - begin) & RING
        find_tile(table, batch.pairs, high, min(high + TILE, end), keys, places, signs, TILE - slot)
        draw_rows(mask, high - low, hashes, low, batch, dim)
        _score_tile(weight, scores[low:high], terms, mask, batch.scale, (places, signs, slot), table)


@parallel
def _score(num_threads, weight, batch, scores, table):
    """`score`, a chunk of the pairs a thread."""
    for t in prange(num_threads):
        _score_chunk(np.int64(t), num_threads, weight, batch, scores, table)


def score(
    weight: npt.NDArray[Any], batch: Batch, spec: Spec, context_offset: int, scores: npt.NDArray[Any]
) -> None:
    """Write the dot products of the rows of a batch's pairs after dropout into `scores` ``[n]``.

    `weight` is ``[pool_size]``; `scores` float64 for a float64 pool, else float32. Deterministic for any
    number of threads.
    """
    n = len(batch.pairs)
    check_array("pairs", batch.pairs, (n, 2), np.int64)
    check_array("scores", scores, (n,), np.float32, np.float64)
    check_pool("weight", weight, spec, scores.dtype)
    with launch() as num_threads:
        _score(num_threads, weight, batch, scores, Geometry.of(spec, context_offset))


@jit()
def visit_chunk(t, num_threads, rule, stepped, weight, batch, conflicts, table):
    """Step `stepped` by the gradients of the thread's pairs; returns the loss.

    Args:
        rule, stepped: as for `cemb.kernels.cpu.rules.exchange`.
        weight: ``[pool_size]``, or the values of a full table.
        batch: pairs are scored here if it has no slopes.
        conflicts: ``(terms, ranks)``, where blocks that conflict write their gradients, and which these are,
            see `cemb.kernels.cpu.conflicts`; empty if none does. Their weights stay those of before.
    """
    pairs, blocks, size, dim = batch.pairs, table.num_blocks, table.block_size, table.dim
    n, dtype = pairs.shape[0], batch.slopes.dtype
    begin, end = n * t // num_threads, n * (t + 1) // num_threads
    mask, hashes = np.empty(TILE * mask_width(dim), np.uint16), hash_workspace(dim)
    products, scores, slopes = np.zeros((TILE, dim), dtype), np.empty(TILE, dtype), np.empty(TILE, dtype)
    keys, places, signs = tile_workspace(table)
    find_tile(table, pairs, begin, min(begin + TILE, end), keys, places, signs, 0)
    terms, ranks = conflicts
    loss, rank, has_conflicts = 0.0, np.int64(2 * blocks * begin), ranks.shape[0] > 0
    for low in range(begin, end, TILE):
        high = min(low + TILE, end)
        slot = (low - begin) & RING
        find_tile(table, pairs, high, min(high + TILE, end), keys, places, signs, TILE - slot)
        draw_rows(mask, high - low, hashes, low, batch, dim)
        if batch.slopes.shape[0] == 0:
            tile = places, signs, slot
            _score_tile(weight, scores[: high - low], products, mask, batch.scale, tile, table)
        loss += differentiate(scores, slopes[: high - low], batch, low)
        for i in range(high - low):
            here, ahead = slot + i, (slot + i + table.distance) & RING
            slope, bit = slopes[i] * batch.scale, i * mask_bits(dim)
            for b in range(blocks):
                first, length = b * size, block_length(table, b)
                sides = places[0, b, here], places[1, b, here], places[0, b, ahead], places[1, b, ahead]
                factor = slope * dtype.type(signs[0, b, here] * signs[1, b, here])
                bits = mask, bit + first
                word_term, context_term = np.int64(-1), np.int64(-1)
                if has_conflicts:
                    if ranks[low + i, 0, b] >= 0:
                        ranks[low + i, 0, b], word_term = rank, size * rank
                        rank += 1
                    if ranks[low + i, 1, b] >= 0:
                        ranks[low + i, 1, b], context_term = rank, size * rank
                        rank += 1
                out = terms, word_term, context_term, size * rank
                rules.exchange(rule, stepped, weight, sides, factor, bits, length, out)
    return loss


@jit(fastmath=FASTMATH)
def add_single_chunk(t, num_threads, both, weight, batch, table):
    """Sum the gradients of the thread's pairs at block size 1; returns the loss.

    Weights and gradient alternate in `both` ``[2 * pool_size]``, so that one cache line brings both: it
    copies the weights in and clears the gradient first.
    """
    n, dim = batch.pairs.shape[0], table.dim
    for p in range(weight.shape[0]):
        both[2 * p] = simd.value_at(weight, p)
        both[2 * p + 1] = 0
    workspace = pair_workspace(dim, both)
    rows, terms = workspace[5], np.empty((2, dim), both.dtype)
    scores, slopes = np.empty(1, both.dtype), np.empty(1, both.dtype)
    loss = 0.0
    for i in range(n * t // num_threads, n * (t + 1) // num_threads):
        factors, places = find_pair(workspace, batch, i, batch.scale, table)
        for j in range(dim):
            rows[0, j] = both[2 * np.int64(places[0, FIRST + j])]
            rows[1, j] = both[2 * np.int64(places[1, FIRST + j])]
        total = both.dtype.type(0)
        for j in range(dim):
            total += factors[j] * rows[0, j] * rows[1, j]
        scores[0] = total
        loss += differentiate(scores, slopes, batch, i)
        for j in range(dim):
            factor = slopes[0] * factors[j]
            terms[0, j], terms[1, j] = factor * rows[1, j], factor * rows[0, j]
        for j in range(dim):
            both[2 * np.int64(places[0, FIRST + j]) + 1] += terms[0, j]
            both[2 * np.int64(places[1, FIRST + j]) + 1] += terms[1, j]
    return loss
