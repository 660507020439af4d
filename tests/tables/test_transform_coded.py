import math

import pytest
import torch

from cemb.tables import TransformCodedEmbedding, all_rows, num_bytes, transform_coded
from cemb.tables.kmeans import nearest_level
from cemb.tables.transform_coded import allocate_bits, lloyd_levels, overhead_bytes, tier_borders


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def naive_row(table, i):
    """Row i, bit by bit."""
    borders, bits = tier_borders(table.num_embeddings).tolist(), table.bits.tolist()
    position, tier = 0, 0
    while i >= borders[tier + 1]:
        position += (borders[tier + 1] - borders[tier]) * sum(bits[tier])
        tier += 1
    position += (i - borders[tier]) * sum(bits[tier])
    codes, low, high = table.codes.tolist(), *table.scale_range.tolist()
    scale = 2 ** (low + (high - low) * table.scales[i].item() / 255)
    row = []
    for column, width in enumerate(bits[tier]):
        code = 0
        for place in range(width):
            code += (codes[position // 8] >> position % 8 & 1) << place
            position += 1
        level = table.levels[2**width - 1 + code].item()
        row.append(level * table.deviations[tier, column].item() * scale)
    return row


def with_zeros(shape):
    bits = torch.randint(9, shape)
    bits[:, 1] = 0
    bits[2:3] = 0
    return bits


PATTERNS = {
    "mixed": lambda shape: torch.randint(9, shape),
    "some zero": with_zeros,
    "all zero": torch.zeros,
    "all 8": lambda shape: torch.full(shape, 8),
    "all 1": torch.ones,
    "odd": lambda shape: torch.full(shape, 3),
}


def size(num_rows, dim):
    return len(tier_borders(num_rows)) - 1, dim


@pytest.mark.parametrize("num_rows", [1, 7, 40, 300])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_are_what_their_bits_say(pattern, num_rows):
    vectors, bits = torch.randn(num_rows, 5), PATTERNS[pattern](size(num_rows, 5)).to(torch.uint8)
    table = TransformCodedEmbedding.from_vectors(vectors, torch.ones(5), bits)
    expected = torch.tensor([naive_row(table, i) for i in range(num_rows)])
    assert torch.allclose(all_rows(table), expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(all_rows(table) == 0, bits.repeat_interleave(tier_sizes(num_rows), dim=0) == 0)
    assert len(table.codes) == -(-int((tier_sizes(num_rows) * bits.sum(dim=1)).sum()) // 8)


def tier_sizes(num_rows):
    return torch.from_numpy(tier_borders(num_rows)).diff()


@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 100, 20_000])
def test_tiers_grow(num_rows):
    borders, sizes = tier_borders(num_rows), tier_sizes(num_rows)
    assert borders[0] == 0
    assert borders[-1] == num_rows
    assert 1 <= len(sizes) <= 24
    assert sizes.min() >= 1
    assert (sizes[2:] >= sizes[1:-1] - 1).all()  # borders are whole numbers
    assert sizes[0] == min(16, num_rows)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (50,), (3, 2), (2, 1, 3)])
def test_ids_of_any_shape(shape, dtype):
    bits = torch.randint(9, size(40, 5)).to(torch.uint8)
    table = TransformCodedEmbedding.from_vectors(torch.randn(40, 5), torch.ones(5), bits)
    assert (table.num_embeddings, table.embedding_dim) == (40, 5)
    ids = torch.randint(40, shape, dtype=dtype)
    assert table(ids).shape == (*shape, 5)
    assert torch.allclose(table(ids), all_rows(table)[ids.long()], rtol=1e-6)
    for bad in (-1, 40):
        with pytest.raises(IndexError, match=r"ids must lie in \[0, 40\)"):
            table(torch.tensor([3, bad]))


def test_blocks_of_rows_are_packed_as_one(monkeypatch):
    """Whose bits end within a byte."""
    vectors, bits = torch.randn(300, 5), torch.randint(9, size(300, 5)).to(torch.uint8)
    importance = torch.rand(5)
    expected = TransformCodedEmbedding.from_vectors(vectors, importance, bits)
    rows = all_rows(expected)
    for block_rows in (1, 7, 50):
        monkeypatch.setattr(transform_coded, "_BLOCK_ROWS", block_rows)
        found = TransformCodedEmbedding.from_vectors(vectors, importance, bits)
        for name, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
        assert torch.equal(all_rows(found), rows)


