"""One machine's records beside another's: what must be the same is checked, what may differ becomes ratios.

Records are compared where they were asked for the same thing, which is where they agree in all `PARAMETERS`.
"""

import json
import math
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import pandas as pd

from cemb.report import provenance, select, stats, text
from cemb.report.speed import PHASES
from cemb.study import records
from cemb.study.records import Record

# What a measurement was asked for. Counts and results are not in it, nor how often it was timed.
PARAMETERS = (
    *("run", "kind", "label", "table", "method", "optimizer", "training", "loss", "seed", "asked_ratio"),
    *("pool_size", "block_size", "sparse_gradients", "signed", "num_embeddings", "embedding_dim"),
    *("batch_size", "dropout", "ids", "num_steps", "num_epochs", "negative_share", "negative_power"),
    *("weight_power", "singular_value_power", "corpus", "rank", "min_count", "max_vocab", "window_size"),
    *("distance_weighting", "context_smoothing", "num_negative"),
    *("pmi_corpus_fingerprint", "pmi_min_count", "pmi_max_vocab", "pmi_window_size"),
    *("pmi_distance_weighting", "pmi_context_smoothing", "pmi_num_negative"),
)
# Where, when and by what a record was made, and how often it was repeated.
_PLACE = {
    *records.environment(),
    *("device", "device_name", "threads", "num_workers", "backend", "git_commit", "git_dirty", "utc_time"),
    *("code_hash", "code_rule", "repeats", "rounds", "warmup"),
}
_MEASURED_HERE = ("_s", "_ms", "_ms_repeats", "_per_s", "seconds", "peak_mib", "cpu_wait_share", "contended")


@dataclass(frozen=True)
class Tolerance:
    """How far two values of a group of fields may lie apart: `absolute`, or `relative` to the reference."""

    name: str
    absolute: float = 0.0
    relative: float = 0.0
    why: str = ""

    def allows(self, here: object, there: object) -> bool:
        if not (_is_number(here) and _is_number(there)):
            return here == there
        return abs(here - there) <= max(self.absolute, self.relative * abs(there))

    def difference(self, here: object, there: object) -> float:
        """Absolute, or relative where the tolerance is; of what has no size, none or infinite."""
        if not (_is_number(here) and _is_number(there)):
            return 0.0 if here == there else math.inf
        return abs(here - there) / (abs(there) if self.relative and there else 1)

    def __str__(self) -> str:
        if self.absolute:
            return f"{self.absolute:g}"
        return f"{self.relative:g} of it" if self.relative else "none"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


# By the last part of a field's name, the first that fits; any other field must be the same.
TOLERANCES = {
    ("_score", "_low", "_high"): Tolerance(
        "scores",
        absolute=1.0,
        why="in late digits of the vectors two words may change places; one pair's rank moves a correlation",
    ),
    ("gap",): Tolerance(
        "gaps",
        absolute=0.005,
        why="training carries on what sums in another order differ by",
    ),
    ("squared_norm", "density", "mean_stored_value", "total_count"): Tolerance(
        "sums over the matrix", relative=1e-6, why="the matrix is the same bits, its float32 sums are ordered"
    ),
    ("optimum_loss", "optimum_explained_share", "components", "rows"): Tolerance(
        "optimum and limits", relative=1e-3, why="the eigensolver starts anywhere and stops at a tolerance"
    ),
    ("loss",): Tolerance("losses", relative=0.005, why="as for gaps"),
}
EXACT = Tolerance("exact", why="counts, sizes, settings and fingerprints are the same on every machine")


def tolerance(name: str, here: object, there: object) -> Tolerance:
    """How far values of a field may lie apart; only floats may at all.

    Of an int and a float, as JSON may have one value, the float decides.
    """
    if isinstance(here, float) or isinstance(there, float):
        return next((limit for ends, limit in TOLERANCES.items() if name.endswith(ends)), EXACT)
    return EXACT


def asked(record: Record) -> dict[str, object]:
    """The `PARAMETERS` that a record has; of a record without a corpus's name, also its fingerprint."""
    names = PARAMETERS if record.get("corpus") else (*PARAMETERS, "corpus_fingerprint")
    return {name: record[name] for name in names if record.get(name) is not None}


def _asked_by_key(found: list[Record]) -> dict[str, Record]:
    """Records by what they were asked for; those beside a matrix's own record are of that matrix."""
    matrices = {record["run"]: asked(record) for record in found if record["kind"] == "pmi"}
    side: dict[str, Record] = {}
    for record in found:
        key = json.dumps({**matrices.get(record["run"], {}), **asked(record)}, sort_keys=True, default=str)
        if key in side:
            raise ValueError(f"two records of run {record['run']!r} were asked for the same: {key}")
        side[key] = record
    return side


