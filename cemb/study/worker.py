"""A process below a worker of a Dask cluster, which takes runs of a study that is elsewhere; see `cluster`.

It reads a request from standard input, and writes what went wrong to standard output, as JSON; null if
nothing did.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cemb import files, processes
from cemb.study import records, run, staleness
from cemb.study.grid import Run


def _difference(asked: dict[str, Any], machine: records.Record) -> str:
    """In what a run here would not be what is asked for; empty if in nothing."""
    one = Run(**asked["run"])
    found = staleness.differences(asked["identity"], staleness.identity(one, machine))
    if found.pop("code", None):
        found["code"] = staleness.code_change(staleness.reached(one), asked["definitions"])
    return "; ".join(found.values())


def _do(request: dict[str, Any]) -> str | None:
    os.environ["CEMB_RESULTS"] = request["results"]
    records.of_checkout("notebooks", "the study")
    if "look" in request:
        try:
            is_seen = Path(request["look"]).read_text(encoding="utf-8") == request["text"]
        except OSError:
            is_seen = False
        if not is_seen:
            return f"it does not see the study's folder of results, {request['results']!r}"
    for asked in request["asked"]:
        one = Run(**asked["run"])
        machine = {name: asked["identity"][name] for name in records.OF_MACHINE}
        if differs := _difference(asked, machine):
            return differs if "look" in request else f"{one.name} would not be the study's: {differs}"
        if "look" not in request and not _is_there(one, machine):
            run.execute(one, machine)
    return None


def _is_there(one: Run, machine: records.Record) -> bool:
    """Whether a result is there and whole, of a worker that was lost before it said so."""
    folder = staleness.folder_of(one, staleness.identity(one, machine))
    try:
        files.verify(folder, "it is run again")
    except (files.DamagedError, FileNotFoundError):
        return False
    return True


def main() -> int:
    """Read a request, do it, answer."""
    request = json.load(sys.stdin)
    # Not on the main thread: there nbclient would put its own handling of signals in place of ours.
    pool = ThreadPoolExecutor(1)
    try:
        why = pool.submit(_do, request).result()
    except processes.Stopped:
        pool.shutdown(wait=False)
        raise
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        why = str(error)
    print(json.dumps(why))
    return 0


if __name__ == "__main__":
    sys.exit(processes.supervised(main))
