"""From records to the frontier's tables and figures: seeds, budgets, failures, learning rates."""

import csv
import html
import io
import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, of_the_default_grid

from cemb.report import answer, export, figures, frontier, gpu, labels, rivals, select, stats
from cemb.report import data as report_data
from cemb.report import quality as report_quality
from cemb.report import speed as report_speed
from cemb.report import text as report_text
from cemb.study import grid, records, sizes, targets
from cemb.train.learning_rates import default_learning_rate


def _point(method, gap, *, ratio=4.0, seed=0, training_ratio=None, failure=None):
    return {
        "kind": "frontier",
        "method": method,
        "asked_ratio": ratio,
        "seed": seed,
        "gap": gap,
        "failure": failure,
        "inference_ratio": None if failure else ratio,
        "training_ratio": None if failure else training_ratio or ratio,
        "train_s": 1.0,
        **{f"wordsim353_{field}": None if failure else 50.0 for field in ("score", "low", "high")},
        **{f"simlex999_{field}": None if failure else 30.0 for field in ("score", "low", "high")},
    }


@pytest.fixture
def found():
    return [
        *(_point("hashed", gap, seed=seed) for seed, gap in enumerate((0.7, 0.5, 0.6))),
        _point("hashed", 0.9, ratio=16.0),
        _point("transform coding", 0.08, ratio=16.0, training_ratio=3.0),
        _point("low-rank", None, ratio=64.0, failure="max_bytes must be at least 9, got 3"),
    ]


def test_the_median_seed_stands_for_all(found):
    first, *_ = stats.median_seeds(found, "method", "asked_ratio")
    assert (first["gap"], first["gap_low"], first["gap_high"], first["num_seeds"]) == (0.6, 0.5, 0.7, 3)
    assert report_text.gap_text(first) == "0.600 (0.500 to 0.700)"
    assert report_text.gap_text(found[3]) == "0.900"
    assert report_text.gap_text(found[-1]) == "failed"


def test_a_failed_seed_is_worse_than_any(found):
    found[1] = _point("hashed", None, seed=1, failure="diverged")
    assert stats.median_seeds(found, "method", "asked_ratio")[0]["gap"] == 0.7


def test_the_best_point_keeps_its_budget(found):
    assert frontier.best_point(found, "inference", 4)["method"] == "transform coding"
    assert frontier.best_point(found, "inference", 16)["gap"] == 0.08
    assert frontier.best_point(found, "training", 4)["gap"] == 0.6
    assert frontier.best_point(found, "inference", 4, ["hashed"])["gap"] == 0.6
    nothing = frontier.best_point(found, "inference", 17)
    assert nothing["method"] == "none"
    assert math.isnan(nothing["gap"])


def test_decisions_and_failures_are_shown(found):
    table = frontier.decisions(found)
    table = table.set_index("fewer bytes")
    assert list(table.loc["16× at inference"]) == [
        "transform coding, 16.0×",
        "0.080",
        "50 (50 to 50)",
        "0.900",
    ]
    assert list(table.loc["48× in training"]) == ["none", "", "", "none"]
    points, failed = frontier.frontier_table(found)
    assert list(points.table) == ["hashed", "hashed", "transform coding"]
    assert failed == ["trained low-rank at 64: max_bytes must be at least 9, got 3"]


def test_no_frontier_is_said():
    with pytest.raises(LookupError, match="no record of kind 'frontier'"):
        frontier.median_points([])


def test_seconds_are_until_the_gap_is_first_small():
    history = [{"gap": 0.9, "seconds": 1.0}, {"gap": 0.4, "seconds": 2.0}, {"gap": 0.6, "seconds": 3.0}]
    assert stats.seconds_to_gap(history, 0.5) == 2.0
    assert stats.seconds_to_gap(history, 0.1) is None


