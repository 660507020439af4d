"""What a person installs: the wheel, its use without the checkout, releases, the workflows that make them."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from fnmatch import fnmatchcase
from importlib.metadata import PathDistribution
from itertools import chain

import pytest
import yaml
from conftest import ROOT

import cemb

WORKFLOWS = {
    path.name: yaml.load(path.read_text(), yaml.BaseLoader)  # which keeps `on` a word
    for path in sorted((ROOT / ".github" / "workflows").iterdir())
}
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, made of a copy, for what is built in the checkout goes to its build/ and stays there."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "cemb", source / "cemb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # A folder that is no package of the project's, beside it as in the checkout.
    (source / "tests").mkdir()
    (source / "tests" / "test_one.py").touch()
    command = [sys.executable, "-c", f"from setuptools import build_meta as b; b.build_wheel({str(out)!r})"]
    assert _run(command, cwd=source)[0] == 0
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    assert _run([*command, "--target", str(folder), str(wheel)])[0] == 0
    # Another's repository around it, as around a project's environment.
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    assert _run([*git, "init"])[0] == _run([*git, "commit", "--allow-empty", "-m", "Another's"])[0] == 0
    # Kernels compiled here are kept for their sources, wherever these lie.
    for path in (ROOT / "cemb").rglob("__pycache__/*.nb[ic]"):
        place = folder / path.relative_to(ROOT)
        place.parent.mkdir(exist_ok=True)
        shutil.copy(path, place)
    return folder


@pytest.fixture
def without_checkout(installed, tmp_path, monkeypatch):
    """Runs Python in an empty folder, where cemb is that of the wheel; warnings are errors."""
    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.delenv("CEMB_RESULTS")
    return lambda *arguments: _run([sys.executable, "-P", "-W", "error", *arguments], cwd=tmp_path)


def test_the_wheel_holds_the_package_and_no_more(wheel):
    assert re.fullmatch(rf"cemb-{re.escape(cemb.__version__)}-py3-none-any\.whl", wheel.name)
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (
        path for path in (ROOT / "cemb").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    assert held == {str(path.relative_to(ROOT)) for path in files}
    assert {"cemb/data/original_2021.csv", "cemb/kernels/cpu/simd.py"} <= held


def test_the_wheel_says_what_it_is(installed):
    (path,) = installed.glob("*.dist-info")
    found = PathDistribution(path)
    said = message_from_bytes((path / "METADATA").read_bytes())
    assert (said["Name"], said["Version"]) == ("cemb", cemb.__version__)
    assert (said["License-Expression"], said["License-File"]) == ("MIT", "LICENSE")
    assert (path / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert said["Requires-Python"] == ">=3.11"
    assert set(said.get_all("Provides-Extra")) == {"study", "dev", "peers"}
    core = {re.match(r"[\w-]+", line)[0] for line in said.get_all("Requires-Dist") if "extra ==" not in line}
    assert core == {"torch", "numpy", "scipy", "numba", "tqdm", "tyro", "safetensors"}
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()
    (command,) = found.entry_points
    assert (command.group, command.name, command.load()) == ("console_scripts", "cemb", cemb.cli.main)


def test_an_installed_package_takes_a_step(without_checkout, installed):
    code = f"""
