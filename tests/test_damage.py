"""Every stored format, damaged at random: refused by name before it is used, or of no other content."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, long, zipf_text

import cemb
from cemb import files
from cemb.model import build_model
from cemb.pmi.csr import CsrFolder
from cemb.pmi.encode import EncodedCorpus, encode
from cemb.pmi.matrix import write_pmi
from cemb.pmi.out_of_core import CooccurrenceCounts, count
from cemb.study import dataset

REMEDIES = ("encode the corpus again", "make it again", "it is built again", "take a whole copy of it")


def content_of_corpus(folder):
    found = EncodedCorpus.open(folder)
    ids = np.concatenate(found.shards())
    return found.words, found.word_counts.tolist(), found.num_tokens, found.borders, ids.tolist()


def content_of_matrix(folder):
    matrix = CsrFolder(folder).matrix()
    return matrix.indptr.tolist(), matrix.indices.tolist(), matrix.data.tolist()


def content_of_data_set(folder):
    found = dataset.read(folder)
    counts, left = found.word_counts.tolist(), found.optimum.left.tolist()
    return found.words, counts, left, found.matrix.data.tolist(), found.summary


def content_of_model(folder):
    found = cemb.load(folder)
    values = {name: value.tolist() for name, value in found.model.state_dict().items()}
    return found.words, values, found.manifest


READ = {
    "corpus": content_of_corpus,
    "counts": content_of_matrix,
    "matrix": content_of_matrix,
    "data set": content_of_data_set,
    "model": content_of_model,
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder of each format."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "text.txt").write_text(zipf_text(3000, 60))
    corpus = encode(str(folder / "text.txt"), folder / "corpus", min_count=2, shard_tokens=1000)
    counts = count(corpus.shards(), folder / "counts", vocab_size=len(corpus.words))
    write_pmi(counts, folder / "matrix")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CEMB_RESULTS", str(folder / "results"))
        built = dataset.load_pmi(dataset.PmiConfig(str(folder / "text.txt"), min_count=2, rank=3))
    shutil.copytree(built.folder, folder / "data set")
    model = build_model("hashed", len(built.words), 3, pool_size=50, shared_table=False, bias="separate")
    cemb.save(folder / "model", model, built.words, details={"data": built.summary})
    return folder


def damage(folder, rng):
    """Change a folder's bytes in one place; returns what was done."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    path = paths[rng.integers(len(paths))]
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "zero", "cut", "empty", "remove", "swap", "append"])
    place = int(rng.integers(len(data)))
    if kind == "flip":
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == "zero":
        data[place : place + 16] = bytes(len(data[place : place + 16]))
    elif kind == "cut":
        del data[place:]
    elif kind == "empty":
        data.clear()
    elif kind == "append":
        data += bytes(rng.integers(256, size=8, dtype=np.uint8))
    elif kind == "swap":
        data = bytearray(paths[rng.integers(len(paths))].read_bytes())
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{kind} at {place} of {path.name}"


@pytest.mark.parametrize("num_damages", [25, *long(200)])
@pytest.mark.parametrize("name", READ)
def test_damage_is_refused_or_of_no_effect(stored, tmp_path, record_property, name, num_damages):
    record_property("damaged folders", num_damages)
    expected, refused = READ[name](stored / name), 0
    for seed in range(num_damages):
        folder = tmp_path / str(seed)
        shutil.copytree(stored / name, folder)
        what = damage(folder, np.random.default_rng(seed))
        try:
            found = READ[name](folder)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert str(folder) in str(error), f"{what}: {error}"
            assert any(remedy in str(error) for remedy in REMEDIES), f"{what}: {error}"
        else:
            assert found == expected, what
        shutil.rmtree(folder)
    assert refused > num_damages * 0.8


LIES = [None, -1, 0, 7, 1.5, 10**30, True, "", "int8", "O", "<U9999999", {}]
LIES += [[], [1], [1, 2], ["1", "2"], [10**9, 10**9], [1e300, 1]]


