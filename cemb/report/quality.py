"""The chapter on quality: trained tables by optimizer, size and vocabulary."""

from typing import Any

import pandas as pd

from cemb.report.stats import gaps_tie, median_seeds, seconds_to_gap
from cemb.report.text import (
    NOT_MEASURED,
    analogies_text,
    compression_name,
    gap_text,
    score_text,
    seconds_text,
    signed_text,
    with_ties,
)
from cemb.study import sizes
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import Record
from cemb.train.learning_rates import default_learning_rate


def rates_table(found: list[Record]) -> pd.DataFrame:
    """Learning rates tried, rising, with the gap of each, beside the one that the study starts with."""
    kept = [default_learning_rate(r["table"], r["optimizer"], r["training"]) for r in found]
    return pd.DataFrame(
        {
            "table": [r["table"] for r in found],
            "optimizer": [f"{OPTIMIZER_NAMES[r['optimizer']]}, {r['training']}" for r in found],
            "kept": [f"{rate:g}" for rate in kept],
            "rate: gap": [
                ", ".join(
                    f"{rate:g}: {'diverges' if gap is None else signed_text(gap, 3)}"
                    for rate, gap in zip(r["rates"], r["gaps"], strict=True)
                )
                for r in found
            ],
        }
    )


def _trained(found: list[Record], part: str = "quality") -> list[Record]:
    """Quality records of trained tables from one part of the study, which is how its runs' names begin.

    The full table's one pass of mini-batches belongs to two parts.
    """
    names = (f"{part}-", "mini-batch-full") if part == "quality" else f"{part}-"
    return [r for r in found if r["kind"] == "quality" and r.get("training") and r["run"].startswith(names)]


def quality_frame(found: list[Record]) -> pd.DataFrame:
    """The quality study's records of trained tables, a row for each run: that of the median seed."""
    return pd.DataFrame(median_seeds(_trained(found), "run"))


def quality_table(found: list[Record], training: str, *, weighted: bool = False) -> pd.DataFrame:
    """Quality records of one training, with what the matrix and the corpus give otherwise first."""
    rows = [r for r in _trained(found) if r["training"] == training]
    rows = [r for r in rows if bool(r["weight_power"]) == weighted]
    baselines = [] if weighted else [r for r in found if r["kind"] == "quality" and "training" not in r]
    rows = [*baselines, *median_seeds(rows, "run")]
    return pd.DataFrame(
        {
            "table": [compression_name(r) for r in rows],
            "optimizer": [OPTIMIZER_NAMES.get(r.get("optimizer", ""), "") for r in rows],
            "parameters": [f"{r['num_parameters']:,}" for r in rows],
            "gap": [gap_text(r) for r in rows],
            "WordSim-353": [score_text(r, "wordsim353") for r in rows],
            "SimLex-999": [score_text(r, "simlex999") for r in rows],
            "analogies (%)": [analogies_text(r) for r in rows],
        }
    )


def best_mini_batch(found: list[Record]) -> Record:
    """The record of a full table trained on mini-batches by Adam in the most passes."""
    rows = [r for r in _trained(found) if r["training"] == "mini-batch" and r["optimizer"] == "adam"]
    return max(median_seeds(rows, "run"), key=lambda r: r["num_epochs"])


def time_table(found: list[Record], gaps: tuple[float, ...] = (0.5, 0.1, 0.05, 0.01)) -> pd.DataFrame:
    """Seconds of exact training until a full table's gap is small, by optimizer and by alternation."""
    rows = [r for r in _trained(found) if r["training"] == "full-batch"]
    rows = [r for r in rows if r["table"] == "full" and not r["weight_power"]]
    named = [(OPTIMIZER_NAMES[r["optimizer"]], r) for r in median_seeds(rows, "run")]
    stored = [r for r in found if r["kind"] == "frontier" and r["method"] == "alternating, float32"]
    named += [("alternating least squares", r) for r in median_seeds(stored, "method")]
    table = {"optimizer": [name for name, _ in named]}
    for gap in gaps:
        seconds = [seconds_to_gap(record["history"], gap) for _, record in named]
        table[f"gap {gap:g} (s)"] = ["not reached" if s is None else f"{s:.1f}" for s in seconds]
    table["final gap"] = [gap_text(record) for _, record in named]
    return pd.DataFrame(table)