def _values(name: str, value: object) -> Iterable[tuple[str, object]]:
    """A field's single values: those in lists and objects too, and the lengths of lists."""
    if isinstance(value, dict):
        for inner, held in value.items():
            yield from _values(f"{name}.{inner}", held)
    elif isinstance(value, list):
        yield f"{name}.length", len(value)
        for place, held in enumerate(value):
            yield from _values(f"{name}[{place}]", held)
    else:
        yield name, value


def _may_differ(name: str) -> bool:
    return name.removesuffix(".length").split(".")[-1].split("[")[0].endswith(_MEASURED_HERE)


def _must_match(record: Record) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in record.items():
        if name not in _PLACE and name not in PARAMETERS:
            found.update((n, v) for n, v in _values(name, value) if not _may_differ(n))
    return found


@dataclass
class Comparison:
    """Records here beside those of the reference machine `name`.

    `pairs` were asked for the same; `only_here` and `only_there` have no counterpart.
    """

    name: str
    pairs: list[tuple[Record, Record]]
    only_here: list[Record]
    only_there: list[Record]


def compare(name: str, here: list[Record], there: list[Record]) -> Comparison:
    """Put records beside those of a reference machine. ValueError if two of one side were asked the same."""
    ours, theirs = _asked_by_key(here), _asked_by_key(there)
    return Comparison(
        name,
        [(record, theirs[key]) for key, record in ours.items() if key in theirs],
        [record for key, record in ours.items() if key not in theirs],
        [record for key, record in theirs.items() if key not in ours],
    )


def numbers(
    found: list[Record], compared: list[Comparison], checked: pd.DataFrame, stale: Sized
) -> provenance.Numbers:
    """What the page's text says, by name; `checked` is `checks` of the comparisons."""
    references = select.references("records")
    machines = ", ".join(f"{name} ({text.machine(there)})" for name, there in references)
    num_bad = int((~checked.matches).sum())
    verdict = f"{num_bad:,} of them do not match" if num_bad else "all of them match"
    label, num_pairs = provenance.label(references[0][0], "records"), sum(len(c.pairs) for c in compared)
    return {
        **provenance.of(None, machine=text.machine(found), num_records=len(found), num_pairs=num_pairs),
        **provenance.of(None, num_checks=len(checked), num_stale=len(stale)),
        **provenance.of(None, verdict=verdict if len(checked) else "so nothing is compared"),
        **provenance.of(None, contended_share=f"{100 * records.CONTENDED_SHARE:g}"),
        **provenance.of(label, references=machines),
    }


def checks(found: list[Comparison]) -> pd.DataFrame:
    """Every value that must match, of all pairs; a field that one record lacks is not checked.

    Columns: ``machine``, ``run``, ``record``, ``name`` of the value, ``here``, ``there``, the `Tolerance`
    ``limit``, its ``difference``, and whether it ``matches``.
    """
    rows = []
    for comparison in found:
        for here, there in comparison.pairs:
            ours, theirs = _must_match(here), _must_match(there)
            of_pair = comparison.name, here["run"], text.record_name(here)
            for name in sorted(ours.keys() & theirs.keys()):
                both = ours[name], theirs[name]
                limit = tolerance(name, *both)
                rows.append((*of_pair, name, *both, limit, limit.difference(*both), limit.allows(*both)))
    columns = ("machine", "run", "record", "name", "here", "there", "limit", "difference", "matches")
    frame = pd.DataFrame(rows, columns=columns, dtype=object)
    return frame.astype({"difference": float, "matches": bool})


def checks_table(checked: pd.DataFrame) -> pd.DataFrame:
    """For each machine and kind of value: how many must match, how many do, and the largest difference."""
    rows = []
    for machine, of_machine in checked.groupby("machine", sort=False):
        for limit in (EXACT, *TOLERANCES.values()):
            own = of_machine[of_machine.limit == limit]
            if own.empty:
                continue
            num_bad, largest = int((~own.matches).sum()), own.difference.max()
            rows.append(
                {
                    "what": limit.name,
                    "machine": machine,
                    "compared": f"{len(own):,}",
                    "matching": f"all but {num_bad:,}" if num_bad else "all",
                    "largest difference": "another value" if math.isinf(largest) else f"{largest:.2g}",
                    "allowed": str(limit),
                }
            )
    return pd.DataFrame(rows)


def tolerances_table() -> pd.DataFrame:
    """Each tolerance and why it is what it is."""
    rows = [EXACT, *TOLERANCES.values()]
    return pd.DataFrame(
        {
            "what": [limit.name for limit in rows],
            "allowed": [str(limit) for limit in rows],
            "why": [limit.why for limit in rows],
        }
    )


