"""How CPU kernels are compiled and launched, and the memory that they reuse.

A kernel is a function of one thread's chunk, ``chunk(t, num_threads, ...)``, called for each t by a loop over
`numba.prange`. A loop changes arrays only through such calls: what it writes itself to arrays in a struct,
Numba drops.
"""

import functools
import os
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from cemb.kernels.cache import cached

# Sums may be reassociated, so that they use vector registers.
FASTMATH = {"reassoc", "nsz", "contract"}

# Loops over threads are not to be fused: each begins when all turns of the one before have ended.
_ONLY_LOOPS = {"prange": True} | dict.fromkeys(
    ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False
)

_lock = threading.Lock()
_scratch = threading.local()
_is_launched = _is_forked = False


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`cemb.kernels.cache.cached` without the GIL.

    Division is numpy's: tests for zero divisors would keep loops from vector registers.
    """
    # Kernels are called by kernels alone, but for loops over threads: wrappers for Python compile as long.
    is_called = bool(options.get("parallel") or options.pop("is_called", False))
    wrappers = {"no_cpython_wrapper": not is_called, "no_cfunc_wrapper": True}
    options = {"nogil": True, "error_model": "numpy", **wrappers, **options}

    return cached(**options)


inlined = numba.njit(inline="always")


def parallel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of loops over `numba.prange`; a forked process runs their turns one after another.

    Threads do not survive a fork, and OpenMP ends a process that asks for them then.
    """
    on_threads = jit(parallel=dict(_ONLY_LOOPS))(function)  # Numba empties it
    name = f"{function.__name__}_serial"  # Numba's files are named after it
    copied = types.FunctionType(function.__code__, function.__globals__, name)
    copied.__qualname__ = name
    serial = jit(is_called=True)(copied)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return (serial if _is_forked else on_threads)(*arguments)

    call.kernels = on_threads, serial  # type: ignore[attr-defined]
    return call


def _after_fork() -> None:
    global _is_forked, _lock
    _is_forked, _lock = _is_launched, threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def launch() -> Iterator[int]:
    """Gives the number of threads to launch on: torch's.

    Python threads may launch at once, but for Numba's layer `workqueue`, which aborts: it has a lock.
    """
    global _is_launched
    with _lock if _is_one_at_a_time() else nullcontext():
        yield _set_threads()
        _is_launched = True


def _set_threads() -> int:
    """Make Numba use as many threads as torch does, as far as it has them; returns their number."""
    import torch  # here, since processes that count words use these kernels' `simd` and no torch

    wanted = torch.get_num_threads()
    num_threads: int = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
    if not _is_forked:
        numba.set_num_threads(num_threads)
        if torch.get_num_threads() != wanted:  # Numba's first launch sets it to all there are
            torch.set_num_threads(wanted)
    return num_threads


def _is_one_at_a_time() -> bool:
    try:
        return bool(numba.threading_layer() == "workqueue")
    except ValueError:  # nothing was launched yet, which decides it
        return True


def scratch(name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of the calling thread's scratch memory, kept from call to call; what it holds is arbitrary.

    It is valid until the thread asks for the same name again. Pages never written take no memory.
    """
    held: dict[str, npt.NDArray[Any]] = _scratch.__dict__
    size = int(np.prod(shape))
    if name not in held or held[name].size < size or held[name].dtype != dtype:
        held[name] = np.empty(size, dtype)
    return held[name][:size].reshape(shape)


def release_memory() -> None:
    """Free the calling thread's scratch memory."""
    _scratch.__dict__.clear()
