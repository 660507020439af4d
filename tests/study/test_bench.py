import dataclasses
import os

import pytest
import torch
from conftest import ROOT, long

from cemb.study import bandwidths, bench, rivals, roofline, sizes, speed, targets, timing

SIZES = {"num_embeddings": 400, "embedding_dim": 8, "batch_size": 16}
RATES = {
    "stream_gb_per_s": 10.0,
    "random_rows_per_s": 2e7,
    "random_values_per_s": 1e8,
    "cached_gathers_per_s": 1e9,
    "cached_adds_per_s": 5e8,
}


def _record(table, total_ms, *, optimizer="sgd", thp="0", **fields):
    case = speed.SpeedCase(table, optimizer, **fields)
    return {
        **dataclasses.asdict(case),
        "kind": "speed",
        "label": case.label,
        "total_ms": total_ms,
        "peak_mib": 10.0,
        "thp_mem_alloc_enable": thp,
    }


def _found(hashed_ms):
    small = {"pool_size": sizes.SMALL}
    return [
        _record("full", 200.0),
        _record("full", 50.0, thp="1"),
        _record("full", 30.0, sparse_gradients=True, thp="1"),
        _record("full", 40.0, sparse_gradients=True),
        _record("full", 1.0, ids="zipf"),
        _record("full-fused", 10.0),
        _record("hashed", hashed_ms, block_size=sizes.BLOCK, **small),
        _record("hashed", 0.1, block_size=sizes.BLOCK, thp="1", **small),
        _record("hashed", hashed_ms, block_size=sizes.BLOCK, num_embeddings=sizes.HUGE_TABLE, **small),
    ]


def test_a_ratio_is_to_the_best_peer_under_either_setting():
    target = targets.targets()[0]
    ratio, ours, best = target.evaluate(_found(3.0))
    assert ratio == pytest.approx(0.1)
    assert (ours["total_ms"], best["total_ms"], best["thp_mem_alloc_enable"]) == (3.0, 30.0, "1")
    assert target.evaluate([]) is None


def test_peers_of_another_rule_can_be_left_out():
    target = targets.targets()[0]
    found = [*_found(3.0), _record("full-fbgemm-rowwise", 6.0)]
    assert target.evaluate(found)[0] == pytest.approx(0.5)
    assert targets.of_one_rule(target).evaluate(found)[0] == pytest.approx(0.1)


def test_our_full_table_has_a_state_for_each_row_against_a_peer_that_has():
    (target,) = (
        t
        for t in targets.targets()
        if t.optimizer == "adagrad" and t.name.startswith("full table, same kernels")
    )
    found = [
        _record("full-fused", 10.0, optimizer="adagrad"),
        _record("full", 40.0, optimizer="adagrad"),
        _record("full-fbgemm-rowwise", 20.0, optimizer="adagrad"),
    ]
    assert target.evaluate(found)[0] == pytest.approx(10 / 20)
    found.append(_record("full-fused-rowwise", 5.0, optimizer="adagrad"))
    assert target.evaluate(found)[0] == pytest.approx(5 / 20)
    assert targets.of_one_rule(target).evaluate(found)[0] == pytest.approx(10 / 40)
    assert target.evaluate([r for r in found if "fbgemm" not in r["table"]])[0] == pytest.approx(10 / 40)
    (hashed,) = (t for t in targets.targets() if t.optimizer == "adagrad" and t.limit == 0.75)
    found.append(_record("hashed", 2.0, optimizer="adagrad", pool_size=sizes.SMALL, block_size=sizes.BLOCK))
    assert hashed.evaluate(found)[0] == pytest.approx(2 / 5)
    assert targets.of_one_rule(hashed).evaluate(found)[0] == pytest.approx(2 / 10)


def test_ours_may_be_a_step_in_one_pass():
    target, said = targets.targets()[0], []
    fields = {"pool_size": sizes.SMALL, "block_size": sizes.BLOCK, "one_pass": True}
    found = [*_found(3.0), _record("hashed", 1.5, **fields)]
    assert target.evaluate(found)[0] == pytest.approx(0.05)
    assert target.evaluate(targets.by_autograd(found))[0] == pytest.approx(0.1)
    targets.check_targets(found, said.append)
    assert any("0.050 (at most 0.2, 0.100 by autograd), 1.50 ms / 30.00 ms" in line for line in said)


