"""Gradients of pair scores in pieces: which blocks of a batch overlap others, and the sums of those.

Most blocks that a batch touches in a large table overlap no other. The gradient of such a block is its
partner's values times a factor, so an optimizer can update it in passing, see `cemb.kernels.updates`; only
the others have to be summed first, into `Runs`. Which is which shows when all are sorted by where they start.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb import hashing
from cemb.kernels import cpu, lanes


class Runs(NamedTuple):
    """A gradient as runs of consecutive values of a pool, none overlapping, ascending within a thread.

    Thread t has ``counts[t]`` runs. Run r of it starts at ``starts[t, r]`` in the pool, and its values are
    ``values[offsets[t, r]:offsets[t, r + 1]]``.
    """

    values: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


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
def _list_share(t: Any, pairs: Any, listed: Any, overlapping: Any, threads: Any, table: Any) -> None:
    """List the blocks of the thread's pairs, where they start and their codes; clear what is said of them."""
    blocks = table.num_blocks
    block_bits = _num_bits(blocks)
    keys, places, signs = cpu._tile_memory(table)
    begin, end = _share(pairs.shape[0], t, threads)
    overlapping[begin:end] = 0
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


@njit(inline="always")
def _sort_share(
    listed: Any, low_unit: Any, high_unit: Any, is_whole: Any, overlapping: Any, keys: Any, table: Any
) -> tuple[Any, Any]:
    """Sort the blocks that reach into a slice of the pool, and leave those that overlap others.

    Units are values, or rows of a full table. Returns the sorted blocks, and how many there are. Of those
    that start in the slice, `overlapping` is told. A last block that is read short counts as a whole one: to
    sum one more is cheaper than to look how long each is.
    """
    blocks = table.num_blocks
    block_bits = _num_bits(blocks)
    last_length = cpu._block_length(table, blocks - 1)
    reach = np.int64(0 if table.num_starts == 0 else table.block_size - 1)
    # Whether those that reach into the slice overlap one before it must be known.
    lowest = max(low_unit - 2 * reach, 0)
    ordered, spare = keys[0], keys[1]
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
    found: Any = 0
    before_end: Any = -1
    for x in range(count):
        entry = ordered[x]
        start = np.int64(entry >> cpu._S32) + lowest
        end = start + reach + 1
        next_start = np.int64(ordered[x + 1] >> cpu._S32) + lowest if x + 1 < count else end
        if is_whole | (start < before_end) | (next_start < end):
            i, side, b = _decode(entry, block_bits)
            length: Any = 1
            if table.num_starts != 0:
                length = last_length if b == blocks - 1 else table.block_size
            if start >= low_unit and start < high_unit:
                overlapping[i, side, b] = 1
            ordered[found] = entry
            found += np.int64((start < high_unit) & (start + length > low_unit))
        before_end = end
    return ordered, found


# Not fast math: products and sums that are rounded once in whole vectors, and twice at ends, would make what
# comes out depend on where slices end, and with it on the number of threads.
@njit(nogil=True, error_model="numpy")
def _sum_share(
    t: Any,
    weight: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    listed: Any,
    is_whole: Any,
    overlapping: Any,
    values: Any,
    all_starts: Any,
    all_offsets: Any,
    counts: Any,
    keys: Any,
    table: Any,
) -> None:
    # Arrays come one by one: inside parallel loops, Numba drops what is written to those in a tuple.
    blocks = table.num_blocks
    block_bits = _num_bits(blocks)
    unit = np.int64(table.dim if table.num_starts == 0 else 1)
    units = weight.shape[0] // unit
    threads = counts.shape[0]
    low_unit, high_unit = units * t // threads, units * (t + 1) // threads
    low_end, high_end = low_unit * unit, high_unit * unit
    sorted_keys, count = _sort_share(listed, low_unit, high_unit, is_whole, overlapping, keys[t], table)
    last_length = cpu._block_length(table, blocks - 1)
    tile_keys = np.zeros((2, cpu._TILE), np.uint64)
    # Of two tiles: while one is computed, the other's partners are on their way.
    places, next_places = np.empty((2, cpu._TILE), np.int64), np.empty((2, cpu._TILE), np.int64)
    signs, next_signs = np.ones((2, cpu._TILE), np.int64), np.ones((2, cpu._TILE), np.int64)
    starts, offsets = all_starts[t], all_offsets[t]
    used = values.shape[0] * t // threads
    run, end, base = 0, np.int64(-1), np.int64(0)
    for low in range(-cpu._TILE, count, cpu._TILE):
        places, next_places, signs, next_signs = next_places, places, next_signs, signs
        tile, following = min(cpu._TILE, count - low) if low >= 0 else 0, min(low + 2 * cpu._TILE, count)
        for x in range(low + cpu._TILE, following):
            i, side, b = _decode(sorted_keys[x], block_bits)
            for other in range(2):  # the block itself, and its partner; a full table has but block 0
                row = cpu._row(table, pairs, i, side ^ other)
                tile_keys[other, x - low - cpu._TILE] = cpu._key(table, row) + np.uint64(b)
        for other in range(2):
            cpu._hash_tile(tile_keys[other], 0, next_places[other], next_signs[other], table)
        for x in range(cpu._TILE):
            if low + cpu._TILE + x < following:
                cpu._prefetch_run(weight, next_places[1, x], table.block_size)
            if x >= tile:
                continue
            i, side, b = _decode(sorted_keys[low + x], block_bits)
            place, partner = places[0, x], places[1, x]
            length = last_length if b == blocks - 1 else table.block_size
            begin = max(0, low_end - place)
            first, length = b * table.block_size + begin, min(length, high_end - place) - begin
            place, partner = place + begin, partner + begin
            is_new = place > end
            starts[run], offsets[run] = place, used
            base = used - place if is_new else base
            run += is_new
            overlap = 0 if is_new else end - place
            factor = factors[i] * (signs[0, x] * signs[1, x])
            row, into, unpaired = kept[i], base + place, cpu._unpaired(length)
            if unpaired:
                mask = cpu._mask(length)
                bits = lanes.bits_from(row, first) & mask
                if overlap > 0:
                    old = cpu._mask(overlap) & mask
                    lanes.append_scaled(values, into, weight, partner, factor, bits, old, mask)
                else:  # no load, which would wait for the store before
                    lanes.append_scaled(values, into, weight, partner, factor, bits, 0, mask)
            for k in range(unpaired, length - cpu._LANES, 2 * cpu._LANES):
                step = min(cpu._LANES, length - cpu._LANES - k)
                bits, after = lanes.bits_from(row, first + k), lanes.bits_from(row, first + k + step)
                if overlap > k:
                    old, old_after = cpu._mask(overlap - k), cpu._mask(overlap - k - step)
                    lanes.append_scaled_two(
                        values, into + k, weight, partner + k, factor, bits, old, step, after, old_after
                    )
                else:
                    lanes.append_scaled_two(
                        values, into + k, weight, partner + k, factor, bits, 0, step, after, 0
                    )
            end = max(end, place + length)
            used = base + end
    offsets[run] = used
    counts[t] = run


