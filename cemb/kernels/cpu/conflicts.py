"""Conflicts of a batch: blocks that overlap other blocks of it, whose gradients have to be summed.

Most blocks that a batch reads from a large table conflict with no other. The gradient of such a block is its
partner's values times a factor, so an optimizer updates it in the pass that scores it, see
`cemb.kernels.cpu.updates`. The gradients of the others, the terms, are written out and summed first. Blocks
sorted by where they start show their conflicts. Each thread sorts the blocks of a slice of the pool, and sums
them in that order, so that sums are the same for any number of threads, and wherever slices end.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cemb.hashing import Spec
from cemb.kernels.cpu.locate import S32, TILE, find_tile, row_of, tile_workspace
from cemb.kernels.cpu.threads import inlined, jit, scratch

_SAMPLES = 256  # blocks per thread whose starts decide where slices are cut


class Workspace(NamedTuple):
    """Workspace for the blocks of a batch.

    Thread t has the slice of the pool from ``cuts[t]`` to ``cuts[t + 1]``, in units: values, or rows of a
    full table. It sums the conflicting blocks ``keys[t, 0, :counts[t]]``, sorted. The upper 32 bits of an
    entry or a key are the unit where the block starts, in keys counted from `first_listed`; the lower ones
    are its code, see `decode`. Term r is ``terms[r * block_size : (r + 1) * block_size]``.
    """

    terms: npt.NDArray[Any]  # float32 or float64 [blocks of the batch * block_size]
    ranks: npt.NDArray[np.int32]  # [pairs, 2, blocks]: number of a block's term; -1 without a conflict
    keys: npt.NDArray[np.uint64]  # [threads, 2, blocks of the batch]; the second row is for sorting
    entries: npt.NDArray[np.uint64]  # [blocks of the batch]
    cuts: npt.NDArray[np.int64]  # [threads + 1]
    counts: npt.NDArray[np.int64]  # [threads]

    @classmethod
    def of(cls, num_pairs: int, spec: Spec, dtype: np.dtype[Any], num_threads: int) -> "Workspace":
        """In scratch memory. Raises ValueError for more pairs than 31 bits number the blocks of."""
        if (2 * num_pairs) << (spec.num_blocks - 1).bit_length() > 2**31:
            raise ValueError(f"{num_pairs} pairs of {spec.num_blocks} blocks are too many for one gradient")
        blocks = 2 * num_pairs * spec.num_blocks
        return cls(
            scratch("terms", (blocks * spec.block_size,), dtype),
            scratch("ranks", (num_pairs, 2, spec.num_blocks), np.int32),
            scratch("keys", (num_threads, 2, blocks), np.uint64),
            scratch("entries", (blocks,), np.uint64),
            np.zeros(num_threads + 1, np.int64),
            np.zeros(num_threads, np.int64),
        )


@inlined
def _sort(keys, spare, count, num_bits, high_bits):
    """Stable sort of uint64 ``keys[:count]`` by the `num_bits` above the lower 32; returns `keys` or `spare`.

    A radix sort by the `high_bits` of them, then insertion, which is quick if these leave few out of order.
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
        if keys[x - 1] >> S32 <= key >> S32:
            continue
        while y > 0 and keys[y - 1] >> S32 > key >> S32:
            keys[y] = keys[y - 1]
            y -= 1
        keys[y] = key
    return keys


@inlined
def bit_length(count):
    """Bits of the integers below `count`."""
    bits = 0
    while (np.int64(1) << bits) < count:
        bits += 1
    return bits