@pytest.mark.parametrize(("hashed_ms", "reached"), [(3.0, True), (6.1, False)])
def test_targets_are_judged(hashed_ms, reached):
    said = []
    assert targets.check_targets(_found(hashed_ms), said.append) == reached
    assert any(line.startswith("pass") for line in said)
    assert any(line.startswith("FAIL") for line in said) != reached
    assert any(line.startswith("not measured") for line in said)
    assert not any("floor" in line for line in said)


def test_targets_are_told_with_what_the_floor_allows():
    said = []
    targets.check_targets([{"kind": "rates", **RATES}, *_found(3.0)], said.append)
    floor_ms = 4 * 65_536 * 4 * 160 / 64 / 1e9 * 1e3  # lines, read twice and, at half the rate, added to
    (line,) = (line for line in said if "block 25 / best peer" in line and line.startswith("pass"))
    assert f"0.100 (at most 0.2, {floor_ms / 30:.3f} at the floor), 3.00 ms / 30.00 ms" in line


def test_too_much_memory_is_a_miss():
    found = _found(3.0)
    found[-1]["peak_mib"] = 65.0
    said = []
    assert not targets.check_targets(found, said.append)
    assert any("65.0 MiB a step" in line for line in said)
    assert not targets.check_targets([])  # nothing measured is nothing reached


def test_floors_count_what_must_move():
    def floor(table, optimizer="sgd", bandwidths=RATES, **fields):
        case = dataclasses.replace(speed.SpeedCase(table, optimizer), **fields)
        return roofline.floor_ms(dataclasses.asdict(case), bandwidths)

    rows_ms = 65_536 / 2e7 * 1e3
    assert floor("full", sparse_gradients=True) == pytest.approx(2 * rows_ms)
    assert floor("full-fused", "adam") == pytest.approx(6 * rows_ms)
    assert floor("full-fused-rowwise", "adagrad") == pytest.approx(2 * rows_ms)
    # Dense: rows once, then the gradient written and read, weights read and written, 0.4 GB each.
    assert floor("full") == pytest.approx(rows_ms + 4 * 40)
    # One value a line at block size 1; a 64th of 460 bytes of a row, or a single value, whichever is less.
    # Of those, dropout leaves .9² to be used.
    lines_ms = 0.81 * 6_553_600 * min(1e-8, 64 / 460 / 2e7) * 1e3
    large = floor("hashed", pool_size=sizes.LARGE)
    assert large == pytest.approx(2 * lines_ms)
    # Where reading in order is fast, a step had better visit everything: 0.4 GB six times.
    fast = {**RATES, "stream_gb_per_s": 100}
    in_order = floor("hashed", "adam", fast, pool_size=sizes.LARGE)
    assert in_order == pytest.approx(lines_ms + 6 * 4)
    small = floor("hashed", pool_size=sizes.SMALL)
    assert small == pytest.approx(4 * 0.81 * 6_553_600 / 1e9 * 1e3)
    older = {name: rate for name, rate in RATES.items() if name != "cached_adds_per_s"}
    small = floor("hashed", bandwidths=older, pool_size=sizes.SMALL)
    assert small == pytest.approx(3 * 0.81 * 6_553_600 / 1e9 * 1e3)
    in_one_pass = floor("hashed", pool_size=sizes.SMALL, one_pass=True)
    assert in_one_pass == pytest.approx(floor("hashed", pool_size=sizes.SMALL) * 3 / 4)
    assert roofline.floor_ms({"device": "cuda"}, RATES) is None


GPU_RATES = {
    "stream_gb_per_s": 1000,
    "random_rows_per_s": 1e9,
    "random_row_adds_per_s": 5e8,
    "random_values_per_s": 1e10,
    "random_value_adds_per_s": 5e9,
    "cached_blocks_per_s": 1e10,
    "cached_block_adds_per_s": 5e9,
    "cached_values_per_s": 1e11,
    "cached_value_adds_per_s": 5e10,
}