def mini_batch_table(found: list[Record]) -> pd.DataFrame:
    """Tables after one pass of mini-batches, beside the same tables after full batches; none if not run."""
    rows = _trained(found, "mini-batch")
    exact = [r for r in found if r["kind"] == "frontier"]
    table = []
    for record in median_seeds(rows, "run"):
        name = "full" if record["table"] == "full-fused" else record["table"]
        size = record["inference_bytes"]  # by which the same table is known
        same = [r for r in exact if r["method"] == name and r.get("inference_bytes") == size]
        table.append(
            {
                "table": name,
                "× smaller": f"{record['compression_ratio']:.1f}",
                "gap, mini-batches": gap_text(record),
                "gap, full batches": gap_text(median_seeds(same, "method")[0]) if same else "not measured",
                "WordSim-353": score_text(record, "wordsim353"),
                "seconds": seconds_text(record, 0),
            }
        )
    return pd.DataFrame(table)


def growth_frame(found: list[Record]) -> pd.DataFrame:
    """Full tables and a pool of one size by vocabulary: a row for each, the whole vocabulary's among them."""
    whole = ("quality-adam-full-full-batch", f"quality-adam-hashed-{sizes.SMALL}-full-batch")
    rows = [*_trained(found, "growth"), *(r for r in _trained(found) if r["run"] in whole)]
    return pd.DataFrame(median_seeds(rows, "run"))


def growth_table(found: list[Record]) -> pd.DataFrame:
    """Gap and similarity of a full table and of a pool of one size, by vocabulary."""
    rows = growth_frame(found)
    table = []
    for words, own in rows.groupby("num_words"):
        named = {r["table"]: r for r in own.to_dict("records")}
        full, hashed = named["full"], named["hashed"]
        table.append(
            {
                "words": f"{words:,}",
                "× smaller": f"{hashed['compression_ratio']:.1f}",
                "hashed, gap": gap_text(hashed),
                "full, gap": gap_text(full),
                "hashed, WordSim-353": score_text(hashed, "wordsim353"),
                "full, WordSim-353": score_text(full, "wordsim353"),
            }
        )
    return pd.DataFrame(table)


def quality_record(
    found: list[Record], optimizer: str, training: str = "full-batch", **size: object
) -> Record | None:
    """A quality record: of the full table, a ``compression_ratio`` or a ``pool_size``; None if not run."""
    if not size:
        name = f"quality-{optimizer}-full-{training}"
    elif "compression_ratio" in size:
        name = f"quality-{optimizer}-hashed-{size['compression_ratio']}-times-{training}"
    else:
        name = f"quality-{optimizer}-hashed-{size['pool_size']}-{training}"
    matching = [r for r in found if r["kind"] == "quality" and r["run"] == name]
    return median_seeds(matching, "run")[0] if matching else None


def _by_optimizer(found: list[Record], size: dict[str, Any]) -> list[Record]:
    runs = [quality_record(found, optimizer, **size) for optimizer in sizes.OPTIMIZERS]
    return [r for r in runs if r is not None and r["gap"] is not None]


def best_quality(found: list[Record], **size: Any) -> Record | None:
    """The full-batch quality record with the smallest gap over the optimizers; None if none was run."""
    return min(_by_optimizer(found, size), key=lambda r: r["gap"], default=None)


def best_optimizer_text(found: list[Record], **size: Any) -> str:
    """The optimizer of `best_quality`, and those whose gap is tied with it."""
    best = best_quality(found, **size)
    if best is None:
        return NOT_MEASURED
    others = [r for r in _by_optimizer(found, size) if r["run"] != best["run"]]
    tied = [OPTIMIZER_NAMES[r["optimizer"]] for r in others if gaps_tie(best, r)]
    return with_ties(OPTIMIZER_NAMES[best["optimizer"]], tied)
