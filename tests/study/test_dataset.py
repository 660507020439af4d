"""Batches against a naive version or a conservation law; data sets, what they refuse and what they keep."""

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch

from cemb import cli
from cemb.files import DamagedError
from cemb.pmi.encode import encode
from cemb.study import dataset, frontier, grid, quality, staleness
from cemb.study.dataset import PmiConfig, load_pmi
from cemb.train import objective as train_objective
from cemb.train.batches import PairBatches


def _write(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda tmp: str(tmp / "none.txt"),
            "neither one of 'gcide-sotu', .* nor to be read: there is no file",
        ),
        (lambda tmp: str(tmp), r"the directory '.*' holds no file"),
        (lambda tmp: _write(tmp / "empty.txt", b""), "is an empty file"),
        (lambda tmp: _write(tmp / "binary", b"abc\0def"), "is not a text file: byte 3 is NUL"),
        (
            lambda tmp: _write(tmp / "latin.txt", "café".encode("latin-1")),
            "line 1: not UTF-8 text: byte 0xe9 at position 3",
        ),
        (lambda tmp: _write(tmp / "digits.txt", b"1 2 3"), "holds no token"),
        (
            lambda tmp: _write(tmp / "rare.txt", b"one two two"),
            r"none of the corpus's 2 words .* min_count=5",
        ),
    ],
)
def test_bad_corpora_are_refused_and_leave_nothing(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pmi(PmiConfig(corpus=make(tmp_path)))
    assert not list((tmp_path / "results").rglob("pmi-*"))


@pytest.mark.parametrize("negative_share", [0, 0.25, 0.5])
def test_an_epoch_holds_each_cell_once(random_matrix, negative_share):
    batches = PairBatches(random_matrix, 33, negative_share=negative_share, seed=1)
    epoch = list(batches.epoch(0))
    assert len(epoch) == len(batches)
    stored = Counter(zip(*(index.tolist() for index in random_matrix.nonzero()), strict=True))
    seen = Counter()
    for pairs, values in epoch:
        assert pairs.dtype == torch.int64
        assert values.dtype == torch.float32
        expected = random_matrix.toarray()[pairs[:, 0], pairs[:, 1]]
        # The values themselves, fractions and all: casting them to integers would lose most of PMI.
        assert np.array_equal(values.numpy(), expected)
        num_positive = min(batches.num_positive, sum(stored.values()) - sum(seen.values()))
        seen.update(tuple(pair) for pair in pairs[:num_positive].tolist())
    assert seen == stored
    assert all(len(pairs) == 33 for pairs, _ in epoch[:-1])
    assert len(epoch[-1][0]) <= 33


def test_batches_are_seeded_and_epochs_differ(random_matrix):
    first, again = PairBatches(random_matrix, 16, seed=7), PairBatches(random_matrix, 16, seed=7)
    one, two = [pairs for pairs, _ in first.epoch(0)], [pairs for pairs, _ in again.epoch(0)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], first.batch(len(first))[0])
    assert not torch.equal(one[0], PairBatches(random_matrix, 16, seed=8).batch(0)[0])


def test_bad_batches_are_refused(random_matrix):
    with pytest.raises(ValueError, match=r"batch_size must be an integer, got 2\.5"):
        PairBatches(random_matrix, 2.5)
    with pytest.raises(ValueError, match=r"a matrix must be finite, got values from .* to inf"):
        PairBatches(random_matrix * np.float32(np.inf), 4)
    with pytest.raises(ValueError, match="context_shares must be 30 positive numbers"):
        PairBatches(random_matrix, 4, context_shares=np.full(30, np.inf))
    with pytest.raises(ValueError, match=r"negative_share must lie in \[0, 1\), got 1"):
        PairBatches(random_matrix, 4, negative_share=1)
    with pytest.raises(ValueError, match=r"batch_size=1 with negative_share=0\.9 leaves no stored cell"):
        PairBatches(random_matrix, 1, negative_share=0.9)
    with pytest.raises(ValueError, match="the matrix stores no cell"):
        PairBatches(sp.csr_array((3, 3)), 4)


