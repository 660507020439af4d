"""Training on torchrun's ranks, of which one or the launcher is killed: no hang, and a rerun does it all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, children, is_alive, wait_until, zipf_text
from test_faults import content_of_training

from cemb import files
from cemb.study import quality

TRAIN = (
    "train --corpus text.txt --rank 8 --training mini-batch --batch-size 512 --num-epochs 2 --pool-size 4096 "
    "--out model --checkpoint-every 40"
)
KILLS = [
    pytest.param(victim, seed, marks=[pytest.mark.long] if (victim, seed) != ("rank 0", 0) else [])
    for victim in ("rank 0", "rank 1", "the launcher")
    for seed in range(11)
]
# Nothing may take longer to end after a kill, on a machine that is busy.
LIMIT_S = 30


def start(folder, options="", ranks=2, launched=False):
    """The training on ranks, or in one process, which is not `launched` by torchrun."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CEMB_RESULTS": str(folder / "results")}
    environment.pop("OMP_NUM_THREADS", None)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1 or launched
        else []
    )
    command = [sys.executable, *launcher, "-m", "cemb", *TRAIN.split(), *options.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def finish(process, seconds=300):
    out, error = process.communicate(timeout=seconds)
    return process.returncode, out.decode(), error.decode()


def ours(error):
    """The lines of standard error that are ours."""
    lines = error.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("cemb: ")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What training makes, the seconds it takes, and the data."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "text.txt").write_text(zipf_text(60_000, 300))
    assert finish(start(folder, "--num-epochs 1 --out first", ranks=1))[0] == 0  # data
    began = time.monotonic()
    status, out, error = finish(start(folder))
    assert status == 0, error
    assert len(out.splitlines()) == 1  # rank 0 alone prints
    assert json.loads(out)["bytes_sent_per_step"] == 4 * 4096
    return folder, content_of_training(folder), time.monotonic() - began


@pytest.fixture
def place(undisturbed, tmp_path):
    (tmp_path / "text.txt").symlink_to(undisturbed[0] / "text.txt")
    (tmp_path / "results").symlink_to(undisturbed[0] / "results")
    return tmp_path


def checkpoints(folder):
    return sorted((folder / "model.partial").glob("checkpoint-*"))


def check_rerun(folder, undisturbed, ranks=2):
    for path in checkpoints(folder)[-1:]:
        files.verify(path, "")
    status, _, error = finish(start(folder, ranks=ranks))
    # It may have been done when it was disturbed.
    assert status == 0 or "'model' exists already" in error, error
    assert content_of_training(folder) == undisturbed
    assert not [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".cemb-tmp"))]


def processes_below(process):
    found = children(process.pid)
    for one in found:
        found += children(one)
    return found


def ranks_of(process):
    """The processes that torchrun has started, by their ranks."""
    found = {}
    for one in children(process.pid):
        entries = Path(f"/proc/{one}/environ").read_text(errors="replace").split("\0")
        found |= {entry.partition("=")[2]: one for entry in entries if entry.startswith("RANK=")}
    return found


