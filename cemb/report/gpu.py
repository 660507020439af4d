"""The chapter on GPUs: the benchmark and its targets there."""

import numpy as np
import pandas as pd

from cemb.report.stats import time_ratio
from cemb.study import roofline, sizes, targets
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import Record


def gpu_frame(found: list[Record]) -> pd.DataFrame:
    """A row for each case of the benchmark on a GPU: its times, with Zipf ids too, and the floor, in ms."""
    (rates,) = (record for record in found if record["kind"] == "rates")
    rows: dict[tuple[str, str], Record] = {}
    for record in found:
        if record["kind"] != "speed":
            continue
        name = record["label"]
        if record["num_embeddings"] != sizes.ROWS:
            name += f", {record['num_embeddings']:,} rows"
        row = rows.setdefault(
            (record["optimizer"], name),
            {
                "optimizer": record["optimizer"],
                "table": name,
                "is_ours": record["table"] in targets.OURS,
                "floor": roofline.gpu_floor_ms(record, rates),
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
    for optimizer in sizes.OPTIMIZERS:
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
