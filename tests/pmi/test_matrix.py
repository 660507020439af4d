"""PMI: against its formula, on disk the same bits as in memory, and at random."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cooccurrence import assert_same_bits

from cemb.files import DamagedError, atomic_directory
from cemb.pmi import csr
from cemb.pmi import matrix as pmi_matrix_module
from cemb.pmi.csr import CsrFolder
from cemb.pmi.matrix import pmi_matrix, stored_histogram, synthetic_pmi, value_histogram, write_pmi


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
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        pmi_matrix(counts, top_k=0)
    with pytest.raises(ValueError, match=r"context_smoothing must lie in \(0, 1\], got nan"):
        pmi_matrix(counts, context_smoothing=np.nan)
    with pytest.raises(ValueError, match=r"top_k must be an integer, got 2\.5"):
        pmi_matrix(counts, top_k=2.5)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=f"a matrix must be finite, got values from .* to {bad}"):
            pmi_matrix(sp.csr_array(np.array([[1, bad], [1.0, 2]])))
    with pytest.raises(ValueError, match="counts must not be negative, got -1"):
        pmi_matrix(-counts)
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
    with pytest.raises(ValueError, match=r"num_words must|density must|asks for"):
        synthetic_pmi(num_words, density)


def test_histogram_counts_every_value(random_matrix):
    histogram = value_histogram(random_matrix, num_bins=8)
    assert sum(histogram["shares"]) == pytest.approx(1)
    assert len(histogram["edges"]) == 9
    assert json.loads(json.dumps(histogram)) == histogram


def _folder(path, counts):
    with (
        atomic_directory(path) as work,
        csr.CsrWriter(work, counts.shape[1], counts.dtype, counts.nnz) as writer,
    ):
        writer.append(np.diff(counts.indptr), counts.indices, counts.data)
        writer.finish(kind="counts")
    return CsrFolder(path)


def _random_counts(seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.random((60, 1)) * rng.random(45) * 3).astype(np.int64)
    dense[[0, 7, 8, 59]] = 0
    dense[:, 3] = 0
    return sp.csr_array(dense)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"context_smoothing": 1, "num_negative": 3},
        {"positive": False},
        {"top_k": 4},
        {"positive": False, "top_k": 1},
    ],
)
@pytest.mark.parametrize("memory", [0, 2**31])
def test_pmi_on_disk_has_the_same_bits(tmp_path, monkeypatch, options, memory):
    counts = _random_counts()
    if memory == 0:  # blocks of few rows, and rows beyond a block
        blocks = csr.CsrFolder.blocks
        monkeypatch.setattr(csr.CsrFolder, "blocks", lambda self, size: blocks(self, 20))
    found = write_pmi(_folder(tmp_path / "counts", counts), tmp_path / "pmi", memory=memory, **options)
    assert found.dtype == np.float32
    assert_same_bits(found.matrix(), pmi_matrix(counts, **options))
    assert found.manifest["kind"] == "pmi"
    with pytest.raises(FileExistsError, match="is there already"):
        write_pmi(CsrFolder(tmp_path / "counts"), tmp_path / "pmi")


def _written(counts):
    """The counts with cells listed twice, zeros in an empty row, and rows from right to left."""
    cells = counts.tocoo()
    halves = [counts.data // 2, counts.data - counts.data // 2, np.zeros(9, counts.dtype)]
    rows, columns = np.r_[cells.row, cells.row, [0] * 9], np.r_[cells.col, cells.col, :9]
    order = np.lexsort((-columns, rows))
    indptr = np.searchsorted(rows[order], np.arange(counts.shape[0] + 1))
    values = np.concatenate(halves)[order]
    return sp.csr_array(
        (values, columns[order].astype(np.int32), indptr.astype(np.int32)), shape=counts.shape
    )


@pytest.mark.parametrize("options", [{}, {"positive": False}, {"top_k": 3}])
def test_cells_listed_twice_are_summed_and_zeros_are_none(tmp_path, options):
    counts = _random_counts()
    listed = _written(counts)
    assert listed.nnz > 2 * counts.nnz and (listed.data == 0).any()
    before = listed.copy()
    expected = pmi_matrix(counts, **options)
    assert_same_bits(pmi_matrix(listed, **options), expected)
    assert_same_bits(listed, before)
    with pytest.raises(DamagedError, match="columns that do not rise within a row"):
        _folder(tmp_path / "listed", listed)
    listed.sum_duplicates()
    assert (listed.data == 0).any()
    stored = write_pmi(_folder(tmp_path / "counts", listed), tmp_path / "pmi", **options)
    assert_same_bits(stored.matrix(), expected)


def test_indices_outside_the_matrix_are_refused():
    for columns, indptr in (([0, 5], [0, 1, 2]), ([0, 1], [0, 2, 1])):
        broken = sp.csr_array(np.eye(2))
        broken.indices, broken.indptr = np.array(columns, np.int32), np.array(indptr, np.int32)
        with pytest.raises(ValueError, match=r"indices|indptr"):
            pmi_matrix_module.canonical(broken)


def test_a_common_factor_makes_no_difference():
    counts = _random_counts()
    np.testing.assert_allclose(pmi_matrix(60 * counts).data, pmi_matrix(counts / 60).data, rtol=1e-5)


@given(st.integers(1, 6), st.integers(0, 5), st.booleans())
@settings(deadline=None)
def test_top_k_keeps_the_largest_and_the_first_of_equals(top_k, seed, positive):
    rng = np.random.default_rng(seed)
    values = rng.integers(-3, 4, (9, 7)).astype(np.float64)
    stored = sp.csr_array(np.where(rng.random((9, 7)) < 0.7, values + 10, 0))  # so that no value is lost
    cells, rows = stored.data - 10, np.repeat(np.arange(9), np.diff(stored.indptr))
    is_cell = (cells > 0) | (not positive)
    columns, cells, row_cells = (
        stored.indices[is_cell],
        cells[is_cell],
        np.bincount(rows[is_cell], minlength=9),
    )
    found = pmi_matrix_module._keep_largest(columns, cells, top_k, row_cells)
    expected = []
    for row in range(9):
        start, end = stored.indptr[row], stored.indptr[row + 1]
        pairs = [(v - 10, c) for v, c in zip(stored.data[start:end], stored.indices[start:end], strict=True)]
        best = sorted((p for p in pairs if not positive or p[0] > 0), key=lambda p: (-p[0], p[1]))[:top_k]
        expected += sorted((row, c, v) for v, c in best)
    rows = np.repeat(np.arange(9), row_cells)
    assert list(zip(rows, columns[:found], cells[:found], strict=True)) == expected


def test_a_shift_that_leaves_nothing_leaves_no_folder(tmp_path):
    counts = _folder(tmp_path / "counts", sp.csr_array(np.ones((2, 2), np.int64)))
    with pytest.raises(ValueError, match="no cell is positive after a shift by log num_negative=99"):
        write_pmi(counts, tmp_path / "pmi", num_negative=99)
    assert [path.name for path in tmp_path.iterdir()] == ["counts"]
