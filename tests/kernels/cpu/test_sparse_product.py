"""Products of sparse matrices, against scipy's in float64."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cemb.kernels.cpu import sparse_product
from cemb.train import objective


def _matrix(rows, columns, density, dtype=np.float32, seed=0):
    matrix = sp.random_array((rows, columns), density=density, rng=seed, format="csr", dtype=dtype)
    matrix.data -= 0.5
    return matrix


@pytest.fixture
def poisoned(monkeypatch):
    """New memory is full of NaN."""
    monkeypatch.setattr(torch, "empty", lambda *shape, **kinds: torch.full(shape, torch.nan, **kinds))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda tensor, *shape: torch.full(shape, torch.nan, dtype=tensor.dtype)
    )


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (37, 5), (5, 37), (300, 9000)])
def test_products_equal_scipys(poisoned, shape, dtype, dim):
    matrix = _matrix(*shape, 0.3, dtype)
    matrix.data[:2] = 0  # stored, and nothing
    dense = torch.from_numpy(np.random.default_rng(1).standard_normal((shape[1], dim)).astype(dtype))
    got = objective.SparseMatrix(matrix) @ dense
    assert got.dtype == dense.dtype
    wanted = matrix.astype(np.float64) @ dense.double().numpy()
    bound = abs(matrix).astype(np.float64) @ dense.double().abs().numpy()
    # A sum of n terms is off by at most n roundings of what it adds up.
    assert np.all(np.abs(got.numpy() - wanted) <= shape[1] * np.finfo(dtype).eps * bound)


def test_products_of_columns_without_a_cell_and_rows_without_one(poisoned):
    matrix = _matrix(50, 60, 0.2).tolil()
    matrix[[0, 7, 49]] = 0
    matrix[:, [0, 20, 21, 59]] = 0
    matrix = sp.csr_array(matrix)
    dense = torch.randn(60, 6)
    dense[[0, 20, 21, 59]] = torch.inf  # what no cell asks for is not read
    got = objective.SparseMatrix(matrix) @ dense
    assert not got[[0, 7, 49]].any()
    np.testing.assert_allclose(got, matrix @ dense.nan_to_num(posinf=0).numpy(), rtol=1e-5, atol=1e-6)


def test_products_are_the_same_for_any_number_of_threads():
    matrix = _matrix(500, 700, 0.1)
    matrix = sp.csr_array(sp.vstack([matrix[:1].toarray() + 1, matrix[1:]]))  # one heavy row
    dense, product = torch.randn(700, 20), objective.SparseMatrix(matrix)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = product @ dense
        torch.set_num_threads(2)
        assert torch.equal(product @ dense, alone)
    finally:
        torch.set_num_threads(before)


def test_one_matrix_takes_factors_of_any_width_and_order():
    matrix = _matrix(30, 20, 0.3)
    product, wide = objective.SparseMatrix(matrix), torch.randn(20, 40)
    for dense in (wide, wide[:, :3], wide[:, ::2], torch.randn(5, 20).T):
        np.testing.assert_allclose(product @ dense, matrix @ dense.numpy(), rtol=1e-5, atol=1e-5)


def test_a_factor_that_does_not_fit_is_refused():
    product = objective.SparseMatrix(_matrix(30, 20, 0.3))
    with pytest.raises(ValueError, match=r"30 by 20 .* float32 \[20, dim\], got float32 \[30, 4\]"):
        product @ torch.randn(30, 4)
    with pytest.raises(ValueError, match=r"got float32 \[20\]"):
        product @ torch.randn(20)
    with pytest.raises(ValueError, match=r"got float64 \[20, 4\]"):
        product @ torch.randn(20, 4, dtype=torch.float64)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_all_segments_once(threads):
    matrix = _matrix(40, 100, 0.05)
    blocks = sparse_product.Blocks.of(matrix, 30)
    bounds, segments = blocks.chunks(threads)
    assert bounds[0] == 0 and bounds[-1] == 40 and np.all(np.diff(bounds) >= 0)
    np.testing.assert_array_equal(segments[0], blocks.first_segments[:-1])
    np.testing.assert_array_equal(segments[-1], blocks.first_segments[1:])
    for t in range(threads):
        for b in range(4):
            rows = blocks.rows[segments[t, b] : segments[t + 1, b]]
            assert np.all((rows >= bounds[t]) & (rows < bounds[t + 1]))
