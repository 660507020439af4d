import math

import pytest
import torch
from torch import nn

from cemb.hashing import HashSpec
from cemb.tables import (
    ClusteredEmbedding,
    FullEmbedding,
    HybridEmbedding,
    LowRankEmbedding,
    MixedDimensionEmbedding,
    MultiHashEmbedding,
    QuotientRemainderEmbedding,
    kmeans,
    num_bytes,
)

TABLES = (
    LowRankEmbedding,
    MixedDimensionEmbedding,
    QuotientRemainderEmbedding,
    MultiHashEmbedding,
    HybridEmbedding,
    ClusteredEmbedding,
)
SMALL = {
    LowRankEmbedding: lambda: LowRankEmbedding(50, 4, 3),
    MixedDimensionEmbedding: lambda: MixedDimensionEmbedding(50, 4, 4.0),
    QuotientRemainderEmbedding: lambda: QuotientRemainderEmbedding(50, 4, 13),
    MultiHashEmbedding: lambda: MultiHashEmbedding(50, 4, 7, num_hashes=3, hash_seed=5),
    HybridEmbedding: lambda: HybridEmbedding(50, 4, 11, 20, 2, hash_seed=5, signed=True),
    ClusteredEmbedding: lambda: ClusteredEmbedding(50, 4, 5, 2, hash_seed=5),
}
every_table = pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def dot(row, matrix):
    return [sum(x * matrix[i][j] for i, x in enumerate(row)) for j in range(len(matrix[0]))]


def lowrank_row(table, i):
    return dot(table.rows[i].tolist(), table.projection.tolist())


def mixed_row(table, i):
    tiers = iter(table.tiers)
    tier = next(tiers)
    while i >= tier.num_embeddings:
        i -= tier.num_embeddings
        tier = next(tiers)
    return tier.weight[i].tolist() if isinstance(tier, FullEmbedding) else lowrank_row(tier, i)


def quotient_row(table, i):
    quotient, remainder = divmod(i, table.num_remainders)
    factors = table.quotients[quotient].tolist(), table.remainders[remainder].tolist()
    return [a * b for a, b in zip(*factors, strict=True)]


def multihash_row(table, i):
    spec = HashSpec(50, 3, 7, hash_seed=5)
    components = [table.components[spec.locate(i, j)[0]].tolist() for j in range(3)]
    return dot(table.importance[i].tolist(), components)


def hybrid_row(table, i):
    if i < 11:
        return table.tiers[0].weight[i].tolist()
    places = [HashSpec(39, 4, 20, 2, hash_seed=5, signed=True).locate(i - 11, j) for j in range(4)]
    return [sign * table.tiers[1].weight[place].item() for place, sign in places]


def clustered_row(table, i):
    spec = HashSpec(50, 2, 5, hash_seed=table.hash_seed.item())
    row = []
    for group in range(2):
        centroid = table.centroids[group, table.codes[i, group].item()].tolist()
        helper = table.helper[group, spec.locate(i, group)[0]].tolist()
        row += [a + b for a, b in zip(centroid, helper, strict=True)]
    return row


ROWS = {
    LowRankEmbedding: lowrank_row,
    MixedDimensionEmbedding: mixed_row,
    QuotientRemainderEmbedding: quotient_row,
    MultiHashEmbedding: multihash_row,
    HybridEmbedding: hybrid_row,
    ClusteredEmbedding: clustered_row,
}


@every_table
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 2), (2, 1, 3)])
def test_ids_of_any_shape(kind, shape, dtype):
    table = SMALL[kind]()
    assert (table.num_embeddings, table.embedding_dim) == (50, 4)
    ids = torch.randint(50, shape, dtype=dtype)
    out = table(ids)
    assert out.shape == (*shape, 4)
    assert out.dtype == torch.float32
    assert torch.allclose(out, table(torch.arange(50))[ids.long()], rtol=1e-5, atol=1e-7)


