"""One machine's records beside another's: what must be the same is checked, what may differ becomes ratios.

Records are compared where they were asked for the same thing, which is where they agree in all `PARAMETERS`.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeGuard

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cemb.report import figures, stats, text
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
EXACT = "exact"


@dataclass(frozen=True)
class Tolerance:
    """How far two values of a group of fields may lie apart: `absolute`, or `relative` to the reference."""

    name: str
    absolute: float = 0.0
    relative: float = 0.0
    why: str = ""

    def allows(self, here: float, there: float) -> bool:
        return abs(here - there) <= max(self.absolute, self.relative * abs(there))

    def __str__(self) -> str:
        if self.absolute:
            return f"{self.absolute:g}"
        return f"{self.relative:g} of it" if self.relative else "none"


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
_EXACT = Tolerance(EXACT, why="counts, sizes, settings and fingerprints are the same on every machine")


def tolerance(name: str, value: object) -> Tolerance:
    """How far values of a field may lie apart; only floats may at all."""
    if isinstance(value, float):
        for ends, found in TOLERANCES.items():
            if name.endswith(ends):
                return found
    return _EXACT


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


@dataclass(frozen=True)
class Check:
    """One value that must match.

    `difference` is absolute, or relative where the tolerance is; infinite of what has no size.
    """

    run: str
    record: str
    name: str
    here: object
    there: object
    tolerance: Tolerance
    difference: float
    matches: bool


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


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(run: str, record: str, name: str, here: object, there: object) -> Check:
    # Of an int and a float, as JSON may have one value, the float decides.
    limit = tolerance(name, here if isinstance(here, float) else there)
    if not (_is_number(here) and _is_number(there)):
        same = here == there
        return Check(run, record, name, here, there, limit, 0.0 if same else math.inf, same)
    difference = abs(here - there)
    if limit.relative and there:
        difference /= abs(there)
    return Check(run, record, name, here, there, limit, difference, limit.allows(here, there))


@dataclass
class Comparison:
    """Records here beside those of the reference machine `name`.

    `pairs` were asked for the same; `only_here` and `only_there` have no counterpart.
    """

    name: str
    pairs: list[tuple[Record, Record]] = field(default_factory=list)
    only_here: list[Record] = field(default_factory=list)
    only_there: list[Record] = field(default_factory=list)

    def checks(self) -> list[Check]:
        """Every value that must match, of all pairs; a field that one record lacks is not checked."""
        found = []
        for here, there in self.pairs:
            ours, theirs = _must_match(here), _must_match(there)
            for name in ours.keys() & theirs.keys():
                found.append(_check(here["run"], text.record_name(here), name, ours[name], theirs[name]))
        return sorted(found, key=lambda check: (check.run, check.record, check.name))


def compare(name: str, here: list[Record], there: list[Record]) -> Comparison:
    """Put records beside those of a reference machine. ValueError if two of one side were asked the same."""
    ours, theirs = _asked_by_key(here), _asked_by_key(there)
    return Comparison(
        name,
        [(record, theirs[key]) for key, record in ours.items() if key in theirs],
        [record for key, record in ours.items() if key not in theirs],
        [record for key, record in theirs.items() if key not in ours],
    )


def checks_table(found: list[Comparison]) -> pd.DataFrame:
    """For each machine and kind of value: how many must match, how many do, and the largest difference."""
    rows = []
    for comparison in found:
        groups: dict[str, list[Check]] = {}
        for check in comparison.checks():
            groups.setdefault(check.tolerance.name, []).append(check)
        for limit in (_EXACT, *TOLERANCES.values()):
            if not (checks := groups.get(limit.name)):
                continue
            bad = sum(not check.matches for check in checks)
            largest = max(check.difference for check in checks)
            rows.append(
                {
                    "what": limit.name,
                    "machine": comparison.name,
                    "compared": f"{len(checks):,}",
                    "matching": "all" if not bad else f"all but {bad:,}",
                    "largest difference": "another value" if math.isinf(largest) else f"{largest:.2g}",
                    "allowed": str(limit),
                }
            )
    return pd.DataFrame(rows)


def tolerances_table() -> pd.DataFrame:
    """Each tolerance and why it is what it is."""
    rows = [_EXACT, *TOLERANCES.values()]
    return pd.DataFrame(
        {
            "what": [limit.name for limit in rows],
            "allowed": [str(limit) for limit in rows],
            "why": [limit.why for limit in rows],
        }
    )


def mismatches_table(found: list[Comparison], most: int = 40) -> pd.DataFrame:
    """The values that do not match, the furthest from what is allowed first, at most so many."""
    bad = [(c.name, check) for c in found for check in c.checks() if not check.matches]

    def excess(named: tuple[str, Check]) -> float:
        limit = named[1].tolerance
        return named[1].difference / (limit.absolute or limit.relative or 1e-9)

    bad.sort(key=excess, reverse=True)
    return pd.DataFrame(
        {
            "run": [check.run for _, check in bad[:most]],
            "what": [f"{check.record}: {check.name}" for _, check in bad[:most]],
            "machine": [name for name, _ in bad[:most]],
            "here": [_text(check.here) for _, check in bad[:most]],
            "there": [_text(check.there) for _, check in bad[:most]],
        }
    )


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
    interval of the ratio of medians, ``is_tie``, and ``is_contended`` if either side says that it was.
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
                        "is_tie": ratio.is_tie,
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
                    key = (comparison.name, f"{here['kind']}: {name.removesuffix('_s')}")
                    ratios.setdefault(key, []).append(value / there[name])
    return pd.DataFrame(
        [
            {
                "what": what,
                "machine": machine,
                "compared": str(len(values)),
                "here ÷ there": f"{np.median(values):.2f}",
                "range": f"{min(values):.2f}–{max(values):.2f}",
            }
            for (machine, what), values in ratios.items()
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


def times_figure(ratios: pd.DataFrame) -> Figure:
    """Total time here over there with its interval, and each phase's ratio, on logarithmic axes.

    A panel for each machine of a frame that `time_ratios` made, and a row for each record; 1, the same time,
    is a line.
    """
    rows = list(dict.fromkeys(zip(ratios.run, ratios.record, strict=True)))
    machines = list(dict.fromkeys(ratios.machine))
    colours = {**figures.PHASE_COLOURS, "total": "#000000"}
    # Not in `cemb.report.figures`, which every notebook reaches: an edit there makes all of the study stale.
    # Beyond this function, for drawings get their bytes when they are saved.
    plt.rcParams.update(figures.STYLE)
    figure, panels = plt.subplots(
        1, len(machines), sharey=True, squeeze=False, figsize=(9, 1.2 + 0.2 * len(rows))
    )
    for machine, axes in zip(machines, panels[0], strict=True):
        for phase, colour in colours.items():
            own = ratios[(ratios.phase == phase) & (ratios.machine == machine)]
            places = [rows.index(key) for key in zip(own.run, own.record, strict=True)]
            # The ratio of medians may lie outside of what the bootstrap draws.
            error = np.maximum([own.value - own.low, own.high - own.value], 0)
            axes.errorbar(
                own.value,
                places,
                xerr=error if phase == "total" else None,
                fmt="o" if phase == "total" else "|",
                color=colour,
                markersize=5,
                label=phase,
                linestyle="none",
            )
        axes.axvline(1, color=figures.GREY, linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        low, high = axes.get_xlim()
        labelled = "25" if high < 100 * low else ""  # beyond two decades there is no room for more
        axes.xaxis.set_minor_formatter(
            lambda value, _, labelled=labelled: f"{value:g}" if f"{value:e}"[0] in labelled else ""
        )
        axes.set(xlabel=f"time here ÷ time of\n{machine}")
    names = [f"{run}: {record}" for run, record in rows]
    panels[0, 0].set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper right")
    return figure
