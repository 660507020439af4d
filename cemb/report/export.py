"""The records to take away: how many there are, CSV, and the explorer's script."""

import csv
import io
import json
import re
from collections import Counter

import pandas as pd

from cemb.report.provenance import Numbers, of
from cemb.report.select import completed, frame
from cemb.report.text import machine, sources_text
from cemb.study.records import Record

KINDS = ("pmi", "speed", "quality", "frontier")


def numbers(own: list[Record]) -> Numbers:
    """What the page's text says, by name, of this machine's records and those that complete them."""
    found = completed(own)
    kinds = Counter(record["kind"] for record in found)
    commits = sorted({(record["git_commit"] or "no commit")[:10] for record in own})
    return {
        **of(None, **{kind: kinds[kind] for kind in KINDS}),
        **of(None, commits=", ".join(commits), machine=machine(own), sources=sources_text(found)),
    }


# What a spreadsheet would take for a formula; explorer.js has the same rule.
_FORMULA = re.compile(r"[=@\t\r]|[+-](?!\d*\.?\d+(e[+-]?\d+)?$)", re.IGNORECASE)


def _table(found: list[Record], kind: str) -> pd.DataFrame:
    rows = frame(found, kind)
    for name in rows.columns:
        rows[name] = rows[name].map(lambda cell: json.dumps(cell) if isinstance(cell, list) else cell)
    return rows


def _as_text(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def csv_text(found: list[Record], kind: str) -> str:
    """Records of a kind as CSV, one row each, every field a column; lists as JSON.

    Text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    text: str = _table(found, kind).map(_as_text).to_csv(index=False, lineterminator="\n")
    return text


def explorer_data(found: list[Record]) -> str:
    """The script that hands the explorer the CSV files' columns and cells, by kind."""
    data = {}
    for kind in KINDS[1:]:
        text = _table(found, kind).to_csv(index=False, lineterminator="\n")
        columns, *rows = csv.reader(io.StringIO(text))
        data[kind] = {"columns": columns, "rows": rows}
    # As characters that mean nothing in HTML, and are no line breaks of JavaScript's.
    script = json.dumps(data).replace("<", "\\u003c")
    return f"window.cembRecords = {script};\n"
