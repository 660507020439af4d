"""Runs on a Dask cluster: the same results; lost and differing workers; failures; an end of the study."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, dask_cluster, is_alive, long, wait_until
from distributed import Client

from cemb import cli, files
from cemb.study import cluster as study_cluster
from cemb.study import grid, records, staleness
from cemb.study import run as study_run

# What the runs of these tests do is in a file beside their notebook, which a test may write.
_CELLS = [
    "records_path = ''\noptions = {}",
    "from cemb.study import records\nfrom pathlib import Path\nexec(Path('does.py').read_text())",
    "records.write([{'kind': 'speed', 'value': 1, **where}], records_path)",
]
# Of OMP_NUM_THREADS Dask takes care itself.
_DOES = "import os, sys\nwhere = {'threads': os.environ.get('NUMBA_NUM_THREADS'), 'parent': os.getppid()}\n"
_WAITS = """
import time
Path(f"started-{os.getpid()}").touch()
while not Path("go").exists():
    time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout whose notebooks do what their file says."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "cemb", root / "cemb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "notebooks").mkdir()
    parameters, *code = map(nbformat.v4.new_code_cell, _CELLS)
    parameters.metadata["tags"] = ["parameters"]
    cells = [nbformat.v4.new_markdown_cell("# One"), parameters, *code]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    for name in ("pmi", "speed"):
        nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")
    return root


@pytest.fixture(scope="module")
def workers(checkout):
    """A cluster of two processes, whose runs are of that checkout."""
    with dask_cluster(2, env={"PYTHONPATH": str(checkout)}) as cluster:
        yield cluster


@pytest.fixture
def notebooks(checkout, monkeypatch):
    """Notebooks of that checkout, for this process, too."""
    folder = checkout / "notebooks"
    for module in (grid, staleness, study_run):
        monkeypatch.setattr(module, "NOTEBOOKS", folder)
    monkeypatch.setattr(study_run, "check_parameters", lambda run: None)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as the study sets it, and not for the tests after this one
    (folder / "does.py").write_text(_DOES)
    yield folder
    for left in (*folder.glob("started-*"), *folder.glob("go")):
        left.unlink()


RUN = grid.Run("small", "Small", "speed.ipynb", {})


def _study(workers, *runs):
    said = []
    study_run.run_study([*runs], scheduler=workers.scheduler_address, say=said.append)
    return said


def _left():
    """What is in the folder of runs, but for what dead processes left and the next one removes."""
    files.sweep(staleness.runs_dir())
    return list(staleness.runs_dir().iterdir())


def _record(run):
    (record,) = records.read(staleness.run_dir(run) / "records.jsonl")
    return record


def _ancestor(process, generations):
    for _ in range(generations):
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process


def _started(notebooks):
    return [int(path.name.removeprefix("started-")) for path in notebooks.glob("started-*")]


def test_untimed_runs_go_to_the_cluster_and_others_stay(workers, notebooks, monkeypatch):
    order, away = [], study_cluster.Cluster.execute

    def execute(self, run):
        away(self, run)
        order.append(f"{run.name}, away")

    monkeypatch.setattr(study_cluster.Cluster, "execute", execute)
    monkeypatch.setattr(study_run, "execute", lambda run: order.append(run.name))
    monkeypatch.setattr(study_run, "_kernels_compiling", nullcontext)
    runs = [
        replace(RUN, name="timed", is_timed=True),
        RUN,
        replace(RUN, name="other", parameters={"long": "x" * 300_000}),  # more than a pipe holds
        replace(RUN, name="data", notebook="pmi.ipynb"),
    ]
    said = _study(workers, *runs)
    assert (order[0], *sorted(order[1:3]), order[3]) == ("data", "other, away", "small, away", "timed")
    assert said[0] == "4 of 4 runs to do"
    assert len(said) == 5
    for run in runs[1:3]:
        assert staleness.why_stale(run) is None
        assert _record(run)["threads"] == "1"
        assert _record(run)["code_hash"] == staleness.reached(run).hash
        assert _record(run)["parent"] != os.getpid()
    assert _study(workers, *runs[1:3]) == ["all 2 runs are up to date"]


def test_a_worker_that_is_killed_loses_one_run_which_is_run_again(workers, notebooks):
    with (notebooks / "does.py").open("a") as file:
        file.write(_WAITS)
    study = threading.Thread(target=_study, args=(workers, RUN))
    study.start()
    wait_until(lambda: _started(notebooks))
    (kernel,) = _started(notebooks)
    below, worker = _ancestor(kernel, 1), _ancestor(kernel, 2)
    assert worker in [each.pid for each in workers.workers.values()]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len(_started(notebooks)) == 2)
    wait_until(lambda: not is_alive(kernel) and not is_alive(below))
    assert staleness.why_stale(RUN) == "never run"
    (notebooks / "go").touch()
    study.join()
    assert staleness.why_stale(RUN) is None
    assert len(list(staleness.runs_dir().glob("small-*"))) == 1