def test_the_frontier_is_drawn_with_its_ranges(found):
    figure = figures.frontier(
        pd.DataFrame(frontier.median_points(found)), [{"ratio": 8.0, "components": 0.005, "rows": 0.002}]
    )
    inference, training = figure.axes
    labels = inference.get_legend_handles_labels()[1]
    assert set(labels) == {"hashed", "transform coding", "limit, by component", "limit, by component and row"}
    assert set(training.get_legend_handles_labels()[1]) == {"hashed", "transform coding"}
    plt.close(figure)
    # As a run's own page draws them, before seeds are put together.
    plt.close(figures.frontier(pd.DataFrame(found)))


def _trained(run, table, gap, **fields):
    return {
        "kind": "quality",
        "run": run,
        "table": table,
        "training": "full-batch",
        "optimizer": "adam",
        "gap": gap,
        "weight_power": 0,
        "num_words": 1000,
        "num_epochs": 1,
        "compression_ratio": 4.0,
        "inference_bytes": 100,
        "train_s": 7.0,
        "num_parameters": 25,
        "history": [{"step": s, "seconds": s / 2, "gap": g, "loss": g} for s, g in ((0, 1.0), (10, gap))],
        **{f"wordsim353_{field}": 50.0 for field in ("score", "low", "high")},
        **{f"simlex999_{field}": 30.0 for field in ("score", "low", "high")},
        **fields,
    }


POOL = sizes.SMALL


@pytest.fixture
def trained(found):
    mini = {"training": "mini-batch"}
    return [
        *found,
        {**_point("hashed", 0.61), "inference_bytes": 100},
        {
            **_point("full", 0.003, ratio=None, training_ratio=1.0),
            "inference_ratio": 1.0,
            "inference_bytes": 400,
        },
        _trained("quality-adam-full-full-batch", "full", 0.003, num_words=9000, inference_bytes=400),
        _trained(f"quality-adam-hashed-{POOL}-full-batch", "hashed", 0.8, num_words=9000),
        _trained("quality-sgd-full-full-batch", "full", 0.1, optimizer="sgd"),
        _trained("mini-batch-full", "full-fused", 0.3, inference_bytes=400, **mini),
        *(_trained("mini-batch-hashed-4-times", "hashed", gap, seed=gap, **mini) for gap in (0.7, 0.6, 0.65)),
        _trained("mini-batch-clustered-4-times", "clustered", None, failure="diverged", **mini),
        _trained("growth-full-2500", "full", 0.002),
        *(_trained("growth-hashed-2500", "hashed", gap, compression_ratio=0.5) for gap in (0.2, 0.1)),
    ]


def test_mini_batches_stand_beside_full_batches_of_the_same_bytes(trained):
    table = report_quality.mini_batch_table(trained).set_index("table")
    assert list(table.index) == ["full table", "hashed", "clustered"]
    assert list(table["gap, mini-batches"]) == ["0.300", "0.650 (0.600 to 0.700)", "failed"]
    assert list(table["gap, full batches"]) == ["0.003", "0.610", "not measured"]
    assert report_quality.mini_batch_table(trained[:8]).empty
    assert report_quality.best_mini_batch(trained)["run"] == "mini-batch-full"
    longer = _trained("quality-adam-full-mini-batch", "full-fused", 0.2, training="mini-batch", num_epochs=8)
    assert report_quality.best_mini_batch([*trained, longer])["gap"] == 0.2
    names = list(report_quality.quality_table([*trained, longer], "mini-batch").table)
    assert names == ["full table, 1 pass", "full table, 8 passes"]


def test_growth_ends_with_the_whole_vocabulary(trained):
    table = report_quality.growth_table(trained)
    assert list(table.words) == ["1,000", "9,000"]
    assert list(table["× smaller"]) == ["0.5", "4.0"]
    assert list(table["hashed, gap"]) == ["0.100 (0.100 to 0.200)", "0.800"]
    assert list(table["full table, gap"]) == ["0.002", "0.003"]
    assert report_speed.growth_records(trained) == []
    # What is not of the quality study is not in its own tables.
    assert len(report_quality.quality_table(trained, "full-batch")) == 3
    assert len(report_quality.quality_table(trained, "mini-batch")) == 1


