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
from dataclasses import replace
from itertools import chain

import nbformat
import pytest
from conftest import ROOT, children, is_alive, wait_until

from cemb import files
from cemb.model import COMPRESSED_TABLES
from cemb.study import frontier, grid, records, staleness
from cemb.study import run as study_run
from cemb.study.sizes import SMALL


def _pretend(run, **changes):
    """Lay down a result of the run, as if made under another identity."""
    definitions = changes.pop("definitions", None)
    content = {**staleness.identity(run), **changes}
    path = staleness.folder_of(run, content)
    with files.atomic_directory(path) as work:
        (work / "run.ipynb").write_text("{}")
        (work / "records.jsonl").write_text('{"kind": "pmi"}\n')
        (work / "identity.json").write_text(json.dumps({**content, "definitions": definitions}, default=str))
    return path


@pytest.fixture
def run(tmp_path):
    """A run on a corpus of its own."""
    corpus = tmp_path / "text.txt"
    corpus.write_text("one two three")
    return grid.Run("small", "Small", "pmi.ipynb", {"corpus": os.path.relpath(corpus, grid.NOTEBOOKS)})


@pytest.fixture
def notebooks(monkeypatch):
    """Notebooks are not run: each writes these records, after a call of what is put beside them."""
    import papermill

    does = {"records": [{"kind": "pmi", "value": 1}], "call": lambda: None}

    def execute_notebook(notebook, output, given, **options):
        does["call"]()
        nbformat.write(notebook, output)
        records.write(does["records"], grid.NOTEBOOKS / given["records_path"])

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as the study sets it, and not for the tests after this one
    return does


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


def test_a_corpus_that_changes_while_it_is_read_is_not_published(run, notebooks, tmp_path):
    notebooks["call"] = lambda: (tmp_path / "text.txt").write_text("four five")
    with pytest.raises(
        RuntimeError, match=r"small is not published, .*: corpus fingerprint: .* → .*; run the"
    ):
        study_run.execute(run)
    assert not list(staleness.runs_dir().iterdir())


def test_a_run_without_records_is_none(run, notebooks):
    notebooks["records"] = []
    with pytest.raises(RuntimeError, match="small wrote no record"):
        study_run.execute(run)
    assert staleness.why_stale(run) == "never run"


def test_a_folder_that_cannot_be_put_in_its_place_is_an_error(tmp_path):
    place = tmp_path / "small"
    place.write_text("a file")
    with pytest.raises(OSError, match="small"), files.atomic_directory(place) as work:
        (work / "run.ipynb").touch()
    assert list(tmp_path.iterdir()) == [place]
    assert place.read_text() == "a file"


def test_records_name_the_code_that_the_notebook_is_and_reaches(notebooks, tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for module in (grid, staleness, study_run):
        monkeypatch.setattr(module, "NOTEBOOKS", folder)

    def hash_with(*cells):
        notebook = nbformat.read(ROOT / "notebooks" / "pmi.ipynb", as_version=4)
        notebook.cells += cells
        nbformat.write(notebook, folder / "pmi.ipynb")
        run = grid.Run("small", "Small", "pmi.ipynb", {})
        (record,) = records.read(study_run.execute(run) / "records.jsonl")
        assert record["code_hash"] == staleness.reached(run).hash
        return record["code_hash"]

    code, prose = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    assert hash_with(code("x = 1")) == hash_with(prose("Prose."), code("x = 1  # one"))
    assert hash_with(code("x = 1")) != hash_with(code("x = 2"))


def test_another_environment_makes_a_run_stale(run, notebooks, monkeypatch):
    study_run.execute(run)
    assert staleness.why_stale(run) is None
    now = records.environment()
    for name in ("numba_version", "cpu_model"):
        monkeypatch.setattr(records, "environment", lambda name=name: {**now, name: "another"})
        assert staleness.why_stale(run) == f"{name}: {now[name]} → another"


def _emptied(path):
    for file in path.iterdir():
        file.unlink()


def _cut(name):
    return lambda path: os.truncate(path / name, 9)


def _edited(name):
    def edit(path):
        text = (path / name).read_text()
        (path / name).write_text(text.replace("m", "n", 1))

    return edit


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_emptied, "it has no SHA256SUMS"),
        (_cut("identity.json"), "the SHA-256 of identity.json"),
        (_edited("identity.json"), "the SHA-256 of identity.json"),
        (_cut("records.jsonl"), "the SHA-256 of records.jsonl"),
        (_edited("records.jsonl"), "the SHA-256 of records.jsonl"),
        (_edited("run.ipynb"), "the SHA-256 of run.ipynb"),
        (lambda path: (path / "run.ipynb").unlink(), "run.ipynb is missing"),
    ],
)
def test_a_damaged_run_is_named_and_run_again(damage, why, run, notebooks):
    path = study_run.execute(run)
    damage(path)
    with pytest.raises(
        FileNotFoundError, match=rf"1 of 1 runs .*\n  small: '{path}' is damaged: {why}.*; it is run again"
    ):
        staleness.current_records([run])
    said = []
    study_run.run_study([run], say=said.append)
    assert said[0] == "1 of 1 runs to do"
    assert staleness.why_stale(run) is None
    study_run.run_study([run], say=said.append)
    assert said[-1] == "all 1 runs are up to date"


