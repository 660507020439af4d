"""Commands that are killed or starved: run again, they give what they give undisturbed, and tidy up."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, long, wait_until, zipf_text
from test_damage import content_of_corpus, content_of_data_set, content_of_matrix, content_of_model

import cemb

CEMB = [sys.executable, "-m", "cemb"]


def _data_set(folder):
    (found,) = (folder / "results" / "local" / "data").glob("pmi-*")
    words, counts, left, values, summary = content_of_data_set(found)
    kept = {name: value for name, value in summary.items() if not name.endswith(("_s", "utc_time"))}
    return words, counts, left, values, kept


def _model(folder):
    saved = {name: values.tolist() for name, values in torch.load(folder / "model.pt").items()}
    words, values, _ = content_of_model(folder / "model")
    assert values == saved
    return words, values


def content_of_training(folder):
    """Values of the model's folder, and what the training noted but for its times."""
    saved = cemb.load(folder / "model")
    values = {name: value.tolist() for name, value in saved.model.state_dict().items()}
    training = saved.manifest["details"]["training"]
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in training["history"]]
    return values, history, training["num_processes"]


# Of each command its arguments, and what it made.
COMMANDS = {
    "encode": (
        "encode text.txt --out corpus --shard-tokens 50000",
        lambda at: content_of_corpus(at / "corpus"),
    ),
    "count": ("count corpus --out counts --memory 200MiB", lambda at: content_of_matrix(at / "counts")),
    "count in processes": (
        "count corpus --out counts --memory 400MiB --processes --workers 2",
        lambda at: content_of_matrix(at / "counts"),
    ),
    "pmi": ("pmi --corpus text.txt --rank 8", _data_set),
    "train": (
        "train --corpus text.txt --rank 8 --pool-size 4096 --num-steps 40 --save model.pt --out model",
        _model,
    ),
    "train with checkpoints": (
        "train --corpus text.txt --rank 8 --training mini-batch --batch-size 4096 --num-epochs 2 "
        "--pool-size 4096 --out model --checkpoint-every 10",
        content_of_training,
    ),
}


