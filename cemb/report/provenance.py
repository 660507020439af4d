"""Where the book's numbers come from: what stands behind each, and whether the present code made it."""

import functools
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from cemb.pmi import corpora
from cemb.report import text as report_text
from cemb.study import grid as study_grid
from cemb.study import records, staleness
from cemb.study.identity import RULE, Code

# What a page glues, by name: a value, and where it comes from, as `glue` takes them.
Numbers = dict[str, tuple[object, Mapping[str, Any] | str | None]]

VERSIONS = ("python_version", *(f"{package}_version" for package in records.KEY_PACKAGES))


@dataclass(frozen=True)
class Measurement:
    """A kind of file that reference machines have: what its records are of, and what makes them."""

    title: str
    command: str
    module: str | None = None  # its name's last part, wherever it lies; None: the study's notebooks


# By the file's name under results/reference/MACHINE, without .jsonl.
MEASUREMENTS = {
    "records": Measurement("the study", "python -m cemb study --grid full"),
    "bench": Measurement(
        "the benchmark", "python -m cemb bench --targets --out results/local/bench.jsonl", "bench"
    ),
    "gpu": Measurement(
        "the benchmark, on a GPU",
        "python -m cemb bench --device cuda --out results/local/gpu.jsonl",
        "bench",
    ),
    "rates": Measurement("learning rates", "python -m cemb rates --out results/local/rates.jsonl", "quality"),
    "second": Measurement(
        "a second corpus",
        "python -m cemb frontier --corpus wordnet.txt --compression-ratios 4 8 16 32 "
        "--out results/local/second.jsonl",
        "frontier",
    ),
    "counting": Measurement(
        "counting",
        "python -m cemb bench-counting --targets --out results/local/counting.jsonl",
        "counting_bench",
    ),
    "scaling": Measurement(
        "counting, by size",
        "python -m cemb scaling --memory 512MiB --out results/local/scaling.jsonl",
        "counting_bench",
    ),
    "processes": Measurement(
        "training on two processes",
        "python -m cemb bench-processes --out results/local/processes.jsonl",
        "processes_bench",
    ),
}


def published() -> Iterator[tuple[str, str, list[records.Record]]]:
    """Machine, kind of file and records of all that reference machines measured, by name."""
    for folder in sorted((records.ROOT / "results" / "reference").iterdir()):
        for kind in MEASUREMENTS:
            if (path := folder / f"{kind}.jsonl").exists():
                yield folder.name, kind, records.read(path)


def label(source: str, *parts: str) -> str:
    """The target that numbers link to.

    It heads where numbers come from: on the page of a run, on that of a reference machine's file (machine,
    kind), or there, what is said of one run (machine, kind, run).
    """
    return "-".join(("provenance", source, *parts))


def glue(name: str, value: object, source: Mapping[str, Any] | str | None) -> None:
    """Glue a value into a page of the book, as a link to where it comes from.

    Args:
        name: What ``{glue:text}`` calls it.
        value: What is shown.
        source: The record of the study, or the `label` of the run or file, that it was measured in; None for
            what was not measured, such as settings, sizes and names. A record without a run stands for none;
            one with a ``reference`` is of the study of that machine.
    """
    import IPython

    data, metadata = IPython.core.formatters.format_display_data(value)
    metadata["scrapbook"] = {"name": name, "mime_prefix": ""}  # as myst_nb.glue does
    if isinstance(source, str):
        metadata["provenance"] = source
    elif source is not None and "run" in source:
        machine = source.get("reference")
        if isinstance(machine, str):  # NaN in a frame where only others have one
            metadata["provenance"] = label(machine, "records", source["run"])
        else:
            metadata["provenance"] = label(source["run"])
    IPython.display.display(data, raw=True, metadata=metadata)


def of(source: Mapping[str, Any] | str | None, **values: object) -> Numbers:
    """Numbers of one source, as `glue` takes it."""
    return {name: (value, source) for name, value in values.items()}


def glue_all(numbers: Numbers) -> None:
    """`glue` each of a chapter's numbers."""
    for name, (value, source) in numbers.items():
        glue(name, value, source)


