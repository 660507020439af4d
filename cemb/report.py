"""From records to the book's tables and numbers. What is not in a record is not on a page.

Speed comparisons are ratios of medians within one run, with a bootstrap 95% interval over the repeats; where
the interval holds 1, the two are called a tie. So are gaps whose ranges over seeds overlap.
"""

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import yaml

from cemb import catalog, records, study, targets
from cemb.rates import default_learning_rate
from cemb.records import Record
from cemb.study import OPTIMIZER_NAMES

# Ratios of bytes that the frontier's decisions are for.
BUDGETS = {"inference": (4, 8, 16, 32, 64), "training": (3, 6, 12, 24, 48)}
PHASES = ("forward", "gradient", "step")


def book_runs() -> list[study.Run]:
    """The runs the book shows: of the grid $CEMB_GRID on the corpus $CORPUS, by default the full study."""
    return study.study_runs(
        os.environ.get("CEMB_GRID") or "default", os.environ.get("CORPUS") or catalog.DEFAULT_CORPUS
    )


def load() -> list[Record]:
    """The records the book shows; FileNotFoundError if one is missing or stale."""
    return study.current_records(book_runs())


# What two records of a matrix have the same if the matrices are.
_MATRIX = (
    *("corpus_fingerprint", "min_count", "max_vocab", "window_size", "distance_weighting"),
    *("subsample_threshold", "context_smoothing", "num_negative", "top_k", "rank"),
    *("num_words", "num_stored_cells"),
)


def _matrix(found: list[Record]) -> list[object]:
    record = pick(found, kind="pmi")
    return [record.get(name) for name in _MATRIX]


def _trainings(found: list[Record]) -> dict[tuple[object, ...], Record]:
    """Records of training and of what was made of it, by what tells them apart."""
    names = ("run", "table", "method", "asked_ratio", "singular_value_power", "seed")
    return {
        tuple(record.get(name) for name in names): record
        for record in found
        if record["kind"] in ("quality", "frontier")
    }


def whole_study(found: list[Record]) -> list[Record]:
    """The records of one machine that has the most of the study: `found`, or those of a reference machine.

    That is the one measured last of those that factorized the same matrix, if it has runs or seeds of
    training that `found` lacks. Its records have its name as ``reference``.
    """
    matrix, own = _matrix(found), _trainings(found).keys()
    for name, there in references("records"):
        if _matrix(there) == matrix and _trainings(there).keys() - own:
            return [{**record, "reference": name} for record in there]
    return found


def completed(found: list[Record]) -> list[Record]:
    """`found`, and what training it lacks of `whole_study`, in that one's order.

    So pages of a small study on the reference's corpus have the seeds, tables and ratios of the full one:
    gaps and scores do not depend on the machine, but for what `cemb.compare` allows. Records of speed are
    not added.
    """
    others = [record for record in found if record["kind"] not in ("quality", "frontier")]
    return [*others, *(_trainings(whole_study(found)) | _trainings(found)).values()]


def sources_text(found: list[Record]) -> str:
    """How many of `completed` records of training are of which machine, in words."""
    trainings = _trainings(found).values()
    published = [record["reference"] for record in trainings if "reference" in record]
    if not published:
        return f"All {len(trainings)} records of training are of this machine"
    return (
        f"Of {len(trainings)} records of training, {len(trainings) - len(published)} are of this machine, "
        f"the others of the reference machine {published[0]}, which ran the full study"
    )


def pick(found: list[Record], **wanted: object) -> Record:
    """The one record with these fields. LookupError, naming them, if there is none or more than one."""
    matching = [r for r in found if all(r.get(name) == value for name, value in wanted.items())]
    if len(matching) != 1:
        raise LookupError(f"{len(matching)} records have {wanted}, wanted exactly one")
    return matching[0]


def frame(found: list[Record], kind: str) -> pd.DataFrame:
    """The records of a kind as a data frame. LookupError if there is none."""
    rows = [record for record in found if record["kind"] == kind]
    if not rows:
        raise LookupError(f"no record of kind {kind!r}")
    return pd.DataFrame(rows)


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


