"""The records to take away: how many there are, CSV, and the explorer's script."""

import csv
import io
import json
from collections import Counter

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
    for kind in KINDS[1:]:
        columns, *rows = csv.reader(io.StringIO(csv_text(found, kind)))
        data[kind] = {"columns": columns, "rows": rows}
    return f"window.cembRecords = {json.dumps(data, ensure_ascii=False)};\n"
