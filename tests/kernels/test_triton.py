"""The Triton kernels: on a GPU where there is one, and by Triton's interpreter elsewhere."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import long

if not torch.cuda.is_available():
    # Triton reads this when it is imported; imported earlier, it would want a GPU.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1"
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton")

import scipy.sparse as sp  # noqa: E402
import triton.language as tl  # noqa: E402

from cemb import HashedEmbedding, reference  # noqa: E402
from cemb.hashing import GOLDEN, MULTIPLIER_1, MULTIPLIER_2, FullSpec, HashSpec, PairDropout, mix  # noqa: E402
from cemb.kernels import triton as kernels_triton  # noqa: E402
from cemb.model import build_model  # noqa: E402
from cemb.study import bandwidths_gpu, speed  # noqa: E402
from cemb.study.timing import Clock  # noqa: E402
from cemb.train.loops import make_optimizer  # noqa: E402
from cemb.train.losses import mse_loss  # noqa: E402
from cemb.train.objective import AllCellsLoss  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, *long(torch.bfloat16, torch.float16)]
SPECS = [
    HashSpec(63, 100, 1000, block_size=block, signed=signed, hash_seed=5)
    for block in (1, 7, 25, 100)
    for signed in (False, True)
] + [
    HashSpec(1, 1, 1),
    HashSpec(10**9, 3, 50, block_size=2, table_offset=2**35),
    # Blocks of more than `MAX_WIDTH` columns, the last one short.
    HashSpec(40, 300, 500, block_size=290, signed=True),
    HashSpec(2**61, 2, 30, signed=True, table_offset=2**60, hash_seed=7),
    FullSpec(23, 37),
]


NO_DROPOUT = PairDropout(0.0)


def _dropout(p, seed=5):
    return PairDropout(p, seed)


def _seed(dropout):
    return torch.tensor(dropout.seed, device=DEVICE)


def _seed_of(salt):
    """The seed with this salt: `mix` run backwards."""
    x = salt
    for shift, factor in ((31, MULTIPLIER_2), (27, MULTIPLIER_1), (30, 1)):
        x ^= (x >> shift) ^ (x >> 2 * shift)
        x = x * pow(factor, -1, 2**64) % 2**64
    return kernels_triton._int64((x - GOLDEN) % 2**64)


def _kept(n, dim, dropout):
    """The mask ``[n, dim]``, in Python integers: four components share a hash, 16 bits each."""
    groups = -(-dim // 4)
    hashes = [[mix(i * groups + group + dropout.salt) for group in range(groups)] for i in range(n)]
    kept = [[row[j // 4] >> 16 * (j % 4) & 0xFFFF >= dropout.threshold for j in range(dim)] for row in hashes]
    return torch.tensor(kept, dtype=torch.bool, device=DEVICE).reshape(n, dim)


def _randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _ids(spec, *shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(spec.num_embeddings, shape, generator=generator).to(DEVICE)


def _poisoned(*shape, dtype=torch.float32):
    """A view of a given shape in the middle of a larger buffer, both full of NaN."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 64,), torch.nan, dtype=dtype, device=DEVICE)
    return buffer[32 : 32 + size].view(shape), buffer


def _assert_written(view, buffer):
    assert not view.isnan().any()
    assert buffer.isnan().sum() == 64


def _exact_scatter(grad, ids, spec, dtype=torch.float64):
    indices, signs = reference.locate(ids, spec)
    values = grad.to(dtype) if signs is None else grad.to(dtype) * signs
    pool = torch.zeros(spec.pool_size, dtype=dtype, device=DEVICE)
    return pool.index_add_(0, indices.reshape(-1), values.reshape(-1))


def _naive_scores(weight, pairs, spec, context_offset, dropout):
    word = reference.hashed_lookup(weight, pairs[:, 0], spec)
    context = reference.hashed_lookup(weight, pairs[:, 1], spec, context_offset)
    return (word * context * _kept(len(pairs), spec.embedding_dim, dropout)).sum(1) * dropout.scale