def test_a_stale_run_that_is_damaged_is_run_again(run):
    _cut("identity.json")(_pretend(run, code="abc"))
    assert staleness.why_stale(run) == "never run"


def test_a_second_study_waits_for_the_first(run, notebooks):
    said = []
    second = threading.Thread(target=study_run.run_study, args=([run],), kwargs={"say": said.append})
    with files.exclusive(staleness.runs_dir(), wait=False):
        second.start()
        while not said:
            time.sleep(0.01)
        assert said == [f"another process is at work in '{staleness.runs_dir()}'; waiting for it to end"]
        study_run.execute(run)
    second.join()
    assert said[1:] == ["all 1 runs are up to date"]


def test_what_a_killed_study_left_is_removed(run, notebooks):
    left = staleness.runs_dir() / ".small-abcdef.cemb-tmp"
    left.mkdir(parents=True)
    (left / "run.ipynb").touch()
    study_run.run_study([run], say=lambda text: None)
    assert list(staleness.runs_dir().iterdir()) == [staleness.run_dir(run)]


def test_a_study_stops_at_the_first_failure(run, notebooks):
    started = []

    def fail():
        started.append(1)
        raise ValueError("no such thing")

    notebooks["call"] = fail
    runs = [run, replace(run, name="other")]
    with pytest.raises(RuntimeError, match="small failed: no such thing"):
        study_run.run_study(runs, say=lambda text: None)
    assert started == [1]


def test_results_are_in_one_folder_wherever_a_process_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CEMB_RESULTS", "mine")
    assert records.results_dir() == tmp_path / "mine"
    code = "from cemb.study import records; print(records.results_dir())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'mine'}\n"


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\r", "\n", "\x1c", "<script>", "é"])
def test_records_are_read_as_they_were_written(character, tmp_path):
    found = [{"corpus": f"a{character}b"}, {"corpus": character}]
    records.write(found, tmp_path / "records.jsonl")
    assert records.read(tmp_path / "records.jsonl") == found


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not a record: "),
        (b"[1]", r"a record is a JSON object, got \[1\]"),
        (b"\xff", "not a record: "),
    ],
)
def test_what_is_no_record_is_named_by_its_line(line, why, tmp_path):
    (tmp_path / "records.jsonl").write_bytes(b"{}\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"records.jsonl, line 2: {why}"):
        records.read(tmp_path / "records.jsonl")


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
    left = tmp_path / "results" / "local" / "runs"
    files.sweep(left)
    assert not list(left.iterdir())


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_stopped_ends_with_its_kernels(number, tmp_path, started):
    sizes = {"optimizer": "sgd", "num_embeddings": 10, "batch_size": 4, "repeats": 10**9}
    code = f"""
import sys
from cemb import processes
from cemb.study.grid import Run
from cemb.study.run import run_study
sys.exit(processes.supervised(lambda: run_study([Run("long", "Long", "speed.ipynb", {sizes})])))
"""
    process = started("-c", code)
    wait_until(lambda: children(process.pid))
    kernels = children(process.pid)
    process.send_signal(number)
    start = time.monotonic()
    assert process.wait(60) == 128 + number
    assert time.monotonic() - start < 3
    assert process.stderr.read() == f"cemb: stopped by {signal.Signals(number).name}\n"
    assert not list(filter(is_alive, kernels))
    left = tmp_path / "results" / "local" / "runs"
    files.sweep(left)
    assert not list(left.iterdir())


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
