"""The chapter on quality against bytes: its tables and decisions."""

import math
from collections.abc import Sequence

import pandas as pd

from cemb.report import labels
from cemb.report.provenance import Numbers, label, of
from cemb.report.quality import growth_frame, optimum
from cemb.report.select import pick, reference
from cemb.report.speed import growth_numbers
from cemb.report.stats import gaps_tie, median_seeds
from cemb.report.text import NOT_MEASURED, gap_text, score_text, seconds_text, sources_text, with_ties
from cemb.study import grid, sizes
from cemb.study.records import Record
from cemb.train.limits import hashed_gap

# Ratios of bytes that the frontier's decisions are for.
BUDGETS = {"inference": (4, 8, 16, 32, 64), "training": (3, 6, 12, 24, 48)}
TRIVIAL = "lower rank, then int8"


def numbers(found: list[Record]) -> Numbers:
    """What the page's text says, by name, of records that `select.completed` completed."""
    svd = optimum(found)
    hashed, rank = (best_point(found, "inference", 4, [name]) for name in ("hashed", "lower rank"))
    one = point(found, "lower rank", 64)
    if one is not None and one["gap"] is None:
        one = None
    second_name, second = reference("second")
    given = {
        **of(svd, svd_wordsim=score_text(svd, "wordsim353"), full_mib=svd["num_parameters"] * 4 / 2**20),
        **of(None, dim=svd["embedding_dim"], weights_share=100 * 16 * 2 / svd["embedding_dim"]),
        **of(None, words=pick(found, kind="pmi")["num_words"], pool=sizes.SMALL),
        **of(None, num_seeds=max(record["num_seeds"] for record in median_points(found))),
        **of(None, num_failed=len(frontier_table(found)[1]), sources=sources_text(found)),
        **of(hashed, hashed_gap=gap_text(hashed, 2), hashed_wordsim=score_text(hashed, "wordsim353")),
        **of(rank, rank_gap=gap_text(rank, 2)),
        **of(one, one_ratio=f"{one['inference_ratio']:.0f}" if one else NOT_MEASURED, one_gap=gap_text(one)),
        **of(label(second_name, "second"), second_name=second_name, second_words=second[0]["num_words"]),
        **growth_numbers(found),
        "rounding_cost": rounding_cost(found),
    }
    for name in ("int8", "int4"):
        given[f"gap of {name}"] = gap_text(point(found, name), 4), point(found, name)
    for ratio in (4, 16):
        given[f"formula at {ratio}"] = hashed_gap(ratio), None
    for budget, ratios in BUDGETS.items():
        for ratio in ratios:
            best = best_point(found, budget, ratio)
            digits = 4 if budget == "training" and ratio < 24 else 3
            given[f"{budget}_{ratio}"] = best_method_text(found, budget, ratio), best
            given[f"{budget}_{ratio}_gap"] = gap_text(best, digits), best
            given[f"{budget}_{ratio}_wordsim"] = score_text(best, "wordsim353"), best
    for ratio in (4, 8, 16):
        for method in dict.fromkeys(name for names in grid.FRONTIER.values() for name in names):
            asked = point(found, method, ratio)
            digits = 4 if method in (TRIVIAL, "transform coding") else 3
            given[f"{method} at {ratio}"] = gap_text(asked, digits), asked
        given[f"beats trivial at {ratio}"] = beats_trivial(found, ratio), point(found, TRIVIAL, ratio)
        rounded = best_rounded(found, ratio)
        given[f"best rounded at {ratio}"] = rounded_text(rounded), rounded
    growth = growth_frame(found).query("table == 'hashed'").sort_values("num_words")
    for name, place in (("least", 0), ("whole", -1)):
        row = growth.iloc[place]
        given[f"{name}_words"] = int(row.num_words), None
        given[f"{name}_ratio"] = float(row.compression_ratio), row
        given[f"{name}_gap"] = gap_text(row), row
    return given


def median_points(found: list[Record]) -> list[Record]:
    """The frontier's records, one for each method and ratio asked for: that of the median seed."""
    rows = [r for r in found if r["kind"] == "frontier"]
    if not rows:
        raise LookupError("no record of kind 'frontier'")
    return median_seeds(rows, "method", "asked_ratio")


def frontier_table(found: list[Record]) -> tuple[pd.DataFrame, list[str]]:
    """Every point of the frontier, by method; and of those which failed, why."""
    points = median_points(found)
    rows = [r for r in points if r["failure"] is None]
    table = pd.DataFrame(
        {
            "table": [labels.trained(r["method"]) for r in rows],
            "× smaller": [f"{r['inference_ratio']:.1f}" for r in rows],
            "× in training": [f"{r['training_ratio']:.1f}" for r in rows],
            "gap": [gap_text(r) for r in rows],
            "WordSim-353": [score_text(r, "wordsim353") for r in rows],
            "seconds": [seconds_text(r) for r in rows],
        }
    )
    failed = [r for r in points if r["failure"] is not None]
    return table, [f"{labels.trained(r['method'])} at {r['asked_ratio']:g}: {r['failure']}" for r in failed]


