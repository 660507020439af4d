"""Launches of the CPU kernels, one at a time, on as many threads as torch uses; pools private to a thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

# Up to this pool size each thread adds into a pool of its own (16 MiB in float32, near the last-level
# cache); above it, clearing and summing private pools costs more than locating every block once per thread.
PRIVATE_POOL_LIMIT = 2**22

_lock = threading.Lock()
_pools: npt.NDArray[Any] = np.empty((0, 0), np.float32)


@contextmanager
def launch() -> Iterator[int]:
    """Hold the lock of the kernels; gives the number of threads to launch on.

    Some of Numba's threading layers must not be entered by two threads at once: `workqueue` aborts.
    """
    with _lock:
        yield _set_threads()


def _set_threads() -> int:
    """Make Numba use as many threads as torch does, as far as it has them; returns their number."""
    import torch  # here, since processes that count words use these kernels' `simd` and no torch

    wanted = torch.get_num_threads()
    num_threads: int = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(num_threads)
    if torch.get_num_threads() != wanted:  # Numba's first launch sets it to all there are
        torch.set_num_threads(wanted)
    return num_threads


def private_pools(number: int, size: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Workspace ``[number, size]``, reused by later calls and not zeroed; for use inside a `launch`."""
    global _pools
    if _pools.shape != (number, size) or _pools.dtype != dtype:
        _pools = np.empty((number, size), dtype)
    return _pools


def release_memory() -> None:
    """Free the private pools."""
    global _pools
    with _lock:
        _pools = np.empty((0, 0), np.float32)