def test_points_are_those_asked_for(trained):
    assert frontier.point(trained, "hashed", 16.0)["gap"] == 0.9
    assert frontier.point(trained, "full")["gap"] == 0.003
    assert frontier.point(trained, "hashed", 8) is None
    assert report_text.gap_text(frontier.point(trained, "low-rank", 64)) == "failed"


def test_the_trivial_table_is_the_first_at_the_same_bytes(trained):
    table = frontier.same_bytes_table([*trained, _point(frontier.TRIVIAL, 0.2)])
    assert list(table.columns) == ["table", "4×", "16×", "64×"]
    assert list(table.iloc[0]) == ["rank-r SVD, then int8", "0.200", "", ""]
    assert list(table.set_index("table").loc["hashed"])[1:] == ["0.900", ""]


def test_words_for_what_beats_the_trivial_table(trained):
    assert frontier.beats_trivial(trained, 16.0) == "(not measured)"
    points = [
        *trained,
        _point(frontier.TRIVIAL, 0.7, ratio=16.0),
        _point("int8", 0.0001, ratio=None),
        _point("low-rank", 0.6, ratio=16.0),
        _point("clustered", 0.5, ratio=4.0),
    ]
    assert frontier.beats_trivial(points, 16.0) == "transform coding, trained low-rank"
    points.append(_point(frontier.TRIVIAL, 0.1, ratio=4.0))
    assert frontier.beats_trivial(points, 4.0) == "none"


def test_gaps_whose_seeds_overlap_are_tied():
    def seeds(method, *gaps, ratio=4.0):
        return [_point(method, gap, ratio=ratio, seed=seed) for seed, gap in enumerate(gaps)]

    points = [
        *seeds("hashed", 0.50, 0.52, 0.54),
        *seeds("low-rank", 0.53, 0.56, 0.60),
        *seeds("clustered", 0.55, 0.57),
        *seeds("hybrid", 0.50, ratio=2.0),
    ]
    assert frontier.best_method_text(points, "inference", 4) == "hashed (tied with trained low-rank)"
    assert frontier.best_method_text(points, "inference", 2) == "hybrid (tied with hashed)"
    assert frontier.best_method_text(points, "inference", 5) == "none"
    uses = frontier.decisions(points).set_index("fewer bytes").use
    assert uses["4× at inference"] == "hashed (tied with trained low-rank), 4.0×"
    trivial = seeds(frontier.TRIVIAL, 0.565)
    assert (
        frontier.beats_trivial([*points, *trivial], 4.0)
        == "hashed, clustered (a tie), trained low-rank (a tie)"
    )
    failed = {"gap": None}
    assert not stats.gaps_tie({"gap": 0.5}, failed)
    assert stats.gaps_tie({"gap": 0.5}, {"gap": 0.6, "gap_low": 0.4, "gap_high": None})
    assert not stats.gaps_tie({"gap": 0.5}, {"gap": 0.5001})


def test_optimizers_whose_seeds_overlap_are_tied():
    def seeds(optimizer, *gaps):
        name = f"quality-{optimizer}-full-full-batch"
        return [_trained(name, "full", gap, optimizer=optimizer, seed=k) for k, gap in enumerate(gaps)]

    found = [*seeds("sgd", 0.3, 0.4), *seeds("adagrad", 0.01, 0.03, 0.05), *seeds("adam", 0.02, 0.021, 0.022)]
    assert report_quality.best_optimizer_text(found) == "Adam (tied with Adagrad)"
    found[-1]["gap"] = found[-2]["gap"] = found[-3]["gap"] = 0.002
    assert report_quality.best_optimizer_text(found) == "Adam"


def _bench_record(table, middle, **fields):
    return {
        "kind": "speed",
        "ids": "uniform",
        "optimizer": "sgd",
        "num_embeddings": sizes.ROWS,
        "device": "cpu",
        "embedding_dim": 100,
        "batch_size": 100,
        "sparse_gradients": False,
        "pool_size": None,
        "block_size": 1,
        "thp_mem_alloc_enable": "0",
        "peak_mib": 1.0,
        "label": table,
        "table": table,
        "total_ms": middle,
        "total_ms_repeats": [middle + step for step in (-0.4, -0.2, 0.0, 0.2, 0.4)],
        **fields,
    }


