"""The chapter on quality against bytes: its tables and decisions."""

import math
from collections.abc import Sequence

import pandas as pd

from cemb.report.stats import gaps_tie, median_seeds
from cemb.report.text import NOT_MEASURED, gap_text, score_text, seconds_text, with_ties
from cemb.study import grid
from cemb.study.records import Record

# Ratios of bytes that the frontier's decisions are for.
BUDGETS = {"inference": (4, 8, 16, 32, 64), "training": (3, 6, 12, 24, 48)}


def _frontier_records(found: list[Record]) -> list[Record]:
    rows = [r for r in found if r["kind"] == "frontier"]
    if not rows:
        raise LookupError("no record of kind 'frontier'")
    return median_seeds(rows, "method", "asked_ratio")


def frontier_frame(found: list[Record]) -> pd.DataFrame:
    """The frontier's records, a row for each method and ratio asked for: that of the median seed."""
    return pd.DataFrame(_frontier_records(found))


def frontier_table(found: list[Record]) -> tuple[pd.DataFrame, list[str]]:
    """Every point of the frontier, by method; and of those which failed, why."""
    points = frontier_frame(found)
    rows = points[points.failure.isna()].to_dict("records")
    failed = points[points.failure.notna()].to_dict("records")
    table = pd.DataFrame(
        {
            "table": [r["method"] for r in rows],
            "× smaller": [f"{r['inference_ratio']:.1f}" for r in rows],
            "× in training": [f"{r['training_ratio']:.1f}" for r in rows],
            "gap": [gap_text(r) for r in rows],
            "WordSim-353": [score_text(r, "wordsim353") for r in rows],
            "seconds": [seconds_text(r) for r in rows],
        }
    )
    return table, [f"{r['method']} at {r['asked_ratio']:g}: {r['failure']}" for r in failed]


def point(found: list[Record], method: str, ratio: float | None = None) -> Record | None:
    """The frontier's record of a method at a ratio asked for, or at its only one; None if there is none."""
    rows = [r for r in found if r["kind"] == "frontier" and r["method"] == method]
    rows = [r for r in rows if r["asked_ratio"] == ratio]
    return median_seeds(rows, "method")[0] if rows else None


def point_text(found: list[Record], method: str, ratio: float | None = None, digits: int = 3) -> str:
    """The gap of `point`, or that it is not measured."""
    return gap_text(point(found, method, ratio), digits)


TRIVIAL = "lower rank, then int8"


def beats_trivial(found: list[Record], ratio: float) -> str:
    """Names of the methods with a smaller gap than the trivial one's, by gap, at a ratio asked for."""
    trivial = point(found, TRIVIAL, ratio)
    if trivial is None:
        return NOT_MEASURED
    rows = frontier_frame(found)
    rows = rows[(rows.asked_ratio == ratio) & (rows.gap < trivial["gap"])].sort_values("gap")
    names = [r["method"] + (" (a tie)" if gaps_tie(r, trivial) else "") for r in rows.to_dict("records")]
    return ", ".join(names) or "none"


def costliest_rounding(found: list[Record]) -> Record | None:
    """The record of the trained table to whose gap rounding to int8 added the most; None if there is none."""
    rounded = [r for r in found if r.get("float32_gap") is not None]
    return max(rounded, key=lambda r: r["gap"] - r["float32_gap"], default=None)


def rounding_cost(found: list[Record]) -> str:
    """The most that rounding a trained table to int8 added to its gap."""
    record = costliest_rounding(found)
    return NOT_MEASURED if record is None else f"{record['gap'] - record['float32_gap']:.4f}"


def best_rounded_point(found: list[Record], ratio: float) -> Record | None:
    """The record of the trained table rounded to int8 of the smallest gap at a ratio asked for."""
    names = [name for group in ("int8", "int8-others") for name in grid.FRONTIER[group]]
    points = [point(found, name, ratio) for name in names]
    rows = [r for r in points if r is not None and r["gap"] is not None]
    return min(rows, key=lambda r: r["gap"], default=None)


def best_rounded(found: list[Record], ratio: float) -> str:
    """The table of `best_rounded_point`, and its gap."""
    best = best_rounded_point(found, ratio)
    if best is None:
        return NOT_MEASURED
    return f"{best['method'].removesuffix(', then int8')}, {gap_text(best)}"


def same_bytes_table(found: list[Record]) -> pd.DataFrame:
    """Gaps of all methods that have a size to choose, a column for each ratio; the trivial one first."""
    rows = frontier_frame(found)
    rows = rows[rows.asked_ratio.notna()]
    methods = sorted(dict.fromkeys(rows.method), key=lambda name: name != TRIVIAL)
    texts = {(r["method"], r["asked_ratio"]): gap_text(r) for r in rows.to_dict("records")}
    return pd.DataFrame(
        {
            "table": methods,
            **{
                f"{ratio:g}×": [texts.get((name, ratio), "") for name in methods]
                for ratio in sorted(rows.asked_ratio.unique())
            },
        }
    )


def best_point(
    found: list[Record], budget: str, ratio: float, methods: Sequence[str] | None = None
) -> Record:
    """The record of the smallest gap that is at least `ratio` times smaller in a budget.

    `budget` is ``"inference"`` or ``"training"``; `methods` are all unless given. Where none is as small,
    the ``method`` is ``"none"`` and the gap NaN.
    """
    rows = [
        r
        for r in _frontier_records(found)
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
    tied = [r["method"] for r in points if r["method"] != "none" and gaps_tie(best, r)]
    return with_ties(best["method"], tied)


def decisions(found: list[Record]) -> pd.DataFrame:
    """What to use at which budget: the smallest gap there is, and beside it the smallest of hashing."""
    rows = []
    hashed = [*grid.FRONTIER["hashed"][1:], "hashed, then int8"]
    for budget, ratios in BUDGETS.items():
        for ratio in ratios:
            best, rival = (best_point(found, budget, ratio, methods) for methods in (None, hashed))
            is_there = best["method"] != "none"
            rows.append(
                {
                    "fewer bytes": f"{ratio}× {'at' if budget == 'inference' else 'in'} {budget}",
                    "use": f"{best_method_text(found, budget, ratio)}, {best[f'{budget}_ratio']:.1f}×"
                    if is_there
                    else "none",
                    "gap": gap_text(best) if is_there else "",
                    "WordSim-353": score_text(best, "wordsim353") if is_there else "",
                    "hashing's gap": gap_text(rival),
                }
            )
    return pd.DataFrame(rows)