def test_a_data_set_is_built_once_and_read_back(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and the dog sat on the cat and a mat " * 20)
    config = PmiConfig(corpus=str(path), min_count=2, rank=3)
    built = load_pmi(config)
    (kept,) = (tmp_path / "results" / "local" / "data").iterdir()
    modified = kept.stat().st_mtime_ns
    again = load_pmi(config)
    assert kept.stat().st_mtime_ns == modified
    assert (built.matrix != again.matrix).nnz == 0
    assert again.words[0] == "the"
    assert again.summary["num_tokens"] == 320
    assert again.summary["total_count"] == sum(2 * (320 - k) for k in range(1, 6))
    # A changed text is another data set.
    path.write_text("the cat sat on the mat and the dog ran on the cat and a mat " * 20)
    assert load_pmi(config).summary["corpus_fingerprint"] != again.summary["corpus_fingerprint"]


def test_an_encoded_corpus_is_used_as_it_is(tmp_path):
    """It makes the matrix that its text makes with the same options; others are refused, and so is damage."""
    text, folder = tmp_path / "text.txt", tmp_path / "encoded"
    text.write_text("the cat sat on the mat. and the dog sat on the cat. and a mat. " * 20)
    encode(str(text), folder, min_count=30, borders="sentence")
    from_text = load_pmi(PmiConfig(str(text), min_count=30, borders="sentence", rank=2))
    text.unlink()
    found = load_pmi(PmiConfig(str(folder), rank=2))
    assert found.words == from_text.words
    assert (found.matrix != from_text.matrix).nnz == 0
    differing = {name for name, value in found.summary.items() if value != from_text.summary[name]}
    assert {name for name in differing if not name.endswith("_s")} == {"corpus", "corpus_fingerprint"}
    assert load_pmi(PmiConfig(str(folder), min_count=30, rank=2)).folder == found.folder
    with pytest.raises(ValueError, match="is encoded already, with min_count=30, and got min_count=7; leave"):
        load_pmi(PmiConfig(str(folder), min_count=7, rank=2))
    data = grid.study_runs("smoke", str(folder))[0]  # a study is keyed by its words and ids, too
    assert staleness.identity(data)["corpus fingerprint"] == found.summary["corpus_fingerprint"]
    (folder / "words.txt").write_text("other\n")
    for open_it in (lambda: load_pmi(PmiConfig(str(folder), rank=2)), lambda: staleness.identity(data)):
        with pytest.raises(DamagedError, match=r"words\.txt"):
            open_it()


def _events(folder, suffix):
    """Events in two files, some of them without a user or an item, as a frame of all of them."""
    rng = np.random.default_rng(5)
    frame = pd.DataFrame(
        {
            "when": np.arange(4000),
            "item": [f"item {k}" for k in rng.zipf(1.4, 4000) % 60],
            "user": [f"u\n{k}" if k % 7 == 0 else f"u{k}" for k in rng.integers(90, size=4000)],
        }
    )
    frame.loc[[0, 77, 3999], "user"] = None
    frame.loc[[5, 77], "item"] = None
    paths = [folder / f"{k}.{suffix}" for k in range(2)]
    for path, part in zip(paths, (frame[:1500], frame[1500:]), strict=True):
        part.to_parquet(path) if suffix == "parquet" else part.to_csv(path, index=False)
    return paths, frame.dropna()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_command_makes_pmi_of_events(tmp_path, capsys, suffix):
    paths, frame = _events(tmp_path, suffix)
    command = [
        "pmi",
        "--corpus",
        *map(str, paths),
        "--events",
        "user,item",
        "--rank",
        "4",
        "--num-negative",
        "2",
    ]
    assert cli.main(command) == 0
    said = json.loads(capsys.readouterr().out)
    config = PmiConfig(corpus=tuple(map(str, paths)), events="user,item", rank=4, num_negative=2)
    data = load_pmi(config)
    assert len(list((tmp_path / "results" / "local" / "data").iterdir())) == 1
    assert data.summary == said
    table = pd.crosstab(frame["user"], frame["item"]).loc[data.words, data.contexts].to_numpy()
    assert np.array_equal(data.word_counts, table.sum(1))
    assert np.array_equal(data.context_counts, table.sum(0))
    assert (np.diff(data.word_counts) <= 0).all()
    assert (np.diff(data.context_counts) <= 0).all()
    smoothed = table.sum(0) ** 0.75
    with np.errstate(divide="ignore"):
        expected = np.log(table * smoothed.sum() / (table.sum(1, keepdims=True) * smoothed)) - np.log(2)
    np.testing.assert_allclose(data.matrix.toarray(), expected.clip(min=0), rtol=1e-5, atol=1e-6)
    values = scipy.linalg.svdvals(data.matrix.toarray())
    np.testing.assert_allclose(data.optimum.singular_values, values[:4], rtol=1e-3)
    assert said["events"] == "user,item"
    assert said["num_events"] == len(frame)
    assert (said["num_words"], said["num_contexts"]) == table.shape == data.matrix.shape
    assert not {"window_size", "min_count", "num_tokens"} & set(said)


def test_events_are_counted_by_a_column(tmp_path):
    for name in ("_SUCCESS", "e.csv"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_text("user,item,plays\na,x,7\nb,y,2\na,y,0\nb,x,1\n")
    config = PmiConfig(corpus=str(tmp_path / "d"), events="user,item", count_column="plays", rank=1)
    data = load_pmi(config)
    assert (data.words, data.word_counts.tolist()) == (["a", "b"], [7, 3])
    assert (data.contexts, data.context_counts.tolist()) == (["x", "y"], [8, 2])
    assert (data.summary["num_events"], data.summary["num_left_out"]) == (10, 1)
    with pytest.raises(ValueError, match="count_column='plays' goes with events, which are not given"):
        PmiConfig(count_column="plays")


def test_events_are_told_apart(tmp_path):
    """By their columns and their content."""
    (path, _), _ = _events(tmp_path, "csv")
    one = load_pmi(PmiConfig(corpus=str(path), events="user,item", rank=2))
    other = load_pmi(PmiConfig(corpus=str(path), events="item,user", rank=2))
    assert (other.words, other.contexts) == (one.contexts, one.words)
    path.write_text(path.read_text() + "9,item 1,u1\n")
    assert load_pmi(PmiConfig(corpus=str(path), events="user,item", rank=2)).summary["num_events"] == (
        one.summary["num_events"] + 1
    )


def test_a_build_of_events_goes_on_from_its_counts(tmp_path, monkeypatch):
    (path, _), _ = _events(tmp_path, "csv")
    config = PmiConfig(corpus=str(path), events="user,item", rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_pmi", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_pmi(config)
    assert not [p for p in (tmp_path / "results").rglob("pmi-*") if p.suffix != ".partial"]
    monkeypatch.setattr(dataset.events, "read_events", lambda *_: pytest.fail("events were read again"))
    data = load_pmi(config)
    assert data.matrix.shape == (len(data.words), len(data.contexts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"window_size": 3, "min_count": 2},
            "events='u,i' take no options of text, got min_count=2, window_size=3",
        ),
        ({"subsample_threshold": 1e-3}, "take no options of text, got subsample_threshold=0.001"),
        ({"text_field": "u"}, "take no options of text, got text_field='u'"),
        ({"encoding_errors": "replace"}, "take no options of text, got encoding_errors='replace'"),
        ({"corpus": "text8"}, "are read from files, and the corpus 'text8' is text"),
        ({"corpus": "-"}, "events are read from files, not from standard input"),
        ({"events": "user,thing"}, r"0\.csv has no column 'thing'; it has when, item, user"),
        ({"events": "user"}, "events need two columns, as in user,item, got 'user'"),
        ({"events": "user,item", "rank": 60}, r"rank must lie in \[1, "),
    ],
)
def test_what_makes_no_sense_of_events_is_refused(tmp_path, options, message):
    (path, _), _ = _events(tmp_path, "csv")
    with pytest.raises(ValueError, match=message):
        load_pmi(PmiConfig(**{"corpus": str(path), "events": "u,i", "rank": 2, **options}))
    assert not list((tmp_path / "results").rglob("pmi-*"))


def test_what_needs_words_by_words_refuses_events(tmp_path):
    (path, _), _ = _events(tmp_path, "csv")
    data = load_pmi(PmiConfig(corpus=str(path), events="user,item", rank=2))
    message = rf"of events='user,item', {len(data.words)} × {len(data.contexts)}"
    with pytest.raises(ValueError, match=f"training a table needs a matrix of words by words, .*{message}"):
        quality.measure_quality(quality.QualityCase("full", "adam"), data)
    with pytest.raises(ValueError, match=f"skip-gram with negative sampling needs .*{message}"):
        quality.sgns_record(data)
    objective = train_objective.AllCellsLoss(data.matrix)
    assert "words by words" in frontier.measure("full", data, objective)["failure"]
    # What takes factors as they are works.
    assert abs(quality.svd_record(data)["gap"]) < 1e-4
    record = frontier.measure("alternating, float32", data, objective)
    assert 0 <= record["gap"] < 0.1