def _naive_gradient(grad, weight, *rest, dtype):
    weight = weight.to(dtype).requires_grad_()
    return torch.autograd.grad(_naive_scores(weight, *rest), weight, grad.to(dtype))[0]


def _context_offset(spec):
    if isinstance(spec, FullSpec):
        return 0
    return spec.table_offset + spec.num_embeddings if spec.num_embeddings < 2**60 else 3


def _assert_as_close(result, naive, exact):
    # A sum in another order may err as much as the naive one, not more.
    assert (result - exact).abs().max() <= 2 * (naive - exact).abs().max() + 1e-5


@triton.jit
def _locate_kernel(
    ids, starts, signs, base, num_starts, NUM_BLOCKS: tl.constexpr, SIGNED: tl.constexpr, COUNT: tl.constexpr
):
    i = tl.arange(0, COUNT)
    start, sign = kernels_triton._locate(tl.load(ids + i), i, base, num_starts, 1, NUM_BLOCKS, SIGNED, True)
    tl.store(starts + i, start)
    tl.store(signs + i, sign)


@pytest.mark.parametrize("pool_size", [1, 2**31 + 7, 2**32 - 1])
@pytest.mark.parametrize("table_offset", [0, 2**57])
def test_locations_in_large_pools_and_tables(pool_size, table_offset):
    spec = HashSpec(2**57, 16, pool_size, hash_seed=2, signed=True, table_offset=table_offset)
    ids, starts, signs = _ids(spec, 16), _ids(spec, 16), _randn(16)
    base = kernels_triton._base(spec, table_offset)
    _locate_kernel[(1,)](ids, starts, signs, base, spec.num_starts, NUM_BLOCKS=16, SIGNED=1, COUNT=16)
    expected = [spec.locate(row, column) for column, row in enumerate(ids.tolist())]
    assert list(zip(starts.tolist(), signs.tolist(), strict=True)) == expected


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *long(torch.float16)])
def test_lookup_equals_the_reference_bit_for_bit(spec, dtype):
    weight, _ = _poisoned(spec.pool_size, dtype=dtype)
    weight.copy_(_randn(spec.pool_size))
    ids = _ids(spec, 37)
    out, buffer = _poisoned(37, spec.embedding_dim, dtype=dtype)
    kernels_triton.lookup(weight, ids, spec, out)
    assert torch.equal(out, reference.hashed_lookup(weight, ids, spec))
    _assert_written(out, buffer)


@pytest.mark.parametrize("spec", SPECS)
def test_lookup_reads_the_specified_indices(spec):
    ids = _ids(spec, 13)
    out, _ = _poisoned(13, spec.embedding_dim)
    kernels_triton.lookup(torch.arange(spec.pool_size, dtype=torch.float32, device=DEVICE), ids, spec, out)
    expected = [[spec.locate(row, j) for j in range(spec.embedding_dim)] for row in ids.tolist()]
    assert out.tolist() == [[index * sign for index, sign in row] for row in expected]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_scatter_is_close_to_float64(spec, dtype, deterministic):
    ids, grad = _ids(spec, 90), _randn(90, spec.embedding_dim, dtype=dtype)
    pool = kernels_triton.scatter(grad, ids, spec, deterministic)
    assert pool.dtype == torch.float32
    exact, naive = _exact_scatter(grad, ids, spec), _exact_scatter(grad, ids, spec, torch.float32)
    _assert_as_close(pool, naive, exact)
    if deterministic:
        # Half a unit for every term, and the rounding of the sum.
        fixed_point = grad.numel() ** 2 * grad.abs().max().double() * 2.0**-61
        assert ((pool - exact).abs() <= exact.abs() * 2**-24 + fixed_point).all()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_scores_are_close_to_float64(spec, p, dtype):
    weight, _ = _poisoned(spec.pool_size, dtype=dtype)
    weight.copy_(_randn(spec.pool_size))
    table = _ids(spec, 43, 2), spec, _context_offset(spec), _dropout(p)
    scores, buffer = _poisoned(43, dtype=dtype)
    kernels_triton.pair_scores(weight, *table, _seed(table[3]), scores)
    exact, naive = _naive_scores(weight.double(), *table), _naive_scores(weight.float(), *table)
    # One unit in the last place of the dtype that scores are stored in: the interpreter truncates.
    stored = exact.abs() * torch.finfo(dtype).eps
    assert ((scores - exact).abs() <= 2 * (naive - exact).abs().max() + stored + 1e-5).all()
    _assert_written(scores, buffer)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, *long(torch.bfloat16)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_pair_gradient_is_close_to_float64(spec, p, dtype, deterministic):
    weight, grad = _randn(spec.pool_size, dtype=dtype), _randn(43, dtype=dtype, seed=3)
    table = _ids(spec, 43, 2), spec, _context_offset(spec), _dropout(p)
    pool = kernels_triton.pair_scores_backward(grad, weight, *table, _seed(table[3]), deterministic)
    assert pool.dtype == torch.float32
    exact = _naive_gradient(grad, weight, *table, dtype=torch.float64)
    _assert_as_close(pool, _naive_gradient(grad, weight, *table, dtype=torch.float32), exact)


