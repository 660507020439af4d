"""Build the site from the study's records: stage the sources with the run pages, then call Jupyter Book.

Fails, naming them, if runs that the pages show are missing or stale. Does nothing if nothing changed since
the last build.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

from cemb import files, processes
from cemb.pmi import corpora
from cemb.report import export, provenance, select
from cemb.study import grid, records, staleness

ROOT = records.ROOT
BOOK = ROOT / "book"
# Warnings fail the build, after all of them are shown; nothing is taken from an earlier build.
OPTIONS = ("--all", "-W", "-n", "--keep-going", "-q")


def source_files() -> list[Path]:
    """All files of the repository that the site is made of."""
    found = [ROOT / "_config.yml", *BOOK.rglob("*"), *(ROOT / "cemb").rglob("*"), ROOT / "CHANGELOG.md"]
    found += [*(ROOT / "results" / "reference").rglob("*.jsonl"), *(ROOT / "results" / "tests").iterdir()]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def site_key(runs: list[grid.Run]) -> str:
    """A hash of all that the site depends on."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    for run in runs:
        digest.update(staleness.run_dir(run).name.encode())
    for package in ("jupyter-book", "myst-nb", "sphinx-book-theme", "matplotlib", "pandas"):
        digest.update(f"{package} {version(package)}".encode())
    return digest.hexdigest()


def stage(runs: list[grid.Run], found: list[dict], source: Path) -> None:
    """Lay the book's sources, the executed notebooks and the records' CSV files into `source`."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(BOOK, source, ignore=shutil.ignore_patterns("build.py", "__pycache__", "_ext"))
    shutil.copy(ROOT / "CHANGELOG.md", source / "changelog.md")
    for run in runs:
        own = [record for record in found if record["run"] == run.name]
        stage_run(run, own, source / "runs" / f"{run.name}.ipynb")
    (source / "data").mkdir()
    for machine, kind, measured in provenance.published():
        name = f"{machine}-{kind}"
        shutil.copy(
            ROOT / "results" / "reference" / machine / f"{kind}.jsonl", source / "data" / f"{name}.jsonl"
        )
        page = source / "runs" / f"reference-{name}.md"
        page.write_text(provenance.reference_page(machine, kind, measured), encoding="utf-8")
    whole = select.completed(found)
    for kind in ("pmi", "speed", "quality", "frontier"):
        (source / "data" / f"{kind}.csv").write_text(export.csv_text(whole, kind), encoding="utf-8")
    (source / "assets" / "records.js").write_text(export.explorer_data(whole), encoding="utf-8")


def stage_run(run: grid.Run, found: list[dict], page: Path) -> None:
    """Write a run's executed notebook with an end that says where its numbers come from."""
    notebook = json.loads((staleness.run_dir(run) / "run.ipynb").read_text(encoding="utf-8"))
    text = provenance.run_section(run, found, grid.asked()[0])
    notebook["cells"].append({"cell_type": "markdown", "id": "provenance", "metadata": {}, "source": text})
    page.write_text(json.dumps(notebook), encoding="utf-8")


def pack(html: Path, archive: Path) -> None:
    """Put a built site into one zip file, the same bytes for the same site."""
    unfinished = archive.with_name("new.zip")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(path for path in html.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"{archive.stem}/{path.relative_to(html).as_posix()}")
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            packed.writestr(entry, path.read_bytes())
    unfinished.replace(archive)


def build_html(runs: list[grid.Run], found: list[dict], build: Path) -> int:
    """Stage and build beside the site there is, then put it in its place; returns Jupyter Book's status."""
    new = build / "new"
    shutil.rmtree(new, ignore_errors=True)
    stage(runs, found, new / "src")
    command = [Path(sys.executable).parent / "jupyter-book", "build", new / "src"]
    command += ["--config", ROOT / "_config.yml", "--path-output", new, *OPTIONS]
    environment = {**os.environ, "TQDM_DISABLE": "1"}  # bars would litter the pages
    # Pages run in the staged folder; paths that were relative to this one must not be.
    _, corpus = grid.asked()
    if corpus not in corpora.CORPORA:
        environment["CORPUS"] = str(Path(corpus).absolute())
    status = subprocess.run(
        list(map(str, command)), env=environment, check=False, preexec_fn=processes.end_with_parent
    ).returncode
    if status == 0:
        (build / ".site-key").unlink(missing_ok=True)
        shutil.rmtree(build / "_build", ignore_errors=True)
        (new / "_build").rename(build / "_build")
        shutil.rmtree(new)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build")
    parser.add_argument("--archive", action="store_true", help="also pack the site into one zip file")
    arguments = parser.parse_args()
    build = arguments.build_dir.resolve()
    try:
        with processes.one_at_a_time(build, print):
            return bring_up_to_date(build, arguments.archive)
    except (OSError, ValueError) as error:
        print(f"the site cannot be built: {error}", file=sys.stderr)
        return 1


def bring_up_to_date(build: Path, is_packed: bool) -> int:
    """Build the site, if need be, and pack it if asked to; returns the exit status."""
    runs = select.book_runs()
    try:
        found = select.load()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}\n`make study` runs what is missing") from None
    key, stamp, index = site_key(runs), build / ".site-key", build / "_build" / "html" / "index.html"
    if index.exists() and stamp.exists() and stamp.read_text() == key:
        print(f"the site is up to date: {index}")
    elif status := build_html(runs, found, build):
        return status
    else:
        files.write_atomic(stamp, key)
        print(f"the site is built: {index}")
    if is_packed:
        archive = build / f"cemb-{version('cemb')}-site.zip"
        pack(index.parent, archive)
        print(f"packed: {archive}")
    return 0


if __name__ == "__main__":
    sys.exit(processes.supervised(main))
