import multiprocessing
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
from conftest import ROOT
from torch.distributed import distributed_c10d

from cemb.study import exchange, processes_bench


def test_bytes_measured_are_those_of_the_sizes():
    sizes = {"num_embeddings": 5000, "embedding_dim": 30, "batch_size": 2048, "pool_size": 4096}
    found = list(processes_bench.run(**sizes, repeats=2, rounds=2))
    assert not multiprocessing.active_children()
    assert len(found) == 8
    for alone, both in zip(found[::2], found[1::2], strict=True):
        assert {record["table"] for record in (alone, both)} in ({"full"}, {"hashed"})
        assert (alone["num_processes"], alone["bytes_sent_per_step"]) == (1, 0)
        assert both["num_processes"] == 2
        assert both["bytes_sent_per_step"] == pytest.approx(
            both["expected_bytes_per_step"], rel=0.01 if both["sparse_gradients"] else 0
        )
        assert both["total_ms"] > both["exchange_ms"] > 0
        assert len(both["total_ms_repeats"]) == len(alone["total_ms_repeats"]) == 2
    assert [record["bytes_sent_per_step"] for record in found[1::2]][:2] == [4 * 4096] * 2
    assert found[7]["bytes_sent_per_step"] == 4 * 5000 * 30


@pytest.mark.parametrize(("num_rows", "num_drawn"), [(1, 0), (1, 5), (50, 3), (300, 1000)])
def test_expected_rows_are_those_of_draws(num_rows, num_drawn):
    rng = np.random.default_rng(0)
    drawn = [len(set(rng.integers(num_rows, size=num_drawn).tolist())) for _ in range(2000)]
    error = 4 * np.std(drawn) / np.sqrt(len(drawn)) + 1e-9
    assert exchange.expected_rows(num_rows, num_drawn) == pytest.approx(np.mean(drawn), abs=error)


def test_times_are_bytes_over_bandwidth():
    # Of two machines each sends half of its sums and half of the other's: once all in all.
    assert exchange.exchange_s(1e9, 2, 1.25, is_sparse=False) == pytest.approx(0.8)
    assert exchange.exchange_s(1e9, 2, 1.25, is_sparse=True) == pytest.approx(0.8)
    assert exchange.exchange_s(1e9, 8, 12.5, is_sparse=False) == pytest.approx(2 * 7 / 8 / 12.5)
    assert exchange.exchange_s(1e9, 1024, 12.5, is_sparse=True) == pytest.approx(1023 / 12.5)
    assert exchange.exchange_s(1e9, 1, 12.5, is_sparse=True) == 0
    assert exchange.dense_bytes(262_144) == 2**20
    assert exchange.sparse_bytes(10, 100) == 10 * 408
    with pytest.raises(ValueError, match=r"gb_per_s must lie in \(0, inf\), got 0"):
        exchange.exchange_s(1, 2, 0, is_sparse=False)
    with pytest.raises(ValueError, match="num_machines must be at least 1, got 0"):
        exchange.exchange_s(1, 0, 1, is_sparse=False)


def test_the_model_does_without_torch():
    code = "import sys, cemb.study.exchange; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"pool_size": 0}, "pool_size must be at least 1, got 0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        next(processes_bench.run(**options))


def test_a_process_that_ends_before_it_joins_is_waited_for_no_longer_than_the_timeout(monkeypatch):
    # A group that fails leaves it raised, and the next would be of another name than its other ranks'.
    monkeypatch.setattr(distributed_c10d._world, "group_count", 0)
    monkeypatch.setattr(processes_bench, "_serve", print)  # and ends
    monkeypatch.setattr(processes_bench, "_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(RuntimeError, match=r"(?i)timeout|timed out"):
        next(processes_bench.run(num_embeddings=10, pool_size=10, batch_size=2, repeats=1, rounds=1))
    assert not multiprocessing.active_children()
