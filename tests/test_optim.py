import copy

import numpy as np
import pytest
import torch
from conftest import long
from torch import nn

from cemb import ops, optim, reference
from cemb.hashing import FullSpec, HashSpec, PairDropout
from cemb.kernels import cpu
from cemb.kernels.cpu import buckets, conflicts, locate, rules, threads, updates
from cemb.kernels.cpu.pairs import Batch
from cemb.memory import advise_huge_pages
from cemb.optim import SquaredError

SPECS = [
    FullSpec(60, 100),
    HashSpec(60, 100, 3000, block_size=25, signed=True),
    HashSpec(60, 100, 50_000, block_size=8),
    HashSpec(60, 100, 3000, block_size=3),
    HashSpec(60, 100, 3000, signed=True),
    HashSpec(60, 7, 300, signed=True, table_offset=2**40),
    HashSpec(3000, 100, locate.PRIVATE_POOL_LIMIT + 50, block_size=25, signed=True),  # few blocks overlap
    HashSpec(60, 100, locate.PRIVATE_POOL_LIMIT + 1, signed=True),  # values in buckets, the last almost empty
]
IDS = [f"{type(spec).__name__}-{spec.block_size}-{spec.pool_size}" for spec in SPECS]
SUMMED_APART = [spec for spec in SPECS if optim.plan(spec).sums != "private"]
OFFSET = 10**6


@pytest.fixture(autouse=True)
def float64():
    """Results are compared closely, and kernels, which compile for seconds, are compiled for one type.

    Each loop is tried with few rules as well, one of them with states; `make test-long` tries all.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def poison_scratch():
    """Fill what kernels left in this thread's scratch memory."""
    for held in threads._scratch.__dict__.values():
        held.fill(np.nan if held.dtype.kind == "f" else 123)


def _parameter(spec, start):
    shape = (spec.num_embeddings, spec.embedding_dim) if isinstance(spec, FullSpec) else (-1,)
    return nn.Parameter(start.view(shape))


def _power(scores, values):
    return (scores - values).abs().pow(1.5).mean()


def _fit(make, spec, *, steps=4, num_pairs=70, dtype=torch.float64, naive=False):
    """Weights and losses of steps on squared errors and another loss; by naive PyTorch if so."""
    generator = torch.Generator().manual_seed(0)
    weight = _parameter(spec, (0.3 * torch.randn(spec.pool_size, generator=generator)).to(dtype))
    optimizer, losses = make([weight]), []
    offset = 0 if isinstance(spec, FullSpec) else OFFSET
    for step in range(steps):
        pairs = torch.randint(spec.num_embeddings, (num_pairs, 2), generator=generator)
        values, weights = torch.rand(2, num_pairs, generator=generator).to(dtype)
        loss = [
            SquaredError(values),
            SquaredError(values, weights),
            lambda scores, values=values: _power(scores, values),
        ][step % 3]
        torch.manual_seed(step)
        if naive:
            dropout = PairDropout(0.1, int(torch.randint(2**62, ())))
            value = loss(reference.pair_scores(weight.view(-1), pairs, spec, offset, dropout))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            poison_scratch()
            value = optimizer.pair_step(weight, pairs, loss, spec, context_offset=offset, dropout=0.1)
            assert weight.grad is None
        losses.append(value.detach())
    return weight.detach().view(-1), torch.stack(losses)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize("name", ["Adagrad", *long("SGD", "Adam")])