def time_ratio(
    numerator: Record, denominator: Record, num_bootstrap: int = 2000, *, field: str = "total_ms"
) -> Ratio:
    """Median time of one record over another's, in a field that has its repeats.

    To be fair, both come from the same run.
    """
    rng = np.random.default_rng(0)
    medians = []
    for record in (numerator, denominator):
        repeats = np.array(record[f"{field}_repeats"])
        samples = rng.integers(len(repeats), size=(num_bootstrap, len(repeats)))
        medians.append(np.median(repeats[samples], axis=1))
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    return Ratio(numerator[field] / denominator[field], float(low), float(high))


def contended_mark(record: Record) -> str:
    """What follows the name of a record whose threads had to wait for a processor, by `cemb.measure`."""
    is_contended = record.get("is_contended")  # NaN in a frame where some records do not say
    return " (contended)" if not pd.isna(is_contended) and is_contended else ""


def speed_record(
    found: list[Record],
    table: str,
    optimizer: str,
    pool_size: int,
    block_size: int = 1,
    sparse_gradients: bool = False,
) -> Record:
    """A speed record from the run of this optimizer and pool size, of a hashed or a full table."""
    is_full = table == "full"
    return pick(
        found,
        kind="speed",
        run=f"speed-{optimizer}-{pool_size}",
        table=table,
        pool_size=None if is_full else pool_size,
        block_size=1 if is_full else block_size,
        sparse_gradients=sparse_gradients,
    )


def best_full(found: list[Record], optimizer: str, pool_size: int) -> Record:
    """The faster of the full tables, dense and sparse gradients, in the run of this pool size."""
    both = [
        speed_record(found, "full", optimizer, pool_size, sparse_gradients=sparse) for sparse in (False, True)
    ]
    return min(both, key=lambda record: record["total_ms"])


def references(kind: str) -> list[tuple[str, list[Record]]]:
    """Names of the reference machines, the one measured last first, and records the study does not rerun.

    ``"bench"``, ``"rates"`` and ``"scaling"`` are after the commands that make them, ``"counting"`` is of
    bench-counting, ``"second"`` is the frontier on a second corpus. FileNotFoundError if there are none.
    """
    paths = (records.ROOT / "results" / "reference").glob(f"*/{kind}.jsonl")
    found = [(path.parent.name, records.read(path)) for path in sorted(paths)]
    if not found:
        raise FileNotFoundError(f"no machine among results/reference has a {kind}.jsonl")
    return sorted(found, key=lambda machine: machine[1][0]["utc_time"], reverse=True)


def reference(kind: str) -> tuple[str, list[Record]]:
    """The first of `references`."""
    return references(kind)[0]


def counting_table(found: list[Record]) -> pd.DataFrame:
    """Ways to count the same tokens, fastest first, with their times over the time of counting in memory."""
    ours = pick(found, case="cemb")
    rows = sorted((r for r in found if r["num_tokens"] == ours["num_tokens"]), key=lambda r: r["count_s"])
    return pd.DataFrame(
        {
            "what": [r["case"] for r in rows],
            "seconds": [f"{r['count_s']:.2f}" for r in rows],
            "million tokens/s": [f"{r['tokens_per_s'] / 1e6:.1f}" for r in rows],
            "times ours": ["1" if r is ours else str(time_ratio(r, ours, field="count_s")) for r in rows],
        }
    )


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
                    f"{rate:g}: {'diverges' if gap is None else _signed(gap, 3)}"
                    for rate, gap in zip(r["rates"], r["gaps"], strict=True)
                )
                for r in found
            ],
        }
    )


