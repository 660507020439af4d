"""The chapter on rivals: the benchmark and its targets on the CPU."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from cemb.report import labels
from cemb.report.provenance import Numbers, label, of
from cemb.report.select import pick, references
from cemb.report.stats import Ratio, time_ratio
from cemb.report.text import contended_mark, machine, minutes, quartiles_text
from cemb.study import roofline, sizes, targets
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import Record

_SMALL_BLOCKS, _SMALL, _LARGE = (sizes.SMALL, sizes.BLOCK), (sizes.SMALL, 1), (sizes.LARGE, sizes.BLOCK)
# Tables by the name of their numbers: pool and block size, none of a full table.
_TABLES = {"blocks": _SMALL_BLOCKS, "single": _SMALL, "large": _LARGE, "full": (None, None)}


def numbers(name: str, found: list[Record]) -> Numbers:
    """What the page's text says, by name, of the reference machine `name` and its benchmark."""
    source = label(name, "bench")
    bandwidths = pick(found, kind="rates")  # of memory and caches
    speeds = [record for record in found if record["kind"] == "speed"]
    verdicts = targets_table(found).ratio.str.split(", ").str[1]
    huge = [target_ratio(found, target).value for target in targets.targets() if "10^9" in target.name]
    small = [r["peak_mib"] for r in speeds if r["table"] == "hashed" and r["pool_size"] == sizes.SMALL]
    accesses = ("random_rows", "random_values", "cached_gathers", "cached_adds")
    millions = {access: bandwidths[f"{access}_per_s"] / 1e6 for access in accesses}
    measured = {
        "name": name,
        "minutes": minutes(found),
        "stream": bandwidths["stream_gb_per_s"],
        **millions,
        **{f"num_{verdict}": int((verdicts == verdict).sum()) for verdict in ("reached", "undecided")},
        "huge_low": min(huge),
        "huge_high": max(huge),
        "peak": max(small),
    }
    for key, (pool_size, block_size) in _TABLES.items():
        for optimizer in sizes.OPTIMIZERS:
            against = _peer_target(optimizer, pool_size, block_size)
            measured[f"{optimizer}_{key}"] = target_ratio(found, against).short
        same_rule = targets.of_one_rule(_peer_target("adagrad", pool_size, block_size))
        measured[f"same_{key}"] = target_ratio(found, same_rule).short
    for key in ("blocks", "single"):  # larger tables have no step by autograd here
        measured[f"one_pass_{key}"] = _one_pass_ratio(speeds, *_TABLES[key]).short
    commit = (speeds[0]["git_commit"] or "no commit")[:10]
    given = {
        **of(source, **measured),
        **of(None, machine=machine(found), commit=commit, repeats=speeds[0]["repeats"]),
        **of(None, num_rows=sizes.ROWS, small=sizes.SMALL, large=sizes.LARGE),
        **of(None, num_targets=len(verdicts), peak_limit=targets.PEAK_LIMIT_MIB),
    }
    for other, there in references("bench"):
        ratio = target_ratio(there, _peer_target("sgd", *_SMALL))
        given[f"single_sgd_{other}"] = ratio.short, label(other, "bench")
    return given


def _peer_target(optimizer: str, pool_size: int | None, block_size: int | None) -> targets.Target:
    """The target of a table of ours against the best peer."""
    (found,) = (
        target
        for target in targets.targets()
        if target.name.endswith("best peer")
        and target.optimizer == optimizer
        and (target.ours.get("pool_size"), target.ours.get("block_size")) == (pool_size, block_size)
    )
    return found


def _one_pass_ratio(speeds: list[Record], pool_size: int | None, block_size: int | None) -> Ratio:
    """Time of a step in one pass over the usual one of the same table, with SGD."""
    table = {"table": "full-fused"} if pool_size is None else {"table": "hashed", "block_size": block_size}
    asked = {"optimizer": "sgd", "ids": "uniform", "thp_mem_alloc_enable": "0", "num_embeddings": sizes.ROWS}
    usual, one_pass = (
        pick(speeds, **asked, **table, pool_size=pool_size, one_pass=is_one) for is_one in (False, True)
    )
    return time_ratio(one_pass, usual)


def cases_frame(
    found: list[Record],
    floor_ms: Callable[[Record, Record], float | None],
    times: Callable[[Record], dict[str, Any]],
) -> pd.DataFrame:
    """A row for each case of a benchmark, with its floor in ms, and `times` of each of its records."""
    bandwidths = pick(found, kind="rates")  # of memory and caches
    rows: dict[tuple[str, str], Record] = {}
    for record in found:
        if record["kind"] != "speed":
            continue
        name = labels.timed(record)
        if record["num_embeddings"] != sizes.ROWS:
            name += f", {record['num_embeddings']:,} rows"
        row = rows.setdefault(
            (record["optimizer"], name),
            {
                "optimizer": record["optimizer"],
                "table": name,
                "contended": "",
                "is_ours": record["table"] in targets.OURS,
                "floor": floor_ms(record, bandwidths),
                "peak_mib": record["peak_mib"],
            },
        )
        row["contended"] = row["contended"] or contended_mark(record)
        row.update(times(record))
    return pd.DataFrame(rows.values())


def bench_frame(found: list[Record]) -> pd.DataFrame:
    """`cases_frame` of totals with huge pages for torch and without, with Zipf ids too.

    Steps in one pass follow the usual ones of their tables.
    """

    def times(record: Record) -> dict[str, Any]:
        name = f"{record['ids']}_{'huge' if record['thp_mem_alloc_enable'] == '1' else 'default'}"
        return {name: record["total_ms"], f"{name}_repeats": record["total_ms_repeats"]}

    rows = cases_frame(found, roofline.floor_ms, times)
    usual = rows.table.str.replace(", one pass", "")
    order = rows.groupby([rows.optimizer, usual], sort=False).ngroup()
    return rows.iloc[order.argsort(kind="stable")].reset_index(drop=True)


def bench_table(found: list[Record], optimizer: str) -> pd.DataFrame:
    """The benchmark of one optimizer as the book shows it."""
    rows = bench_frame(found).query("optimizer == @optimizer")
    return pd.DataFrame(
        {
            "table": rows.table + rows.contended,
            "total (ms)": rows.uniform_default.map("{:,.1f}".format),
            "quartiles": rows.uniform_default_repeats.map(quartiles_text),
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
    bandwidths = pick(found, kind="rates")  # of memory and caches
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
                "floor's": f"{roofline.floor_ms(ours, bandwidths) / best['total_ms']:.2f}",
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
