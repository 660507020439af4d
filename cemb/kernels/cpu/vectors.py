"""Kernels that score pairs of vectors, with dropout on both."""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import prange

from cemb.kernels.checks import check_array
from cemb.kernels.cpu import simd
from cemb.kernels.cpu.dropout import draw_rows, hash_workspace, mask_width
from cemb.kernels.cpu.pairs import Batch
from cemb.kernels.cpu.threads import FASTMATH, jit, launch, parallel


@jit(fastmath=FASTMATH)
def _score_chunk(t, num_threads, vectors, batch, scores):
    """Write the scores of the thread's pairs."""
    n, dim = vectors.shape[0], vectors.shape[2]
    mask, hashes = np.empty(mask_width(dim), np.uint16), hash_workspace(dim)
    ones, factors = np.ones(dim, scores.dtype), np.empty(dim, scores.dtype)
    for i in range(n * t // num_threads, n * (t + 1) // num_threads):
        draw_rows(mask, 1, hashes, i, batch, dim)
        simd.copy_scaled(factors, 0, ones, 0, batch.scale, (mask, 0), dim)
        total = scores.dtype.type(0)
        for j in range(dim):
            total += factors[j] * vectors[i, 0, j] * vectors[i, 1, j]
        scores[i] = total


@jit()
def _gradient_chunk(t, num_threads, vectors, batch, out):
    """Write the gradient of the thread's pairs."""
    n, dim = vectors.shape[0], vectors.shape[2]
    mask, hashes = np.empty(mask_width(dim), np.uint16), hash_workspace(dim)
    for i in range(n * t // num_threads, n * (t + 1) // num_threads):
        draw_rows(mask, 1, hashes, i, batch, dim)
        for side in range(2):
            factor = batch.slopes[i] * batch.scale
            simd.copy_scaled(out[i, side], 0, vectors[i, 1 - side], 0, factor, (mask, 0), dim)


@parallel
def _score(num_threads, vectors, batch, scores):
    """`score`, a chunk of the pairs a thread."""
    for t in prange(num_threads):
        _score_chunk(np.int64(t), num_threads, vectors, batch, scores)


@parallel
def _gradient(num_threads, vectors, batch, out):
    """`gradient`, a chunk of the pairs a thread."""
    for t in prange(num_threads):
        _gradient_chunk(np.int64(t), num_threads, vectors, batch, out)


def score(vectors: npt.NDArray[Any], batch: Batch, scores: npt.NDArray[Any]) -> None:
    """Write the dot products of `vectors` ``[n, 2, dim]``, float32 or float64, into `scores` ``[n]``.

    Of the batch, dropout counts. Deterministic for any number of threads, as is the gradient.
    """
    n, dim = len(vectors), vectors.shape[-1]
    check_array("vectors", vectors, (n, 2, dim), np.float32, np.float64)
    check_array("scores", scores, (n,), vectors.dtype)
    with launch() as num_threads:
        _score(num_threads, vectors, batch, scores)


def gradient(vectors: npt.NDArray[Any], batch: Batch, out: npt.NDArray[Any]) -> None:
    """Write the gradient of ``Σ slopes[i] · score[i]`` into `out` ``[n, 2, dim]``."""
    n, dim = len(vectors), vectors.shape[-1]
    check_array("vectors", vectors, (n, 2, dim), np.float32, np.float64)
    check_array("slopes", batch.slopes, (n,), vectors.dtype)
    check_array("out", out, vectors.shape, vectors.dtype)
    with launch() as num_threads:
        _gradient(num_threads, vectors, batch, out)
