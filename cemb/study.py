"""The study: which notebooks run with which parameters, and whether what is there is still true.

A run is found by its content: parameters, the notebook's code, every file of cemb that code reaches, the
corpus, and the environment. So a changed file or version makes a run stale, a moved clone does not, and
an interrupted study goes on where it stopped. Runs are published whole, by one rename, and never altered.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cemb import catalog, records, targets

NOTEBOOKS = records.ROOT / "notebooks"
OPTIMIZERS = targets.OPTIMIZERS
OPTIMIZER_NAMES = {"sgd": "SGD", "adagrad": "Adagrad", "adam": "Adam", "lbfgs": "L-BFGS"}
GRIDS = ("default", "full", "smoke")
POOL_SIZES = (targets.SMALL, targets.LARGE)
COMPRESSION_RATIOS = (1, 4, 16)
# Mini-batches whose expected loss is that of all cells; most samples go where most cells are.
MINI_BATCH = {"training": "mini-batch", "loss": "all-cells", "negative_share": 0.8, "negative_power": 0.5}
# Tables in fewer bytes that train on mini-batches beside full ones.
SMALL_TABLES = (
    "hashed",
    "hybrid",
    "mixed-dimension",
    "low-rank",
    "quotient-remainder",
    "multi-hash",
    "clustered",
)
WEIGHT_POWER = 0.5
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Run:
    """One notebook with its parameters. `name` is unique in a study, `title` heads the run's page.

    Timed runs have the machine to themselves; others share it.
    """

    name: str
    title: str
    notebook: str
    parameters: dict[str, Any] = field(hash=False)
    is_timed: bool = False


def _speed_runs(repeats: int, **sizes: object) -> list[Run]:
    return [
        Run(
            f"speed-{optimizer}-{pool_size}",
            f"Speed: {OPTIMIZER_NAMES[optimizer]}, pool {pool_size:,}",
            "speed.ipynb",
            {
                "optimizer": optimizer,
                "pool_size": pool_size,
                "repeats": repeats,
                # Once is enough to see what eager PyTorch costs; on the large pool it takes half the run.
                "eager": pool_size == POOL_SIZES[0],
                **sizes,
            },
            is_timed=True,
        )
        for optimizer in OPTIMIZERS
        for pool_size in POOL_SIZES
    ]


def _quality_runs(seeds: list[int], mini_batch: dict[str, dict[str, Any]], **settings: object) -> list[Run]:
    """The mission's grid, optimizer by pool, and beside it L-BFGS, mini-batches and a weighted loss."""
    pools: list[tuple[str, dict[str, Any]]] = [("full", {"table": "full"})]
    pools += [
        (f"hashed-{ratio}-times", {"table": "hashed", "compression_ratio": ratio})
        for ratio in COMPRESSION_RATIOS
    ]
    pools += [(f"hashed-{POOL_SIZES[0]}", {"table": "hashed", "pool_size": POOL_SIZES[0]})]
    pools = [(name, {**pool, "training": "full-batch"}) for name, pool in pools]
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (o, "full-mini-batch", {"table": "full-fused", **MINI_BATCH, "seeds": seeds, **mini_batch.get(o, {})})
        for o in OPTIMIZERS
    ]
    cases += [(o, f"{name}-full-batch", {**pool, "seeds": seeds}) for o in OPTIMIZERS for name, pool in pools]
    cases += [("lbfgs", "full-full-batch", {"table": "full", "seeds": seeds})]
    cases += [
        ("adam", f"{name}-weighted", {**pool, "weight_power": WEIGHT_POWER, "seeds": seeds})
        for name, pool in pools[:-1]
    ]
    return [
        Run(
            f"quality-{optimizer}-{name}",
            f"Quality: {OPTIMIZER_NAMES[optimizer]}, {name.replace('-', ' ')}",
            "quality.ipynb",
            {"optimizer": optimizer, **case, **settings},
        )
        for optimizer, name, case in cases
    ]


def _mini_batch_runs(
    tables: Sequence[str], ratios: list[int], seeds: list[int], **settings: object
) -> list[Run]:
    """A full table and tables in fewer bytes, each for one pass by Adam."""
    cases: list[tuple[str, dict[str, Any]]] = [("full", {"table": "full-fused"})]
    cases += [
        (f"{table}-{ratio}-times", {"table": table, "compression_ratio": ratio})
        for table in tables
        for ratio in ratios
    ]
    return [
        Run(
            f"mini-batch-{name}",
            f"Mini-batches: {name.replace('-', ' ')}",
            "quality.ipynb",
            {"optimizer": "adam", **case, **MINI_BATCH, "seeds": seeds, **settings},
        )
        for name, case in cases
    ]


