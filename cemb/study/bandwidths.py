"""What the machine's memory allows at best: the bandwidths that a step's floor is made of. CPU only."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import prange

from cemb.kernels.cache import cached
from cemb.kernels.cpu.simd import prefetch_segment
from cemb.kernels.cpu.threads import FASTMATH, launch

_ROW = 100  # values, 400 bytes
_REPEATS = 7


# Loops run over slices, from 0: an index that might be negative keeps LLVM from using vectors.


@cached(parallel=True, nogil=True, fastmath=FASTMATH)
def _stream(array: Any, threads: Any, sums: Any) -> None:
    for t in prange(threads):
        part = array[array.shape[0] * t // threads : array.shape[0] * (t + 1) // threads]
        total = array.dtype.type(0)
        for i in range(part.shape[0]):
            total += part[i]
        sums[t] = total


@cached(parallel=True, nogil=True, fastmath=FASTMATH)
def _rows(array: Any, starts: Any, length: Any, threads: Any, sums: Any) -> None:
    for t in prange(threads):
        part = starts[starts.shape[0] * t // threads : starts.shape[0] * (t + 1) // threads]
        total = array.dtype.type(0)
        for i in range(part.shape[0]):
            prefetch_segment(array, part[min(i + 16, part.shape[0] - 1)], length)
            row = array[part[i] : part[i] + length]
            for k in range(length):
                total += row[k]
        sums[t] = total


@cached(parallel=True, nogil=True, fastmath=FASTMATH)
def _gather(array: Any, places: Any, threads: Any, sums: Any) -> None:
    for t in prange(threads):
        part = places[places.shape[0] * t // threads : places.shape[0] * (t + 1) // threads]
        total = array.dtype.type(0)
        for i in range(part.shape[0]):
            total += array[part[i]]
        sums[t] = total


@cached(parallel=True, nogil=True, fastmath=FASTMATH)
def _add(pools: Any, places: Any, threads: Any) -> None:
    for t in prange(threads):
        part = places[places.shape[0] * t // threads : places.shape[0] * (t + 1) // threads]
        pool = pools[t]
        for i in range(part.shape[0]):
            pool[part[i]] += pool.dtype.type(1)


def _best_s(kernel: Callable[..., object], *arguments: Any) -> float:
    """The shortest of several runs; arguments that are callable are drawn anew for each."""
    best = np.inf
    for _ in range(_REPEATS + 1):  # the first compiles
        drawn = [argument() if callable(argument) else argument for argument in arguments]
        start = time.perf_counter()
        kernel(*drawn)
        best = min(best, time.perf_counter() - start)
    return best


def measure_bandwidths(*, megabytes: int = 400, seed: int = 0) -> dict[str, float]:
    """Bandwidths of this machine with as many threads as torch uses, each the best of several runs.

    Returns:
        ``stream_gb_per_s``, reading a large array in order; ``random_rows_per_s``, rows of 400 bytes of it,
        fresh ones each time, prefetched; ``random_values_per_s``, single values of it;
        ``cached_gathers_per_s``, single values of a 1 MiB pool, near the size of a core's cache;
        ``cached_adds_per_s``, the same added to, each thread in a pool of its own. Places are read from
        memory in order.
    """
    rng = np.random.default_rng(seed)
    large = np.ones(megabytes * 250_000, np.float32)
    small = np.ones(2**18, np.float32)
    places = rng.integers(small.size, size=2**22, dtype=np.uint32)
    far = rng.integers(large.size, size=2**22, dtype=np.uint32)
    num_rows, wanted = large.size // _ROW, min(2**16, megabytes * 250)
    with launch() as threads:
        sums, own = np.empty(threads, np.float32), np.ones((threads, small.size), np.float32)

        def starts() -> npt.NDArray[np.int64]:
            return rng.integers(num_rows, size=wanted) * _ROW

        return {
            "stream_gb_per_s": large.nbytes / _best_s(_stream, large, threads, sums) / 1e9,
            "random_rows_per_s": wanted / _best_s(_rows, large, starts, _ROW, threads, sums),
            "random_values_per_s": places.size / _best_s(_gather, large, far, threads, sums),
            "cached_gathers_per_s": places.size / _best_s(_gather, small, places, threads, sums),
            "cached_adds_per_s": places.size / _best_s(_add, own, places, threads),
        }