@njit(parallel=True, cache=True, nogil=True)
def _sum_overlapping(
    weight: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    listed: Any,
    is_whole: Any,
    overlapping: Any,
    values: Any,
    all_starts: Any,
    all_offsets: Any,
    counts: Any,
    keys: Any,
    table: Any,
) -> None:
    threads = counts.shape[0]
    listed = listed[: 2 * pairs.shape[0] * table.num_blocks]  # there may be room for more
    for t in prange(threads):
        _list_share(np.int64(t), pairs, listed, overlapping, threads, table)
    for t in prange(threads):
        _sum_share(
            np.int64(t),
            weight,
            pairs,
            kept,
            factors,
            listed,
            is_whole,
            overlapping,
            values,
            all_starts,
            all_offsets,
            counts,
            keys,
            table,
        )


class Room(NamedTuple):
    """Memory for `pair_runs`, kept from step to step. What is not touched costs nothing."""

    runs: Runs
    keys: npt.NDArray[np.uint64]
    overlapping: npt.NDArray[np.uint8]  # uint8 [pairs, 2, blocks]: which blocks overlap others
    listed: npt.NDArray[np.uint64]

    @classmethod
    def of(
        cls, num_pairs: int, spec: hashing.HashSpec | hashing.FullSpec, dtype: np.dtype[Any], threads: int
    ) -> "Room":
        blocks = 2 * num_pairs * spec.num_blocks
        runs = Runs(
            np.empty(threads * 2 * num_pairs * spec.embedding_dim, dtype),
            np.empty((threads, blocks + 1), np.int64),
            np.empty((threads, blocks + 1), np.int64),
            np.zeros(threads, np.int64),
        )
        return cls(
            runs,
            np.empty((threads, 2, blocks + 1), np.uint64),
            np.empty((num_pairs, 2, spec.num_blocks), np.uint8),
            np.empty(blocks, np.uint64),
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
        """`room`, which is of the same table, or a larger one; raises ValueError as `pair_runs`."""
        if (2 * num_pairs) << (spec.num_blocks - 1).bit_length() > 2**32:
            raise ValueError(f"{num_pairs} pairs of {spec.num_blocks} blocks are too many for one gradient")
        if room is not None and len(room.runs.counts) == threads and len(room.overlapping) >= num_pairs:
            return room
        return cls.of(num_pairs, spec, dtype, threads)


def pair_runs(
    weight: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    kept: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    spec: hashing.HashSpec | hashing.FullSpec,
    context_offset: int,
    room: Room | None,
) -> Room:
    """The gradient of ``Σ factors[i] · score[i]``, before dropout's scale, as runs in `room`.

    Each thread sorts the blocks that lie in its slice of the pool and sums them in order, so that the
    gradient is deterministic for any number of threads. Returns `room`, or a larger one for the same table.

    Raises ValueError for more pairs than 32 bits number the blocks of.
    """
    with cpu._launch:
        room = Room.fitting(room, len(pairs), spec, weight.dtype, cpu._set_threads())
        gradient, keys, overlapping, listed = room
        batch = (weight, pairs, kept, factors, listed, True, overlapping)
        _sum_overlapping(*batch, *gradient, keys, cpu.Geometry.of(spec, context_offset))
        return room
