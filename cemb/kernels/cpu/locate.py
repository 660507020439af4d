"""Where the rows of a table stand in its pool: the hash of `cemb.hashing`, in Numba.

The hash is computed in uint64 throughout: Numba promotes uint32 arithmetic to uint64 and mixed signed
arithmetic to float64, either of which would send indices wild. A row is known by its key: that of its first
block in the hash; of a full table, the index of its first value. Places are indices into the pool.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cemb import hashing
from cemb.hashing import Spec
from cemb.kernels.checks import check_array
from cemb.kernels.cpu import simd
from cemb.kernels.cpu.simd import LANES
from cemb.kernels.cpu.threads import inlined, jit

_MULTIPLIER_1 = np.uint64(hashing.MULTIPLIER_1)
_MULTIPLIER_2 = np.uint64(hashing.MULTIPLIER_2)
_S27, _S30, _S31, S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
ONE = np.uint64(1)
_LANE = np.uint64(LANES - 1)  # bits of a lane's number
# Products by the first multiplier of each lane's number, after an exclusive or with each number n.
_STEPS = np.array(
    [[(n ^ lane) * hashing.MULTIPLIER_1 % 2**64 for lane in range(LANES)] for n in range(LANES)], np.uint64
)
FIRST = LANES  # of the places in `place_workspace`; those before are overwritten by whole vectors
TILE = 32  # pairs that are located together
# Pairs ahead that are prefetched: of blocks in a cache that cores share, and of blocks in memory.
PREFETCH_NEAR, PREFETCH_FAR = 1, 6
# Up to this pool size each thread adds into a pool of its own (16 MiB in float32, near the last-level
# cache); above it, clearing and summing private pools costs more than locating every block once per thread.
PRIVATE_POOL_LIMIT = 2**22
RING = 2 * TILE - 1  # wraps a slot of `tile_workspace`, which holds two tiles


class Geometry(NamedTuple):
    """What kernels know of a table; `num_starts` is 0 for a full one, whose row i starts at i · dim."""

    dim: int
    block_size: int
    num_blocks: int
    num_starts: np.uint32  # so typed, a product with half of a hash is one instruction, not four
    salt: np.uint64
    sign_mask: np.uint64  # 1 if the table is signed, else 0
    word_offset: np.int64  # added to the row numbers of words, or of ids that come alone
    context_offset: np.int64  # added to those of contexts
    distance: int  # pairs ahead that are prefetched

    @classmethod
    @functools.lru_cache(maxsize=64)  # making one takes a noticeable part of a small step
    def of(cls, spec: Spec, context_offset: int = 0) -> "Geometry":
        return cls(
            spec.embedding_dim,
            spec.block_size,
            spec.num_blocks,
            np.uint32(spec.num_starts),
            np.uint64(spec.salt),
            np.uint64(spec.signed),
            np.uint64(spec.table_offset).astype(np.int64),  # sums wrap, as those of the hash do
            np.uint64(context_offset).astype(np.int64),
            PREFETCH_NEAR if spec.pool_size <= PRIVATE_POOL_LIMIT else PREFETCH_FAR,
        )


def check_pool(name: str, pool: npt.NDArray[Any], spec: Spec, dtype: np.dtype[Any]) -> None:
    """Raise ValueError unless `pool` is ``[pool_size]``, of what kernels read to compute in `dtype`."""
    stored = (dtype,) if dtype == np.float64 else (dtype, np.uint16)
    check_array(name, pool, (spec.pool_size,), *stored)


@inlined
def mix(x):
    """`cemb.hashing.mix` of a uint64."""
    x = (x ^ (x >> _S30)) * _MULTIPLIER_1
    x = (x ^ (x >> _S27)) * _MULTIPLIER_2
    return x ^ (x >> _S31)


@inlined
def row_of(table, pairs, i, side):
    """Row number of the word (side 0) or context (side 1) of pair i, the table's offset included."""
    return pairs[i, side] + (table.context_offset if side else table.word_offset)


@inlined
def key_of(table, row):
    """The key of a row."""
    if table.num_starts == 0:
        return np.uint64(row) * np.uint64(table.dim)
    return np.uint64(row) * np.uint64(table.num_blocks) + table.salt