def _growth_runs(
    vocabularies: list[int], seeds: list[int], sizes: dict[str, Any], **settings: object
) -> list[Run]:
    """A pool of one size for more and more rows: its quality where there is data, its speed beyond."""
    pool: dict[str, Any] = {"table": "hashed", "pool_size": POOL_SIZES[0]}
    return [
        Run("growth-speed", "Growth: speed by the number of rows", "growth.ipynb", sizes, is_timed=True),
        *(
            Run(
                f"growth-{case['table']}-{words}",
                f"Growth: {case['table']}, {words:,} words",
                "quality.ipynb",
                {"optimizer": "adam", **case, "max_vocab": words, "seeds": seeds, **settings},
            )
            for words in vocabularies
            for case in ({"table": "full"}, pool)
        ),
    ]


# Methods of `cemb.frontier` that share a run, since loading takes as long as one of them.
FRONTIER = {
    "hashed": ["full", "hashed", "hashed, blocks of 25", "hashed, blocks of 100", "hashed, signed"],
    "tiers": ["hybrid", "mixed-dimension", "low-rank"],
    "composed": ["quotient-remainder", "multi-hash", "clustered"],
    "int8": [f"{table}, then int8" for table in ("hashed", "low-rank")],
    "int8-others": [f"{table}, then int8" for table in SMALL_TABLES if table not in ("hashed", "low-rank")],
    "trivial": ["lower rank, then int8"],
    "axes": ["product quantization, random axes", "product quantization, balanced axes"],
    "after": ["lower rank", "int8", "int4", "product quantization", "transform coding"],
    "alternating": [f"alternating, {store}" for store in ("float32", "bfloat16", "int8", "int4")]
    + ["alternating, transform coding"],
}


def _frontier_runs(
    methods: dict[str, list[str]], ratios: dict[str, list[int]], seeds: list[int], **settings: object
) -> list[Run]:
    return [
        Run(
            f"frontier-{group}",
            f"Frontier: {group}",
            "frontier.ipynb",
            {
                "methods": methods[group],
                "compression_ratios": ratios[group],
                "seeds": seeds,
                **settings,
            },
        )
        for group in FRONTIER
        if group in ratios
    ]


# What the default grid leaves to the full one, so that it takes a quarter of an hour on two processors.
_FULL_GRID_ONLY = (
    "quality-*-full-mini-batch",
    *(f"quality-*-hashed-{ratio}-times-full-batch" for ratio in (1, 16)),
    *(f"quality-*-hashed-{ratio}-times-weighted" for ratio in (1, 16)),
    "quality-*-full-weighted",
)