def bench_frame(found: list[Record]) -> pd.DataFrame:
    """A row for each case: totals with huge pages for torch and without, with Zipf ids, and the floor.

    Steps in one pass follow the usual ones of their tables.
    """
    (rates,) = (record for record in found if record["kind"] == "rates")
    rows: dict[tuple[str, str], Record] = {}
    for record in found:
        if record["kind"] != "speed":
            continue
        name = record["label"]
        if record["num_embeddings"] != targets.ROWS:
            name += f", {record['num_embeddings']:,} rows"
        row = rows.setdefault(
            (record["optimizer"], name),
            {
                "optimizer": record["optimizer"],
                "table": name,
                "contended": "",
                "is_ours": record["table"] in targets.OURS,
                "floor": targets.floor_ms(record, rates),
                "peak_mib": record["peak_mib"],
            },
        )
        row["contended"] = row["contended"] or contended_mark(record)
        setting = "huge" if record["thp_mem_alloc_enable"] == "1" else "default"
        row[f"{record['ids']}_{setting}"] = record["total_ms"]
        row[f"{record['ids']}_{setting}_repeats"] = record["total_ms_repeats"]
    order = {key: place for place, key in enumerate(rows)}
    usual = [order.get((key[0], key[1].replace(", one pass", "")), place) for key, place in order.items()]
    return pd.DataFrame(rows.values()).iloc[np.argsort(usual, kind="stable")].reset_index(drop=True)


def bench_table(found: list[Record], optimizer: str) -> pd.DataFrame:
    """The benchmark of one optimizer as the book shows it."""
    rows = bench_frame(found).query("optimizer == @optimizer")
    quartiles = [np.percentile(values, [25, 75]) for values in rows.uniform_default_repeats]
    return pd.DataFrame(
        {
            "table": rows.table + rows.contended,
            "total (ms)": rows.uniform_default.map("{:,.1f}".format),
            "quartiles": [f"{low:,.1f}–{high:,.1f}" for low, high in quartiles],
            "huge pages (ms)": rows.uniform_huge.map("{:,.1f}".format),
            "Zipf ids (ms)": rows.zipf_default.map("{:,.1f}".format),
            "floor (ms)": rows.floor.map("{:,.1f}".format),
            "× floor": (rows.uniform_default / rows.floor).map("{:,.1f}".format),
            "memory (MiB)": rows.peak_mib.map("{:,.0f}".format),
        }
    )


def target_ratio(found: list[Record], target: targets.Target) -> Ratio:
    """The ratio of a target whose two sides were measured, with its interval."""
    result = target.evaluate(found)
    assert result is not None
    _, ours, best = result
    return time_ratio(ours, best)


def targets_table(found: list[Record]) -> pd.DataFrame:
    """Each target of the benchmark, the ratio with its interval, without steps in one pass, and at our floor.

    Where the interval holds the target, the noise does not let us say.
    """
    (rates,) = (record for record in found if record["kind"] == "rates")
    stepwise = targets.by_autograd(found)
    rows = []
    for target in targets.targets():
        result = target.evaluate(found)
        if result is None:
            continue
        _, ours, best = result
        ratio = time_ratio(ours, best)
        if ratio.low <= target.limit < ratio.high:
            verdict = "undecided"
        else:
            verdict = "reached" if ratio.value <= target.limit else "missed"
        rows.append(
            {
                "optimizer": OPTIMIZER_NAMES[target.optimizer],
                "what": target.name,
                "ratio": f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f}), {verdict}",
                "at most": f"{target.limit:.2f}",
                "by autograd": f"{target_ratio(stepwise, target).value:.2f}",
                "floor's": f"{targets.floor_ms(ours, rates) / best['total_ms']:.2f}",
            }
        )
    return pd.DataFrame(rows)


def other_machines() -> pd.DataFrame:
    """What was reached of the benchmark's targets on the reference machines but the one measured last."""
    rows = []
    for name, found in references("bench")[1:]:
        table = targets_table(found)
        verdict = table.ratio.str.split(", ").str[1]
        text = table.optimizer + " " + table.what + ": " + table.ratio
        rows.append(
            {
                "machine": name,
                "commit": (found[0]["git_commit"] or "no commit")[:10],
                "reached": f"{int((verdict == 'reached').sum())} of {len(table)}",
                "not reached": "; ".join(text[verdict != "reached"]),
            }
        )
    return pd.DataFrame(rows)


