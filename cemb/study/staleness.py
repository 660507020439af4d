"""Whether a run's result is there and current, and if not, why.

A run is found by its content: parameters, the meaning of the notebook's code and of all that it reaches in
cemb (`cemb.study.identity`), the corpus, and the environment. So a changed constant or version makes a run
stale, and a comment or a moved clone does not.
"""

import hashlib
import json
import re
from pathlib import Path

from cemb import files
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


def identity(run: Run, machine: records.Record | None = None) -> records.Record:
    """All that a run's result depends on, flat, for comparison key by key.

    Args:
        run: which may be for a study of another machine, where nobody times it.
        machine: then of that study, fields `records.OF_MACHINE`.
    """
    found: records.Record = {f"parameter {name}": value for name, value in run.parameters.items()}
    if corpus := run.parameters.get("corpus"):
        path = corpus if corpus in corpora.CORPORA else str(NOTEBOOKS / corpus)
        found["corpus fingerprint"] = corpora.fingerprint(path)
    return {
        **found,
        "title": run.title,
        "code": reached(run).hash,
        **records.environment(),
        **(machine or {}),
    }


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


def differences(before: records.Record, now: records.Record) -> dict[str, str]:
    """What two identities say of a key, where that is not the same."""
    before, now = _plain(before), _plain(now)
    return {
        name: f"{name}: {before.get(name)} → {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    }


def _plain(content: records.Record) -> records.Record:
    """An identity as it is read again."""
    plain: records.Record = json.loads(json.dumps(content, default=str))
    return plain


def _content(folder: Path) -> records.Record | None:
    """A run's identity as it was; None if it cannot be read any more."""
    try:
        found = files.read_json(folder / "identity.json")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def why_stale(run: Run) -> str | None:
    """None if the run's result is there, whole and current, else why not."""
    content = identity(run)
    folder = folder_of(run, content)
    if folder.is_dir():
        try:
            files.verify(folder, "it is run again")
        except files.DamagedError as error:
            return str(error)
        return None
    # Names may be prefixes of one another; the key is always 12 hexadecimal digits.
    earlier = [
        (p.stat().st_mtime, before)
        for p in runs_dir().glob(f"{run.name}-*")
        if re.fullmatch(r"[0-9a-f]{12}", p.name[len(run.name) + 1 :]) and (before := _content(p))
    ]
    if not earlier:
        return "never run"
    _, before = max(earlier, key=lambda one: one[0])
    definitions = before.pop("definitions", None)
    before.pop("ran_on", None)
    changed = differences(before, content)
    if changed.pop("code", None):
        changed["code"] = code_change(reached(run), definitions)
    return "; ".join(changed.values())


def current_records(runs: list[Run]) -> list[records.Record]:
    """The records of up-to-date runs, each with the name of its ``run``.

    Raises FileNotFoundError that names the runs which are missing, damaged or stale, and why.
    """
    problems = {run.name: why for run in runs if (why := why_stale(run))}
    if problems:
        lines = "\n".join(f"  {name}: {why}" for name, why in problems.items())
        raise FileNotFoundError(f"{len(problems)} of {len(runs)} runs are missing or stale:\n{lines}")
    return [
        {"run": run.name, **record} for run in runs for record in records.read(run_dir(run) / "records.jsonl")
    ]