def point(found: list[Record], method: str, ratio: float | None = None) -> Record | None:
    """The frontier's record of a method at a ratio asked for, or at its only one; None if there is none."""
    rows = [r for r in found if r["kind"] == "frontier" and r["method"] == method]
    rows = [r for r in rows if r["asked_ratio"] == ratio]
    return median_seeds(rows, "method")[0] if rows else None


def beats_trivial(found: list[Record], ratio: float) -> str:
    """Names of the methods with a smaller gap than the trivial one's, by gap, at a ratio asked for."""
    trivial = point(found, TRIVIAL, ratio)
    if trivial is None:
        return NOT_MEASURED
    rows = [r for r in median_points(found) if r["asked_ratio"] == ratio and r["gap"] is not None]
    rows = sorted((r for r in rows if r["gap"] < trivial["gap"]), key=lambda r: r["gap"])
    names = [labels.trained(r["method"]) + (" (a tie)" if gaps_tie(r, trivial) else "") for r in rows]
    return ", ".join(names) or "none"


def rounding_cost(found: list[Record]) -> tuple[str, Record | None]:
    """The most that rounding a trained table to int8 added to its gap, and the record of that."""
    rounded = [r for r in found if r.get("float32_gap") is not None]
    costs = [(r["gap"] - r["float32_gap"], r) for r in rounded]
    cost, record = max(costs, key=lambda pair: pair[0], default=(math.nan, None))
    return (NOT_MEASURED if record is None else f"{cost:.4f}"), record


def best_rounded(found: list[Record], ratio: float) -> Record | None:
    """The record of the trained table rounded to int8 of the smallest gap at a ratio asked for."""
    names = [name for group in ("int8", "int8-others") for name in grid.FRONTIER[group]]
    points = [point(found, name, ratio) for name in names]
    rows = [r for r in points if r is not None and r["gap"] is not None]
    return min(rows, key=lambda r: r["gap"], default=None)


def rounded_text(best: Record | None) -> str:
    """The table of `best_rounded`, and its gap."""
    if best is None:
        return NOT_MEASURED
    return f"{labels.trained(best['method']).removesuffix(', then int8')}, {gap_text(best)}"


def same_bytes_table(found: list[Record]) -> pd.DataFrame:
    """Gaps of all methods that have a size to choose, a column for each ratio; the trivial one first."""
    rows = [r for r in median_points(found) if r["asked_ratio"] is not None]
    methods = sorted(dict.fromkeys(r["method"] for r in rows), key=lambda name: name != TRIVIAL)
    texts = {(r["method"], r["asked_ratio"]): gap_text(r) for r in rows}
    ratios = sorted({r["asked_ratio"] for r in rows})
    columns = {f"{ratio:g}×": [texts.get((name, ratio), "") for name in methods] for ratio in ratios}
    return pd.DataFrame({"table": map(labels.trained, methods), **columns})


def best_point(
    found: list[Record], budget: str, ratio: float, methods: Sequence[str] | None = None
) -> Record:
    """The record of the smallest gap that is at least `ratio` times smaller in a budget.

    `budget` is ``"inference"`` or ``"training"``; `methods` are all unless given. Where none is as small,
    the ``method`` is ``"none"`` and the gap NaN.
    """
    rows = [
        r
        for r in median_points(found)
        if (methods is None or r["method"] in methods)
        and r.get("failure") is None
        and r[f"{budget}_ratio"] >= ratio
    ]
    return min(rows, key=lambda r: r["gap"], default={"method": "none", "gap": math.nan})


def best_method_text(found: list[Record], budget: str, ratio: float) -> str:
    """The method of `best_point`, and those whose own best gap is tied with it."""
    best = best_point(found, budget, ratio)
    others = dict.fromkeys(
        r["method"] for r in found if r["kind"] == "frontier" and r["method"] != best["method"]
    )
    points = [best_point(found, budget, ratio, [method]) for method in others]
    tied = [labels.trained(r["method"]) for r in points if r["method"] != "none" and gaps_tie(best, r)]
    return with_ties(labels.trained(best["method"]), tied)


def decisions(found: list[Record]) -> pd.DataFrame:
    """What to use at which budget: the smallest gap there is, and beside it the smallest of hashing."""
    rows = []
    hashed = [*grid.FRONTIER["hashed"][1:], "hashed, then int8"]
    for budget, ratios in BUDGETS.items():
        for ratio in ratios:
            best, rival = (best_point(found, budget, ratio, methods) for methods in (None, hashed))
            is_there = best["method"] != "none"
            use = (
                f"{best_method_text(found, budget, ratio)}, {best[f'{budget}_ratio']:.1f}×"
                if is_there
                else "none"
            )
            rows.append(
                {
                    "fewer bytes": f"{ratio}× {'at' if budget == 'inference' else 'in'} {budget}",
                    "use": use,
                    "gap": gap_text(best) if is_there else "",
                    "WordSim-353": score_text(best, "wordsim353") if is_there else "",
                    "hashing's gap": gap_text(rival),
                }
            )
    return pd.DataFrame(rows)