def gpu_frame(found: list[Record]) -> pd.DataFrame:
    """A row for each case of the benchmark on a GPU: its times, with Zipf ids too, and the floor, in ms."""
    (rates,) = (record for record in found if record["kind"] == "rates")
    rows: dict[tuple[str, str], Record] = {}
    for record in found:
        if record["kind"] != "speed":
            continue
        name = record["label"]
        if record["num_embeddings"] != targets.ROWS:
            name += f", {record['num_embeddings']:,} rows"
        row = rows.setdefault(
            (record["optimizer"], name),
            {
                "optimizer": record["optimizer"],
                "table": name,
                "is_ours": record["table"] in targets.OURS,
                "floor": targets.gpu_floor_ms(record, rates),
                "peak_mib": record["peak_mib"],
            },
        )
        for field in ("total_ms", "total_ms_repeats", "device_ms", "graph_ms"):
            row[f"{record['ids']}_{field}"] = record[field]
    return pd.DataFrame(rows.values())


def gpu_table(found: list[Record], optimizer: str) -> pd.DataFrame:
    """The benchmark of one optimizer on a GPU as the book shows it."""
    rows = gpu_frame(found).query("optimizer == @optimizer")
    quartiles = [np.percentile(values, [25, 75]) for values in rows.uniform_total_ms_repeats]
    return pd.DataFrame(
        {
            "table": rows.table,
            "from Python (ms)": rows.uniform_total_ms.map("{:.2f}".format),
            "quartiles": [f"{low:.2f}–{high:.2f}" for low, high in quartiles],
            "the GPU's own (ms)": rows.uniform_device_ms.map("{:.3f}".format),
            "as a graph (ms)": ["" if pd.isna(ms) else f"{ms:.3f}" for ms in rows.uniform_graph_ms],
            "Zipf ids, own (ms)": rows.zipf_device_ms.map("{:.3f}".format),
            "floor (ms)": rows.floor.map("{:.3f}".format),
            "floor / own": (rows.floor / rows.uniform_device_ms).map("{:.0%}".format),
            "memory (MiB)": rows.peak_mib.map("{:,.0f}".format),
        }
    )


def gpu_targets_table(found: list[Record]) -> pd.DataFrame:
    """What was to be reached on a GPU, by its own time, and what a loop from Python sees of it."""
    rows = []
    for optimizer in targets.OPTIMIZERS:
        ratio, _, best = targets.gpu_ratio(found, optimizer, "device_ms")
        _, ours, peer = targets.gpu_ratio(found, optimizer, "total_ms")
        rows.append(
            {
                "optimizer": OPTIMIZER_NAMES[optimizer],
                "own time": f"{ratio:.2f}, {'reached' if ratio <= targets.GPU_LIMIT else 'missed'}",
                "at most": f"{targets.GPU_LIMIT:.2f}",
                "best full table": best["label"],
                "from Python": str(time_ratio(ours, peer)),
            }
        )
    return pd.DataFrame(rows)


def original_2021() -> pd.DataFrame:
    """The nine published rows of the TensorFlow project `compressed-embeddings` (2021), in milliseconds."""
    with resources.files("cemb").joinpath("data/original_2021.csv").open() as file:
        return pd.read_csv(file, dtype={"pool_size": "Int64"})


def original_ratio(optimizer: str, pool_size: int) -> float:
    """The 2021 project's hashed total over its full total."""
    rows = original_2021().query("optimizer == @optimizer")
    full: float = rows[rows.table == "full"].total_ms.item()
    hashed: float = rows[rows.pool_size == pool_size].total_ms.item()
    return hashed / full