def study_command(run: study_grid.Run, grid: str) -> str:
    """The command that runs one run of a grid again, from the repository's folder."""
    command = f"python -m cemb study --grid {grid} --run {run.name}"
    corpus = run.parameters.get("corpus")
    if corpus not in (None, corpora.DEFAULT_CORPUS):
        if corpus not in corpora.CORPORA:
            # With its folder, so that it is taken for no option and no name.
            corpus = f"./{os.path.relpath(study_grid.NOTEBOOKS / corpus, records.ROOT)}"
        command += f" --corpus {_quoted(corpus)}"
    return command


def _quoted(word: str) -> str:
    """A word of a command as a shell reads it, in one line; what cannot be seen is written as bash has it."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = (c if c.isprintable() and c not in "'\\" else f"\\U{ord(c):08x}" for c in word)
    return f"$'{''.join(escaped)}'"


def _facts(found: list[records.Record], command: str, code: str) -> list[str]:
    """The lines of a table of where records come from."""
    place = found[0]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(record.get(name) or "none") for record in found}))

    in_cell = report_text.code(command).replace("|", r"\|")
    commits = sorted(
        {(r["git_commit"] or "no commit")[:10] + (" and edits" if r["git_dirty"] else "") for r in found}
    )
    fingerprints = {r.get("corpus_fingerprint") or r.get("pmi_corpus_fingerprint") for r in found}
    facts = {
        "commit": ", ".join(commits),
        "machine": f"{place['device_name']}, {place['cpu_count']} processors, {all_of('threads')} threads",
        "huge pages": place["transparent_huge_pages"] or "",
        "`THP_MEM_ALLOC_ENABLE`": all_of("thp_mem_alloc_enable"),
        "versions": ", ".join(f"{name.removesuffix('_version')} {place[name]}" for name in VERSIONS),
        "corpus": ", ".join(sorted(filter(None, fingerprints))),
        "measured": f"{min(r['utc_time'] for r in found)} to {max(r['utc_time'] for r in found)}",
    }
    rows = {"to run it again": in_cell, "code": code}
    rows |= {name: report_text.plain(text) for name, text in facts.items()}
    return ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items() if text)]


def _repeats(found: list[records.Record]) -> list[str]:
    """The raw repeats of records that have any, as a block of text."""
    lines = []
    for record in found:
        for name, unit in (("total_ms_repeats", "ms"), ("count_s_repeats", "s")):
            if name not in record:
                continue
            title = report_text.record_name(record)
            parts = [record.get("optimizer"), title, record.get("ids"), record.get("case")]
            if record.get("thp_mem_alloc_enable") == "1":
                parts.append("huge pages")
            what = ", ".join(filter(None, parts))
            values = " ".join(f"{value:.4g}" for value in record[name])
            note = " (contended: it waited for a processor)" if record.get("is_contended") else ""
            lines.append(f"{what}{note}\n    {values} {unit}")
    if not lines:
        return []
    return [
        "",
        "Every repeat, in order of measurement:",
        "",
        *report_text.code_block("\n".join(lines), "text"),
    ]


def run_section(run: study_grid.Run, found: list[records.Record], grid: str) -> str:
    """The end of a run's page, as MyST: its command, parameters, code, environment and raw repeats."""
    code = report_text.code(found[0]["code_hash"])
    code += f", of `notebooks/{run.notebook}` and what it reaches of `cemb`"
    parameters = "\n".join(f"{name} = {value!r}" for name, value in run.parameters.items())
    return "\n".join(
        [
            f"({label(run.name)})=",
            "## Where these numbers come from",
            "",
            *_facts(found, study_command(run, grid), code),
            "",
            "What it was asked for, beside the notebook's defaults:",
            "",
            *report_text.code_block(parameters, "python"),
            *_repeats(found),
            "",
        ]
    )


def reference_page(machine: str, kind: str, found: list[records.Record]) -> str:
    """The page of a reference machine's file, as MyST; ``data/MACHINE-KIND.jsonl`` is the file beside it."""
    measurement = MEASUREMENTS[kind]
    hashes = sorted({record["code_hash"] for record in found if "code_hash" in record})
    code = ", ".join(map(report_text.code, hashes)) or "of the commit"
    return "\n".join(
        [
            f"({label(machine, kind)})=",
            f"# {machine}: {measurement.title}",
            "",
            *_facts(found, measurement.command, code),
            "",
            f"All fields of its {len(found)} records: {{download}}`../data/{machine}-{kind}.jsonl`.",
            *_runs(machine, kind, found),
            *_repeats(found),
            "",
        ]
    )