_BENCH_RATES = {
    "kind": "rates",
    "stream_gb_per_s": 50,
    "random_rows_per_s": 1e8,
    "random_values_per_s": 4e8,
    "cached_gathers_per_s": 4e9,
}


def test_steps_in_one_pass_stand_beside_the_usual_ones():
    one_pass = _bench_record("full-fused", 2.0, one_pass=True, label="full-fused, one pass")
    found = [_BENCH_RATES, _bench_record("full-fused", 4.0), _bench_record("full", 10.0), one_pass]
    assert rivals.bench_frame(found).table.tolist() == [
        "full table, same kernels",
        "full table, same kernels, one pass",
        "full table, PyTorch",
    ]
    (row,) = rivals.targets_table(found).to_dict("records")
    assert row["ratio"].startswith("0.20 (")
    assert row["by autograd"] == "0.40"


def test_a_target_within_the_noise_is_undecided():
    (target, *_) = (
        t for t in targets.targets() if t.name.startswith("full table, same kernels") and t.optimizer == "sgd"
    )

    def verdict(ours):
        found = [_BENCH_RATES, _bench_record("full-fused", ours), _bench_record("full", 10.0)]
        return rivals.targets_table(found).set_index("what").ratio[target.name]

    assert verdict(10 * target.limit - 2).endswith("), reached")
    assert verdict(10 * target.limit + 0.05).endswith("), undecided")
    assert verdict(10 * target.limit + 2).endswith("), missed")


def test_tables_have_one_name_each():
    _, found = select.reference("bench")
    speeds = [record for record in found if record["kind"] == "speed"]
    names = {record["label"]: labels.timed(record) for record in speeds}
    assert len(set(names.values())) == len(names)
    assert names["full, sparse gradients"] == "full table, PyTorch, sparse gradients"
    assert names["full-fused, one pass"] == "full table, same kernels, one pass"
    assert names["hashed, pool 262,144, block 1"] == "hashed, pool 262,144, block 1"
    assert not [name for name in names.values() if re.search("fused|reference|compiled", name)]
    methods = [method for group in grid.FRONTIER.values() for method in group]
    assert len({labels.trained(method) for method in methods}) == len(methods)
    assert labels.trained("low-rank, then int8") == "trained low-rank, then int8"


def test_records_are_found_by_what_their_runs_were_asked_for():
    _, found = select.reference("records")
    for optimizer in sizes.OPTIMIZERS:
        for pool_size in sizes.POOL_SIZES:
            own = report_speed.run_records(found, optimizer, pool_size)
            assert {r["optimizer"] for r in own} == {optimizer}
            assert {r["pool_size"] for r in own if r["table"] == "hashed"} == {pool_size}
            assert len({r["run"] for r in own}) == 1
            assert [r["label"] for r in own][:2] == ["full, dense gradients", "full, sparse gradients"]
    rows = {r["num_embeddings"] for r in report_speed.growth_records(found) if r["table"] == "hashed"}
    assert rows == {10**power for power in range(4, 10)}
    for ratio in grid.COMPRESSION_RATIOS:
        for power in (None, grid.WEIGHT_POWER):
            record = report_quality.quality_record(found, "adam", compression_ratio=ratio, weight_power=power)
            assert record["compression_ratio"] == pytest.approx(ratio, rel=1e-6)
            assert record["weight_power"] == (power or 0)
            assert (record["training"], record["pmi_max_vocab"]) == ("full-batch", None)
    small = report_quality.quality_record(found, "sgd", pool_size=POOL)
    assert (small["pool_size"], small["optimizer"]) == (POOL, "sgd")
    renamed = [{**record, "run": f"of-old-{record['run']}"} for record in found]
    assert select.of_runs(renamed, "speed.ipynb") == []