@inlined
def chunk_bounds(n, t, num_threads):
    """Bounds of a thread's chunk: whole tiles, so that entries have one order for any number of threads."""
    tiles = (n + TILE - 1) // TILE
    return min(tiles * t // num_threads * TILE, n), min(tiles * (t + 1) // num_threads * TILE, n)


@jit()
def list_chunk(t, num_threads, pairs, workspace, table):
    """Write the entries of the blocks of the thread's pairs, and set their ranks to -1."""
    ranks, entries, blocks = workspace.ranks, workspace.entries, table.num_blocks
    block_bits = bit_length(blocks)
    keys, places, signs = tile_workspace(table)
    begin, end = chunk_bounds(pairs.shape[0], t, num_threads)
    ranks[begin:end] = -1
    x = 2 * begin * blocks
    for low in range(begin, end, TILE):
        tile = min(TILE, end - low)
        find_tile(table, pairs, low, low + tile, keys, places, signs, 0)
        for side in range(2):
            for b in range(blocks):
                for i in range(tile):
                    row = row_of(table, pairs, low + i, side)
                    # Rows of a full table are sorted by their number, which takes fewer passes.
                    start = row if table.num_starts == 0 else places[side, b, i]
                    code = ((2 * (low + i) + side) << block_bits) | b
                    entries[x] = (np.uint64(start) << S32) | np.uint64(code)
                    x += 1


@inlined
def decode(entry, block_bits):
    """Pair, side and block of an entry or a key."""
    code = np.int64(entry & np.uint64(0xFFFFFFFF))
    return code >> (block_bits + 1), (code >> block_bits) & 1, code & ((1 << block_bits) - 1)


@jit()
def cut(workspace, units):
    """Cut the pool of so many `units` into slices that about as many blocks start in."""
    cuts, entries = workspace.cuts, workspace.entries
    num_threads = cuts.shape[0] - 1
    # Odd, so that samples are of both sides and all blocks.
    stride = max(1, entries.shape[0] // (_SAMPLES * num_threads)) | 1
    samples = entries[::stride].copy()
    samples = _sort(samples, np.empty_like(samples), samples.shape[0], 32, 32) >> S32
    cuts[0], cuts[num_threads] = 0, units
    for t in range(1, num_threads):
        cuts[t] = samples[samples.shape[0] * t // num_threads] if samples.shape[0] > 0 else units


@inlined
def _reach(table):
    """Units of a block behind its first one."""
    return np.int64(0 if table.num_starts == 0 else table.block_size - 1)


@inlined
def first_listed(low_unit, table):
    """First unit whose blocks a slice looks at: those reaching in may conflict with one before them."""
    return max(low_unit - 2 * _reach(table), 0)


@jit()
def sort_chunk(t, workspace, table):
    """Sort the blocks that reach into the thread's slice of the pool; writes conflicting ones to `keys`.

    Their ranks become 0. A short last block counts as a whole one: summing one more is cheaper than finding
    out how long each is.
    """
    _, ranks, keys, entries, cuts, counts = workspace
    low_unit, high_unit = cuts[t], cuts[t + 1]
    reach, lowest = _reach(table), first_listed(low_unit, table)
    ordered, spare = keys[t, 0], keys[t, 1]
    count = 0
    for x in range(entries.shape[0]):
        start = np.int64(entries[x] >> S32)
        code = entries[x] & np.uint64(0xFFFFFFFF)
        ordered[count] = (np.uint64(start - lowest) << S32) | code
        count += np.int64((start >= lowest) & (start < high_unit + reach))
    num_bits = high_bits = bit_length(high_unit - low_unit + 3 * reach)
    if table.num_starts != 0:
        # So many bits tell most hashed places apart, even where rows are used often.
        high_bits = min(num_bits, bit_length(count) + 2)
    ordered = _sort(ordered, spare, count, num_bits, high_bits)
    block_bits = bit_length(table.num_blocks)
    found = 0
    before_end = -1
    for x in range(count):
        entry = ordered[x]
        start = np.int64(entry >> S32) + lowest
        end = start + reach + 1
        next_start = np.int64(ordered[x + 1] >> S32) + lowest if x + 1 < count else end
        if (start < before_end) | (next_start < end):
            if start >= low_unit and start < high_unit:
                i, side, b = decode(entry, block_bits)
                ranks[i, side, b] = 0
            keys[t, 0, found] = entry
            found += np.int64((start < high_unit) & (end > low_unit))
        before_end = end
    counts[t] = found