def beside_original(found: list[Record]) -> pd.DataFrame:
    """The 2021 project's nine rows beside ours: milliseconds, and ratios of hashed to full."""
    rows = []
    for old in original_2021().itertuples():
        is_full = old.table == "full"
        pool_size = study.POOL_SIZES[0] if is_full else int(old.pool_size)
        full = best_full(found, old.optimizer, pool_size)
        ours = full if is_full else speed_record(found, "hashed", old.optimizer, pool_size)
        rows.append(
            {
                "optimizer": OPTIMIZER_NAMES[old.optimizer],
                "table": ("full" if is_full else f"pool {pool_size:,}") + contended_mark(ours),
                "2021 (ms)": f"{old.total_ms:,.0f}",
                "2021 ÷ full": "" if is_full else f"{original_ratio(old.optimizer, pool_size):.2f}",
                "total (ms)": f"{ours['total_ms']:,.1f}",
                "÷ full": "" if is_full else str(time_ratio(ours, full)),
                **{phase: f"{ours[f'{phase}_ms']:,.1f}" for phase in PHASES},
            }
        )
    return pd.DataFrame(rows)


def answer_frame(found: list[Record]) -> pd.DataFrame:
    """Hashed over full step time by optimizer and pool, in 2021 and now: what `plots.answer` draws."""
    rows = []
    for pool_size in study.POOL_SIZES:
        for optimizer in study.OPTIMIZERS:
            hashed = speed_record(found, "hashed", optimizer, pool_size)
            ratio = time_ratio(hashed, best_full(found, optimizer, pool_size))
            rows.append(
                {
                    "name": f"{OPTIMIZER_NAMES[optimizer]}, pool {pool_size:,}",
                    "then": original_ratio(optimizer, pool_size),
                    "now": ratio.value,
                    "low": ratio.low,
                    "high": ratio.high,
                }
            )
    return pd.DataFrame(rows)


def speed_table(found: list[Record]) -> pd.DataFrame:
    """Every speed record: medians by phase, and the quartiles of the total."""
    rows = frame(found, "speed")
    quartiles = [np.percentile(values, [25, 75]) for values in rows.total_ms_repeats]
    return pd.DataFrame(
        {
            "optimizer": rows.optimizer.map(OPTIMIZER_NAMES),
            "table": [record["label"] + contended_mark(record) for record in rows.to_dict("records")],
            "total (ms)": rows.total_ms.map("{:,.1f}".format),
            "quartiles": [f"{low:,.1f}–{high:,.1f}" for low, high in quartiles],
            **{phase: rows[f"{phase}_ms"].map("{:,.1f}".format) for phase in PHASES},
        }
    )


def record_name(record: Record) -> str:
    """What a record is of, in its run: a speed case, a method at a ratio, a table; and its seed."""
    name = record.get("label") or record.get("method") or record.get("table") or record["kind"]
    parts = [str(name)]
    if record.get("num_embeddings") is not None:
        parts.append(f"{record['num_embeddings']:,} rows")
    if record.get("asked_ratio") is not None:
        parts.append(f"{record['asked_ratio']:g}×")
    if record.get("singular_value_power") is not None:
        parts.append(f"power {record['singular_value_power']:g}")
    if record.get("seed"):
        parts.append(f"seed {record['seed']}")
    return ", ".join(parts)


def compression_name(record: Record) -> str:
    """How a quality record's table is named in the book."""
    if record["table"] == "svd":
        power = {0: "U", 0.5: "U·√S", 1: "U·S"}[record["singular_value_power"]]
        return f"SVD, the optimum, {power}"
    if record["table"] == "sgns":
        return f"word2vec, {record['num_epochs']} epochs"
    if record["table"] in ("full", "full-fused"):
        passes = record.get("num_epochs") if record.get("training") == "mini-batch" else None
        return f"full table, {passes} pass{'es' if passes > 1 else ''}" if passes else "full table"
    if record["compression_ratio"] == 1:
        return "hashed, same size"
    return f"hashed, {record['compression_ratio']:.3g}× smaller"


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


