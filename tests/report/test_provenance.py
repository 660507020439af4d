"""Where numbers come from: the ends of run pages, the pages of references, and what is stale of those."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt

from cemb import cli
from cemb.report import provenance
from cemb.study import grid, records, staleness
from cemb.study.identity import RULE


def _place(**fields):
    return {
        **records.environment(),
        "device_name": "A Processor",
        "threads": 2,
        "git_commit": "c" * 40,
        "git_dirty": False,
        "utc_time": "2026-01-01T00:00:00+00:00",
        **fields,
    }


def _speed_run():
    return next(run for run in grid.study_runs() if run.name == "speed-sgd-262144")


_speed_run_of_the_study = _speed_run()


def test_the_end_of_a_run_page_says_all_that_it_takes_to_get_its_numbers_again():
    run = _speed_run()
    found = [
        _place(
            run=run.name,
            kind="speed",
            label="full, dense gradients",
            table="full",
            optimizer="sgd",
            code_hash="0123456789abcdef",
            total_ms_repeats=[1.5, 2.25],
            is_contended=slow,
            utc_time=f"2026-01-0{day}T00:00:00+00:00",
        )
        for slow, day in ((False, 1), (True, 2))
    ]
    text = provenance.run_section(run, found, "full")
    for wanted in (
        f"({provenance.label(run.name)})=",
        "`0123456789abcdef`",
        "cccccccccc",
        "A Processor",
        f"numpy {records.environment()['numpy_version']}",
        "pool_size = 262144",
        "1.5 2.25 ms",
        "2026-01-01T00:00:00+00:00 to 2026-01-02T00:00:00+00:00",
    ):
        assert wanted in text
    assert text.count("contended") == 1
    (command,) = re.findall(r"`(python -m cemb study [^`]*)`", text)
    asked = cli.parse(shlex.split(command)[3:]).keywords
    runs = grid.select(grid.study_runs(asked["grid"], asked["corpus"]), names=asked["run"])
    assert [selected.name for selected in runs] == [run.name]


def test_the_command_names_a_corpus_that_is_not_the_default(tmp_path):
    text = tmp_path / "my text.txt"
    text.write_text("one two")
    run = grid.study_runs("smoke", str(text))[0]
    asked = cli.parse(shlex.split(provenance.study_command(run, "smoke"))[3:]).keywords
    assert (ROOT / asked["corpus"]).resolve() == text.resolve()
    assert "--corpus" not in provenance.study_command(_speed_run(), "default")


class _Seen(HTMLParser):
    """The tags of a page, and the texts of its code."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.code, self._in_code = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "code":
            self.code.append("")
            self._in_code = True

    def handle_endtag(self, tag):
        self._in_code &= tag != "code"

    def handle_data(self, data):
        if self._in_code:
            self.code[-1] += data


@pytest.mark.parametrize(
    "name",
    [
        "a`<script>alert(1)</script>`.txt",
        "``` <img src=x onerror=alert(1)> | x ``.txt",
        "`{{ 7 }}` </script>.txt",
        "two\nlines\u2028\u0085.txt",
        "-text8",
        "text8",
    ],
)
def test_no_name_of_a_corpus_is_markup_on_a_page(name, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("one two")
    run = replace(_speed_run(), parameters={"corpus": os.path.relpath(tmp_path / name, grid.NOTEBOOKS)})
    place = _place(code_hash="0" * 16, device_name=f"{name} $x$ **bold**", corpus_fingerprint=name)
    text = provenance.run_section(run, [place], "smoke")
    seen = _Seen(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    assert set(seen.tags) <= {"h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}
    (command,) = [code for code in seen.code if code.startswith("python -m cemb study")]
    # As bash reads it, and so the words of the command are those of the corpus.
    words = subprocess.run(
        ["bash", "-c", f"LC_ALL=C.UTF-8; printf '%s\\0' {command}"], capture_output=True, check=True
    ).stdout
    asked = cli.parse(words.decode().split("\0")[3:-1]).keywords
    assert (tmp_path / asked["corpus"]).samefile(tmp_path / name)
    assert f"corpus = {run.parameters['corpus']!r}" in "".join(seen.code)


def test_every_published_file_has_a_page_and_a_command_that_parses():
    found = list(provenance.published())
    paths = (ROOT / "results" / "reference").glob("*/*.jsonl")
    assert {(machine, kind) for machine, kind, _ in found} == {(p.parent.name, p.stem) for p in paths}
    for machine, kind, measured in found:
        page = provenance.reference_page(machine, kind, measured)
        assert page.startswith(f"({provenance.label(machine, kind)})=\n# {machine}: ")
        assert measured[0]["device_name"] in page
        assert f"../data/{machine}-{kind}.jsonl" in page
        command, *others = re.findall(r"`(python -m cemb [^`]*)`", page)
        asked = cli.parse(shlex.split(command)[3:]).keywords
        runs = list(dict.fromkeys(record["run"] for record in measured if "run" in record))
        assert others == [f"{command} --run {run}" for run in runs]
        for run in runs:
            assert page.count(f"({provenance.label(machine, kind, run)})=\n{run}, ") == 1
        if kind != "records":
            assert asked["out"] == Path(f"results/local/{kind}.jsonl")


def _git(folder, *arguments):
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def reference(monkeypatch, tmp_path):
    """A repository with one commit, and a reference measured by its benchmark and by the speed notebook."""
    package = tmp_path / "cemb"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "bench": "from cemb import timing\n\n\ndef run():\n    return timing.LIMIT\n",
        "timing": "LIMIT = 1\n",
        "other": "",
    }.items():
        (package / f"{name}.py").write_text(text)

    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    notebook = {"cells": [{"cell_type": "code", "source": ["from cemb import bench\n", "bench.run()"]}]}
    (tmp_path / "notebooks" / "speed.ipynb").write_text(json.dumps(notebook))
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "first")
    folder = tmp_path / "results" / "reference" / "mine"
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "PACKAGE", package)
    for module in (grid, staleness):
        monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(grid, "study_runs", lambda grid: [_speed_run_of_the_study])

    def write(bench=None, speed=None):
        place = _place(git_commit=_git(tmp_path, "rev-parse", "HEAD"))
        records.write([{**place, "kind": "rates", **(bench or {})}], folder / "bench.jsonl")
        code = {"code_hash": staleness.reached(_speed_run_of_the_study).hash, "code_rule": RULE}
        speed = {**place, "run": "speed-sgd-262144", "kind": "speed", **code, **(speed or {})}
        records.write([speed], folder / "records.jsonl")

    return write, package


