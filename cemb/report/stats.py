"""Ratios of times with their intervals, medians over seeds, and what counts as a tie.

Speed comparisons are ratios of medians within one run, with a bootstrap 95% interval over the repeats; where
the interval holds 1, the two are called a tie. So are gaps whose ranges over seeds overlap.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cemb.study.records import Record


@dataclass(frozen=True)
class Ratio:
    """A ratio of median times with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        return self.low <= 1 <= self.high

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})" + (", tie" if self.is_tie else "")

    @property
    def short(self) -> str:
        """The ratio without its interval, and whether it is a tie."""
        return f"{self.value:.2f}" + (", tie" if self.is_tie else "")

    @property
    def verdict(self) -> str:
        """The ratio in words, of the numerator's speed."""
        if self.is_tie:
            return "as fast (within the noise)"
        if self.value < 1:
            return f"{1 / self.value:.1f} times faster"
        return f"{self.value:.1f} times slower"


def time_ratio(numerator: Record, denominator: Record, *, field: str = "total_ms") -> Ratio:
    """Median time of one record over another's, in a field that has its repeats.

    To be fair, both come from the same run.
    """
    rng = np.random.default_rng(0)
    medians = []
    for record in (numerator, denominator):
        repeats = np.array(record[f"{field}_repeats"])
        samples = rng.integers(len(repeats), size=(2000, len(repeats)))
        medians.append(np.median(repeats[samples], axis=1))
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    return Ratio(numerator[field] / denominator[field], float(low), float(high))


def median_seeds(found: list[Record], *names: str) -> list[Record]:
    """Of records that agree in the fields `names`, the one of the median gap, with ``gap_low``, ``gap_high``.

    Those are the least and the largest gap of all seeds. Failed runs count as worse than any.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in found:
        groups.setdefault(tuple(str(record.get(name)) for name in names), []).append(record)
    chosen = []
    for group in groups.values():
        group.sort(key=lambda r: float("inf") if r["gap"] is None else r["gap"])
        spread = {"gap_low": group[0]["gap"], "gap_high": group[-1]["gap"], "num_seeds": len(group)}
        chosen.append({**group[(len(group) - 1) // 2], **spread})
    return chosen


def gaps_tie(first: Record, second: Record) -> bool:
    """Whether the ranges over seeds of two records of `median_seeds` overlap.

    If so, another seed may turn the two round. A single record is a range of one value.
    """

    def ends(record: Record) -> tuple[float, float]:
        gaps: Iterable[Any] = (record.get(name, record["gap"]) for name in ("gap_low", "gap_high"))
        low, high = (math.inf if pd.isna(gap) else gap for gap in gaps)
        return low, high

    (low, high), (other_low, other_high) = ends(first), ends(second)
    return low <= other_high and other_low <= high


def seconds_to_gap(history: list[Record], gap: float) -> float | None:
    """Seconds until a history's gap is at most `gap`, or None if it never is."""
    return next((entry["seconds"] for entry in history if entry["gap"] <= gap), None)
