"""Gradients of pair scores in pieces: which blocks of a batch stand alone, and the sums of all others.

Most blocks that a batch touches in a large table overlap no other. The gradient of such a block is its
partner's values times a factor, so an optimizer can update it in passing, see `cemb.kernels.updates`; only
the others have to be sorted and summed first, into `Runs`.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb import hashing
from cemb.kernels import cpu, lanes

_MARKS_PER_WORD = 8  # of two bits each: whether a block starts in this cell of the table, and whether more do
_LOWER_BITS = np.uint16(0x5555)
_MARGIN = 1  # cell before the first, and after the last, where nothing starts


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
def _sort(keys: Any, spare: Any, count: Any, num_bits: Any) -> Any:
    """Stable radix sort of ``keys[:count]`` by the `num_bits` above the lower 32; returns the result."""
    passes = max(1, -(-num_bits // 11))
    digit = -(-num_bits // passes)
    places = np.empty((1 << digit) + 1, np.int64)
    mask = np.uint64((1 << digit) - 1)
    for p in range(passes):
        shift = np.uint64(32 + p * digit)
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
    return keys


@njit(inline="always")
def _num_bits(count: Any) -> Any:
    """Bits of the integers below `count`."""
    bits = 0
    while (np.int64(1) << bits) < count:
        bits += 1
    return bits


def _cell_bits(block_size: int) -> int:
    """Logarithm of the values to a cell, so large that blocks that overlap start in neighbouring ones."""
    return max(4, (block_size - 1).bit_length())


@njit(inline="always")
def _cell(table: Any, cell_bits: Any, row: Any, place: Any) -> Any:
    """The cell that a block starts in; a row of a full table is one."""
    return (row if table.num_starts == 0 else place >> cell_bits) + _MARGIN


@njit(inline="always")
def _share(n: Any, t: Any, threads: Any) -> tuple[Any, Any]:
    """The pairs of a thread: whole tiles, so that their order is the same for any number of threads."""
    tiles = (n + cpu._TILE - 1) // cpu._TILE
    return min(tiles * t // threads * cpu._TILE, n), min(tiles * (t + 1) // threads * cpu._TILE, n)


@njit(nogil=True, error_model="numpy")
def _mark_share(t: Any, pairs: Any, cell_bits: Any, planes: Any, table: Any) -> None:
    """Mark in a plane of the thread's own the cells that blocks of its pairs start in."""
    marks = planes[t]
    marks[:] = 0
    keys, places, signs = cpu._tile_memory(table)
    begin, end = _share(pairs.shape[0], t, planes.shape[0])
    for low in range(begin, end, cpu._TILE):
        tile = min(cpu._TILE, end - low)
        cpu._find(table, pairs, low, low + tile, keys, places, signs)
        for side in range(2):
            for b in range(table.num_blocks):
                for i in range(tile):
                    row = cpu._row(table, pairs, low + i, side)
                    cell = _cell(table, cell_bits, row, places[side, b, i])
                    shift = 2 * (cell % _MARKS_PER_WORD)
                    old = np.int64(marks[cell // _MARKS_PER_WORD])
                    one_before = (old >> shift) & 1
                    marks[cell // _MARKS_PER_WORD] = np.uint16(old | (1 << (shift + one_before)))


@njit(nogil=True, error_model="numpy")
def _list_share(
    t: Any,
    pairs: Any,
    is_whole: Any,
    cell_bits: Any,
    marks: Any,
    alone: Any,
    listed: Any,
    num_listed: Any,
    table: Any,
) -> None:
    blocks = table.num_blocks
    block_bits = _num_bits(blocks)
    # Of the cells where a block that overlaps one could start, all marks but that of the one itself.
    reach = 0 if table.num_starts == 0 else _MARGIN
    others = ((1 << (4 * reach + 2)) - 1) ^ (1 << (2 * reach))
    keys, places, signs = cpu._tile_memory(table)
    found = listed[t]
    count: Any = 0
    begin, end = _share(pairs.shape[0], t, listed.shape[0])
    for low in range(begin, end, cpu._TILE):
        tile = min(cpu._TILE, end - low)
        cpu._find(table, pairs, low, low + tile, keys, places, signs)
        for side in range(2):
            for b in range(blocks):
                for i in range(tile):
                    row, place = cpu._row(table, pairs, low + i, side), places[side, b, i]
                    cell = _cell(table, cell_bits, row, place)
                    is_alone = lanes.bits_from(marks, 2 * (cell - reach)) & others == 0
                    is_listed = np.int64(is_whole | (not is_alone))
                    alone[low + i, side, b] = 1 - is_listed
                    code = ((2 * (low + i) + side) << block_bits) | b
                    start = row if table.num_starts == 0 else place
                    found[count] = (np.uint64(start) << cpu._S32) | np.uint64(code)
                    count += is_listed
    num_listed[t] = count


@njit(parallel=True, cache=True, nogil=True)
def _separate(
    pairs: Any,
    is_whole: Any,
    cell_bits: Any,
    planes: Any,
    alone: Any,
    listed: Any,
    num_listed: Any,
    table: Any,
) -> None:
    """Say in `alone` which blocks overlap no other, and list the rest: where they start, and their codes."""
    threads, words = planes.shape
    if not is_whole:
        for t in prange(threads):
            _mark_share(np.int64(t), pairs, cell_bits, planes, table)
        for t in prange(threads):
            for w in range(words * t // threads, words * (t + 1) // threads):
                merged = planes[0, w]
                for other in range(1, threads):
                    both = merged & planes[other, w] & _LOWER_BITS
                    merged |= planes[other, w] | np.uint16(both << 1)
                planes[0, w] = merged
    for t in prange(threads):
        _list_share(np.int64(t), pairs, is_whole, cell_bits, planes[0], alone, listed, num_listed, table)


@njit(inline="always")
def _decode(entry: Any, block_bits: Any) -> tuple[Any, Any, Any]:
    """Pair, side and block of a listed block."""
    code = np.int64(entry & np.uint64(0xFFFFFFFF))
    return code >> (block_bits + 1), (code >> block_bits) & 1, code & ((1 << block_bits) - 1)


@njit(nogil=True, error_model="numpy", fastmath=cpu._FAST)
def _sum_listed_share(
    t: Any,
    weight: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    listed: Any,
    num_listed: Any,
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
    # Rows of a full table are listed and sorted as such, to save passes.
    unit = np.int64(table.dim if table.num_starts == 0 else 1)
    units = weight.shape[0] // unit
    # Blocks that reach into a slice from before it keep their order too.
    reach = np.int64(0 if table.num_starts == 0 else table.block_size - 1)
    threads = counts.shape[0]
    low_unit, high_unit = units * t // threads, units * (t + 1) // threads
    low_end, high_end = low_unit * unit, high_unit * unit
    sorted_keys, spare = keys[t, 0], keys[t, 1]
    tile_keys = np.zeros((2, cpu._TILE), np.uint64)
    # Of two tiles: while one is computed, the other's partners are on their way.
    places, next_places = np.empty((2, cpu._TILE), np.int64), np.empty((2, cpu._TILE), np.int64)
    signs, next_signs = np.ones((2, cpu._TILE), np.int64), np.ones((2, cpu._TILE), np.int64)
    last_length = cpu._block_length(table, blocks - 1)
    count: Any = 0
    for lister in range(threads):
        for x in range(num_listed[lister]):
            entry = listed[lister, x]
            start = np.int64(entry >> cpu._S32)
            b = np.int64(entry & np.uint64((1 << block_bits) - 1))
            length = last_length if b == blocks - 1 else table.block_size
            relative = start - low_unit + reach
            sorted_keys[count] = (np.uint64(relative) << cpu._S32) | (entry & np.uint64(0xFFFFFFFF))
            count += np.int64((start < high_unit) & (start + (length if unit == 1 else 1) > low_unit))
    sorted_keys = _sort(sorted_keys, spare, count, _num_bits(high_unit - low_unit + reach))
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
            for k in range(0, length, cpu._LANES):
                mask = cpu._mask(length - k)
                bits = lanes.bits_from(kept[i], first + k) & mask
                if overlap > k:
                    old = cpu._mask(overlap - k) & mask
                    lanes.append_scaled(
                        values, base + place + k, weight, partner + k, factor, bits, old, mask
                    )
                else:  # no load, which would wait for the store before
                    lanes.append_scaled(values, base + place + k, weight, partner + k, factor, bits, 0, mask)
            end = max(end, place + length)
            used = base + end
    offsets[run] = used
    counts[t] = run


@njit(parallel=True, cache=True, nogil=True)
def _sum_listed(
    weight: Any,
    pairs: Any,
    kept: Any,
    factors: Any,
    listed: Any,
    num_listed: Any,
    values: Any,
    all_starts: Any,
    all_offsets: Any,
    counts: Any,
    keys: Any,
    table: Any,
) -> None:
    for t in prange(counts.shape[0]):
        _sum_listed_share(
            np.int64(t),
            weight,
            pairs,
            kept,
            factors,
            listed,
            num_listed,
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
    planes: npt.NDArray[np.uint16]
    alone: npt.NDArray[np.uint8]  # uint8 [pairs, 2, blocks]: which blocks overlap no other
    listed: npt.NDArray[np.uint64]
    num_listed: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, num_pairs: int, spec: hashing.HashSpec | hashing.FullSpec, dtype: np.dtype[Any], threads: int
    ) -> "Room":
        blocks = 2 * num_pairs * spec.num_blocks
        cells = spec.num_embeddings if spec.num_starts == 0 else spec.pool_size >> _cell_bits(spec.block_size)
        of_a_thread = 2 * (num_pairs // threads + 2 * cpu._TILE) * spec.num_blocks
        runs = Runs(
            np.empty(threads * 2 * num_pairs * spec.embedding_dim, dtype),
            np.empty((threads, blocks + 1), np.int64),
            np.empty((threads, blocks + 1), np.int64),
            np.zeros(threads, np.int64),
        )
        return cls(
            runs,
            np.empty((threads, 2, blocks + 1), np.uint64),
            np.empty((threads, (cells + 2 * _MARGIN) // _MARKS_PER_WORD + 3), np.uint16),
            np.empty((num_pairs, 2, spec.num_blocks), np.uint8),
            np.empty((threads, of_a_thread), np.uint64),
            np.zeros(threads, np.int64),
        )

    def fits(self, num_pairs: int, threads: int) -> bool:
        """Whether it has room for so many pairs of the table it was made for."""
        return len(self.runs.counts) == threads and len(self.alone) >= num_pairs


def pair_runs(
    weight: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    kept: npt.NDArray[np.uint16],
    factors: npt.NDArray[Any],
    spec: hashing.HashSpec | hashing.FullSpec,
    context_offset: int,
    room: Room | None,
    *,
    is_whole: bool = True,
) -> Room:
    """The gradient of ``Σ factors[i] · score[i]``, before dropout's scale, as runs in `room`.

    Unless `is_whole`, without the blocks that ``room.alone`` then says to overlap no other of the batch. Each
    thread sorts the blocks that lie in its slice of the pool and sums them in order, so that the gradient is
    deterministic for any number of threads. Returns `room`, or a larger one for the same table.

    Raises ValueError for more pairs than 32 bits number the blocks of.
    """
    with cpu._launch:
        threads = cpu._set_threads()
        if (2 * len(pairs)) << (spec.num_blocks - 1).bit_length() > 2**32:
            raise ValueError(f"{len(pairs)} pairs of {spec.num_blocks} blocks are too many for one gradient")
        if room is None or not room.fits(len(pairs), threads):
            room = Room.of(len(pairs), spec, weight.dtype, threads)
        found = (room.listed, room.num_listed)
        table = cpu.Geometry.of(spec, context_offset)
        _separate(pairs, is_whole, _cell_bits(spec.block_size), room.planes, room.alone, *found, table)
        _sum_listed(weight, pairs, kept, factors, *found, *room.runs, room.keys, table)
        return room
