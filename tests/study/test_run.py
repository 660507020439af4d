"""The study driver: what is stale and why, refusals, a run killed halfway."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import chain

import nbformat
import pytest
from conftest import ROOT

from cemb.model import COMPRESSED_TABLES
from cemb.study import frontier, grid, staleness
from cemb.study import run as study_run
from cemb.study.sizes import SMALL


def _pretend(run, **changes):
    """Lay down a result of the run, as if made under another identity."""
    definitions = changes.pop("definitions", None)
    content = {**staleness.identity(run), **changes}
    path = staleness.folder_of(run, content)
    path.mkdir(parents=True)
    written = {**content, "definitions": definitions}
    (path / "identity.json").write_text(json.dumps(written, default=str))
    (path / "records.jsonl").write_text('{"kind": "pmi"}\n')
    return path


def test_names_and_titles_are_unique():
    runs = grid.study_runs()
    assert len({run.name for run in runs}) == len({run.title for run in runs}) == len(runs)


def test_the_default_grid_covers_the_question():
    runs = grid.study_runs()
    speed = {
        (r.parameters["optimizer"], r.parameters["pool_size"]) for r in runs if r.notebook == "speed.ipynb"
    }
    assert speed == {(o, p) for o in ("sgd", "adagrad", "adam") for p in (262_144, 100_000_000)}
    quality = [r.parameters for r in runs if r.name.startswith("quality-")]
    quality = [p for p in quality if p.get("training") == "full-batch"]
    for optimizer in ("sgd", "adagrad", "adam"):
        sizes = [
            (p["table"], p.get("compression_ratio"), p.get("pool_size"))
            for p in quality
            if p["optimizer"] == optimizer and "weight_power" not in p
        ]
        assert sizes == [("full", None, None), ("hashed", 4, None), ("hashed", None, 262_144)]
    assert {"mini-batch-full", "quality-adam-hashed-4-times-weighted", "growth-speed"} <= {
        r.name for r in runs
    }


def test_the_full_grid_has_every_size_with_every_optimizer():
    parameters = {r.name: r.parameters for r in grid.study_runs("full")}
    for asked in parameters.values():
        assert asked.get("seeds", [0, 1, 2]) == [0, 1, 2]
    sizes = {
        "full": ("full", None, None),
        "hashed-1-times": ("hashed", 1, None),
        "hashed-4-times": ("hashed", 4, None),
        "hashed-16-times": ("hashed", 16, None),
        "hashed-262144": ("hashed", None, 262_144),
    }
    wanted = {
        f"quality-{o}-{name}-full-batch": (o, "full-batch", *size)
        for o in ("sgd", "adagrad", "adam")
        for name, size in sizes.items()
    }
    wanted |= {
        f"quality-{o}-full-mini-batch": (o, "mini-batch", "full-fused", None, None)
        for o in ("sgd", "adagrad", "adam")
    }
    wanted |= {
        f"quality-adam-{name}-weighted": ("adam", "full-batch", *sizes[name]) for name in list(sizes)[:-1]
    }
    wanted["quality-lbfgs-full-full-batch"] = ("lbfgs", None, *sizes["full"])  # the notebook's own training
    names = ("optimizer", "training", "table", "compression_ratio", "pool_size")
    found = {n: tuple(map(p.get, names)) for n, p in parameters.items() if n.startswith("quality-")}
    assert found == wanted


def test_runs_of_the_default_grid_are_runs_of_the_full_one():
    full = {run.name: run for run in grid.study_runs("full")}
    for run in grid.study_runs():
        whole = full[run.name].parameters
        for name, value in run.parameters.items():
            if name in ("methods", "compression_ratios", "seeds"):
                assert set(value) <= set(whole[name]), (run.name, name)
            else:
                assert value == whole[name], (run.name, name)
        if run.notebook != "pmi.ipynb":  # which trains word2vec, too
            assert set(run.parameters) == set(whole), run.name


def test_the_frontier_has_every_method_once():
    named = [method for methods in grid.FRONTIER.values() for method in methods]
    assert sorted(named) == sorted(frontier.METHODS)
    in_full = [r.parameters["methods"] for r in grid.study_runs("full") if r.name.startswith("frontier-")]
    assert sorted(chain(*in_full)) == sorted(frontier.METHODS)


def test_the_full_grid_trains_every_small_table_both_ways():
    assert sorted(grid.SMALL_TABLES) == sorted(("hashed", *COMPRESSED_TABLES))
    runs = [r.parameters for r in grid.study_runs("full") if r.name.startswith("mini-batch-")]
    assert [p["table"] for p in runs if "compression_ratio" not in p] == ["full-fused"]
    small = {(p["table"], p["compression_ratio"]) for p in runs if "compression_ratio" in p}
    assert small == {(table, ratio) for table in grid.SMALL_TABLES for ratio in (4, 16)}
    for parameters in runs:
        assert parameters["training"] == "mini-batch"
        assert parameters["seeds"] == [0, 1, 2]
    few_seeds = [r.name for r in grid.study_runs("full") if len(r.parameters.get("seeds", range(3))) < 3]
    assert not few_seeds


def test_growth_keeps_its_pool():
    runs = [r.parameters for r in grid.study_runs("full") if r.name.startswith("growth-")]
    speed, *quality = runs
    assert "max_vocab" not in speed
    words = {p["table"]: [] for p in quality}
    for parameters in quality:
        words[parameters["table"]].append(parameters["max_vocab"])
    assert words["full"] == words["hashed"]
    assert words["full"] == sorted(words["full"])
    assert {p["pool_size"] for p in quality if p["table"] == "hashed"} == {SMALL}


def test_runs_are_selected_by_name_too():
    runs = grid.study_runs("full")
    assert grid.select(runs) == runs
    growth = grid.select(runs, names=["growth-*", "pmi"])
    assert [r.name for r in growth] == [r.name for r in runs if r.name[:6] == "growth" or r.name == "pmi"]
    chosen = grid.select(runs, ["adam"], [SMALL], ["growth-hashed-5000"])
    assert [r.name for r in chosen] == ["growth-hashed-5000"]
    with pytest.raises(ValueError, match=r"no run of this grid has a name like 'grow'; it has pmi, speed"):
        grid.select(runs, names=["growth-*", "grow"])


def test_staleness_says_why():
    run = grid.study_runs()[1]
    assert staleness.why_stale(run) == "never run"
    _pretend(run, numba_version="0.1", code="abc")
    why = staleness.why_stale(run)
    assert "numba_version: 0.1 → " in why
    assert "code: keyed by an earlier rule" in why
    assert "torch_version" not in why
    definitions = {**staleness.reached(run).definitions(), "cemb.hashing.GOLDEN": "another"}
    _pretend(run, code="abcd", definitions=definitions)
    assert "code: cemb.hashing.GOLDEN changed (study → " in staleness.why_stale(run)
    _pretend(run)
    assert staleness.why_stale(run) is None


def test_a_run_whose_name_begins_another_is_not_confused_with_it():
    first = grid.Run("quality", "Quality", "quality.ipynb", {})
    second = grid.Run("quality-sgd", "Quality, SGD", "quality.ipynb", {})
    _pretend(second)
    assert staleness.why_stale(second) is None
    assert staleness.why_stale(first) == "never run"


def test_a_corpus_that_changed_is_noticed(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three")
    run = grid.study_runs("smoke", str(text))[0]
    _pretend(run)
    assert staleness.why_stale(run) is None
    text.write_text("one two four")
    assert "corpus fingerprint: sha256:" in staleness.why_stale(run)


def test_missing_records_are_named():
    with pytest.raises(FileNotFoundError, match=r"24 of 24 runs are missing or stale:\n  pmi: never run"):
        staleness.current_records(grid.study_runs())


def test_a_parameter_that_does_not_exist_is_refused_before_anything_runs(tmp_path):
    runs = [grid.Run("x", "X", "speed.ipynb", {"optimiser": "sgd"})]
    with pytest.raises(ValueError, match=r"speed.ipynb has no parameter optimiser; it has .*optimizer"):
        study_run.run_study(runs)
    assert not list(tmp_path.rglob("run.ipynb"))


def test_an_unknown_value_fails_its_run_and_keeps_the_notebook(tmp_path):
    # Runs go side by side in threads, so none may move the process to another directory, even for a while.
    code = """
