"""What changes a run's key and what does not: edits of a package of five modules, and of the real one."""

import ast
import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

from cemb.study import grid, records, staleness
from cemb.study.identity import Code, parse

PACKAGE = {
    "__init__": "",
    "hashing": (
        '"""The hash."""\n\nGOLDEN = 0x9E37\n\n\ndef mix(h: int) -> int:\n    return h ^ (h >> 30) * GOLDEN\n'
    ),
    "ops": (
        "import numpy as np\n\nfrom cemb import hashing\nfrom cemb.kernels import triton\n\nRULES = {}\n\n\n"
        "def scores(x, dropout=0.1):\n    # Each pair once.\n    if triton:\n        return triton.run(x)\n"
        "    return np.sum(hashing.mix(x)) * dropout\n\n\n"
        "@RULES.setdefault\ndef backward(x):\n    return -x\n\n\ndef unused(x):\n    return x\n"
    ),
    "losses": "from cemb import ops\n\n\ndef loss(x):\n    return 0.5 * ops.scores(x) + len(ops.RULES)\n",
    "kernels/__init__": "",
    "kernels/triton": "def run(x):\n    return x\n",
    "report/__init__": "",
    "report/figures": 'COLOUR = "blue"\n\n\ndef draw(x):\n    return COLOUR\n',
}
NOTEBOOK = (
    "from cemb.losses import loss\nfrom cemb.report import figures\n\nfound = loss(3)\nfigures.draw(found)\n"
)


