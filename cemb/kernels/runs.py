"""Gradients of pair scores in pieces: which blocks of a batch stand alone, and the sums of all others.

Most blocks that a batch touches in a large table overlap no other. The gradient of such a block is its
partner's values times a factor, so an optimizer can update it in passing, see `cemb.kernels.updates`; only
the others have to be sorted and summed first, into `Runs`.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from cemb import hashing
from cemb.kernels import cpu, lanes

_CELL_BITS = 4  # 16 values of a pool share a mark; of a full table, a row does
_WORD_BITS = 5  # 32 marks to a word, of two bits each: whether one block lies there, and whether more do
_SPARE = 8  # words for what a thread is not to mark: a cache line


@njit(inline="always")
def _cells(table, row, place, length):
    """First and last cell of a block."""
    if table.num_starts == 0:
        return row, row
    return place >> _CELL_BITS, (place + length - 1) >> _CELL_BITS


@njit(inline="always")
def _most_cells(table, length):
    """The most cells a block of this length lies in."""
    if table.num_starts == 0:
        return 1
    return ((length - 2) >> _CELL_BITS) + 2


@njit(inline="always")
def _is_alone(marks, first, last, most):
    """Whether no other block lies in these cells."""
    several = np.uint64(0)
    for c in range(most):
        cell = min(first + c, last)
        several |= marks[cell >> _WORD_BITS] >> np.uint64(2 * (cell & 31) + 1)
    return several & np.uint64(1) == 0


@njit(parallel=True, cache=True, nogil=True)
def _mark(pairs, marks, words, threads, table, word_offset, context_offset):
    n = pairs.shape[0]
    for t in prange(threads):
        low_word, high_word, spare = words * t // threads, words * (t + 1) // threads, words + _SPARE * t
        marks[low_word:high_word] = 0
        keys = np.zeros((2, cpu._TILE), np.uint64)
        places = np.empty((2, table.num_blocks, cpu._TILE), np.int64)
        signs = np.ones((2, table.num_blocks, cpu._TILE), np.int64)
        for low in range(0, n, cpu._TILE):
            tile = min(cpu._TILE, n - low)
            cpu._find(pairs, keys, places, signs, low, low + tile, table, word_offset, context_offset)
            for side in range(2):
                offset = np.int64(context_offset if side else word_offset)
                for b in range(table.num_blocks):
                    length = cpu._block_length(table, b)
                    most = _most_cells(table, length)
                    for i in range(tile):
                        first, last = _cells(table, pairs[low + i, side] + offset, places[side, b, i], length)
                        for c in range(most):
                            word = (first + c) >> _WORD_BITS
                            # No branch, since none could be predicted.
                            is_own = (word >= low_word) & (word < high_word) & (first + c <= last)
                            word = word if is_own else spare
                            shift = np.uint64(2 * ((first + c) & 31))
                            old = marks[word]
                            one_before = (old >> shift) & np.uint64(1)
                            marks[word] = old | ((np.uint64(1) + one_before + one_before) << shift)


class Runs(NamedTuple):
    """A gradient as runs of consecutive values of a pool, none overlapping, ascending within a thread.

    Thread t has ``counts[t]`` runs. Run r of it starts at ``starts[t, r]`` in the pool, and its values are
    ``values[offsets[t, r]:offsets[t, r + 1]]``.
    """

    values: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray


@njit(inline="always")
def _sort(keys, spare, count, num_bits):
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
            d = np.int64((keys[x] >> shift) & mask)
            spare[places[d]] = keys[x]
            places[d] += 1
        keys, spare = spare, keys
    return keys


@njit(inline="always")
def _num_bits(count):
    """Bits of the integers below `count`."""
    bits = 0
    while (np.int64(1) << bits) < count:
        bits += 1
    return bits


@njit(parallel=True, cache=True, nogil=True, fastmath=cpu._FAST)
def _pair_runs(
    weight,
    pairs,
    kept,
    factors,
    values,
    all_starts,
    all_offsets,
    counts,
    keys,
    marks,
    is_whole,
    table,
    word_offset,
    context_offset,
):
    # Arrays come one by one: inside parallel loops, Numba drops what is written to those in a tuple.
    n, blocks = pairs.shape[0], table.num_blocks
    block_bits = _num_bits(blocks)
    # Rows of a full table are sorted as such, to save passes.
    unit = np.int64(table.dim if table.num_starts == 0 else 1)
    units = weight.shape[0] // unit
    # Blocks that reach into a slice from before it keep their order too.
    reach = np.int64(0 if table.num_starts == 0 else table.block_size - 1)
    threads = counts.shape[0]
    for t in prange(threads):
        low_end, high_end = units * t // threads * unit, units * (t + 1) // threads * unit
        sorted_keys, spare = keys[t, 0], keys[t, 1]
        tile_keys = np.zeros((2, cpu._TILE), np.uint64)
        places, signs = np.empty((2, cpu._TILE), np.int64), np.ones((2, cpu._TILE), np.int64)
        count = 0
        for low in range(0, n, cpu._TILE):
            tile = min(cpu._TILE, n - low)
            for i in range(tile):
                tile_keys[0, i] = cpu._key(table, pairs[low + i, 0], word_offset)
                tile_keys[1, i] = cpu._key(table, pairs[low + i, 1], context_offset)
            for side in range(2):
                offset = np.int64(context_offset if side else word_offset)
                for b in range(blocks):
                    length = cpu._block_length(table, b)
                    most = _most_cells(table, length)
                    cpu._hash_tile(tile_keys[side], b, places[side], signs[side], table)
                    for i in range(tile):
                        place = places[side, i]
                        first, last = _cells(table, pairs[low + i, side] + offset, place, length)
                        relative = first - low_end // unit if unit > 1 else place - low_end + reach
                        code = ((2 * (low + i) + side) << block_bits) | b
                        sorted_keys[count] = (np.uint64(relative) << cpu._S32) | np.uint64(code)
                        # No branch, since none could be predicted.
                        is_wanted = (place < high_end) & (place + length > low_end)
                        if not is_whole:
                            is_wanted &= not _is_alone(marks, first, last, most)
                        count += np.int64(is_wanted)
        sorted_keys = _sort(sorted_keys, spare, count, _num_bits((high_end - low_end + reach) // unit))
        found = np.empty((cpu._TILE, 2), np.int64)  # pair and block
        starts, offsets = all_starts[t], all_offsets[t]
        used = values.shape[0] * t // threads
        run, end, base = 0, np.int64(-1), np.int64(0)
        for low in range(0, count, cpu._TILE):
            tile = min(cpu._TILE, count - low)
            for x in range(tile):
                code = np.int64(sorted_keys[low + x] & np.uint64(0xFFFFFFFF))
                b, side, i = (
                    code & ((1 << block_bits) - 1),
                    (code >> block_bits) & 1,
                    code >> (block_bits + 1),
                )
                found[x, 0], found[x, 1] = i, b
                own, other = (context_offset, word_offset) if side else (word_offset, context_offset)
                # A full table has but block 0.
                tile_keys[0, x] = cpu._key(table, pairs[i, side], own) + np.uint64(b)
                tile_keys[1, x] = cpu._key(table, pairs[i, 1 - side], other) + np.uint64(b)
            cpu._hash_tile(tile_keys[0], 0, places[0], signs[0], table)
            cpu._hash_tile(tile_keys[1], 0, places[1], signs[1], table)
            for x in range(tile):
                cpu._prefetch_run(weight, places[1, x], cpu._block_length(table, found[x, 1]))
            for x in range(tile):
                i, b, place, partner = found[x, 0], found[x, 1], places[0, x], places[1, x]
                length = cpu._block_length(table, b)
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
                    old = cpu._mask(overlap - k) & mask
                    lanes.append_scaled(
                        values, base + place + k, weight, partner + k, factor, bits, old, mask
                    )
                end = max(end, place + length)
                used = base + end
        offsets[run] = used
        counts[t] = run


class Room(NamedTuple):
    """Memory for runs and for sorting them, kept from step to step. What is not touched costs nothing."""

    runs: Runs
    keys: np.ndarray

    @classmethod
    def of(
        cls, num_pairs: int, spec: hashing.HashSpec | hashing.FullSpec, dtype: np.dtype, threads: int
    ) -> "Room":
        blocks = 2 * num_pairs * spec.num_blocks
        runs = Runs(
            np.empty(threads * 2 * num_pairs * spec.embedding_dim, dtype),
            np.empty((threads, blocks + 1), np.int64),
            np.empty((threads, blocks + 1), np.int64),
            np.zeros(threads, np.int64),
        )
        return cls(runs, np.empty((threads, 2, blocks + 1), np.uint64))

    def fits(self, num_pairs: int, spec: hashing.HashSpec | hashing.FullSpec, threads: int) -> bool:
        return (
            len(self.runs.counts) == threads
            and self.runs.starts.shape[1] > 2 * num_pairs * spec.num_blocks
            and len(self.runs.values) >= threads * 2 * num_pairs * spec.embedding_dim
        )


def num_marks(spec: hashing.HashSpec | hashing.FullSpec, threads: int) -> int:
    """Words of memory that `mark` needs."""
    cells = spec.num_embeddings if spec.num_starts == 0 else (spec.pool_size >> _CELL_BITS) + 1
    return (cells >> _WORD_BITS) + 1 + _SPARE * threads


def mark(
    pairs: np.ndarray, spec: hashing.HashSpec | hashing.FullSpec, context_offset: int, marks: np.ndarray
) -> None:
    """Note in `marks`, of `num_marks` uint64, where blocks of the pairs lie, and where several do."""
    with cpu._launch:
        threads = cpu._set_threads()
        words = len(marks) - _SPARE * threads
        _mark(pairs, marks, words, threads, *cpu._pair_constants(spec, context_offset))


def pair_runs(
    weight: np.ndarray,
    pairs: np.ndarray,
    kept: np.ndarray,
    factors: np.ndarray,
    spec: hashing.HashSpec | hashing.FullSpec,
    context_offset: int,
    room: Room | None,
    marks: np.ndarray | None = None,
) -> Room:
    """The gradient of ``Σ factors[i] · score[i]``, before dropout's scale, as runs in `room`.

    Given `marks`, without the blocks that stand alone. Each thread sorts the blocks that lie in its slice of
    the pool and sums them in order, so that the gradient is deterministic for any number of threads. Returns
    `room`, or a larger one.

    Raises ValueError for more pairs than 32 bits number the blocks of.
    """
    with cpu._launch:
        threads = cpu._set_threads()
        if (2 * len(pairs)) << (spec.num_blocks - 1).bit_length() > 2**32:
            raise ValueError(f"{len(pairs)} pairs of {spec.num_blocks} blocks are too many for one gradient")
        if room is None or not room.fits(len(pairs), spec, threads):
            room = Room.of(len(pairs), spec, weight.dtype, threads)
        selection = (np.empty(0, np.uint64), True) if marks is None else (marks, False)
        constants = cpu._pair_constants(spec, context_offset)
        _pair_runs(weight, pairs, kept, factors, *room.runs, room.keys, *selection, *constants)
        return room
