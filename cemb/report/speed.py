"""The chapter on speed: the study's steps beside those of 2021."""

from importlib import resources

import numpy as np
import pandas as pd

from cemb.report.select import frame, pick
from cemb.report.stats import time_ratio
from cemb.report.text import NOT_MEASURED, contended_mark
from cemb.study import sizes
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import Record

PHASES = ("forward", "gradient", "step")


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
        pool_size = sizes.SMALL if is_full else int(old.pool_size)
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
    for pool_size in sizes.POOL_SIZES:
        for optimizer in sizes.OPTIMIZERS:
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


def growth_speed(found: list[Record]) -> pd.DataFrame:
    """Speed records of tables by their number of rows; empty if not run."""
    return pd.DataFrame([r for r in found if r["kind"] == "speed" and r["run"] == "growth-speed"])


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
    copies = sizes.COPIES[last.optimizer]
    return {
        **texts,
        "fewest": f"{hashed.num_embeddings.iloc[0]:,}",
        "most": f"{last.num_embeddings:,}",
        "hashed_mib": f"{copies * last.parameters_mib:.0f}",
        "full_gib": f"{4 * copies * last.num_embeddings * last.embedding_dim / 2**30:,.0f}",
    }
