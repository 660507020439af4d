"""Vectors made small against their own Gram matrix."""

import itertools
import os

import numpy as np
import pytest
import torch

from cemb import tables
from cemb.study import timing
from cemb.tables import RowQuantizedEmbedding, TransformCodedEmbedding, all_rows, num_bytes
from cemb.tables.transform_coded import allocate_bits
from cemb.train import compression


def made(num_rows=4000, dim=40, seed=0):
    """Vectors of a decaying spectrum in axes of no meaning, of lengths that differ, the first ones longer."""
    torch.manual_seed(seed)
    vectors = torch.randn(num_rows, dim) * torch.arange(1, dim + 1) ** -0.6
    lengths = torch.arange(1, num_rows + 1) ** -0.15 * torch.exp(0.3 * torch.randn(num_rows))
    return vectors * lengths[:, None] @ torch.linalg.qr(torch.randn(dim, dim)).Q


@pytest.fixture(scope="module")
def vectors():
    return compression.principal_axes(made())[0]


def errors(vectors, table):
    return compression.relative_errors(vectors, all_rows(table))


@pytest.mark.parametrize("block_rows", [7, 2**14])
def test_principal_axes_change_no_dot_product(block_rows, monkeypatch):
    monkeypatch.setattr(compression, "_BLOCK_ROWS", block_rows)
    given = made(100, 6) + torch.arange(6)
    turned, squares = compression.principal_axes(given)
    assert torch.allclose(turned @ turned.T, given @ given.T, atol=1e-4)
    assert torch.allclose(turned.T @ turned, squares.diag(), atol=1e-4 * squares[0].item())
    expected = np.linalg.svd(given.double().numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(squares, expected, rtol=1e-5)


def test_axes_of_fewer_dimensions_than_columns():
    given = torch.randn(500, 3) @ torch.randn(3, 9)
    turned, squares = compression.principal_axes(given)
    assert torch.allclose(turned @ turned.T, given @ given.T, atol=1e-4)
    assert (squares >= 0).all()
    decoded = all_rows(compression.compress(turned, 4000))
    assert compression.relative_errors(turned, decoded)[1] < 0.02


def test_errors_are_those_of_all_pairs():
    one, two = made(90, 5), made(90, 5) + 0.1 * made(90, 5, seed=1)
    values, products = compression.relative_errors(one, two)
    first, second = one.double().numpy(), two.double().numpy()
    norm = np.linalg.norm
    assert values == pytest.approx(norm(first - second) / norm(first))
    expected = norm(first @ first.T - second @ second.T) / norm(first @ first.T)
    assert products == pytest.approx(expected)
    assert compression.relative_errors(one, one) == pytest.approx((0, 0), abs=1e-7)


def test_bytes_are_as_promised_and_more_serve_better(vectors):
    found = []
    for times in (4, 8, 16, 32):
        max_bytes = compression.budget_bytes(*vectors.shape, times)
        assert max_bytes == int(4 * vectors.numel() / times)
        table = compression.compress(vectors, max_bytes)
        stored = sum(t.numel() * t.element_size() for t in table.state_dict().values())
        assert 0.98 * max_bytes <= stored == num_bytes(table) <= max_bytes
        found.append(errors(vectors, table))
    for values, products in (zip(*pair, strict=True) for pair in itertools.pairwise(found)):
        assert values[0] < values[1]
        assert products[0] < products[1]
    assert found[0][0] < 0.01
    assert found[0][1] < 0.01


def test_they_beat_rounding_of_rows_in_as_many_bytes(vectors):
    fine, coarse = (RowQuantizedEmbedding.from_vectors(vectors, bits) for bits in (8, 4))
    own, others = (
        errors(vectors, table) for table in (compression.compress(vectors, num_bytes(coarse)), coarse)
    )
    assert own[0] < 0.8 * others[0]
    assert own[1] < 0.8 * others[1]
    # In a byte a value no code has more bits than int8's, which are worth more in columns of large values.
    assert errors(vectors, compression.compress(vectors, num_bytes(fine)))[0] < errors(vectors, fine)[0]


@pytest.mark.parametrize("times", [8, 16])
def test_what_an_error_costs_is_chosen_better_than_its_neighbours(vectors, times):
    max_bytes = int(4 * vectors.numel() / times)
    chosen = errors(vectors, compression.compress(vectors, max_bytes))[1]
    squares = vectors.square().sum(dim=0)
    for power in (0, 2):
        (bits,) = allocate_bits([(vectors, squares**power)], max_bytes)
        other = TransformCodedEmbedding.from_vectors(vectors, torch.ones(len(squares)), bits)
        assert chosen < errors(vectors, other)[1]
    (bits,) = allocate_bits([(vectors, squares)], max_bytes)
    assert chosen < errors(vectors, TransformCodedEmbedding.from_vectors(vectors, squares, bits))[1]


def test_the_cost_of_an_error_is_the_square_of_its_column(vectors):
    """The derivative that the docstring gives: errors of one size in one column, small and of no pattern."""
    squares = vectors.double().square().sum(dim=0)
    torch.manual_seed(0)
    for column in (0, 5, 39):
        noisy = vectors.double().clone()
        noise = 1e-3 * torch.randn(len(noisy), dtype=torch.float64)
        noisy[:, column] += noise
        _, relative = compression.relative_errors(vectors.double(), noisy)
        found = relative**2 * squares.square().sum()
        assert found.item() == pytest.approx((2 * squares[column] * noise.square().sum()).item(), rel=0.02)


def test_rows_made_in_blocks_are_the_rows(vectors, monkeypatch):
    table = compression.compress(vectors, 40_000)
    expected = all_rows(table)
    assert torch.equal(all_rows(compression.compress(vectors, 40_000)), expected)
    monkeypatch.setattr(tables, "_BLOCK_ROWS", 999)
    torch.testing.assert_close(all_rows(table), expected, rtol=1e-6, atol=0)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's clear_refs")
def test_little_memory_is_taken_beside_the_vectors():
    given = torch.randn(100_000, 64)
    all_rows(compression.compress(given[:3000], 100_000))  # which reads what it needs of torch's code
    max_bytes = compression.budget_bytes(*given.shape, 4)
    peak = timing.peak_mib(lambda clock: all_rows(compression.compress(given, max_bytes)))
    assert peak < 5 * given.nbytes / 2**20


@pytest.mark.parametrize(("num_rows", "dim"), [(1000, 20), (40_000, 100), (50, 300)])
def test_more_times_than_possible_are_refused_with_the_most(num_rows, dim):
    with pytest.raises(ValueError, match=r"at most ([\d.]+) times smaller .* times=1000 leaves") as refused:
        compression.budget_bytes(num_rows, dim, 1000)
    largest = float(str(refused.value).split(" times smaller")[0].rpartition(" ")[2])
    max_bytes = compression.budget_bytes(num_rows, dim, largest)
    with pytest.raises(ValueError, match=f"at most {largest:g} times"):
        compression.budget_bytes(num_rows, dim, largest * 1.01 + 0.01)
    assert num_bytes(compression.compress(made(num_rows, dim), max_bytes)) <= max_bytes


@pytest.mark.parametrize("times", [0.5, -1, float("nan"), float("inf")])
def test_times_out_of_range_are_refused(times):
    with pytest.raises(ValueError, match=r"times must lie in \[1, inf\)"):
        compression.budget_bytes(1000, 20, times)


def test_few_vectors_become_no_smaller():
    with pytest.raises(ValueError, match="1 vectors of 1 values become no smaller"):
        compression.budget_bytes(1, 1, 1)


@pytest.mark.parametrize("factor", [0, 1e-13, 1e30, float("nan")])
def test_vectors_of_no_length_or_one_too_large_are_refused(factor):
    with pytest.raises(ValueError, match="the largest of the values must lie between 1e-12 and 1e12, got"):
        compression.compress(torch.ones(100, 30) * factor, 5000)


@pytest.mark.parametrize("factor", [1e-10, 1e10])
def test_the_unit_of_vectors_does_not_matter(vectors, factor):
    expected = errors(vectors, compression.compress(vectors, 40_000))
    scaled = vectors * factor
    assert errors(scaled, compression.compress(scaled, 40_000)) == pytest.approx(expected, rel=0.01)