import sys
import cemb
assert cemb.__file__ == {str(installed / "cemb" / "__init__.py")!r}, cemb.__file__
assert "torch" not in sys.modules
import torch
table = cemb.HashedEmbedding(1000, 16, pool_size=500, block_size=4)
optimizer = torch.optim.Adam(table.parameters())
loss = table(torch.tensor([3, 999])).square().sum()
loss.backward()
optimizer.step()
assert table(torch.tensor([3, 999])).square().sum() < loss
assert not {{"papermill", "pandas", "pyarrow", "gensim", "distributed"}} & {{*sys.modules}}
"""
    assert without_checkout("-c", code) == (0, "", "")


def test_an_installed_package_makes_a_matrix_where_it_is_called(without_checkout, installed, tmp_path):
    (tmp_path / "text.txt").write_text(
        " ".join(f"{chr(97 + i * i % 23)}{chr(97 + i * i % 19)}" for i in range(5000))
    )
    before = {*installed.rglob("*")}
    options = ["--corpus", "text.txt", "--rank", "8", "--out", "record.jsonl"]
    status, _, said = without_checkout("-m", "cemb", "pmi", *options)
    assert status == 0, said
    (folder,) = (tmp_path / "results" / "local" / "data").iterdir()
    assert said.endswith(f"the matrix is in {folder}\n")
    # Its commit is unknown, whatever repository is around the folder that it is installed in.
    assert '"git_commit": null' in (tmp_path / "record.jsonl").read_text()
    assert all("__pycache__" in path.parts for path in {*installed.rglob("*")} - before)


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["study"], "the study needs notebooks/"),
        (["study", "--check"], "the study needs notebooks/"),
        (["study", "--check", "--published"], "the study needs results/reference/"),
        (["bench", "--targets"], "the ops' tests pass, needs tests/"),
    ],
)
def test_what_needs_the_checkout_says_so(command, what, without_checkout, installed, tmp_path):
    status, out, said = without_checkout("-m", "cemb", *command)
    assert (status, out, said.count("\n")) == (2, "", 1)
    assert f"{what} of the project's repository, which a wheel does not have" in said
    assert repr(str(installed / "cemb")) in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def release(tmp_path):
    """Edits what a release's check reads, and checks a tag."""
    for name in (".ci/release_check", "cemb/__init__.py", "CITATION.cff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    newest = f"## {cemb.__version__} (2026-12-01)\n\n- New.\n- Newer.\n"
    changelog = f"# Changelog\n\n## Unreleased\n\n{newest}\n## 0.0.1\n\n- First.\n"
    (tmp_path / "CHANGELOG.md").write_text(changelog)

    def check(tag=f"v{cemb.__version__}", path=None, before="", after=""):
        if path:
            text = (tmp_path / path).read_text()
            assert before in text
            (tmp_path / path).write_text(text.replace(before, after, 1))
        return _run([sys.executable, str(tmp_path / ".ci" / "release_check"), tag])

    return check


def test_a_release_is_what_its_tag_says(release):
    assert release() == (0, "- New.\n- Newer.\n", "")


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ({"tag": "v7.0.0"}, "cemb/__init__.py has "),
        ({"tag": cemb.__version__}, "a tag is v and a version"),
        ({"tag": "v1"}, "a tag is v and a version"),
        (
            {"path": "cemb/__init__.py", "before": "__version__ =", "after": "__version__ +="},
            "has 0 versions",
        ),
        ({"path": "CITATION.cff", "before": "\nversion: ", "after": "\nversion: 1"}, "CITATION.cff has 1"),
        ({"path": "CHANGELOG.md", "before": " (2026-12-01)", "after": ""}, "first section is"),
        (
            {"path": "CHANGELOG.md", "before": "2026-12-01", "after": "2026-13-01"},
            "2026-13-01, which is no date",
        ),
        ({"path": "CHANGELOG.md", "before": "(2026", "after": "of (2026"}, "first section is"),
        (
            {"path": "CHANGELOG.md", "before": "Unreleased", "after": "Unreleased\n\n- More."},
            '1 lines under "Unrel',
        ),
        ({"path": "CHANGELOG.md", "before": "- New.\n- Newer.\n", "after": ""}, "says nothing of "),
    ],
)
def test_what_disagrees_with_the_tag_is_named(edit, why, release):
    status, out, said = release(**edit)
    assert (status, out) == (1, "")
    assert "cannot be released: " in said
    assert why in said


def test_the_version_stands_once_for_the_package():
    assert "version" in PROJECT["dynamic"]
    assert "version" not in PROJECT
    assert str(CITATION["version"]) == cemb.__version__