import os
from cemb.study.grid import Run
from cemb.study.run import run_study
change = os.chdir
def stay(path):
    assert os.path.samefile(path, os.getcwd()), f"moved to {path}"
    change(path)
os.chdir = stay
run_study([Run("bad", "Bad", "speed.ipynb", {"optimizer": "lion", "num_embeddings": 10})])
"""
    # In a process of its own: papermill leaves an event loop behind for the garbage collector to complain of.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search("bad failed with ValueError: optimizer must be one of .*'lion'", done.stderr)
    kept = nbformat.read(tmp_path / "results" / "local" / "failed" / "bad.ipynb", as_version=4)
    assert any(output.output_type == "error" for cell in kept.cells for output in cell.get("outputs", []))
    assert not list((tmp_path / "results" / "local" / "runs").iterdir())


def test_runs_come_in_their_order_and_timed_ones_alone(tmp_path, monkeypatch):
    events, lock = [], threading.Lock()
    monkeypatch.setenv("CEMB_RESULTS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as the study sets it, and not for the tests after this one

    def pretend(run):
        with lock:
            events.append(("begin", run.name, os.environ["OMP_NUM_THREADS"], "MKL_NUM_THREADS" in os.environ))
        time.sleep(0.01)
        with lock:
            events.append(("end", run.name))

    @contextmanager
    def compiling():
        events.append(("compiling",))
        yield
        events.append(("compiled",))

    monkeypatch.setattr(study_run, "execute", pretend)
    monkeypatch.setattr(study_run, "_kernels_compiling", compiling)
    runs = grid.study_runs()
    said = []
    study_run.run_study(runs, workers=2, say=said.append)
    begun = [event[1:] for event in events if event[0] == "begin"]
    timed = [run.name for run in runs if run.is_timed]
    assert begun[0] == ("pmi", "2", False)
    assert events[0] == ("compiling",)
    assert events[2] == ("end", "pmi")
    assert events[-2 * len(timed) - 1] == ("compiled",)
    assert begun[-len(timed) :] == [(name, "2", False) for name in timed]
    assert {name for name, *_ in begun} == {run.name for run in runs}
    assert {event[1:] for event in begun[1 : -len(timed)]} == {("1", True)}
    alone = events[-2 * len(timed) :]
    assert [event[0] for event in alone] == ["begin", "end"] * len(timed)
    assert said[-1].startswith(f"[{len(runs)}/{len(runs)}] growth-speed took")


def test_compiling_beside_a_study_keeps_to_a_thread_and_stops_with_it(tmp_path, monkeypatch):
    python, started, finished = (tmp_path / name for name in ("python", "started", "finished"))
    python.write_text(
        f'#!/bin/sh\necho "$OMP_NUM_THREADS $*" > {started}.new\nmv {started}.new {started}\n'
        f"sleep 5\ntouch {finished}\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="a run failed"), study_run._kernels_compiling():
        while not started.exists():
            time.sleep(0.01)
        raise RuntimeError("a run failed")
    assert started.read_text() == "1 -m cemb compile\n"
    assert not finished.exists()


@pytest.mark.long
def test_a_killed_study_resumes_with_what_is_unfinished(tmp_path, smoke):
    environment = {**smoke, "CEMB_RESULTS": str(tmp_path / "results")}
    command = [sys.executable, "-m", "cemb", "study", "--grid", "smoke", "--corpus", smoke["CORPUS"]]
    command += ["--optimizer", "adam", "--pool-size", "262144", "--run", "[sq]*", "--workers", "1"]
    runs = tmp_path / "results" / "local" / "runs"
    started = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(runs.glob("speed-*")):
        assert time.monotonic() < deadline, "the first run did not finish"
        assert started.poll() is None, "the study ended before it could be killed"
        time.sleep(0.2)
    started.send_signal(signal.SIGKILL)
    started.wait()
    (finished,) = runs.glob("speed-*")
    modified = (finished / "records.jsonl").stat().st_mtime_ns
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 of 2 runs to do\n")
    assert "left" in done.stdout
    assert (finished / "records.jsonl").stat().st_mtime_ns == modified
    check = subprocess.run([*command, "--check"], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (check.returncode, check.stdout) == (0, "2 of 2 runs are up to date\n")


def test_a_page_without_its_records_fails_the_build(tmp_path):
    environment = {**os.environ, "CEMB_RESULTS": str(tmp_path / "none"), "CEMB_GRID": "", "CORPUS": ""}
    command = [sys.executable, "book/build.py", "--build-dir", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "24 of 24 runs are missing or stale" in done.stderr
    assert not (tmp_path / "_build").exists()
