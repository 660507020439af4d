"""The chapter on rivals: the benchmark and its targets on the CPU."""

import numpy as np
import pandas as pd

from cemb.report.select import references
from cemb.report.stats import Ratio, time_ratio
from cemb.report.text import contended_mark
from cemb.study import roofline, sizes, targets
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import Record


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
        if record["num_embeddings"] != sizes.ROWS:
            name += f", {record['num_embeddings']:,} rows"
        row = rows.setdefault(
            (record["optimizer"], name),
            {
                "optimizer": record["optimizer"],
                "table": name,
                "contended": "",
                "is_ours": record["table"] in targets.OURS,
                "floor": roofline.floor_ms(record, rates),
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
                "floor's": f"{roofline.floor_ms(ours, rates) / best['total_ms']:.2f}",
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