@pytest.mark.parametrize("name", ["corpus", "counts", "matrix"])
def test_a_manifest_that_lies_is_refused(stored, tmp_path, record_property, name):
    """Its sums are right: whoever wrote it meant it."""
    expected = READ[name](stored / name)
    manifest = json.loads((stored / name / "manifest.json").read_text())
    lies = [{**manifest, field: lie} for field in manifest for lie in LIES]
    lies += [{key: value for key, value in manifest.items() if key != field} for field in manifest]
    lies += [[], 3, None, "text"]
    record_property("manifests that lie", len(lies))
    for i, lie in enumerate(lies):
        folder = tmp_path / str(i)
        shutil.copytree(stored / name, folder)
        (folder / "manifest.json").write_text(json.dumps(lie))
        sum_again(folder)
        try:
            found = READ[name](folder)
        except ValueError as error:
            assert str(folder) in str(error), lie
        else:  # fields that are told to the user alone, or say the same
            informs = ("borders", "num_tokens", "fingerprint")
            assert (found[:2], found[-1]) == (expected[:2], expected[-1]), lie
            assert found == expected or any(lie[name] != manifest[name] for name in informs), lie


def sum_again(folder):
    (folder / files.SUMS).unlink()
    with files.atomic_directory(folder.with_suffix(".new"), durable=False) as work:
        shutil.copytree(folder, work, dirs_exist_ok=True)
    shutil.rmtree(folder)
    folder.with_suffix(".new").rename(folder)


def _altered(path, change):
    values = np.load(path)
    change(values)
    np.save(path, values)


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        ("indptr", lambda a: a.__setitem__(0, 1), "does not rise from 0"),
        ("indptr", lambda a: a.__setitem__(-1, a[-1] + 1), "does not rise from 0"),
        ("indptr", lambda a: a.__setitem__(5, 2**40), "does not rise from 0"),
        ("indptr", lambda a: a.__setitem__(5, -(2**40)), "does not rise from 0"),
        ("indices", lambda a: a.__setitem__(3, -1), "columns outside"),
        ("indices", lambda a: a.__setitem__(3, 2**31 - 1), "columns outside"),
        ("indices", lambda a: a.__setitem__(3, a[2]), "columns that do not rise within a row"),
    ],
)
@pytest.mark.parametrize("cells_at_once", [1, 2**18])
def test_cells_are_in_their_places(stored, tmp_path, monkeypatch, file, change, what, cells_at_once):
    monkeypatch.setattr("cemb.pmi.csr._CHECKED_CELLS", cells_at_once)
    assert content_of_matrix(stored / "counts")
    shutil.copytree(stored / "counts", tmp_path / "counts")
    _altered(tmp_path / "counts" / f"{file}.npy", change)
    sum_again(tmp_path / "counts")
    with pytest.raises(files.DamagedError, match=f"{file}.npy .*{what}"):
        CsrFolder(tmp_path / "counts")


def test_damaged_parts_of_a_count_are_counted_again(stored, tmp_path, monkeypatch, record_property):
    record_property("damaged folders", 25)
    monkeypatch.setattr("cemb.pmi.out_of_core.LARGEST_TASK", 200)
    corpus = EncodedCorpus.open(stored / "corpus")
    options = {"vocab_size": len(corpus.words), "workers": 1}

    def killed(*_):
        raise OSError(5, "a power cut")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="a power cut"):
        patch.setattr("cemb.pmi.out_of_core._assemble", killed)
        count(corpus.shards(), tmp_path / "out", **options)
    for seed in range(25):
        shutil.copytree(tmp_path / "out.partial", tmp_path / f"{seed}.partial")
        what = damage(tmp_path / f"{seed}.partial", np.random.default_rng(seed))
        count(corpus.shards(), tmp_path / str(seed), **options)
        assert content_of_matrix(tmp_path / str(seed)) == content_of_matrix(stored / "counts"), what
        assert not (tmp_path / f"{seed}.partial").exists()


