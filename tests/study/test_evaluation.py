"""`cemb evaluate` and `cemb compress`: anyone's vectors, scored and made small."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import zipf_text
from gensim.models import KeyedVectors, Word2Vec

import cemb
from cemb import cli, vectors
from cemb.model import build_model
from cemb.study import evaluation
from cemb.tables import TransformCodedEmbedding
from cemb.train import evaluation_sets, similarity
from cemb.train.evaluation_sets import read_similarity

SETS = {
    "close.tsv": "king\tqueen\t9\ncar\twater\t1\ntiger\tcat\t8\nmoney\tcash\t7.5\nphysics\tproton\t6\n",
    "same.csv": "Word 1,Word 2,Score\nking,queen,5\ncar,water,5\ntiger,cat,5\n",
    "few.txt": "king queen 5\nzzz yyy 4\nxxx king 3\n",
    "questions.txt": ": made\nking queen tiger cat\nmoney cash xxx yyy\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with vectors that gensim trained and wrote, as word2vec's binary file, and sets."""
    path = tmp_path_factory.mktemp("vectors")
    text = zipf_text(num_words=1_000).split()
    sentences = [text[first : first + 50] for first in range(0, len(text), 50)]
    model = Word2Vec(sentences, vector_size=60, min_count=1, seed=0, workers=1, epochs=3)
    model.wv.save_word2vec_format(path / "vectors.bin", binary=True)
    for name, content in SETS.items():
        (path / name).write_text(content)
    return path


def run(capsys, *arguments):
    """Status, records and standard error of a command."""
    status = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, [json.loads(line) for line in said.out.splitlines()], said.err


def test_vectors_are_scored_on_sets(folder, capsys):
    sets = [folder / name for name in ("close.tsv", "same.csv", "few.txt")]
    options = ["--similarity", *sets, "--analogies", folder / "questions.txt"]
    status, found, table = run(capsys, "evaluate", folder / "vectors.bin", *options)
    assert status == 0
    keyed = KeyedVectors.load_word2vec_format(folder / "vectors.bin", binary=True)
    expected = similarity.similarity(keyed.vectors, keyed.index_to_key, read_similarity(sets[0]))
    assert found[0] == {
        "vectors": str(folder / "vectors.bin"),
        "is_balanced": False,
        "kind": "similarity",
        "num_words": len(keyed),
        "embedding_dim": 60,
        "set": "close",
        **expected,
    }
    assert (found[0]["pairs"], found[0]["coverage"]) == (5, 100)
    (_, (gensims, _), _) = keyed.evaluate_word_pairs(str(sets[0]))
    assert found[0]["score"] == pytest.approx(100 * gensims, abs=1e-3)
    for record, why in zip(found[1:3], ("no variation: all judgements", "too few pairs: 1 in"), strict=True):
        assert record["score"] is record["low"] is record["high"] is None
        assert record["no_score"].startswith(why)
        assert f"no score: {why}" in table
    assert (found[3]["kind"], found[3]["questions"], found[3]["coverage"]) == ("analogies", 1, 50)
    assert re.search(r"close +-?[\d.]+ +-?[\d.]+ to [\d.]+ +5 of 5 pairs", table)


def test_without_options_the_sets_are_gensims(folder, capsys, tmp_path):
    out = tmp_path / "records.jsonl"
    assert run(capsys, "evaluate", folder / "vectors.bin", "--out", out)[:2] == (0, [])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["set"] for record in found] == ["wordsim353", "simlex999", "questions-words"]


def test_models_are_scored_with_their_contexts_or_without(folder, capsys, tmp_path):
    words = ["king", "queen", "car", "water", "tiger", "cat", "money", "cash"]
    torch.manual_seed(0)
    model = build_model("full", len(words), 5, shared_table=False)
    cemb.save(tmp_path / "model", model, words, details={})
    sides = [side.detach().numpy() for side in model.factors()]
    test_set = read_similarity(folder / "close.tsv")
    for options, scored in ([], sides[0]), (["--balanced"], vectors.balanced(*sides)):
        path = folder / "close.tsv"
        _, (found,), _ = run(capsys, "evaluate", tmp_path / "model", "--similarity", path, *options)
        assert found["score"] == similarity.similarity(scored, words, test_set)["score"]
        assert found["pairs"] == 4


