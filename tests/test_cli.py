"""Options are what they are made from: none is missing, and each has its default and its help."""

import ast
import dataclasses
import inspect
import itertools
import json
import re
import shlex
import subprocess
import sys
from typing import get_type_hints

import pytest
from conftest import ROOT

from cemb import cli
from cemb.commands import COMMANDS
from cemb.model import COMPRESSED_TABLES, TABLES
from cemb.pmi import encode, out_of_core
from cemb.pmi.corpora import CORPORA
from cemb.study import bench, counting_bench, frontier, grid, parameters, quality, rivals, speed, staleness
from cemb.study import run as study_run
from cemb.study.dataset import PmiConfig, load_pmi
from cemb.study.identity import parse


def _help(command, monkeypatch, capsys):
    """Each option of a command with its help and default, as printed."""
    monkeypatch.setenv("COLUMNS", "80")  # wider, boxes stand side by side
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    found = re.finditer(r"--([a-z][\w-]*) ((?:(?! --[a-z]).)*?\((?:default: [^)]*|required)\))", text)
    return {option[1]: option[2] for option in found}


def _documented(kind):
    """Strings that stand below the fields of a dataclass and of those it inherits from, by field."""
    found = {}
    for base in inspect.getmro(kind)[:-1]:
        body = parse(inspect.getsource(base)).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def _shown(default):
    """A default as help has it."""
    return shlex.join(map(str, default)) if isinstance(default, tuple) else str(default)


CASES = {
    "speed": [speed.SpeedCase],
    "train": [quality.QualityCase, PmiConfig, quality.Trainings],
    "pmi": [PmiConfig],
    "rates": [PmiConfig],
    "frontier": [PmiConfig, frontier.Frontier],
}


@pytest.mark.parametrize(
    ("command", "kind"), [(name, kind) for name, kinds in CASES.items() for kind in kinds]
)
def test_every_field_of_a_case_is_an_option(command, kind, monkeypatch, capsys):
    found, documented = _help(command, monkeypatch, capsys), _documented(kind)
    hints = get_type_hints(kind)
    fields = [field for field in dataclasses.fields(kind) if not dataclasses.is_dataclass(hints[field.name])]
    assert fields
    for field in fields:
        text = found[field.name.replace("_", "-")]
        assert documented[field.name] in text
        assert text.endswith(f"(default: {_shown(field.default)})")


@pytest.mark.parametrize(
    ("command", "function", "own"),
    [
        ("encode", encode.encode, set()),
        ("count", out_of_core.count, {"vocab_size", "word_counts", "executor"}),
        ("pmi", load_pmi, set()),
        ("bench", bench.run, set()),
        ("bench-counting", counting_bench.run, set()),
        ("scaling", counting_bench.measure_scaling, set()),
        ("speed", speed.measure_cases, {"rounds"}),
    ],
)
def test_every_keyword_of_a_function_is_an_option(command, function, own, monkeypatch, capsys):
    found = _help(command, monkeypatch, capsys)
    (section,) = re.findall(r"Args:\n(.*?)(?:\n\s*\n|\Z)", inspect.getdoc(function), re.DOTALL)
    documented = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section, re.DOTALL | re.MULTILINE))
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name not in own:
            option = f"no-{name}" if parameter.default is True else name
            text = found[option.replace("_", "-")]
            assert " ".join(documented[name].split()) in text
            assert text.endswith(f"(default: {_shown(parameter.default)})")


def test_help_lists_what_may_be_chosen(monkeypatch, capsys):
    trained, timed, measured = (_help(name, monkeypatch, capsys) for name in ("train", "speed", "frontier"))
    for names, text in (
        ((*TABLES, *COMPRESSED_TABLES), trained["table"]),
        (("all-cells", "mse", "weighted-mse", "glove"), trained["loss"]),
        (CORPORA, trained["corpus"]),
        (("document", "line", "sentence"), trained["borders"]),
        ((*TABLES, *rivals.NAMES), timed["table"]),
        (("original", "original-full"), timed["grid"]),
        (frontier.METHODS, measured["methods"]),
    ):
        choices = text.replace(" ", "")  # lines break between and within them
        assert [name for name in names if name.replace(" ", "") not in choices] == []


def test_help_lists_the_commands_without_what_they_need(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for name, make in COMMANDS.items():
        assert f"  {name} " in text
        assert inspect.getdoc(make) in text
    heavy = "{'torch', 'numpy', 'numba', 'pandas'}"
    code = f"import sys, cemb.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_names_that_options_had_still_serve():
    assert cli.parse(["speed", "--model", "full"]).keywords["case"].table == "full"
    asked = cli.parse(["frontier", "--method", "int8", "--ratio=2", "--seed", "1", "2"]).keywords["frontier"]
    assert (asked.methods, asked.compression_ratios, asked.seeds) == (["int8"], [2.0], [1, 2])
    asked = cli.parse(["train", "--corpus", "a", "b", "--pool-size", "9", "--seed", "3"]).keywords[
        "trainings"
    ]
    assert (asked.data.corpus, asked.case.seed, asked.seeds) == (("a", "b"), 3, ())


def test_parameters_are_built_by_flat_names():
    study = parameters.build(speed.Comparison, optimizer="adam", dropout=0.5, repeats=3)
    assert study == speed.Comparison(speed.Task(dropout=0.5), "adam", repeats=3)
    with pytest.raises(ValueError, match=r"Comparison has no parameter droput; it has embedding_dim, "):
        parameters.build(speed.Comparison, droput=0.5)


@pytest.mark.parametrize("notebook", grid.PARAMETERS)
def test_notebooks_build_what_their_parameters_are_checked_against(notebook):
    kind = study_run.parameters_of(notebook)
    flat = parameters.names(kind)
    assert len(flat) == len(set(flat))
    cells = json.loads((grid.NOTEBOOKS / notebook).read_text())["cells"]
    typed, code, *_ = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    *own, options, path = [node.targets[0].id for node in parse(typed).body]
    assert (options, path) == ("options", "records_path")
    assert set(own) <= set(flat)
    assert re.search(rf"parameters\.build\(\s*(?:speed\.)?{kind.__name__},", code)
    assert f".{kind.__name__} and " in typed or f".{kind.__name__}, " in typed
    runs = [run for name in grid.GRIDS for run in grid.study_runs(name) if run.notebook == notebook]
    assert runs
    for run in runs:
        study_run.check_parameters(run)
    # What is built by its annotation alone would not key the runs.
    reached = staleness.reached(runs[0]).definitions()
    for part in (kind, *(hint for hint in get_type_hints(kind).values() if dataclasses.is_dataclass(hint))):
        assert f"{part.__module__}.{part.__name__}" in reached
