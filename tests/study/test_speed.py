"""Timing, records, the speed study and the command line."""

import csv
import dataclasses
import io
import json
import os
import re

import numpy as np
import pytest
import torch

from cemb import cli
from cemb.report import speed as report_speed
from cemb.report import stats
from cemb.study import records, speed, timing
from cemb.study.identity import Code


@pytest.fixture
def schedstat(monkeypatch, tmp_path):
    """Two threads in place of /proc/self/task; the function given adds milliseconds to what both waited."""
    waited_ns = {"1": 5_000_000, "2": 7_000_000}

    def wait(milliseconds):
        for task in waited_ns:
            waited_ns[task] += int(milliseconds * 1e6)
            (tmp_path / "task" / task).mkdir(parents=True, exist_ok=True)
            (tmp_path / "task" / task / "schedstat").write_text(f"123456789 {waited_ns[task]} 42\n")

    wait(0)
    monkeypatch.setattr(timing, "_TASKS", tmp_path / "task")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return wait


def test_waiting_for_a_processor_is_of_all_threads(schedstat, tmp_path):
    assert timing.cpu_wait_ms() == 12
    schedstat(1.5)
    assert timing.cpu_wait_ms() == 15
    (tmp_path / "task" / "3").mkdir()  # a thread that ended meanwhile
    assert timing.cpu_wait_ms() == 15
    for path in tmp_path.glob("task/*/schedstat"):
        path.write_text("0\n")  # a kernel that does not count
    assert timing.cpu_wait_ms() is None
    # Two threads that both waited for half of a step of 20 ms.
    assert timing.cpu_wait_share(20, 20) == 0.5


def test_a_contended_step_is_timed_once_more(schedstat):
    waits = iter([0, 0, 900, 0, 900, 800, 0])  # by call; the first two are warm-up
    calls = []

    def step(clock):
        calls.append(next(waits))
        schedstat(calls[-1])
        with clock.phase("forward"):
            pass
        clock.phases_ms["forward"] = 1000.0

    times = timing.interleave({"a": step}, repeats=3, warmup=2, rounds=1)["a"]
    assert calls == [0, 0, 900, 0, 900, 800, 0]
    assert times["cpu_wait"] == [0, 1600, 0]
    assert times["total"] == [1000.0] * 3
    fields = timing.summarize(times)
    assert fields["cpu_wait_ms_repeats"] == [0, 1600, 0]
    assert fields["cpu_wait_share"] == pytest.approx(1600 / (2 * 3000), abs=1e-4)
    assert fields["is_contended"] is True
    assert timing.summarize({"total": [100.0], "cpu_wait": [9.0]})["is_contended"] is False


def test_where_waiting_is_not_counted_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_TASKS", tmp_path)
    times = timing.interleave({"a": lambda clock: None}, repeats=2)["a"]
    assert set(times) == {"total"}
    assert set(timing.summarize(times)) == {"total_ms", "total_ms_repeats"}


@pytest.mark.usefixtures("schedstat")
def test_steps_are_interleaved_and_counted():
    calls = []

    def step(name):
        def run(clock):
            calls.append(name)
            with clock.phase("forward"):
                pass
            with clock.phase("gradient"):
                pass

        return run

    times = timing.interleave({"a": step("a"), "b": step("b")}, repeats=5, warmup=2, rounds=2)
    # First turn: 2 warm-up calls and 2 timed; second: 1 and 3.
    assert "".join(calls) == "aaaabbbbaaaabbbb"
    for phases in times.values():
        assert phases.pop("cpu_wait") == [0] * 5
        assert {phase: len(values) for phase, values in phases.items()} == {
            "forward": 5,
            "gradient": 5,
            "total": 5,
        }
        sums = np.add(phases["forward"], phases["gradient"])
        np.testing.assert_allclose(phases["total"], sums)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        timing.interleave({}, repeats=0)


def test_summary_is_the_median_with_the_repeats():
    fields = timing.summarize({"step": [3.0, 1.0, 2.0]})
    assert fields == {"step_ms": 2.0, "step_ms_repeats": [3.0, 1.0, 2.0]}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's clear_refs")
def test_peak_memory_sees_an_allocation():
    def step(clock):
        np.ones(2**26, np.uint8).sum()

    assert 60 < timing.peak_mib(step) < 80


