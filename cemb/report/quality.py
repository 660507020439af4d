"""The chapter on quality: trained tables by optimizer, size and vocabulary."""

from typing import Any

import pandas as pd

from cemb.report import labels
from cemb.report.provenance import Numbers, label, of
from cemb.report.select import completed, of_runs, pick, reference, whole_study
from cemb.report.stats import gaps_tie, median_seeds, seconds_to_gap
from cemb.report.text import (
    NOT_MEASURED,
    analogies_text,
    closed_share,
    compression_name,
    gap_text,
    machine,
    minutes,
    score_text,
    seconds_text,
    signed_text,
    sources_text,
    with_ties,
)
from cemb.study import grid, sizes
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import Record
from cemb.train.learning_rates import default_learning_rate


def numbers(own: list[Record]) -> Numbers:
    """What the page's text says, by name, of this machine's records and those that complete them."""
    found, timed = completed(own), whole_study(own)
    full, svd, mini = best_quality(found), optimum(found), best_mini_batch(timed)
    small, exact = best_quality(found, pool_size=sizes.SMALL), quality_record(timed, "adam")
    assert full is not None and small is not None and exact is not None  # of every grid
    rates_name, rates = reference("rates")
    timed_name = timed[-1].get("reference", "this one")
    betas = " and ".join(str(beta) for beta in full["adam_betas"] or ())
    given = {
        **of(None, sources=sources_text(found), small=sizes.SMALL, weight_power=grid.WEIGHT_POWER),
        **of(None, rank=full["embedding_dim"], words=full["num_words"], betas=betas),
        **of(None, num_steps=full["num_steps"], num_seeds=full["num_seeds"]),
        **of(full, best_optimizer=best_optimizer_text(found), closed=closed_share(full)),
        **of(full, full_gap=gap_text(full), full_wordsim=score_text(full, "wordsim353")),
        **of(svd, svd_wordsim=score_text(svd, "wordsim353")),
        **of(small, small_gap=gap_text(small, 2)),
        **of(None, small_ratio=small["compression_ratio"]),
        **of(None, batch_size=mini["batch_size"], negative_share=100 * mini["negative_share"]),
        **of(None, mini_epochs=mini["num_epochs"]),
        **of(mini, mini_steps=mini["history"][-1]["step"], mini_seconds=mini["train_s"]),
        **of(mini, mini_gap=gap_text(mini), mini_wordsim=score_text(mini, "wordsim353")),
        **of(exact, full_batch_seconds=exact["train_s"]),
        **of(timed[-1], timed_machine=f"{timed_name} ({machine(timed)})"),
        **of(label(rates_name, "rates"), rates_name=rates_name, rates_minutes=minutes(rates)),
    }
    for ratio in grid.COMPRESSION_RATIOS:
        best = best_quality(found, compression_ratio=ratio)
        given[f"gap_{ratio}"] = gap_text(best, 2), best
        given[f"wordsim_{ratio}"] = score_text(best, "wordsim353"), best
        given[f"optimizer_{ratio}"] = best_optimizer_text(found, compression_ratio=ratio), best
        for name, power in (("adam", None), ("weighted", grid.WEIGHT_POWER)):
            record = quality_record(found, "adam", compression_ratio=ratio, weight_power=power)
            given[f"{name}_{ratio}"] = gap_text(record, 2), record
    return given


def optimum(found: list[Record]) -> Record:
    """The record of the truncated SVD, its singular values halved between both sides."""
    return pick(found, kind="quality", table="svd", singular_value_power=0.5)


def rates_table(found: list[Record]) -> pd.DataFrame:
    """Learning rates tried, rising, with the gap of each, beside the one that the study starts with."""
    kept = [default_learning_rate(r["table"], r["optimizer"], r["training"]) for r in found]
    return pd.DataFrame(
        {
            "table": [labels.trained(r["table"]) for r in found],
            "optimizer": [f"{OPTIMIZER_NAMES[r['optimizer']]}, {r['training']}" for r in found],
            "kept": [f"{rate:g}" for rate in kept],
            "learning rate: gap": [
                ", ".join(
                    f"{rate:g}: {'diverges' if gap is None else signed_text(gap, 3)}"
                    for rate, gap in zip(r["rates"], r["gaps"], strict=True)
                )
                for r in found
            ],
        }
    )


