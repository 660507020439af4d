import dataclasses
import importlib
import os
import re
import subprocess
import sys

import numba
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import long
from numba import njit

from cemb import ops, reference
from cemb.hashing import GOLDEN, FullSpec, HashSpec, PairDropout, mix
from cemb.kernels import cache, cpu
from cemb.kernels.cpu import conflicts, locate, rules, updates
from cemb.kernels.cpu.pairs import Batch
from cemb.study import records

SPECS = [
    HashSpec(63, 100, 1000, block_size=block, signed=signed, hash_seed=5)
    for block in (1, 7, 25, 100)
    for signed in (False, True)
] + [HashSpec(1, 1, 1), HashSpec(10**9, 3, 50, block_size=2, table_offset=2**35)]


def _pool(spec, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(spec.pool_size, generator=generator, dtype=dtype)


def _ids(spec, *shape):
    return torch.randint(spec.num_embeddings, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", SPECS)
def test_lookup_equals_the_specification(spec):
    pool, ids = _pool(spec), _ids(spec, 5)
    expected = [
        [
            sign * pool[index].item()
            for index, sign in (spec.locate(row, k) for k in range(spec.embedding_dim))
        ]
        for row in ids.tolist()
    ]
    assert ops.hashed_lookup(pool, ids, spec).tolist() == expected


@pytest.mark.parametrize("dim", [1, 7, 16, 100])
def test_places_in_groups_of_keys_are_the_specification(dim):
    find = njit(lambda places, key, table: locate.find_places(places, key, table))
    spec = HashSpec(10**6, dim, 262_144)
    keys = [0, 1, 15, 16, 2**30 - 50, 2**34 - 3, 2**64 - 60, 2**63 + 2**40 + 2**31 + 7, *map(mix, range(50))]
    for key in keys:
        places = np.zeros(dim + 2 * locate.LANES, np.uint32)
        find(places, np.uint64(key), locate.Geometry.of(spec))
        hashes = [mix((key + j) % 2**64) for j in range(dim)]
        expected = [(h >> 32) * spec.num_starts >> 32 for h in hashes]
        assert places[locate.FIRST :][:dim].tolist() == expected, key


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *long(torch.float64, torch.float16)])
def test_lookup_equals_the_reference_bit_for_bit(spec, dtype):
    pool, ids = _pool(spec, dtype), _ids(spec, 4, 9)
    assert torch.equal(ops.hashed_lookup(pool, ids, spec), reference.hashed_lookup(pool, ids, spec))


def _rounding(counts, sizes, dtype):
    """How far sums of so many products, of magnitudes that sum to `sizes`, may be off in any order.

    Each addition and each product rounds by half an epsilon, which is taken twice: the exact sum rounds, too.
    """
    info = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype)
    return (counts + 2) * (info.eps * sizes + info.tiny)


def _unsigned(spec):
    return dataclasses.replace(spec, signed=False) if isinstance(spec, HashSpec) else spec