@pytest.mark.parametrize("dim", [1, 4, 11, 70])
@pytest.mark.parametrize("blocks", ["one", "all"])
def test_dropout_keeps_what_it_says(dim, blocks):
    # One row of one block is the pool itself. Pair i adds 2^i to each component that it keeps.
    block_size = dim if blocks == "one" else 1
    spec = HashSpec(1, dim, dim if blocks == "one" else 1, block_size=block_size)
    seed = _seed_of(2**64 - 9)
    dropout = SimpleNamespace(seed=seed, salt=mix(seed + GOLDEN), threshold=2**15, scale=0.5)
    assert dropout.salt == 2**64 - 9
    powers = 2.0 ** torch.arange(16, device=DEVICE)
    pairs = torch.zeros(16, 2, dtype=torch.int64, device=DEVICE)
    weight = torch.ones(spec.pool_size, device=DEVICE)
    pool = kernels_triton.pair_scores_backward(powers, weight, pairs, spec, 0, dropout, _seed(dropout), False)
    sums = (_kept(16, dim, dropout) * powers[:, None]).sum(0)
    assert torch.equal(pool, sums if blocks == "one" else sums.sum(0, keepdim=True))
    scores, _ = _poisoned(16)
    kernels_triton.pair_scores(weight, pairs, spec, 0, dropout, _seed(dropout), scores)
    assert torch.equal(scores, _kept(16, dim, dropout).sum(1) / 2)


@pytest.mark.parametrize("block_size", [1, 7, 11])
@pytest.mark.parametrize("deterministic", [False, True])
def test_pools_are_written_inside_only(block_size, deterministic, monkeypatch):
    spec = HashSpec(50, 11, 40, block_size=block_size, signed=True)
    buffers = []

    def padded_pool(spec, like, scale):
        # Negative zero would even show that +0.0 was added.
        size = spec.pool_size + 20
        buffer = (
            torch.full((size,), -77, device=DEVICE) if deterministic else -torch.zeros(size, device=DEVICE)
        )
        buffer[10:-10] = 0
        buffers.append((buffer, buffer.clone()))
        return buffer[10:-10]

    monkeypatch.setattr(kernels_triton, "_new_pool", padded_pool)
    ids, grad = _ids(spec, 133), _randn(133, 11)
    assert kernels_triton.scatter(grad, ids, spec, deterministic).any()
    pairs = ids[:132].view(66, 2)
    assert kernels_triton.pair_scores_backward(
        grad[:66, 0].contiguous(),
        _randn(40),
        pairs,
        spec,
        50,
        _dropout(0.2),
        _seed(_dropout(0.2)),
        deterministic,
    ).any()
    assert len(buffers) == 2
    for edge in (slice(10), slice(-10, None)):
        for buffer, before in buffers:
            assert torch.equal(buffer[edge].view(torch.uint8), before[edge].view(torch.uint8))