def _trained(found: list[Record], training: str, **parameters: Any) -> list[Record]:
    """Records of tables trained so, of one vocabulary unless `parameters` of their runs say otherwise."""
    runs = of_runs(found, "quality.ipynb", **{"max_vocab": None, **parameters})
    return [record for record in runs if record["training"] == training]


def _of_chapter(found: list[Record], training: str) -> list[Record]:
    """The chapter's records of a training, a row for each run: that of the median seed.

    On mini-batches these are of full tables; others are of the next chapter.
    """
    tables = {"table": "full-fused"} if training == "mini-batch" else {}
    return median_seeds(_trained(found, training, **tables), "run")


def quality_frame(found: list[Record]) -> pd.DataFrame:
    """The chapter's records of trained tables, a row for each run: that of the median seed."""
    return pd.DataFrame([*_of_chapter(found, "mini-batch"), *_of_chapter(found, "full-batch")])


def quality_table(found: list[Record], training: str, *, weighted: bool = False) -> pd.DataFrame:
    """Quality records of one training, with what the matrix and the corpus give otherwise first."""
    baselines = [] if weighted else [r for r in found if r["kind"] == "quality" and "training" not in r]
    rows = [r for r in _of_chapter(found, training) if bool(r["weight_power"]) == weighted]
    rows = [*baselines, *rows]
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
    rows = [r for r in _of_chapter(found, "mini-batch") if r["optimizer"] == "adam"]
    return max(rows, key=lambda r: r["num_epochs"])


def time_table(found: list[Record], gaps: tuple[float, ...] = (0.5, 0.1, 0.05, 0.01)) -> pd.DataFrame:
    """Seconds of exact training until a full table's gap is small, by optimizer and by alternation."""
    rows = [r for r in _of_chapter(found, "full-batch") if r["table"] == "full" and not r["weight_power"]]
    named = [(OPTIMIZER_NAMES[r["optimizer"]], r) for r in rows]
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
    rows = _trained(found, "mini-batch", optimizer="adam", num_epochs=None)
    exact = [r for r in found if r["kind"] == "frontier"]
    table = []
    for record in median_seeds(rows, "table", "inference_bytes"):
        method = "full" if record["table"] == "full-fused" else record["table"]
        size = record["inference_bytes"]  # by which the same table is known
        same = [r for r in exact if r["method"] == method and r.get("inference_bytes") == size]
        table.append(
            {
                "table": labels.trained(method),
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
    asked = {"optimizer": "adam", "compression_ratio": None, "weight_power": None}
    runs = of_runs(found, "quality.ipynb", **asked)
    return pd.DataFrame(median_seeds([r for r in runs if r["training"] == "full-batch"], "run"))


def growth_table(found: list[Record]) -> pd.DataFrame:
    """Gap and similarity of a full table and of a pool of one size, by vocabulary."""
    table = []
    for words, own in growth_frame(found).groupby("num_words"):
        named = {r["table"]: r for r in own.to_dict("records")}
        full, hashed = named["full"], named["hashed"]
        table.append(
            {
                "words": f"{words:,}",
                "× smaller": f"{hashed['compression_ratio']:.1f}",
                "hashed, gap": gap_text(hashed),
                "full table, gap": gap_text(full),
                "hashed, WordSim-353": score_text(hashed, "wordsim353"),
                "full table, WordSim-353": score_text(full, "wordsim353"),
            }
        )
    return pd.DataFrame(table)


def quality_record(found: list[Record], optimizer: str, **size: Any) -> Record | None:
    """The median seed of full batches: of the full table, or a size of hashed ones; None if not run.

    Sizes are ``compression_ratio`` or ``pool_size``; a ``weight_power`` may be given, too.
    """
    asked = {"compression_ratio": None, "pool_size": None, "weight_power": None, **size}
    is_hashed = asked["compression_ratio"] or asked["pool_size"]
    rows = _trained(
        found, "full-batch", optimizer=optimizer, table="hashed" if is_hashed else "full", **asked
    )
    return median_seeds(rows, "run")[0] if rows else None


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