def test_a_pair_step_is_that_of_naive_pytorch(spec, name):
    if name == "Adam" and optim.plan(spec).sums == "conflicts":
        pytest.skip("Adam visits all values there, see below")
    found = _fit(lambda p: getattr(optim, name)(p, lr=0.05), spec)
    expected = _fit(lambda p: getattr(torch.optim, name)(p, lr=0.05), spec, naive=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_adam_of_a_small_pool_is_that_of_naive_pytorch():
    found = _fit(lambda p: optim.Adam(p, lr=0.05), SPECS[1])
    expected = _fit(lambda p: torch.optim.Adam(p, lr=0.05), SPECS[1], naive=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_a_pair_step_in_float32(spec):
    found = _fit(lambda p: optim.SGD(p, lr=0.05), spec, dtype=torch.float32)
    expected = _fit(lambda p: optim.SGD(p, lr=0.05), spec)
    torch.testing.assert_close(found, tuple(x.float() for x in expected), rtol=1e-4, atol=1e-5)


def test_options_of_adagrad_are_torchs():
    options = {"initial_accumulator_value": 0.3, "eps": 1e-3}
    for spec in (SPECS[0], SPECS[1]):
        found = _fit(lambda p: optim.Adagrad(p, 0.05, **options), spec)
        expected = _fit(lambda p: torch.optim.Adagrad(p, 0.05, **options), spec, naive=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_group_added_later_has_the_initial_sums_of_its_own():
    spec, weights = FullSpec(5, 4), [nn.Parameter(torch.ones(5, 4)) for _ in range(2)]
    optimizer = optim.Adagrad(weights[:1], 0.1, initial_accumulator_value=0.5)
    optimizer.add_param_group({"params": weights[1:], "initial_accumulator_value": 0.25})
    for weight in weights:
        optimizer.pair_step(weight, torch.tensor([[0, 1]]), SquaredError(torch.zeros(1)), spec)
    sums = [optimizer.state[weight]["sum"][4] for weight in weights]
    assert [float(total[0]) for total in sums] == [0.5, 0.25]


def test_lazy_adam_equals_sparse_adam_on_a_full_table():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, 20, generator=generator)
    ours, theirs = (
        nn.Parameter(start.clone()),
        nn.Embedding.from_pretrained(start.clone(), False, sparse=True),
    )
    lazy = optim.LazyAdam([ours], lr=0.02, betas=(0.8, 0.9), eps=1e-6)
    sparse = torch.optim.SparseAdam(theirs.parameters(), lr=0.02, betas=(0.8, 0.9), eps=1e-6)
    for step in range(8):
        pairs = torch.randint(50, (10, 2), generator=generator)
        if step % 2:
            lazy.pair_step(ours, pairs, SquaredError(torch.zeros(10)), FullSpec(50, 20))
        else:
            (ops.vector_scores(nn.functional.embedding(pairs, ours, sparse=True)) ** 2).mean().backward()
            lazy.step()
            lazy.zero_grad()
        (ops.vector_scores(theirs(pairs)) ** 2).mean().backward()
        sparse.step()
        sparse.zero_grad()
        torch.testing.assert_close(ours, theirs.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", [SPECS[2], *long(SPECS[6])], ids=lambda spec: str(spec.pool_size))
def test_lazy_adam_leaves_alone_what_a_batch_does_not_read(spec):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(spec.pool_size, generator=generator))
    naive = weight.detach().clone()
    mean, square = torch.zeros(2, spec.pool_size)
    lazy = optim.LazyAdam([weight], lr=0.02, betas=(0.8, 0.9), eps=1e-6)
    for step in range(1, 5):
        pairs = torch.randint(spec.num_embeddings, (20, 2), generator=generator)
        lazy.pair_step(weight, pairs, SquaredError(torch.zeros(20)), spec)
        leaf = naive.clone().requires_grad_()
        scores = reference.pair_scores(leaf, pairs, spec, 0, PairDropout(0.0))
        (gradient,) = torch.autograd.grad(scores.square().mean(), leaf)
        read = torch.zeros(spec.pool_size, dtype=torch.bool)
        read[reference.locate(pairs, spec)[0]] = True
        mean[read] += 0.2 * (gradient - mean)[read]
        square[read] += 0.1 * (gradient.square() - square)[read]
        rate = 0.02 * (1 - 0.9**step) ** 0.5 / (1 - 0.8**step)
        naive[read] -= (rate * mean / (square.sqrt() + 1e-6))[read]
        torch.testing.assert_close(weight.detach(), naive, rtol=1e-9, atol=1e-9)


def test_adam_refuses_tables_of_which_it_would_visit_all():
    for spec in (SPECS[0], SPECS[6]):
        weight = _parameter(spec, torch.zeros(spec.pool_size))
        with pytest.raises(ValueError, match=r"Adam visits all [\d,]+ values at each step: use LazyAdam"):
            optim.Adam([weight]).pair_step(weight, torch.tensor([[0, 1]]), SquaredError(torch.ones(1)), spec)


@pytest.mark.parametrize(("rows", "columns", "num_pairs"), [(60, 100, 40), (5000, 100, 300), (50, 7, 30)])
def test_rowwise_adagrad_is_the_formula(rows, columns, num_pairs):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows, columns, generator=generator)
    ours, naive = (nn.Parameter(start.clone()) for _ in range(2))
    optimizer = optim.RowwiseAdagrad([ours], 0.05, initial_accumulator_value=0.2, eps=1e-3)
    sums = torch.full((rows,), 0.2)
    for step in range(5):
        pairs = torch.randint(rows, (num_pairs, 2), generator=generator)
        loss = SquaredError(torch.ones(num_pairs))
        torch.manual_seed(step)
        if step == 3:
            loss(ops.pair_scores(ours, pairs, FullSpec(rows, columns), dropout=0.1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            poison_scratch()
            optimizer.pair_step(ours, pairs, loss, FullSpec(rows, columns), dropout=0.1)
        torch.manual_seed(step)
        loss(ops.pair_scores(naive, pairs, FullSpec(rows, columns), dropout=0.1)).backward()
        with torch.no_grad():
            sums += naive.grad.square().mean(1)
            naive -= 0.05 * naive.grad / (sums.sqrt() + 1e-3)[:, None]
        naive.grad = None
        torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)
    assert optimizer.state[ours]["sum"].shape == (rows,)
    torch.testing.assert_close(optimizer.state[ours]["sum"], sums)


def test_rowwise_adagrad_writes_no_gradient_behind_its_terms():
    spec, threads_now = FullSpec(10, 8), 1
    pairs = np.array([[0, 5], [0, 5], [0, 6]])  # of the last pair the word conflicts alone
    workspace = conflicts.Workspace.of(3, spec, np.dtype(np.float64), threads_now)
    terms = np.full(workspace.terms.size + 8, np.nan)
    workspace = workspace._replace(terms=terms[:-8])
    values, state = np.ones(80), np.zeros(10)
    batch = Batch.of(pairs, PairDropout(0.0), np.float64, slopes=np.ones(3))
    stepped = rules.Stepped(values, state, values)
    rule, table = rules.RowwiseAdagrad(0.1, 0.01), locate.Geometry.of(spec)
    updates._step_conflicts(rule, stepped, values, batch, workspace, table)
    assert np.isnan(terms[-8:]).all()
    sums = [9.0, 0, 0, 0, 0, 4, 1, 0, 0, 0]  # squares of 3, 2 and 1 gradients of ones
    np.testing.assert_allclose(state, sums)


def test_rowwise_adagrad_refuses_a_pool():
    pool = nn.Parameter(torch.ones(12))
    with pytest.raises(ValueError, match=r"tables \[rows, columns\], got shape \[12\]; a pool has no rows"):
        optim.RowwiseAdagrad([nn.Parameter(torch.ones(3, 4)), pool])
    optimizer = optim.RowwiseAdagrad([nn.Parameter(torch.ones(3, 4))])
    with pytest.raises(ValueError, match="a pool has no rows"):
        optimizer.add_param_group({"params": [pool]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"lr must lie in \[0, inf\), got -1"):
        optim.RowwiseAdagrad([nn.Parameter(torch.ones(3, 4))], lr=-1)


def test_rowwise_adagrad_refuses_a_parameter_of_another_shape_than_the_tables():
    weight = nn.Parameter(torch.ones(4, 200))
    optimizer = optim.RowwiseAdagrad([weight])
    with pytest.raises(
        ValueError, match=r"a parameter of the table's shape, one state for each row: got \[4, 200\]"
    ):
        optimizer.pair_step(weight, torch.tensor([[0, 19]]), SquaredError(torch.ones(1)), FullSpec(20, 40))
    assert (weight == 1).all()


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize("make", [optim.Adagrad, *long(optim.SGD, optim.LazyAdam)])
def test_results_are_the_same_for_any_number_of_threads(spec, make, monkeypatch):
    found = []
    for number in (1, 2, 3):
        monkeypatch.setattr(cpu.threads, "_set_threads", lambda number=number: number)
        found.append(_fit(lambda p: make(p, 0.1), spec, num_pairs=200, steps=3))
    for other in found[1:]:
        if spec in SUMMED_APART or make is optim.LazyAdam:
            assert torch.equal(other[0], found[0][0])
            torch.testing.assert_close(other[1], found[0][1], rtol=1e-12, atol=0)
        else:
            torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_rowwise_adagrad_has_the_same_bits_for_any_number_of_threads(monkeypatch):
    found = []
    for number in (1, 2, 300):
        monkeypatch.setattr(cpu.threads, "_set_threads", lambda number=number: number)
        weight = nn.Parameter(torch.randn(900, 20, generator=torch.Generator().manual_seed(0)))
        optimizer = optim.RowwiseAdagrad([weight], 0.1)
        for step in range(2):
            pairs = torch.randint(900, (200, 2), generator=torch.Generator().manual_seed(step))
            optimizer.pair_step(weight, pairs, SquaredError(torch.zeros(200)), FullSpec(900, 20))
        found.append(weight.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_only_what_was_read_changes():
    spec = HashSpec(10**6, 100, locate.PRIVATE_POOL_LIMIT + 1, block_size=25)
    weight = nn.Parameter(torch.zeros(spec.pool_size).uniform_(-1, 1))
    before = weight.detach().clone()
    optimizer = optim.Adagrad([weight], lr=0.1)
    optimizer.pair_step(weight, torch.tensor([[5, 10**6 - 1]]), lambda scores: scores.sum(), spec)
    read = {spec.locate(row, column)[0] for row in (5, 10**6 - 1) for column in range(100)}
    changed = torch.nonzero(weight != before).flatten().tolist()
    assert set(changed) == read


def test_buckets_hold_every_value_once_whatever_was_there_before():
    spec = HashSpec(5000, 100, 2 * 2**buckets.SLICE_BITS + 1, signed=True)  # the third bucket all but empty
    rng = np.random.default_rng(0)
    table, weight = locate.Geometry.of(spec), rng.standard_normal(spec.pool_size)
    for num_pairs in (300, 200):  # the second finds memory of the first
        pairs = rng.integers(spec.num_embeddings, size=(num_pairs, 2))
        slopes = rng.standard_normal(num_pairs)
        batch = Batch.of(pairs, PairDropout(0.0), np.float64, slopes=slopes)
        poison_scratch()
        kept = buckets.Buckets.of(num_pairs, spec, np.dtype(np.float64), 2)
        scores = np.full(num_pairs, np.nan)
        buckets.score(2, weight, batch, scores, kept, table)
        found, expected, naive = np.zeros(spec.pool_size), np.zeros(spec.pool_size), np.zeros(num_pairs)
        buckets.step(rules.Add(), rules.Stepped(found, found, found), batch, kept, table)
        assert kept.starts[-1] == 2 * num_pairs * spec.embedding_dim
        for i, (word, context) in enumerate(pairs.tolist()):
            for j in range(spec.embedding_dim):
                (place, sign), (other, other_sign) = spec.locate(word, j), spec.locate(context, j)
                expected[place] += slopes[i] * sign * other_sign * weight[other]
                expected[other] += slopes[i] * sign * other_sign * weight[place]
                naive[i] += sign * weight[place] * other_sign * weight[other]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(scores, naive, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", [FullSpec(5, 4), HashSpec(5, 4, 30, block_size=2), HashSpec(5, 4, 30)])
def test_a_batch_of_no_pairs_changes_nothing(spec):
    weight, none = _parameter(spec, torch.ones(spec.pool_size)), torch.empty((0, 2), dtype=torch.int64)
    optimizer = optim.SGD([weight], 0.1)
    assert optimizer.pair_step(weight, none, SquaredError(torch.empty(0)), spec) == 0
    optimizer.pair_step(weight, none, lambda scores: scores.sum(), spec)
    assert (weight == 1).all()


def test_closures_and_state_dicts_work():
    weight, spec = nn.Parameter(torch.ones(5, 4)), FullSpec(5, 4)
    optimizer = optim.RowwiseAdagrad([weight], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = ops.pair_scores(weight, torch.tensor([[0, 1]]), spec).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    state = copy.deepcopy(optimizer.state_dict())
    resumed = optim.RowwiseAdagrad([weight], lr=0.5)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.state[weight]["sum"], optimizer.state[weight]["sum"])
    assert optimizer.state[weight]["sum"].count_nonzero() == 2


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (
            torch.ones(3, dtype=torch.bfloat16),
            "float32 and float64 parameters on the CPU, got torch.bfloat16",
        ),
        (torch.ones(3, device="meta"), "on meta; use autograd and step"),
        (torch.ones(6)[::2], r"the parameter must be contiguous, got strides \(2,\)"),
    ],
)
def test_what_cannot_be_stepped_is_refused(parameter, message):
    weight = nn.Parameter(parameter)
    with pytest.raises(ValueError, match=message):
        optim.SGD([weight]).pair_step(
            weight, torch.tensor([[0, 1]]), SquaredError(torch.ones(1)), HashSpec(5, 2, 3)
        )


def test_too_many_pairs_are_refused():
    spec = HashSpec(5, 2**20, 2**21, block_size=8)
    with pytest.raises(ValueError, match="16384 pairs of 131072 blocks are too many for one gradient"):
        conflicts.Workspace.of(2**14, spec, np.dtype(np.float32), 1)


def test_scratch_memory_is_kept_until_it_is_released():
    threads.release_memory()
    first = threads.scratch("of a test", (3, 4), np.float32)
    assert np.shares_memory(first, threads.scratch("of a test", (6,), np.float32))
    assert not np.shares_memory(first, threads.scratch("of a test", (6,), np.float64))
    assert not np.shares_memory(first, threads.scratch("of another", (6,), np.float32))
    for shape, dtype in (
        ((100,), np.float64),
        ((2, 3, 4), np.float64),
        ((0, 4), np.int32),
        ((7,), np.uint64),
    ):
        found = threads.scratch("of a test", shape, dtype)
        assert (found.shape, found.dtype, found.flags.c_contiguous) == (shape, np.dtype(dtype), True)
        found.fill(1)
        again = threads.scratch("of a test", shape, dtype)
        assert again.size == 0 or np.shares_memory(found, again)
    threads.release_memory()
    assert not threads._scratch.__dict__


def test_huge_pages_are_advice_only():
    tensor = torch.empty(2**23)
    assert advise_huge_pages(tensor) is tensor
    assert advise_huge_pages(torch.empty(2**23, device="meta")).device.type == "meta"


def test_a_pair_step_refuses_what_it_cannot_do():
    weight, spec = nn.Parameter(torch.ones(5, 4)), FullSpec(5, 4)
    optimizer, pairs = optim.Adagrad([weight], lr=1.0), torch.tensor([[0, 1], [4, 4]])
    wanted = SquaredError(torch.zeros(2))
    with pytest.raises(ValueError, match=r"a parameter of this optimizer, got another of shape \[5, 4\]"):
        optimizer.pair_step(nn.Parameter(torch.ones(5, 4)), pairs, wanted, spec)
    for name, loss in (
        ("targets", SquaredError(torch.zeros(3))),
        ("sample_weights", SquaredError(torch.zeros(2), torch.ones(2, 1))),
    ):
        with pytest.raises(ValueError, match=rf"{name} must have shape \[2\], one for each pair, got \["):
            optimizer.pair_step(weight, pairs, loss, spec)
    with pytest.raises(IndexError, match=r"ids must lie in \[0, 5\), .* got ids from 1 to 5"):
        optimizer.pair_step(weight, pairs + 1, wanted, spec)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        optimizer.pair_step(weight, pairs, wanted, spec, dropout=1.0)
    with pytest.raises(ValueError, match="a full table has no context offset, got 7"):
        optimizer.pair_step(weight, pairs, wanted, spec, context_offset=7)
    with pytest.raises(ValueError, match=r"the loss must be a scalar, got shape \[2\]"):
        optimizer.pair_step(weight, pairs, lambda scores: scores, spec)
    with pytest.raises(ValueError, match="the loss does not depend on the scores"):
        optimizer.pair_step(weight, pairs, lambda scores: torch.ones((), requires_grad=True), spec)
    with pytest.raises(ValueError, match="the loss depends on the parameter beside the scores: use autograd"):
        optimizer.pair_step(weight, pairs, lambda scores: scores.sum() + weight.sum(), spec)
    assert weight.grad is None
    ops.pair_scores(weight, pairs, spec).sum().backward()
    with pytest.raises(RuntimeError, match="a gradient that no step has used: step or zero_grad first"):
        optimizer.pair_step(weight, pairs, wanted, spec)
    optimizer.zero_grad()
    weight.requires_grad_(False)
    with pytest.raises(ValueError, match="does not require a gradient, so there is none to step by"):
        optimizer.pair_step(weight, pairs, wanted, spec)
    weight.requires_grad_()
    assert torch.equal(weight, torch.ones(5, 4))
    assert optimizer.state[weight]["step"] == 0


def test_a_graph_of_before_the_step_cannot_be_used_after_it():
    weight, spec = nn.Parameter(torch.ones(5, 4)), FullSpec(5, 4)
    loss = ops.pair_scores(weight, torch.tensor([[0, 1]]), spec).sum()
    assert (
        optim.SGD([weight], 1.0).pair_step(weight, torch.tensor([[0, 1]]), SquaredError(torch.zeros(1)), spec)
        == 16
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


STATEFUL = {
    optim.Adagrad: HashSpec(50, 10, 400, block_size=5),
    optim.Adam: HashSpec(50, 10, 400),
    optim.LazyAdam: HashSpec(50, 10, 400, block_size=5),
    optim.RowwiseAdagrad: FullSpec(50, 10),
}


def _stepped(make):
    """An optimizer, its parameter with a state, and the other arguments of a step."""
    spec = STATEFUL[make]
    weight = _parameter(spec, torch.ones(spec.pool_size))
    optimizer = make([weight])
    arguments = torch.tensor([[0, 1]]), SquaredError(torch.zeros(1)), spec
    optimizer.pair_step(weight, *arguments)
    return optimizer, weight, arguments


@pytest.mark.parametrize("make", STATEFUL)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state[: len(state) // 2],
            r"must be contiguous torch.float64 \[\d+(, 10)?\], got torch.float64 \[",
        ),
        (lambda state: state.float(), r"got torch.float32 \["),
        (lambda state: torch.stack((state, state), -1)[..., 0], "not contiguous"),
        (lambda state: state.to("meta"), "must be on cpu, got meta"),
    ],
)
def test_a_state_of_another_parameter_is_refused(make, change, message):
    optimizer, weight, arguments = _stepped(make)
    before = weight.detach().clone()
    name = optimizer.state_names[-1]
    optimizer.state[weight][name] = change(optimizer.state[weight][name])
    with pytest.raises(
        ValueError, match=f"'{name}' .*{message}.*without it in optimizer.state, a new one is"
    ):
        optimizer.pair_step(weight, *arguments)
    assert torch.equal(weight, before)
    del optimizer.state[weight]
    optimizer.pair_step(weight, *arguments)


def test_states_and_data_that_were_replaced_are_refused():
    optimizer, weight, (pairs, loss, _) = _stepped(optim.Adagrad)
    large = nn.Parameter(torch.ones(4000))
    loaded = optim.Adagrad([large])
    loaded.load_state_dict(optimizer.state_dict())
    spec = HashSpec(50, 10, 4000, block_size=5)
    message = (
        r"'sum' of a parameter \[4000\] must be contiguous torch.float64 \[4000\], got torch.float64 \[400\]"
    )
    with pytest.raises(ValueError, match=message):
        loaded.pair_step(large, pairs, loss, spec)
    weight.data = torch.ones(4000)
    with pytest.raises(ValueError, match=message):
        optimizer.pair_step(weight, pairs, loss, spec)
    adam, weight, arguments = _stepped(optim.Adam)
    other = optim.Adagrad([weight])
    other.load_state_dict({**other.state_dict(), "state": adam.state_dict()["state"]})
    with pytest.raises(ValueError, match=r"has no 'sum', but \['step', 'exp_avg', 'exp_avg_sq'\]"):
        other.pair_step(weight, *arguments)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (optim.SGD, {"lr": float("nan")}, r"lr must lie in \[0, inf\), got nan"),
        (optim.Adagrad, {"eps": -1}, r"eps must lie in \[0, inf\), got -1"),
        (optim.Adam, {"betas": (0.9, 1.0)}, r"beta2 must lie in \[0, 1\), got 1"),
        (optim.LazyAdam, {"lr": float("inf")}, r"lr must lie in \[0, inf\), got inf"),
        (optim.RowwiseAdagrad, {"initial_accumulator_value": -0.1}, "initial_accumulator_value must lie in"),
    ],
)
def test_options_of_a_group_that_make_no_step_are_refused(make, options, message):
    spec = STATEFUL.get(make, STATEFUL[optim.Adagrad])
    weights = [_parameter(spec, torch.ones(spec.pool_size)) for _ in range(2)]
    optimizer = make(weights[:1], 0.1)
    optimizer.add_param_group({"params": weights[1:], **options})
    arguments = torch.tensor([[0, 1]]), SquaredError(torch.zeros(1)), spec
    optimizer.pair_step(weights[0], *arguments)
    with pytest.raises(ValueError, match=message):
        optimizer.pair_step(weights[1], *arguments)
    assert (weights[1] == 1).all()