def mismatches_table(checked: pd.DataFrame, most: int = 40) -> pd.DataFrame:
    """The values that do not match, the furthest from what is allowed first, at most so many."""
    allowed = checked.limit.map(lambda limit: limit.absolute or limit.relative or 1e-9)
    order = (checked.difference / allowed)[~checked.matches].sort_values(ascending=False, kind="stable")
    bad = checked.loc[order.index[:most]]
    return pd.DataFrame(
        {
            "run": bad.run,
            "what": bad.record + ": " + bad.name,
            "machine": bad.machine,
            "here": bad.here.map(_text),
            "there": bad.there.map(_text),
        }
    ).reset_index(drop=True)


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def missing_table(found: list[Comparison]) -> pd.DataFrame:
    """Runs with records on one side only: how many, and what the other side was asked for in their place."""
    rows = []
    for comparison in found:
        for side, own, others in (
            ("here", comparison.only_here, comparison.only_there),
            ("there", comparison.only_there, comparison.only_here),
        ):
            runs: dict[str, list[Record]] = {}
            for record in own:
                runs.setdefault(record["run"], []).append(record)
            for run, alone in runs.items():
                rivals = [other for other in others if other["run"] == run]
                rows.append(
                    {
                        "run": run,
                        "machine": comparison.name,
                        "only": side,
                        "records": str(len(alone)),
                        "why": _why_alone(alone[0], rivals),
                    }
                )
    return pd.DataFrame(rows)


def _why_alone(record: Record, rivals: list[Record]) -> str:
    if not rivals:
        return "not run on the other side"
    mine = asked(record)
    differing = (
        [name for name in {**mine, **asked(rival)} if mine.get(name) != rival.get(name)] for rival in rivals
    )
    fewest = min(differing, key=len)
    return f"other {', '.join(fewest) or 'matrix'}"


def time_ratios(found: list[Comparison]) -> pd.DataFrame:
    """Time here over time there, for each pair with repeats, by phase and in total.

    Columns: ``machine``, ``run``, ``record``, ``phase``, ``value``, ``low`` and ``high``, the 95% bootstrap
    interval of the ratio of medians, and ``is_contended`` if either side says that it was.
    """
    rows = []
    for comparison in found:
        for here, there in comparison.pairs:
            for phase in (*PHASES, "total"):
                if not (here.get(f"{phase}_ms_repeats") and there.get(f"{phase}_ms_repeats")):
                    continue
                if not there[f"{phase}_ms"] or not here[f"{phase}_ms"]:
                    continue
                ratio = stats.time_ratio(here, there, field=f"{phase}_ms")
                rows.append(
                    {
                        "machine": comparison.name,
                        "run": here["run"],
                        "record": text.record_name(here),
                        "phase": phase,
                        "value": ratio.value,
                        "low": ratio.low,
                        "high": ratio.high,
                        "is_contended": bool(here.get("is_contended") or there.get("is_contended")),
                    }
                )
    return pd.DataFrame(rows)


def seconds_ratios(found: list[Comparison]) -> pd.DataFrame:
    """What was timed once, in seconds: the median of the ratios here over there, and their range, by kind."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for comparison in found:
        for here, there in comparison.pairs:
            for name, value in here.items():
                if name.endswith("_s") and not name.endswith("_per_s") and value and there.get(name):
                    what = f"{here['kind']}: {name.removesuffix('_s')}"
                    ratios.setdefault((what, comparison.name), []).append(value / there[name])
    return pd.DataFrame(
        [
            {
                "what": what,
                "machine": machine,
                "compared": str(len(values)),
                "here ÷ there": f"{np.median(values):.2f}",
                "range": f"{min(values):.2f}–{max(values):.2f}",
            }
            for (what, machine), values in ratios.items()
        ]
    )


def times_table(ratios: pd.DataFrame) -> pd.DataFrame:
    """`time_ratios` as the page shows them: a row for each pair, the phases side by side."""
    if ratios.empty:
        return ratios
    rows = []
    for (machine, run, record), own in ratios.groupby(["machine", "run", "record"], sort=False):
        by_phase = own.set_index("phase")
        total = by_phase.loc["total"]
        rows.append(
            {
                "run": run,
                "what": record + text.contended_mark(total),
                "machine": machine,
                **{p: f"{by_phase.value[p]:.2f}" if p in by_phase.index else "" for p in PHASES},
                "total": str(stats.Ratio(total.value, total.low, total.high)),
            }
        )
    return pd.DataFrame(rows)