@inlined
def block_start(table, h):
    """The place of the first value of a block of hash `h`."""
    return np.int64(((h >> S32) * np.uint64(table.num_starts)) >> S32)


@inlined
def locate_block(table, key, b):
    """The place of the first value of block `b` of a row, and its sign, both int64."""
    if table.num_starts == 0:
        return np.int64(key), np.int64(1)
    h = mix(key + np.uint64(b))
    return block_start(table, h), np.int64(1) - np.int64((h & table.sign_mask) << ONE)


@inlined
def block_length(table, b):
    """Values of block `b`, which is short if it is the last and block_size does not divide dim."""
    return min(table.block_size, table.dim - b * table.block_size)


@inlined
def is_single(table):
    """`cemb.hashing.HashSpec.is_single`, of a `Geometry`."""
    return table.block_size == 1 and table.num_starts != 0


@inlined
def place_workspace(dim):
    """Workspace for the places of a pair's values at block size 1, uint32 ``[2, FIRST + dim + padding]``."""
    return np.empty((2, dim + 2 * LANES), np.uint32)


@jit()
def find_places(places, key, table):
    """Write the places of a row's values at block size 1 to ``places[FIRST : FIRST + dim]``.

    All are found before any is used, so that many loads are in flight at once: hashing between them would
    fill the window of instructions that a processor reorders.

    Keys come in aligned groups of `LANES`, which differ in their lowest bits alone. In a group the hash's
    first exclusive or is with one number, and products by its first multiplier are that of lane 0 plus a
    step from `_STEPS`. Groups reach into the rows before and after: their places go into the padding.
    """
    lane = np.int64(key & _LANE)
    group, at = key ^ np.uint64(lane), FIRST - lane
    for _ in range((lane + table.dim + LANES - 1) // LANES):
        mixed = group ^ (group >> _S30)
        row = np.int64(mixed & _LANE)
        simd.finish_hash(places, at, (mixed & ~_LANE) * _MULTIPLIER_1, _STEPS, row, table.num_starts)
        group, at = group + np.uint64(LANES), at + LANES


@inlined
def find_row(places, signs, key, table):
    """`find_places`, and the signs ``[dim]`` of the values, in a signed table."""
    find_places(places, key, table)
    if table.sign_mask:
        for j in range(table.dim):
            signs[j] = np.int64(1) - np.int64((mix(key + np.uint64(j)) & ONE) << ONE)


@inlined
def _hash_tile(keys, b, places, signs, table):
    """Places and signs ``[TILE]`` of block `b` of the rows with `keys` ``[TILE]``, in vector registers."""
    if table.num_starts == 0:
        for i in range(TILE):
            places[i] = np.int64(keys[i])
    else:
        for i in range(TILE):
            h = mix(keys[i] + np.uint64(b))
            places[i] = block_start(table, h)
            signs[i] = np.int64(1) - np.int64((h & table.sign_mask) << ONE)


@jit()
def tile_workspace(table):
    """Keys, uint64 ``[side, TILE]``; places and signs of blocks, int64 ``[side, block, 2 * TILE]``.

    Places are those of two tiles: while one is computed, the next one's values are prefetched.
    """
    return (
        np.zeros((2, TILE), np.uint64),
        np.empty((2, table.num_blocks, 2 * TILE), np.int64),
        np.ones((2, table.num_blocks, 2 * TILE), np.int64),
    )


@jit()
def find_tile(table, pairs, low, high, keys, places, signs, slot):
    """Write places and signs of all blocks of the pairs from `low` to `high` to slots from `slot` on."""
    for i in range(low, high):
        keys[0, i - low] = key_of(table, row_of(table, pairs, i, 0))
        keys[1, i - low] = key_of(table, row_of(table, pairs, i, 1))
    for side in range(2):
        for b in range(table.num_blocks):
            tile_places, tile_signs = places[side, b], signs[side, b]
            _hash_tile(keys[side], b, tile_places[slot : slot + TILE], tile_signs[slot : slot + TILE], table)