def test_a_step_that_fails_is_not_counted():
    spec = HashSpec(5, 4, 30)
    weight = nn.Parameter(torch.ones(30))
    optimizer, pairs = optim.Adam([weight]), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="context_offset must not be negative, got -1"):
        optimizer.pair_step(weight, pairs, SquaredError(torch.ones(1)), spec, context_offset=-1)
    with pytest.raises(ZeroDivisionError):
        optimizer.pair_step(weight, pairs, lambda scores: 1 // 0, spec)
    assert optimizer.state[weight].get("step", 0) == 0
    assert (weight == 1).all()
    optimizer.pair_step(weight, pairs, SquaredError(torch.ones(1)), spec)
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize("make", [optim.RowwiseAdagrad, *long(optim.SGD)])
def test_a_pair_step_is_of_one_parameter(make):
    weights = [nn.Parameter(torch.ones(5, 4)) for _ in range(2)]
    optimizer = make(weights)
    weights[1].sum().backward()
    optimizer.pair_step(weights[0], torch.tensor([[0, 1]]), SquaredError(torch.zeros(1)), FullSpec(5, 4))
    assert not torch.equal(weights[0], torch.ones(5, 4))
    assert torch.equal(weights[1], torch.ones(5, 4))
    optimizer.step()
    assert not torch.equal(weights[1], torch.ones(5, 4))


@pytest.mark.parametrize("spec", STATEFUL.values())
def test_the_loss_of_a_single_pair_is_its_squared_error(spec):
    weight = _parameter(spec, torch.full((spec.pool_size,), 0.5))
    wanted = SquaredError(torch.ones(1))
    loss = optim.Adagrad([weight]).pair_step(weight, torch.tensor([[0, 1]]), wanted, spec)
    assert loss.item() == (10 * 0.5**2 - 1) ** 2 == wanted(torch.tensor([2.5])).item()


def test_the_loss_of_a_pair_step_is_summed_in_double_precision():
    torch.set_default_dtype(torch.float32)
    weight, spec = nn.Parameter(torch.full((2, 1), 0.1)), FullSpec(2, 1)
    pairs = torch.tensor([[0, 1]]).expand(2**20, 2)
    loss = optim.SGD([weight], 1e-9).pair_step(weight, pairs, SquaredError(torch.zeros(2**20)), spec)
    assert loss.item() == pytest.approx(1e-4, rel=1e-6)


def test_batches_may_shrink_and_parameters_change_their_type():
    spec = HashSpec(50, 100, 4000, block_size=25)
    start = 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    pairs = torch.randint(50, (40, 2), generator=torch.Generator().manual_seed(1))
    optimizers = optim.SGD([ours], 0.1), torch.optim.SGD([theirs], 0.1)
    for count, dtype in ((40, torch.float32), (15, torch.float32), (15, torch.float64), (20, torch.float64)):
        for parameter in (ours, theirs):
            parameter.data = parameter.data.to(dtype)
        loss = SquaredError(torch.zeros(count, dtype=dtype))
        optimizers[0].pair_step(ours, pairs[:count], loss, spec)
        loss(ops.pair_scores(theirs, pairs[:count], spec)).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        torch.testing.assert_close(ours.data, theirs.data)


@pytest.mark.parametrize(
    ("spec", "device", "expected"),
    [
        (FullSpec(10, 4), "cpu", ("pair_step", "conflicts")),
        (FullSpec(10, 4), "cuda", ("autograd", "conflicts")),
        (HashSpec(10, 4, 2**22, block_size=2), "cpu", ("autograd", "private")),
        (HashSpec(10, 4, 2**22 + 1, block_size=2), "cpu", ("pair_step", "conflicts")),
        (HashSpec(10, 4, 2**22 + 1), "cpu", ("pair_step", "buckets")),
    ],
)
def test_a_plan_follows_from_the_tables_size(spec, device, expected):
    assert optim.plan(spec, device) == expected
