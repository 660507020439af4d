"""Which records the pages show, and how one is found among them."""

import functools
from typing import Any

import pandas as pd

from cemb.study import grid, records, staleness
from cemb.study.records import Record


def book_runs(grid_name: str | None = None) -> list[grid.Run]:
    """The runs the book shows: of the grid that the environment asks for, unless named, on its corpus."""
    asked_grid, corpus = grid.asked()
    return grid.study_runs(grid_name or asked_grid, corpus)


def load() -> list[Record]:
    """The records the book shows; FileNotFoundError if one is missing or stale."""
    return staleness.current_records(book_runs())


@functools.cache  # a page asks for each of its numbers
def _asked(*_environment: str) -> list[grid.Run]:
    """Runs of the full grid and of the book's, which goes first where both have one; these decide both."""
    return [*{run.name: run for run in (*book_runs("full"), *book_runs())}.values()]


def of_runs(found: list[Record], notebook: str, **parameters: Any) -> list[Record]:
    """The records of those runs of a notebook that were asked for these parameters, whatever their names.

    A parameter of None is one that the run leaves to the notebook. Runs are those of the book's grid, and of
    the full one, which published records are of.
    """
    names = {
        run.name
        for run in _asked(*grid.asked())
        if run.notebook == notebook and all(run.parameters.get(key) == parameters[key] for key in parameters)
    }
    return [record for record in found if record.get("run") in names]


# What two records of a matrix have the same if the matrices are.
_MATRIX = (
    *("corpus_fingerprint", "min_count", "max_vocab", "window_size", "distance_weighting"),
    *("subsample_threshold", "context_smoothing", "num_negative", "top_k", "rank"),
    *("num_words", "num_stored_cells"),
)


def _matrix(found: list[Record]) -> list[object]:
    record = pick(found, kind="pmi")
    return [record.get(name) for name in _MATRIX]


def trainings(found: list[Record]) -> dict[tuple[object, ...], Record]:
    """Records of training and of what was made of it, by what tells them apart."""
    names = ("run", "table", "method", "asked_ratio", "singular_value_power", "seed")
    return {
        tuple(record.get(name) for name in names): record
        for record in found
        if record["kind"] in ("quality", "frontier")
    }


def whole_study(found: list[Record]) -> list[Record]:
    """The records of one machine that has the most of the study: `found`, or those of a reference machine.

    That is the one measured last of those that factorized the same matrix, if it has runs or seeds of
    training that `found` lacks. Its records have its name as ``reference``.
    """
    matrix, own = _matrix(found), trainings(found).keys()
    for name, there in references("records"):
        if _matrix(there) == matrix and trainings(there).keys() - own:
            return [{**record, "reference": name} for record in there]
    return found


def completed(found: list[Record]) -> list[Record]:
    """`found`, and what training it lacks of `whole_study`, in that one's order.

    So pages of a small study on the reference's corpus have the seeds, tables and ratios of the full one:
    gaps and scores do not depend on the machine, but for what `cemb.report.compare` allows. Records of
    speed are not added.
    """
    others = [record for record in found if record["kind"] not in ("quality", "frontier")]
    return [*others, *(trainings(whole_study(found)) | trainings(found)).values()]


def pick(found: list[Record], **wanted: object) -> Record:
    """The one record with these fields. LookupError, naming them, if there is none or more than one."""
    matching = [r for r in found if all(r.get(name) == value for name, value in wanted.items())]
    if len(matching) != 1:
        raise LookupError(f"{len(matching)} records have {wanted}, wanted exactly one")
    return matching[0]


def frame(found: list[Record], kind: str) -> pd.DataFrame:
    """The records of a kind as a data frame. LookupError if there is none."""
    rows = [record for record in found if record["kind"] == kind]
    if not rows:
        raise LookupError(f"no record of kind {kind!r}")
    return pd.DataFrame(rows)


def references(kind: str) -> list[tuple[str, list[Record]]]:
    """Names of the reference machines, the one measured last first, and records the study does not rerun.

    ``"bench"``, ``"rates"`` and ``"scaling"`` are after the commands that make them, ``"counting"`` is of
    bench-counting, ``"processes"`` of bench-processes, ``"second"`` is the frontier on a second corpus.
    FileNotFoundError if there are none.
    """
    paths = (records.ROOT / "results" / "reference").glob(f"*/{kind}.jsonl")
    found = [(path.parent.name, records.read(path)) for path in sorted(paths)]
    if not found:
        raise FileNotFoundError(f"no machine among results/reference has a {kind}.jsonl")
    return sorted(found, key=lambda machine: machine[1][0]["utc_time"], reverse=True)


def reference(kind: str) -> tuple[str, list[Record]]:
    """The first of `references`."""
    return references(kind)[0]
