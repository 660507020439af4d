"""The study: which notebooks run with which parameters, and whether what is there is still true.

A run is found by its content: parameters, the meaning of the notebook's code and of all that it reaches in
cemb (`cemb.study.identity`), the corpus, and the environment. So a changed constant or version makes a run
stale, a comment or a moved clone does not, and an interrupted study goes on where it stopped. Runs are
published whole, by one rename, and never altered.
"""

import hashlib
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cemb import files
from cemb.pmi import corpora
from cemb.study import parameters, records
from cemb.study.grid import NOTEBOOKS, PARAMETERS, Run
from cemb.study.identity import RULE, Code, Reached

_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def code_cells(notebook: Path) -> str:
    """A notebook's code as one Python source; its prose and outputs do not count."""
    return code_of(notebook.read_text(encoding="utf-8"))


def code_of(text: str) -> str:
    """The code of a notebook's text, see `code_cells`."""
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def reached(run: Run) -> Reached:
    """The definitions of cemb that a run's notebook reaches."""
    device = run.parameters.get("device", "cpu")
    return Code.of_folder(records.PACKAGE).reach(code_cells(NOTEBOOKS / run.notebook), device)


def identity(run: Run) -> records.Record:
    """All that a run's result depends on, flat, for comparison key by key."""
    found: records.Record = {f"parameter {name}": value for name, value in run.parameters.items()}
    if corpus := run.parameters.get("corpus"):
        path = corpus if corpus in corpora.CORPORA else str(NOTEBOOKS / corpus)
        found["corpus fingerprint"] = corpora.fingerprint(path)
    return {**found, "title": run.title, "code": reached(run).hash, **records.environment()}


def _runs_dir() -> Path:
    return records.results_dir() / "local" / "runs"


def _run_dir(run: Run, content: records.Record) -> Path:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return _runs_dir() / f"{run.name}-{digest[:12]}"


def run_dir(run: Run) -> Path:
    """Where a run's result is, or will be: ``run.ipynb``, ``records.jsonl`` and ``identity.json``."""
    return _run_dir(run, identity(run))


def code_change(now: Reached, definitions: dict[str, str] | None) -> str:
    """Which of earlier definitions are others now, in words; None stands for those of an earlier rule."""
    if definitions is None:
        return "code: keyed by an earlier rule"
    found = now.changes(definitions)
    return f"code: {'; '.join(found) or 'a name stands for another definition'}"


def staleness(run: Run) -> str | None:
    """None if the run's result is there and current, else why not."""
    if run_dir(run).is_dir():
        return None
    # Names may be prefixes of one another; the key is always 12 hexadecimal digits.
    earlier = [
        p
        for p in _runs_dir().glob(f"{run.name}-*")
        if re.fullmatch(r"[0-9a-f]{12}", p.name[len(run.name) + 1 :])
    ]
    if not earlier:
        return "never run"
    newest = max(earlier, key=lambda path: path.stat().st_mtime)
    before = json.loads((newest / "identity.json").read_text(encoding="utf-8"))
    definitions = before.pop("definitions", None)
    now = json.loads(json.dumps(identity(run), default=str))
    changed = [
        f"{name}: {before.get(name)} → {now.get(name)}"
        for name in sorted({*before, *now})
        if name != "code" and before.get(name) != now.get(name)
    ]
    if before.get("code") != now["code"]:
        changed.append(code_change(reached(run), definitions))
    return "; ".join(changed)


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


def execute(run: Run) -> Path:
    """Run one notebook in a kernel of its own and publish it; returns where."""
    import nbformat
    import papermill

    # As they are now: files may be edited while the run goes on.
    content, definitions = identity(run), reached(run).definitions()
    target = _run_dir(run, content)
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
        except Exception as error:  # a kernel that died, say
            raise RuntimeError(f"{run.name} failed: {error}") from error
        results = records.read(found) if found.exists() else []
        if not results:
            raise RuntimeError(f"{run.name} wrote no record")
        code = {"code_hash": content["code"], "code_rule": RULE}
        records.write([{**record, **code} for record in results], found)
        whole = {**content, "definitions": definitions}
        files.write_atomic(work / "identity.json", json.dumps(whole, indent=1, default=str))
    return target