def study_runs(grid: str = "default", corpus: str = catalog.DEFAULT_CORPUS) -> list[Run]:
    """The runs of a grid: ``"default"``; ``"full"``, with more ratios, seeds and baselines; or ``"smoke"``.

    Runs of the default grid are runs of the full one, of fewer methods, ratios and seeds. The smoke grid
    tries the code of all pages on little data. `corpus` is a name, or a path or glob from the working
    directory. Raises ValueError for an unknown grid, and what `cemb.catalog.fingerprint` does.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {grid!r}")
    catalog.fingerprint(corpus)  # refuses one that cannot be read, by the name it was given
    if corpus not in catalog.CORPORA:
        corpus = os.path.relpath(corpus, NOTEBOOKS)  # kernels work there
    data: dict[str, Any] = {"corpus": corpus}
    speed: dict[str, Any] = {}
    quality, pmi, frontier_settings = data, data, data
    repeats = 6  # what the 2021 project averaged
    seeds = [0]
    mini_batch: dict[str, dict[str, Any]] = {}
    after = [4, 8, 16, 32, 64]
    ratios = {"hashed": [4], "trivial": after, "after": after, "alternating": [16]}
    methods = {**FRONTIER, "hashed": ["hashed", "hashed, blocks of 25"]}
    methods["after"] = [name for name in FRONTIER["after"] if name != "product quantization"]  # half its time
    tables: Sequence[str] = ()
    mini_batch_ratios: list[int] = []
    vocabularies: list[int] = []
    rows: dict[str, Any] = {}
    if grid == "full":
        seeds = [0, 1, 2]
        # Far enough to come near the optimum, at a lower rate than a short run's.
        mini_batch = {"adam": {"num_epochs": 8, "learning_rate": 0.005}}
        trained = [4, 8, 16]
        is_trained = {"hashed", "tiers", "composed", "int8", "int8-others"}
        methods = FRONTIER
        ratios = {group: trained if group in is_trained else after for group in FRONTIER}
        tables, mini_batch_ratios = SMALL_TABLES, [4, 16]
        vocabularies = [2_500, 5_000, 10_000, 20_000]
        pmi = {**data, "sgns_epochs": 5}
    elif grid == "smoke":
        data = pmi = {"corpus": corpus, "min_count": 2, "rank": 8}
        speed = {"num_embeddings": 3000, "embedding_dim": 32, "batch_size": 256}
        rows = {"rows": [1000, 10**9], "full_rows": [1000], "embedding_dim": 32, "batch_size": 256}
        repeats = 2
        quality = {**data, "num_steps": 30, "batch_size": 2048}
        frontier_settings = {**data, "num_steps": 6}
        # One run of each kind is enough to try its page's code.
        after = [2, 4]
        methods = FRONTIER
        ratios = {"tiers": [2], "int8": [8], "trivial": after, "after": after, "alternating": after}
        tables, mini_batch_ratios, vocabularies = ("hybrid",), [4], [300]
    runs = [
        Run("pmi", "Data: the PMI matrix", "pmi.ipynb", pmi),
        *_speed_runs(repeats, **speed),
        # The longest first, so that none is left running alone at the end.
        *_frontier_runs(methods, ratios, seeds, **frontier_settings),
        *_mini_batch_runs(tables, mini_batch_ratios, seeds, **quality),
        *_quality_runs(seeds, mini_batch, **quality),
        *_growth_runs(vocabularies, seeds, rows, **quality),
    ]
    if grid == "default":
        runs = [run for run in runs if not any(fnmatchcase(run.name, name) for name in _FULL_GRID_ONLY)]
    if grid == "smoke":
        # Nobody reads these times, so they need not wait for each other.
        runs = [replace(run, is_timed=False) for run in runs]
    return runs


def select(
    runs: list[Run],
    optimizers: Collection[object] | None = None,
    pool_sizes: Collection[object] | None = None,
    names: Iterable[str] | None = None,
) -> list[Run]:
    """The runs of the named optimizers and pool sizes, and of names, which may be shell patterns.

    ValueError for one that no run has.
    """
    for parameter, wanted in (("optimizer", optimizers), ("pool_size", pool_sizes)):
        known = sorted({run.parameters[parameter] for run in runs if parameter in run.parameters})
        for value in wanted or ():
            if value not in known:
                raise ValueError(
                    f"no run of this grid has {parameter}={value}; it has {', '.join(map(str, known))}"
                )
    for pattern in names or ():
        if not any(fnmatchcase(run.name, pattern) for run in runs):
            raise ValueError(
                f"no run of this grid has a name like {pattern!r}; it has {', '.join(r.name for r in runs)}"
            )
    return [
        run
        for run in runs
        if (optimizers is None or run.parameters.get("optimizer") in optimizers)
        and (pool_sizes is None or run.parameters.get("pool_size") in pool_sizes)
        and (names is None or any(fnmatchcase(run.name, pattern) for pattern in names))
    ]


def code_cells(notebook: Path) -> str:
    """A notebook's code as one Python source; its prose and outputs do not count."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def identity(run: Run) -> records.Record:
    """All that a run's result depends on, flat, for comparison key by key."""
    found: records.Record = {f"parameter {name}": value for name, value in run.parameters.items()}
    if corpus := run.parameters.get("corpus"):
        path = corpus if corpus in catalog.CORPORA else str(NOTEBOOKS / corpus)
        found["corpus fingerprint"] = catalog.fingerprint(path)
    notebook = NOTEBOOKS / run.notebook
    code = records.code_hash(code_cells(notebook))
    return {**found, "title": run.title, "code": code, **records.environment()}


def _runs_dir() -> Path:
    return records.results_dir() / "local" / "runs"


def _run_dir(run: Run, content: records.Record) -> Path:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return _runs_dir() / f"{run.name}-{digest[:12]}"


def run_dir(run: Run) -> Path:
    """Where a run's result is, or will be: ``run.ipynb``, ``records.jsonl`` and ``identity.json``."""
    return _run_dir(run, identity(run))


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
    now = json.loads(json.dumps(identity(run), default=str))
    changed = [
        f"{name}: {before.get(name)} → {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return "; ".join(changed)


def check_parameters(run: Run) -> None:
    """ValueError if the run sets a parameter its notebook does not have; papermill only warns."""
    from papermill import inspect_notebook

    known = inspect_notebook(str(NOTEBOOKS / run.notebook))
    unknown = sorted(set(run.parameters) - set(known))
    if unknown:
        raise ValueError(f"{run.notebook} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")


def execute(run: Run) -> Path:
    """Run one notebook in a kernel of its own and publish it; returns where."""
    import nbformat
    import papermill

    content = identity(run)  # as it is now: files may be edited while the run goes on
    target = _run_dir(run, content)
    with records.atomic_directory(target) as work:
        notebook = nbformat.read(NOTEBOOKS / run.notebook, as_version=4)
        heading = notebook.cells[0]
        heading.source = re.sub(r"^# .*", f"# {run.title}", heading.source, count=1)
        found = work / "records.jsonl"
        try:
            papermill.execute_notebook(
                notebook,
                str(work / "run.ipynb"),
                # The kernel works in notebooks/; a relative path keeps this machine's off the page.
                {**run.parameters, "records_path": os.path.relpath(found, NOTEBOOKS)},
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
        records.write([{**record, "code_hash": content["code"]} for record in results], found)
        records.write_atomic(work / "identity.json", json.dumps(content, indent=1, default=str))
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
