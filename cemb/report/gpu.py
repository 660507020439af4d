"""The chapter on GPUs: the benchmark and its targets there."""

import pandas as pd

from cemb.report import labels
from cemb.report.provenance import Numbers, label
from cemb.report.rivals import bandwidths_of, cases_frame
from cemb.report.select import reference
from cemb.report.stats import time_ratio
from cemb.report.text import machine, quartiles_text
from cemb.study import roofline, sizes, targets
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import Record


def numbers() -> Numbers:
    """What the page's text says, by name, of the reference machine that has a GPU."""
    name, found = reference("gpu")
    source = label(name, "gpu")
    bandwidths = bandwidths_of(found)
    example = next(record for record in found if record["kind"] == "speed")
    _, ours, full = targets.gpu_ratio(found, "sgd", "device_ms")
    measured: dict[str, object] = {
        "name": name,
        "python_over_own": ours["total_ms"] / ours["device_ms"],
        "graph_over_own": ours["graph_ms"] / ours["device_ms"],
        "ideal_full_us": 1e3 * (roofline.gpu_floor_ms(full, bandwidths) or 0),
        "ideal_hashed_us": 1e3 * (roofline.gpu_floor_ms(ours, bandwidths) or 0),
        "stream": bandwidths["stream_gb_per_s"],
        "row_reads": bandwidths["random_rows_per_s"] / 1e9,
        "row_adds": bandwidths["random_row_adds_per_s"] / 1e9,
        "block_reads": bandwidths["cached_blocks_per_s"] / 1e9,
        "block_adds": bandwidths["cached_block_adds_per_s"] / 1e9,
        "value_reads": bandwidths["cached_values_per_s"] / 1e9,
        "value_adds": bandwidths["cached_value_adds_per_s"] / 1e9,
    }
    for optimizer in sizes.OPTIMIZERS:
        ratio, _, best = targets.gpu_ratio(found, optimizer, "device_ms")
        _, seen, peer = targets.gpu_ratio(found, optimizer, "total_ms")
        measured[f"{optimizer}_own"] = ratio
        measured[f"{optimizer}_python"] = time_ratio(seen, peer).short
        measured[f"{optimizer}_ideal"] = (roofline.gpu_floor_ms(best, bandwidths) or 0) / best["device_ms"]
    return {
        **{key: (value, source) for key, value in measured.items()},
        "machine": (machine(found), None),
        "commit": (example["git_commit"][:10], None),
        "repeats": (example["repeats"], None),
        "num_rows": (sizes.ROWS, None),
        "small": (sizes.SMALL, None),
        "block": (sizes.GPU_BLOCK, None),
        "limit": (targets.GPU_LIMIT, None),
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