def test_the_citation_is_valid_and_invents_nothing():
    # What the schema of version 1.2.0 requires, and the types of what is given.
    assert CITATION["cff-version"] == "1.2.0"
    assert all(isinstance(CITATION[name], str) and CITATION[name] for name in ("message", "title"))
    assert CITATION["authors"]
    for author in CITATION["authors"]:
        assert author.keys() <= {"name"} or author.keys() <= {
            "family-names",
            "given-names",
            "orcid",
            "affiliation",
        }
    known = {"cff-version", "message", "title", "authors", "type", "version", "license", "keywords"}
    assert CITATION.keys() <= known | {"repository-code", "date-released", "doi", "url", "abstract"}
    assert CITATION["type"] in ("software", "dataset")
    assert CITATION["license"] == PROJECT["license"]
    assert [author["name"] for author in CITATION["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]
    # An address is in both or, where none is known, in neither.
    assert PROJECT.get("urls", {}).get("Repository") == CITATION.get("repository-code")


def _jobs():
    return [
        pytest.param(workflow, job, id=f"{workflow}-{job}")
        for workflow, content in WORKFLOWS.items()
        for job in content["jobs"]
    ]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_may_only_read_unless_a_job_needs_more(name):
    workflow = WORKFLOWS[name]
    assert {"name", "on", "permissions", "jobs"} == workflow.keys()
    assert workflow["permissions"] == {"contents": "read"}
    assert len({other["name"] for other in WORKFLOWS.values()}) == len(WORKFLOWS)


WRITES = {
    ("book.yml", "publish"): {"pages": "write", "id-token": "write"},
    ("release.yml", "pypi"): {"id-token": "write"},
    ("release.yml", "release"): {"contents": "write"},
}


@pytest.mark.parametrize(("workflow", "name"), _jobs())
def test_a_job_is_well_formed(workflow, name):
    jobs = WORKFLOWS[workflow]["jobs"]
    job = jobs[name]
    assert job.get("permissions", {}) == WRITES.get((workflow, name), {})
    assert {*_listed(job.get("needs", []))} <= jobs.keys() - {name}
    assert ("uses" in job) != ("steps" in job)
    if "uses" in job:
        called = job["uses"].removeprefix("./.github/workflows/")
        assert "workflow_call" in WORKFLOWS[called]["on"]
        # A called workflow may not ask for more than its caller has.
        assert not [other for (file, other) in WRITES if file == called]
        return
    assert job["runs-on"] == "ubuntu-latest"
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"])
        for script in re.findall(r"\.ci/\w+", step.get("run", "")):
            assert os.access(ROOT / script, os.X_OK)
        for target in re.findall(r"^make (.+)", step.get("run", "")):
            assert {*target.split()} <= {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)}
        # What a tag or a title holds is no text for a shell.
        assert "${{" not in step.get("run", "")
        assert not re.search(r"secrets\.", str(step))
        if "download-artifact" in step.get("uses", ""):
            assert step["with"]["name"] in chain(
                *(_uploads(workflow, other) for other in _before(jobs, name))
            )


def _listed(value):
    return [value] if isinstance(value, str) else value


def _before(jobs, name):
    """Jobs that are done before one starts."""
    needed = _listed(jobs[name].get("needs", []))
    return {*needed, *chain(*(_before(jobs, other) for other in needed))}


def _uploads(workflow, name):
    job = WORKFLOWS[workflow]["jobs"][name]
    if called := job.get("uses", "").removeprefix("./.github/workflows/"):
        return [*chain(*(_uploads(called, other) for other in WORKFLOWS[called]["jobs"]))]
    return [step["with"]["name"] for step in job["steps"] if "upload-artifact" in step.get("uses", "")]


def test_the_wheel_is_tried_on_each_python_that_it_names():
    versions = WORKFLOWS["wheel.yml"]["jobs"]["smoke"]["strategy"]["matrix"]["python-version"]
    assert versions[0] == PROJECT["requires-python"].removeprefix(">=")
    assert {"3.11", "3.12"} <= {*versions}


def test_a_tag_is_released_by_one_workflow_after_all_checks():
    of_tags = {name for name, content in WORKFLOWS.items() if "tags" in (content["on"].get("push") or {})}
    assert of_tags == {"release.yml"}
    jobs = WORKFLOWS["release.yml"]["jobs"]
    assert {"check", "wheel", "site"} <= _before(jobs, "pypi")
    assert any(fnmatchcase("v0.2.0", tag) for tag in WORKFLOWS["release.yml"]["on"]["push"]["tags"])