def test_floors_of_a_gpu_count_what_must_move():
    def floor(table, optimizer="sgd", **fields):
        case = dataclasses.replace(speed.SpeedCase(table, optimizer, dropout=0.5), **fields)
        return roofline.gpu_floor_ms(dataclasses.asdict(case), GPU_RATES)

    rows_ms = 65_536 / 1e9 * 1e3
    # Rows are read once, and weights, or also two moments, updated at half that rate.
    assert floor("full", sparse_gradients=True) == pytest.approx(3 * rows_ms)
    assert floor("full", "adam", sparse_gradients=True) == pytest.approx(7 * rows_ms)
    # Read twice and added to once; the gradient written and read, weights read and written, 0.4 GB each.
    assert floor("full") == floor("full-fused") == pytest.approx(4 * rows_ms + 4 * 0.4)
    pool_ms = 4 * 2**20 / 1e12 * 1e3
    blocks_ms = 6_553_600 / 32 / 1e10 * 1e3
    blocks = {"pool_size": sizes.SMALL, "block_size": 32}
    assert floor("hashed", **blocks) == pytest.approx(4 * blocks_ms + pool_ms)
    # A quarter of the values survive dropout.
    values_ms = 6_553_600 / 4 / 1e11 * 1e3
    assert floor("hashed", pool_size=sizes.SMALL) == pytest.approx(4 * values_ms + pool_ms)
    large = floor("hashed", pool_size=sizes.LARGE)
    assert large == pytest.approx(40 * values_ms + 4 * 0.4)
    in_blocks = floor("hashed", pool_size=sizes.LARGE, block_size=32)
    assert in_blocks == pytest.approx(4 * rows_ms + 4 * 0.4)
    assert floor("hashed", pool_size=sizes.SMALL, block_size=25) is None


def test_the_ratio_on_a_gpu_is_to_the_best_full_table():
    def record(table, ms, **fields):
        case = speed.SpeedCase(table, "sgd", ids="uniform")
        return {**dataclasses.asdict(dataclasses.replace(case, **fields)), "device_ms": ms, "graph_ms": None}

    ours = record("hashed", 3.0, pool_size=sizes.SMALL, block_size=32)
    others = [
        record("hashed", 1.0, pool_size=sizes.SMALL),
        record("full", 5.0, ids="zipf"),
        record("full", 8.0, num_embeddings=9),
    ]
    full = [record("full-fused", 6.0), record("full", 9.0), {**record("full", 0.0), "device_ms": None}]
    ratio, found, best = targets.gpu_ratio([ours, *others, *full], "sgd", "device_ms")
    assert (ratio, found, best) == (0.5, ours, full[0])


def test_rates_are_plausible():
    rates = bandwidths.measure_bandwidths(megabytes=8)
    assert set(rates) == set(RATES)
    assert all(value > 0 for value in rates.values())


def test_a_small_benchmark_runs(monkeypatch):
    monkeypatch.setattr(bench, "SMALL", 64)
    monkeypatch.setattr(bench, "LARGE", 256)
    monkeypatch.setattr(bench, "BLOCK", 4)
    monkeypatch.setattr(rivals, "available", lambda table, optimizer: False)
    streams, threads = iter([4.0, 1.0, 2.0]), []

    def measure_bandwidths():
        threads.append(torch.get_num_threads())
        return {"stream_gb_per_s": next(streams)}

    monkeypatch.setattr(bandwidths, "measure_bandwidths", measure_bandwidths)
    before = torch.get_num_threads()
    found = bench.run(optimizers=["sgd"], ids=["zipf"], repeats=2, rounds=3, threads=1, **SIZES)
    assert found[0]["kind"] == "rates"
    assert threads == [1, 1, 1]
    assert torch.get_num_threads() == before
    assert (found[0]["stream_gb_per_s"], found[0]["stream_gb_per_s_rounds"]) == (2.0, [4.0, 1.0, 2.0])
    speeds = found[1:]
    assert all(r["utc_time"] > found[0]["utc_time"] for r in speeds)  # from its start to its end
    assert {r["thp_mem_alloc_enable"] for r in speeds} == {"0", "1"}
    assert {(len(r["total_ms_repeats"]), r["threads"]) for r in speeds} == {(6, 1)}
    assert {r["table"] for r in speeds} == {"full", "full-fused", "hashed"}
    assert any(r["num_embeddings"] == sizes.HUGE_TABLE for r in speeds)
    labels = [r["label"] for r in speeds if r["one_pass"] and r["thp_mem_alloc_enable"] == "0"]
    small = ["hashed, pool 64, block 1, one pass", *["hashed, pool 64, block 4, one pass"] * 2]
    # At this size both pools are small.
    large = [f"hashed, pool 256, block {block}, one pass" for block in (1, 4)]
    assert sorted(labels) == sorted(["full-fused, one pass", *small, *large])
    (record,) = (r for r in speeds if r["label"] == labels[0] and r["thp_mem_alloc_enable"] == "0")
    assert (record["total_ms"], record["backend"]) == (record["step_ms"], "numba")


