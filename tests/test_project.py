"""The project's files agree with each other."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain

import pytest
import yaml
from conftest import ROOT, of_the_default_grid

from cemb.report import quality, select
from cemb.study import records
from cemb.study.identity import parse

# Folders of cemb, each of which may import only from those before it; the first is the library.
ROOMS = ("", "pmi", "train", "study", "report")


def _name(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def _pins(path):
    lines = [line for line in (ROOT / path).read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^\s=]+", line) for line in lines), f"{path} must pin exactly"
    return {_name(line): line for line in lines}


def test_pyproject_names_what_requirements_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {_name(requirement) for requirement in extras.pop("peers")} <= set(_pins("requirements-peers.txt"))
    named = [*project["dependencies"], *chain(*extras.values())]
    pins = _pins("requirements.txt")
    assert {_name(requirement) for requirement in named} == set(pins)
    for requirement in named:
        if at_least := re.search(r">=([\d.]+)", requirement):
            pinned = pins[_name(requirement)].split("==")[1]
            assert tuple(map(int, pinned.split(".")[:2])) >= tuple(map(int, at_least[1].split(".")[:2]))


def test_constraints_pin_the_rest():
    extra = {**_pins("requirements-test.txt"), **_pins("requirements-peers.txt")}
    assert not set(_pins("constraints.txt")) & {*_pins("requirements.txt"), *extra}
    assert not set(_pins("requirements.txt")) & set(extra)


def test_binder_installs_the_same():
    lines = (ROOT / ".binder" / "requirements.txt").read_text().split("\n")
    assert lines == ["-r ../requirements.txt", "-c ../constraints.txt", ""]
    assert (ROOT / ".binder" / "postBuild").stat().st_mode & 0o111


def test_environment_yml_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert {"-r requirements.txt", "-c constraints.txt", "-e ."} <= set(pip)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (python,) = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    assert python.split("=")[1] == project["requires-python"].removeprefix(">=")


def test_imports_go_one_way():
    for place, room in enumerate(ROOMS):
        inside = (path for path in (ROOT / "cemb" / room).rglob("*.py"))
        for path in inside:
            own = path.relative_to(ROOT / "cemb").parts[0]
            if path.name in ("cli.py", "commands.py", "__main__.py") or (not room and own in ROOMS):
                continue
            imported = re.findall(
                r"^\s*(?:from|import) cemb(?:\.(\w+))?(?: import (.*))?", path.read_text(), re.M
            )
            for module, names in imported:
                found = {module or name.strip() for name in (names.split(",") if not module else [""])}
                later = found & {*ROOMS[place + 1 :], "cli", "commands"}
                assert not later, f"{path} imports {later}"


def test_private_names_stay_in_their_modules():
    used = []
    for path in (ROOT / "cemb").rglob("*.py"):
        nodes = [*ast.walk(parse(path.read_text()))]
        imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("cemb")]
        names = [(path.name, alias.name, alias.asname or alias.name) for n in imports for alias in n.names]
        used += [name for name in names if re.match("_[^_]", name[1])]
        ours = {name for *_, name in names}
        attributes = [n for n in nodes if isinstance(n, ast.Attribute) and re.match("_[^_]", n.attr)]
        texts = [ast.unparse(node) for node in attributes]
        used += [(path.name, text) for text in texts if text.partition(".")[0] in ours]
    assert not used


def test_chapters_do_without_torch():
    pages = [path.read_text() for path in (ROOT / "book").glob("*.md") if path.stem not in ("use", "take")]
    imports = sorted({line for page in pages for line in page.splitlines() if re.match("from cemb", line)})
    assert any(line.startswith("from cemb.report import") for line in imports)
    code = "\n".join([*imports, "import sys; sys.exit('torch' in sys.modules)"])
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_measurements_need_no_jupyter():
    heavy = "{'papermill', 'nbformat', 'IPython', 'pandas', 'matplotlib', 'gensim'}"
    modules = "cemb.study.speed, cemb.study.quality, cemb.cli"
    code = f"import sys, {modules}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_stored_without_output(path):
    cells = json.loads(path.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown"
    assert cells[0]["source"][0].startswith("# ")
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            parse("".join(cell["source"]))


# Each of these runs if make or a shell gets to read it.
NAME = "a`touch 1`$(shell touch 2)$(touch 3)$HOME\"'; touch 4 #.txt"


@pytest.mark.parametrize("given", ["on the command line", "in the environment"])
@pytest.mark.parametrize(
    ("target", "variable", "seen"),
    [
        ("study", "CORPUS", "CORPUS"),
        ("check", "CORPUS", "CORPUS"),
        ("site", "CORPUS", "CORPUS"),
        ("study", "PROFILE", "CEMB_GRID"),
        ("gpu", "OUT", "OUT"),
        ("gpu", "PYTHON", "PYTHON"),
    ],
)
def test_make_hands_names_over_as_they_are(target, variable, seen, given, tmp_path, monkeypatch):
    for name in ("Makefile", "requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    stubs = {"python": folder / "python", NAME: folder / NAME}
    for stub in stubs.values():
        stub.write_text(f'#!/bin/sh\nprintf "%s" "${seen}" > {tmp_path}/seen\n')
        stub.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("PYTHON", "python")
    monkeypatch.delenv("MAKEFLAGS", raising=False)  # of a make that runs the tests
    command = ["make", "--silent", target]
    if given == "in the environment":
        monkeypatch.setenv(variable, NAME)
    else:
        command.append(f"{variable}={NAME}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "seen").read_text() == NAME
    assert not list(tmp_path.rglob("[1-4]"))


def test_no_tracked_file_is_large():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            assert (ROOT / name).stat().st_size < 1_000_000, name


def test_every_docstring_example_runs():
    import doctest

    import cemb.pmi.encode
    import cemb.tables.hashed

    for module in (cemb.pmi.encode, cemb.tables.hashed):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


@pytest.fixture
def publish(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book")
    return importlib.import_module("publish")


def test_records_of_new_runs_replace_their_own_alone(publish, monkeypatch):
    for name in ("CORPUS", "CEMB_GRID"):
        monkeypatch.delenv(name, raising=False)

    def of(run, value):
        return {"run": run, "value": value}

    kept = [of("pmi", 1), of("frontier-after", 1), of("of-old", 1), of("quality-sgd-full-mini-batch", 1)]
    new = [of("frontier-after", 2), of("frontier-after", 3), of("growth-speed", 2)]
    assert publish.extended(kept, new) == [
        of("pmi", 1),
        of("frontier-after", 2),
        of("frontier-after", 3),
        of("quality-sgd-full-mini-batch", 1),
        of("growth-speed", 2),
        of("of-old", 1),
    ]


def test_readme_says_what_the_reference_records_say(publish):
    readme = (ROOT / "README.md").read_text()
    (name,) = re.findall(r"results/reference/([a-z0-9-]+)/answer\.svg", readme)
    found = records.read(ROOT / "results" / "reference" / name / "records.jsonl")
    assert publish.renewed_readme(readme, name, found) == readme
    with pytest.raises(ValueError, match="the README's answer is of the full grid"):
        publish.renewed_readme(readme, name, of_the_default_grid(found))


# A measurement as it would be typed: digits with a unit, or a span of time in words.
UNIT = (
    r"(?:[mµn]s|s|seconds?|minutes?|hours?|×|times|[KMGT]i?B|bytes|%|per cent|(?:GB|MiB|tokens|rows|steps)/s)"
)
MEASUREMENT = re.compile(
    rf"(?<![\w.,-])(?:\d[\d,.]*\s*{UNIT}(?![\w/])"
    r"|\d[\d,.]*\s+(?:million|billion)\b"
    r"|(?:half an|an|one|two|three|four|five|ten) (?:hour|minute|second)s?\b"
    r"|(?:gap|score|loss) (?:of|is) \d?\.\d)"
)
# What is defined and not measured.
DEFINED = (
    # A ratio of bytes or values that a table was asked for; how much faster anything is, is measured.
    r"\d+\s+times(?! (?:as|faster|slower|longer|more|ours))",
    r"95%(?=\s+bootstrap\s+interval)",
    r"400 bytes",  # a row of float32
    r"1 MiB",  # the pool of the floors
    # The reader's own, or an option of a command.
    r"\d+(?:MiB|GiB)",
)


def _prose(text):
    """Markdown without its header, code, roles, formulas, targets of links, and the README's answer."""
    for pattern in (
        r"\A---\n.*?\n---\n",
        r"<!-- answer -->.*?<!-- /answer -->",
        r"^```.*?^```",
        r"(?:\{[\w:]+\})?`[^`]*`",
        r"\$[^$]*\$",
        r"(?<=\])\([^)]*\)",
    ):
        text = re.sub(pattern, "…", text, flags=re.DOTALL | re.MULTILINE)
    return text