@every_table
def test_every_row_is_what_its_paper_says(kind):
    table = SMALL[kind]()
    if kind is ClusteredEmbedding:
        table.recluster()
        nn.init.normal_(table.helper)
    expected = torch.tensor([ROWS[kind](table, i) for i in range(50)])
    assert torch.allclose(table(torch.arange(50)), expected, rtol=1e-5, atol=1e-6)
    assert len(expected.unique(dim=0)) > 20


@every_table
def test_gradients(kind):
    table = SMALL[kind]().double()
    ids = torch.tensor([[0, 49, 20], [7, 20, 12]])
    parameters = [p.detach().requires_grad_() for p in table.parameters()]
    names = [name for name, _ in table.named_parameters()]

    def look_up(*values):
        return torch.func.functional_call(table, dict(zip(names, values, strict=True)), (ids,))

    assert look_up(*parameters).dtype == torch.float64
    assert torch.autograd.gradcheck(look_up, parameters)


@every_table
def test_gradients_reach_every_parameter(kind):
    table = SMALL[kind]()
    (table(torch.arange(50)) * torch.randn(50, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in table.parameters())


@every_table
@pytest.mark.parametrize("size", [(1000, 100), (5000, 64), (20_000, 100)], ids=str)
@pytest.mark.parametrize("compression", [2, 4, 7, 16])
def test_a_budget_is_used_and_kept(kind, size, compression):
    max_bytes = 4 * math.prod(size) // compression
    if kind is QuotientRemainderEmbedding and (size, compression) == ((1000, 100), 16):
        # 62 rows, and of two factors at least 64 are needed to tell 1,000 rows apart.
        with pytest.raises(ValueError, match=r"max_bytes must be at least 25600, .* got 25000"):
            kind.within(*size, max_bytes)
        return
    table = kind.within(*size, max_bytes, seed=3)
    assert (table.num_embeddings, table.embedding_dim) == size
    one_more = 4 * sum(size) if kind is LowRankEmbedding else 0  # its bytes come in ranks
    assert min(0.9 * max_bytes, max_bytes - one_more + 1) <= num_bytes(table) <= max_bytes


@every_table
def test_a_budget_can_be_odd_or_plenty(kind):
    for max_bytes in (4001, 9999, 20_003, 50_000, 10**6):
        table = kind.within(300, 10, max_bytes)
        assert num_bytes(table) <= min(max_bytes, 30_000)
        assert table(torch.arange(300)).shape == (300, 10)


@every_table
def test_the_least_budget(kind):
    with pytest.raises(ValueError, match=r"max_bytes must be at least \d+, .* got 1$") as raised:
        kind.within(500, 10, 1)
    least = int(str(raised.value).split()[5].rstrip(","))
    assert num_bytes(kind.within(500, 10, least)) == least
    with pytest.raises(ValueError, match=f"at least {least}, .* got {least - 1}$"):
        kind.within(500, 10, least - 1)


@every_table
def test_ids_out_of_range(kind):
    for bad, seen in (([3, 50], "3 to 50"), ([-1], "-1 to -1")):
        with pytest.raises(IndexError, match=rf"ids must lie in \[0, 50\), .* got ids from {seen}"):
            SMALL[kind]()(torch.tensor(bad))


@every_table
@pytest.mark.parametrize("compression", [2, 4, 16])
def test_initial_values(kind, compression):
    vectors = kind.within(20_000, 100, 8_000_000 // compression)(torch.arange(20_000))
    assert vectors.shape == (20_000, 100)
    assert 0.08 < vectors.std() < 0.12
    assert abs(vectors.mean()) < 0.005


@every_table
def test_seeded_alike_drawn_alike_and_a_state_loads(kind):
    table = SMALL[kind]()
    if kind is ClusteredEmbedding:
        table.recluster()
        nn.init.normal_(table.helper)
    ids = torch.arange(50)
    other = SMALL[kind]()
    assert not torch.equal(other(ids), table(ids))
    other.load_state_dict(table.state_dict())
    assert torch.equal(other(ids), table(ids))
    torch.manual_seed(7)
    first = SMALL[kind]()(ids)
    torch.manual_seed(7)
    assert torch.equal(SMALL[kind]()(ids), first)


@pytest.mark.parametrize("kind", [MultiHashEmbedding, HybridEmbedding, ClusteredEmbedding])
def test_a_seed_picks_the_hash(kind):
    def make(seed):
        torch.manual_seed(0)
        return kind.within(200, 10, 4000, seed=seed)(torch.arange(200))

    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankEmbedding(50, 4, 0), "rank must be at least 1, got 0"),
        (lambda: MixedDimensionEmbedding(50, 4, 0.5), r"base_dim must lie in \[1, inf\), got 0.5"),
        (lambda: QuotientRemainderEmbedding(0, 4, 2), "num_embeddings must be at least 1, got 0"),
        (lambda: MultiHashEmbedding(50, 4, 0), "num_components must be at least 1, got 0"),
        (lambda: LowRankEmbedding(50, 4, 2.5), "rank must be an integer, got 2.5"),
        (lambda: LowRankEmbedding.within(50, 4, 1e6), "max_bytes must be an integer, got 1000000.0"),
        (lambda: MixedDimensionEmbedding(50, 4, float("nan")), r"base_dim must lie in \[1, inf\), got nan"),
        (lambda: MixedDimensionEmbedding.within(50, 4, 999, temperature=-1), "temperature must lie in"),
        (lambda: HybridEmbedding.within(50, 4, 999, exact_share=1.5), r"exact_share must lie in \[0, 1\]"),
        (lambda: MultiHashEmbedding.within(50, 4, 999, num_hashes=0), "num_hashes must be at least 1"),
        (lambda: ClusteredEmbedding(50, 4, 5, 2, hash_seed=1.5), "hash_seed must be an integer, got 1.5"),
        (lambda: ClusteredEmbedding(50, 4, 5, 2).recluster(num_steps=-1), "num_steps must be at least 0"),
        (lambda: HybridEmbedding(50, 4, 50, 20), r"num_exact must lie in \[0, 50\), got 50"),
        (lambda: ClusteredEmbedding(50, 4, 5, 3), "num_columns must divide embedding_dim=4, got 3"),
    ],
)
def test_impossible_tables(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_num_bytes_counts_what_is_shared_once():
    module = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.BatchNorm1d(5, affine=False)])
    assert num_bytes(module) == 4 * 6 + 4 * 10 + 8
    module.append(nn.Linear(3, 2, bias=False))
    module[2].weight = nn.Parameter(module[0].weight.detach())
    module.register_buffer("codes", torch.zeros(9, dtype=torch.int16))
    assert num_bytes(module) == 4 * 6 + 4 * 10 + 8 + 18