def test_a_run_that_fails_is_named(workers, notebooks, tmp_path):
    (notebooks / "does.py").write_text("raise ValueError('no such thing')")
    with pytest.raises(RuntimeError, match=r"^small failed with ValueError: no such thing\n.*small\.ipynb"):
        _study(workers, RUN)
    assert (tmp_path / "results" / "local" / "failed" / "small.ipynb").exists()
    (notebooks / "does.py").write_text(f"{_DOES}os.kill(os.getppid(), 9)")
    with pytest.raises(RuntimeError, match=r"^small failed: its process of .* ended with -9"):
        _study(workers, RUN)
    wait_until(lambda: not _left())


@pytest.mark.parametrize("name", ["numba_version", *long("machine")])
def test_a_worker_of_another_environment_is_refused_by_name(name, workers, notebooks, monkeypatch):
    now = records.environment()
    monkeypatch.setattr(records, "environment", lambda: {**now, name: "another"})
    message = rf"^the Dask worker 'tcp://\S*' cannot take .*: {name}: another → {now[name]}; nor can 1 more$"
    with pytest.raises(RuntimeError, match=message):
        _study(workers, RUN)
    assert not _left()


def test_a_worker_of_another_machine_is_none_of_another_environment(workers, notebooks, monkeypatch):
    now = records.environment()
    monkeypatch.setattr(records, "environment", lambda: {**now, "cpu_model": "another", "cpu_count": 7})
    _study(workers, RUN)
    assert staleness.why_stale(RUN) is None
    said = json.loads((staleness.run_dir(RUN) / "identity.json").read_text())
    assert (said["cpu_model"], said["ran_on"]["cpu_model"]) == ("another", now["cpu_model"])
    # Nor does that it ran elsewhere make it stale, when something else does.
    monkeypatch.setattr(records, "environment", lambda: {**now, "cpu_model": "third", "cpu_count": 7})
    assert staleness.why_stale(RUN) == "cpu_model: another → third"


@pytest.fixture
def other_code(checkout):
    """Changes a constant of the workers' code, and back."""
    path = checkout / "cemb" / "study" / "records.py"
    text = path.read_text()
    yield lambda: path.write_text(text.replace("allow_nan=False", "allow_nan=True"))
    path.write_text(text)


def test_a_worker_of_other_code_is_refused_by_name(workers, notebooks, other_code):
    other_code()
    message = (
        r"^the Dask worker .* cannot take .*: code: cemb.study.records.to_json changed \(write → to_json"
    )
    with pytest.raises(RuntimeError, match=message):
        _study(workers, RUN)
    assert not _left()


@pytest.mark.parametrize("when", ["before", *long("meanwhile")])
def test_code_that_changes_after_the_check_is_not_published(
    when, workers, notebooks, other_code, monkeypatch
):
    before = study_cluster.Cluster.check
    if when == "before":
        monkeypatch.setattr(study_cluster.Cluster, "check", lambda *given: (before(*given), other_code()))
    else:
        with (notebooks / "does.py").open("a") as file:
            file.write(_WAITS)

        def change():
            wait_until(lambda: _started(notebooks))
            other_code()
            (notebooks / "go").touch()

        threading.Thread(target=change).start()
    with pytest.raises(RuntimeError, match=r"^small (would not be the study's|is not published).*: code: "):
        _study(workers, RUN)
    assert not _left()


def test_workers_that_do_not_see_the_results_are_refused(workers, notebooks, monkeypatch):
    monkeypatch.setattr(study_cluster, "_text", lambda path: "of another folder of that name")
    with pytest.raises(
        RuntimeError, match=r"it does not see the study's folder of results, '.*results'; nor"
    ):
        _study(workers, RUN)
    assert not _left()


def test_a_cluster_that_is_not_there_is_refused_before_any_work(notebooks, tmp_path, capsys):
    message = r"no Dask scheduler answers at 'tcp://127.0.0.1:9'"
    said = []
    with pytest.raises(ConnectionError, match=message):
        study_run.run_study([RUN], scheduler="tcp://127.0.0.1:9", say=said.append)
    with (
        dask_cluster(0) as cluster,
        pytest.raises(ConnectionError, match=r"the Dask cluster at .* has no workers"),
    ):
        study_run.run_study([RUN], scheduler=cluster.scheduler_address, say=said.append)
    assert not said
    (tmp_path / "text.txt").write_text("one two three")
    command = ["study", "--grid", "smoke", "--corpus", str(tmp_path / "text.txt"), "--workers", "2"]
    assert cli.main([*command, "--scheduler", "tcp://a:1"]) == 2
    assert capsys.readouterr().err == (
        "cemb: give workers, 2, or a scheduler, 'tcp://a:1', whose cluster has its own\n"
    )
    assert not _left()