def _runs(machine: str, kind: str, found: list[records.Record]) -> list[str]:
    """A paragraph for each run of a study's records, with the command that runs it again."""
    lines = []
    for run, number in Counter(record["run"] for record in found if "run" in record).items():
        command = f"{MEASUREMENTS[kind].command} --run {run}"
        records_text = f"{number} record{'s' if number > 1 else ''}"
        lines += [
            "",
            f"({label(machine, kind, run)})=",
            f"{run}, {records_text}: {report_text.code(command)}",
        ]
    return ["", "Its runs, and what runs each again:", *lines] if lines else []


_SHOWN = 3  # definitions that a line about staleness names


def _changed_since(commit: str, entry: str, device: str) -> str | None:
    """What a notebook or module reaches that changed since a commit, or why that cannot be told."""
    try:
        then = Code.of_commit(records.ROOT, commit)
    except LookupError as error:
        return f"code: {error}"
    now = Code.of_folder(records.PACKAGE)
    if entry.endswith(".ipynb"):
        texts = then.text(f"notebooks/{entry}"), (study_grid.NOTEBOOKS / entry).read_text(encoding="utf-8")
        before, after = (None if text is None else staleness.code_of(text) for text in texts)
    else:
        before, after = (_use_of(code, entry) for code in (then, now))
    if before is None or after is None:
        return f"code: {entry} is not of {f'commit {commit[:10]}' if before is None else 'the present code'}"
    earlier = then.reach(before, device).definitions()
    changed = now.reach(after, device).changes(earlier, with_ways=False)
    if not changed:
        return None
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return f"code: since {commit[:10]} {', '.join(changed[:_SHOWN])}{more}"


def _use_of(code: Code, module: str) -> str | None:
    """Python source that reaches all of a module; None if the code has none of that name."""
    names = code.modules_named(module)
    return f"import {names[0]}\n{names[0]}" if names else None


def _code_staleness(
    record: records.Record,
    kind: str,
    runs: Mapping[str, study_grid.Run],
    changed_since: Callable[[str, str, str], str | None],
) -> str | None:
    entry, commit = MEASUREMENTS[kind].module, record["git_commit"]
    if entry is None:
        run = runs.get(record["run"])
        if run is None:
            return "code: the study has no such run any more"
        if record.get("code_hash") == staleness.reached(run).hash:
            return None
        entry = run.notebook
    if not commit:
        return "code: of no commit"
    change = changed_since(commit, entry, record.get("device") or "cpu")
    if change and kind == "records" and record.get("code_rule") != RULE:
        return change.replace("code:", "code: keyed by an earlier rule;", 1)
    return change


@dataclass(frozen=True)
class Stale:
    """Records of a reference machine that the present code or environment did not make, and why."""

    machine: str
    kind: str
    runs: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        runs = f" ({', '.join(self.runs)})" if self.runs else ""
        return f"{self.machine}/{self.kind}.jsonl{runs}: {self.why}"


def published_staleness() -> list[Stale]:
    """What of the published references is not of the present code and versions.

    The machine does not count, for it is the reference's own.
    """
    runs = {run.name: run for run in study_grid.study_runs("full")}
    now = records.environment()
    changed_since = functools.cache(_changed_since)  # for this call: the code may change until the next
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for machine, kind, published_records in published():
        for record in published_records:
            changed = [
                f"{name}: {record.get(name)} → {now[name]}"
                for name in VERSIONS
                if record.get(name) != now[name]
            ]
            if code := _code_staleness(record, kind, runs, changed_since):
                changed.insert(0, code)
            if changed:
                stale = found.setdefault((machine, kind, "; ".join(changed)), {})
                if "run" in record:
                    stale[record["run"]] = None
    return [Stale(machine, kind, tuple(names), why) for (machine, kind, why), names in found.items()]


def staleness_table(found: list[Stale]) -> pd.DataFrame:
    """`published_staleness` as the book shows it."""
    return pd.DataFrame(
        {
            "what": [f"{stale.machine}: {MEASUREMENTS[stale.kind].title}" for stale in found],
            "records of": [f"{len(stale.runs)} runs" if stale.runs else "all" for stale in found],
            "why": [stale.why for stale in found],
        }
    )
