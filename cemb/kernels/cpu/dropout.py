"""Dropout masks of pairs, hashed from a seed: see `cemb.hashing.PairDropout`.

A mask is uint16 ``[n, mask_width(dim)]``: bit j of row i, from the lowest bit of the first word on, is set
if component j of pair i survives. Where dropout is 0, all bits are set.
"""

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from cemb.hashing import PairDropout
from cemb.kernels.cpu import simd
from cemb.kernels.cpu.locate import mix
from cemb.kernels.cpu.simd import LANES, first_lanes
from cemb.kernels.cpu.threads import launch

_last_mask: tuple[tuple[int, ...], npt.NDArray[np.uint16]] = ((), np.empty((0, 0), np.uint16))


@njit(inline="always")
def mask_width(dim):
    """Words of a pair's mask, padded so that `simd.bits_from` may read behind the last component."""
    return (dim + LANES - 1) // LANES + 2


@njit(inline="always")
def hash_workspace(dim):
    """Workspace of `draw_rows`, uint64 ``[words]``: a hash for every four components."""
    return np.empty(4 * (mask_width(dim) - 2), np.uint64)


@njit(inline="always")
def draw_rows(dropout_mask, hashes, first, dim, salt, threshold):
    """Draw the rows of `dropout_mask`, those of the pairs from `first` on; `hashes` is `hash_workspace`."""
    quads = np.uint64((dim + 3) // 4)
    parts = hashes.view(np.uint16)
    for i in range(dropout_mask.shape[0]):
        if threshold == 0:
            dropout_mask[i] = 0xFFFF
            continue
        key = salt + np.uint64(first + i) * quads
        for g in range(hashes.shape[0]):
            hashes[g] = mix(key + np.uint64(g))
        for w in range(dropout_mask.shape[1] - 2):
            dropout_mask[i, w] = simd.at_least(parts, w * LANES, threshold)


@njit(parallel=True, cache=True, nogil=True)
def _draw(dropout_mask, dim, salt, threshold, num_threads):
    """Draw all rows of `dropout_mask` ``[n, mask_width(dim)]``, a chunk a thread."""
    n = dropout_mask.shape[0]
    for t in prange(num_threads):
        low, high = n * t // num_threads, n * (t + 1) // num_threads
        draw_rows(dropout_mask[low:high], hash_workspace(dim), low, dim, salt, threshold)


def last_or_empty(num_pairs: int, dim: int, dropout: PairDropout) -> tuple[npt.NDArray[np.uint16], bool]:
    """The mask drawn last and True if it is that of the arguments; else an empty mask and False.

    A backward pass wants that of its forward pass. Whoever fills an empty mask hands it to `remember`.
    """
    if _last_mask[0] == (num_pairs, dim, dropout.salt, dropout.threshold):
        return _last_mask[1], True
    return np.empty((num_pairs, mask_width(dim)), np.uint16), False


def remember(dropout_mask: npt.NDArray[np.uint16], dim: int, dropout: PairDropout) -> None:
    """Keep a mask for the next `last_or_empty`."""
    global _last_mask
    _last_mask = ((len(dropout_mask), dim, dropout.salt, dropout.threshold), dropout_mask)


def draw_in_launch(
    num_pairs: int, dim: int, dropout: PairDropout, num_threads: int
) -> npt.NDArray[np.uint16]:
    """`draw` for those who hold the lock, on the threads that `launch` gave."""
    dropout_mask, is_drawn = last_or_empty(num_pairs, dim, dropout)
    if not is_drawn:
        _draw(dropout_mask, dim, np.uint64(dropout.salt), dropout.threshold, num_threads)
        remember(dropout_mask, dim, dropout)
    return dropout_mask


def draw(num_pairs: int, dim: int, dropout: PairDropout) -> npt.NDArray[np.uint16]:
    """The dropout mask, uint16 ``[num_pairs, mask_width(dim)]``; the same for any number of threads."""
    with launch() as num_threads:
        return draw_in_launch(num_pairs, dim, dropout, num_threads)


@njit(inline="always")
def expand_mask(factors, dropout_mask, factor, ones):
    """Write to `factors` ``[dim]``: `factor` where the mask's bit is set, else 0; `ones` are `LANES` of 1."""
    dim = factors.shape[0]
    for k in range(0, dim, LANES):
        bits = simd.bits_from(dropout_mask, k)
        simd.append_scaled(factors, k, ones, 0, factor, bits, 0, first_lanes(dim - k))


def release_memory() -> None:
    """Free the mask drawn last."""
    global _last_mask
    with launch():
        _last_mask = ((), np.empty((0, 0), np.uint16))
