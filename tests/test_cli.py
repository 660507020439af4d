"""Options are what they are made from, with their defaults and help; how commands fail and end."""

import ast
import dataclasses
import inspect
import itertools
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import ROOT, children, is_alive, wait_until, zipf_text
from gensim.models import KeyedVectors

import cemb
from cemb import cli, commands, vectors
from cemb.commands import COMMANDS
from cemb.model import COMPRESSED_TABLES, TABLES
from cemb.pmi import encode, out_of_core
from cemb.pmi.corpora import CORPORA
from cemb.study import (
    bench,
    counting_bench,
    frontier,
    grid,
    parameters,
    processes_bench,
    quality,
    rivals,
    speed,
    staleness,
)
from cemb.study import run as study_run
from cemb.study.dataset import PmiConfig, load_pmi
from cemb.study.identity import parse
from cemb.train.loops import DivergenceError


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
        ("bench-processes", processes_bench.run, set()),
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


@pytest.mark.parametrize(
    "command",
    ["speed", "bench", "bench-counting", "scaling", "pmi", "frontier", "rates", "evaluate /none"],
)
def test_records_replace_no_device_and_no_link(command, tmp_path, capsys):
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(tmp_path / "elsewhere")
    for path, what in ((fifo, "it is a device, pipe or socket"), (link, "it is a symbolic link")):
        assert cli.main([*command.split(), "--out", str(path)]) == 2
        assert f"cannot write '{path}': {what}" in capsys.readouterr().err
    assert fifo.is_fifo()
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/proc/new.jsonl", "No such file or directory"),  # where nobody can write, not even root
        ("/proc", "it is a directory"),
        ("/none/new.jsonl", "there is no directory '/none'"),
    ],
)
@pytest.mark.parametrize(
    "options", [["pmi", "--histogram-out"], ["pmi", "--out"], ["train", "--table", "full", "--save"]]
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(options, path, why, capsys):
    assert cli.main([*options, path, "--corpus", "/none/either"]) == 2
    assert capsys.readouterr().err == f"cemb: cannot write '{path}': {why}\n"


@pytest.mark.parametrize(
    "command",
    [
        "train --table full --corpus /none/either --out",
        "export /none/either --format npy --out",
        "export /none/either --format tsv --out",
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(command, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, said in (
        (tmp_path, f"'{tmp_path}' exists already; remove it, or name another"),
        (tmp_path / "link", f"'{tmp_path / 'link'}' exists already; remove it, or name another"),
        (".", "'.' exists already; remove it, or name another"),
        ("/proc/new", "cannot write '/proc/new': No such file or directory"),
        ("/none/new", "cannot write '/none/new': there is no directory '/none'"),
    ):
        assert cli.main([*command.split(), str(path)]) == 2
        assert capsys.readouterr() == ("", f"cemb: {said}\n")


@pytest.mark.parametrize("format", [name for name in vectors.FORMATS if name not in vectors.FOLDERS])
def test_export_replaces_files_alone(format, tmp_path, capsys):
    assert cli.main(["export", "/none/either", "--format", format, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"cemb: cannot write '{tmp_path}': it is a directory\n"


def test_one_model_is_kept(tmp_path, capsys):
    for option in ("--save", "--out"):
        command = ["train", "--table", "full", "--seeds", "1", "2", "--corpus", "/none/either"]
        assert cli.main([*command, option, str(tmp_path / "new")]) == 2
        assert capsys.readouterr().err == f"cemb: {option} keeps one model, and there are seeds [1, 2]\n"


def test_what_is_trained_is_loaded_and_exported(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(zipf_text(4000, 60))
    folder = tmp_path / "model"
    command = ["train", "--corpus", str(tmp_path / "text.txt"), "--min-count", "2", "--rank", "3"]
    command += ["--table", "full", "--num-steps", "3", "--out", str(folder), "--save", str(tmp_path / "pt")]
    assert cli.main(command) == 0
    record = json.loads(capsys.readouterr().out)
    found = cemb.load(folder)
    assert found.manifest["details"]["training"] == record
    data = found.manifest["details"]["data"]
    assert (data["rank"], data["window_size"], data["num_words"]) == (3, 5, len(found.words))
    assert data["corpus_fingerprint"] == record["pmi_corpus_fingerprint"]
    for name, value in torch.load(tmp_path / "pt", weights_only=True).items():
        assert torch.equal(found.model.state_dict()[name], value)
    for options in ([], ["--balanced"], ["--contexts"], ["--balanced", "--contexts"]):
        out = tmp_path / "-".join(["out", *options])
        export = ["export", str(folder), "--format", "word2vec-binary", "--out", str(out), *options]
        assert cli.main(export) == 0
        said = {"kind": "vectors", "format": "word2vec-binary", "num_words": len(found.words)}
        assert json.loads(capsys.readouterr().out) == {**said, "embedding_dim": 3}
        expected = found.vectors("--balanced" in options, contexts="--contexts" in options)
        written = vectors.read(out)
        assert written.words == expected.words
        assert written.values.tobytes() == expected.values.tobytes()
    with (tmp_path / "model" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert cli.main(["export", str(folder), "--format", "glove", "--out", str(tmp_path / "other")]) == 2
    assert f"cemb: '{folder}' is damaged: the SHA-256 of model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.long
def test_the_readme_takes_a_text_to_gensim(tmp_path):
    """Its lines, as a shell has them, on a text of 5 MB; gensim has the model's bits."""
    (section,) = re.findall(
        r"^## From your text to gensim\n+```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    lines = [line for line in section.splitlines() if not line.startswith("source ")]
    assert [line.split()[:2] for line in lines[:3]] == [
        ["cemb", name] for name in ("encode", "train", "export")
    ]
    (tmp_path / "text.txt").write_text(f"{zipf_text(850_000, 20_000)} {'war and peace ' * 9}")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    for line in lines:
        command = ["bash", "-c", line]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
    assert len(ast.literal_eval(done.stdout)) == 10
    ours = cemb.load(tmp_path / "model").vectors()
    theirs = KeyedVectors.load_word2vec_format(str(tmp_path / "vectors.bin"), binary=True)
    assert theirs.index_to_key == ours.words
    assert theirs.vectors.tobytes() == ours.values.tobytes()


def test_export_escapes_where_it_is_asked_to(tmp_path, capsys):
    words = ["New York", "line\nbreak", "naïve"]
    cemb.save(tmp_path / "model", cemb.FullEmbedding(3, 2), words, details={})
    export = ["export", str(tmp_path / "model"), "--format", "glove", "--out", str(tmp_path / "out")]
    assert cli.main(export) == 2
    said = "cemb: glove has no words with white space, and one is 'New York'; escaped (--escape) it has _\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "out").exists()
    assert cli.main([*export, "--escape"]) == 0
    assert vectors.read(tmp_path / "out").words == ["New_York", "line_break", "naïve"]


def test_a_training_that_diverges_makes_no_model(tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text(zipf_text(4000, 60))

    def diverging(train, rate):
        train(rate)
        raise DivergenceError("it did not converge")

    monkeypatch.setattr(quality, "halve_until_stable", diverging)
    command = ["train", "--corpus", str(tmp_path / "text.txt"), "--rank", "3", "--table", "full"]
    assert cli.main([*command, "--out", str(tmp_path / "model")]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["failure"] == "it did not converge"
    assert said.err.endswith("cemb: there is no model to save: it did not converge\n")
    assert not (tmp_path / "model").exists()


def test_a_model_that_does_not_fit_leaves_the_one_there_was(tmp_path, monkeypatch):
    # Python keeps what it could write of a .pyc (to 3.13): an import below the limit would damage the
    # environment.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "model.pt"
    path.write_bytes(b"before")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        with pytest.raises(OSError, match=f"cannot write '{path}': File too large"):
            commands._save({"weight": torch.zeros(9999)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0o027)
    try:
        commands._save({"weight": torch.ones(3)}, path)
    finally:
        os.umask(umask)
    assert torch.load(path, weights_only=True)["weight"].tolist() == [1, 1, 1]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "there is not enough memory"),
        (MemoryError("Unable to allocate 9 GiB"), "there is not enough memory: Unable to allocate 9 GiB"),
        (ValueError("no"), "no"),
    ],
)
def test_errors_are_one_line(error, said, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setitem(COMMANDS, "corpora", lambda: fail)
    assert cli.main(["corpora"]) == 2
    assert capsys.readouterr() == ("", f"cemb: {said}\n")


@pytest.mark.parametrize("arguments", [["corpora"], ["--help"], ["encode", "--help"]])
def test_an_output_that_nobody_reads_ends_a_command_quietly(arguments, started):
    process = started("-m", "cemb", *arguments)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 128 + signal.SIGPIPE)


def test_an_output_that_is_full_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cemb", "corpora"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, b"cemb: [Errno 28] No space left on device\n")


SUPERVISED = """
import subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from cemb import processes

def work():
    child = "import subprocess; subprocess.run(['sleep', '99'])"
    started = subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
    with ThreadPoolExecutor(1) as pool:
        print(started.pid, flush=True)
        {}

sys.exit(processes.supervised(work))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("doing", ["time.sleep(99)", "pool.submit(time.sleep, 99).result()"])
def test_a_signal_ends_a_program_and_all_below_it(number, doing, started):
    process = started("-c", SUPERVISED.format(doing))
    child = int(process.stdout.readline())
    wait_until(lambda: children(child))
    (grandchild,) = children(child)
    process.send_signal(number)
    start = time.monotonic()
    assert process.wait(60) == 128 + number
    assert time.monotonic() - start < 3
    assert process.stderr.read() == f"cemb: stopped by {signal.Signals(number).name}\n"
    assert not is_alive(child)
    assert not is_alive(grandchild)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_leaves_nothing(number, tmp_path, started):
    command = ["-m", "cemb", "scaling", "--tokens", "1e10", "--scratch", str(tmp_path)]
    process = started(*command, env={**os.environ, "TQDM_DISABLE": "1"})
    wait_until(lambda: [*tmp_path.rglob("ids-*.npy")] or process.poll())
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert process.stderr.read() == f"cemb: stopped by {signal.Signals(number).name}\n"
    assert not list(tmp_path.iterdir())


CHILDREN = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from cemb import processes

if __name__ == "__main__":
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=processes.end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(99)
"""


ORPHAN = """
import os, signal, time
from multiprocessing import get_context
from cemb import processes

def work():
    processes.end_with_parent()
    time.sleep(99)

if __name__ == "__main__":
    process = get_context("spawn").Process(target=work)
    process.start()
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_ends_whose_parent_was_killed_before_it_began(tmp_path, started):
    (tmp_path / "parent.py").write_text(ORPHAN)
    process = started(str(tmp_path / "parent.py"), env={**os.environ, "PYTHONPATH": str(ROOT)})
    child = int(process.stdout.readline())
    wait_until(lambda: not is_alive(child), 10)


def test_processes_do_not_outlive_a_parent_that_is_killed(tmp_path, started):
    (tmp_path / "parent.py").write_text(CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = started(str(tmp_path / "parent.py"), env=environment)
    child = int(process.stdout.readline())
    assert is_alive(child)
    process.kill()
    process.wait(60)
    wait_until(lambda: not is_alive(child), 3)