def _typed_measurements(text):
    return [
        match[0]
        for match in MEASUREMENT.finditer(_prose(text))
        if not any(re.match(defined, match.string[match.start() :]) for defined in DEFINED)
    ]


def test_no_number_is_typed_by_hand():
    texts = {path.name: path.read_text() for path in (ROOT / "book").rglob("*.md")}
    texts["README.md"] = (ROOT / "README.md").read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        texts[path.name] = "\n\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
    found = {name: typed for name, text in texts.items() if (typed := _typed_measurements(text))}
    assert not found, "computed numbers are glued, from records"


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("a step takes 3.2 ms, 7 times faster", ["3.2 ms", "7 times"]),
        ("in 16 times fewer bytes, 16\ntimes smaller", []),
        ("some\n12% of 5 GB/s, 3 million tokens/s", ["12%", "5 GB/s", "3 million"]),
        ("{glue:text}`x:.1f` ms, `5 ms`, $5\\%$ and [5](#5%)", []),
        ("```bash\nsleep 5 s\n```\na gap of 0.32 after half an hour", ["gap of 0.3", "half an hour"]),
        ("with its 95% bootstrap interval, in float32, Python 3.11", []),
    ],
)
def test_typed_numbers_are_seen(text, typed):
    assert _typed_measurements(text) == typed