@pytest.mark.parametrize("times", [4, 8])
def test_vectors_become_small_and_are_read_again(folder, capsys, tmp_path, times):
    source, out, sets = folder / "vectors.bin", tmp_path / "small", tmp_path / "random.tsv"
    keyed = KeyedVectors.load_word2vec_format(source, binary=True)
    rng = np.random.default_rng(0)
    pairs = rng.choice(keyed.index_to_key[:1000], (300, 2))
    sets.write_text("".join(f"{a}\t{b}\t{rng.random()}\n" for a, b in pairs))
    asked = ["compress", source, "--times", times, "--out", out, "--similarity", sets]
    status, (record,), _ = run(capsys, *asked)
    assert status == 0
    saved = cemb.load(out)
    assert isinstance(saved.model, TransformCodedEmbedding)
    assert saved.words == keyed.index_to_key
    stored = sum(t.numel() * t.element_size() for t in saved.model.state_dict().values())
    assert record["bytes_before"] == keyed.vectors.nbytes
    assert record["bytes_after"] == stored <= keyed.vectors.nbytes / times
    assert record["folder_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert record["source_bytes"] == source.stat().st_size
    details = saved.manifest["details"]
    assert details.items() <= record.items()
    assert details["source_hash"].startswith("sha256:")

    # gensim reads what is exported; dot products are nearly those there were, in other axes.
    exported = tmp_path / "small.bin"
    assert run(capsys, "export", out, "--format", "word2vec-binary", "--out", exported)[0] == 0
    small = KeyedVectors.load_word2vec_format(exported, binary=True)
    assert small.index_to_key == keyed.index_to_key
    np.testing.assert_array_equal(small.vectors, saved.vectors().values)
    norm = np.linalg.norm
    before, after = (k.vectors.astype(np.float64) @ k.vectors.T for k in (keyed, small))
    assert record["dot_product_error"] == pytest.approx(norm(after - before) / norm(before), rel=1e-3)
    assert record["dot_product_error"] < 0.02 * times
    assert norm(small.vectors - keyed.vectors) > 0.5 * norm(keyed.vectors)
    gram = small.vectors.T @ small.vectors
    assert norm(gram - np.diag(gram.diagonal())) < 0.1 * norm(gram)
    for name, scored in (("before", keyed), ("after", small)):
        expected = similarity.similarity(scored.vectors, scored.index_to_key, read_similarity(sets))
        assert record[f"random_{name}"] == pytest.approx(expected["score"], abs=1e-3)
    assert abs(record["random_before"] - record["random_after"]) > 1e-2


def test_a_model_is_compressed_as_its_export_is(folder, capsys, tmp_path):
    first = ["compress", folder / "vectors.bin", "--times", 4, "--out", tmp_path / "first"]
    _, (record,), _ = run(capsys, *first)
    assert {"wordsim353_before", "wordsim353_after", "simlex999_pairs"} <= set(record)
    second = ["compress", tmp_path / "first", "--times", 8, "--out", tmp_path / "second"]
    options = ["--similarity", folder / "close.tsv", folder / "few.txt"]
    status, (record,), _ = run(capsys, *second, *options)
    assert status == 0
    assert {"close_before", "close_after", "close_pairs", "few_before"} <= set(record)
    assert record["few_before"] is None
    assert "wordsim353_before" not in record
    assert record["source_bytes"] == sum(path.stat().st_size for path in (tmp_path / "first").iterdir())
    assert cemb.load(tmp_path / "second").words == cemb.load(tmp_path / "first").words


@pytest.mark.parametrize("format", vectors.FOLDERS)
@pytest.mark.parametrize("command", [["evaluate"], ["compress", "--out", "{}/new"]])
def test_folders_that_are_only_written_are_told(tmp_path, capsys, format, command):
    given = vectors.Vectors(["a", "b"], np.ones((2, 3), np.float32))
    vectors.write(tmp_path / "exported", given, format)
    asked = [argument.format(tmp_path) for argument in command]
    status, _, said = run(capsys, *asked, tmp_path / "exported")
    assert status == 2
    assert f"exported' holds vectors.{format}: folders of npy and tsv are written and not read" in said


def test_the_sets_that_are_given_are_read_alone(folder, capsys, tmp_path, monkeypatch):
    for name in ("bundled_similarity", "bundled_analogies"):
        monkeypatch.setattr(evaluation_sets, name, lambda: pytest.fail("these are not wanted"))
    sets = ["--similarity", folder / "close.tsv"]
    assert run(capsys, "evaluate", folder / "vectors.bin", *sets)[0] == 0
    assert run(capsys, "compress", folder / "vectors.bin", "--out", tmp_path / "small", *sets)[0] == 0


@pytest.fixture
def wrong(folder, tmp_path):
    """Names of what is wrong, and of what is there."""
    (tmp_path / "bad.tsv").write_text("king\tqueen\t5\nking\tqueen\n")
    (tmp_path / "few.txt").write_text("king queen 5\n")
    (tmp_path / "text.txt").write_text("no vectors at all\n")
    (tmp_path / "there").mkdir()
    names = {path.name: str(path) for path in folder.iterdir()}
    return {**names, **{path.name: str(path) for path in tmp_path.iterdir()}, "own": str(folder / "few.txt")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate", "evaluate needs vectors: folders of models, or files of word2vec or GloVe"),
        ("evaluate /none {text.txt}", "there is no '/none': vectors are a model's folder or a file"),
        ("evaluate {text.txt}", "text.txt is not a file of vectors"),
        ("evaluate {text.txt} --similarity {bad.tsv}", "bad.tsv, line 2: wants two words and a score"),
        ("evaluate {text.txt} --analogies {bad.tsv}", "bad.tsv, line 1: a question has four words, got 3"),
        ("evaluate {text.txt} --similarity /none", "No such file or directory: '/none'"),
        ("evaluate {text.txt} --similarity {few.txt} {own}", "two sets have the name 'few'"),
        ("evaluate {vectors.bin} --balanced", "vectors.bin is no model's folder: balanced vectors need"),
        ("evaluate {vectors.bin} --max-questions 0", "max_questions must be at least 1, got 0"),
        ("evaluate {there}", "there' has no manifest.json"),
        ("compress {text.txt} --out {there}", "there' exists already"),
        ("compress {text.txt} --out /none/new", "there is no directory '/none'"),
        ("compress {text.txt} --out {there}/new --times 0.5", "times must lie in [1, inf), got 0.5"),
        ("compress {text.txt} --out {there}/new --similarity {bad.tsv}", "bad.tsv, line 2: wants two words"),
        ("compress {text.txt} --out {there}/new --similarity {few.txt} {own}", "two sets have the name"),
        ("compress {vectors.bin} --out {there}/new --times 1000", "become at most"),
    ],
)
def test_what_cannot_be_done_is_one_line(wrong, capsys, arguments, message, tmp_path):
    asked = re.sub(r"\{(.*?)\}", lambda found: wrong[found[1]], arguments)
    status, found, said = run(capsys, *asked.split())
    assert (status, found) == (2, [])
    assert message in said
    *_, last = said.splitlines()
    assert last.startswith("cemb: ")
    assert not list((tmp_path / "there").iterdir())


def test_without_gensim_its_sets_are_asked_for_by_name(folder, capsys, tmp_path, monkeypatch):
    def missing(name):
        raise evaluation_sets.PackageNotFoundError(name)

    monkeypatch.setattr(evaluation_sets, "distribution", missing)
    status, _, said = run(capsys, "evaluate", folder / "vectors.bin")
    assert status == 2
    assert said.startswith("cemb: the sets for evaluation come with gensim, which is not installed")
    status, (record,), _ = run(capsys, "compress", folder / "vectors.bin", "--out", tmp_path / "small")
    assert status == 0
    assert not [name for name in record if name.endswith("_before") and name != "bytes_before"]


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    model = build_model("full", 3, 2, shared_table=False)
    with torch.no_grad():
        model.word_table.weight[1, 1] = math.nan
    cemb.save(tmp_path / "model", model, ["a", "b", "c"], details={})
    with pytest.raises(ValueError, match="vectors must be finite, got 1 of 3"):
        evaluation.read_vectors(tmp_path / "model")