@pytest.mark.long
def test_a_cluster_that_loses_its_last_worker_is_named(notebooks, checkout, monkeypatch):
    monkeypatch.setattr(study_cluster, "_ASK_S", 0.1)
    monkeypatch.setattr(study_cluster, "_WORKERLESS_S", 0.5)
    with (notebooks / "does.py").open("a") as file:
        file.write(_WAITS)
    with dask_cluster(1, env={"PYTHONPATH": str(checkout)}) as cluster:

        def end():
            wait_until(lambda: _started(notebooks))
            cluster.scale(0)

        threading.Thread(target=end).start()
        message = r"small waits for a worker, and the Dask cluster at .* has had none for 0.5 s"
        with pytest.raises(ConnectionError, match=message):
            _study(cluster, RUN)
    wait_until(lambda: not any(map(is_alive, _started(notebooks))))
    wait_until(lambda: not _left())


@pytest.mark.long
def test_a_scheduler_that_is_killed_is_named(notebooks, checkout, started, tmp_path):
    with (notebooks / "does.py").open("a") as file:
        file.write(_WAITS)
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    place = tmp_path / "scheduler.json"
    of_dask = ["--no-dashboard", "--scheduler-file", str(place)]
    scheduler = started("-m", "dask", "scheduler", "--port", "0", *of_dask)
    wait_until(place.exists)
    command = [sys.executable, "-m", "dask", "worker", "--nthreads", "1", "--no-nanny", *of_dask]
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=nowhere, stderr=nowhere) as worker:
        try:
            address = json.loads(place.read_text())["address"]
            with Client(address, set_as_default=False) as client:
                client.wait_for_workers(1, timeout=60)
            study = started("-P", "-c", _STUDY, address, env=environment)
            wait_until(lambda: _started(notebooks) or study.poll() is not None)
            scheduler.kill()
            assert study.wait(60) == 1
            last = study.stderr.read().splitlines()[-1]
            assert re.search("ConnectionError: small was cancelled: the Dask scheduler at .* ended", last)
            wait_until(lambda: not any(map(is_alive, _started(notebooks))))
            wait_until(lambda: not _left())
        finally:
            worker.kill()


_STUDY = """
import sys
from cemb import processes
from cemb.study import run
from cemb.study.grid import Run
run.check_parameters = lambda run: None
study = lambda: run.run_study([Run("small", "Small", "speed.ipynb", {})], scheduler=sys.argv[1])
sys.exit(processes.supervised(study))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, *long(signal.SIGKILL)])
def test_a_study_that_ends_leaves_no_run_on_the_cluster(number, workers, notebooks, checkout, started):
    with (notebooks / "does.py").open("a") as file:
        file.write(_WAITS)
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    process = started("-P", "-c", _STUDY, workers.scheduler_address, env=environment)
    wait_until(lambda: _started(notebooks))
    (kernel,) = _started(notebooks)
    below = _ancestor(kernel, 1)
    start = time.monotonic()
    process.send_signal(number)
    assert process.wait(60) == (128 + number if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert time.monotonic() - start < 5
        assert process.stderr.read() == "cemb: stopped by SIGINT\n"
    wait_until(lambda: not is_alive(kernel) and not is_alive(below))
    wait_until(lambda: not _left())
    # The workers are free for what comes next.
    (notebooks / "does.py").write_text(_DOES)
    _study(workers, RUN)
    assert staleness.why_stale(RUN) is None


def _result(record):
    """A record but for times and which commit of the same code it is of."""
    kept = {k: v for k, v in record.items() if not k.endswith("_s") and k not in ("utc_time", "git_commit")}
    kept.pop("git_dirty")
    kept["history"] = [{**step, "seconds": None} for step in record.get("history") or []]
    return kept


@pytest.mark.long
def test_results_are_those_of_a_study_without_a_cluster(smoke, tmp_path):
    names = ["pmi", "mini-batch-full", "quality-adam-full-weighted", "frontier-after"]
    command = [sys.executable, "-m", "cemb", "study", "--grid", "smoke", "--corpus", smoke["CORPUS"]]
    environment = {**smoke, "CEMB_RESULTS": str(tmp_path / "results")}
    with dask_cluster(2) as cluster:
        command += ["--run", *names, "--scheduler", cluster.scheduler_address]
        subprocess.run(command, env=environment, cwd=ROOT, check=True)
    made = sorted((tmp_path / "results" / "local" / "runs").iterdir())
    assert len(made) == len(names)
    for folder in made:
        alone = Path(smoke["CEMB_RESULTS"]) / "local" / "runs" / folder.name
        found, expected = (records.read(path / "records.jsonl") for path in (folder, alone))
        assert list(map(_result, found)) == list(map(_result, expected))
