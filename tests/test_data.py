"""Counts, PMI and batches: each against a naive version or a conservation law."""

import json
from collections import Counter

import numba
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cemb.batches import PairBatches
from cemb.cooccurrence import count_cooccurrences
from cemb.dataset import PmiConfig, load_pmi
from cemb.pmi import pmi_matrix, stored_histogram, synthetic_pmi, value_histogram


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
            "is not UTF-8 text: can't decode byte 0xe9",
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


def _naive_counts(token_ids, vocab_size, window_size, weighting, symmetric):
    counts = np.zeros((vocab_size, vocab_size))
    for p, word in enumerate(token_ids):
        for q, context in enumerate(token_ids):
            if p != q and abs(p - q) <= window_size and (symmetric or q > p):
                counts[word, context] += 1 if weighting == "flat" else 1 / abs(p - q)
    return counts


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=40),
    st.integers(1, 7),
    st.sampled_from(["flat", "harmonic"]),
    st.booleans(),
)
def test_counts_equal_the_naive_ones(tokens, window_size, weighting, symmetric):
    counts = count_cooccurrences(
        np.array(tokens, np.int32),
        vocab_size=7,
        window_size=window_size,
        distance_weighting=weighting,
        symmetric=symmetric,
    )
    expected = _naive_counts(tokens, 7, window_size, weighting, symmetric)
    np.testing.assert_allclose(counts.toarray(), expected, rtol=1e-12)
    assert counts.has_sorted_indices
    assert (counts.data > 0).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_counts_sum_to_the_windows(threads):
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        tokens = (np.random.default_rng(0).zipf(1.3, 20_000) % 500).astype(np.int32)
        counts = count_cooccurrences(tokens, vocab_size=500, window_size=4)
    finally:
        numba.set_num_threads(before)
    assert counts.sum() == sum(2 * (20_000 - k) for k in range(1, 5))
    assert (counts != counts.T).nnz == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance_weighting": "steep"}, "must be one of flat, harmonic, got 'steep'"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"token_ids": np.array([1, 2**32 + 1])}, r"got ids from 1 to 4294967297"),
        ({"vocab_size": 2}, r"must lie in \[0, 2\), got ids from 0 to 3"),
    ],
)
def test_bad_counting_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        count_cooccurrences(**{"token_ids": np.array([0, 3, 1]), "vocab_size": 4, **options})


@pytest.mark.parametrize("smoothing", [0.75, 1.0])
@pytest.mark.parametrize("num_negative", [1, 5])
@pytest.mark.parametrize("positive", [True, False])
def test_pmi_equals_its_formula(smoothing, num_negative, positive):
    rng = np.random.default_rng(1)
    counts = rng.poisson(1.0, (20, 15)).astype(float)
    counts[3] = 0
    matrix = pmi_matrix(
        sp.csr_array(counts), context_smoothing=smoothing, num_negative=num_negative, positive=positive
    )
    expected = np.zeros_like(counts)
    smoothed = counts.sum(0) ** smoothing
    for w, c in zip(*counts.nonzero(), strict=True):
        joint = counts[w, c] / counts[w].sum()
        value = np.log(joint / (smoothed[c] / smoothed.sum())) - np.log(num_negative)
        expected[w, c] = max(value, 0) if positive else value
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix.toarray(), expected, rtol=1e-5, atol=1e-6)


def test_pmi_leaves_its_input_alone():
    counts = sp.csr_array(np.array([[5.0, 1.0], [1.0, 5.0]]))
    before = counts.copy()
    pmi_matrix(counts)
    assert np.array_equal(counts.indices, before.indices)
    assert np.array_equal(counts.indptr, before.indptr)
    assert np.array_equal(counts.data, before.data)


def test_bad_pmi_is_refused():
    counts = sp.csr_array(np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"context_smoothing must lie in \(0, 1\], got 0"):
        pmi_matrix(counts, context_smoothing=0)
    with pytest.raises(ValueError, match="num_negative must be at least 1, got 0"):
        pmi_matrix(counts, num_negative=0)
    with pytest.raises(ValueError, match="no cell is positive after a shift by log num_negative=99"):
        pmi_matrix(counts, num_negative=99)
    with pytest.raises(ValueError, match="no pair was counted: the 3 × 3 counts are all zero"):
        pmi_matrix(sp.csr_array((3, 3)))


def test_synthetic_pmi():
    matrix = synthetic_pmi(3000, 0.002, seed=4)
    assert matrix.shape == (3000, 3000)
    assert matrix.nnz == 2 * round(0.002 * 3000**2 / 2)
    assert matrix.dtype == np.float32
    assert (matrix != matrix.T).nnz == 0
    assert matrix.diagonal().sum() == 0
    # Values follow the stored histogram (Kolmogorov–Smirnov), cells are spread evenly over rows.
    stored = stored_histogram()
    drawn = np.cumsum(np.histogram(sp.triu(matrix).data, stored["edges"])[0]) / (matrix.nnz / 2)
    assert np.abs(drawn - np.cumsum(stored["shares"])).max() < 1.95 / np.sqrt(matrix.nnz / 2)
    per_row = np.diff(matrix.indptr)
    assert abs(per_row.var() / per_row.mean() - 1) < 0.2
    assert (matrix != synthetic_pmi(3000, 0.002, seed=4)).nnz == 0
    assert (matrix != synthetic_pmi(3000, 0.002, seed=5)).nnz > 0


@pytest.mark.parametrize(("num_words", "density"), [(1, 0.1), (100, 0.0), (100, 0.9), (100, 1e-9), (100, -1)])
def test_impossible_synthetic_matrices_are_refused(num_words, density):
    with pytest.raises(ValueError, match=r"num_words must|asks for"):
        synthetic_pmi(num_words, density)


def test_histogram_counts_every_value(random_matrix):
    histogram = value_histogram(random_matrix, num_bins=8)
    assert sum(histogram["shares"]) == pytest.approx(1)
    assert len(histogram["edges"]) == 9
    assert json.loads(json.dumps(histogram)) == histogram


@pytest.mark.parametrize("negative_share", [0, 0.25, 0.5])
def test_an_epoch_holds_each_cell_once(random_matrix, negative_share):
    batches = PairBatches(random_matrix, 33, negative_share=negative_share, seed=1)
    epoch = list(batches)
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
    one, two = [pairs for pairs, _ in first], [pairs for pairs, _ in again]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], next(iter(first))[0])


def test_bad_batches_are_refused(random_matrix):
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
