"""Files and folders written whole or not at all: after failures, kills and damage, and by two at once."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from cemb import files
from cemb.files import atomic_directory, exclusive, sweep, verify, write_atomic

FLUSH = files._flush


def fill(path, text="whole"):
    with atomic_directory(path) as work:
        (work / "inner").mkdir()
        (work / "inner" / "file").write_text(text)
        (work / "other file").write_text("more")


def test_an_interrupted_directory_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as work:
        (work / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    fill(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "inner" / "file").read_text() == "whole"


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "records.jsonl"
    write_atomic(target, "before")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for module, name in ((files, "_flush"), (os, "replace"), (Path, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left"):
                write_atomic(target, "after")
        assert target.read_text() == "before"
        assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(files, "_flush", FLUSH)
    monkeypatch.setattr(
        os, "fsync", lambda handle: (fsync(handle), synced.append((os.fstat(handle).st_ino, target.exists())))
    )
    for target, write in (
        (tmp_path / "out", fill),
        (tmp_path / "file", lambda path: write_atomic(path, "text")),
    ):
        synced.clear()
        write(target)
        before = {inode for inode, was_there in synced if not was_there}
        inside = [target, *target.rglob("*")]
        assert before == {path.stat().st_ino for path in inside}
        assert (tmp_path.stat().st_ino, True) in synced


def test_sums_are_those_of_coreutils(tmp_path):
    fill(tmp_path / "out")
    command = ["sha256sum", "--check", "--strict", files.SUMS]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, check=True)
    assert done.stdout.split(b"\n")[:-1] == [b"inner/file: OK", b"other file: OK"]
    verify(tmp_path / "out", "make it again")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda folder: (folder / "other file").write_text("less"), "SHA-256 of other file is not that"),
        (lambda folder: (folder / "inner" / "file").write_text("whol"), "SHA-256 of inner/file is not"),
        (lambda folder: (folder / "other file").unlink(), "other file is missing"),
        (lambda folder: (folder / "third").touch(), "third is not among the files"),
        (lambda folder: (folder / files.SUMS).unlink(), "it has no SHA256SUMS"),
        (lambda folder: (folder / files.SUMS).write_text(""), "inner/file is not among the files"),
        (lambda folder: (folder / files.SUMS).write_bytes(b"\xff\n"), "SHA256SUMS is no text"),
    ],
)
def test_damage_is_told_with_its_remedy(tmp_path, damage, what):
    fill(tmp_path / "out")
    verify(tmp_path / "out", "make it again")
    damage(tmp_path / "out")
    with pytest.raises(files.DamagedError, match=rf"out' is damaged: .*{what}.*; make it again"):
        verify(tmp_path / "out", "make it again")


def test_a_file_changed_at_once_is_noticed(tmp_path):
    """Its size, its inode and, within a tick of the clock, its times may all stay what they were."""
    for i in range(50):
        (tmp_path / "file").write_text(f"{i:02d}")
        first = files.file_hash(tmp_path / "file")
        with (tmp_path / "file").open("r+") as file:
            file.write("ab")
        assert files.file_hash(tmp_path / "file") != first


def test_the_later_of_two_is_refused(tmp_path):
    with pytest.raises(FileExistsError, match="out' exists already"), atomic_directory(tmp_path / "out"):
        fill(tmp_path / "out", "the first")
    verify(tmp_path / "out", "")
    assert (tmp_path / "out" / "inner" / "file").read_text() == "the first"


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        fill(tmp_path / "out")
        write_atomic(tmp_path / "file", "text")
    finally:
        os.umask(before)
    for path in (tmp_path / "file", *(tmp_path / "out").rglob("*"), tmp_path / "out"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    write_atomic(tmp_path / "file", "text")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~before


_WRITES = """
import os, sys, time
from pathlib import Path
from cemb import files

out = Path(sys.argv[1])
with files.atomic_directory(out / "folder") as work:
    (work / "half").write_text("half")
    replace = Path.replace
    Path.replace = lambda *_: (print("ready", flush=True), time.sleep(60))
    files.write_atomic(out / "file", "text")
"""


def test_what_a_killed_writer_left_is_swept_and_what_is_at_work_stays(tmp_path):
    command = [sys.executable, "-c", _WRITES, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout.readline() == b"ready\n"
        left = sorted(tmp_path.iterdir())
        assert len(left) == 2
        sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == left
        os.kill(writer.pid, signal.SIGKILL)
    (tmp_path / ".hidden").touch()
    write_atomic(tmp_path / "file", "another")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "file"]


def test_a_lock_is_held_by_one_and_free_when_its_process_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from cemb.files import exclusive\n"
        "with exclusive(Path(sys.argv[1]), wait=False): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "work")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(RuntimeError, match=r"another process is at work in '.*work'"),
            exclusive(tmp_path / "work", wait=False),
        ):
            pass
        os.kill(holder.pid, signal.SIGKILL)
    start = time.monotonic()
    with exclusive(tmp_path / "work", wait=True):
        assert time.monotonic() - start < 10
