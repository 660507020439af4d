"""The chapter on GPUs: the benchmark and its targets there."""

import pandas as pd

from cemb.report import labels
from cemb.report.provenance import Numbers, label, of
from cemb.report.rivals import cases_frame
from cemb.report.select import pick
from cemb.report.stats import time_ratio
from cemb.report.text import machine, quartiles_text
from cemb.study import roofline, sizes, targets
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import Record


def numbers(name: str, found: list[Record]) -> Numbers:
    """What the page's text says, by name, of the reference machine `name` and its benchmark on a GPU."""
    bandwidths = pick(found, kind="rates")  # of memory and caches
    example = next(record for record in found if record["kind"] == "speed")
    _, ours, full = targets.gpu_ratio(found, "sgd", "device_ms")
    reads = ("random_row", "cached_block", "cached_value")
    accesses = [f"{read}{what}" for read in reads for what in ("s", "_adds")]

    def ideal_ms(record: Record) -> float:
        floor = roofline.gpu_floor_ms(record, bandwidths)
        assert floor is not None
        return floor

    measured = {
        "name": name,
        "stream": bandwidths["stream_gb_per_s"],
        **{access: bandwidths[f"{access}_per_s"] / 1e9 for access in accesses},
        "ideal_full_us": 1e3 * ideal_ms(full),
        "ideal_hashed_us": 1e3 * ideal_ms(ours),
        "python_over_own": ours["total_ms"] / ours["device_ms"],
        "graph_over_own": ours["graph_ms"] / ours["device_ms"],
    }
    for optimizer in sizes.OPTIMIZERS:
        ratio, _, best = targets.gpu_ratio(found, optimizer, "device_ms")
        _, seen, peer = targets.gpu_ratio(found, optimizer, "total_ms")
        measured[f"{optimizer}_own"] = ratio
        measured[f"{optimizer}_python"] = time_ratio(seen, peer).short
        measured[f"{optimizer}_ideal"] = ideal_ms(best) / best["device_ms"]
    return {
        **of(label(name, "gpu"), **measured),
        **of(None, machine=machine(found), commit=example["git_commit"][:10], repeats=example["repeats"]),
        **of(None, num_rows=sizes.ROWS, small=sizes.SMALL, block=sizes.GPU_BLOCK, limit=targets.GPU_LIMIT),
    }


def gpu_frame(found: list[Record]) -> pd.DataFrame:
    """`cases_frame` of a benchmark on a GPU: its times, with Zipf ids too, in ms."""
    fields = ("total_ms", "total_ms_repeats", "device_ms", "graph_ms")
    return cases_frame(
        found, roofline.gpu_floor_ms, lambda r: {f"{r['ids']}_{field}": r[field] for field in fields}
    )


def gpu_table(found: list[Record], optimizer: str) -> pd.DataFrame:
    """The benchmark of one optimizer on a GPU as the book shows it."""
    rows = gpu_frame(found).query("optimizer == @optimizer")
    return pd.DataFrame(
        {
            "table": rows.table + rows.contended,
            "from Python (ms)": rows.uniform_total_ms.map("{:.2f}".format),
            "quartiles": [quartiles_text(repeats, 2) for repeats in rows.uniform_total_ms_repeats],
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
                "best full table": labels.timed(best),
                "from Python": str(time_ratio(ours, peer)),
            }
        )
    return pd.DataFrame(rows)
