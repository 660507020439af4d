"""Counting on disk: the same bits however it is cut, within its memory, and after being stopped."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from conftest import ROOT, dask_cluster, long, zipf_text
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cooccurrence import assert_same_bits, scipy_counts, streams, window_options

from cemb import cli, files
from cemb.executors import cluster_executor
from cemb.pmi import csr, out_of_core
from cemb.pmi.cooccurrence import count_cooccurrences
from cemb.pmi.encode import encode
from cemb.pmi.out_of_core import CooccurrenceCounts, count, parse_memory
from cemb.report import data, figures, select
from cemb.report import text as report_text
from cemb.study import counting_bench


@pytest.fixture
def small_tasks(monkeypatch):
    """Tasks and blocks so small that a test's stream takes many."""
    monkeypatch.setattr(out_of_core, "LARGEST_TASK", 700)
    monkeypatch.setattr(out_of_core, "_LARGEST_MERGE", 900)


def zipf_ids(num_tokens=20_000, vocab_size=400, seed=0):
    ids = (np.random.default_rng(seed).zipf(1.3, num_tokens) % vocab_size).astype(np.int32)
    ids[:: num_tokens // 50] = -1
    return ids


def save_shards(folder, ids, cuts):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"ids-{i:05d}.npy" for i in range(len(cuts) + 1)]
    for path, shard in zip(paths, np.split(ids, cuts), strict=True):
        np.save(path, shard)
    return [np.load(path, mmap_mode="r") for path in paths]


