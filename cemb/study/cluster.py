"""Runs of the study on a Dask cluster, whose workers see the same folders as the study, under the same paths.

A worker starts a process for each run (`cemb.study.worker`), which publishes its result itself, whole or not
at all, where the study looks for it. So a run has the code that is on disk there, whatever its worker
imported before; it ends with its worker; and the worker ends it when the study does. What the result depends
on is compared there with what the study knows, before the run and after it, machines aside: an untimed run
may be of another processor than the study's, and its records and identity say of which.
"""

import asyncio
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from cemb import executors, processes
from cemb.study import records
from cemb.study.grid import Run
from cemb.study.staleness import identity, reached, runs_dir

_LOOK_S = 0.3  # between looks whether a run is still wanted
_END_S = 5  # that a run's process has to end, before it is killed
_ASK_S = 5  # between looks whether there are workers
_WORKERLESS_S = 60

Request = dict[str, Any]


def _described(run: Run) -> Request:
    """A run, and what the study takes its result to depend on, as JSON has it."""
    return {"run": asdict(run), "identity": identity(run), "definitions": reached(run).definitions()}


class Cluster:
    """A Dask cluster that takes runs of a study.

    Args:
        client: of the cluster.
        address: its scheduler's.
    """

    def __init__(self, client: Any, address: str):
        self._client, self._address = client, address
        self.num_threads = sum(number for _, number in executors.worker_threads(client))

    def check(self, runs: list[Run]) -> None:
        """RuntimeError names a worker that does not see the study's folders or whose results would differ."""
        # Of the same notebook, all have the same code.
        asked = list({run.notebook: _described(run) for run in runs}.values())
        with tempfile.NamedTemporaryFile("w", dir=runs_dir(), prefix=".seen-") as seen:
            seen.write(secrets.token_hex())
            seen.flush()
            request = {**_folders(), "look": seen.name, "text": _text(seen.name), "asked": asked}
            found = self._client.run(check_runs, json.dumps(request, default=str), on_error="return")
        refused = {worker: str(why) for worker, why in sorted(found.items()) if why}
        if refused:
            worker, why = next(iter(refused.items()))
            others = f"; nor can {len(refused) - 1} more" if len(refused) > 1 else ""
            raise RuntimeError(f"the Dask worker {worker!r} cannot take runs of this study: {why}{others}")

    def execute(self, run: Run) -> None:
        """Have a worker run a notebook and publish it.

        RuntimeError names the run that failed, or that four workers died of; ConnectionError says that the
        scheduler ended, or that there has been no worker for a minute.
        """
        from distributed.scheduler import KilledWorker

        request = json.dumps({**_folders(), "asked": [_described(run)]}, default=str)
        key = f"{run.name}-{secrets.token_hex(8)}"
        future = self._client.submit(execute_run, run.name, request, key=key, retries=0)
        seen = time.monotonic()
        while True:
            try:
                return future.result(timeout=_ASK_S)  # type: ignore[no-any-return]
            except TimeoutError:
                if executors.worker_threads(self._client):
                    seen = time.monotonic()
                elif time.monotonic() - seen > _WORKERLESS_S:
                    raise ConnectionError(
                        f"{run.name} waits for a worker, and the Dask cluster at {self._address!r} has had "
                        f"none for {_WORKERLESS_S} s"
                    ) from None
            except KilledWorker as error:
                raise RuntimeError(
                    f"{run.name} failed: {error.allowed_failures + 1} workers died while they ran it, the "
                    f"last at {error.last_worker.address!r}"
                ) from None
            except CancelledError:
                raise ConnectionError(
                    f"{run.name} was cancelled: the Dask scheduler at {self._address!r} ended, or lost it"
                ) from None


@contextmanager
def connect(address: str, runs: list[Run]) -> Iterator[Cluster]:
    """The Dask cluster at an address, to run some of a study; what is not finished at the end is ended there.

    Raises what `cemb.executors.cluster_client` and `Cluster.check` do.
    """
    with executors.cluster_client(address) as client:
        # What it would log, with tracebacks, is said in one line of an error.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        cluster = Cluster(client, address)
        cluster.check(runs)
        yield cluster


def _folders() -> Request:
    return {"results": str(records.results_dir().absolute())}


def _text(path: str) -> str:
    with open(path, encoding="utf-8") as file:  # noqa: PTH123  a temporary file's name
        return file.read()


async def check_runs(request: str) -> str | None:
    """On a worker: why it cannot take runs like those asked for; None if it can."""
    # A thread, for the worker's own has to answer the scheduler meanwhile.
    return await asyncio.to_thread(_run_process, "looking", request)


def execute_run(name: str, request: str) -> None:
    """On a worker: do the run that is asked for, as long as it is. RuntimeError if that fails."""
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()

    def is_wanted() -> bool:
        # A task that was cancelled, or whose scheduler is gone, goes on: Dask cannot end a thread.
        task = worker.state.tasks.get(key)
        is_closing = worker.status.name in ("closing", "closed", "failed")
        return task is not None and task.state != "cancelled" and not is_closing

    if why := _run_process(name, request, is_wanted):
        raise RuntimeError(f"{why} (on the Dask worker {worker.address!r})")


def _run_process(name: str, request: str, is_wanted: Callable[[], bool] = lambda: True) -> str | None:
    """What went wrong in a process that does what is asked for, which has a name; None if nothing did."""
    # From a file: of what a pipe does not hold, `communicate` forgets the rest when its time is over.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as given:
        given.write(request)
        given.seek(0)
        process = subprocess.Popen(
            # As in the notebook's kernel, cemb is not that of the working directory.
            [sys.executable, "-P", "-m", "cemb.study.worker"],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **executors.SINGLE_THREAD, "TQDM_DISABLE": "1"},
            preexec_fn=processes.end_with_parent,
        )
    with process:
        try:
            while True:
                try:
                    out, errors = process.communicate(timeout=_LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    if not is_wanted():
                        return f"{name} was ended: nobody waits for it"
        finally:
            _end(process)
    try:
        why: str | None = json.loads(out.splitlines()[-1])
        return why
    except (ValueError, IndexError):
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        return f"{name} failed: its process of {sys.executable} ended with {process.returncode}: {last}"


def _end(process: subprocess.Popen[str]) -> None:
    """End a process, which ends those below it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
