"""Numba kernels: the hash is computed where it is used, so no index ever reaches memory.

Inputs are contiguous numpy arrays that `cemb.ops` has already validated; bfloat16 arrives as the uint16 of
its bits, and everything computed from it is float32. Compiled code is cached on disk. Numba's threading
layers may not all be entered by two threads at once (`workqueue` aborts), so launches hold a lock.

The hash is computed in uint64 throughout: Numba promotes uint32 arithmetic to uint64 and mixed signed
arithmetic to float64, either of which would send indices wild.

Numba compiles what stands inside a `prange` twice, so in large kernels a thread's share of the work is a
function of its own. It takes numpy's error model, which `prange` implies: tests for zero divisors would keep
loops from vector registers. A share's `t` is made int64, since Numba types it in two ways.

Kernels work on tiles of pairs: all places of a tile are found before any is used, and scratch memory written
in one loop is read in a later one, since a load that spans earlier stores waits for them. Where blocks are
used pair by pair they are asked for a pair or a few ahead, one as one is used: a processor has but so many
lines on their way, and all of a tile's at once would keep it waiting.
"""

import functools
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange

from cemb import hashing
from cemb.kernels import lanes

_MULTIPLIER_1 = np.uint64(hashing.MULTIPLIER_1)
_MULTIPLIER_2 = np.uint64(hashing.MULTIPLIER_2)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_ONE = np.uint64(1)
_LANE = np.uint64(lanes.LANES - 1)  # bits of a lane's number
# Products of lanes' numbers by the first multiplier, after an exclusive or with each number.
_STEPS = np.array(
    [[(n ^ lane) * hashing.MULTIPLIER_1 % 2**64 for lane in range(lanes.LANES)] for n in range(lanes.LANES)],
    np.uint64,
)
_LANES = lanes.LANES
_FIRST = _LANES
_ALL = (1 << _LANES) - 1  # lanes
_TILE = 32
_RING = 2 * _TILE - 1  # of the memory of two tiles, what wraps a slot
_AHEAD = 6  # pairs whose blocks are on their way from memory
_NEAR = 1  # and from a cache that cores share, which is nearer


def _second_level_cache() -> int:
    """Bytes of a core's second-level cache, where Linux says so; else those of many."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii")
        return 1024 * int(size.strip().removesuffix("K"))
    except (OSError, ValueError):
        return 2**20


# Single values of a pool of so many come soon enough from a core's own cache, however few are on their way.
_CACHED = min(_second_level_cache() // 4, 2**19)

# Up to this pool size each thread adds into a pool of its own (16 MiB in float32, near the last-level
# cache); above it, clearing and summing private pools costs more than locating every block once per thread.
PRIVATE_POOL_LIMIT = 2**22

# Sums may be reassociated, so that they use vector registers.
_FAST = {"reassoc", "nsz", "contract"}

_launch = threading.Lock()


class Geometry(NamedTuple):
    """What kernels know of a table; `num_starts` is 0 for a full one, whose row i starts at i · dim."""

    dim: int
    block_size: int
    num_blocks: int
    num_starts: np.uint32  # so typed, a product with half of a hash is one instruction, not four
    salt: np.uint64
    sign_mask: np.uint64
    word_offset: np.int64  # added to a row's number, to that of a pair's first id
    context_offset: np.int64  # to that of its second

    @classmethod
    @functools.lru_cache(maxsize=64)  # what it takes is a part of a small step
    def of(cls, spec: hashing.HashSpec | hashing.FullSpec, context_offset: int = 0) -> "Geometry":
        return cls(
            spec.embedding_dim,
            spec.block_size,
            spec.num_blocks,
            np.uint32(spec.num_starts),
            np.uint64(spec.salt),
            np.uint64(spec.signed),
            np.uint64(spec.table_offset).astype(np.int64),  # sums wrap, as those of the hash do
            np.uint64(context_offset).astype(np.int64),
        )


def _set_threads() -> int:
    """Use as many threads as torch does; returns that number."""
    wanted = torch.get_num_threads()
    threads: int = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # Numba's first launch sets it to all there are
        torch.set_num_threads(wanted)
    return threads


@njit(inline="always")
def _mix(x: Any) -> Any:
    x = (x ^ (x >> _S30)) * _MULTIPLIER_1
    x = (x ^ (x >> _S27)) * _MULTIPLIER_2
    return x ^ (x >> _S31)


@njit(inline="always")
def _row(table: Any, pairs: Any, i: Any, side: Any) -> Any:
    """Row of a pair's id on this side, with the offset of its table."""
    return pairs[i, side] + (table.context_offset if side else table.word_offset)


@njit(inline="always")
def _key(table: Any, row: Any) -> Any:
    """Key of a row's first block; of a full table, the row's first value."""
    if table.num_starts == 0:
        return np.uint64(row) * np.uint64(table.dim)
    return np.uint64(row) * np.uint64(table.num_blocks) + table.salt


@njit(inline="always")
def _start(table: Any, h: Any) -> Any:
    return np.int64(((h >> _S32) * np.uint64(table.num_starts)) >> _S32)


