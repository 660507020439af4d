"""The study: runs the notebooks whose results are missing, damaged or stale, see `cemb.study.staleness`.

Runs are published whole, by one rename, and never altered, so an interrupted study goes on where it stopped.
A folder of results has one study at a time.
"""

import json
import math
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cemb import executors, files, processes
from cemb.study import cluster, parameters, records
from cemb.study.grid import NOTEBOOKS, PARAMETERS, Run
from cemb.study.identity import RULE
from cemb.study.staleness import differences, folder_of, identity, reached, runs_dir, why_stale

_DATA = "pmi.ipynb"


def parameters_of(notebook: str) -> type:
    """The dataclass that a notebook builds from its parameters."""
    kind: type = pkgutil.resolve_name(PARAMETERS[notebook])
    return kind


def check_parameters(run: Run) -> None:
    """ValueError if the run sets a parameter that is no field of what its notebook builds from them."""
    parameters.check(parameters_of(run.notebook), run.parameters, run.notebook)


def _notebook_parameters(run: Run) -> dict[str, Any]:
    """A run's parameters as its notebook has them: those that are no variables of its go into ``options``."""
    from papermill import inspect_notebook

    variables = inspect_notebook(str(NOTEBOOKS / run.notebook))
    own = {name: value for name, value in run.parameters.items() if name in variables}
    others = {name: value for name, value in run.parameters.items() if name not in variables}
    return {**own, "options": others}


def execute(run: Run, machine: records.Record | None = None) -> Path:
    """Run one notebook in a kernel of its own and publish it; returns where. `machine` as in `identity`."""
    import nbformat
    import papermill

    content, definitions = identity(run, machine), reached(run).definitions()
    target = folder_of(run, content)
    with files.atomic_directory(target) as work:
        notebook = nbformat.read(NOTEBOOKS / run.notebook, as_version=4)
        heading = notebook.cells[0]
        heading.source = re.sub(r"^# .*", f"# {run.title}", heading.source, count=1)
        found = work / "records.jsonl"
        try:
            papermill.execute_notebook(
                notebook,
                str(work / "run.ipynb"),
                # The kernel works in notebooks/; a relative path keeps this machine's off the page.
                {**_notebook_parameters(run), "records_path": os.path.relpath(found, NOTEBOOKS)},
                # Not `cwd`: for that papermill changes the directory of this whole process, so of two runs
                # side by side one could start its kernel where the other had left.
                resources={"metadata": {"path": str(NOTEBOOKS)}},
                kernel_name="python3",
                progress_bar=False,
                shutdown_kernel="immediate",  # its work is written; waiting for it to tidy up takes seconds
            )
        except papermill.PapermillExecutionError as error:
            kept = records.results_dir() / "local" / "failed" / f"{run.name}.ipynb"
            kept.parent.mkdir(parents=True, exist_ok=True)
            (work / "run.ipynb").replace(kept)
            raise RuntimeError(
                f"{run.name} failed with {error.ename}: {error.evalue}\nthe notebook up to there: {kept}"
            ) from None
        except (RuntimeError, OSError, ValueError, KeyError) as error:  # a kernel that died or is not there
            raise RuntimeError(f"{run.name} failed: {error}") from error
        results = records.read(found) if found.exists() else []
        if not results:
            raise RuntimeError(f"{run.name} wrote no record")
        code = {"code_hash": content["code"], "code_rule": RULE}
        records.write([{**record, **code} for record in results], found)
        if changed := differences(content, identity(run, machine)):
            raise RuntimeError(
                f"{run.name} is not published, for what it depends on changed meanwhile: "
                f"{'; '.join(changed.values())}; run the study again"
            )
        here = records.environment()
        where = {"ran_on": {name: here[name] for name in records.OF_MACHINE}} if machine else {}
        whole = json.dumps({**content, "definitions": definitions, **where}, indent=1, default=str)
        (work / "identity.json").write_text(whole, encoding="utf-8")
        if target.exists():  # damaged: else it would not be run
            shutil.rmtree(target)
    return target


