"""Keep this machine's study as a named reference, and renew the README's numbers and picture from it.

    python book/publish.py NAME [--add]

The study must be up to date. With --add, records of the runs that are take the place of the reference's, or
come after them, and all others stay: so that new runs do not ask for the old ones again. What
`python -m cemb` left in results/local goes with it: bench.jsonl, rates.jsonl, counting.jsonl, scaling.jsonl,
processes.jsonl, and second.jsonl, which is the frontier on a second corpus.
`results/reference/NAME` is what gets committed.
"""

import argparse
import re
import sys

import matplotlib.pyplot as plt

from cemb import files, processes
from cemb.report import answer as report_answer
from cemb.report import figures, provenance, select, speed, text
from cemb.study import grid, records, staleness

README = records.ROOT / "README.md"
REFERENCES = records.ROOT / "results" / "reference"
ANSWER = re.compile(r"(?<=<!-- answer -->\n).*?(?=<!-- /answer -->)", re.DOTALL)


def renewed_readme(readme: str, name: str, found: list[dict]) -> str:
    """The README with its answer written anew from the records of the reference machine `name`.

    Raises ValueError if these leave part of the answer open, as those of the default grid do.
    """
    answer = report_answer.readme_answer(found)
    if text.NOT_MEASURED in answer:
        raise ValueError("the README's answer is of the full grid; PROFILE=full make study runs it")
    picture = f"![Step time, hashed over full table, in 2021 and now](results/reference/{name}/answer.svg)"
    return ANSWER.sub(lambda _: f"{answer}\n\n{picture}\n", readme)


def without_noise(record: dict) -> dict:
    """The record, its learning curve to nine digits: more say nothing, and curves are a fifth of the file."""
    if not record.get("history"):
        return record
    history = [
        {key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in point.items()}
        for point in record["history"]
    ]
    return {**record, "history": history}


def extended(kept: list[dict], new: list[dict]) -> list[dict]:
    """Records, those of the new ones' runs replaced, in the full grid's order; of other runs last."""
    renewed = {record["run"] for record in new}
    found = [*(record for record in kept if record["run"] not in renewed), *new]
    places = {run.name: place for place, run in enumerate(grid.study_runs("full"))}
    return sorted(found, key=lambda record: places.get(record["run"], len(places)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", help="of the reference machine: letters, digits and hyphens")
    parser.add_argument("--add", action="store_true", help="to a reference there is, what is up to date")
    arguments = parser.parse_args()
    name = arguments.name
    if not re.fullmatch(r"[a-z0-9-]+", name):
        print(f"a name is of lower-case letters, digits and hyphens, got {name!r}", file=sys.stderr)
        return 2
    folder = REFERENCES / name
    try:
        if arguments.add:
            runs = [run for run in select.book_runs() if staleness.why_stale(run) is None]
            found = extended(records.read(folder / "records.jsonl"), staleness.current_records(runs))
        else:
            found = select.load()
        readme = renewed_readme(README.read_text(encoding="utf-8"), name, found)
    except (OSError, ValueError) as error:
        print(f"nothing to publish: {error}", file=sys.stderr)
        return 1
    records.write(map(without_noise, found), folder / "records.jsonl")
    for kind, measurement in provenance.MEASUREMENTS.items():
        if measurement.module and (local := records.results_dir() / "local" / f"{kind}.jsonl").exists():
            records.write(records.read(local), folder / f"{kind}.jsonl")
    figure = figures.answer(speed.answer_frame(found))
    figure.savefig(folder / "answer.svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)
    files.write_atomic(README, readme)
    print(f"{len(found)} records in {folder.relative_to(records.ROOT)}; README renewed")
    return 0


if __name__ == "__main__":
    sys.exit(processes.supervised(main))
