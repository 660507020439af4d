"""From records to the frontier's tables and figures: seeds, budgets, failures, learning rates."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cemb import plots, report
from cemb.train import default_learning_rate


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
    first, *_ = report.median_seeds(found, "method", "asked_ratio")
    assert (first["gap"], first["gap_low"], first["gap_high"], first["num_seeds"]) == (0.6, 0.5, 0.7, 3)
    assert report.gap_text(first) == "0.600 (0.500 to 0.700)"
    assert report.gap_text(found[3]) == "0.900"
    assert report.gap_text(found[-1]) == "failed"


def test_a_failed_seed_is_worse_than_any(found):
    found[1] = _point("hashed", None, seed=1, failure="diverged")
    assert report.median_seeds(found, "method", "asked_ratio")[0]["gap"] == 0.7


def test_the_best_point_keeps_its_budget(found):
    assert report.best_point(found, "inference", 4)["method"] == "transform coding"
    assert report.best_point(found, "inference", 16)["gap"] == 0.08
    assert report.best_point(found, "training", 4)["gap"] == 0.6
    assert report.best_point(found, "inference", 4, ["hashed"])["gap"] == 0.6
    nothing = report.best_point(found, "inference", 17)
    assert nothing["method"] == "none"
    assert math.isnan(nothing["gap"])


def test_decisions_and_failures_are_shown(found):
    table = report.decisions(found)
    table = table.set_index("fewer bytes")
    assert list(table.loc["16× at inference"]) == [
        "transform coding (16.0×)",
        "0.080",
        "50 (50 to 50)",
        "0.900",
    ]
    assert list(table.loc["48× in training"]) == ["none", "", "", "none"]
    points, failed = report.frontier_table(found)
    assert list(points.table) == ["hashed", "hashed", "transform coding"]
    assert failed == ["low-rank at 64: max_bytes must be at least 9, got 3"]


def test_no_frontier_is_said():
    with pytest.raises(LookupError, match="no record of kind 'frontier'"):
        report.frontier_frame([])


def test_seconds_are_until_the_gap_is_first_small():
    history = [{"gap": 0.9, "seconds": 1.0}, {"gap": 0.4, "seconds": 2.0}, {"gap": 0.6, "seconds": 3.0}]
    assert report.seconds_to_gap(history, 0.5) == 2.0
    assert report.seconds_to_gap(history, 0.1) is None


def test_the_frontier_is_drawn_with_its_ranges(found):
    figure = plots.frontier(
        report.frontier_frame(found), [{"ratio": 8.0, "components": 0.005, "rows": 0.002}]
    )
    inference, training = figure.axes
    labels = inference.get_legend_handles_labels()[1]
    assert set(labels) == {"hashed", "transform coding", "limit, by component", "limit, by component and row"}
    assert set(training.get_legend_handles_labels()[1]) == {"hashed", "transform coding"}
    plt.close(figure)
    # As a run's own page draws them, before seeds are put together.
    plt.close(plots.frontier(pd.DataFrame(found)))


def test_learning_rates_are_as_good_as_what_the_reference_found():
    _, found = report.reference("rates")
    assert {(r["table"], r["optimizer"]) for r in found} >= {("full", "sgd"), ("hashed", "adam")}
    for record in found:
        rates, gaps = record["rates"], [math.inf if gap is None else gap for gap in record["gaps"]]
        best = gaps.index(min(gaps))
        assert 0 < best < len(rates) - 1, record
        assert record["best_rate"] == rates[best]
        kept = default_learning_rate(record["table"], record["optimizer"], record["training"])
        assert gaps[rates.index(kept)] - gaps[best] < 0.01, record


def test_counting_is_shown_fastest_first():
    counted = {"num_tokens": 100, "tokens_per_s": 2_500_000}
    found = [
        {"case": "polars", "count_s": 8.0, **counted},
        {"case": "cemb", "count_s": 2.0, **counted},
        {"case": "text to PMI", "count_s": 1.0, "num_tokens": 50, "tokens_per_s": 1},
    ]
    table = report.counting_table(found)
    assert table.what.tolist() == ["cemb", "polars"]
    assert table["times ours"].tolist() == ["1.0", "4.0"]


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
    left, right = plots.scaling(rows).axes
    assert [line.get_label() for line in right.lines] == ["counting", "PMI", "allowed"]
    assert left.lines[0].get_xydata().tolist() == [[10**6, 1.0], [10**7, 5.0]]
    (axes,) = plots.sparsity_by_band(np.array([9, 8, 3, 2]), np.array([0, 4, 6, 7, 8])).axes
    middles = sorted(tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1)
    assert middles == [(pytest.approx(2**1.5), 0.25), (pytest.approx(2**3.5), 0.75)]