def _trained(found: list[Record], part: str = "quality") -> list[Record]:
    """Quality records of trained tables from one part of the study, which is how its runs' names begin.

    The full table's one pass of mini-batches belongs to two parts.
    """
    names = (f"{part}-", "mini-batch-full") if part == "quality" else f"{part}-"
    return [r for r in found if r["kind"] == "quality" and r.get("training") and r["run"].startswith(names)]


def quality_frame(found: list[Record]) -> pd.DataFrame:
    """The quality study's records of trained tables, a row for each run: that of the median seed."""
    return pd.DataFrame(median_seeds(_trained(found), "run"))


NOT_MEASURED = "(not measured)"


def gap_text(record: Record | None, digits: int = 3) -> str:
    """A gap, with the range over seeds if it shows; how the run failed, or that there was none."""
    if record is None:
        return NOT_MEASURED
    if pd.isna(record["gap"]):
        return "none" if pd.isna(record.get("failure")) else "failed"
    text = _signed(record["gap"], digits)
    if record.get("num_seeds", 1) > 1:
        low, high = (_signed(record[name], digits) for name in ("gap_low", "gap_high"))
        text += f" ({low} to {high})" if (low, high) != (text, text) else ""
    return text


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


def _with_ties(name: str, tied: Sequence[str]) -> str:
    return f"{name} (tied with {', '.join(tied)})" if tied else name


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


def analogies_text(record: Record) -> str:
    """Shares of analogies answered, by 3CosAdd and by 3CosMul."""
    if pd.isna(record.get("analogies_score")):
        return "none"
    return f"{record['analogies_score']:.1f} / {record['analogies_mul_score']:.1f}"


def seconds_text(record: Record, digits: int = 1) -> str:
    """The seconds of a record's training; with a star if they are a reference machine's."""
    return f"{record['train_s']:.{digits}f}" + ("*" if isinstance(record.get("reference"), str) else "")


def seconds_to_gap(history: list[Record], gap: float) -> float | None:
    """Seconds until a history's gap is at most `gap`, or None if it never is."""
    return next((entry["seconds"] for entry in history if entry["gap"] <= gap), None)


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
    whole = ("quality-adam-full-full-batch", f"quality-adam-hashed-{study.POOL_SIZES[0]}-full-batch")
    rows = [*_trained(found, "growth"), *(r for r in _trained(found) if r["run"] in whole)]
    return pd.DataFrame(median_seeds(rows, "run"))


def growth_speed(found: list[Record]) -> pd.DataFrame:
    """Speed records of tables by their number of rows; empty if not run."""
    return pd.DataFrame([r for r in found if r["kind"] == "speed" and r["run"] == "growth-speed"])


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
    names = [name for group in ("int8", "int8-others") for name in study.FRONTIER[group]]
    points = [point(found, name, ratio) for name in names]
    rows = [r for r in points if r is not None and r["gap"] is not None]
    return min(rows, key=lambda r: r["gap"], default=None)


def best_rounded(found: list[Record], ratio: float) -> str:
    """The table of `best_rounded_point`, and its gap."""
    best = best_rounded_point(found, ratio)
    if best is None:
        return NOT_MEASURED
    return f"{best['method'].removesuffix(', then int8')}, {gap_text(best)}"


def growth_texts(found: list[Record]) -> dict[str, str]:
    """What the growth of a pool's rows costs in time and memory, in words; by name, for the book's text."""
    names = ("fewest", "most", "block_1", "block_25", "hashed_mib", "full_gib")
    texts = dict.fromkeys(names, NOT_MEASURED)
    speed = growth_speed(found)
    if speed.empty:
        return texts
    hashed = speed[speed.table == "hashed"].sort_values("num_embeddings")
    last = hashed.iloc[-1]
    for block, own in hashed.groupby("block_size"):
        texts[f"block_{block}"] = f"{own.total_ms.iloc[0]:.1f} to {own.total_ms.iloc[-1]:.1f}"
    copies = targets.COPIES[last.optimizer]
    return {
        **texts,
        "fewest": f"{hashed.num_embeddings.iloc[0]:,}",
        "most": f"{last.num_embeddings:,}",
        "hashed_mib": f"{copies * last.parameters_mib:.0f}",
        "full_gib": f"{4 * copies * last.num_embeddings * last.embedding_dim / 2**30:,.0f}",
    }


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
    return _with_ties(best["method"], tied)


