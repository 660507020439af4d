"""Which blocks of a batch overlap others, and in which order these are to be summed.

Most blocks that a batch touches in a large table overlap no other. The gradient of such a block is its
partner's values times a factor, so an optimizer can update it in passing, see `cemb.kernels.updates`. The
others' gradients, the terms, have to be summed first. Which is which shows when all are sorted by where they
start. Each thread sorts the blocks of a slice of the pool, and sums them in that order, so that sums are the
same for any number of threads, and wherever slices end.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb import hashing
from cemb.kernels import cpu

_SAMPLES = 256  # of blocks for each thread, by which slices are cut


class Room(NamedTuple):
    """Memory for the blocks of a batch, kept from step to step. What is not touched costs nothing.

    Thread t has the slice of the pool from ``cuts[t]`` to ``cuts[t + 1]``, in units: values, or rows of a
    full table. It sums the blocks ``keys[t, 0, :counts[t]]``, sorted. The upper 32 bits of a block are where
    it starts, there counted from `_lowest`, the lower ones its code. Term r is ``terms[r * block_size:]``.
    """

    terms: npt.NDArray[Any]
    ranks: npt.NDArray[np.int32]  # [pairs, 2, blocks]: which term is a block's; −1 if it overlaps no other
    keys: npt.NDArray[np.uint64]  # [threads, 2, blocks of the batch]
    listed: npt.NDArray[np.uint64]  # all blocks of the batch
    cuts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, num_pairs: int, spec: hashing.HashSpec | hashing.FullSpec, dtype: np.dtype[Any], threads: int
    ) -> "Room":
        blocks = 2 * num_pairs * spec.num_blocks
        return cls(
            np.empty(blocks * spec.block_size, dtype),
            np.empty((num_pairs, 2, spec.num_blocks), np.int32),
            np.empty((threads, 2, blocks), np.uint64),
            np.empty(blocks, np.uint64),
            np.zeros(threads + 1, np.int64),
            np.zeros(threads, np.int64),
        )

    @classmethod
    def fitting(
        cls,
        room: "Room | None",
        num_pairs: int,
        spec: hashing.HashSpec | hashing.FullSpec,
        dtype: np.dtype[Any],
        threads: int,
    ) -> "Room":
        """`room`, which is of the same table, or another.

        Raises ValueError for more pairs than 31 bits number the blocks of.
        """
        if (2 * num_pairs) << (spec.num_blocks - 1).bit_length() > 2**31:
            raise ValueError(f"{num_pairs} pairs of {spec.num_blocks} blocks are too many for one gradient")
        if (
            room is not None
            and len(room.counts) == threads
            and len(room.ranks) >= num_pairs
            and room.terms.dtype == dtype
        ):
            return room
        return cls.of(num_pairs, spec, dtype, threads)


@njit(inline="always")
def _sort(keys: Any, spare: Any, count: Any, num_bits: Any, high_bits: Any) -> Any:
    """Stable sort of ``keys[:count]`` by the `num_bits` above the lower 32; returns the result.

    A radix sort by the `high_bits` of them, then insertion, which is quick if they leave few in wrong order.
    """
    passes = max(1, -(-high_bits // 11))
    digit = -(-high_bits // passes)
    places = np.empty((1 << digit) + 1, np.int64)
    mask = np.uint64((1 << digit) - 1)
    for p in range(passes):
        shift = np.uint64(32 + max(0, num_bits - (passes - p) * digit))
        places[:] = 0
        for x in range(count):
            places[np.int64((keys[x] >> shift) & mask) + 1] += 1
        for d in range(1, places.shape[0]):
            places[d] += places[d - 1]
        for x in range(count):
            bucket = np.int64((keys[x] >> shift) & mask)
            spare[places[bucket]] = keys[x]
            places[bucket] += 1
        keys, spare = spare, keys
    if high_bits == num_bits:
        return keys
    for x in range(1, count):
        key, y = keys[x], x
        if keys[x - 1] >> cpu._S32 <= key >> cpu._S32:
            continue
        while y > 0 and keys[y - 1] >> cpu._S32 > key >> cpu._S32:
            keys[y] = keys[y - 1]
            y -= 1
        keys[y] = key
    return keys


@njit(inline="always")
def _num_bits(count: Any) -> Any:
    """Bits of the integers below `count`."""
    bits = 0
    while (np.int64(1) << bits) < count:
        bits += 1
    return bits


@njit(inline="always")
def _share(n: Any, t: Any, threads: Any) -> tuple[Any, Any]:
    """The pairs of a thread: whole tiles, so that their order is the same for any number of threads."""
    tiles = (n + cpu._TILE - 1) // cpu._TILE
    return min(tiles * t // threads * cpu._TILE, n), min(tiles * (t + 1) // threads * cpu._TILE, n)


@njit(nogil=True, error_model="numpy")
def _list_share(t: Any, pairs: Any, listed: Any, ranks: Any, threads: Any, table: Any) -> None:
    """List the blocks of the thread's pairs, where they start and their codes; clear their ranks."""
    blocks = table.num_blocks
    block_bits = _num_bits(blocks)
    keys, places, signs = cpu._tile_memory(table)
    begin, end = _share(pairs.shape[0], t, threads)
    ranks[begin:end] = -1
    x = 2 * begin * blocks
    for low in range(begin, end, cpu._TILE):
        tile = min(cpu._TILE, end - low)
        cpu._find(table, pairs, low, low + tile, keys, places, signs, 0)
        for side in range(2):
            for b in range(blocks):
                for i in range(tile):
                    row = cpu._row(table, pairs, low + i, side)
                    # Rows of a full table are sorted as such, to save passes.
                    start = row if table.num_starts == 0 else places[side, b, i]
                    code = ((2 * (low + i) + side) << block_bits) | b
                    listed[x] = (np.uint64(start) << cpu._S32) | np.uint64(code)
                    x += 1