def test_lengths_fall_with_frequency():
    table = MixedDimensionEmbedding.within(20_000, 100, 2_000_000)
    assert [tier.num_embeddings for tier in table.tiers] == [156, 156, 313, 625, 1250, 2500, 5000, 10_000]
    ranks = [getattr(tier, "rank", 100) for tier in table.tiers]
    assert ranks == sorted(ranks, reverse=True)
    # Half as frequent: 2^-0.3 as long.
    assert ranks[-1] / ranks[-2] == pytest.approx(0.5**0.3, abs=0.06)
    assert isinstance(MixedDimensionEmbedding.within(20_000, 100, 7_000_000).tiers[0], FullEmbedding)


def test_frequent_ids_share_no_remainder():
    table = QuotientRemainderEmbedding.within(1000, 100, 100_000)
    assert (table.num_remainders, len(table.quotients)) == (245, 5)


def clusters_of(num_rows, num_distinct, width):
    """Vectors ``[num_rows, 2 * width]``, each half one of `num_distinct` values of its own."""
    values = torch.randn(2, num_distinct, width)
    codes = torch.randint(num_distinct, (num_rows, 2))
    return torch.cat([values[group][codes[:, group]] for group in range(2)], dim=1)


@pytest.mark.parametrize("num_rows", [50, 3000])
def test_reclustering_keeps_vectors_that_are_clusters(num_rows):
    table = ClusteredEmbedding(num_rows, 6, num_rows, 2)
    # As many clusters as rows hold any vectors; then as few as there are, which must be found.
    vectors = clusters_of(num_rows, 12, 3)
    with torch.no_grad():
        table.codes.copy_(torch.arange(num_rows).unsqueeze(1).expand(-1, 2))
        table.centroids.copy_(vectors.view(num_rows, 2, 3).transpose(0, 1))
        table.helper.zero_()
    assert torch.equal(table(torch.arange(num_rows)), vectors)
    before = num_bytes(table)
    table.recluster()
    assert torch.equal(table(torch.arange(num_rows)), vectors)
    assert num_bytes(table) == before
    assert len(table.codes[:, 0].unique()) == 12
    assert not table.helper.any()