def decisions(found: list[Record]) -> pd.DataFrame:
    """What to use at which budget: the smallest gap there is, and beside it the smallest of hashing."""
    rows = []
    hashed = [*study.FRONTIER["hashed"][1:], "hashed, then int8"]
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


def score_text(record: Record | None, name: str) -> str:
    """A similarity score with its bootstrap interval."""
    if record is None:
        return NOT_MEASURED
    if pd.isna(record.get(f"{name}_score")):
        return "no pairs"
    score, low, high = (_signed(record[f"{name}_{field}"]) for field in ("score", "low", "high"))
    return f"{score} ({low} to {high})"


def _signed(value: float, digits: int = 0) -> str:
    """A number with a true minus sign, and none before zero."""
    return f"{round(value, digits) + 0:.{digits}f}".replace("-", "−")


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
    runs = [quality_record(found, optimizer, **size) for optimizer in study.OPTIMIZERS]
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
    return _with_ties(OPTIMIZER_NAMES[best["optimizer"]], tied)


def minutes(found: list[Record]) -> float:
    """Minutes from the first of these records to the last."""
    times = [datetime.fromisoformat(record["utc_time"]) for record in found]
    return (max(times) - min(times)).total_seconds() / 60


def machine(found: list[Record]) -> str:
    """Where the records of times were measured, in words."""
    record = next(r for r in found if r["kind"] in ("speed", "counting", "scaling"))
    return (
        f"{record['device_name']}, {record['threads']} threads, Python {record['python_version']}, "
        f"torch {record['torch_version']}, numba {record['numba_version']}"
    )


def csv_text(found: list[Record], kind: str) -> str:
    """Records of a kind as CSV, one row each, every field a column; lists as JSON."""
    rows = frame(found, kind)
    for name in rows.columns:
        rows[name] = rows[name].map(lambda cell: json.dumps(cell) if isinstance(cell, list) else cell)
    text: str = rows.to_csv(index=False, lineterminator="\n")
    return text


def explorer_data(found: list[Record]) -> str:
    """The script that hands the explorer the CSV files' columns and cells, by kind."""
    data = {}
    for kind in ("speed", "quality", "frontier"):
        columns, *rows = csv.reader(io.StringIO(csv_text(found, kind)))
        data[kind] = {"columns": columns, "rows": rows}
    return f"window.cembRecords = {json.dumps(data, ensure_ascii=False)};\n"


def show(
    table: pd.DataFrame, *, nothing: str = "Not among these records; PROFILE=full make book measures it."
) -> Any:
    """A table as the book shows it: no index, texts left, figures right, the same markup each time.

    In place of an empty one stands `nothing`.
    """
    if table.empty:
        table = pd.DataFrame({"what": [nothing]})
    # The style's rules are global to a page, so tables of other columns need names of their own.
    name = hashlib.sha256(" ".join(table.columns).encode()).hexdigest()[:8]
    texts = ("optimizer", "table", "run", "word", "what", "use", "fewer bytes", "machine", "why")
    rules = [
        {"selector": f".col{place}", "props": f"text-align: {'left' if column in texts else 'right'}"}
        for place, column in enumerate(table.columns)
    ]
    return (
        table.style.hide(axis="index")
        .set_uuid(name)
        .set_table_styles(rules)
        .set_table_attributes('class="dataframe"')
    )


def closed_share(record: Record | None) -> str:
    """How much of the way from predicting zero to the optimum a quality record went, in per cent."""
    if record is None:
        return NOT_MEASURED
    return f"{100 * (1 - record['gap']):.1f}%"


