"""Counting in memory: against scipy, plain Python, and what must be conserved."""

import math
from fractions import Fraction

import numba
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cemb import hashing
from cemb.pmi import cooccurrence
from cemb.pmi.cooccurrence import (
    PositionIndex,
    Row,
    Windows,
    count_cooccurrences,
    keep_thresholds,
    subsample,
    total_dtype,
)


def scipy_counts(token_ids, vocab_size, window_size=5, weighting="flat", symmetric=True):
    """Counts times a common denominator, and that: one sparse matrix per distance, added up."""
    token_ids = np.asarray(token_ids)
    denominator = 1 if weighting == "flat" else math.lcm(*range(1, window_size + 1))
    document = np.cumsum(token_ids < 0)
    total = sp.csr_array((vocab_size, vocab_size), dtype=np.int64)
    for k in range(1, window_size + 1):
        left, right = token_ids[:-k], token_ids[k:]
        pair = (left >= 0) & (right >= 0) & (document[:-k] == document[k:])
        weight = np.full(pair.sum(), 1 if weighting == "flat" else denominator // k, np.int64)
        found = sp.coo_array((weight, (left[pair], right[pair])), shape=total.shape).tocsr()
        total = total + found + (found.T if symmetric else 0 * found)
    total.eliminate_zeros()
    total.sort_indices()
    return total.tocsr(), denominator


def assert_same_bits(found, expected):
    """Whether two matrices have the same cells, in the same places, of the same bits."""
    assert found.shape == expected.shape
    assert np.array_equal(found.indptr, expected.indptr)
    assert np.array_equal(found.indices, expected.indices)
    assert np.array_equal(found.data, expected.data)


streams = st.lists(st.integers(-1, 5), max_size=60)
window_options = st.tuples(st.integers(1, 7), st.sampled_from(["flat", "harmonic"]), st.booleans())


@settings(deadline=None)
@given(streams, window_options)
def test_counts_equal_scipys(tokens, options):
    window_size, weighting, symmetric = options
    expected, denominator = scipy_counts(tokens, 7, *options)
    counts = count_cooccurrences(
        np.array(tokens, np.int32),
        vocab_size=7,
        window_size=window_size,
        distance_weighting=weighting,
        symmetric=symmetric,
    )
    expected.data = expected.data / denominator  # scipy's own division multiplies by the reciprocal
    assert_same_bits(counts, expected)


@pytest.mark.parametrize("vocab_size", [63, 64, 65, 1023, 1024, 5000])
def test_every_column_is_found_whatever_the_size(vocab_size):
    tokens = np.random.default_rng(0).integers(vocab_size, size=30_000)
    tokens[:2] = vocab_size - 1
    expected, _ = scipy_counts(tokens, vocab_size, 3)
    assert_same_bits(count_cooccurrences(tokens, vocab_size=vocab_size, window_size=3), expected)


def test_harmonic_counts_are_rounded_once():
    tokens = np.random.default_rng(1).integers(3, size=400)
    counts = count_cooccurrences(tokens, vocab_size=3, window_size=6, distance_weighting="harmonic")
    exact = sum(
        Fraction(1, abs(p - q))
        for p in range(400)
        for q in range(max(0, p - 6), min(400, p + 7))
        if p != q and tokens[p] == 0 and tokens[q] == 1
    )
    assert counts[0, 1] == float(exact)


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
    assert_same_bits(counts, sp.csr_array(counts.T))


def test_subsampling_keeps_by_position_and_hash():
    rng = np.random.default_rng(2)
    tokens = (rng.zipf(1.5, 3000) % 50).astype(np.int32)
    tokens[::97] = -1
    word_counts = np.bincount(tokens[tokens >= 0], minlength=50)
    thresholds = keep_thresholds(word_counts, 1e-2)
    salt = hashing.mix(5 + hashing.GOLDEN)
    expected = [
        word
        for position, word in enumerate(tokens.tolist())
        if word < 0 or hashing.mix(position + salt) <= int(thresholds[word])
    ]
    assert subsample(tokens, thresholds, seed=5).tolist() == expected
    pieces = [
        subsample(tokens[a : a + 700], thresholds, seed=5, first_position=a) for a in range(0, 3000, 700)
    ]
    assert np.concatenate(pieces).tolist() == expected
    assert subsample(tokens, thresholds, seed=6).tolist() != expected
    counted = count_cooccurrences(tokens, vocab_size=50, subsample_threshold=1e-2, seed=5)
    assert_same_bits(counted, count_cooccurrences(np.array(expected), vocab_size=50))


def test_subsampling_keeps_as_many_as_word2vec():
    word_counts = np.array([60_000, 38_000, 1_990, 10])
    tokens = np.random.default_rng(0).permutation(np.repeat(np.arange(4, dtype=np.int32), word_counts))
    kept = np.bincount(subsample(tokens, keep_thresholds(word_counts, 1e-3)), minlength=4)
    frequency = word_counts / word_counts.sum()
    share = np.minimum(np.sqrt(1e-3 / frequency) + 1e-3 / frequency, 1)
    deviation = np.sqrt(word_counts * share * (1 - share))
    assert (np.abs(kept - word_counts * share) <= 4 * deviation + 1e-9).all()
    assert kept[3] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance_weighting": "steep"}, "must be one of flat, harmonic, got 'steep'"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"window_size": 2.5}, "window_size must be an integer, got 2.5"),
        ({"window_size": 10**9}, "window_size must be at most 65536, got 1000000000"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"subsample_threshold": math.nan}, r"subsample_threshold must lie in \(0, inf\), got nan"),
        ({"token_ids": np.array([1, 2**32 + 1])}, r"got ids from 1 to 4294967297"),
        ({"token_ids": np.array([1, -2])}, r"or be -1 for a border, got ids from -2 to 1"),
        ({"vocab_size": 2}, r"must lie in \[0, 2\), or be -1 for a border, got ids from 0 to 3"),
        ({"subsample_threshold": 0}, r"subsample_threshold must lie in \(0, inf\), got 0"),
    ],
)
def test_bad_counting_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        count_cooccurrences(**{"token_ids": np.array([0, 3, 1]), "vocab_size": 4, **options})


