import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cemb import reference
from cemb.hashing import GOLDEN, FullSpec, HashSpec, PairDropout, mix

# The published outputs of splitmix64 seeded with 0: its state steps by GOLDEN, and `mix` is its output.
SPLITMIX64_SEED_0 = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)

# Frozen answers of hash version 1: (row, column) -> (pool index, sign). They must never change.
KNOWN_ANSWERS = [
    (HashSpec(10, 4, 100), (0, 0), (28, 1)),
    (HashSpec(10, 4, 100, signed=True), (9, 3), (63, -1)),
    (HashSpec(1000000, 100, 262144), (999999, 99), (70996, 1)),
    (HashSpec(1000000, 100, 262144, block_size=25, signed=True), (123456, 74), (110972, 1)),
    (HashSpec(63, 100, 1000, block_size=7, hash_seed=42, signed=True), (62, 99), (37, 1)),
    (HashSpec(1000000000, 100, 100000000), (999999999, 99), (60202279, 1)),
    (
        HashSpec(1000000, 100, 4294967295, hash_seed=9223372036854775807, signed=True),
        (1, 1),
        (1139672543, -1),
    ),
    (HashSpec(33900, 100, 6780000, table_offset=33900), (5, 50), (3847710, 1)),
    (
        HashSpec(1099511627776, 64, 4096, block_size=16, hash_seed=7, signed=True, table_offset=8589934592),
        (1099511627775, 63),
        (1283, 1),
    ),
]


def test_mix_is_splitmix64():
    assert tuple(mix(k * GOLDEN) for k in (1, 2, 3, 4)) == SPLITMIX64_SEED_0


@pytest.mark.parametrize(("spec", "entry", "answer"), KNOWN_ANSWERS)
def test_known_answers(spec, entry, answer):
    assert spec.locate(*entry) == answer


@st.composite
def specs(draw):
    dim = draw(st.integers(1, 130))
    block = draw(st.integers(1, dim))
    return HashSpec(
        num_embeddings=draw(st.sampled_from([1, 63, 10**6, 10**9, 2**40])),
        embedding_dim=dim,
        pool_size=draw(st.integers(block, 10_000) | st.sampled_from([2**31 + 5, 2**32 - 1])),
        block_size=block,
        hash_seed=draw(st.integers(0, 2**63 - 1)),
        signed=draw(st.booleans()),
        table_offset=draw(st.sampled_from([0, 17, 2**33])),
    )


@given(specs(), st.data())
def test_reference_locates_as_specified(spec, data):
    row = data.draw(st.integers(0, spec.num_embeddings - 1))
    indices, signs = reference.locate(torch.tensor([row]), spec)
    expected = [spec.locate(row, column) for column in range(spec.embedding_dim)]
    assert indices[0].tolist() == [index for index, _ in expected]
    if spec.signed:
        assert signs[0].tolist() == [sign for _, sign in expected]
    assert all(0 <= index < spec.pool_size for index, _ in expected)


def test_blocks_read_consecutive_values_and_the_last_is_short():
    spec = HashSpec(10, 100, 1000, block_size=7)
    assert spec.num_blocks == 15
    indices = [spec.locate(3, column)[0] for column in range(100)]
    for column in range(1, 100):
        if column % 7:
            assert indices[column] == indices[column - 1] + 1


def test_the_pool_is_used_evenly():
    spec = HashSpec(10**6, 64, 128, signed=True)
    indices, signs = reference.locate(torch.arange(4000), spec)
    counts = np.bincount(indices.flatten(), minlength=128)
    expected = indices.numel() / 128
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 127 - 5 * 16 < chi_square < 127 + 5 * 16  # 127 degrees of freedom, deviation √254
    assert abs(signs.double().mean()) < 5 / indices.numel() ** 0.5


def test_offset_continues_the_rows():
    low = HashSpec(100, 8, 50, block_size=3, table_offset=60)
    high = HashSpec(1000, 8, 50, block_size=3)
    assert low.locate(5, 7) == high.locate(65, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_embeddings": 0}, "num_embeddings must be at least 1, got 0"),
        ({"block_size": 128}, "block_size must be at most embedding_dim=100, got 128"),
        ({"block_size": 25, "pool_size": 24}, "pool_size must be at least block_size=25, got 24"),
        ({"pool_size": 2**32}, r"pool_size must be below 2\^32, got 4294967296"),
        ({"hash_seed": -1}, "hash_seed must be at least 0, got -1"),
        ({"hash_seed": 2**63}, "hash_seed must be at most 9223372036854775807, got 9223372036854775808"),
        ({"table_offset": -1}, "table_offset must be at least 0, got -1"),
        ({"num_embeddings": 2**60}, r"must be below 2\^63"),
        ({"num_embeddings": 2**63 - 5, "embedding_dim": 1, "table_offset": 5}, r"must be below 2\^63"),
        ({"num_embeddings": 2**61, "embedding_dim": 7, "block_size": 2}, r"must be below 2\^63"),
        ({"pool_size": 8.5}, "pool_size must be an integer, got 8.5"),
        ({"pool_size": float("nan")}, "pool_size must be an integer, got nan"),
        ({"block_size": True}, "block_size must be an integer, got True"),
        ({"block_size": 2.5}, "block_size must be an integer, got 2.5"),
        ({"signed": 2}, "signed must be True or False, got 2"),
    ],
)
def test_impossible_tables_are_refused(change, message):
    sizes = {"num_embeddings": 63, "embedding_dim": 100, "pool_size": 1000}
    with pytest.raises(ValueError, match=message):
        HashSpec(**{**sizes, **change})


def test_tables_at_the_limits_exist():
    for sizes in ((2**63 - 6, 1, 1, 1, 2**63 - 1, False, 5), (2**61 - 1, 7, 2**32 - 1, 2)):
        spec = HashSpec(*sizes)
        place, _ = spec.locate(spec.num_embeddings - 1, spec.embedding_dim - 1)
        assert 0 <= place < spec.pool_size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FullSpec(2**32 + 1, 4), "num_embeddings must be at most 4294967296, got 4294967297"),
        (lambda: FullSpec(5, 0), "embedding_dim must be at least 1, got 0"),
        (lambda: PairDropout(1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: PairDropout(float("nan")), r"dropout must lie in \[0, 1\), got nan"),
    ],
)
def test_what_else_kernels_take_is_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_entries_outside_the_table_are_refused():
    with pytest.raises(IndexError, match=r"entry \(10, 0\) lies outside the table of 10 rows and 4 columns"):
        HashSpec(10, 4, 100).locate(10, 0)