def readme_answer(found: list[Record]) -> str:
    """The README's answer in three numbers, as Markdown."""
    small, large = study.POOL_SIZES
    verdicts: dict[int, list[str]] = {}
    for pool_size in study.POOL_SIZES:
        for name in study.OPTIMIZERS:
            hashed = speed_record(found, "hashed", name, pool_size)
            verdict = time_ratio(hashed, best_full(found, name, pool_size)).verdict
            verdicts.setdefault(pool_size, []).append(f"{verdict} with {OPTIMIZER_NAMES[name]}")
    rows, dim = hashed["num_embeddings"], hashed["embedding_dim"]
    then_sgd, then_adagrad = (original_ratio(name, small) for name in ("sgd", "adagrad"))
    full = best_quality(found)
    lines = [
        f"- **Speed.** A training step over a table of {rows:,} × {dim} values, hashed one by one into a "
        f"pool {rows * dim / small:,.0f} times smaller, is {', '.join(verdicts[small])}, against the "
        f"faster of PyTorch's full tables. In 2021, in TensorFlow, it was {then_sgd:.1f} times slower with "
        f"SGD and {then_adagrad:.1f} with Adagrad. A pool of {large:,}, too large for cache, is "
        f"{', '.join(verdicts[large])}.",
        f"- **Quality.** A full table goes {closed_share(full)} of the way from predicting zero to the best "
        f"possible factorization, and scores {score_text(full, 'wordsim353')} on WordSim-353.",
    ]
    prices = []
    for ratio, words in ((1, "as many values as the table"), (16, "16 times fewer")):
        record = best_quality(found, compression_ratio=ratio)
        prices.append(f"with {words} {closed_share(record)} of it and {score_text(record, 'wordsim353')}")
    lines.append(f"- **The price.** A hashed pool goes {', '.join(prices)}.")
    ships, trains = best_point(found, "inference", 16), best_point(found, "training", 12)
    trainer = trains["method"].replace("alternating, ", "alternating least squares stored by ")
    lines.append(
        f"- **What a byte is worth.** In 16 times fewer bytes than the full table, {ships['method']} goes "
        f"{closed_share(ships)} of it, and scores {score_text(ships, 'wordsim353')}; trained in 12 times "
        f"fewer bytes than a full table with Adam takes, {trainer} goes {closed_share(trains)}."
    )
    return "\n".join(
        [*lines, "", f"Measured on {machine(found)}, PyTorch's memory settings left as they come."]
    )


def launch(repository: str | None) -> str:
    """Where the tour opens without an installation, as Markdown, for a repository on GitHub."""
    if repository is None:
        return (
            "A copy on GitHub opens on Binder without an installation: its `.binder` says what is needed, "
            "and `repository-code` in its `CITATION.cff` puts the links here."
        )
    path = urlsplit(repository).path.strip("/").removesuffix(".git")
    tour = "notebooks/tour.ipynb"
    binder = f"https://mybinder.org/v2/gh/{path}/HEAD?urlpath=lab/tree/{tour}"
    colab = f"https://colab.research.google.com/github/{path}/blob/HEAD/{tour}"
    return (
        f"The tour opens without an installation [on Binder]({binder}) and, after "
        f"`!pip install git+{repository}`, [on Colab]({colab})."
    )


def citation() -> dict[str, Any]:
    """The fields of CITATION.cff."""
    cited: dict[str, Any] = yaml.safe_load((records.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    return cited


def bibtex() -> str:
    """The BibTeX entry of the study, by its CITATION.cff."""
    cited = citation()
    said = {
        "author": " and ".join(f"{{{author['name']}}}" for author in cited["authors"]),
        "title": f"{{{cited['title']}}}",  # braces keep capitals
        "version": cited["version"],
        "note": f"{cited['license']} licence",
    }
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in said.items())
    return f"@software{{cemb,\n{lines}}}"