def _num_tables(run: Run) -> int:
    """Tables that a run measures, if it says so: its methods at its ratios, with its seeds."""
    lists = (run.parameters.get(name, [None]) for name in ("methods", "compression_ratios", "seeds"))
    return math.prod(map(len, lists))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def run_study(
    runs: list[Run],
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Bring runs up to date, doing only those that are not.

    The data go first, then the other runs that nobody times, `workers` at a time (by default one per
    processor, at most 4, a thread each), or on the Dask cluster of a `scheduler`, as many as its workers have
    threads (`cemb.study.cluster`). Beside all of these the timed runs' kernels are compiled. The data, for
    which all others wait, are made here, where they have all processors. Timed runs go last, here, one at a
    time and alone. Stops at the first failure, keeping what is finished.
    """
    if scheduler and workers:
        raise ValueError(f"give workers, {workers}, or a scheduler, {scheduler!r}, whose cluster has its own")
    with processes.one_at_a_time(runs_dir(), say):
        files.sweep(runs_dir())
        todo = [run for run in runs if why_stale(run)]
        for run in todo:
            check_parameters(run)
        if not todo:
            say(f"all {len(runs)} runs are up to date")
            return
        with cluster.connect(scheduler, _untimed(todo)) if scheduler else nullcontext() as helpers:
            say(f"{len(todo)} of {len(runs)} runs to do")
            _run_todo(todo, workers or min(os.cpu_count() or 1, 4), helpers, say)


def _untimed(runs: list[Run]) -> list[Run]:
    """Those that may go side by side, when the data are there."""
    return [run for run in runs if run.notebook != _DATA and not run.is_timed]


def _run_todo(
    todo: list[Run], workers: int, helpers: cluster.Cluster | None, say: Callable[[str], None]
) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # for the kernels: bars would litter the pages
    began = time.perf_counter()
    # Of each notebook, what its runs took and how many tables they measured.
    spent: dict[str, tuple[float, int]] = {}
    done = 0

    def timed_execute(run: Run, execute: Callable[[Run], object]) -> tuple[Run, float]:
        start = time.perf_counter()
        execute(run)
        return run, time.perf_counter() - start

    def report(run: Run, took: float, left: list[Run], parallel: int) -> None:
        nonlocal done
        done += 1
        seconds, tables = spent.get(run.notebook, (0.0, 0))
        spent[run.notebook] = seconds + took, tables + _num_tables(run)
        totals = [sum(column) for column in zip(*spent.values(), strict=True)]
        remaining = 0.0
        for other in left:
            seconds, tables = spent.get(other.notebook, totals)
            remaining += seconds / tables * _num_tables(other) / (1 if other.is_timed else parallel)
        say(
            f"[{done}/{len(todo)}] {run.name} took {_minutes(took)}; "
            f"{_minutes(time.perf_counter() - began)} so far, about {_minutes(remaining)} left"
        )

    parallel = helpers.num_threads if helpers else workers
    data = [run for run in todo if run.notebook == _DATA]
    timed = [run for run in todo if run.is_timed]
    others = _untimed(todo)

    def execute_all(now: list[Run], later: list[Run], at_once: int, where: Callable[[Run], object]) -> None:
        waiting = list(now)
        running: dict[Future[tuple[Run, float]], Run] = {}
        # Never on the main thread: there nbclient would put its own handling of signals in place of ours.
        pool, is_stopped = ThreadPoolExecutor(at_once), False
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    run = waiting.pop(0)
                    running[pool.submit(timed_execute, run, where)] = run
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    running.pop(future)
                    report(*future.result(), [*running.values(), *waiting, *later], parallel)
        except processes.Stopped:
            is_stopped = True  # and so are the kernels, which nbclient takes seconds to see
            raise
        finally:
            pool.shutdown(wait=not is_stopped)

    with _kernels_compiling() if timed and (data or others) else nullcontext():
        execute_all(data, [*others, *timed], 1, execute)
        with nullcontext() if helpers else _single_threads():
            execute_all(others, timed, parallel, helpers.execute if helpers else execute)
    execute_all(timed, [], 1, execute)


@contextmanager
def _single_threads() -> Iterator[None]:
    """Kernels started meanwhile keep to a thread each.

    A setting inside them would not do: the pools of threads that libraries made beforehand go on spinning.
    """
    before = {name: os.environ.get(name) for name in executors.SINGLE_THREAD}
    os.environ.update(executors.SINGLE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _kernels_compiling() -> Iterator[None]:
    """Kernels are compiled meanwhile, on a thread, and are at the end.

    What is wrong, if anything is, the run that needs them will say.
    """
    command = [sys.executable, "-m", "cemb", "compile"]
    environment = {**os.environ, **executors.SINGLE_THREAD}
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(
        command,
        cwd=records.ROOT,
        env=environment,
        stdout=nowhere,
        stderr=nowhere,
        preexec_fn=processes.end_with_parent,
    ) as process:
        try:
            yield
        except BaseException:
            process.kill()
            raise
