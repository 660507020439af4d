"""Dropout masks of pairs, hashed from a seed: see `cemb.hashing.PairDropout`.

A mask is uint16 ``[n, mask_width(dim)]``: bit j of row i, from the lowest bit of the first word on, is set
if component j of pair i survives. Where dropout is 0, all bits are set. It is drawn where it is needed, a
tile of pairs at a time: that takes less than to store it for a backward pass would save.
"""

import numpy as np

from cemb.kernels.cpu import simd
from cemb.kernels.cpu.locate import mix
from cemb.kernels.cpu.simd import LANES
from cemb.kernels.cpu.threads import inlined, jit


@inlined
def mask_width(dim):
    """Words of a pair's mask, padded so that bits may be read in words behind the last component."""
    return (dim + LANES - 1) // LANES + 2


@inlined
def mask_bits(dim):
    """Bits from the mask of a pair to that of the next."""
    return LANES * mask_width(dim)


@inlined
def hash_workspace(dim):
    """Workspace of `draw_rows`, uint64 ``[words]``: a hash for every four components."""
    return np.empty(4 * (mask_width(dim) - 2), np.uint64)


@jit()
def draw_rows(dropout_mask, count, hashes, first, batch, dim):
    """Draw the masks of `count` pairs from number `first` on, ``[count * mask_width(dim)]``.

    `batch` is a `cemb.kernels.cpu.pairs.Batch`, `hashes` a `hash_workspace`.
    """
    quads = np.uint64((dim + 3) // 4)
    parts = hashes.view(np.uint16)
    width = mask_width(dim)
    for i in range(count):
        if batch.threshold == 0:
            dropout_mask[i * width : (i + 1) * width] = 0xFFFF
            continue
        key = batch.salt + np.uint64(first + i) * quads
        for g in range(hashes.shape[0]):
            hashes[g] = mix(key + np.uint64(g))
        for w in range(width - 2):
            dropout_mask[i * width + w] = simd.at_least(parts, w * LANES, batch.threshold)