def test_speed_records_have_identity_values_and_provenance():
    task = speed.Task(embedding_dim=8, batch_size=32)
    study = speed.Comparison(task, "adam", 100, (1, 4), num_embeddings=500, repeats=3)
    found = study.measure()
    assert [r["table"] for r in found] == [
        "full",
        "full",
        "full-fused",
        "hashed",
        "hashed",
        "hashed-reference",
    ]
    assert [r["backend"] for r in found] == ["torch", "torch", "numba", "numba", "numba", "torch"]
    assert [r["one_pass"] for r in found] == [False, False, True, False, False, False]
    for record in found:
        assert record["pool_size"] == (None if record["table"].startswith("full") else 100)
        for phase in ("step", "total") if record["one_pass"] else ("forward", "gradient", "step", "total"):
            assert len(record[f"{phase}_ms_repeats"]) == 3
            assert record[f"{phase}_ms"] == sorted(record[f"{phase}_ms_repeats"])[1]
        assert {"git_commit", "torch_version", "threads", "utc_time", "cpu_model"} <= record.keys()
        assert not any(isinstance(value, dict) for value in record.values())
    assert found[0]["parameters_mib"] == 500 * 8 * 4 / 2**20


@pytest.mark.parametrize(
    "make",
    [
        lambda: speed.Comparison(speed.Task(), block_sizes=(1, 101)),
        lambda: speed.Growth(speed.Task(), rows=(10, 0)),
        lambda: speed.Comparison(speed.Task(), repeats=0),
        lambda: speed.Growth(speed.Task(), threads=-1),
        lambda: speed.SpeedCase("full-fused", "sgd", batch_size=0),
        lambda: speed.SpeedCase("hashed-reference", "sgd", 2**32),
    ],
)
def test_studies_that_cannot_be_measured_are_refused_when_made(make):
    with pytest.raises(ValueError, match=r"must be (at (least|most)|below)"):
        make()


def test_cases_of_different_devices_are_not_compared():
    cases = [speed.SpeedCase("full", "sgd", num_embeddings=10)]
    cases.append(dataclasses.replace(cases[0], optimizer="adam"))
    object.__setattr__(cases[1], "device", "meta")
    with pytest.raises(ValueError, match=r"must share a device, got \['cpu', 'meta'\]"):
        speed.measure_cases(cases)


def test_zipf_ids_are_drawn_in_proportion_to_their_rank():
    case = speed.SpeedCase("full", "sgd", num_embeddings=1000, batch_size=100_000, ids="zipf")
    ids = speed._ids(case, torch.Generator().manual_seed(0))
    counts = torch.bincount(ids.flatten(), minlength=1000).double()
    assert len(counts) == 1000
    # Bins of width 1 under 1/(x + 1): row i has log((i + 2) / (i + 1)) of log(1001).
    ranks = torch.arange(1000, dtype=torch.float64)
    expected = torch.log((ranks + 2) / (ranks + 1)) / torch.log(torch.tensor(1001.0)) * counts.sum()
    assert ((counts - expected).abs() < 6 * expected.sqrt()).all()


def test_grids():
    nine = speed.grid_cases("original")
    rows = report_speed.original_2021()
    assert [(c.optimizer, c.table, c.pool_size) for c in nine] == [
        (r.optimizer, r.table, None if r.table == "full" else int(r.pool_size)) for r in rows.itertuples()
    ]
    everything = speed.grid_cases("original-full")
    assert len(everything) == 3 * 4 * (1 + 10)
    assert {c.pool_size for c in everything} >= {1, 8, 64, 512, 32_768, 134_217_728, 100_000_000}
    with pytest.raises(ValueError, match="grid must be one of original, original-full, got 'mine'"):
        speed.grid_cases("mine")


def test_published_rows_add_up():
    rows = report_speed.original_2021()
    np.testing.assert_allclose(rows.forward_ms + rows.gradient_ms + rows.step_ms, rows.total_ms, atol=0.02)


def test_csv_has_the_originals_columns():
    cases = [speed.SpeedCase("hashed", "adagrad", 64, num_embeddings=50, embedding_dim=4, batch_size=8)]
    text = speed.original_csv(speed.measure_cases(cases, repeats=1))
    (row,) = csv.DictReader(io.StringIO(text))
    in_one_call = speed.measure_cases([dataclasses.replace(cases[0], one_pass=True)], repeats=1)
    (other,) = csv.DictReader(io.StringIO(speed.original_csv(in_one_call)))
    assert other["forward_pass_ms"] == other["gradient_computation_ms"] == ""
    assert float(other["backward_pass_ms"]) > 0
    assert list(row) == [
        "Model",
        "batch_size",
        "memory_size",
        "forward_pass_ms",
        "gradient_computation_ms",
        "backward_pass_ms",
        "model size",
        "optimizer",
    ]
    assert (row["Model"], row["memory_size"], row["optimizer"]) == (
        "CompressedEmbTableModel",
        "64",
        "Adagrad",
    )


