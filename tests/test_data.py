"""Batches against a naive version or a conservation law; data sets, what they refuse and what they keep."""

from collections import Counter

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cemb.batches import PairBatches
from cemb.dataset import PmiConfig, load_pmi


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