@pytest.mark.parametrize("block_size", [1, 7])
def test_deterministic_sums_do_not_depend_on_order(block_size):
    spec = HashSpec(1000, 20, 64, block_size=block_size, signed=True)
    ids, grad, weight = _ids(spec, 400), _randn(400, 20), _randn(64)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    pairs, upstream = ids.view(200, 2), grad[:200, 0].contiguous()
    pair_order = order[order < 200]

    def sums(deterministic):
        table = spec, 1000, NO_DROPOUT, None, deterministic
        yield kernels_triton.scatter(grad, ids, spec, deterministic)
        yield kernels_triton.scatter(grad[order], ids[order], spec, deterministic)
        yield kernels_triton.pair_scores_backward(upstream, weight, pairs, *table)
        yield kernels_triton.pair_scores_backward(upstream[pair_order], weight, pairs[pair_order], *table)

    scattered, scattered_in_order, gradient, gradient_in_order = sums(deterministic=True)
    assert torch.equal(scattered, scattered_in_order)
    assert torch.equal(gradient, gradient_in_order)
    # Floating point sums do depend on it, so the equalities say something.
    scattered, scattered_in_order, gradient, gradient_in_order = sums(deterministic=False)
    assert not torch.equal(scattered, scattered_in_order)
    assert not torch.equal(gradient, gradient_in_order)


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e30])
def test_deterministic_sums_of_any_magnitude(magnitude):
    spec = HashSpec(1000, 20, 64)
    ids, grad = _ids(spec, 100), _randn(100, 20) * magnitude
    exact = _exact_scatter(grad, ids, spec)
    torch.testing.assert_close(
        kernels_triton.scatter(grad, ids, spec, True).double(), exact, rtol=1e-6, atol=1e-44
    )


def test_deterministic_sums_round_terms_to_nearest():
    # Two large values fix the unit, the largest for its bound, and cancel; the others are 3/4 of it.
    unit = 1024 * 2.0**-60
    grad = torch.full((1024, 1), 0.75 * unit, device=DEVICE)
    grad[0], grad[1] = 1, -1
    pool = kernels_triton.scatter(
        grad, torch.zeros(1024, dtype=torch.int64, device=DEVICE), HashSpec(1, 1, 1), True
    )
    assert pool.item() == 1022 * unit


# NumPy warns of the cast of NaN, which the kernel's caller discards.
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_deterministic_sums_show_what_is_not_finite(bad):
    spec = HashSpec(10, 4, 9)
    grad = torch.ones(3, 4, device=DEVICE)
    grad[1, 2] = bad
    assert kernels_triton.scatter(grad, _ids(spec, 3), spec, True).isnan().all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_empty_inputs(deterministic):
    spec = HashSpec(63, 10, 50, block_size=4)
    weight, ids, pairs = _randn(50), _ids(spec, 0), _ids(spec, 0, 2)
    kernels_triton.lookup(weight, ids, spec, torch.empty(0, 10, device=DEVICE))
    kernels_triton.pair_scores(weight, pairs, spec, 63, NO_DROPOUT, None, torch.empty(0, device=DEVICE))
    none = torch.empty(0, device=DEVICE)
    pools = [
        kernels_triton.scatter(torch.empty(0, 10, device=DEVICE), ids, spec, deterministic),
        kernels_triton.pair_scores_backward(none, weight, pairs, spec, 63, NO_DROPOUT, None, deterministic),
    ]
    for pool in pools:
        assert torch.equal(pool, torch.zeros(50, device=DEVICE))