def _speed_arguments(*extra):
    sizes = "--num-embeddings 500 --embedding-dim 8 --batch-size 16 --repeats 2 --threads 1"
    return ["speed", *sizes.split(), *extra]


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("table", ["full", "full-fused", "hashed", "hashed-reference"])
def test_command_line_prints_one_record(table, capsys):
    pool = ["--pool-size", "64"] if table.startswith("hashed") else []
    assert cli.main([*_speed_arguments("--table", table, "--optimizer", "adagrad"), *pool]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["table"], record["optimizer"], record["threads"]) == (table, "adagrad", 1)
    assert record["pool_size"] == (64 if pool else None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            _speed_arguments("--optimizer", "rmsprop"),
            "choice 'rmsprop' for argument '--optimizer'. Expected one of ('sgd', 'adagrad', 'adam').",
        ),
        (_speed_arguments("--block-size", "9"), "block_size must be at most embedding_dim=8, got 9"),
        (_speed_arguments("--grid", "mine"), "invalid choice 'mine' for argument '--grid'."),
        (
            _speed_arguments("--ids", "normal"),
            "invalid choice 'normal' for argument '--ids'. Expected one of ('uniform', 'zipf').",
        ),
        (
            ["bench", "--optimizer", "lion"],
            "invalid choice 'lion' for argument '--optimizers'. Expected one of ('sgd', ",
        ),
        (["bench", "--out", "/no/where/x.jsonl"], "there is no directory '/no/where'"),
        (
            _speed_arguments("--device", "cuda:9"),
            "device 'cuda:9' was asked for, and torch sees no CUDA device",
        ),
        (_speed_arguments("--dropout", "1"), "dropout must lie in [0, 1), got 1.0"),
        (_speed_arguments("--dropout", "nan"), "dropout must lie in [0, 1), got nan"),
        (_speed_arguments("--threads", "0"), "threads must be at least 1, got 0"),
        (_speed_arguments("--repeats", "0"), "repeats must be at least 1, got 0"),
        (_speed_arguments("--warmup", "-1"), "warmup must be at least 0, got -1"),
        (["bench", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["bench", "--threads", "0"], "threads must be at least 1, got 0"),
        (["bench-counting", "--repeats", "0"], "repeats must be at least 1, got 0"),
        (["scaling", "--tokens", "0"], "num_tokens must be at least 1, got 0"),
        (["frontier", "--num-steps", "-1"], "num_steps must be at least 1, got -1"),
        (["train", "--table", "full", "--num-steps", "-1"], "num_steps must be at least 1, got -1"),
        (["train", "--compression-ratio", "0"], "compression_ratio must lie in (0, inf), got 0.0"),
        (
            ["train", "--table", "robe"],
            "Expected one of ('full', 'full-fused', 'hashed', 'hashed-reference', 'hybrid', ",
        ),
        (["train", "--table", "full", "--save", "/no/where/x.pt"], "there is no directory '/no/where'"),
        (
            _speed_arguments("--grid", "original", "--out", "/no/where/x.csv"),
            "there is no directory '/no/where'",
        ),
        (["pmi", "--corpus", "/nowhere.txt"], "corpus '/nowhere.txt' is neither one of"),
        (["train", "--table", "full", "--corpus", "/nowhere/*.txt"], "no file matches '/nowhere/*.txt'"),
        (
            ["study", "--optimizer", "lion"],
            "no run of this grid has optimizer=lion; it has adagrad, adam, lbfgs, sgd",
        ),
        (["study", "--pool-size", "7"], "no run of this grid has pool_size=7; it has 262144, 100000000"),
        (["study", "--grid", "tiny"], "Expected one of ('default', 'full', 'smoke')."),
        (["frontier", "--method", "magic"], "Expected one of ('full', 'hashed', "),
        (["train", "--pool-size", "many"], "Error parsing --pool-size: no type matching {None}|INT"),
        (["train", "--optimiser", "sgd"], "Unrecognized options: --optimiser"),
        (["train", "--table", "hashed"], "a hashed table needs pool_size or compression_ratio, not both"),
        (["train", "--table=full", "--seeds", "1", "2", "--save", "x.pt"], "there are seeds [1, 2]"),
        (["encode", "text.txt"], "Missing from python -m cemb encode: --out PATH"),
        (["tune"], "command must be one of speed, bench, "),
        ([], "command must be one of speed, bench, "),
    ],
)
def test_command_line_explains_bad_input(arguments, message, capsys):
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert re.fullmatch("cemb: .*\n", output.err)
    assert "Traceback" not in output.err


