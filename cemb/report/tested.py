"""The chapter on tests: what they tried, and how often."""

import pandas as pd

from cemb.report.provenance import Numbers, of
from cemb.study import records
from cemb.study.records import Record

_TRIED = "tried "


def load() -> tuple[str, list[Record]]:
    """Name of the reference machine that ran the tests last, and the records of that."""
    found = [(path.stem, records.read(path)) for path in (records.ROOT / "results" / "tests").glob("*.jsonl")]
    return max(found, key=lambda named: str(named[1][-1]["utc_time"]))


def numbers(name: str, found: list[Record]) -> Numbers:
    """What the page's text says, by name, of the tests' records of the reference machine `name`."""
    last = max(found, key=lambda record: str(record["utc_time"]))
    totals = {f"num_{what}": sum(record[f"num_{what}"] for record in found) for what in ("passed", "failed")}
    return of(
        None,
        name=name,
        machine=f"{last['device_name']}, {last['cpu_count']} processors",
        commit=last["git_commit"][:10],
        date=last["utc_time"][:10],
        minutes=sum(record["tests_s"] for record in found) / 60,
        **totals,
    )


def table(found: list[Record]) -> pd.DataFrame:
    """How often each thing was tried, in `make test` and in `make test-long`."""
    names = sorted({name for record in found for name in record if name.startswith(_TRIED)})
    columns = {
        "make test-long" if record["is_long"] else "make test": [record.get(name) or 0 for name in names]
        for record in sorted(found, key=lambda record: bool(record["is_long"]))
    }
    return pd.DataFrame({"tried": [name.removeprefix(_TRIED) for name in names], **columns})