def start(name, folder, before="", **options):
    """A command, after the shell's settings `before`, in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CEMB_RESULTS": str(folder / "results")}
    shell = f'{before}\nexec "$@"'
    command = ["sh", "-c", shell, "sh", *CEMB, *COMMANDS[name][0].split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def finish(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out.decode(), error.decode()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What each command makes, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "text.txt").write_text(zipf_text(400_000, 3000))
    found = {}
    for name, (_, content) in COMMANDS.items():
        for made in ("counts", "model"):
            shutil.rmtree(folder / made, ignore_errors=True)
        began = time.monotonic()
        status, _, error = finish(start(name, folder))
        assert status == 0, error
        found[name] = content(folder), time.monotonic() - began
    return folder, found


def ready(name, undisturbed, folder):
    """A folder in which a command may start."""
    os.link(undisturbed[0] / "text.txt", folder / "text.txt")
    if name.startswith("count"):
        (folder / "corpus").symlink_to(undisturbed[0] / "corpus")


def litter(folder):
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".cemb-tmp", ".partial"))]


def check_same_and_tidy(name, undisturbed, folder):
    """Run a command again, and compare."""
    status, _, error = finish(start(name, folder))
    # It may have been done when it was disturbed.
    assert status == 0 or (name.startswith(("encode", "train")) and "exists already" in error), error
    assert COMMANDS[name][1](folder) == undisturbed[1][name][0]
    assert not litter(folder)


def _members(group):
    """Ids of the processes of a group that have not ended."""
    fields = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields[path.parent.name] = path.read_text().rpartition(")")[2].split()
    return [process for process, (state, _, of, *_) in fields.items() if int(of) == group and state != "Z"]


@pytest.mark.parametrize("seed", [0, *long(*range(1, 15))])
@pytest.mark.parametrize(
    "name", ["encode", "pmi", "train with checkpoints", *long("count", "count in processes", "train")]
)
def test_a_killed_command_does_its_work_when_run_again(undisturbed, tmp_path, name, seed, record_property):
    record_property("kills", 1)
    ready(name, undisturbed, tmp_path)
    rng = np.random.default_rng([seed, *name.encode()])
    process = start(name, tmp_path)
    # Imports take the first part.
    time.sleep(undisturbed[1][name][1] * rng.uniform(0.3, 1))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not _members(process.pid), 5)
    check_same_and_tidy(name, undisturbed, tmp_path)


@pytest.mark.parametrize("name", ["pmi", *long("encode", "count", "count in processes", "train")])
def test_a_full_disk_is_one_line_and_loses_nothing(undisturbed, tmp_path, name, record_property):
    """Files above 64 KiB are refused, as by a disk that is full at some time."""
    record_property("full disks", 1)
    ready(name, undisturbed, tmp_path)
    status, _, error = finish(start(name, tmp_path, before="ulimit -f 128; trap '' XFSZ"))
    assert status == 2, error
    assert error.splitlines()[-1].startswith("cemb: "), error
    assert "a file is too large while writing" in error
    assert "Traceback" not in error
    check_same_and_tidy(name, undisturbed, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, and a function that gives the disk so many KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kib, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join((*options, f"size={kib}k")), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not resize(4096):
        pytest.skip("mounting a small disk takes root")
    yield folder, lambda kib: resize(kib, "remount")
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.long
@pytest.mark.parametrize("kib", [16, 64, 256, 640, 1024, 2048, 3072, 4096])
@pytest.mark.parametrize("name", ["encode", "pmi", "train"])
def test_a_disk_that_is_full_is_one_line_and_loses_nothing(
    undisturbed, small_disk, record_property, name, kib
):
    folder, resize = small_disk
    assert resize(100_000)
    shutil.copy(undisturbed[0] / "text.txt", folder)
    assert resize((folder / "text.txt").stat().st_size // 1024 + kib)
    status, _, error = finish(start(name, folder))
    if status:
        assert status == 2, error
        assert error.splitlines()[-1].startswith("cemb: "), error
        assert "space" in error
        assert "Traceback" not in error
    assert resize(100_000)
    check_same_and_tidy(name, undisturbed, folder)
    record_property("full disks", 1)


@pytest.mark.parametrize("name", ["pmi", *long("encode", "count")])
def test_few_open_files_are_enough(undisturbed, tmp_path, name, record_property):
    record_property("commands with few open files", 1)
    ready(name, undisturbed, tmp_path)
    status, _, error = finish(start(name, tmp_path, before="ulimit -n 64"))
    assert status == 0, error
    assert COMMANDS[name][1](tmp_path) == undisturbed[1][name][0]


@pytest.mark.parametrize("name", ["pmi", *long("encode", "count", "count in processes", "train")])
def test_of_two_at_once_each_is_whole_or_refused(undisturbed, tmp_path, name, record_property):
    record_property("commands started twice at once", 1)
    ready(name, undisturbed, tmp_path)
    both = [start(name, tmp_path) for _ in range(2)]
    ended = [finish(process) for process in both]
    assert any(status == 0 for status, *_ in ended), ended
    for status, _, error in ended:
        assert status == 0 or "exists already" in error or "another process is at work" in error, error
    assert COMMANDS[name][1](tmp_path) == undisturbed[1][name][0]
    assert not litter(tmp_path)


def test_two_encodings_of_one_name_are_not_mixed_up(undisturbed, tmp_path):
    ready("encode", undisturbed, tmp_path)
    (tmp_path / "other.txt").write_text(zipf_text(400_000, 3000, seed=1))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [*CEMB, "encode", name, "--out", "corpus"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in ("text.txt", "other.txt")
    ]
    ended = dict(zip(("text.txt", "other.txt"), map(finish, both), strict=True))
    (winner,) = [name for name, (status, *_) in ended.items() if status == 0]
    assert f'"corpus": [\n  "{winner}"\n ]' in (tmp_path / "corpus" / "manifest.json").read_text()
    assert all(status == 0 or "corpus' exists already" in error for status, _, error in ended.values())


_STEPS = """
import os, sys
from pathlib import Path
from cemb.pmi import out_of_core
from cemb.study import dataset

root, first, stride = Path(sys.argv[1]), *map(int, sys.argv[2:])
out_of_core.LARGEST_TASK = 1500

def build(name):
    os.environ["CEMB_RESULTS"] = str(root / name)
    found = dataset.load_pmi(dataset.PmiConfig(str(root / "text.txt"), min_count=2, rank=3))
    litter = [path.name for path in (root / name / "local" / "data").iterdir() if path != found.folder]
    return found.words, found.matrix.data.tolist(), found.optimum.left.tolist(), litter

def end_at(step, is_before):
    done = 0
    def counted(change):
        def changed(*arguments, **options):
            nonlocal done
            done += 1
            is_step = done == step
            if is_step and is_before:
                os._exit(9)
            try:
                return change(*arguments, **options)
            finally:
                if is_step:
                    os._exit(9)
        return changed
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
        setattr(os, name, counted(getattr(os, name)))

expected, tried, step = build("undisturbed"), 0, first
assert expected[-1] == []
while True:
    for is_before in (True, False):
        name = f"{step}-{is_before}"
        child = os.fork()
        if not child:
            end_at(step, is_before)
            build(name)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            print(tried)
            sys.exit()
        assert os.waitstatus_to_exitcode(status) == 9, status
        assert (found := build(name)) == expected, (name, found[-1])
        tried += 1
    step += stride
"""


@pytest.mark.parametrize(("first", "stride"), [(3, 40), pytest.param(1, 1, marks=pytest.mark.long)])
def test_a_build_that_ends_at_any_change_of_the_disk_goes_on(tmp_path, record_property, first, stride):
    (tmp_path / "text.txt").write_text(zipf_text(6000, 60))
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", _STEPS, str(tmp_path), str(first), str(stride)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 1
    record_property("exits before and after a change of the disk", int(done.stdout))