def test_contended_records_are_marked():
    speed = {**_speed("hashed", 1000), "kind": "speed"}
    speed |= {f"{phase}_ms": 1.0 for phase in report_speed.PHASES}
    waited, free = {**speed, "is_contended": True}, {**speed, "is_contended": False}
    assert list(report_speed.speed_table([speed, waited, free]).table) == [
        "hashed",
        "hashed (contended)",
        "hashed",
    ]
    assert list(report_speed.speed_table([waited, free]).table) == ["hashed (contended)", "hashed"]


def test_minutes_are_from_the_first_record_to_the_last():
    times = ("2026-01-01T00:10:00+00:00", "2026-01-01T00:00:00+00:00", "2026-01-01T00:07:30+00:00")
    assert report_text.minutes([{"utc_time": time} for time in times]) == 10


def test_words_for_rounded_tables(trained):
    assert frontier.rounding_cost(trained) == ("(not measured)", None)
    assert frontier.rounded_text(frontier.best_rounded(trained, 8)) == "(not measured)"
    rounded = [
        {**_point("hashed, then int8", 0.55, ratio=8), "float32_gap": 0.5499},
        {**_point("clustered, then int8", 0.41, ratio=8), "float32_gap": 0.4085},
        {**_point("low-rank, then int8", None, ratio=8, failure="diverged"), "float32_gap": None},
    ]
    assert frontier.rounding_cost([*trained, *rounded]) == ("0.0015", rounded[1])
    assert frontier.rounded_text(frontier.best_rounded([*trained, *rounded], 8)) == "clustered, 0.410"


def test_words_for_growth(trained):
    nothing = report_speed.growth_numbers(trained)
    assert set(nothing.values()) == {("(not measured)", None)}
    shared = {"kind": "speed", "run": "growth-speed"}
    speed = [
        {**_speed("hashed", rows, 25), **shared, "total_ms": 2.0 + rows / 10**9} for rows in (1000, 10**9)
    ]
    found = report_speed.growth_numbers([*trained, *speed, {**_speed("full-fused", 10**6), **shared}])
    assert {name: value for name, (value, _) in found.items()} == {
        "growth_block_1": "(not measured)",
        "growth_block_25": "2.0 to 3.0",
        "growth_fewest": "1,000",
        "growth_most": "1,000,000,000",
        "growth_hashed_mib": "3",
        "growth_full_gib": "1,118",
    }
    assert {source["run"] for _, source in found.values()} == {"growth-speed"}
    assert set(found) == set(nothing)


def test_an_empty_table_says_so():
    assert "Not among these records" in report_text.show(pd.DataFrame()).to_html()


def test_curves_are_against_steps_and_seconds(trained):
    figure = figures.learning_curves(report_quality.quality_frame(trained), "full-batch")
    steps, seconds = figure.axes[:3], figure.axes[3:]
    (adam_full, adam_hashed) = steps[2].lines
    assert list(adam_full.get_xdata()) == [0, 10]
    assert list(seconds[2].lines[0].get_xdata()) == [0, 5]
    assert list(adam_hashed.get_ydata()) == [1.0, 0.8] == list(seconds[2].lines[1].get_ydata())
    assert len(steps[0].lines) == len(seconds[0].lines) == 1
    plt.close(figure)


def _speed(table, rows, block=1):
    return {
        "table": table,
        "label": table,
        "optimizer": "adam",
        "num_embeddings": rows,
        "embedding_dim": 100,
        "block_size": block,
        "total_ms": 5.0,
        "total_ms_repeats": [4.0, 5.0, 7.0],
        "parameters_mib": rows * 100 * 4 / 2**20 if table == "full-fused" else 1.0,
        "peak_mib": 2.0,
    }


def test_growth_is_drawn_with_what_there_is(trained):
    speed = pd.DataFrame([_speed("full-fused", 1000), *(_speed("hashed", rows) for rows in (1000, 10**9))])
    figure = figures.growth(report_quality.growth_frame(trained), speed)
    quality, times, memory = figure.axes
    assert quality.get_legend_handles_labels()[1] == ["full table, gap", "hashed, gap"]
    assert times.get_ylabel() == "milliseconds a step"
    (counted,) = [line for line in memory.lines if line.get_label() == "full table, counted"]
    # A value and Adam's two, 4 bytes each.
    assert counted.get_ydata()[1] == pytest.approx(10**9 * 100 * 12 / 2**20)
    plt.close(figure)
    plt.close(figures.growth(report_quality.growth_frame(trained), pd.DataFrame()))
    plt.close(figures.growth(pd.DataFrame(), speed))


