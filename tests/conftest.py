import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

# Two workers share the processors, so threads that wait had better sleep than spin. To be said
# before torch and Numba load their OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis  # noqa: F401  its plugin would import it last of all, when collections run torch's code
import numpy as np
import pytest
import scipy.sparse as sp

from cemb.study import grid, records

ROOT = Path(__file__).parent.parent
SCRATCH = ROOT / "build" / "test"
# These take longest, in this order; what starts last should be short.
LONGEST = (
    *("test_site.py", "test_optim.py", "test_ops.py"),
    *("test_triton.py", "test_bench.py", "test_out_of_core.py"),
)


def long(*values):
    """Values of a parameter that `make test-long` tries and `make test` leaves out."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


def pytest_addoption(parser):
    parser.addoption("--report", type=Path, help="file for a record of what was tried, and how often")


class Report:
    """Adds up what tests say they tried, by `record_property`, and writes it as one record."""

    def __init__(self, config):
        self.path, self.marks = config.getoption("--report"), config.getoption("-m")
        self.start, self.outcomes, self.tried = time.monotonic(), Counter(), Counter()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.when == "call":
            self.tried.update(dict(report.user_properties))

    def pytest_sessionfinish(self):
        which = {"kind": "tests", "is_long": self.marks == "long"}
        outcomes = {f"num_{outcome}": self.outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
        tried = {f"tried {name}": number for name, number in sorted(self.tried.items())}
        seconds = {"tests_s": round(time.monotonic() - self.start, 1)}
        records.write([{**which, **outcomes, **tried, **seconds, **records.provenance()}], self.path)


def pytest_configure(config):
    # Under xdist its workers' reports reach the one process that has no worker's input.
    if config.getoption("--report") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(config))


def pytest_collection_modifyitems(items):
    def place(item):
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)

    items.sort(key=place)


def zipf_text(num_tokens=60_000, num_words=600, seed=0):
    """A text of made-up words with Zipf frequencies, and a few real ones for the evaluation sets."""
    rng = np.random.default_rng(seed)
    words = ["".join(chr(97 + letter) for letter in rng.integers(26, size=5)) for _ in range(num_words)]
    words += ["king", "queen", "water", "car", "tiger", "cat", "money", "cash", "physics", "proton"]
    shares = 1 / np.arange(1, len(words) + 1)
    return " ".join(rng.choice(words, num_tokens, p=shares / shares.sum()))


def of_the_default_grid(found):
    """The records of a full study that a default one has: of its runs, methods, ratios and seeds."""
    runs = {run.name: run.parameters for run in grid.study_runs()}
    lists = {"method": "methods", "asked_ratio": "compression_ratios", "seed": "seeds"}

    def is_there(record):
        asked = runs.get(record["run"])
        return asked is not None and all(
            record.get(name) is None or record[name] in asked.get(values, [record[name]])
            for name, values in lists.items()
        )

    return [record for record in found if record.get("table") != "sgns" and is_there(record)]


def is_alive(process):
    """Whether a process, by its id, has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(process):
    """Ids of the processes that one has started and that have not ended."""
    paths = Path(f"/proc/{process}/task").glob("*/children")
    return [child for path in paths for child in map(int, path.read_text().split()) if is_alive(child)]


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def started():
    """Starts a Python program with arguments, its input and outputs piped; it is killed in the end."""
    with ExitStack() as ending:

        def start(*arguments, **options):
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            # Where tests run in the background of a shell, programs would inherit that SIGINT is ignored.
            options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
            process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, text=True, **pipes, **options)
            ending.enter_context(process)
            ending.callback(process.kill)
            return process

        yield start


def dask_cluster(n_workers, **options):
    """A Dask cluster of processes of this machine, with a thread each."""
    from distributed import LocalCluster

    # Any port for its pages: other tests may have a cluster at the same time.
    options = {"threads_per_worker": 1, "processes": True, "dashboard_address": ":0", **options}
    return LocalCluster(n_workers=n_workers, **options)


@pytest.fixture
def random_matrix():
    """A sparse float32 matrix with sorted columns: 40 words, 30 contexts."""
    rng = np.random.default_rng(3)
    dense = np.where(rng.random((40, 30)) < 0.2, rng.gamma(2.0, 1.0, (40, 30)), 0).astype(np.float32)
    return sp.csr_array(dense)


@pytest.fixture(autouse=True)
def own_results(tmp_path, monkeypatch):
    """No test touches the results of the repository."""
    monkeypatch.setenv("CEMB_RESULTS", str(tmp_path / "results"))


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """Disks take a tenth of a second for each folder; what a failing machine keeps is not tested here."""
    monkeypatch.setattr("cemb.files._flush", lambda path: None)


@pytest.fixture(scope="session")
def smoke():
    """Environment of the smoke study, which is run if it is not up to date: all notebooks, small."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    corpus = SCRATCH / "corpus.txt"
    if not corpus.exists():
        corpus.write_text(zipf_text())
    environment = {
        **os.environ,
        "CEMB_RESULTS": str(SCRATCH / "results"),
        "CEMB_GRID": "smoke",
        "CORPUS": os.path.relpath(corpus, ROOT),
    }
    command = [sys.executable, "-m", "cemb", "study", "--grid", "smoke", "--corpus", environment["CORPUS"]]
    command += ["--workers", "1"]  # the other processor has tests to run
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return environment


def build_site(environment, folder):
    """Build the site into a folder; returns where its pages are."""
    command = [sys.executable, "book/build.py", "--build-dir", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "_build" / "html"


@pytest.fixture(scope="session")
def site(smoke):
    """The built site of the smoke study."""
    return build_site(smoke, SCRATCH)