def test_vectors_are_made_where_the_ids_are():
    """With another device by default, as a stand-in for one: neither holds what the other needs."""
    bits = torch.randint(9, size(40, 5)).to(torch.uint8)
    bits[0] = 0
    table = TransformCodedEmbedding.from_vectors(torch.randn(40, 5), torch.ones(5), bits)
    expected = all_rows(table)
    ids = torch.arange(40)
    with torch.device("meta"):
        assert torch.equal(table(ids), expected)


def coded(vectors, importance, max_bytes):
    (bits,) = allocate_bits([(vectors, importance)], max_bytes)
    return TransformCodedEmbedding.from_vectors(vectors, importance, bits)


def counted(table):
    return sum(t.numel() * t.element_size() for t in table.state_dict().values())


def test_a_budget_is_used_and_kept_and_more_bytes_serve_better():
    vectors = torch.randn(4000, 20) * torch.arange(20, 0, -1)
    importance = torch.arange(1, 21).float().flip(0)
    errors = []
    for max_bytes in (12_000, 20_001, 40_000, 60_007, 75_000):
        table = coded(vectors, importance, max_bytes)
        assert num_bytes(table) == counted(table)
        assert 0.97 * max_bytes <= num_bytes(table) <= max_bytes
        errors.append(((all_rows(table) - vectors).square() * importance).sum().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]
    assert not list(table.parameters())


def test_a_budget_for_two_tables():
    sides = [(torch.randn(3000, 8), torch.ones(8)), (4 * torch.randn(3000, 8), torch.ones(8))]
    found = allocate_bits(sides, 35_000)
    tables = [TransformCodedEmbedding.from_vectors(*side, b) for side, b in zip(sides, found, strict=True)]
    assert 0.97 * 35_000 <= sum(map(num_bytes, tables)) <= 35_000
    # Four times the deviation is two bits in theory, where there are many of them.
    assert found[1].double().mean() - found[0].double().mean() == pytest.approx(2, abs=0.4)


def test_plenty_of_bytes_are_8_bits_each():
    (bits,) = allocate_bits([(torch.randn(300, 5), torch.ones(5))], 10**6)
    assert bits.shape == size(300, 5)
    assert (bits == 8).all()


def test_the_least_budget():
    vectors, importance = torch.randn(300, 5), torch.ones(5)
    least = overhead_bytes(300, 5) + 1
    assert num_bytes(coded(vectors, importance, least)) == least - 1
    with pytest.raises(ValueError, match=f"max_bytes must be at least {least}, .* got {least - 1}"):
        allocate_bits([(vectors, importance)], least - 1)


def test_8_bits_are_accurate_also_for_rows_of_any_scale():
    vectors = torch.randn(3000, 8)
    for rows in (vectors, vectors * torch.logspace(-6, 6, 3000)[torch.randperm(3000), None]):
        table = TransformCodedEmbedding.from_vectors(
            rows, torch.ones(8), torch.full(size(3000, 8), 8, dtype=torch.uint8)
        )
        errors = (all_rows(table) - rows).norm(dim=1) / rows.norm(dim=1)
        # A Gaussian's 256 best levels leave an error near sqrt(pi * sqrt(3) / 2) / 256.
        assert errors.square().mean().sqrt() < 0.011
        assert errors.max() < 0.2


def test_bits_go_where_the_importance_and_the_energy_are():
    importance = torch.tensor([64.0, 16, 4, 1])
    vectors = torch.randn(4000, 4)
    vectors[:1000] *= 8
    max_bytes = overhead_bytes(4000, 4) + 1 + 4000 * 4 * 4 // 8
    (bits,) = allocate_bits([(vectors, importance)], max_bytes)
    bits = bits.double()
    # By theory a factor of 4 in variance or importance is a bit.
    assert (bits[:, :-1] >= bits[:, 1:]).all()
    assert (bits[-3:, :-1] - bits[-3:, 1:]).mean() == pytest.approx(1, abs=0.35)
    loud = tier_borders(4000)[1:] <= 1000
    assert bits[loud].mean() - bits[-3:].mean() == pytest.approx(3, abs=0.7)


def test_importance_decides_what_is_kept():
    vectors, max_bytes = torch.randn(2000, 4), overhead_bytes(2000, 4) + 2000
    for importance in (torch.tensor([1.0, 1, 1, 100]), torch.tensor([100.0, 1, 1, 1])):
        errors = (all_rows(coded(vectors, importance, max_bytes)) - vectors).square().mean(dim=0)
        assert errors.argmin() == importance.argmax()