def _why():
    return {(stale.kind, stale.runs): stale.why for stale in provenance.published_staleness()}


def test_a_reference_of_the_present_code_is_current(reference):
    write, package = reference
    write()
    assert _why() == {}
    (package / "other.py").write_text("x = 1")  # which the benchmark does not reach
    (package / "timing.py").write_text('"""Timing."""\n\nLIMIT = 1  # of something\n')
    assert _why() == {}


def test_code_that_a_benchmark_reaches_makes_it_stale(reference):
    write, package = reference
    write()
    (package / "timing.py").write_text("LIMIT = 2\n")
    why = _why()
    assert set(why) == {("bench", ()), ("records", ("speed-sgd-262144",))}
    for text in why.values():
        assert re.fullmatch(r"code: since [0-9a-f]{10} cemb\.timing\.LIMIT changed", text)


def test_records_of_an_earlier_rule_are_judged_by_their_commit(reference):
    write, package = reference
    write(speed={"code_hash": "old", "code_rule": None})
    assert _why() == {}
    (package / "timing.py").write_text("LIMIT = 2\n")
    assert _why()["records", ("speed-sgd-262144",)].startswith("code: keyed by an earlier rule; since ")


def test_a_notebook_that_the_commit_lacks_is_told(reference):
    write, package = reference
    _git(package.parent, "mv", "notebooks/speed.ipynb", "notebooks/time.ipynb")
    _git(package.parent, "commit", "-q", "-m", "renamed")
    _git(package.parent, "mv", "notebooks/time.ipynb", "notebooks/speed.ipynb")
    write(speed={"code_hash": "old"})
    why = _why()["records", ("speed-sgd-262144",)]
    assert re.fullmatch(r"code: speed\.ipynb is not of commit [0-9a-f]{10}", why)


def test_versions_and_code_of_published_runs_are_told(reference):
    write, _ = reference
    write(
        bench={"git_commit": "f" * 40},
        speed={"code_hash": "old", "git_commit": None, "numba_version": "0.1", "cpu_model": "Z"},
    )
    why = _why()
    assert why["bench", ()] == "code: git does not know commit ffffffffff here"
    code, numba = why["records", ("speed-sgd-262144",)].split("; ")
    assert code == "code: of no commit"
    assert numba == f"numba_version: 0.1 → {records.environment()['numba_version']}"
    assert list(provenance.staleness_table(provenance.published_staleness())["records of"]) == [
        "1 runs",
        "all",
    ]


def test_a_run_that_is_no_more_is_told(reference):
    write, _ = reference
    write(speed={"run": "speed-lion-1"})
    assert _why() == {("records", ("speed-lion-1",)): "code: the study has no such run any more"}


def test_the_command_line_says_what_is_stale_of_the_published(reference, capsys):
    write, _ = reference
    write()
    check = ["study", "--check", "--published"]
    assert cli.main(check) == 0
    assert capsys.readouterr().out == "published records are of the present code and versions\n"
    write(speed={"scipy_version": "0.1"})
    assert cli.main(check) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mine/records.jsonl (speed-sgd-262144): scipy_version: 0.1 → ")
    assert lines[1] == "1 stale"
    assert cli.main(["study", "--published"]) == 2
    assert "--published goes with --check" in capsys.readouterr().err
    assert cli.main(["study", "--check", "--scheduler", "tcp://none:1"]) == 2
    assert "--check makes no run" in capsys.readouterr().err
