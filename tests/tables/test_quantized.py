import math

import numpy as np
import pytest
import torch

from cemb.tables import ProductQuantizedEmbedding, RowQuantizedEmbedding, all_rows, num_bytes

LARGEST = {8: 127, 4: 7}
every_width = pytest.mark.parametrize("bits", LARGEST)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_int8_by_hand():
    table = RowQuantizedEmbedding.from_vectors(torch.tensor([[63.5, -31.8, 0.2, 0.3], [0.0, 0.0, -127, 9.4]]))
    assert table.scales.tolist() == [0.5, 1]
    assert table.codes.tolist() == [[127, -64, 0, 1], [0, 0, -127, 9]]
    assert all_rows(table).tolist() == [[63.5, -32, 0, 0.5], [0, 0, -127, 9]]


def test_int4_by_hand():
    table = RowQuantizedEmbedding.from_vectors(torch.tensor([[3.5, -1.3, 0.6], [-7, 0.4, -0.6]]), 4)
    assert table.scales.tolist() == [0.5, 1]
    # 8 more than 7, -3, 1 and -7, 0, -1, the first of a pair in the low bits.
    assert table.codes.tolist() == [[15 + 16 * 5, 9], [1 + 16 * 8, 7]]
    assert all_rows(table).tolist() == [[3.5, -1.5, 0.5], [-7, 0, -1]]


@every_width
@pytest.mark.parametrize("dim", [1, 6, 7])
def test_errors_are_at_most_half_a_step_of_the_row(bits, dim):
    vectors = torch.randn(400, dim) * torch.logspace(-6, 3, 400)[:, None]
    # The least normal float16 is the least scale; a scale is off by up to 2^-11 of itself.
    step = (vectors.abs().amax(dim=1, keepdim=True).double() / LARGEST[bits]).clamp(min=2.0**-14)
    errors = (all_rows(RowQuantizedEmbedding.from_vectors(vectors, bits)) - vectors).abs() / step
    assert errors.max() <= 0.5 * (1 + 2**-11) + 1e-6
    if dim > 1:
        assert errors.max() > 0.45


def product_quantized():
    table = ProductQuantizedEmbedding(50, 5, 2)
    table.load_state_dict(
        {"codes": torch.randint(256, (50, 2)).byte(), "codebooks": torch.randn(256, 5).half()}
    )
    return table


@every_width
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 2), (2, 1, 3)])
def test_ids_of_any_shape(bits, shape, dtype):
    ids = torch.randint(50, shape, dtype=dtype)
    for table in (
        RowQuantizedEmbedding.from_vectors(torch.randn(50, 5), bits),
        product_quantized(),
    ):
        assert (table.num_embeddings, table.embedding_dim) == (50, 5)
        assert table(ids).dtype == torch.float32
        assert torch.equal(table(ids), all_rows(table)[ids.long()])
        for bad in (-1, 50):
            with pytest.raises(IndexError, match=r"ids must lie in \[0, 50\)"):
                table(torch.tensor([3, bad]))


@every_width
def test_rows_of_zeros_stay_zero(bits):
    vectors = torch.randn(6, 3)
    vectors[2] = 0
    rows = all_rows(RowQuantizedEmbedding.from_vectors(vectors, bits))
    assert rows.isfinite().all()
    assert not rows[2].any()
    assert rows[3].any()


@every_width
@pytest.mark.parametrize("dim", [6, 7])
def test_bytes_of_row_quantization(bits, dim):
    table = RowQuantizedEmbedding.from_vectors(torch.randn(30, dim), bits)
    assert num_bytes(table) == 30 * (dim if bits == 8 else math.ceil(dim / 2)) + 30 * 2
    assert not list(table.parameters())


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        RowQuantizedEmbedding.from_vectors(torch.randn(4, 3), 3)


@pytest.mark.parametrize("num_groups", [1, 3, 7])
def test_as_many_distinct_parts_as_centroids_are_kept(num_groups):
    vectors = torch.randn(256, 7)
    table = ProductQuantizedEmbedding.from_vectors(vectors, num_groups)
    if num_groups < 7:
        assert torch.equal(all_rows(table), vectors.half().float())
    assert torch.allclose(all_rows(table), vectors, atol=0.01)


def test_codes_point_to_the_nearest_centroids():
    vectors = torch.randn(4000, 5)
    table = ProductQuantizedEmbedding.from_vectors(vectors, 2)
    errors = []
    for columns, codes in zip((slice(0, 3), slice(3, 5)), table.codes.T.tolist(), strict=True):
        part, book = vectors[:, columns].numpy(), table.codebooks[:, columns].float().numpy()
        distances = np.square(part[:, None] - book).sum(axis=2)
        np.testing.assert_allclose(distances[np.arange(4000), codes], distances.min(axis=1), atol=1e-5)
        errors.append(distances.min(axis=1).sum())
    assert (all_rows(table) - vectors).square().sum().item() == pytest.approx(sum(errors), rel=1e-5)


def test_centroids_are_better_than_a_sample_of_rows():
    vectors = torch.randn(2000, 4)
    errors = [
        (all_rows(ProductQuantizedEmbedding.from_vectors(vectors, groups)) - vectors).square().sum()
        for groups in (1, 2, 4)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < 0.66 * torch.cdist(vectors, vectors[:256]).amin(dim=1).square().sum()


def test_product_quantization_is_deterministic_and_a_seed_matters():
    vectors = torch.randn(300, 4)
    first, again, other = (ProductQuantizedEmbedding.from_vectors(vectors, 2, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.codebooks, again.codebooks)
    assert not torch.equal(first.codebooks, other.codebooks)


def test_bytes_of_product_quantization():
    table = ProductQuantizedEmbedding.from_vectors(torch.randn(300, 7), 3)
    assert num_bytes(table) == 300 * 3 + 256 * 7 * 2
    assert not list(table.parameters())


@pytest.mark.parametrize(
    ("shape", "num_groups", "message"),
    [
        ((300, 4), 0, "num_groups must be at least 1, got 0"),
        ((300, 4), 5, "num_groups must be at most 4, got 5"),
        ((255, 4), 2, "256 centroids need at least 256 rows, got 255"),
    ],
)
def test_impossible_product_quantization(shape, num_groups, message):
    with pytest.raises(ValueError, match=message):
        ProductQuantizedEmbedding.from_vectors(torch.randn(shape), num_groups)