def test_readme_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found = {}
    exec(example, found)
    assert found["vectors"].shape == (1, 2, 64)


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "reference").glob("*/records.jsonl")))
def test_reference_machines_reach_the_optimum(path):
    found = records.read(path)
    svd = select.pick(found, kind="quality", table="svd", singular_value_power=0.5)
    best = quality.best_quality(found)
    assert best["gap"] < 0.005
    assert svd["wordsim353_low"] <= best["wordsim353_score"] <= svd["wordsim353_high"]


def _python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_what_a_user_imports_is_listed_before_it_is_loaded():
    code = """
import sys, cemb
assert {"HashedEmbedding", "FullEmbedding", "HashSpec", "PairModel", "optim"} <= set(dir(cemb))
assert "torch" not in sys.modules
from cemb import HashedEmbedding, PairModel, optim
assert cemb.optim is optim and cemb.HashedEmbedding is HashedEmbedding
"""
    assert _python(code) == (0, "", "")


def test_the_study_says_what_it_needs_where_that_is_missing():
    status, _, error = _python("import sys; sys.modules['pandas'] = None; import cemb.report.stats")
    assert status == 1
    assert error.endswith("cemb.report needs pandas: pip install 'cemb[study]'\n")
    code = f"""
import sys; sys.modules["papermill"] = None
from cemb import cli
sys.exit(cli.main(["study", "--grid", "smoke", "--corpus", {str(ROOT / "README.md")!r}, "--run", "pmi"]))
"""
    status, _, error = _python(code)
    assert status == 2
    assert error.count("\n") == 1
    assert error.endswith("the study's packages come with pip install 'cemb[study]'\n")