def _scattered(spec, ids, rows):
    """The gradient of a lookup by the reference, in float64."""
    pool = torch.zeros(spec.pool_size, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(reference.hashed_lookup(pool, ids, spec), pool, rows.double())[0]


def _repeated(ids):
    """As many ids, all the first one."""
    return ids.flatten()[0].expand(ids.shape)


MANY_TERMS = HashSpec(63, 257, 24_107)  # few collisions, so that one repeated id makes long sums


@pytest.mark.parametrize("spec", [*SPECS, MANY_TERMS])
@pytest.mark.parametrize("private_pool_limit", [0, 2**22])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradient_is_close_to_float64(spec, private_pool_limit, threads, monkeypatch):
    monkeypatch.setattr(locate, "PRIVATE_POOL_LIMIT", private_pool_limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pool, ids = _pool(spec).requires_grad_(), _ids(spec, 300)
    ids = _repeated(ids) if spec is MANY_TERMS else ids
    upstream = torch.randn(300, spec.embedding_dim, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad(ops.hashed_lookup(pool, ids, spec), pool, upstream)
    exact = _scattered(spec, ids, upstream)
    plain = _unsigned(spec)
    counts, sizes = (_scattered(plain, ids, x) for x in (torch.ones_like(upstream), upstream.abs()))
    assert ((grad - exact).abs() <= _rounding(counts, sizes, torch.float32)).all()


@pytest.mark.parametrize("private_pool_limit", [0, 2**22])
def test_kernels_write_every_value_and_no_other(private_pool_limit, monkeypatch):
    monkeypatch.setattr(locate, "PRIVATE_POOL_LIMIT", private_pool_limit)
    spec = HashSpec(50, 11, 40, block_size=4, signed=True)
    ids = _ids(spec, 33).numpy()
    out = np.full((33, 11), np.nan, np.float32)
    cpu.lookup.lookup(_pool(spec).numpy(), ids, spec, out)
    assert not np.isnan(out).any()
    # Windows at either end must stay inside: the pool is a slice of a poisoned array.
    padded = np.full(60, np.nan, np.float32)
    padded[10:50] = 0
    cpu.lookup.scatter(np.ones_like(out), ids, spec, padded[10:50])
    assert np.isnan(padded[:10]).all()
    assert np.isnan(padded[50:]).all()
    assert not np.isnan(padded[10:50]).any()


def test_unsigned_gradient_conserves_its_sum():
    spec = HashSpec(1000, 30, 77, block_size=7)
    upstream = torch.rand(500, 30, dtype=torch.float64)
    pool = _pool(spec, torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(ops.hashed_lookup(pool, _ids(spec, 500), spec), pool, upstream)
    assert torch.isclose(grad.sum(), upstream.sum(), rtol=1e-12)


@pytest.mark.parametrize("block_size", [1, 3])
def test_gradcheck_twice(block_size):
    spec = HashSpec(20, 5, 17, block_size=block_size, signed=True)
    pool, ids = _pool(spec, torch.float64).requires_grad_(), _ids(spec, 4)
    assert torch.autograd.gradcheck(lambda w: ops.hashed_lookup(w, ids, spec), pool)
    assert torch.autograd.gradgradcheck(lambda w: ops.hashed_lookup(w, ids, spec) ** 2, pool)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_shapes(shape, dtype):
    spec = HashSpec(63, 10, 99)
    pool, ids = _pool(spec).requires_grad_(), _ids(spec, *shape).to(dtype)
    out = ops.hashed_lookup(pool, ids, spec)
    assert out.shape == (*shape, 10)
    out.sum().backward()
    assert pool.grad.sum() == out.numel()


def test_strided_inputs():
    spec = HashSpec(63, 10, 50)
    pool, ids = _pool(HashSpec(1, 1, 100))[::2], _ids(spec, 6, 8).T[::2]
    assert not pool.is_contiguous()
    assert not ids.is_contiguous()
    expected = ops.hashed_lookup(pool.contiguous(), ids.contiguous(), spec)
    assert torch.equal(ops.hashed_lookup(pool, ids, spec), expected)
    # An expanded gradient has stride 0.
    pool = pool.detach().requires_grad_()
    ops.hashed_lookup(pool, ids, spec).sum().backward()
    assert pool.grad.sum() == ids.numel() * 10


@pytest.mark.parametrize("bad", [-1, 63, 2**40])
@pytest.mark.parametrize("lookup", [ops.hashed_lookup, reference.hashed_lookup])
def test_ids_out_of_range(bad, lookup):
    spec = HashSpec(63, 10, 50)
    with pytest.raises(IndexError, match=rf"ids must lie in \[0, 63\), the rows of the table, got .*{bad}"):
        lookup(_pool(spec), torch.tensor([3, bad]), spec)


def test_wrong_types_and_shapes():
    spec = HashSpec(63, 10, 50)
    pool, ids = _pool(spec), torch.tensor([1])
    with pytest.raises(TypeError, match=r"ids must be int32 or int64, got torch.float32"):
        ops.hashed_lookup(pool, ids.float(), spec)
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch.int64"):
        ops.hashed_lookup(pool.long(), ids, spec)
    with pytest.raises(ValueError, match=r"weight must have shape \[50\], the pool, got \[49\]"):
        ops.hashed_lookup(pool[1:], ids, spec)
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        ops.hashed_lookup(pool, ids.to("meta"), spec)


def test_repeats_give_the_same_bits():
    spec = HashSpec(10**6, 100, 5000)
    ids, upstream = _ids(spec, 2000), torch.randn(2000, 100)
    pool = _pool(spec).requires_grad_()
    grads = [torch.autograd.grad(ops.hashed_lookup(pool, ids, spec), pool, upstream)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_owned_slices_give_the_same_bits_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(locate, "PRIVATE_POOL_LIMIT", 0)
    spec = HashSpec(10**6, 100, 5000, block_size=7)
    ids, upstream = _ids(spec, 500).numpy(), np.random.default_rng(0).random((500, 100), np.float32)
    pools = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        pools.append(np.zeros(5000, np.float32))
        cpu.lookup.scatter(upstream, ids, spec, pools[-1])
    assert np.array_equal(*pools)


def test_several_threads_may_look_up_at_once():
    from concurrent.futures import ThreadPoolExecutor

    spec = HashSpec(10**6, 100, 5000)
    pool, ids = _pool(spec), _ids(spec, 3000)
    expected = ops.hashed_lookup(pool, ids, spec)
    with ThreadPoolExecutor(4) as executor:
        results = executor.map(lambda _: ops.hashed_lookup(pool, ids, spec), range(16))
        assert all(torch.equal(result, expected) for result in results)


def test_torch_keeps_its_number_of_threads():
    code = (
        "import torch; torch.set_num_threads(1); from cemb import HashedEmbedding; "
        "HashedEmbedding(9, 4, pool_size=20)(torch.tensor([1])); "
        "raise SystemExit(torch.get_num_threads() != 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_opcheck():
    spec = HashSpec(20, 5, 17, block_size=2, signed=True)
    pool, ids = _pool(spec).requires_grad_(), _ids(spec, 4)
    table = ops.encode(spec)
    torch.library.opcheck(torch.ops.cemb.hashed_lookup.default, (pool, ids, table))
    grad = torch.randn(4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.cemb.hashed_scatter.default, (grad, ids, 17, table))


def test_pair_dropout_keeps_what_it_says():
    drop = PairDropout(0.1, seed=3)
    vectors = torch.ones(4, 2, 5)
    # Two hashes of four parts each serve five components.
    hashes = [[mix(i * 2 + g + mix(3 + GOLDEN)) for g in range(2)] for i in range(4)]
    mask = [
        [(h[j // 4] >> 16 * (j % 4)) & 0xFFFF >= round((1 - 0.81) * 2**16) for j in range(5)] for h in hashes
    ]
    expected = torch.tensor(mask).sum(1) / 0.81
    torch.testing.assert_close(reference.vector_scores(vectors, drop), expected)


@pytest.mark.parametrize("p", [0.999999, 1e-9])
def test_extreme_dropout_stays_a_16_bit_threshold(p):
    assert 0 <= PairDropout(p).threshold < 2**16


@pytest.mark.parametrize("shape", [(0, 2, 5), (3, 2, 1), (63, 2, 100), (9, 2, 33)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *long(torch.float64)])
def test_vector_scores_equal_the_reference(shape, p, dtype):
    vectors = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(9)
    scores = ops.vector_scores(vectors, p)
    torch.manual_seed(9)
    drop = PairDropout(p, int(torch.randint(2**62, ())) if p else 0)
    upstream = torch.randn(shape[0], dtype=dtype)
    (grad,) = torch.autograd.grad(scores, vectors, upstream)
    exact_vectors = vectors.detach().double().requires_grad_()
    exact = reference.vector_scores(exact_vectors, drop)
    (exact_grad,) = torch.autograd.grad(exact, exact_vectors, upstream.double())
    sizes = reference.vector_scores(exact_vectors.abs(), drop)
    for ours, truth, count, size in (
        (scores, exact, shape[-1], sizes),
        (grad, exact_grad, 1, exact_grad.abs()),
    ):
        stored = 2 * size * torch.finfo(dtype).eps  # bfloat16 rounds products, too
        assert ((ours - truth).abs() <= _rounding(count, size, dtype) + stored).all()


def test_vector_scores_overwrite_every_value():
    vectors = np.random.default_rng(0).random((9, 2, 7), np.float32)
    out = np.full_like(vectors, np.nan)
    slopes = np.ones(9, np.float32)
    batch = Batch.of(np.empty((0, 2), np.int64), PairDropout(0.5), np.float32, slopes=slopes)
    cpu.vectors.gradient(vectors, batch, out)
    assert not np.isnan(out).any()


def test_vector_scores_gradcheck():
    vectors = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)

    def seeded(x):
        torch.manual_seed(1)
        return ops.vector_scores(x, 0.4)

    assert torch.autograd.gradcheck(seeded, vectors)
    torch.library.opcheck(torch.ops.cemb.vector_scores.default, (vectors.detach(), 0.4, torch.tensor(7)))


def test_pair_dropout_has_the_moments_of_two_masks():
    torch.manual_seed(0)
    p, n, dim = 0.3, 4000, 50
    scores = ops.vector_scores(torch.ones(n, 2, dim, dtype=torch.float64), p)
    keep = (1 - p) ** 2
    variance = dim * (1 / keep - 1)
    assert abs(scores.mean() - dim) < 5 * (variance / n) ** 0.5
    assert abs(scores.var() / variance - 1) < 5 * (2 / n) ** 0.5
    assert not torch.equal(scores, ops.vector_scores(torch.ones(n, 2, dim, dtype=torch.float64), p))


def test_bad_vectors_are_refused():
    with pytest.raises(ValueError, match=r"vectors must have shape \[n, 2, dim\], got \[3, 4\]"):
        ops.vector_scores(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        ops.vector_scores(torch.ones(3, 2, 4), 1)


PAIR_SPECS = [
    *SPECS,
    HashSpec(500, 100, 2**20, block_size=25, signed=True),
    HashSpec(500, 101, 2**20, signed=True),
    FullSpec(63, 100),
    FullSpec(9, 1),
]


def _context_offset(spec):
    return 0 if isinstance(spec, FullSpec) else spec.table_offset + 77


def _exact(weight, pairs, spec, drop, upstream):
    """Scores and gradient of the reference, by autograd, in the dtype of the weight."""
    weight = weight.detach().clone().requires_grad_()
    scores = reference.pair_scores(weight, pairs, spec, _context_offset(spec), drop)
    (grad,) = torch.autograd.grad(scores, weight, upstream.to(weight.dtype))
    return scores.detach(), grad


def _rounding_of_pairs(weight, pairs, spec, drop, upstream, dtype):
    """Bounds on the errors of scores and gradient."""
    plain, offset = _unsigned(spec), _context_offset(spec)
    weight, upstream = weight.detach().double().abs(), upstream.double().abs()
    scores = reference.pair_scores(weight, pairs, plain, offset, drop)
    sizes = reference.pair_scores_backward(upstream, weight, pairs, plain, offset, drop)
    ones = torch.ones_like(upstream), torch.ones_like(weight)
    counts = reference.pair_scores_backward(*ones, pairs, plain, offset, PairDropout(0.0))
    return _rounding(spec.embedding_dim, scores, dtype), _rounding(counts, sizes, dtype)


@pytest.mark.parametrize("spec", [*PAIR_SPECS, MANY_TERMS])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("private_pool_limit", [0, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *long(torch.bfloat16, torch.float16)])
def test_pair_scores_are_close_to_float64(spec, p, private_pool_limit, dtype, monkeypatch):
    monkeypatch.setattr(locate, "PRIVATE_POOL_LIMIT", private_pool_limit)
    weight, pairs = _pool(spec, dtype).requires_grad_(), _ids(spec, 61, 2)
    pairs = _repeated(pairs) if spec is MANY_TERMS else pairs
    upstream = torch.randn(61, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(4)
    scores = ops.pair_scores(weight, pairs, spec, context_offset=_context_offset(spec), dropout=p)
    (grad,) = torch.autograd.grad(scores, weight, upstream.to(dtype))
    torch.manual_seed(4)
    drop = PairDropout(p, int(torch.randint(2**62, ())) if p else 0)
    upstream = upstream.to(dtype).float()
    exact = _exact(weight.double(), pairs, spec, drop, upstream)
    bounds = _rounding_of_pairs(weight, pairs, spec, drop, upstream, dtype)
    for ours, truth, bound in zip((scores.detach(), grad), exact, bounds, strict=True):
        assert ours.dtype == dtype
        stored = truth.abs() * torch.finfo(dtype).eps
        assert ((ours - truth).abs() <= bound + stored).all()


def _batch(pairs, dropout=0.1, slopes=None):
    """A batch with slopes, by default normal ones."""
    if slopes is None:
        slopes = np.random.default_rng(0).standard_normal(len(pairs)).astype(np.float32)
    return Batch.of(pairs, PairDropout(dropout), slopes.dtype, slopes=slopes)


@pytest.mark.parametrize("number", [2, 3, 3000])
@pytest.mark.parametrize("block_size", [1, 7, 25])
def test_sums_have_the_same_bits_for_any_number_of_threads(number, block_size, monkeypatch):
    monkeypatch.setattr(locate, "PRIVATE_POOL_LIMIT", 0)
    spec = HashSpec(1000, 100, 4000, block_size=block_size, signed=True)
    weight, batch = _pool(spec).numpy(), _batch(_ids(spec, 200, 2).numpy())
    found = []
    for threads_now in (1, number):
        monkeypatch.setattr(cpu.threads, "_set_threads", lambda threads_now=threads_now: threads_now)
        dense, stepped = np.ones(4000, np.float32), weight.copy()
        updates.step([dense], rules.Add(), weight, batch, spec, 5, updates.plan(spec))
        updates.step([stepped], rules.SGD(0.1), stepped, batch, spec, 5, updates.plan(spec))
        found.append((dense, stepped))
    np.testing.assert_array_equal(*found)
    # Summed in private pools, which round otherwise.
    private = np.ones(4000, np.float32)
    updates.step([private], rules.Add(), weight, batch, spec, 5, "private")
    np.testing.assert_allclose(found[0][0], private, rtol=1e-4, atol=1e-4)


IN_BLOCKS = [spec for spec in PAIR_SPECS if not spec.is_single]  # single values go to buckets


@pytest.mark.parametrize("spec", [*IN_BLOCKS, HashSpec(50, 2500, 9000, block_size=1100)])
def test_sums_of_conflicting_blocks_are_the_gradient(spec):
    weight, pairs = _pool(spec), _ids(spec, 300, 2)
    upstream = torch.randn(300, generator=torch.Generator().manual_seed(2))
    batch = _batch(pairs.numpy(), 0.0, upstream.numpy())
    for memory in cpu.threads._scratch.__dict__.values():  # what is not written must not be used
        memory.fill(np.nan if memory.dtype.kind == "f" else 123)
    found, before = torch.full((spec.pool_size,), 3.0), weight.clone()
    updates.step(
        [found.numpy()], rules.Add(), weight.numpy(), batch, spec, _context_offset(spec), "conflicts"
    )
    assert torch.equal(weight, before)
    drop = PairDropout(0.0)
    exact = _exact(weight.double(), pairs, spec, drop, upstream)[1]
    bound = _rounding_of_pairs(weight, pairs, spec, drop, upstream, torch.float32)[1]
    # Sums begin at 3.
    assert ((found - 3 - exact).abs() <= bound + (3 + exact.abs()) * torch.finfo(torch.float32).eps).all()


CONFLICT_SPECS = [
    FullSpec(700, 12),
    HashSpec(10_000, 100, 400_000, block_size=25),
    HashSpec(10_000, 30, 100_000, block_size=8),
    HashSpec(10_000, 100, 400_000, block_size=64),
    HashSpec(10_000, 20, 200_000, block_size=17),
]


def _stepped_workspace(spec, pairs, number, monkeypatch):
    """The workspace after a step that moves nothing."""
    monkeypatch.setattr(cpu.threads, "_set_threads", lambda: number)
    workspace = conflicts.Workspace.of(len(pairs), spec, np.dtype(np.float32), number)
    for memory in (workspace.ranks, workspace.entries):
        memory.fill(123)  # what an earlier step left
    made = []
    of = conflicts.Workspace.of
    monkeypatch.setattr(conflicts.Workspace, "of", lambda *sizes: made.append(of(*sizes)) or made[-1])
    weight, batch = _pool(spec).numpy(), _batch(pairs, 0.0, np.ones(len(pairs), np.float32))
    updates.step([weight], rules.SGD(0.0), weight, batch, spec, 0, "conflicts")
    return made[-1]


@pytest.mark.parametrize("number", [1, 2, 3, 3000])  # the last: with many borders of slices
@pytest.mark.parametrize("spec", CONFLICT_SPECS, ids=lambda spec: f"{type(spec).__name__}-{spec.block_size}")
def test_blocks_that_overlap_others_are_told_and_summed(spec, number, monkeypatch):
    pairs = _ids(spec, 150, 2).numpy()
    dense = np.zeros(spec.pool_size, np.int64)
    blocks, extents = {}, {}
    for (i, side), row in np.ndenumerate(pairs):
        for b in range(spec.num_blocks):
            columns = range(b * spec.block_size, min((b + 1) * spec.block_size, spec.embedding_dim))
            blocks[i, side, b] = [spec.locate(int(row), column)[0] for column in columns]
            # A block that is read short counts as a whole one.
            first = blocks[i, side, b][0]
            extents[i, side, b] = slice(first, first + spec.block_size)
            dense[extents[i, side, b]] += 1
    workspace = _stepped_workspace(spec, pairs, number, monkeypatch)
    overlapping = {key for key, extent in extents.items() if (dense[extent] > 1).any()}
    assert {tuple(key) for key in np.argwhere(workspace.ranks != -1)} == overlapping
    ranks = workspace.ranks[workspace.ranks != -1]
    assert len(np.unique(ranks)) == len(overlapping)
    assert workspace.terms.size >= (ranks.max() + 1) * spec.block_size
    assert len(blocks) - len(overlapping) > 100
    assert len(overlapping) > 10
    # Each block is summed by all threads into whose slices it reaches.
    block_bits = (spec.num_blocks - 1).bit_length()
    unit = spec.embedding_dim if isinstance(spec, FullSpec) else 1
    reached = {key: [] for key in overlapping}
    for t in range(number):
        for entry in workspace.keys[t, 0, : workspace.counts[t]].tolist():
            code = entry & 0xFFFFFFFF
            i, side, b = code >> (block_bits + 1), (code >> block_bits) & 1, code & ((1 << block_bits) - 1)
            reached[i, side, b].append(range(workspace.cuts[t] * unit, workspace.cuts[t + 1] * unit))
    for key, slices in reached.items():
        assert all(any(place in own for own in slices) for place in blocks[key])


@pytest.mark.parametrize("number", [2, 3, 8])
def test_threads_share_the_sums_of_frequent_rows(number, monkeypatch):
    spec = FullSpec(10_000, 12)
    # Frequent words stand at one end of the table, frequent contexts at the other.
    pairs = np.random.default_rng(0).integers(100, size=(2**14, 2))
    pairs[:, 1] += spec.num_embeddings - 100
    workspace = _stepped_workspace(spec, pairs, number, monkeypatch)
    assert workspace.counts.sum() == 2**15
    assert workspace.counts.max() <= 1.2 * 2**15 / number


_sort = njit(lambda keys, spare, count, bits, high: conflicts._sort(keys, spare, count, bits, high))


@pytest.mark.parametrize(
    ("num_bits", "high_bits"),
    [(1, 1), (9, 9), (11, 11), (12, 12), (12, 3), (20, 20), (26, 26), (26, 16), (26, 20), (33, 33), (32, 23)],
)
@pytest.mark.parametrize("count", [0, 1, 2, 300, 5000])
@pytest.mark.parametrize("spread", ["even", "repeated", "close"])
def test_blocks_are_sorted_by_where_they_start(num_bits, high_bits, count, spread):
    rng = np.random.default_rng(num_bits)
    # Starts take 32 bits of a key.
    largest = 2 ** min(num_bits, 32) - 1
    starts = rng.choice(rng.integers(largest + 1, size=7 if spread == "repeated" else 2 * count + 1), count)
    if spread == "close":
        starts = np.minimum(starts.min(initial=largest) + rng.integers(40, size=count), largest)
    codes = rng.permutation(count).astype(np.uint64)
    keys = (starts.astype(np.uint64) << 32) | codes
    expected = keys[np.argsort(starts, kind="stable")]
    keys, spare = np.append(keys, np.uint64(5)), np.full(count + 1, 6, np.uint64)
    found = _sort(keys, spare, count, num_bits, high_bits)
    np.testing.assert_array_equal(found[:count], expected)
    assert found[count] in (5, 6)


@pytest.mark.parametrize("low", [0, 2**31])
def test_overlaps_at_the_end_of_the_largest_pool_are_found(low):
    spec = HashSpec(1000, 100, 2**32 - 1, block_size=25)
    starts = [5, 2**31 + 40, 2**31 + 60, 2**32 - 100, spec.pool_size - 30, spec.pool_size - 25]
    # Start above, pair and side and one of four blocks below; all are first blocks of words.
    listed = np.array([(start << 32) | (i << 3) for i, start in enumerate(starts)], np.uint64)
    ranks, keys = np.full((6, 2, 4), -1, np.int32), np.zeros((1, 2, 7), np.uint64)
    cuts, counts = np.array([low, 2**32 - 1]), np.zeros(1, np.int64)
    workspace = conflicts.Workspace(np.empty(0, np.float32), ranks, keys, listed, cuts, counts)
    njit(lambda workspace, table: conflicts.sort_chunk(np.int64(0), workspace, table))(
        workspace, locate.Geometry.of(spec)
    )
    found = [(int(entry) >> 32) + max(low - 48, 0) for entry in keys[0, 0, : counts[0]]]
    assert found == [starts[i] for i in (1, 2, 4, 5)]
    assert ranks[:, 0, 0].tolist() == [-1, 0, 0, -1, 0, 0]
    assert (ranks >= 0).sum() == 4


def test_pair_gradients_stay_inside_the_pool():
    spec = HashSpec(50, 11, 40, block_size=4, signed=True)
    weight, batch = _pool(spec).numpy(), _batch(_ids(spec, 33, 2).numpy(), 0.1, np.ones(33, np.float32))
    padded = np.full(60, np.nan, np.float32)
    padded[10:50] = 0
    updates.step([padded[10:50]], rules.Add(), weight, batch, spec, 9, updates.plan(spec))
    assert np.isnan(padded[:10]).all()
    assert np.isnan(padded[50:]).all()
    assert not np.isnan(padded[10:50]).any()


@pytest.mark.parametrize("block_size", [1, 3])
def test_pair_scores_gradcheck(block_size):
    spec = HashSpec(20, 5, 17, block_size=block_size, signed=True)
    pool, pairs = _pool(spec, torch.float64).requires_grad_(), _ids(spec, 6, 2)

    def seeded(weight):
        torch.manual_seed(1)
        return ops.pair_scores(weight, pairs, spec, context_offset=20, dropout=0.3)

    assert torch.autograd.gradcheck(seeded, pool)
    arguments = (pool.detach(), pairs, ops.encode(spec), 20, 0.3, torch.tensor(7))
    torch.library.opcheck(torch.ops.cemb.pair_scores.default, arguments)
    grad = torch.randn(6, dtype=torch.float64)
    torch.library.opcheck(torch.ops.cemb.pair_scores_backward.default, (grad, *arguments))


def test_pair_scores_take_any_stride_and_type():
    spec = HashSpec(63, 10, 50, block_size=3)
    pool, pairs = _pool(HashSpec(1, 1, 100))[::2], _ids(spec, 2, 12).T[::2]
    expected = ops.pair_scores(pool.contiguous(), pairs.contiguous(), spec)
    assert torch.equal(ops.pair_scores(pool, pairs, spec), expected)
    assert torch.equal(ops.pair_scores(pool, pairs.int(), spec), expected)
    assert ops.pair_scores(pool, pairs[:0], spec).shape == (0,)


def test_bad_pairs_are_refused():
    spec = HashSpec(63, 10, 50)
    with pytest.raises(ValueError, match="a full table has no context offset, got 3"):
        ops.pair_scores(
            torch.ones(5, 4), torch.zeros(2, 2, dtype=torch.long), FullSpec(5, 4), context_offset=3
        )
    with pytest.raises(ValueError, match=r"pairs must have shape \[n, 2\], got \[4\]"):
        ops.pair_scores(_pool(spec), torch.tensor([1, 2, 3, 4]), spec)
    with pytest.raises(IndexError, match=r"ids must lie in \[0, 63\), .* got ids from 3 to 63"):
        ops.pair_scores(_pool(spec), torch.tensor([[3, 63]]), spec)
    with pytest.raises(TypeError, match=r"pairs must be int32 or int64, got torch.float32"):
        ops.pair_scores(_pool(spec), torch.ones(3, 2), spec)
    with pytest.raises(ValueError, match=r"must hold the 4 × 5 values of the table, got shape \[3, 5\]"):
        ops.pair_scores(torch.ones(3, 5), torch.tensor([[0, 1]]), FullSpec(4, 5))


def test_backends():
    assert ops.backend(torch.device("cpu"), torch.float32) == "numba"
    assert ops.backend(torch.device("cpu"), torch.bfloat16) == "numba"
    assert ops.backend(torch.device("cpu"), torch.float16) == "torch"
    assert ops.backend(torch.device("cuda"), torch.bfloat16) == "triton"
    assert ops.backend(torch.device("cuda"), torch.float64) == "torch"
    assert ops.backend(torch.device("meta"), torch.float32) == "torch"


@pytest.fixture
def module_with_a_kernel(tmp_path, monkeypatch):
    """Imports anew a module whose kernel calls a function of another file in its folder."""
    (tmp_path / "of_a_test.py").write_text(
        "from cemb.kernels.cache import cached\nfrom callee import step\n\n\n"
        "@cached()\ndef run(x):\n    return step(x)\n"
    )
    (tmp_path / "callee.py").write_text("import numba\n\n\n@numba.njit\ndef step(x):\n    return x + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load():
        for name in ("callee", "of_a_test"):
            sys.modules.pop(name, None)
        cache._stamp.cache_clear()
        return importlib.import_module("of_a_test").run

    yield load
    for name in ("callee", "of_a_test"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("folder", ["__pycache__", "elsewhere"])
def test_kernels_are_kept_for_the_contents_of_their_sources(
    folder, module_with_a_kernel, tmp_path, monkeypatch
):
    if folder == "elsewhere":
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / folder))
    first, again = module_with_a_kernel(), module_with_a_kernel()
    assert first(1) == again(1) == 2
    assert [sum(run.stats.cache_hits.values()) for run in (first, again)] == [0, 1]
    source = tmp_path / "callee.py"
    before = source.stat()
    source.write_text(source.read_text().replace("+ 1", "+ 5"))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert module_with_a_kernel()(1) == 6
    assert module_with_a_kernel()(1) == 6
    assert len([*tmp_path.rglob("*.nbc")]) == 1


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" + data[1:]])
def test_damaged_files_of_kernels_are_compiled_anew(kind, damage, module_with_a_kernel, tmp_path):
    assert module_with_a_kernel()(1) == 2
    (path,) = tmp_path.rglob(f"*.{kind}")
    path.write_bytes(damage(path.read_bytes()))
    for hits in (0, 1):
        run = module_with_a_kernel()
        assert run(1) == 2
        assert sum(run.stats.cache_hits.values()) == hits


def test_what_kernels_contain_is_among_their_sources():
    """Modules of cemb that those with kernels import, of which a kernel may inline a function."""
    package = records.PACKAGE
    with_kernels = [
        path
        for path in package.rglob("*.py")
        if re.search(r"@(numba\.)?njit|@cached|@jit|@intrinsic", path.read_text())
    ]
    assert package / "pmi" / "cooccurrence.py" in with_kernels
    for path in with_kernels:
        assert "cache=True" not in path.read_text(), path
        contained = {
            package / folder.replace(".", "/") / f"{name.split(' as ')[0].strip()}.py"
            for folder, module, names in re.findall(
                r"from cemb\.(kernels\.cpu|pmi)(?:\.(\w+))? import (.*)", path.read_text()
            )
            for name in ([module] if module else names.split(","))
        }
        sources = set(cache.sources_of(path.parent))
        assert {package / "hashing.py", package / "kernels" / "cpu" / "simd.py", path} <= sources
        if path.parent.name in ("cpu", "pmi"):
            assert {found for found in contained if found.exists()} <= sources


ENTRY_SPEC = HashSpec(20, 6, 40, block_size=3)


def _arrays(dtype, **shapes):
    integers = {"ids": np.int64, "pairs": np.int64}
    return {name: np.zeros(shape, integers.get(name, dtype)) for name, shape in shapes.items()}


def _labelled(pairs, **wanted):
    return Batch.of(pairs, PairDropout(0.0), np.float32, **wanted)


def _step(rule, own, weight, pairs, states, **wanted):
    updates.step([own, *states], rule, weight, _labelled(pairs, **wanted), ENTRY_SPEC, 0, "private")


def _multiply(dense, out, factor, sums):
    blocks = cpu.sparse_product.Blocks.of(sp.csr_array(np.eye(5, 4, dtype=np.float32)), 4)
    cpu.sparse_product.product(blocks, dense, cpu.sparse_product.Workspace(factor, sums), out)


POOL, PAIRS, VECTORS = {"weight": 40}, {"pairs": (7, 2)}, {"vectors": (7, 2, 6)}
ENTRIES = {
    "lookup": (
        lambda weight, ids, out: cpu.lookup.lookup(weight, ids, ENTRY_SPEC, out),
        {**POOL, "ids": 7, "out": (7, 6)},
    ),
    "scatter": (
        lambda grad, ids, pool: cpu.lookup.scatter(grad, ids, ENTRY_SPEC, pool),
        {"grad": (7, 6), "ids": 7, "pool": 40},
    ),
    "pair scores": (
        lambda weight, pairs, scores: cpu.pairs.score(weight, _labelled(pairs), ENTRY_SPEC, 0, scores),
        {**POOL, **PAIRS, "scores": 7},
    ),
    "sums": (
        lambda own, weight, pairs, slopes: _step(rules.Add(), own, weight, pairs, [], slopes=slopes),
        {"own": 40, **POOL, **PAIRS, "slopes": 7},
    ),
    "steps": (
        lambda own, weight, pairs, mean, square, targets, sample_weights: _step(
            rules.Adam(0.1, 1e-8, 0.9, 0.99), own, weight, pairs, [mean, square],
            targets=targets, sample_weights=sample_weights,
        ),
        {"own": 40, **POOL, **PAIRS, "mean": 40, "square": 40, "targets": 7, "sample_weights": 7},
    ),
    "vector scores": (
        lambda vectors, scores: cpu.vectors.score(vectors, _labelled(np.empty((0, 2), np.int64)), scores),
        {**VECTORS, "scores": 7},
    ),
    "vector gradients": (
        lambda vectors, slopes, out: cpu.vectors.gradient(
            vectors, _labelled(np.empty((0, 2), np.int64), slopes=slopes), out
        ),
        {**VECTORS, "slopes": 7, "out": (7, 2, 6)},
    ),
    "sparse products": (_multiply, {"dense": (4, 6), "out": (5, 6), "factor": (1, 64), "sums": (1, 80)}),
}  # fmt: skip
WRONG = {
    "larger": lambda array: np.zeros(np.add(array.shape, 1), array.dtype),
    "smaller": lambda array: np.zeros(np.subtract(array.shape, 1), array.dtype),
    "of another dtype": lambda array: array.astype(np.float16),
    "strided": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
}


@pytest.mark.parametrize(
    ("entry", "name"), [(entry, name) for entry, (_, shapes) in ENTRIES.items() for name in shapes]
)
@pytest.mark.parametrize("kind", WRONG)
def test_kernels_take_arrays_of_one_shape_and_dtype(entry, name, kind, monkeypatch):
    def unchecked():
        raise AssertionError("a kernel was launched")

    for module in (cpu.lookup, cpu.pairs, cpu.vectors, cpu.sparse_product, cpu.threads):
        monkeypatch.setattr(module, "launch", unchecked)
    call, shapes = ENTRIES[entry]
    arrays = _arrays(np.float32, **shapes)
    with pytest.raises(AssertionError, match="a kernel was launched"):
        call(**arrays)
    with pytest.raises(ValueError, match=r"must be contiguous .* \[.*\], got .* \["):
        call(**{**arrays, name: WRONG[kind](arrays[name])})


def test_slopes_of_a_callers_loss_are_checked():
    weight, pairs = np.zeros(40, np.float32), np.zeros((7, 2), np.int64)
    for how in ("private", "conflicts"):
        with pytest.raises(ValueError, match=r"slopes must be contiguous float32 \[7\], got float32 \[6\]"):
            updates.step(
                [weight],
                rules.SGD(0.1),
                weight,
                _labelled(pairs),
                ENTRY_SPEC,
                0,
                how,
                lambda scores: scores[1:],
            )
    with pytest.raises(ValueError, match="SGD has 0 states, got 1 arrays"):
        updates.step([weight, weight], rules.SGD(0.1), weight, _labelled(pairs), ENTRY_SPEC, 0, "private")


def test_ops_called_by_name_are_checked():
    spec, full = HashSpec(63, 10, 50), FullSpec(5, 4)
    called = torch.ops.cemb
    with pytest.raises(ValueError, match=r"pool_size be 50, got \[2, 10\] and 51"):
        called.hashed_scatter(torch.ones(2, 10), torch.tensor([0, 1]), 51, ops.encode(spec))
    with pytest.raises(ValueError, match=r"grad must have shape \[3, 10\] .*, got \[2, 10\]"):
        called.hashed_scatter(torch.ones(2, 10), torch.tensor([0, 1, 2]), 50, ops.encode(spec))
    with pytest.raises(IndexError, match=r"got ids from 5 to 5"):
        called.hashed_scatter(torch.ones(1, 4), torch.tensor([5]), 20, ops.encode(full))
    rest = ops.encode(full), 0, 0.0, torch.tensor(0)
    with pytest.raises(IndexError, match=r"got ids from 0 to 2097152"):
        called.pair_scores_backward(torch.ones(1), torch.ones(20), torch.tensor([[0, 2**21]]), *rest)
    with pytest.raises(ValueError, match=r"slopes must be contiguous float32 \[2\], got float32 \[1\]"):
        called.pair_scores_backward(torch.ones(1), torch.ones(20), torch.tensor([[0, 1]] * 2), *rest)
    with pytest.raises(ValueError, match=r"pairs must be contiguous int64 \[2, 2\], got int64 \[2, 3\]"):
        called.pair_scores(torch.ones(20), torch.ones(2, 3, dtype=torch.long), *rest)
    with pytest.raises(ValueError, match=r"vectors must be contiguous .* got float32 \[2, 3, 4\]"):
        called.vector_scores(torch.ones(2, 3, 4), 0.0, torch.tensor(0))