@njit(inline="always")
def _locate(table: Any, key: Any, b: Any) -> tuple[Any, Any]:
    """Where block `b` of the row with this key starts, and its sign."""
    if table.num_starts == 0:
        return np.int64(key), np.int64(1)
    h = _mix(key + np.uint64(b))
    return _start(table, h), np.int64(1) - np.int64((h & table.sign_mask) << _ONE)


@njit(inline="always")
def _block_length(table: Any, b: Any) -> Any:
    return min(table.block_size, table.dim - b * table.block_size)


@njit(inline="always")
def _mask(count: Any) -> Any:
    """Mask of the first `count` lanes."""
    return (np.int64(1) << min(max(count, 0), _LANES)) - np.int64(1)


@njit(inline="always")
def _unpaired(length: Any) -> Any:
    """Values of a run that one vector takes, so that the others can be taken two at a time; see `lanes`."""
    return (length + _LANES - 1) // _LANES % 2 * _LANES


@njit(inline="always")
def _prefetch_run(array: Any, start: Any, length: Any) -> None:
    """Ask for all cache lines that vectors of float32 over the run touch."""
    lanes.prefetch(array, start)
    lanes.prefetch(array, start + lanes.num_read(length) - 1)
    # Most blocks are too short for the loop, and a loop's overhead is more than this.
    lanes.prefetch(array, start + min(_LANES, length - 1))
    for k in range(2 * _LANES, length, _LANES):
        lanes.prefetch(array, start + k)


@njit(inline="always")
def _prefetch_two(array: Any, word: Any, context: Any) -> None:
    """Ask for the cache lines of two values."""
    lanes.prefetch(array, word)
    lanes.prefetch(array, context)


@njit(inline="always")
def _prefetch_ends(array: Any, word: Any, context: Any, length: Any) -> None:
    """Ask for the first and the last cache line that vectors over two runs touch."""
    last = lanes.num_read(length) - 1
    _prefetch_two(array, word, context)
    _prefetch_two(array, word + last, context + last)


def is_single(table: Geometry | hashing.HashSpec | hashing.FullSpec) -> bool | np.bool:
    """Whether each value of a geometry, or a spec, is located by itself, as in the original scheme."""
    return table.block_size == 1 and table.num_starts != 0


_is_single = njit(inline="always")(is_single)


@njit(inline="always")
def _place_memory(dim: Any) -> Any:
    """Memory for the places of a pair's values at block size 1, of both rows, each from `_FIRST` on."""
    return np.empty((2, dim + 2 * _LANES), np.uint32)