def test_compositions_are_drawn_beside_what_is_made_after_training(trained):
    points = [
        *trained,
        _point("hashed, then int8", 0.55),
        _point("low-rank, then int8", 0.4),
        _point("transform coding", 0.01),
    ]
    figure = figures.composition(pd.DataFrame(frontier.median_points(points)))
    shown = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title() for panel in shown] == ["hashed", "trained low-rank"]
    plt.close(figure)
    plt.close(figures.composition(pd.DataFrame(frontier.median_points(trained))))


def test_learning_rates_are_as_good_as_what_the_reference_found():
    _, found = select.reference("rates")
    assert {(r["table"], r["optimizer"]) for r in found} >= {("full", "sgd"), ("hashed", "adam")}
    for record in found:
        rates, gaps = record["rates"], [math.inf if gap is None else gap for gap in record["gaps"]]
        best = gaps.index(min(gaps))
        assert 0 < best < len(rates) - 1, record
        assert record["best_rate"] == rates[best]
        kept = default_learning_rate(record["table"], record["optimizer"], record["training"])
        assert gaps[rates.index(kept)] - gaps[best] < 0.01, record


def test_the_machine_measured_last_stands_first(monkeypatch, tmp_path):
    _, found = select.reference("bench")
    for name, day in (("a", "2026-01-02"), ("b", "2026-01-03"), ("c", "2026-01-01")):
        folder = tmp_path / "results" / "reference" / name
        folder.mkdir(parents=True)
        dated = [{**record, "utc_time": f"{day}T00:00:00+00:00"} for record in found]
        records.write(dated, folder / "bench.jsonl")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert [name for name, _ in select.references("bench")] == ["b", "a", "c"]
    assert select.reference("bench")[0] == "b"
    others = rivals.other_machines()
    assert others.machine.tolist() == ["a", "c"]
    ratios = rivals.targets_table(found).ratio
    assert others.reached[0] == f"{int(ratios.str.endswith('reached').sum())} of {len(ratios)}"
    assert others["not reached"][0].count(";") + 1 == (~ratios.str.endswith(", reached")).sum()
    with pytest.raises(FileNotFoundError, match=r"no machine among results/reference has a rates\.jsonl"):
        select.reference("rates")


def test_counting_is_shown_fastest_first():
    counted = {"num_tokens": 100, "tokens_per_s": 2_500_000}
    found = [
        {"case": "polars", "count_s": 8.0, "count_s_repeats": [8.0, 8.0], **counted},
        {"case": "cemb", "count_s": 2.0, "count_s_repeats": [1.8, 2.0, 2.2], **counted},
        {"case": "row-wise", "count_s": 2.1, "count_s_repeats": [1.9, 2.1, 2.3], **counted},
        {"case": "text to PMI", "count_s": 1.0, "num_tokens": 50, "tokens_per_s": 1},
    ]
    table = report_data.counting_table(found)
    assert table.what.tolist() == ["cemb", "row-wise", "polars"]
    ours, near, far = table["times ours"]
    assert ours == "1"
    assert near.startswith("1.05 (")
    assert near.endswith(", tie")
    assert far.startswith("4.00 (3.6")
    assert "tie" not in far