def _num_tables(run: Run) -> int:
    """Tables that a run measures, if it says so: its methods at its ratios, with its seeds."""
    lists = (run.parameters.get(name, [None]) for name in ("methods", "compression_ratios", "seeds"))
    return math.prod(map(len, lists))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def run_study(runs: list[Run], *, workers: int | None = None, say: Callable[[str], None] = print) -> None:
    """Bring runs up to date, doing only those that are not.

    The data go first, then the other runs that nobody times, `workers` at a time (by default one per
    processor, at most 4, a thread each), and beside all of these the timed runs' kernels are compiled. Timed
    runs go last, one at a time and alone. Stops at the first failure, keeping what is finished.
    """
    todo = [run for run in runs if staleness(run)]
    for run in todo:
        check_parameters(run)
    if not todo:
        say(f"all {len(runs)} runs are up to date")
        return
    say(f"{len(todo)} of {len(runs)} runs to do")
    os.environ["TQDM_DISABLE"] = "1"  # for the kernels: bars would litter the pages
    began = time.perf_counter()
    # Of each notebook, what its runs took and how many tables they measured.
    spent: dict[str, tuple[float, int]] = {}
    done = 0

    def timed_execute(run: Run) -> tuple[Run, float]:
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

    parallel = workers or min(os.cpu_count() or 1, 4)
    data = [run for run in todo if run.notebook == "pmi.ipynb"]
    timed = [run for run in todo if run.is_timed]
    others = [run for run in todo if run not in data and run not in timed]

    def one_by_one(now: list[Run], later: list[Run]) -> None:
        for position, run in enumerate(now):
            _, took = timed_execute(run)
            report(run, took, [*now[position + 1 :], *later], parallel)

    def side_by_side() -> None:
        with _single_threads(), ThreadPoolExecutor(parallel) as pool:
            pending = {pool.submit(timed_execute, run): run for run in others}
            try:
                while pending:
                    finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in finished:
                        pending.pop(future)
                        report(*future.result(), [*pending.values(), *timed], parallel)
            except BaseException:
                for future in pending:
                    future.cancel()
                raise

    with _kernels_compiling() if timed and (data or others) else nullcontext():
        one_by_one(data, [*others, *timed])
        side_by_side()
    one_by_one(timed, [])


@contextmanager
def _single_threads() -> Iterator[None]:
    """Kernels started meanwhile keep to a thread each.

    A setting inside them would not do: the pools of threads that libraries made beforehand go on spinning.
    """
    before = {name: os.environ.get(name) for name in _THREAD_SETTINGS}
    os.environ.update(dict.fromkeys(_THREAD_SETTINGS, "1"))
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
    environment = {**os.environ, **dict.fromkeys(_THREAD_SETTINGS, "1")}
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(
        command, cwd=records.ROOT, env=environment, stdout=nowhere, stderr=nowhere
    ) as process:
        try:
            yield
        except BaseException:
            process.kill()
            raise


def current_records(runs: list[Run]) -> list[records.Record]:
    """The records of up-to-date runs, each with the name of its ``run``.

    Raises FileNotFoundError that names the runs which are missing or stale, and why.
    """
    folders = {run.name: run_dir(run) for run in runs}
    problems = {run.name: staleness(run) for run in runs if not folders[run.name].is_dir()}
    if problems:
        lines = "\n".join(f"  {name}: {why}" for name, why in problems.items())
        raise FileNotFoundError(f"{len(problems)} of {len(runs)} runs are missing or stale:\n{lines}")
    return [
        {"run": name, **record}
        for name, folder in folders.items()
        for record in records.read(folder / "records.jsonl")
    ]
