"""The records as tables to take away: CSV, and the explorer's script."""

import csv
import io
import json

import pandas as pd

from cemb.report.select import frame, pick
from cemb.report.stats import time_ratio
from cemb.study.records import Record


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