@pytest.mark.parametrize("shape", [(1, 2, 1), (43, 2, 7), (70, 2, 100)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_scores_and_gradient_are_close_to_float64(shape, p, dtype):
    vectors, grad, dropout = _randn(*shape, dtype=dtype), _randn(shape[0], dtype=dtype, seed=3), _dropout(p)
    scores, score_buffer = _poisoned(shape[0], dtype=dtype)
    gradient, gradient_buffer = _poisoned(*shape, dtype=dtype)
    kernels_triton.vector_scores(vectors, dropout, _seed(dropout), scores)
    kernels_triton.vector_scores_backward(grad, vectors, dropout, _seed(dropout), gradient)
    kept = _kept(shape[0], shape[2], dropout)

    def naive(wide):
        rows = vectors.to(wide).requires_grad_()
        sums = (rows[:, 0] * rows[:, 1] * kept).sum(1) * dropout.scale
        return sums.detach(), torch.autograd.grad(sums, rows, grad.to(wide))[0]

    for ours, single, exact in zip(
        (scores, gradient), naive(torch.float32), naive(torch.float64), strict=True
    ):
        stored = exact.abs() * torch.finfo(dtype).eps
        assert ((ours - exact).abs() <= 2 * (single - exact).abs().max() + stored + 1e-5).all()
    _assert_written(scores, score_buffer)
    _assert_written(gradient, gradient_buffer)


def _murmur_finalizer(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (25, 1), (100, 100)])
@pytest.mark.parametrize("shape", [(2048, 8), *long((512, 2))])
def test_floors_read_and_add_what_they_say(length, stride, shape):
    array, n = torch.arange(500, dtype=torch.float32, device=DEVICE), 4099
    num_places = (500 - length) // stride + 1
    starts = torch.tensor([(_murmur_finalizer(i) * num_places >> 32) * stride for i in range(n)])
    places = (starts[:, None] + torch.arange(length)).reshape(-1).to(DEVICE)
    sums, _ = _poisoned(bandwidths_gpu.num_programs(n, length, shape))
    bandwidths_gpu.launch_segments(array, n, length, stride, sums, shape)
    assert sums.double().sum() == array.double()[places].sum()
    before = array.clone()
    bandwidths_gpu.launch_segments(array, n, length, stride, None, shape)
    assert torch.equal(array - before, torch.bincount(places, minlength=500).float())


needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("table", ["full", "full-fused", "hashed"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_models_train_as_on_the_cpu(table, optimizer):
    pool = {"pool_size": 5000, "block_size": 25, "signed": True} if table == "hashed" else {}
    pairs, values = torch.randint(300, (4, 500, 2)), torch.randn(4, 500)

    def train(device):
        torch.manual_seed(0)
        model = build_model(table, 300, 100, **pool)
        model = model.to(device).train()
        step_of = make_optimizer(optimizer, model.parameters(), 0.01)
        losses = []
        for batch, wanted in zip(pairs, values, strict=True):
            loss = mse_loss(model(batch.to(device)), wanted.to(device))
            loss.backward()
            step_of.step()
            step_of.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses), next(model.parameters()).detach().cpu()

    losses, weight = train("cpu")
    gpu_losses, gpu_weight = train("cuda")
    torch.testing.assert_close(gpu_losses, losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gpu_weight, weight, rtol=1e-3, atol=1e-5)


@needs_gpu
def test_the_exact_loss_is_that_of_the_cpu():
    matrix = sp.random_array((300, 200), density=0.1, rng=0, format="csr", dtype="float32")
    words, contexts = torch.randn(300, 20), torch.randn(200, 20)
    found = [
        torch.autograd.functional.vjp(AllCellsLoss(matrix, device), (words.to(device), contexts.to(device)))
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4, check_device=False)


@needs_gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler's modules
def test_hashed_embedding_compiles_whole():
    table = HashedEmbedding(1000, 20, pool_size=500, block_size=4, device="cuda")
    ids = torch.randint(1000, (70,), device="cuda")
    compiled = torch.compile(table, fullgraph=True)
    assert torch.equal(compiled(ids), table(ids))
    (expected,) = torch.autograd.grad(table(ids).square().sum(), table.weight)
    (found,) = torch.autograd.grad(compiled(ids).square().sum(), table.weight)
    torch.testing.assert_close(found, expected)


@needs_gpu
def test_deterministic_algorithms_give_the_same_bits():
    model = build_model("hashed", 1000, 100, pool_size=300, dropout=0.1, device="cuda")
    pairs = torch.randint(1000, (5000, 2), device="cuda")

    def gradient():
        torch.manual_seed(0)
        return torch.autograd.grad(model(pairs).square().sum(), model.word_table.weight)[0]

    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(gradient(), gradient())
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
def test_a_captured_step_draws_dropout_anew():
    model = build_model(
        "hashed", 1000, 100, pool_size=3000, block_size=25, dropout=0.5, device="cuda"
    ).train()
    pairs = torch.randint(1000, (500, 2), device="cuda")
    with torch.no_grad():
        for _ in range(2):
            model(pairs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scores = model(pairs)
        graph.replay()
        first = scores.clone()
        graph.replay()
        assert not torch.equal(scores, first)


@needs_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam"])
def test_a_captured_step_trains(optimizer):
    sizes = {"num_embeddings": 50, "embedding_dim": 8, "batch_size": 64, "dropout": 0.0, "device": "cuda"}
    case = speed.SpeedCase("hashed", optimizer, 64, **sizes)
    replayed, stepped = speed.Timed(case), speed.Timed(case)
    replayed.graph_ms(repeats=5)
    # Three steps to warm up on the first batch; the capture runs none; replays take the batches in turn.
    for batch in (0, 0, 0, 0, 1, 2, 3, 0):
        stepped._calls = batch
        stepped(Clock("cuda"))
    weights = [next(timed._score.parameters()) for timed in (replayed, stepped)]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("call", ["table(ids)", "table.pair_scores(ids.view(1, 2), table, 0.1)"])
def test_ids_out_of_range_trip_a_device_assert(call):
    code = (
        "import torch; from cemb import HashedEmbedding; "
        "table = HashedEmbedding(10, 4, pool_size=20, device='cuda'); "
        f"ids = torch.tensor([3, 10], device='cuda'); {call}; torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@needs_gpu
def test_speed_records_of_a_gpu():
    sizes = {"num_embeddings": 50, "embedding_dim": 8, "batch_size": 64, "device": "cuda"}
    cases = [speed.SpeedCase("full", "sgd", **sizes), speed.SpeedCase("hashed", "sgd", 64, **sizes)]
    for record in speed.measure_cases(cases, repeats=2):
        assert 0 < record["device_ms"] < record["total_ms"] + 1
        assert record["graph_ms"] > 0
        assert record["backend"] == ("torch" if record["table"] == "full" else "triton")
        assert record["peak_mib"] >= 0


ENTRY_SPEC = HashSpec(20, 6, 40, block_size=3)
POOL, IDS, PAIRS, VECTORS = {"weight": (40,)}, {"ids": (7,)}, {"pairs": (7, 2)}, {"vectors": (7, 2, 6)}
DROPOUT = PairDropout(0.5), torch.tensor(3, device=DEVICE)
ENTRIES = {
    "lookup": (
        lambda weight, ids, out: kernels_triton.lookup(weight, ids, ENTRY_SPEC, out),
        {**POOL, **IDS, "out": (7, 6)},
    ),
    "scatter": (
        lambda grad, ids: kernels_triton.scatter(grad, ids, ENTRY_SPEC, False),
        {"grad": (7, 6), **IDS},
    ),
    "pair scores": (
        lambda weight, pairs, scores: kernels_triton.pair_scores(
            weight, pairs, ENTRY_SPEC, 0, *DROPOUT, scores
        ),
        {**POOL, **PAIRS, "scores": (7,)},
    ),
    "pair gradients": (
        lambda grad, weight, pairs: kernels_triton.pair_scores_backward(
            grad, weight, pairs, ENTRY_SPEC, 0, *DROPOUT, False
        ),
        {"grad": (7,), **POOL, **PAIRS},
    ),
    "vector scores": (
        lambda vectors, scores: kernels_triton.vector_scores(vectors, *DROPOUT, scores),
        {**VECTORS, "scores": (7,)},
    ),
    "vector gradients": (
        lambda grad, vectors, out: kernels_triton.vector_scores_backward(grad, vectors, *DROPOUT, out),
        {"grad": (7,), **VECTORS, "out": (7, 2, 6)},
    ),
}
WRONG = {
    "larger": lambda x: x.new_zeros([size + 1 for size in x.shape]),
    "of another dtype": lambda x: x.to(torch.int32),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "elsewhere": lambda x: x.to("meta"),
}


@pytest.mark.parametrize(
    ("entry", "name"), [(entry, name) for entry, (_, shapes) in ENTRIES.items() for name in shapes]
)
@pytest.mark.parametrize("kind", WRONG)
def test_kernels_take_tensors_of_one_shape_dtype_and_device(entry, name, kind):
    call, shapes = ENTRIES[entry]
    dtypes = {"ids": torch.int64, "pairs": torch.int64}
    tensors = {key: torch.zeros(shape, dtype=dtypes.get(key), device=DEVICE) for key, shape in shapes.items()}
    call(**tensors)
    with pytest.raises(ValueError, match=r"must be contiguous .* got|must be on one device, got \w+, \w+"):
        call(**{**tensors, name: WRONG[kind](tensors[name])})


# Calls every function with a launch that compiles for a GPU, which need not be there, instead of running.
COMPILE = """
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cemb.hashing import HashSpec
from cemb.kernels import triton as kernels_triton

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int64: "*i64"}


def type_of(x):
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype]
    return "fp32" if isinstance(x, float) else "i32" if -(2**31) <= x < 2**31 else "i64"


def compile_for_gpu(self, *args, grid, warmup, **constants):
    values = dict(zip(self.arg_names, args), **constants)
    constant = {p.name for p in self.params if p.is_constexpr or values[p.name] is None}
    signature = {name: "constexpr" if name in constant else type_of(values[name]) for name in self.arg_names}
    source = ASTSource(self, signature, {name: values[name] for name in constant})
    kernel = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert kernel.asm["cubin"]
    print("compiled")


JITFunction.run = compile_for_gpu
ids, pairs = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64)
seed = torch.tensor(-1)
for spec in (
    HashSpec(63, 100, 1000),
    HashSpec(63, 100, 1000, block_size=7, signed=True, table_offset=2**40),
    HashSpec(63, 700, 1000, block_size=600),
):
    for dtype in (torch.float32, torch.bfloat16):
        weight, rows = torch.ones(1000, dtype=dtype), torch.ones(3, spec.embedding_dim, dtype=dtype)
        kernels_triton.lookup(weight, ids, spec, rows)
        vectors = torch.ones(3, 2, spec.embedding_dim, dtype=dtype)
        for threshold in (0, 2**14):
            dropout = SimpleNamespace(threshold=threshold, scale=1.25)
            kernels_triton.vector_scores(vectors, dropout, seed, weight[:3])
            kernels_triton.vector_scores_backward(weight[:3], vectors, dropout, seed, vectors)
            kernels_triton.pair_scores(weight, pairs, spec, 63, dropout, seed, weight[:3])
        for deterministic in (False, True):
            kernels_triton.scatter(rows, ids, spec, deterministic)
            table = pairs, spec, 63, dropout, seed
            kernels_triton.pair_scores_backward(weight[:3], weight, *table, deterministic)
"""


def test_kernels_compile_for_a_gpu(tmp_path):
    backends = pytest.importorskip("triton.backends").backends
    if "nvidia" not in backends or not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this Triton cannot assemble for NVIDIA's GPUs")
    # Another process: in this one, kernels may be interpreted.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("compiled") == 3 * 2 * 11
