import numpy as np
import pytest
import torch

from cemb import ops, reference
from cemb.hashing import GOLDEN, HashSpec, PairDropout, mix
from cemb.kernels import cpu

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


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lookup_equals_the_reference_bit_for_bit(spec, dtype):
    pool, ids = _pool(spec, dtype), _ids(spec, 4, 9)
    assert torch.equal(ops.hashed_lookup(pool, ids, spec), reference.hashed_lookup(pool, ids, spec))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("private_pool_limit", [0, 2**22])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradient_is_close_to_float64(spec, private_pool_limit, threads, monkeypatch):
    monkeypatch.setattr(cpu, "PRIVATE_POOL_LIMIT", private_pool_limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pool, ids = _pool(spec).requires_grad_(), _ids(spec, 300)
    upstream = torch.randn(300, spec.embedding_dim, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad(ops.hashed_lookup(pool, ids, spec), pool, upstream)
    (naive,) = torch.autograd.grad(reference.hashed_lookup(pool, ids, spec), pool, upstream)
    exact_pool = pool.detach().double().requires_grad_()
    exact_out = reference.hashed_lookup(exact_pool, ids, spec)
    (exact,) = torch.autograd.grad(exact_out, exact_pool, upstream.double())
    # A sum in another order may err as much as the naive one, not more.
    assert (grad - exact).abs().max() <= 2 * (naive - exact).abs().max() + 1e-5


@pytest.mark.parametrize("private_pool_limit", [0, 2**22])
def test_kernels_write_every_value_and_no_other(private_pool_limit, monkeypatch):
    monkeypatch.setattr(cpu, "PRIVATE_POOL_LIMIT", private_pool_limit)
    spec = HashSpec(50, 11, 40, block_size=4, signed=True)
    ids = _ids(spec, 33).numpy()
    out = np.full((33, 11), np.nan, np.float32)
    cpu.lookup(_pool(spec).numpy(), ids, spec, out)
    assert not np.isnan(out).any()
    # Windows at either end must stay inside: the pool is a slice of a poisoned array.
    padded = np.full(60, np.nan, np.float32)
    padded[10:50] = 0
    cpu.scatter(np.ones_like(out), ids, spec, padded[10:50])
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
    monkeypatch.setattr(cpu, "PRIVATE_POOL_LIMIT", 0)
    spec = HashSpec(10**6, 100, 5000, block_size=7)
    ids, upstream = _ids(spec, 500).numpy(), np.random.default_rng(0).random((500, 100), np.float32)
    pools = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        pools.append(np.zeros(5000, np.float32))
        cpu.scatter(upstream, ids, spec, pools[-1])
    assert np.array_equal(*pools)


def test_several_threads_may_look_up_at_once():
    from concurrent.futures import ThreadPoolExecutor

    spec = HashSpec(10**6, 100, 5000)
    pool, ids = _pool(spec), _ids(spec, 3000)
    expected = ops.hashed_lookup(pool, ids, spec)
    with ThreadPoolExecutor(4) as executor:
        results = executor.map(lambda _: ops.hashed_lookup(pool, ids, spec), range(16))
        assert all(torch.equal(result, expected) for result in results)


def test_opcheck():
    spec = HashSpec(20, 5, 17, block_size=2, signed=True)
    pool, ids = _pool(spec).requires_grad_(), _ids(spec, 4)
    table = (20, 5, 2, 0, True, 0)
    torch.library.opcheck(torch.ops.cemb.hashed_lookup.default, (pool, ids, *table))
    grad = torch.randn(4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.cemb.hashed_scatter.default, (grad, ids, 17, *table))


def test_pair_dropout_keeps_what_it_says():
    drop = PairDropout(0.1, seed=3)
    vectors = torch.ones(4, 2, 5)
    kept = [
        [mix(i * 5 + j + mix(3 + GOLDEN)) >> 32 >= round((1 - 0.81) * 2**32) for j in range(5)]
        for i in range(4)
    ]
    expected = torch.tensor(kept).sum(1) / 0.81
    torch.testing.assert_close(reference.pair_scores(vectors, drop), expected)


@pytest.mark.parametrize("shape", [(0, 2, 5), (3, 2, 1), (63, 2, 100)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pair_scores_equal_the_reference(shape, p, dtype):
    vectors = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(9)
    scores = ops.pair_scores(vectors, p)
    torch.manual_seed(9)
    seed = int(torch.randint(2**62, ())) if p else 0
    expected = reference.pair_scores(vectors, PairDropout(p, seed))
    torch.testing.assert_close(scores, expected)
    upstream = torch.randn(shape[0], dtype=dtype)
    (grad,) = torch.autograd.grad(scores, vectors, upstream)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, vectors, upstream)[0])


def test_pair_scores_overwrite_every_value():
    vectors = np.random.default_rng(0).random((9, 2, 7), np.float32)
    out = np.full_like(vectors, np.nan)
    cpu.pair_scores_backward(np.ones(9, np.float32), vectors, PairDropout(0.5), out)
    assert not np.isnan(out).any()


def test_pair_scores_gradcheck():
    vectors = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)

    def seeded(x):
        torch.manual_seed(1)
        return ops.pair_scores(x, 0.4)

    assert torch.autograd.gradcheck(seeded, vectors)
    torch.library.opcheck(torch.ops.cemb.pair_scores.default, (vectors.detach(), 0.4, torch.tensor(7)))


def test_pair_dropout_has_the_moments_of_two_masks():
    torch.manual_seed(0)
    p, n, dim = 0.3, 4000, 50
    scores = ops.pair_scores(torch.ones(n, 2, dim, dtype=torch.float64), p)
    keep = (1 - p) ** 2
    variance = dim * (1 / keep - 1)
    assert abs(scores.mean() - dim) < 5 * (variance / n) ** 0.5
    assert abs(scores.var() / variance - 1) < 5 * (2 / n) ** 0.5
    assert not torch.equal(scores, ops.pair_scores(torch.ones(n, 2, dim, dtype=torch.float64), p))


def test_bad_pairs_are_refused():
    with pytest.raises(ValueError, match=r"vectors must have shape \[n, 2, dim\], got \[3, 4\]"):
        ops.pair_scores(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        ops.pair_scores(torch.ones(3, 2, 4), 1)


def test_backends():
    assert ops.backend(torch.device("cpu"), torch.float32) == "numba"
    assert ops.backend(torch.device("cpu"), torch.bfloat16) == "torch"
    assert ops.backend(torch.device("cuda"), torch.float32) == "torch"
