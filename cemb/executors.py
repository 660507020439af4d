"""Where work runs besides this process: on processes of this machine, and on a Dask cluster."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from cemb.checks import check_integers
from cemb.processes import end_with_parent

# The environment of a process whose libraries shall keep to one thread, from its start on.
SINGLE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
_ANSWER_S = 5


@contextmanager
def process_executor(workers: int | None = None) -> Iterator[tuple[Executor, int]]:
    """An executor of processes of this machine, by default as many as it has processors, and their number."""
    check_integers(1, workers=workers)
    workers = workers or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent) as pool:
        yield pool, workers


def worker_threads(client: Any) -> list[tuple[str, int]]:
    """Host and number of threads of each worker of a Dask cluster."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return [(worker["host"], worker["nthreads"]) for worker in workers]


@contextmanager
def cluster_client(address: str) -> Iterator[Any]:
    """A client of the Dask cluster at `address`, which has workers. Needs the package `distributed`.

    Raises:
        ConnectionError: nothing answers there within five seconds, or the cluster has no workers.
        RuntimeError: `distributed` is not installed.
    """
    try:
        from distributed import Client
    except ImportError:
        raise RuntimeError(
            f"a Dask scheduler was named, {address!r}, and the package distributed is not installed"
        ) from None
    try:
        client = Client(address, timeout=_ANSWER_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at {address!r} within {_ANSWER_S} s ({error})"
        ) from error
    with client:
        if not worker_threads(client):
            raise ConnectionError(f"the Dask cluster at {address!r} has no workers")
        yield client


@contextmanager
def cluster_executor(address: str) -> Iterator[tuple[Executor, int]]:
    """An executor on the Dask cluster at `address`, and how many of its threads share a machine's memory.

    Its workers must have this package, and see the folders counted from and to under the same paths. Tasks of
    workers that die are run again, three times at most. Raises what `cluster_client` does.
    """
    with cluster_client(address) as client:
        threads: dict[str, int] = {}
        for host, number in worker_threads(client):
            threads[host] = threads.get(host, 0) + number
        yield client.get_executor(retries=3), max(threads.values())
