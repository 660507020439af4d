"""Records in words: names, gaps, scores and times as the pages write them."""

import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from cemb.report import labels
from cemb.report.select import trainings
from cemb.study.records import Record


def sources_text(found: list[Record]) -> str:
    """How many of `completed` records of training are of which machine, in words."""
    every = trainings(found).values()
    published = [record["reference"] for record in every if "reference" in record]
    if not published:
        return f"All {len(every)} records of training are of this machine"
    return (
        f"Of {len(every)} records of training, {len(every) - len(published)} are of this machine, "
        f"the others of the reference machine {published[0]}, which ran the full study"
    )


def contended_mark(record: Record) -> str:
    """What follows the name of a record whose threads had to wait for a processor, by `cemb.study.timing`."""
    is_contended = record.get("is_contended")  # NaN in a frame where some records do not say
    return " (contended)" if not pd.isna(is_contended) and is_contended else ""


def record_name(record: Record) -> str:
    """What a record is of, in its run: a speed case, a method at a ratio, a table; and its seed."""
    if record.get("label"):
        parts = [labels.timed(record)]
    else:
        parts = [labels.trained(record.get("method") or record.get("table") or record["kind"])]
    if record.get("num_embeddings") is not None:
        parts.append(f"{record['num_embeddings']:,} rows")
    if record.get("asked_ratio") is not None:
        parts.append(f"{record['asked_ratio']:g}×")
    if record.get("singular_value_power") is not None:
        parts.append(f"power {record['singular_value_power']:g}")
    if record.get("seed"):
        parts.append(f"seed {record['seed']}")
    return ", ".join(parts)


def compression_name(record: Record) -> str:
    """How a quality record's table is named in the book."""
    if record["table"] == "svd":
        power = {0: "U", 0.5: "U·√S", 1: "U·S"}[record["singular_value_power"]]
        return f"SVD, the optimum, {power}"
    if record["table"] == "sgns":
        return f"word2vec, {record['num_epochs']} epochs"
    if record["table"] in ("full", "full-fused"):
        passes = record.get("num_epochs") if record.get("training") == "mini-batch" else None
        return f"full table, {passes} pass{'es' if passes > 1 else ''}" if passes else "full table"
    if record["compression_ratio"] == 1:
        return "hashed, same size"
    return f"hashed, {record['compression_ratio']:.3g}× smaller"


def quartiles_text(repeats: Sequence[float], digits: int = 1) -> str:
    """The first and the third quartile of a record's repeats."""
    low, high = np.percentile(repeats, [25, 75])
    return f"{low:,.{digits}f}–{high:,.{digits}f}"


NOT_MEASURED = "(not measured)"


def gap_text(record: Record | None, digits: int = 3) -> str:
    """A gap, with the range over seeds if it shows; how the run failed, or that there was none."""
    if record is None:
        return NOT_MEASURED
    if pd.isna(record["gap"]):
        return "none" if pd.isna(record.get("failure")) else "failed"
    text = signed_text(record["gap"], digits)
    if record.get("num_seeds", 1) > 1:
        low, high = (signed_text(record[name], digits) for name in ("gap_low", "gap_high"))
        text += f" ({low} to {high})" if (low, high) != (text, text) else ""
    return text


def with_ties(name: str, tied: Sequence[str]) -> str:
    return f"{name} (tied with {', '.join(tied)})" if tied else name


def analogies_text(record: Record) -> str:
    """Shares of analogies answered, by 3CosAdd and by 3CosMul."""
    if pd.isna(record.get("analogies_score")):
        return "none"
    return f"{record['analogies_score']:.1f} / {record['analogies_mul_score']:.1f}"


def seconds_text(record: Record, digits: int = 1) -> str:
    """The seconds of a record's training; with a star if they are a reference machine's."""
    return f"{record['train_s']:.{digits}f}" + ("*" if isinstance(record.get("reference"), str) else "")


def score_text(record: Record | None, name: str) -> str:
    """A similarity score with its bootstrap interval."""
    if record is None:
        return NOT_MEASURED
    if pd.isna(record.get(f"{name}_score")):
        return "no pairs"
    score, low, high = (signed_text(record[f"{name}_{field}"]) for field in ("score", "low", "high"))
    return f"{score} ({low} to {high})"


def signed_text(value: float, digits: int = 0) -> str:
    """A number with a true minus sign, and none before zero."""
    return f"{round(value, digits) + 0:.{digits}f}".replace("-", "−")


def code(text: str) -> str:
    """Text as inline code of Markdown, whatever it holds; ``|`` would end a cell of a table."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def code_block(text: str, language: str) -> list[str]:
    """Text as lines of a block of code of Markdown, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def plain(text: str) -> str:
    """Text as Markdown that shows it as it is, in a cell of a table, too."""
    return re.sub(r"[\\`*_{}\[\]<>|$&]", r"\\\g<0>", " ".join(text.split()))


def minutes(found: list[Record]) -> float:
    """Minutes from the first of these records to the last."""
    times = [datetime.fromisoformat(record["utc_time"]) for record in found]
    return (max(times) - min(times)).total_seconds() / 60


def machine(found: list[Record]) -> str:
    """Where the records of times were measured, in words."""
    record = next(r for r in found if r["kind"] in ("speed", "counting", "scaling"))
    return (
        f"{record['device_name']}, {record['threads']} threads, Python {record['python_version']}, "
        f"torch {record['torch_version']}, numba {record['numba_version']}"
    )


def show(
    table: pd.DataFrame, *, nothing: str = "Not among these records; PROFILE=full make book measures it."
) -> Any:
    """A table as the book shows it: no index, texts left, figures right, the same markup each time.

    In place of an empty one stands `nothing`.
    """
    if table.empty:
        table = pd.DataFrame({"what": [nothing]})
    # The style's rules are global to a page, so tables of other columns need names of their own.
    name = hashlib.sha256(" ".join(table.columns).encode()).hexdigest()[:8]
    texts = ("optimizer", "table", "run", "word", "what", "use", "fewer bytes", "machine", "why")
    rules = [
        {"selector": f".col{place}", "props": f"text-align: {'left' if column in texts else 'right'}"}
        for place, column in enumerate(table.columns)
    ]
    return (
        table.style.hide(axis="index")
        .format(escape="html")
        .format_index(escape="html", axis="columns")
        .set_uuid(name)
        .set_table_styles(rules)
        .set_table_attributes('class="dataframe"')
    )


def closed_share(record: Record | None) -> str:
    """How much of the way from predicting zero to the optimum a quality record went, in per cent."""
    if record is None:
        return NOT_MEASURED
    return f"{100 * (1 - record['gap']):.1f}%"