def test_reclustering_finds_noisy_clusters():
    table = ClusteredEmbedding(2000, 6, 128, 2)
    vectors = clusters_of(2000, 16, 3) + 1e-3 * torch.randn(2000, 6)
    table.forward = lambda ids: vectors[ids]
    table.recluster(num_steps=10)
    del table.forward
    error = (table(torch.arange(2000)) - vectors).square().mean().sqrt()
    assert 0 < error < 0.0011


def test_reclustering_is_deterministic_changes_the_hash_and_lowers_the_error_of_clustering():
    def make(num_steps=5, max_samples=10**6):
        torch.manual_seed(0)
        table = ClusteredEmbedding(3000, 8, 40, 2, hash_seed=9)
        before = table(torch.arange(3000))
        table.recluster(num_steps=num_steps, max_samples=max_samples)
        return table, (table(torch.arange(3000)) - before).square().mean().item()

    (first, error), (second, _) = make(), make()
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.centroids, second.centroids)
    assert first.hash_seed == ClusteredEmbedding(3000, 8, 40, 2, hash_seed=9).hash_seed + 1
    assert error < make(num_steps=0)[1]
    # A sample serves nearly as well as all rows.
    assert error < make(max_samples=1000)[1] < 1.2 * error


@pytest.mark.parametrize("width", [1, 3])
def test_nearest_centroids_are_those_of_the_definition(width):
    vectors, centroids = torch.randn(3000, width), torch.randn(40, width)
    distances = torch.cdist(vectors.double(), centroids.double())
    found = distances.gather(1, kmeans.nearest(vectors, centroids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found, distances.amin(1), rtol=1e-4, atol=1e-6)


def test_empty_clusters_start_anew_where_the_error_is_largest(monkeypatch):
    vectors = torch.randn(20, 3)
    monkeypatch.setattr(kmeans, "nearest", lambda *arguments: torch.zeros(20, dtype=torch.int64))
    (start,) = kmeans.k_means(vectors, 1, 0, torch.Generator().manual_seed(0))
    centroids = kmeans.k_means(vectors, 4, 1, torch.Generator().manual_seed(0))
    assert torch.allclose(centroids[0], vectors.mean(0), atol=1e-6)
    assert torch.equal(centroids[1:], vectors[(vectors - start).norm(dim=1).argsort(descending=True)[:3]])


def test_codes_are_small():
    sizes = {256: torch.uint8, 257: torch.int16, 2**15: torch.int16, 2**15 + 1: torch.int32}
    for num_clusters, dtype in sizes.items():
        table = ClusteredEmbedding(10, 4, num_clusters, 2)
        assert table.codes.dtype == dtype
        assert table.codes.min() >= 0