@pytest.mark.parametrize(("victim", "seed"), KILLS)
def test_a_killed_rank_ends_the_job_and_the_rerun_does_its_work(
    victim, seed, undisturbed, place, record_property
):
    record_property("ranks or launchers killed", 1)
    rng = np.random.default_rng([seed, *victim.encode()])
    process = start(place)
    wait_until(lambda: {"0", "1"} <= {*ranks_of(process)})
    ranks, everyone = ranks_of(process), processes_below(process)
    if seed % 2 == 0:  # while it trains; else at any time, while modules are imported, too
        wait_until(lambda: checkpoints(place) or process.poll() is not None)
        time.sleep(rng.uniform(0, 0.5))
    else:
        time.sleep(undisturbed[2] * rng.uniform(0, 1))
    everyone = sorted({*everyone, *processes_below(process)})
    is_running, is_made = process.poll() is None, (place / "model").exists()
    target = process.pid if victim == "the launcher" else ranks[victim[-1]]
    if is_alive(target):
        os.kill(target, signal.SIGKILL)
    killed = time.monotonic()
    _, _, error = finish(process, LIMIT_S)
    wait_until(lambda: not any(map(is_alive, everyone)), LIMIT_S)
    assert time.monotonic() - killed < LIMIT_S
    if victim == "the launcher":  # the ranks have not worked on
        assert (place / "model").exists() == is_made
    if victim != "the launcher" and is_running and process.returncode:
        assert len(ours(error)) == 1, error
        (line,) = ours(error)
        assert "ended" in line or "ends" in line
        if checkpoints(place):
            assert "; the same command resumes " in line
    check_rerun(place, undisturbed[1])


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.long)])
def test_ranks_end_whose_launcher_is_killed_at_once(ranks, tmp_path):
    (tmp_path / "text.txt").write_text(zipf_text(6000, 300))
    process = start(tmp_path, ranks=ranks, launched=True)
    wait_until(lambda: len(ranks_of(process)) == ranks)
    everyone = processes_below(process)
    process.kill()
    finish(process, LIMIT_S)
    wait_until(lambda: not any(map(is_alive, everyone)), LIMIT_S)
    assert not list(tmp_path.glob("model*"))


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_is_one_line_of_ours(number, undisturbed, place):
    process = start(place)
    wait_until(lambda: checkpoints(place))
    everyone = processes_below(process)
    os.kill(process.pid, number)
    status, _, error = finish(process, LIMIT_S)
    assert status != 0
    (line,) = ours(error)
    assert "; the same command resumes " in line
    assert not any(map(is_alive, everyone))
    check_rerun(place, undisturbed[1])


@pytest.mark.long
def test_a_second_training_of_a_folder_is_refused(undisturbed, place):
    process = start(place)
    wait_until(lambda: checkpoints(place))
    for one in ranks_of(process).values():
        os.kill(one, signal.SIGSTOP)
    status, _, error = finish(start(place, ranks=1))
    for one in ranks_of(process).values():
        os.kill(one, signal.SIGCONT)
    assert (status, ours(error)) == (2, ["cemb: another process is at work in 'model.partial'"])
    assert finish(process)[0] == 0
    assert content_of_training(place) == undisturbed[1]


REFUSED = [
    ({"pool_size": 9}, "--training full-batch", "give --training mini-batch, or train in one process"),
    (
        {"table": "full-fused", "training": "mini-batch"},
        "--table full-fused --pool-size None",
        "give --table full, of which 2 processes exchange",
    ),
]


@pytest.mark.parametrize(("case", "message"), [(case, message) for case, _, message in REFUSED])
def test_a_case_that_ranks_cannot_train_is_refused(case, message):
    quality.QualityCase(**case).check_ranks(1)
    with pytest.raises(ValueError, match=message):
        quality.QualityCase(**case).check_ranks(2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "message"), [*(refused[1:] for refused in REFUSED), ("--corpus missing.txt", "missing.txt")]
)
def test_what_ranks_cannot_train_is_refused_in_one_line(options, message, place):
    status, _, error = finish(start(place, options))
    assert status != 0
    (line,) = ours(error)
    assert message in line
    assert not list(place.glob("model*"))


@pytest.mark.long
def test_a_checkpoint_of_other_ranks_is_refused(undisturbed, place):
    process = start(place)
    wait_until(lambda: checkpoints(place))
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    wait_until(lambda: not any(map(is_alive, processes_below(process))))
    for options, ranks, what in (
        ("", 1, "num_processes is 1 and was 2"),
        ("--num-epochs 3", 2, "num_epochs is 3 and was 2"),
    ):
        status, _, error = finish(start(place, options, ranks))
        assert status
        (line,) = ours(error)
        assert what in line
        assert "remove 'model.partial', and training begins anew" in line
    check_rerun(place, undisturbed[1])