@njit(inline="always")
def _find_places(places: Any, key: Any, table: Any) -> None:
    """Places of a row's values at block size 1, from `_FIRST` on.

    All are found before any is used, so that many values are on their way at once: the hash would take most
    of the instructions that a processor looks ahead.

    The keys are taken in groups that differ in the number of a lane alone. In such a group the hash's first
    exclusive or is with one number, and products by its first multiplier are that of the lane 0 and a step
    from a table. What is found of other rows, where these groups begin and end, stands before and behind.
    """
    lane = np.int64(key & _LANE)
    group, at = key ^ np.uint64(lane), _FIRST - lane
    for _ in range((lane + table.dim + _LANES - 1) // _LANES):
        mixed = group ^ (group >> _S30)
        row = np.int64(mixed & _LANE)
        lanes.finish_hash(places, at, (mixed & ~_LANE) * _MULTIPLIER_1, _STEPS, row, table.num_starts)
        group, at = group + np.uint64(_LANES), at + _LANES


@njit(inline="always")
def _find_row(places: Any, signs: Any, key: Any, table: Any) -> None:
    """Places of a row's values at block size 1, see `_find_places`, and their signs."""
    _find_places(places, key, table)
    if table.sign_mask:
        for j in range(table.dim):
            signs[j] = np.int64(1) - np.int64((_mix(key + np.uint64(j)) & _ONE) << _ONE)


@njit(parallel=True, cache=True, nogil=True)
def _lookup(weight: Any, ids: Any, out: Any, threads: Any, table: Any) -> None:
    rows = ids.shape[0]
    for t in prange(threads):
        places, signs = _place_memory(table.dim)[0], np.ones(table.dim, out.dtype)
        for i in range(rows * t // threads, rows * (t + 1) // threads):
            key = _key(table, ids[i] + table.word_offset)
            if _is_single(table):
                _find_row(places, signs, key, table)
                for j in range(table.dim):
                    out[i, j] = signs[j] * lanes.value_at(weight, np.int64(places[_FIRST + j]))
                continue
            for b in range(table.num_blocks):
                start, sign = _locate(table, key, b)
                first, length = b * table.block_size, _block_length(table, b)
                lanes.scale(out[i], first, weight, start, sign, _mask(length))
                for follows in range(_LANES, length, _LANES):
                    k = min(follows, length - _LANES)
                    lanes.scale(out[i], first + k, weight, start + k, sign, _ALL)


@njit(parallel=True, cache=True, nogil=True)
def _scatter_private(grad: Any, ids: Any, pool: Any, private: Any, table: Any) -> None:
    threads = private.shape[0] + 1
    rows = ids.shape[0]
    for t in prange(threads):
        target = pool if t == 0 else private[t - 1]
        if t > 0:
            target[:] = 0
        places, signs = _place_memory(table.dim)[0], np.ones(table.dim, pool.dtype)
        for i in range(rows * t // threads, rows * (t + 1) // threads):
            key = _key(table, ids[i] + table.word_offset)
            if _is_single(table):
                _find_row(places, signs, key, table)
                for j in range(table.dim):
                    target[np.int64(places[_FIRST + j])] += signs[j] * grad[i, j]
                continue
            for b in range(table.num_blocks):
                start, sign = _locate(table, key, b)
                first, length = b * table.block_size, _block_length(table, b)
                for k in range(0, length, _LANES):
                    mask = _mask(length - k)
                    lanes.add_scaled(target, start + k, grad[i], first + k, sign, mask, mask)
    for t in prange(threads):
        low, high = pool.shape[0] * t // threads, pool.shape[0] * (t + 1) // threads
        for other in range(threads - 1):
            for p in range(low, high):
                pool[p] += private[other, p]


@njit(parallel=True, cache=True, nogil=True)
def _scatter_owned(grad: Any, ids: Any, pool: Any, threads: Any, table: Any) -> None:
    size = pool.shape[0]
    for t in prange(threads):
        low, high = size * t // threads, size * (t + 1) // threads
        places, signs = _place_memory(table.dim)[0], np.ones(table.dim, pool.dtype)
        own = np.empty(table.dim + 1, np.int64)  # columns whose places this thread owns
        for i in range(ids.shape[0]):
            key = _key(table, ids[i] + table.word_offset)
            if _is_single(table):
                _find_row(places, signs, key, table)
                count: Any = 0
                for j in range(table.dim):
                    own[count] = j
                    # No branch, since none could be predicted.
                    count += np.int64(places[_FIRST + j] >= low) & np.int64(places[_FIRST + j] < high)
                for x in range(count):
                    j = own[x]
                    pool[np.int64(places[_FIRST + j])] += signs[j] * grad[i, j]
                continue
            for b in range(table.num_blocks):
                start, sign = _locate(table, key, b)
                first, length = b * table.block_size, _block_length(table, b)
                begin, end = max(0, low - start), min(length, high - start)
                for k in range(begin, end, _LANES):
                    mask = _mask(end - k)
                    lanes.add_scaled(pool, start + k, grad[i], first + k, sign, mask, mask)


_kept_pools: npt.NDArray[Any] = np.empty((0, 0), np.float32)


def _private_pools(number: int, size: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Memory for private pools ``[number, size]``, kept from call to call and not zeroed."""
    global _kept_pools
    if _kept_pools.shape != (number, size) or _kept_pools.dtype != dtype:
        _kept_pools = np.empty((number, size), dtype)
    return _kept_pools


def lookup(
    weight: npt.NDArray[Any],
    ids: npt.NDArray[np.int64],
    spec: hashing.HashSpec | hashing.FullSpec,
    out: npt.NDArray[Any],
) -> None:
    """Write rows `ids` ``[n]`` of the table into `out` ``[n, embedding_dim]``."""
    with _launch:
        threads = _set_threads()
        _lookup(weight, ids, out, threads, Geometry.of(spec))


def scatter(
    grad: npt.NDArray[Any],
    ids: npt.NDArray[np.int64],
    spec: hashing.HashSpec | hashing.FullSpec,
    pool: npt.NDArray[Any],
) -> None:
    """The transpose of `lookup`: add `grad` ``[n, embedding_dim]`` into the zeroed `pool` ``[pool_size]``.

    Deterministic for a given number of threads up to `PRIVATE_POOL_LIMIT`, and for any number above it,
    where each thread owns a slice of the pool and sees every row in order.
    """
    with _launch:
        threads, table = _set_threads(), Geometry.of(spec)
        if threads > 1 and pool.size > PRIVATE_POOL_LIMIT:
            _scatter_owned(grad, ids, pool, threads, table)
        else:
            private = _private_pools(threads - 1, pool.size, pool.dtype)
            _scatter_private(grad, ids, pool, private, table)


@njit(inline="always")
def _kept_width(dim: Any) -> Any:
    """Words for the mask of what dropout keeps of a pair, with room for `lanes.bits_from` to read in."""
    return (dim + _LANES - 1) // _LANES + 2


@njit(inline="always")
def _room_for_hashes(dim: Any) -> Any:
    return np.empty(4 * (_kept_width(dim) - 2), np.uint64)


@njit(inline="always")
def _draw_rows(kept: Any, hashes: Any, first: Any, dim: Any, salt: Any, threshold: Any) -> None:
    """Which components dropout keeps of the pairs from `first` on, a row of `kept` for each.

    `hashes` is scratch memory.
    """
    quads = np.uint64((dim + 3) // 4)
    parts = hashes.view(np.uint16)
    for i in range(kept.shape[0]):
        if threshold == 0:
            kept[i] = 0xFFFF
            continue
        key = salt + np.uint64(first + i) * quads
        for g in range(hashes.shape[0]):
            hashes[g] = _mix(key + np.uint64(g))
        for w in range(kept.shape[1] - 2):
            kept[i, w] = lanes.at_least(parts, w * _LANES, threshold)


@njit(parallel=True, cache=True, nogil=True)
def _draw(kept: Any, dim: Any, salt: Any, threshold: Any, threads: Any) -> None:
    for t in prange(threads):
        low, high = kept.shape[0] * t // threads, kept.shape[0] * (t + 1) // threads
        _draw_rows(kept[low:high], _room_for_hashes(dim), low, dim, salt, threshold)


_last_kept: tuple[tuple[int, ...], npt.NDArray[np.uint16]] = ((), np.empty((0, 0), np.uint16))


def _room_for_kept(
    num_pairs: int, dim: int, dropout: hashing.PairDropout
) -> tuple[npt.NDArray[np.uint16], bool]:
    """Memory for which components dropout keeps: bit j of row i for component j of pair i.

    The last result is kept, since a backward pass asks for that of its forward pass: the second result says
    whether this is it. If not, it is to be filled, and then handed to `_keep`.
    """
    if _last_kept[0] == (num_pairs, dim, dropout.salt, dropout.threshold):
        return _last_kept[1], True
    return np.empty((num_pairs, _kept_width(dim)), np.uint16), False


def _keep(kept: npt.NDArray[np.uint16], dim: int, dropout: hashing.PairDropout) -> None:
    global _last_kept
    _last_kept = ((len(kept), dim, dropout.salt, dropout.threshold), kept)


def _kept(num_pairs: int, dim: int, dropout: hashing.PairDropout, threads: int) -> npt.NDArray[np.uint16]:
    kept, is_drawn = _room_for_kept(num_pairs, dim, dropout)
    if not is_drawn:
        _draw(kept, dim, np.uint64(dropout.salt), dropout.threshold, threads)
        _keep(kept, dim, dropout)
    return kept


@njit(inline="always")
def _spread(factors: Any, kept: Any, factor: Any, ones: Any) -> None:
    """``factors[j] = factor`` where dropout keeps component j, else 0."""
    dim = factors.shape[0]
    for k in range(0, dim, _LANES):
        lanes.append_scaled(factors, k, ones, 0, factor, lanes.bits_from(kept, k), 0, _mask(dim - k))


@njit(inline="always")
def _hash_tile(keys: Any, b: Any, places: Any, signs: Any, table: Any) -> None:
    """Places and signs of block `b` of the rows with these keys ``[_TILE]``, in vector registers."""
    if table.num_starts == 0:
        for i in range(_TILE):
            places[i] = np.int64(keys[i])
    else:
        for i in range(_TILE):
            h = _mix(keys[i] + np.uint64(b))
            places[i] = _start(table, h)
            signs[i] = np.int64(1) - np.int64((h & table.sign_mask) << _ONE)


@njit(inline="always")
def _tile_memory(table: Any) -> tuple[Any, Any, Any]:
    """Keys ``[side, _TILE]`` of pairs, and places and signs ``[side, block, 2 * _TILE]`` of their blocks.

    It is of two tiles: while one is computed, the other's places are there to be asked for.
    """
    return (
        np.zeros((2, _TILE), np.uint64),
        np.empty((2, table.num_blocks, 2 * _TILE), np.int64),
        np.ones((2, table.num_blocks, 2 * _TILE), np.int64),
    )


@njit(inline="always")
def _find(table: Any, pairs: Any, low: Any, high: Any, keys: Any, places: Any, signs: Any, slot: Any) -> None:
    """Write the places and signs of all blocks of the pairs from `low` to `high`, from `slot` on."""
    for i in range(low, high):
        keys[0, i - low] = _key(table, _row(table, pairs, i, 0))
        keys[1, i - low] = _key(table, _row(table, pairs, i, 1))
    for side in range(2):
        for b in range(table.num_blocks):
            tile_places, tile_signs = places[side, b], signs[side, b]
            _hash_tile(
                keys[side], b, tile_places[slot : slot + _TILE], tile_signs[slot : slot + _TILE], table
            )


@njit(inline="always")
def _find_single(
    factors: Any, places: Any, kept: Any, factor: Any, ones: Any, table: Any, word: Any, context: Any
) -> None:
    """Places of a pair's values at block size 1, as `_find_places`, and their factors, signs included."""
    _spread(factors, kept, factor, ones)
    _find_places(places[0], word, table)
    _find_places(places[1], context, table)
    if table.sign_mask:
        for j in range(table.dim):
            if (_mix(word + np.uint64(j)) ^ _mix(context + np.uint64(j))) & _ONE:
                factors[j] = -factors[j]


@njit(inline="always")
def _score_single(weight: Any, factors: Any, table: Any, word: Any, context: Any) -> Any:
    """Score of a pair at block size 1: reads only, so that the loop uses vector registers."""
    total = factors.dtype.type(0)
    for j in range(table.dim):
        h, g = _mix(word + np.uint64(j)), _mix(context + np.uint64(j))
        product = lanes.value_at(weight, _start(table, h)) * lanes.value_at(weight, _start(table, g))
        total += factors[j] * (product if (h ^ g) & table.sign_mask == 0 else -product)
    return total


@njit(nogil=True, fastmath=_FAST)
def _sum_rows(terms: Any, sums: Any) -> None:
    for i in range(sums.shape[0]):
        total = sums.dtype.type(0)
        for j in range(terms.shape[1]):
            total += terms[i, j]
        sums[i] = total


@njit(inline="always")
def _score_tile(
    weight: Any,
    kept: Any,
    scores: Any,
    terms: Any,
    scale: Any,
    places: Any,
    signs: Any,
    slot: Any,
    distance: Any,
    table: Any,
) -> None:
    """Scores ``[n]`` of pairs whose places stand from `slot` on; `terms` ``[_TILE, dim]`` is scratch memory.

    What is read `distance` pairs later is asked for.
    """
    for i in range(scores.shape[0]):
        here, ahead = slot + i, (slot + i + distance) & _RING
        for b in range(table.num_blocks):
            word, context = places[0, b, here], places[1, b, here]
            next_word, next_context = places[0, b, ahead], places[1, b, ahead]
            first, length = b * table.block_size, _block_length(table, b)
            _prefetch_ends(weight, next_word, next_context, length)
            factor = scale * (signs[0, b, here] * signs[1, b, here])
            mask = _mask(length)
            bits = lanes.bits_from(kept[i], first) & mask
            lanes.multiply(terms[i], first, weight, word, weight, context, factor, bits, mask)
            for follows in range(_LANES, length, _LANES):
                k = min(follows, length - _LANES)
                _prefetch_two(weight, next_word + k, next_context + k)
                bits = lanes.bits_from(kept[i], first + k)
                lanes.multiply(terms[i], first + k, weight, word + k, weight, context + k, factor, bits, _ALL)
    _sum_rows(terms, scores)


@njit(inline="always")
def _differentiate(errors: Any, slopes: Any, cells: Any, first: Any) -> None:
    """Make errors of the scores of pairs from `first` on, and slopes of their weighted squares.

    `cells` are what the scores are to be, and weights: of each pair, or one for all.
    """
    values, weights = cells
    last = weights.shape[0] - 1
    for i in range(errors.shape[0]):
        errors[i] -= values[first + i]
        slopes[i] = 2 * weights[min(first + i, last)] * errors[i]


@njit(nogil=True, fastmath=_FAST)
def _loss(errors: Any, weights: Any) -> Any:
    """The weighted sum of squares, see `_differentiate`."""
    last = weights.shape[0] - 1
    total = 0.0
    for i in range(errors.shape[0]):
        total += np.float64(weights[min(i, last)]) * np.float64(errors[i]) ** 2
    return total


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _pair_scores_share(
    t: Any,
    weight: Any,
    pairs: Any,
    kept: Any,
    scores: Any,
    scale: Any,
    threads: Any,
    is_drawn: Any,
    salt: Any,
    threshold: Any,
    table: Any,
) -> None:
    n, dim = pairs.shape[0], table.dim
    ones = np.ones(_LANES, scores.dtype)
    terms = np.zeros((_TILE, dim), scores.dtype)
    pair_places = _place_memory(dim)
    hashes = _room_for_hashes(dim)
    keys, places, signs = _tile_memory(table)
    distance = _AHEAD if weight.shape[0] > PRIVATE_POOL_LIMIT else _NEAR
    begin, end = n * t // threads, n * (t + 1) // threads
    if not _is_single(table):
        _find(table, pairs, begin, min(begin + _TILE, end), keys, places, signs, 0)
    for low in range(begin, end, _TILE):
        high = min(low + _TILE, end)
        if not is_drawn:
            _draw_rows(kept[low:high], hashes, low, dim, salt, threshold)
        if _is_single(table) and (weight.shape[0] > _CACHED or not lanes.has_gather()):
            # Places first, for the reason that `_find_places` gives.
            for i in range(low, high):
                word = _key(table, _row(table, pairs, i, 0))
                context = _key(table, _row(table, pairs, i, 1))
                _find_single(terms[0], pair_places, kept[i], scale, ones, table, word, context)
                total = scores.dtype.type(0)
                for j in range(dim):
                    left = lanes.value_at(weight, np.int64(pair_places[0, _FIRST + j]))
                    total += terms[0, j] * left * lanes.value_at(weight, np.int64(pair_places[1, _FIRST + j]))
                scores[i] = total
            continue
        if _is_single(table):
            for i in range(low, high):
                _spread(terms[i - low], kept[i], scale, ones)
            for i in range(low, high):
                word = _key(table, _row(table, pairs, i, 0))
                context = _key(table, _row(table, pairs, i, 1))
                scores[i] = _score_single(weight, terms[i - low], table, word, context)
            continue
        slot = (low - begin) & _RING
        _find(table, pairs, high, min(high + _TILE, end), keys, places, signs, _TILE - slot)
        tile = kept[low:high], scores[low:high]
        _score_tile(weight, tile[0], tile[1], terms, scale, places, signs, slot, distance, table)


@njit(parallel=True, cache=True, nogil=True)
def _pair_scores(
    weight: Any,
    pairs: Any,
    kept: Any,
    scores: Any,
    scale: Any,
    threads: Any,
    is_drawn: Any,
    salt: Any,
    threshold: Any,
    table: Any,
) -> None:
    for t in prange(threads):
        _pair_scores_share(
            np.int64(t), weight, pairs, kept, scores, scale, threads, is_drawn, salt, threshold, table
        )


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _pair_private_share(
    t: Any,
    threads: Any,
    target: Any,
    weight: Any,
    pairs: Any,
    kept: Any,
    grad: Any,
    scale: Any,
    table: Any,
    cells: Any,
    errors: Any,
    dropping: Any,
) -> None:
    """Add to `target` the gradient of the thread's pairs, ``Σ grad[i] · score[i]``.

    Or with `cells`, see `_differentiate`, that of their weighted squared errors. Errors are written then, and
    what dropout keeps is drawn, by its salt and threshold; there is no `kept` and no `grad`.
    """
    n = pairs.shape[0]
    terms = np.zeros((_TILE, table.dim), target.dtype)
    hashes, drawn = _room_for_hashes(table.dim), np.empty((_TILE, _kept_width(table.dim)), np.uint16)
    slopes = np.empty(_TILE, target.dtype)
    keys, places, signs = _tile_memory(table)
    begin, end = n * t // threads, n * (t + 1) // threads
    _find(table, pairs, begin, min(begin + _TILE, end), keys, places, signs, 0)
    for low in range(begin, end, _TILE):
        high = min(low + _TILE, end)
        slot = (low - begin) & _RING
        _find(table, pairs, high, min(high + _TILE, end), keys, places, signs, _TILE - slot)
        if kept is not None:
            tile_kept, tile_grad = kept[low:high], grad[low:high]
        if cells is not None:
            tile_kept, tile_grad, tile_errors = drawn[: high - low], slopes[: high - low], errors[low:high]
            _draw_rows(tile_kept, hashes, low, table.dim, dropping[0], dropping[1])
            _score_tile(weight, tile_kept, tile_errors, terms, scale, places, signs, slot, _NEAR, table)
            _differentiate(tile_errors, tile_grad, cells, low)
        for i in range(high - low):
            here, ahead = slot + i, (slot + i + _NEAR) & _RING
            for b in range(table.num_blocks):
                word, context = places[0, b, here], places[1, b, here]
                next_word, next_context = places[0, b, ahead], places[1, b, ahead]
                first, length = b * table.block_size, _block_length(table, b)
                _prefetch_ends(weight, next_word, next_context, length)
                _prefetch_ends(target, next_word, next_context, length)
                factor = tile_grad[i] * scale * (signs[0, b, here] * signs[1, b, here])
                row, unpaired = tile_kept[i], _unpaired(length)
                if unpaired:
                    mask = _mask(length)
                    bits = lanes.bits_from(row, first) & mask
                    lanes.add_scaled(target, word, weight, context, factor, bits, mask)
                    lanes.add_scaled(target, context, weight, word, factor, bits, mask)
                for k in range(unpaired, length - _LANES, 2 * _LANES):
                    step = min(_LANES, length - _LANES - k)
                    for m in (k, k + step):
                        _prefetch_two(weight, next_word + m, next_context + m)
                        _prefetch_two(target, next_word + m, next_context + m)
                    bits, after = lanes.bits_from(row, first + k), lanes.bits_from(row, first + k + step)
                    lanes.add_scaled_two(target, word + k, weight, context + k, factor, bits, step, after)
                    lanes.add_scaled_two(target, context + k, weight, word + k, factor, bits, step, after)


@njit(parallel=True, cache=True, nogil=True)
def _pair_private(
    weight: Any, pairs: Any, kept: Any, grad: Any, scale: Any, pool: Any, private: Any, table: Any
) -> None:
    threads = private.shape[0] + 1
    for t in prange(threads):
        target = pool if t == 0 else private[t - 1]
        if t > 0:
            target[:] = 0
        _pair_private_share(
            np.int64(t), threads, target, weight, pairs, kept, grad, scale, table, None, None, None
        )
    for t in prange(threads):
        low, high = pool.shape[0] * t // threads, pool.shape[0] * (t + 1) // threads
        for other in range(threads - 1):
            for p in range(low, high):
                pool[p] += private[other, p]


@njit(nogil=True, error_model="numpy", fastmath=_FAST)
def _pair_private_single_share(
    t: Any,
    threads: Any,
    both: Any,
    weight: Any,
    pairs: Any,
    kept: Any,
    grad: Any,
    scale: Any,
    table: Any,
    cells: Any,
    errors: Any,
    dropping: Any,
) -> None:
    """`_pair_private_share` at block size 1; the gradient is the second column of `both`, which it clears."""
    n, dim = pairs.shape[0], table.dim
    # Weight and gradient side by side, so that one cache line brings both.
    for p in range(weight.shape[0]):
        both[2 * p] = lanes.value_at(weight, p)
        both[2 * p + 1] = 0
    ones = np.ones(_LANES, both.dtype)
    hashes, drawn = _room_for_hashes(dim), np.empty((1, _kept_width(dim)), np.uint16)
    slopes = np.empty(1, both.dtype)
    factors, places = np.empty(dim, both.dtype), _place_memory(dim)
    found, terms = np.empty((2, dim), both.dtype), np.empty((2, dim), both.dtype)
    for i in range(n * t // threads, n * (t + 1) // threads):
        word, context = _key(table, _row(table, pairs, i, 0)), _key(table, _row(table, pairs, i, 1))
        if kept is not None:
            row = kept[i]
        if cells is not None:
            row = drawn[0]
            _draw_rows(drawn, hashes, i, dim, dropping[0], dropping[1])
        _find_single(factors, places, row, scale, ones, table, word, context)
        for j in range(dim):
            found[0, j] = both[2 * np.int64(places[0, _FIRST + j])]
            found[1, j] = both[2 * np.int64(places[1, _FIRST + j])]
        if grad is not None:
            slope = grad[i]
        if cells is not None:
            total = both.dtype.type(0)
            for j in range(dim):
                total += factors[j] * found[0, j] * found[1, j]
            errors[i] = total
            _differentiate(errors[i : i + 1], slopes, cells, i)
            slope = slopes[0]
        for j in range(dim):
            factor = slope * factors[j]
            terms[0, j], terms[1, j] = factor * found[1, j], factor * found[0, j]
        for j in range(dim):
            both[2 * np.int64(places[0, _FIRST + j]) + 1] += terms[0, j]
            both[2 * np.int64(places[1, _FIRST + j]) + 1] += terms[1, j]


@njit(parallel=True, cache=True, nogil=True)
def _pair_private_single(
    weight: Any, pairs: Any, kept: Any, grad: Any, scale: Any, pool: Any, private: Any, table: Any
) -> None:
    threads = private.shape[0]
    for t in prange(threads):
        _pair_private_single_share(
            np.int64(t), threads, private[t], weight, pairs, kept, grad, scale, table, None, None, None
        )
    for t in prange(threads):
        low, high = pool.shape[0] * t // threads, pool.shape[0] * (t + 1) // threads
        for other in range(threads):
            for p in range(low, high):
                pool[p] += private[other, 2 * p + 1]


@njit(parallel=True, cache=True, nogil=True, fastmath=_FAST)
def _pair_owned_single(
    weight: Any, pairs: Any, kept: Any, grad: Any, scale: Any, pool: Any, threads: Any, table: Any
) -> None:
    n, size, dim = pairs.shape[0], pool.shape[0], table.dim
    for t in prange(threads):
        low_end, high_end = size * t // threads, size * (t + 1) // threads
        ones = np.ones(_LANES, pool.dtype)
        factors, places = np.empty(dim, pool.dtype), _place_memory(dim)
        # Of each value this thread owns: its place, its partner's, and the factor.
        own, partner = np.empty(2 * _TILE * dim + 1, np.uint32), np.empty(2 * _TILE * dim + 1, np.uint32)
        term = np.empty(2 * _TILE * dim + 1, pool.dtype)
        for low in range(0, n, _TILE):
            count: Any = 0
            for i in range(low, min(low + _TILE, n)):
                word, context = (
                    _key(table, _row(table, pairs, i, 0)),
                    _key(table, _row(table, pairs, i, 1)),
                )
                _find_single(factors, places, kept[i], grad[i] * scale, ones, table, word, context)
                for side in range(2):
                    for j in range(dim):
                        place = np.int64(places[side, _FIRST + j])
                        own[count], partner[count], term[count] = (
                            place,
                            places[1 - side, _FIRST + j],
                            factors[j],
                        )
                        # No branch, since none could be predicted.
                        count += np.int64(place >= low_end) & np.int64(place < high_end)
            for x in range(count):
                lanes.prefetch(pool, np.int64(own[x]))
                lanes.prefetch(weight, np.int64(partner[x]))
            for x in range(count):
                pool[np.int64(own[x])] += term[x] * lanes.value_at(weight, np.int64(partner[x]))


# Not fast math, as in `cemb.kernels.updates`.
@njit(parallel=True, cache=True, nogil=True)
def _pair_owned(
    weight: Any, pairs: Any, kept: Any, grad: Any, scale: Any, pool: Any, threads: Any, table: Any
) -> None:
    n, size = pairs.shape[0], pool.shape[0]
    for t in prange(threads):
        low_end, high_end = size * t // threads, size * (t + 1) // threads
        keys, places, signs = _tile_memory(table)
        # Of each block this thread owns a part of: side, block and pair, the last within the tile.
        found = np.empty((2 * _TILE * table.num_blocks + 1, 3), np.int64)
        for low in range(0, n, _TILE):
            high = min(low + _TILE, n)
            _find(table, pairs, low, high, keys, places, signs, 0)
            count: Any = 0
            for side in range(2):
                for b in range(table.num_blocks):
                    for i in range(high - low):
                        place = places[side, b, i]
                        found[count, 0], found[count, 1], found[count, 2] = side, b, i
                        # No branch, since none could be predicted.
                        count += np.int64(place < high_end) & np.int64(
                            place + _block_length(table, b) > low_end
                        )
            for x in range(count):
                side, b, i = found[x, 0], found[x, 1], found[x, 2]
                _prefetch_run(pool, places[side, b, i], _block_length(table, b))
                _prefetch_run(weight, places[1 - side, b, i], _block_length(table, b))
            for x in range(count):
                side, b, i = found[x, 0], found[x, 1], found[x, 2]
                place, partner = places[side, b, i], places[1 - side, b, i]
                first, length = b * table.block_size, _block_length(table, b)
                factor = grad[low + i] * scale * (signs[0, b, i] * signs[1, b, i])
                begin, end = max(0, low_end - place), min(length, high_end - place)
                for k in range(begin, end, _LANES):
                    mask = _mask(end - k)
                    bits = lanes.bits_from(kept[low + i], first + k) & mask
                    lanes.add_scaled(pool, place + k, weight, partner + k, factor, bits, mask)


def pair_scores(
    weight: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    spec: hashing.HashSpec | hashing.FullSpec,
    context_offset: int,
    dropout: hashing.PairDropout,
    scores: npt.NDArray[Any],
) -> None:
    """Write the dot products of the rows `pairs` ``[n, 2]`` after dropout into `scores` ``[n]``."""
    with _launch:
        threads = _set_threads()
        kept, is_drawn = _room_for_kept(len(pairs), spec.embedding_dim, dropout)
        dropping = (is_drawn, np.uint64(dropout.salt), dropout.threshold)
        scale, table = scores.dtype.type(dropout.scale), Geometry.of(spec, context_offset)
        _pair_scores(weight, pairs, kept, scores, scale, threads, *dropping, table)
        _keep(kept, spec.embedding_dim, dropout)


def pair_scores_backward(
    grad: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    spec: hashing.HashSpec | hashing.FullSpec,
    context_offset: int,
    dropout: hashing.PairDropout,
    pool: npt.NDArray[Any],
) -> None:
    """Add the gradient of `pair_scores` with respect to `weight` into the zeroed `pool` ``[pool_size]``.

    Deterministic as `scatter` is.
    """
    with _launch:
        threads = _set_threads()
        kept = _kept(len(pairs), spec.embedding_dim, dropout, threads)
        arguments = (weight, pairs, kept, grad, pool.dtype.type(dropout.scale), pool)
        table = Geometry.of(spec, context_offset)
        if threads > 1 and pool.size > PRIVATE_POOL_LIMIT:
            (_pair_owned_single if is_single(spec) else _pair_owned)(*arguments, threads, table)
        elif is_single(spec):
            private = _private_pools(threads, 2 * pool.size, pool.dtype)
            _pair_private_single(*arguments, private, table)
        else:
            private = _private_pools(threads - 1, pool.size, pool.dtype)
            _pair_private(*arguments, private, table)


@njit(parallel=True, cache=True, nogil=True, fastmath=_FAST)
def _vector_scores(vectors: Any, kept: Any, scores: Any, scale: Any, threads: Any) -> None:
    n, dim = vectors.shape[0], vectors.shape[2]
    for t in prange(threads):
        ones = np.ones(_LANES, scores.dtype)
        factors = np.empty((_TILE, dim), scores.dtype)
        end = n * (t + 1) // threads
        for low in range(n * t // threads, end, _TILE):
            for i in range(low, min(low + _TILE, end)):
                _spread(factors[i - low], kept[i], scale, ones)
            for i in range(low, min(low + _TILE, end)):
                total = scores.dtype.type(0)
                for j in range(dim):
                    total += factors[i - low, j] * vectors[i, 0, j] * vectors[i, 1, j]
                scores[i] = total


@njit(parallel=True, cache=True, nogil=True)
def _vector_scores_backward(grad: Any, vectors: Any, kept: Any, out: Any, scale: Any) -> None:
    dim = vectors.shape[2]
    for i in prange(vectors.shape[0]):
        factor = grad[i] * scale
        words, contexts = vectors[i, 0], vectors[i, 1]
        for k in range(0, dim, _LANES):
            mask = _mask(dim - k)
            bits = lanes.bits_from(kept[i], k)
            lanes.append_scaled(out[i, 0], k, contexts, k, factor, bits & mask, 0, mask)
            lanes.append_scaled(out[i, 1], k, words, k, factor, bits & mask, 0, mask)


def vector_scores(vectors: npt.NDArray[Any], dropout: hashing.PairDropout, scores: npt.NDArray[Any]) -> None:
    """Write the dot product of each pair of `vectors` ``[n, 2, dim]`` after dropout into `scores` ``[n]``."""
    with _launch:
        threads = _set_threads()
        kept = _kept(len(vectors), vectors.shape[2], dropout, threads)
        _vector_scores(vectors, kept, scores, scores.dtype.type(dropout.scale), threads)


def vector_scores_backward(
    grad: npt.NDArray[Any], vectors: npt.NDArray[Any], dropout: hashing.PairDropout, out: npt.NDArray[Any]
) -> None:
    """Write the gradient of `vector_scores` with respect to `vectors` into `out` ``[n, 2, dim]``."""
    with _launch:
        kept = _kept(len(vectors), vectors.shape[2], dropout, _set_threads())
        _vector_scores_backward(grad, vectors, kept, out, out.dtype.type(dropout.scale))


def release_memory() -> None:
    """Give back what is kept from call to call."""
    global _kept_pools, _last_kept
    with _launch:
        _kept_pools = np.empty((0, 0), np.float32)
        _last_kept = ((), np.empty((0, 0), np.uint16))


def num_threads() -> int:
    """Threads the next launch will use."""
    with _launch:
        return _set_threads()


def draw(num_pairs: int, dim: int, dropout: hashing.PairDropout) -> npt.NDArray[np.uint16]:
    """Which components dropout keeps: bit j of row i of the result for component j of pair i."""
    with _launch:
        return _kept(num_pairs, dim, dropout, _set_threads())
