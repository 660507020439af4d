import pytest
import torch
from torch import nn

from cemb import FullEmbedding, HashedEmbedding
from cemb.tables import ReferenceHashedEmbedding


@pytest.mark.parametrize(
    "make",
    [
        lambda: FullEmbedding(63, 100),
        lambda: HashedEmbedding(63, 100, pool_size=500, block_size=7),
        lambda: ReferenceHashedEmbedding(63, 100, pool_size=500, signed=True),
    ],
)
def test_a_table_is_an_embedding(make):
    torch.manual_seed(0)
    table = make()
    assert (table.num_embeddings, table.embedding_dim) == (63, 100)
    ids = torch.tensor([[0, 62], [7, 7]])
    out = table(ids)
    assert out.shape == (2, 2, 100)
    assert torch.equal(out[1, 0], out[1, 1])
    assert 0.08 < table.weight.std() < 0.12
    # Seeded alike, drawn alike; and a state loads into a table made alike.
    torch.manual_seed(0)
    assert torch.equal(make()(ids), out)
    other = make()
    assert not torch.equal(other(ids), out)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other(ids), out)


def test_state_holds_the_pool_and_what_it_is_hashed_by():
    state = HashedEmbedding(63, 100, pool_size=500, hash_seed=7, signed=True).state_dict()
    assert list(state) == ["weight", "_extra_state"]
    assert state["_extra_state"].tolist() == [1, 63, 100, 500, 1, 7, 1, 0]


def test_compression_ratio():
    table = HashedEmbedding(1000, 100, pool_size=500)
    assert table.compression_ratio == 200
    with pytest.raises(AttributeError):
        table.compression_ratio = 3


def test_extra_repr_names_what_differs_from_the_default():
    assert repr(HashedEmbedding(63, 100, pool_size=500)) == "HashedEmbedding(63, 100, pool_size=500)"
    table = HashedEmbedding(63, 100, pool_size=500, block_size=4, signed=True, table_offset=9, hash_seed=2)
    expected = "63, 100, pool_size=500, block_size=4, hash_seed=2, signed=True, table_offset=9"
    assert table.extra_repr() == expected


def test_a_shared_pool_collects_both_gradients_and_offsets_keep_tables_apart():
    words = HashedEmbedding(1000, 16, pool_size=4000)
    contexts = HashedEmbedding(1000, 16, weight=words.weight, table_offset=1000)
    same = HashedEmbedding(1000, 16, weight=words.weight)
    ids = torch.arange(50)
    assert torch.equal(words(ids), same(ids))
    assert (words(ids) == contexts(ids)).float().mean() < 0.01
    (words(ids).sum() + contexts(ids).sum()).backward()
    assert words.weight.grad.sum() == 2 * 50 * 16
    assert sum(p.numel() for p in nn.ModuleList([words, contexts]).parameters()) == 4000


def test_a_table_of_a_billion_rows_costs_its_pool():
    table = HashedEmbedding(10**9, 100, pool_size=1000, block_size=25)
    assert not torch.equal(table(torch.tensor(10**9 - 1)), table(torch.tensor(10**9 - 1 - 2**28)))


def test_dtype_and_device():
    assert (
        HashedEmbedding(10, 4, pool_size=8, dtype=torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16
    )
    assert HashedEmbedding(10, 4, pool_size=8).double()(torch.tensor([1])).dtype == torch.float64
    assert HashedEmbedding(10, 4, pool_size=8, device="meta")(torch.tensor([1], device="meta")).shape == (
        1,
        4,
    )


def test_compiles_without_graph_breaks():
    table = HashedEmbedding(63, 100, pool_size=500, block_size=7, signed=True)
    ids = torch.tensor([1, 5, 62])
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), table(ids))
    compiled(ids).sum().backward()
    grad, table.weight.grad = table.weight.grad, None
    table(ids).sum().backward()
    assert torch.equal(grad, table.weight.grad)


def test_gradients_accumulate():
    table = HashedEmbedding(63, 8, pool_size=50)
    for ids in ([1, 2], [3]):
        table(torch.tensor(ids)).sum().backward()
    assert table.weight.grad.sum() == 3 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of pool_size, compression_ratio, and an existing pool as weight, got none"),
        ({"weight": torch.zeros(5)}, "must be a 1-dimensional Parameter, got Tensor"),
        ({"weight": nn.Parameter(torch.zeros(5, 2))}, r"Parameter of shape \[5, 2\]"),
        (
            {"weight": nn.Parameter(torch.zeros(50)), "pool_size": 40},
            "pool_size=40 contradicts the 50 values",
        ),
        ({"weight": nn.Parameter(torch.zeros(50)), "dtype": torch.float64}, "leave them out"),
        ({"pool_size": 50, "block_size": 128}, "block_size must be at most embedding_dim=100, got 128"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HashedEmbedding(63, 100, **arguments)