def test_scales_follow_what_is_important():
    vectors, importance = torch.randn(2000, 2), torch.tensor([1.0, 1e-8])
    vectors[:, 1] *= torch.logspace(-3, 3, 2000)[torch.randperm(2000)]
    bits = torch.tensor([4, 0], dtype=torch.uint8).expand(size(2000, 2)).contiguous()
    rows = all_rows(TransformCodedEmbedding.from_vectors(vectors, importance, bits))
    assert (rows - vectors)[:, 0].norm() < 0.1 * vectors[:, 0].norm()


@pytest.mark.parametrize(
    "vectors",
    [torch.zeros(50, 3), torch.full((50, 3), 2.5), torch.arange(50.0)[:, None].expand(50, 3).clone()],
    ids=["zero", "constant", "rows of one value"],
)
def test_degenerate_vectors(vectors):
    for max_bytes in (2000, 10_000):
        rows = all_rows(coded(vectors, torch.ones(3), max_bytes))
        assert rows.isfinite().all()
        assert (rows - vectors).abs().max() <= vectors.abs().max() + 1e-6
    assert torch.allclose(rows, vectors, rtol=0.02, atol=1e-6)


def test_rows_and_columns_of_zeros():
    vectors = torch.randn(500, 4)
    vectors[::7], vectors[:, 2] = 0, 0
    rows = all_rows(coded(vectors, torch.ones(4), 10_000))
    assert rows.isfinite().all()
    assert rows[::7].abs().max() < 1e-6
    assert rows[:, 2].abs().max() < 1e-3
    assert (rows - vectors).norm() < 0.05 * vectors.norm()


@pytest.mark.parametrize(
    ("bits", "positive", "distortion"),
    [(1, [0.7979], 0.3634), (2, [0.4528, 1.510], 0.1175), (3, [0.2451, 0.7560, 1.344, 2.152], 0.03454)],
)
def test_levels_of_a_gaussian_are_those_of_max(bits, positive, distortion):
    """Max, "Quantizing for minimum distortion", 1960, table I."""
    values = torch.randn(200_000)
    values = torch.cat((values, -values)).sort().values
    levels = lloyd_levels(values, bits, iterations=100)
    expected = torch.tensor([-level for level in reversed(positive)] + positive)
    assert torch.allclose(levels, expected, atol=0.015)
    error = (values[:, None] - levels).abs().amin(dim=1).square().mean().item()
    assert error == pytest.approx(distortion, rel=0.01)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_many_levels_of_a_gaussian_are_near_the_best(bits):
    """By Panter and Dite's limit of many levels, which the best are just below: 2.72 · 4⁻ᵇ."""
    values = torch.randn(2**18).sort().values
    levels = lloyd_levels(values, bits)
    error = (values - levels[nearest_level(values, levels)]).square().mean().item()
    assert error < 1.05 * math.pi * math.sqrt(3) / 2 * 4**-bits
    assert (levels.diff() >= 0).all()


def test_levels_of_few_values_are_these():
    values = torch.tensor([-3.0] * 10 + [1] * 10 + [4] * 10)
    assert set(lloyd_levels(values, 3).tolist()) == {-3, 1, 4}
    assert lloyd_levels(torch.tensor([0.0] * 7 + [9]), 1).tolist() == [0, 9]
    assert lloyd_levels(values, 0).item() == pytest.approx(values.mean().item())


def test_deterministic_and_a_state_loads():
    vectors, importance = torch.randn(300, 5), torch.rand(5)
    (bits,) = allocate_bits([(vectors, importance)], 3000)
    first, again = (TransformCodedEmbedding.from_vectors(vectors, importance, bits) for _ in range(2))
    assert torch.equal(all_rows(first), all_rows(again))
    other = TransformCodedEmbedding.from_vectors(torch.randn(300, 5), importance, bits)
    assert not torch.equal(all_rows(first), all_rows(other))
    other.load_state_dict(first.state_dict())
    assert torch.equal(all_rows(first), all_rows(other))


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_only_the_ratios_of_importances_matter(factor):
    vectors, importance = torch.randn(300, 5), torch.rand(5)
    expected = all_rows(coded(vectors, importance, 3000))
    assert torch.allclose(all_rows(coded(vectors, importance * factor, 3000)), expected, atol=0.02)