@settings(deadline=None, max_examples=60)
@given(streams, window_options, st.lists(st.integers(0, 60), max_size=4), st.integers(1, 9), st.booleans())
def test_counts_equal_scipys_wherever_the_stream_is_cut(tmp_path_factory, tokens, options, cuts, size, merge):
    expected, denominator = scipy_counts(tokens, 7, *options)
    shards = np.split(np.array(tokens, np.int32), np.minimum(sorted(cuts), len(tokens)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(out_of_core, "LARGEST_TASK", size)
        patch.setattr(out_of_core, "_LARGEST_MERGE", 1 if merge else 50)
        counts = count(
            shards,
            tmp_path_factory.mktemp("counts") / "out",
            vocab_size=7,
            window_size=options[0],
            distance_weighting=options[1],
            symmetric=options[2],
        )
    assert counts.denominator == denominator
    assert counts.total == expected.sum() / denominator
    assert_same_bits(counts.matrix(), expected)


@pytest.mark.parametrize("options", [{}, {"subsample_threshold": 1e-3, "seed": 4}])
def test_executors_give_the_same_bits(tmp_path, small_tasks, options):
    ids = zipf_ids()
    expected = count_cooccurrences(ids, vocab_size=400, **options)
    options["word_counts"] = np.bincount(ids[ids >= 0], minlength=400)
    files = save_shards(tmp_path / "ids", ids, [5, 6, 12_345])
    with (
        ThreadPoolExecutor(3) as threads,
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes,
    ):
        ways = [
            ([ids], None),
            (files, None),
            (files, threads),
            (files, processes),
            ([ids[:9], ids[9:]], processes),
        ]
        for i, (shards, executor) in enumerate(ways):
            out = tmp_path / f"out-{i}"
            found = count(shards, out, vocab_size=400, workers=2, executor=executor, **options)
            assert_same_bits(found.matrix(), expected)
            assert not out.with_name(out.name + ".partial").exists()


def test_totals_beyond_floats_are_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(out_of_core, "LARGEST_TASK", 1000)
    ids = np.zeros(5001, np.int32)
    for i, room in enumerate([1, 2**22]):
        monkeypatch.setattr(out_of_core, "_LARGEST_MERGE", room)
        found = count(
            [ids],
            tmp_path / str(i),
            vocab_size=2,
            window_size=30,
            distance_weighting="harmonic",
            symmetric=False,
        )
        weight = found.denominator
        expected = sum((5001 - k) * (weight // k) for k in range(1, 31))
        assert expected > 2**53
        assert int(found.matrix()[0, 0]) == expected


def test_a_result_is_mapped_and_not_copied(tmp_path):
    found = count([zipf_ids()], tmp_path / "out", vocab_size=400)
    matrix = found.matrix()
    for array in (matrix.data, matrix.indices):
        while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
            array = array.base
        assert isinstance(array, np.memmap)
    assert matrix.has_sorted_indices
    matrix.data[0] += 1  # of the mapping alone
    assert CooccurrenceCounts(tmp_path / "out").matrix().data[0] == matrix.data[0] - 1


def test_streams_without_a_pair(tmp_path):
    for name, ids in (("empty", []), ("one", [2]), ("borders", [-1, 2, -1, 1, -1])):
        found = count([np.array(ids, np.int32)], tmp_path / name, vocab_size=3)
        assert found.shape == (3, 3)
        assert found.num_cells == 0


_KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from cemb import files
from cemb.pmi import out_of_core

out_of_core.LARGEST_TASK = 700
done = 0
before = files.atomic_directory
def counted(path, **options):
    global done
    done += 1
    if done > int(sys.argv[3]) + 1:  # the plan is the first
        os.kill(os.getpid(), signal.SIGKILL)
    return before(path, **options)
files.atomic_directory = counted
shards = [np.load(path, mmap_mode="r") for path in sorted(Path(sys.argv[1]).glob("*.npy"))]
out_of_core.count(shards, sys.argv[2], vocab_size=400, workers=1)
"""


@pytest.mark.parametrize("finished", [7, *long(29)])
def test_a_killed_count_goes_on_where_it_was(tmp_path, monkeypatch, finished):
    ids = zipf_ids()
    shards = save_shards(tmp_path / "ids", ids, [9000])
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "ids"), str(tmp_path / "out"), str(finished)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    partial = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()
    kept = {path.name for path in partial.glob("[rb]*-*")}
    assert len(kept) == finished

    made, before = [], files.atomic_directory
    monkeypatch.setattr(out_of_core, "LARGEST_TASK", 700)
    monkeypatch.setattr(
        files, "atomic_directory", lambda path, **options: made.append(path.name) or before(path, **options)
    )
    with pytest.raises(
        ValueError, match=r"holds counts of something else; .* window_size \(5 there, 4 wanted\)"
    ):
        count(shards, tmp_path / "out", vocab_size=400, workers=1, window_size=4)
    found = count(shards, tmp_path / "out", vocab_size=400, workers=1)
    assert len(made) == len(set(made)) > 0
    assert not kept & set(made)
    assert_same_bits(found.matrix(), count_cooccurrences(ids, vocab_size=400))
    assert not partial.exists()
    # What is there is used, and told from what was counted otherwise.
    assert count(shards, tmp_path / "out", vocab_size=400).num_cells == found.num_cells
    with pytest.raises(ValueError, match="symmetric"):
        count(shards, tmp_path / "out", vocab_size=400, symmetric=False)


def test_a_full_disk_is_named_and_what_is_finished_stays(tmp_path, small_tasks, monkeypatch):
    ids, before = zipf_ids(), files.atomic_directory

    def full(path, **options):
        if path.name == "run-00009":
            raise OSError(errno.ENOSPC, "No space left on device")
        return before(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_directory", full)
        with pytest.raises(OSError, match=r"no space is left while writing .*run-00009.*make room") as raised:
            count([ids], tmp_path / "out", vocab_size=400)
    assert raised.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "run-00000").is_dir()
    assert_same_bits(
        count([ids], tmp_path / "out", vocab_size=400).matrix(), count_cooccurrences(ids, vocab_size=400)
    )


_MEASURED = """
import sys
from pathlib import Path
import numpy as np
from cemb.pmi.out_of_core import CooccurrenceCounts, count
from cemb.study.timing import peak_mib
from cemb.pmi.matrix import write_pmi

small = np.arange(200, dtype=np.int32) % 7
write_pmi(count([small], sys.argv[1] + "-warm", vocab_size=7), sys.argv[1] + "-warm-pmi")
shards = [np.load(path, mmap_mode="r") for path in sorted(Path(sys.argv[1]).glob("*.npy"))]
memory, out = int(sys.argv[2]), sys.argv[1] + "-out"
print(peak_mib(lambda clock: count(shards, out, vocab_size=int(sys.argv[3]), memory=memory, workers=2)))
print(peak_mib(lambda clock: write_pmi(CooccurrenceCounts(out), out + "-pmi", memory=memory)))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_tokens", "vocab_size", "memory_mib"), [(24_000_000, 20_000, 64), (2_000_000, 10**6, 256)]
)
def test_memory_is_bounded(tmp_path, num_tokens, vocab_size, memory_mib):
    # Twenty-four million ids take 92 MiB, and their cells more.
    rng = np.random.default_rng(0)
    ids = np.minimum(np.exp(rng.random(num_tokens, np.float32) * np.log(vocab_size)), vocab_size - 1)
    save_shards(tmp_path / "ids", ids.astype(np.int32), [num_tokens // 3])
    command = [
        sys.executable,
        "-c",
        _MEASURED,
        str(tmp_path / "ids"),
        str(memory_mib * 2**20),
        str(vocab_size),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counting_mib, pmi_mib = map(float, done.stdout.split())
    assert counting_mib <= memory_mib
    assert pmi_mib <= memory_mib


def test_too_little_memory_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"memory=64 MiB is too little for a vocabulary of 5,000,000 on 2 workers"
    ):
        count([zipf_ids()], tmp_path / "out", vocab_size=5_000_000, memory=64 * 2**20, workers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2**31), ("512 MiB", 2**29), ("1.5g", 3 * 2**29), ("100k", 102_400), ("7", 7)]
)
def test_sizes_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "0GiB", "-1GiB", "2XB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="memory must be a size such as 512MiB or 2GiB, got"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"vocab_size": 300}, r"shard 0: token ids must lie in \[0, 300\), or be -1"),
        ({"subsample_threshold": 1e-3}, "subsample_threshold needs word_counts"),
    ],
)
def test_bad_counting_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        count([zipf_ids()], tmp_path / "out", **{"vocab_size": 400, **options})
    assert not (tmp_path / "out").exists()


def test_a_shard_that_shrinks_is_noticed(tmp_path):
    shards = save_shards(tmp_path / "ids", zipf_ids(), [100])
    np.save(tmp_path / "ids" / "ids-00001.npy", np.zeros(7, np.int32))
    with pytest.raises(ValueError, match="is shorter than it was: 19,900 values were there"):
        count(shards, tmp_path / "out", vocab_size=400)


def test_damaged_matrices_are_refused(tmp_path):
    folder = tmp_path / "out"
    count([zipf_ids()], folder, vocab_size=400)
    whole = (folder / "data.npy").read_bytes()
    (folder / "data.npy").write_bytes(whole[:-8])
    with pytest.raises(files.DamagedError, match=r"out' is damaged: the SHA-256 of data\.npy"):
        csr.CsrFolder(folder)
    (folder / "data.npy").write_bytes(whole)
    (folder / "manifest.json").write_text('{"version": 7}')
    with pytest.raises(ValueError, match="out' has version 7, and this reads version 2"):
        csr.CsrFolder(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"out' has no manifest\.json, which is written last"):
        csr.CsrFolder(folder)


def test_blocks_are_the_matrix(tmp_path):
    found = count([zipf_ids()], tmp_path / "out", vocab_size=400)
    matrix, rows = found.matrix(), 0
    for first, block in found.blocks(max_cells=500):
        assert first == rows
        assert block.nnz <= 500 or block.shape[0] == 1
        assert_same_bits(block, matrix[first : first + block.shape[0]])
        rows += block.shape[0]
    assert rows == 400


@pytest.mark.long
def test_a_cluster_that_loses_a_worker_loses_nothing(tmp_path, small_tasks):
    ids = zipf_ids(60_000)
    shards = save_shards(tmp_path / "ids", ids, [31_000])
    expected = count_cooccurrences(ids, vocab_size=400)
    with dask_cluster(2) as cluster:
        killed = []

        def kill_one():
            while len(list((tmp_path / "out.partial").glob("run-*"))) < 20:
                time.sleep(0.002)
            killed.append(cluster.workers[0].pid)
            os.kill(killed[0], signal.SIGKILL)

        with (
            ThreadPoolExecutor(1) as killer,
            cluster_executor(cluster.scheduler_address) as (executor, threads),
        ):
            assert threads == 2
            killing = killer.submit(kill_one)
            found = count(shards, tmp_path / "out", vocab_size=400, workers=threads, executor=executor)
            killing.result()
        assert len(killed) == 1
    assert_same_bits(found.matrix(), expected)


@pytest.fixture
def encoded(tmp_path):
    (tmp_path / "text.txt").write_text(zipf_text(20_000))
    return encode(str(tmp_path / "text.txt"), tmp_path / "corpus", shard_tokens=6000)


@pytest.mark.parametrize("where", [[], ["--processes", "--workers", "2"]])
def test_the_command_counts_an_encoded_corpus(tmp_path, capsys, encoded, where):
    command = ["count", str(encoded.folder), "--out", str(tmp_path / "out"), "--memory", "256MiB", *where]
    assert cli.main([*command, "--subsample-threshold", "1e-3", "--seed", "3"]) == 0
    said = json.loads(capsys.readouterr().out)
    ids = np.concatenate(encoded.shards())
    expected = count_cooccurrences(ids, vocab_size=len(encoded.words), subsample_threshold=1e-3, seed=3)
    assert_same_bits(CooccurrenceCounts(tmp_path / "out").matrix(), expected)
    assert said["total"] == expected.sum()
    assert said["num_cells"] == expected.nnz


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "lots"], "memory must be a size such as 512MiB or 2GiB, got 'lots'"),
        (["--processes", "--scheduler", "tcp://127.0.0.1:9"], "give --scheduler or --processes, not both"),
        (
            ["--window-size", "60", "--distance-weighting", "harmonic"],
            "may exceed 2^63; use a smaller window",
        ),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, encoded, options, message):
    assert cli.main(["count", str(encoded.folder), "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("cemb: ")
    assert message in said
    assert not (tmp_path / "out").exists()


def test_two_at_once_are_kept_apart(tmp_path):
    with (
        files.exclusive(tmp_path / "out.partial", wait=False),
        pytest.raises(RuntimeError, match=r"another process is at work in '.*out\.partial'"),
    ):
        count([zipf_ids()], tmp_path / "out", vocab_size=400)


def test_the_benchmark_counts_alike_and_judges(tmp_path):
    ids = counting_bench.zipf_ids(20_000, 300, bursts=True)
    assert ids.min() == 0
    assert 200 < ids.max() < 300
    expected = count_cooccurrences(ids, vocab_size=300)
    assert_same_bits(counting_bench.count_row_wise(ids, 300), expected)
    found = counting_bench.run(num_tokens=20_000, vocab_size=300, repeats=1)
    assert data.counting_table(found).what.str.contains("cemb").any()
    assert report_text.machine(found)
    said, cases = [], {record["case"]: record for record in found}
    assert set(cases) >= {"cemb", "cemb on disk", "numba row-wise", "text to PMI"}
    cases["cemb"]["count_s"], cases["numba row-wise"]["count_s"] = 1.0, 1.21
    cases["text to PMI"]["tokens_per_s"] = 4_500_000
    polars = {"kind": "counting", "case": "polars", "count_s": 2.51}
    judged = [record for record in found if record["case"] != "polars"]
    assert counting_bench.check_targets([*judged, polars], said.append)
    assert not counting_bench.check_targets([*judged, {**polars, "count_s": 2.49}], said.append)
    assert not counting_bench.check_targets(judged, said.append)
    assert any(line.startswith("not measured  counting / polars") for line in said)


def test_polars_counts_the_same():
    pytest.importorskip("polars")
    ids = counting_bench.zipf_ids(20_000, 300)
    found = counting_bench.count_polars(ids).sort("word", "context")
    expected = count_cooccurrences(ids, vocab_size=300, symmetric=False)
    assert np.array_equal(found["context"].to_numpy(), expected.indices)
    assert np.array_equal(found["count"].to_numpy(), expected.data)


def test_scaling_leaves_a_record_and_no_folder(tmp_path):
    (record,) = counting_bench.scaling([50_000], tmp_path, vocab_size=2000, memory=2**28)
    assert record["num_counted_cells"] > record["num_stored_cells"] > 0
    assert 0 <= record["count_peak_mib"] <= 256
    assert not list(tmp_path.glob("scaling-*"))
    assert record["device_name"] in report_text.machine([record])
    figures.scaling(select.frame([record], "scaling"))


def test_a_cluster_that_does_not_answer_is_named():
    message = r"no Dask scheduler answers at 'tcp://127.0.0.1:9' within 5 s"
    with pytest.raises(ConnectionError, match=message), cluster_executor("tcp://127.0.0.1:9"):
        pass


def test_counting_needs_neither_dask_nor_torch():
    heavy = "{'distributed', 'torch'}"
    code = f"import sys, cemb.pmi.out_of_core, cemb.pmi.matrix; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