def test_totals_beyond_64_bits_are_refused():
    with pytest.raises(OverflowError, match=r"window_size=42 and harmonic weights may exceed 2\^63"):
        count_cooccurrences(
            np.zeros(100, np.int32), vocab_size=1, window_size=42, distance_weighting="harmonic"
        )


def test_the_largest_total_is_exact_to_the_last():
    # A window of 3 gives each token 3, or 6 on both sides; harmonic ones 6/1 + 6/2 + 6/3 over 6.
    for options, each in ((("flat", False), 3), (("flat", True), 6), (("harmonic", True), 22)):
        windows = Windows(3, *options)
        most = (2**63 - 1) // each
        assert windows.largest_total(most) == most * each
        with pytest.raises(OverflowError):
            windows.largest_total(most + 1)
    assert Windows(1, "flat", False).largest_total(2**63 - 1) == 2**63 - 1
    assert [total_dtype(n) for n in (2**32 - 1, 2**32)] == [np.uint32, np.uint64]


@pytest.mark.parametrize("window_size", [43, 30_000])
def test_harmonic_windows_whose_weights_are_beyond_64_bits_are_refused(window_size):
    assert Windows(42, "harmonic").denominator == math.lcm(*range(1, 43)) < 2**63 < math.lcm(*range(1, 44))
    with pytest.raises(
        OverflowError, match=f"counts with window_size={window_size} and harmonic weights may"
    ):
        Windows(window_size, "harmonic")


def test_subsampling_keeps_a_token_whose_hash_is_the_threshold():
    found = hashing.mix(3 + hashing.mix(hashing.GOLDEN))
    for threshold, kept in ((found, [0]), (found - 1, [])):
        thresholds = np.array([threshold], np.uint64)
        assert subsample(np.zeros(1, np.int32), thresholds, first_position=3).tolist() == kept
    # Where √t + t is 1, all tokens are kept; below it, a share.
    golden = 0.38196601125010515
    assert keep_thresholds(np.array([1]), golden).tolist() == [2**64 - 1]
    assert keep_thresholds(np.array([1]), golden - 1e-9)[0] < 2**64 - 1


@pytest.mark.parametrize("wide", [False, True])
def test_pointers_are_wide_from_a_number_of_cells_on(wide, monkeypatch):
    tokens = np.array([0, 1, 2, 0], np.int32)
    counts = count_cooccurrences(tokens, vocab_size=3)
    monkeypatch.setattr(cooccurrence, "_WIDE_FROM", counts.nnz + (not wide))
    again = count_cooccurrences(tokens, vocab_size=3)
    assert again.indptr.dtype == (np.int64 if wide else np.int32)
    assert_same_bits(again, counts)


def _index():
    return PositionIndex(np.array([-1, 0, 2, 1, -1], np.int32), 3, Windows(1), np.dtype(np.uint32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: subsample(np.array([3]), np.zeros(3, np.uint64)),
            r"must lie in \[0, 3\), .* ids from 3 to 3",
        ),
        (lambda: subsample(np.array([0]), np.zeros(3)), r"thresholds must be contiguous uint64 \[3\]"),
        (
            lambda: PositionIndex(np.array([-1, 3, -1], np.int32), 3, Windows(1), np.dtype(np.uint32)),
            r"must lie in \[0, 3\), .* ids from -1 to 3",
        ),
        (
            lambda: PositionIndex(np.array([-1, 0, -1]), 3, Windows(1), np.dtype(np.uint32)),
            r"padded must be contiguous int32 \[3\], got int64 \[3\]",
        ),
        (lambda: _counted(columns=np.zeros(2, np.int32)), "num_columns must be at least 3, got 2"),
        (lambda: _counted(columns=np.zeros(9, np.int64)), r"columns must be contiguous int32 \[9\]"),
        (lambda: _counted(values=np.zeros(9, np.uint64)), r"values must be contiguous uint32 \[9\]"),
        (lambda: _counted(row=Row(2, np.dtype(np.uint32))), r"row.totals must be contiguous uint32 \[4\]"),
        (lambda: _counted(row_cells=np.zeros(2, np.int64)), r"row_cells must be contiguous .* \[3\]"),
        (lambda: _counted(last=4), "last must be at most 3, got 4"),
    ],
)
def test_kernels_take_arrays_that_hold_what_they_write(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _counted(**other):
    arguments = {
        "first": 0,
        "last": 3,
        "row": Row(3, np.dtype(np.uint32)),
        "row_cells": np.zeros(3, np.int64),
        "columns": np.zeros(9, np.int32),
        "values": np.zeros(9, np.uint32),
    }
    return _index().count_rows(**{**arguments, **other})