def test_scaling_and_bands_are_drawn():
    rows = pd.DataFrame(
        {
            "num_tokens": [10**7, 10**6],
            "count_s": [5.0, 1.0],
            "pmi_s": [1.0, 0.2],
            "count_peak_mib": [190.0, 170.0],
            "pmi_peak_mib": [101.0, 115.0],
            "memory_mib": [512.0, 512.0],
        }
    )
    left, right = figures.scaling(rows).axes
    assert [line.get_label() for line in right.lines] == ["counting", "PMI", "allowed"]
    assert left.lines[0].get_xydata().tolist() == [[10**6, 1.0], [10**7, 5.0]]
    (axes,) = figures.sparsity_by_band(np.array([9, 8, 3, 2]), np.array([0, 4, 6, 7, 8])).axes
    middles = sorted(tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1)
    assert middles == [(pytest.approx(2**1.5), 0.25), (pytest.approx(2**3.5), 0.75)]


def test_the_citation_is_that_of_the_file_for_tools():
    entry = answer.bibtex()
    said = (ROOT / "CITATION.cff").read_text()
    for name in ("title", "version", "name", "license"):
        value = re.search(rf'^[ -]*{name}: "?(.*?)"?$', said, re.MULTILINE)[1]
        assert re.search(rf"= {{+{re.escape(value)}[ }}]", entry), name
    assert entry.startswith("@software{cemb,\n")
    assert entry.count("{") == entry.count("}")


def test_the_benchmark_on_a_gpu_is_shown():
    _, found = select.reference("gpu")
    rows = gpu.gpu_frame(found)
    speeds = [record for record in found if record["kind"] == "speed"]
    assert len(rows) * 2 == len(speeds)  # uniform and Zipf ids
    table = gpu.gpu_table(found, "adam")
    sparse = table[table.table == "full table, PyTorch, sparse gradients"].iloc[0]
    assert sparse["as a graph (ms)"] == ""
    (record,) = (
        r for r in speeds if r["optimizer"] == "adam" and r["sparse_gradients"] and r["ids"] == "uniform"
    )
    assert float(sparse["the GPU's own (ms)"]) == pytest.approx(record["device_ms"], abs=6e-4)
    summary = gpu.gpu_targets_table(found)
    assert len(summary) == 3
    assert list(summary["own time"].str.split(", ").str[1]) == [
        "reached" if targets.gpu_ratio(found, optimizer, "device_ms")[0] <= targets.GPU_LIMIT else "missed"
        for optimizer in sizes.OPTIMIZERS
    ]


def test_the_tour_is_launched_from_where_the_source_is():
    text = answer.launch("https://github.com/someone/cemb.git")
    assert "(https://mybinder.org/v2/gh/someone/cemb/HEAD?urlpath=lab/tree/notebooks/tour.ipynb)" in text
    assert "(https://colab.research.google.com/github/someone/cemb/blob/HEAD/notebooks/tour.ipynb)" in text
    assert "http" not in answer.launch(None)
    assert (ROOT / "notebooks" / "tour.ipynb").exists()


@pytest.fixture
def published():
    return select.reference("records")


def test_a_default_study_is_completed_with_what_the_reference_trained(published):
    name, whole = published
    own = of_the_default_grid(whole)
    assert 50 < len(own) < len(whole) / 2
    found = select.completed(own)
    added = [record for record in found if record not in own]
    assert len(added) == len(found) - len(own)
    assert {record["reference"] for record in added} == {name}
    assert {record["kind"] for record in added} == {"quality", "frontier"}
    # Each once, and every one.
    trained = [json.dumps(r, sort_keys=True) for r in whole if r["kind"] in ("quality", "frontier")]
    there = [{k: v for k, v in r.items() if k != "reference"} for r in found]
    there = [json.dumps(r, sort_keys=True) for r in there if r["kind"] in ("quality", "frontier")]
    assert sorted(there) == sorted(trained)
    assert select.whole_study(own) == [{**record, "reference": name} for record in whole]
    # So the pages say the same of it as of the whole study, but for what they call the median's seconds.
    for table in (frontier.same_bytes_table, frontier.decisions, report_quality.growth_table):
        assert table(found).equals(table(whole))
    assert frontier.beats_trivial(found, 16) == frontier.beats_trivial(whole, 16)
    assert report_quality.best_optimizer_text(found, compression_ratio=16) != report_text.NOT_MEASURED
    assert report_text.sources_text(found).startswith(f"Of {len(trained)} records of training, ")
    assert name in report_text.sources_text(found)
    stars = frontier.frontier_table(found)[0].seconds.str.endswith("*")
    assert 0 < stars.sum() < len(stars)