@pytest.mark.parametrize("stage", ["corpus", "counts", "matrix"])
def test_a_data_set_goes_on_from_what_is_whole(stored, tmp_path, monkeypatch, capsys, stage):
    config = dataset.PmiConfig(str(stored / "text.txt"), min_count=2, rank=3)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(dataset, "optimum", lambda *_: 1 / 0)
        dataset.load_pmi(config)
    (partial,) = (tmp_path / "results" / "local" / "data").iterdir()
    stages = [partial / name / "manifest.json" for name in ("corpus", "counts", "matrix")]
    made = [path.stat().st_mtime_ns for path in stages]
    largest = max((partial / stage).iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(dataset, "optimum", lambda *_: 1 / 0)
        dataset.load_pmi(config)
    assert f"/{stage}' is damaged: the SHA-256 of {largest.name}" in capsys.readouterr().err
    again = [path for path, before in zip(stages, made, strict=True) if path.stat().st_mtime_ns != before]
    assert again == [partial / stage / "manifest.json"]
    found = dataset.load_pmi(config)
    assert content_of_data_set(found.folder)[:4] == content_of_data_set(stored / "data set")[:4]


def test_too_little_memory_loses_nothing(stored, tmp_path, monkeypatch):
    config = dataset.PmiConfig(str(stored / "text.txt"), min_count=2, rank=3)
    with pytest.raises(ValueError, match="memory=1 MiB is too little"):
        dataset.load_pmi(config, memory="1MiB")
    assert not list((tmp_path / "results").rglob("corpus"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("cemb.pmi.out_of_core._assemble", lambda *_: 1 / 0)
        dataset.load_pmi(config, memory="300MiB")
    kept = sorted((tmp_path / "results").rglob("run-*"))
    assert kept
    with pytest.raises(ValueError, match=r"was begun with 1\d\d MiB a worker, and 1\d\d MiB are less; give"):
        dataset.load_pmi(config, memory="250MiB")
    assert sorted((tmp_path / "results").rglob("run-*")) == kept
    assert dataset.load_pmi(config, memory="300MiB").words


def test_a_corpus_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text(zipf_text(3000, 60))
    config = dataset.PmiConfig(str(path), min_count=2, rank=3)
    encoding = dataset.encode.encode

    def replaced(*arguments, **options):
        path.write_text(zipf_text(3000, 60, seed=1))
        return encoding(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="changed while it was read"):
        patch.setattr(dataset.encode, "encode", replaced)
        dataset.load_pmi(config)
    assert not list((tmp_path / "results").rglob("pmi-*"))


_FULL = """
import resource, sys
from cemb.pmi import encode, out_of_core, matrix

corpus = encode.EncodedCorpus.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    counts = out_of_core.count(corpus.shards(), sys.argv[2], vocab_size=len(corpus.words), workers=1)
    matrix.write_pmi(counts, sys.argv[2] + "-pmi")
except OSError as error:
    print(error.errno, error)
"""


@pytest.mark.parametrize("largest", [200, 1000, 4000, 9000])
def test_a_file_that_grows_too_large_is_named(stored, tmp_path, largest):
    """As on a full disk: the system's reason, the folder, and no half result.

    `-B`: Python keeps what it could write of a .pyc (to 3.13), which would damage the environment.
    """
    command = [sys.executable, "-B", "-c", _FULL, str(stored / "corpus"), str(tmp_path / "out"), str(largest)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "a file is too large while writing" in done.stdout
    assert "out" in done.stdout
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith(".cemb-tmp")]
    corpus = EncodedCorpus.open(stored / "corpus")
    again = count(corpus.shards(), tmp_path / "out", vocab_size=len(corpus.words), workers=1)
    assert content_of_matrix(again.folder) == content_of_matrix(stored / "counts")
    assert CooccurrenceCounts(tmp_path / "out").total == again.total