def test_command_line_trains_and_saves(tmp_path, capsys):
    import torch
    from conftest import zipf_text

    corpus, saved = tmp_path / "text.txt", tmp_path / "model.pt"
    corpus.write_text(zipf_text(5000, 80))
    common = ["--corpus", str(corpus), "--min-count", "2", "--rank", "4"]
    assert cli.main(["pmi", *common, "--histogram-out", str(tmp_path / "histogram.json")]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "pmi"
    assert sum(json.loads((tmp_path / "histogram.json").read_text())["shares"]) == pytest.approx(1)
    train = ["train", *common, "--pool-size", "90", "--num-steps", "5", "--save", str(saved)]
    assert cli.main(train) == 0
    assert json.loads(capsys.readouterr().out)["num_parameters"] == 90
    assert torch.load(saved)["word_table.weight"].shape == (90,)
    saved.unlink()
    assert cli.main([*train, "--optimizer", "sgd", "--learning-rate", "1e30"]) == 2
    printed = capsys.readouterr()
    assert "training diverged" in json.loads(printed.out)["failure"]
    assert "cemb: there is no model to save: training diverged" in printed.err
    assert not saved.exists()


def test_command_line_measures_the_frontier_and_searches_rates(tmp_path, capsys, monkeypatch):
    from conftest import zipf_text

    from cemb.study import quality

    corpus, out = tmp_path / "text.txt", tmp_path / "records.jsonl"
    corpus.write_text(zipf_text(5000, 80))
    common = ["--corpus", str(corpus), "--min-count", "2", "--rank", "4"]
    methods = ["--method", "lower rank", "int8", "--ratio", "2", "4"]
    assert cli.main(["frontier", *common, *methods, "--out", str(out)]) == 0
    assert [(r["method"], r["asked_ratio"]) for r in records.read(out)] == [
        ("lower rank", 2.0),
        ("lower rank", 4.0),
        ("int8", None),
    ]
    monkeypatch.setattr(
        quality, "learning_rate_cases", lambda: [quality.QualityCase("full", "adam", num_steps=4)]
    )
    capsys.readouterr()
    assert cli.main(["rates", *common]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert record["best_rate"] in record["rates"][1:-1]
    assert "full, full-batch, adam: " in printed.err


def test_ratios_know_ties():
    rng = np.random.default_rng(0)

    def record(center):
        values = center + rng.normal(0, 1, 15)
        return {"total_ms": float(np.median(values)), "total_ms_repeats": values.tolist()}

    tie = stats.time_ratio(record(20.0), record(20.0))
    assert tie.is_tie
    assert tie.verdict == "as fast (within the noise)"
    fast = stats.time_ratio(record(10.0), record(30.0))
    assert not fast.is_tie
    assert fast.verdict == "3.0 times faster"
    assert fast.low < fast.value < fast.high
    assert stats.time_ratio(record(30.0), record(10.0)).verdict.endswith("times slower")


def test_records_are_written_whole_and_read_back(tmp_path):
    found = [{"a": 1, "b": "ü"}, {"a": None}]
    records.write(found, tmp_path / "deep" / "records.jsonl")
    assert records.read(tmp_path / "deep" / "records.jsonl") == found
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: not a record"):
        records.read(tmp_path / "bad.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: a record is a JSON object"):
        records.read(tmp_path / "list.jsonl")


def test_records_are_strict_json():
    assert records.to_json({"score": float("nan"), "n": 1}) == '{"score": null, "n": 1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.to_json({"loss": float("inf")})


def test_sources_are_parsed_from_several_threads_while_garbage_is_collected():
    import ast
    import gc
    from concurrent.futures import ThreadPoolExecutor

    class ParsesWhenCollected:
        def __init__(self):
            self.itself = self

        def __del__(self):
            ast.parse("x = 1")

    source = (records.PACKAGE / "study" / "run.py").read_text()
    before = gc.get_threshold()
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(4) as pool:
            done = pool.map(
                lambda _: (ParsesWhenCollected(), Code({"cemb.a": source}).reach("from cemb import a\na"))[1],
                range(40),
            )
            (definitions,) = {frozenset(reached.definitions()) for reached in done}
            assert "cemb.a.run_study" in definitions
    finally:
        gc.set_threshold(*before)
