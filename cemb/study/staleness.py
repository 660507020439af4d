"""Whether a run's result is there and current, and if not, why.

A run is found by its content: parameters, the meaning of the notebook's code and of all that it reaches in
cemb (`cemb.study.identity`), the corpus, and the environment. So a changed constant or version makes a run
stale, and a comment or a moved clone does not.
"""

import hashlib
import json
import re
from pathlib import Path

from cemb.pmi import corpora
from cemb.study import records
from cemb.study.grid import NOTEBOOKS, Run
from cemb.study.identity import Code, Reached


def code_cells(notebook: Path) -> str:
    """A notebook's code as one Python source; its prose and outputs do not count."""
    return code_of(notebook.read_text(encoding="utf-8"))


def code_of(text: str) -> str:
    """The code of a notebook's text, see `code_cells`."""
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def reached(run: Run) -> Reached:
    """The definitions of cemb that a run's notebook reaches."""
    device = run.parameters.get("device", "cpu")
    return Code.of_folder(records.PACKAGE).reach(code_cells(NOTEBOOKS / run.notebook), device)


def identity(run: Run) -> records.Record:
    """All that a run's result depends on, flat, for comparison key by key."""
    found: records.Record = {f"parameter {name}": value for name, value in run.parameters.items()}
    if corpus := run.parameters.get("corpus"):
        path = corpus if corpus in corpora.CORPORA else str(NOTEBOOKS / corpus)
        found["corpus fingerprint"] = corpora.fingerprint(path)
    return {**found, "title": run.title, "code": reached(run).hash, **records.environment()}


def runs_dir() -> Path:
    """Where results of runs are, a folder each."""
    return records.results_dir() / "local" / "runs"


def folder_of(run: Run, content: records.Record) -> Path:
    """Where the result of a run of this `identity` is, or will be."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return runs_dir() / f"{run.name}-{digest[:12]}"


def run_dir(run: Run) -> Path:
    """Where a run's result is, or will be: ``run.ipynb``, ``records.jsonl`` and ``identity.json``."""
    return folder_of(run, identity(run))


def code_change(now: Reached, definitions: dict[str, str] | None) -> str:
    """Which of earlier definitions are others now, in words; None stands for those of an earlier rule."""
    if definitions is None:
        return "code: keyed by an earlier rule"
    found = now.changes(definitions)
    return f"code: {'; '.join(found) or 'a name stands for another definition'}"


def why_stale(run: Run) -> str | None:
    """None if the run's result is there and current, else why not."""
    if run_dir(run).is_dir():
        return None
    # Names may be prefixes of one another; the key is always 12 hexadecimal digits.
    earlier = [
        p
        for p in runs_dir().glob(f"{run.name}-*")
        if re.fullmatch(r"[0-9a-f]{12}", p.name[len(run.name) + 1 :])
    ]
    if not earlier:
        return "never run"
    newest = max(earlier, key=lambda path: path.stat().st_mtime)
    before = json.loads((newest / "identity.json").read_text(encoding="utf-8"))
    definitions = before.pop("definitions", None)
    now = json.loads(json.dumps(identity(run), default=str))
    changed = [
        f"{name}: {before.get(name)} → {now.get(name)}"
        for name in sorted({*before, *now})
        if name != "code" and before.get(name) != now.get(name)
    ]
    if before.get("code") != now["code"]:
        changed.append(code_change(reached(run), definitions))
    return "; ".join(changed)


def current_records(runs: list[Run]) -> list[records.Record]:
    """The records of up-to-date runs, each with the name of its ``run``.

    Raises FileNotFoundError that names the runs which are missing or stale, and why.
    """
    folders = {run.name: run_dir(run) for run in runs}
    problems = {run.name: why_stale(run) for run in runs if not folders[run.name].is_dir()}
    if problems:
        lines = "\n".join(f"  {name}: {why}" for name, why in problems.items())
        raise FileNotFoundError(f"{len(problems)} of {len(runs)} runs are missing or stale:\n{lines}")
    return [
        {"run": name, **record}
        for name, folder in folders.items()
        for record in records.read(folder / "records.jsonl")
    ]