def test_large_pools_and_full_tables_have_a_step_in_one_pass_alone_and_small_pools_both():
    found = [(c.table, c.pool_size, c.block_size, c.one_pass) for c in bench.cases("adam") if c.label]
    ours = [case for case in found if case[0] in ("full-fused", "hashed")]
    small = [("hashed", sizes.SMALL, block) for block in (1, sizes.BLOCK, sizes.BLOCK)]
    large = [("hashed", sizes.LARGE, block, True) for block in (1, sizes.BLOCK)]
    both = [(*case, one_pass) for case in small for one_pass in (False, True)]
    assert sorted(ours, key=str) == sorted([("full-fused", None, 1, True), *large, *both], key=str)
    assert not any(case.one_pass for case in bench.cases("sgd", device="meta"))


@pytest.mark.parametrize("table", ["full-fused", "full-fused-rowwise", "hashed"])
def test_a_step_in_one_pass_has_one_phase(table):
    case = speed.SpeedCase(table, "adagrad", one_pass=True, **SIZES)
    step = speed.Timed(case)
    weight = step._score.word_table.weight
    before = weight.detach().clone()
    clock = timing.Clock()
    step(clock)
    assert set(clock.phases_ms) == {"step"}
    assert not torch.equal(weight, before)
    for table, device in (("full", "cpu"), ("hashed-reference", "cpu")):
        with pytest.raises(
            ValueError, match=f"full-fused and hashed on the CPU, got '{table}' on '{device}'"
        ):
            speed.SpeedCase(table, "sgd", 64, one_pass=True, device=device)


def test_a_process_that_dies_is_an_error():
    process = bench._Process("0", 1)
    try:
        with pytest.raises(RuntimeError, match="the measuring process ended with status 1 during 'build'"):
            process("build", ["not a case"])
    finally:
        process.close()


MEASURING = f"""
from cemb.study import bench, speed

if __name__ == "__main__":
    process = bench._Process("0", 1)
    process("build", [speed.SpeedCase("full", "sgd", **{SIZES})])
    process("measure", 1)
    process.close()
"""


def test_a_measuring_process_that_is_killed_leaves_no_semaphore(tmp_path, started):
    (tmp_path / "measuring.py").write_text(MEASURING)
    process = started(str(tmp_path / "measuring.py"), env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (process.wait(), process.stderr.read()) == (0, "")


# Parts of torch that only its compiler loads use what it has deprecated itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "table",
    [
        *(name for name in rivals.NAMES if not name.startswith("full-fused")),
        *long(*(name for name in rivals.NAMES if name.startswith("full-fused"))),
    ],
)
def test_rivals_compute_the_same_step(table):
    optimizer = "adagrad" if table.endswith("rowwise") else "sgd"
    if not rivals.available(table, optimizer):
        with pytest.raises(ValueError, match="cannot be measured here: fbgemm needs `make peers`"):
            rivals.build(speed.SpeedCase(table, optimizer, pool_size=64, **SIZES), 0.1)
        return
    pool_size = 64 if table.startswith("hashed") else None
    timed = speed.Timed(speed.SpeedCase(table, optimizer, pool_size, **SIZES))
    (record,) = speed.measure_cases([timed.case], repeats=2)
    assert record["backend"] == rivals.NAMES[table]
    assert record["total_ms"] > 0