def _write(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "cemb"
    _write(folder, PACKAGE)
    return folder


def _reach(folder, source=NOTEBOOK, **options):
    return Code.of_folder(folder).reach(source, **options)


def _edited(name, *pairs):
    text = PACKAGE[name]
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return {**PACKAGE, name: text}


def _without(name):
    return {other: text for other, text in PACKAGE.items() if other != name}


UNCHANGED = {
    "a comment": _edited("ops", ("# Each pair once.", "# Once for each pair.")),
    "a docstring": _edited("hashing", ('"""The hash."""', '"""A hash of 64 bits."""')),
    "annotations": _edited("hashing", ("(h: int) -> int", "(h: 'np.uint64')")),
    "formatting": _edited(
        "ops",
        (
            "np.sum(hashing.mix(x)) * dropout",
            "(\n        np.sum(\n            hashing.mix(x),\n        ) * dropout\n    )",
        ),
    ),
    "a renamed module": {
        **_without("losses"),
        "ops": PACKAGE["ops"],
        "objective": PACKAGE["losses"],
        "losses": "from cemb.objective import loss\n",
    },
    "a moved module": {
        **_without("hashing"),
        "core/__init__": "",
        "core/hashing": PACKAGE["hashing"],
        "ops": PACKAGE["ops"].replace("from cemb import hashing", "from cemb.core import hashing"),
    },
    "a function moved between modules": {
        **PACKAGE,
        "hashing": "GOLDEN = 0x9E37\n",
        "mixing": "from cemb.hashing import GOLDEN\n\n\ndef mix(h):\n    return h ^ (h >> 30) * GOLDEN\n",
        "ops": PACKAGE["ops"]
        .replace("from cemb import hashing", "from cemb.mixing import mix")
        .replace("hashing.mix(", "mix("),
    },
    "another name for an import": _edited(
        "ops", ("import numpy as np", "import numpy"), ("np.sum", "numpy.sum")
    ),
    "a figure's colour": _edited("report/figures", ("blue", "red")),
    "the other device's kernels": _edited("kernels/triton", ("return x", "return 2 * x")),
    "what nothing reaches": _edited("ops", ("def unused(x):\n    return x", "def unused(x):\n    return 2")),
}


@pytest.mark.parametrize("files", UNCHANGED.values(), ids=UNCHANGED)
def test_what_does_not_change_the_meaning_changes_no_key(package, files):
    before = _reach(package)
    _write(package, files)
    after = _reach(package)
    assert after.changes(before.definitions()) == []
    assert after.hash == before.hash


CHANGED = {
    "a constant of the hash": (_edited("hashing", ("0x9E37", "0x9E39")), "cemb.hashing.GOLDEN changed"),
    "a constant in a function": (_edited("hashing", ("30", "27")), "cemb.hashing.mix changed"),
    "a default argument": (_edited("ops", ("dropout=0.1", "dropout=0.2")), "cemb.ops.scores changed"),
    "a loss": (_edited("losses", ("0.5 *", "0.25 *")), "cemb.losses.loss changed"),
    "what is registered": (_edited("ops", ("return -x", "return x")), "cemb.ops.backward changed"),
    "another callee": (
        {
            **_edited("ops", ("hashing.mix", "hashing.mix2")),
            "hashing": PACKAGE["hashing"] + "\n\ndef mix2(h):\n    return h\n",
        },
        "cemb.hashing.mix2 is new",
    ),
}


@pytest.mark.parametrize(("files", "named"), CHANGED.values(), ids=CHANGED)
def test_what_changes_the_meaning_is_named(package, files, named):
    before = _reach(package)
    _write(package, files)
    after = _reach(package)
    assert after.hash != before.hash
    assert any(change.startswith(named) for change in after.changes(before.definitions()))


def test_it_is_told_what_reaches_a_change(package):
    before = _reach(package).definitions()
    _write(package, _edited("hashing", ("0x9E37", "0x9E39")))
    assert _reach(package).changes(before) == [
        "cemb.hashing.GOLDEN changed (found → loss → scores → mix → GOLDEN)"
    ]


def test_definitions_of_one_name_are_told_apart(package):
    files = {**PACKAGE, "a": "def f(x):\n    return x\n", "b": "def f(x):\n    return -x\n"}
    both = "from cemb import a, b\nfirst = a.f(1)\nsecond = b.f(2)\n"
    _write(package, files)
    before = _reach(package, both)
    assert (
        _reach(package, both.replace("a.f", "c.f").replace("b.f", "a.f").replace("c.f", "b.f")).hash
        != before.hash
    )


def test_each_device_has_its_kernels(package):
    before = {device: _reach(package, device=device).hash for device in ("cpu", "cuda")}
    _write(package, UNCHANGED["the other device's kernels"])
    assert _reach(package, device="cpu").hash == before["cpu"]
    assert _reach(package, device="cuda").hash != before["cuda"]


def test_a_local_name_is_no_definition(package):
    shadowing = "from cemb import losses\n\n\ndef f(losses):\n    return losses.loss\n\n\nx = f(1)\n"
    assert not any("losses" in name for name in _reach(package, shadowing).definitions())


def test_a_commit_has_the_code_it_had(package):
    root = package.parent
    (root / "notebooks").mkdir()
    (root / "notebooks" / "a.ipynb").write_text(json.dumps({"cells": []}))

    def git(*arguments):
        person = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        done = subprocess.run(
            ["git", *person, *arguments], cwd=root, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    before = _reach(package)
    _write(package, _edited("hashing", ("0x9E37", "0x9E39")))
    then = Code.of_commit(root, git("rev-parse", "HEAD"))
    assert then.reach(NOTEBOOK).hash == before.hash != _reach(package).hash
    assert json.loads(then.text("notebooks/a.ipynb")) == {"cells": []}
    with pytest.raises(LookupError, match="git does not know commit ffffffffff here"):
        Code.of_commit(root, "f" * 40)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The real package, copied, as what runs are keyed by."""
    folder = tmp_path / "copy" / "cemb"
    shutil.copytree(ROOT / "cemb", folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(records, "PACKAGE", folder)
    return folder


def _reached_by_runs():
    return {run.notebook: staleness.reached(run) for run in grid.study_runs()}


def test_the_package_rewritten_without_its_comments_has_the_same_keys(copied):
    before = {name: found.hash for name, found in _reached_by_runs().items()}
    for path in copied.rglob("*.py"):
        path.write_text(ast.unparse(parse(path.read_text())))
    assert {name: found.hash for name, found in _reached_by_runs().items()} == before


@pytest.mark.parametrize(
    ("file", "old", "new", "definition", "notebooks"),
    [
        (
            "hashing.py",
            "0xBF58476D1CE4E5B9",
            "0xBF58476D1CE4E5B7",
            "MULTIPLIER_1",
            {"speed", "quality", "growth", "frontier"},
        ),
        (
            "train/losses.py",
            "return SquaredError(targets)",
            "return SquaredError(2 * targets)",
            "mse_loss",
            {"speed", "growth", "quality"},
        ),
        (
            "kernels/cpu/locate.py",
            r"PRIVATE_POOL_LIMIT = ",
            "PRIVATE_POOL_LIMIT = 1 + ",
            "PRIVATE_POOL_LIMIT",
            {"speed", "quality", "growth", "frontier"},
        ),
        ("report/figures.py", "color=BLUE", "color=ORANGE", None, set()),
        ("kernels/triton.py", "def ", "def _", None, set()),
    ],
)
def test_edits_of_the_package_make_those_runs_stale_that_they_may_change(
    copied, file, old, new, definition, notebooks
):
    before = _reached_by_runs()
    known = {name: found.definitions() for name, found in before.items()}
    path = copied / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    after = _reached_by_runs()
    stale = {name for name, found in after.items() if found.hash != before[name].hash}
    assert {f"{name}.ipynb" for name in notebooks} <= stale
    assert bool(stale) == bool(notebooks)
    for name in stale:
        assert any(
            re.search(rf"\.{definition} changed", change) for change in after[name].changes(known[name])
        )


def test_all_that_runs_register_is_reached():
    """Autograd and fake implementations of the ops have no caller; they are reached with the op."""
    run = next(run for run in grid.study_runs() if run.notebook == "quality.ipynb")
    reached = staleness.reached(run).definitions()
    assert {"cemb.ops._quadratic", "cemb.ops._lookup_backward"} <= set(reached)
    assert not any(name.startswith(("cemb.report", "cemb.kernels.triton")) for name in reached)