def _by_kind(found):
    """The records of each kind, in order."""
    return {kind: [r for r in found if r["kind"] == kind] for kind in {r["kind"] for r in found}}


def test_a_whole_study_and_one_of_another_matrix_stay_as_they_are(published):
    _, whole = published
    assert select.whole_study(whole) == whole
    assert _by_kind(select.completed(whole)) == _by_kind(whole)
    assert re.fullmatch(r"All \d+ records of training are of this machine", report_text.sources_text(whole))
    other = of_the_default_grid(whole)
    other = [{**r, "num_stored_cells": 7} if r["kind"] == "pmi" else r for r in other]
    assert select.whole_study(other) == other
    assert _by_kind(select.completed(other)) == _by_kind(other)


def test_what_was_not_run_is_said(published):
    own = of_the_default_grid(published[1])
    assert report_quality.best_quality(own, compression_ratio=16) is None
    assert report_quality.best_quality(own, compression_ratio=4)["gap"] < 1
    missing = report_quality.quality_record(own, "adam", compression_ratio=1)
    texts = [
        report_text.gap_text(missing),
        report_text.score_text(missing, "wordsim353"),
        report_text.closed_share(missing),
    ]
    texts += [
        report_quality.best_optimizer_text(own, compression_ratio=16),
        report_text.gap_text(frontier.point(own, "hybrid", 4)),
    ]
    assert texts == [report_text.NOT_MEASURED] * 5


def test_the_explorer_has_every_record():
    columns = {"label": ["a, b", 'say "c"'], "total_ms": [1.5, 2.0], "total_ms_repeats": [[1, 2], [2]]}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    found = [{"kind": kind, **row} for kind in ("speed", "quality", "frontier") for row in rows]
    name, _, script = export.explorer_data(found).partition(" = ")
    assert name == "window.cembRecords"
    data = json.loads(script.removesuffix(";\n"))
    assert data["speed"]["columns"] == ["kind", *columns]
    assert data["frontier"]["rows"] == [
        ["frontier", "a, b", "1.5", "[1, 2]"],
        ["frontier", 'say "c"', "2.0", "[2]"],
    ]


LIVE = ["<script>alert(1)</script>", "</script>", "a & b", "{{ 7 }}", "\u2028"]


@pytest.mark.parametrize("live", LIVE)
def test_tables_show_text_as_it_is(live):
    shown = report_text.show(pd.DataFrame({"what": [live], live: [0.5]})).to_html()
    assert "<script" not in shown
    (cell,) = re.findall(r'class="data row0 col0" >(.*?)</td>', shown)
    (head,) = re.findall(r'class="col_heading level0 col1" >(.*?)</th>', shown)
    assert html.unescape(cell) == html.unescape(head) == live
    assert ">0.500000</td>" in shown


@pytest.mark.parametrize("live", LIVE)
def test_the_explorers_script_holds_text_as_it_is(live):
    script = export.explorer_data([{"kind": kind, "corpus": live} for kind in export.KINDS])
    assert script.isascii()
    assert "<" not in script
    data = json.loads(script.partition(" = ")[2].removesuffix(";\n"))
    assert data["speed"]["rows"] == [["speed", live]]


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd|x", "'+cmd|x"),
        ("-x.txt", "'-x.txt"),
        ("@sum", "'@sum"),
        ("\t=1", "'\t=1"),
        ("a=b", "a=b"),
        ("", ""),
        (-0.5, "-0.5"),
        (-3, "-3"),
        (-1e-300, "-1e-300"),
        ([-1, 2], "[-1, 2]"),
        (True, "True"),
    ],
)
def test_text_is_no_formula_and_numbers_stay_numbers(value, cell):
    rows = list(csv.reader(io.StringIO(export.csv_text([{"kind": "speed", "value": value}], "speed"))))
    assert rows == [["kind", "value"], ["speed", cell]]