@njit(inline="always")
def _decode(entry: Any, block_bits: Any) -> tuple[Any, Any, Any]:
    """Pair, side and block of a listed block."""
    code = np.int64(entry & np.uint64(0xFFFFFFFF))
    return code >> (block_bits + 1), (code >> block_bits) & 1, code & ((1 << block_bits) - 1)


@njit(nogil=True)
def _cut(cuts: Any, listed: Any, units: Any) -> None:
    """Cut the pool into slices that about as many blocks start in."""
    threads = cuts.shape[0] - 1
    # Odd, to come by blocks of both sides and of all numbers.
    stride = max(1, listed.shape[0] // (_SAMPLES * threads)) | 1
    samples = np.sort(listed[::stride] >> cpu._S32)
    cuts[0], cuts[threads] = 0, units
    for t in range(1, threads):
        cuts[t] = samples[samples.shape[0] * t // threads] if samples.shape[0] > 0 else units


@njit(inline="always")
def _reach(table: Any) -> Any:
    """Units of a block behind its first."""
    return np.int64(0 if table.num_starts == 0 else table.block_size - 1)


@njit(inline="always")
def _lowest(low_unit: Any, table: Any) -> Any:
    """From where on blocks are looked at for a slice: whether those reaching in overlap one before counts."""
    return max(low_unit - 2 * _reach(table), 0)


@njit(nogil=True, error_model="numpy")
def _sort_share(
    t: Any, listed: Any, is_whole: Any, ranks: Any, keys: Any, cuts: Any, counts: Any, table: Any
) -> None:
    """Sort the blocks that reach into the thread's slice of the pool, and leave those that overlap others.

    If `is_whole`, all are left. A last block that is read short counts as a whole one: to sum one more is
    cheaper than to look how long each is.
    """
    low_unit, high_unit = cuts[t], cuts[t + 1]
    reach, lowest = _reach(table), _lowest(low_unit, table)
    ordered, spare = keys[t, 0], keys[t, 1]
    count: Any = 0
    for x in range(listed.shape[0]):
        start = np.int64(listed[x] >> cpu._S32)
        code = listed[x] & np.uint64(0xFFFFFFFF)
        ordered[count] = (np.uint64(start - lowest) << cpu._S32) | code
        count += np.int64((start >= lowest) & (start < high_unit + reach))
    num_bits = high_bits = _num_bits(high_unit - low_unit + 3 * reach)
    if table.num_starts != 0:
        # These tell most hashed places apart, however often rows are used. Frequent rows are neighbours.
        high_bits = min(num_bits, _num_bits(count) + 2)
    ordered = _sort(ordered, spare, count, num_bits, high_bits)
    block_bits = _num_bits(table.num_blocks)
    found: Any = 0
    before_end: Any = -1
    for x in range(count):
        entry = ordered[x]
        start = np.int64(entry >> cpu._S32) + lowest
        end = start + reach + 1
        next_start = np.int64(ordered[x + 1] >> cpu._S32) + lowest if x + 1 < count else end
        if is_whole | (start < before_end) | (next_start < end):
            if start >= low_unit and start < high_unit:
                i, side, b = _decode(entry, block_bits)
                ranks[i, side, b] = 0
            keys[t, 0, found] = entry
            found += np.int64((start < high_unit) & (end > low_unit))
        before_end = end
    counts[t] = found


@njit(parallel=True, cache=True, nogil=True)
def _find_overlapping(
    pairs: Any,
    is_whole: Any,
    ranks: Any,
    keys: Any,
    listed: Any,
    cuts: Any,
    counts: Any,
    units: Any,
    table: Any,
) -> None:
    """Find a room's slices and their blocks; ranks become 0 where terms are wanted: of all, if `is_whole`."""
    # Arrays come one by one: inside parallel loops, Numba drops what is written to those in a tuple.
    threads = counts.shape[0]
    listed = listed[: 2 * pairs.shape[0] * table.num_blocks]  # there may be room for more
    for t in prange(threads):
        _list_share(np.int64(t), pairs, listed, ranks, threads, table)
    _cut(cuts, listed, units)
    for t in prange(threads):
        _sort_share(np.int64(t), listed, is_whole, ranks, keys, cuts, counts, table)
