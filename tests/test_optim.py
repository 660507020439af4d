import copy

import numpy as np
import pytest
import torch
from conftest import long
from torch import nn

from cemb import ops, optim, reference
from cemb.hashing import FullSpec, HashSpec, PairDropout
from cemb.kernels import cpu
from cemb.kernels.cpu import buckets, conflicts
from cemb.tables import FusedFullEmbedding, HashedEmbedding
from cemb.touched import TouchedGradient, advise_huge_pages

SPECS = [
    FullSpec(60, 100),
    HashSpec(60, 100, 3000, block_size=25, signed=True),
    HashSpec(60, 100, 50_000, block_size=8),
    HashSpec(5000, 100, 400_000, block_size=25, signed=True),  # most blocks overlap no other
    HashSpec(60, 100, 3000, block_size=3),
    HashSpec(60, 100, 300),  # values in buckets, here one
    HashSpec(5000, 100, 2 * 2**buckets.SLICE_BITS + 1, signed=True),  # the third bucket all but empty
]


@pytest.fixture(autouse=True)
def float64():
    """Results are compared closely, and kernels, which compile for seconds, are compiled for one type.

    Each loop is tried with few rules as well, one of them with states; `make test-long` tries all.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


IDS = [f"{type(spec).__name__}-{spec.block_size}-{spec.pool_size}" for spec in SPECS]


def _train(make, spec, *, steps=6, parts=1, seed=0):
    """Weights after some steps on random pairs, each the sum of `parts` backward passes."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(spec.pool_size, generator=generator))
    optimizer = make([weight])
    history = []
    for step in range(steps):
        for part in range(parts):
            pairs = torch.randint(spec.num_embeddings, (40, 2), generator=generator)
            values = torch.randn(40, generator=generator)
            torch.manual_seed(10 * step + part)
            scores = ops.pair_scores(weight, pairs, spec, dropout=0.1)
            ((scores - values) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(weight.detach().clone())
    return history


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p: optim.SGD(p, lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
        (lambda p: optim.Adagrad(p, lr=0.05), lambda p: torch.optim.Adagrad(p, lr=0.05)),
        (
            lambda p: optim.Adagrad(p, 0.05, initial_accumulator_value=0.3, eps=1e-3),
            lambda p: torch.optim.Adagrad(p, 0.05, initial_accumulator_value=0.3, eps=1e-3),
        ),
    ],
    ids=["sgd", "adagrad", "adagrad-options"],
)
def test_steps_equal_the_dense_optimizers(spec, parts, ours, theirs):
    found = _train(ours, spec, parts=parts)
    expected = _train(theirs, spec, parts=parts)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, step=step: f"step {step}: {m}")


def test_lazy_adam_equals_sparse_adam_on_a_full_table():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, 20, generator=generator)
    ours, theirs = (
        nn.Parameter(start.clone()),
        nn.Embedding.from_pretrained(start.clone(), False, sparse=True),
    )
    lazy = optim.LazyAdam([ours], lr=0.02, betas=(0.8, 0.9), eps=1e-6)
    sparse = torch.optim.SparseAdam(theirs.parameters(), lr=0.02, betas=(0.8, 0.9), eps=1e-6)
    for _ in range(8):
        pairs = torch.randint(50, (10, 2), generator=generator)
        lazy.squared_error_step(ours, pairs, torch.zeros(10), FullSpec(50, 20))
        (ops.vector_scores(theirs(pairs)) ** 2).mean().backward()
        sparse.step()
        sparse.zero_grad()
        torch.testing.assert_close(ours, theirs.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_lazy_adam_differs_from_dense_adam_only_where_steps_miss():
    spec = FullSpec(4, 6)
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [optim.LazyAdam(weights[:1], lr=0.1), torch.optim.Adam(weights[1:], lr=0.1)]
    for pairs in ([[0, 1]], [[0, 1]], [[0, 2]]):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            (ops.pair_scores(weight, torch.tensor(pairs), spec) - 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    lazy, dense = (weight.detach() for weight in weights)
    assert torch.equal(lazy[3], start[3])  # never touched, by either
    assert torch.equal(dense[3], start[3])
    assert not torch.allclose(lazy[1], dense[1])  # dense Adam went on moving it in the last step
    # Row 0 was touched by every step, but scored against rows that differ in the last one only.
    moved = (dense[1] - lazy[1]).abs()
    assert (moved > 1e-3).all()


def test_rowwise_adagrad_has_the_same_bits_for_any_number_of_threads(monkeypatch):
    found = []
    for threads in (1, 2, 300):
        monkeypatch.setattr(cpu.threads, "_set_threads", lambda threads=threads: threads)
        weight = nn.Parameter(torch.randn(900, 20, generator=torch.Generator().manual_seed(0)))
        optimizer = optim.RowwiseAdagrad([weight], 0.1)
        for step in range(2):
            pairs = torch.randint(900, (200, 2), generator=torch.Generator().manual_seed(step))
            ops.pair_scores(weight, pairs, FullSpec(900, 20)).square().sum().backward()
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize("make", [optim.SGD, optim.Adagrad, *long(optim.LazyAdam)])
def test_results_are_the_same_bits_for_any_number_of_threads(spec, make, monkeypatch):
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cpu.threads, "_set_threads", lambda threads=threads: threads)
        found.append(_train(lambda p: make(p, 0.1), spec, steps=2)[-1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize(("rows", "columns", "num_pairs"), [(60, 100, 40), (5000, 100, 300), (50, 7, 30)])
def test_rowwise_adagrad_is_the_formula(rows, columns, num_pairs):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows, columns, generator=generator)
    ours, naive = (nn.Parameter(start.clone()) for _ in range(2))
    optimizer = optim.RowwiseAdagrad([ours], 0.05, initial_accumulator_value=0.2, eps=1e-3)
    sums = torch.full((rows,), 0.2)
    for step in range(5):
        pairs = torch.randint(rows, (num_pairs, 2), generator=generator)
        for weight in (ours, naive):
            torch.manual_seed(step)
            loss = (ops.pair_scores(weight, pairs, FullSpec(rows, columns), dropout=0.1) - 1).square().sum()
            if step == 3:  # a dense gradient besides
                loss = loss + weight.square().sum()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            sums += naive.grad.square().mean(1)
            naive -= 0.05 * naive.grad / (sums.sqrt() + 1e-3)[:, None]
        naive.grad = None
        torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)
    assert optimizer.state[ours]["sum"].shape == (rows,)
    torch.testing.assert_close(optimizer.state[ours]["sum"], sums)


def test_rowwise_adagrad_refuses_a_pool_and_leaves_it_alone():
    pool = nn.Parameter(torch.ones(12))
    with pytest.raises(ValueError, match=r"tables \[rows, columns\], got shape \[12\]; a pool has no rows"):
        optim.RowwiseAdagrad([nn.Parameter(torch.ones(3, 4)), pool])
    assert not hasattr(pool, "touched")
    optimizer = optim.RowwiseAdagrad([nn.Parameter(torch.ones(3, 4))])
    with pytest.raises(ValueError, match="a pool has no rows"):
        optimizer.add_param_group({"params": [pool]})
    optimizer.zero_grad()  # of what it has
    assert len(optimizer.param_groups) == 1


def test_rowwise_adagrad_refuses_a_parameter_of_another_shape_than_the_tables():
    weight = nn.Parameter(torch.ones(4, 200))
    optimizer = optim.RowwiseAdagrad([weight])
    ops.pair_scores(weight, torch.tensor([[0, 19]]), FullSpec(20, 40)).sum().backward()
    with pytest.raises(
        ValueError, match="a state for each of the table's 20 rows, got 4: the parameter must"
    ):
        optimizer.step()
    assert (weight == 1).all()


def test_only_what_was_touched_changes():
    spec = HashSpec(10**6, 100, 10**6, block_size=25)
    weight = nn.Parameter(torch.zeros(spec.pool_size).uniform_(-1, 1))
    before = weight.detach().clone()
    optimizer = optim.Adagrad([weight], lr=0.1)
    pairs = torch.tensor([[5, 10**6 - 1]])
    ops.pair_scores(weight, pairs, spec).sum().backward()
    assert weight.grad is None
    optimizer.step()
    touched = {spec.locate(row, column)[0] for row in (5, 10**6 - 1) for column in range(100)}
    changed = torch.nonzero(weight != before).flatten().tolist()
    assert set(changed) == touched


def test_a_step_uses_the_gradient_up():
    spec = FullSpec(5, 4)
    weight = nn.Parameter(torch.ones(5, 4))
    optimizer = optim.SGD([weight], lr=1.0)
    optimizer.step()  # nothing to do
    ops.pair_scores(weight, torch.tensor([[0, 1]]), spec).sum().backward()
    optimizer.step()
    after = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, after)
    ops.pair_scores(weight, torch.tensor([[0, 1]]), spec).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(weight, after)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_gradients_of_other_ops_are_taken_in(spec):
    weights = [nn.Parameter(torch.full((spec.pool_size,), 0.5)) for _ in range(2)]
    optimizers = [optim.Adagrad(weights[:1], lr=0.1), torch.optim.Adagrad(weights[1:], lr=0.1)]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        for _ in range(2):
            scores = ops.pair_scores(weight, torch.tensor([[0, 1], [2, 3]]), spec)
            (scores.sum() + weight.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)


def test_evaluation_leaves_the_gradient_alone():
    table = FusedFullEmbedding(5, 4)
    optim.SGD(table.parameters())
    with torch.no_grad():
        table.pair_scores(torch.tensor([[0, 1]]), table, 0.0)
    assert table.weight.touched.is_empty


@pytest.mark.parametrize("what", ["weight", "pairs"])
def test_what_a_gradient_needs_must_stay_until_the_step(what):
    weight, pairs = nn.Parameter(torch.ones(5, 4)), torch.tensor([[0, 1]])
    optimizer = optim.SGD([weight], lr=1.0)
    ops.pair_scores(weight, pairs, FullSpec(5, 4)).sum().backward()
    with torch.no_grad():
        {"weight": weight, "pairs": pairs}[what].mul_(0)
    with pytest.raises(
        RuntimeError, match=r"shape \[.*\] that a gradient needs was changed in place after the"
    ):
        optimizer.step()


def test_a_graph_of_before_the_step_cannot_be_used_after_it():
    weight = nn.Parameter(torch.ones(5, 4))
    optimizer = optim.SGD([weight], lr=1.0)
    loss = ops.pair_scores(weight, torch.tensor([[0, 1]]), FullSpec(5, 4)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_at_block_size_1_weights_may_change_between_the_backward_pass_and_the_step():
    spec, pairs = HashSpec(60, 100, 3000), torch.tensor([[0, 1], [2, 3]])
    weights = [nn.Parameter(torch.linspace(-1, 1, 3000)) for _ in range(2)]
    optimizers = [optim.SGD(weights[:1], lr=0.1), torch.optim.SGD(weights[1:], lr=0.1)]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        ops.pair_scores(weight, pairs, spec).sum().backward()
        with torch.no_grad():
            weight.mul_(2)
        optimizer.step()
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
def test_scores_that_keep_their_values_are_the_scores(signed):
    spec = HashSpec(60, 100, 3000, signed=signed)
    weight = nn.Parameter(torch.randn(3000, generator=torch.Generator().manual_seed(0)))
    pairs = torch.tensor([[0, 1], [59, 59], [7, 3]])
    torch.manual_seed(1)
    expected = ops.pair_scores(weight, pairs, spec, dropout=0.3)
    optim.SGD([weight])
    torch.manual_seed(1)
    found = ops.pair_scores(weight, pairs, spec, dropout=0.3)
    torch.testing.assert_close(found, expected)
    with pytest.raises(IndexError, match="60"):
        ops.pair_scores(weight, torch.tensor([[0, 60]]), spec)


def test_buckets_hold_every_value_once_whatever_was_there_before():
    spec = HashSpec(5000, 100, 300_000, signed=True)
    rng = np.random.default_rng(0)
    workspace = None
    for num_pairs in (300, 200):  # the second finds memory of the first
        pairs = rng.integers(spec.num_embeddings, size=(num_pairs, 2))
        factors = rng.standard_normal(num_pairs)
        values = rng.standard_normal((num_pairs, 2, spec.embedding_dim))
        mask = cpu.dropout.draw(num_pairs, spec.embedding_dim, PairDropout(0.0, 0))
        if workspace is not None:
            workspace.entries[:] = np.nan
        workspace = buckets.pair_buckets(pairs, mask, factors, values, spec, 0, workspace)
        found, expected = np.zeros(spec.pool_size), np.zeros(spec.pool_size)
        for b, (begin, end) in enumerate(zip(workspace.starts[:-1], workspace.starts[1:], strict=True)):
            places = workspace.entries[begin:end, 1].astype(np.int64) + (b << buckets.SLICE_BITS)
            np.add.at(found, places, workspace.entries[begin:end, 0])
        assert workspace.starts[-1] == 2 * num_pairs * spec.embedding_dim
        for i, (word, context) in enumerate(pairs.tolist()):
            for j in range(spec.embedding_dim):
                (place, sign), (other, other_sign) = spec.locate(word, j), spec.locate(context, j)
                expected[place] += factors[i] * sign * other_sign * values[i, 1, j]
                expected[other] += factors[i] * sign * other_sign * values[i, 0, j]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_two_tables_in_one_pool_are_refused_between_steps():
    words = HashedEmbedding(50, 20, pool_size=900, block_size=10)
    other = HashedEmbedding(50, 20, block_size=20, weight=words.weight)
    optim.SGD(words.parameters())
    words.pair_scores(torch.tensor([[0, 1]]), words, 0.0).sum().backward()
    with pytest.raises(RuntimeError, match=r"of one table at a time: it has pairs of .*block_size=10"):
        other.pair_scores(torch.tensor([[0, 1]]), other, 0.0).sum().backward()


@pytest.mark.parametrize("spec", [FullSpec(5, 4), HashSpec(5, 4, 30, block_size=2), HashSpec(5, 4, 30)])
def test_a_batch_of_no_pairs_changes_nothing(spec):
    shape = (5, 4) if isinstance(spec, FullSpec) else (30,)
    weight = nn.Parameter(torch.ones(shape))
    optimizer = optim.SGD([weight], lr=0.5)
    for num_pairs in (0, 1, 0):
        before = weight.detach().clone()
        pairs = torch.tensor([[0, 1]])[:num_pairs]
        ops.pair_scores(weight, pairs, spec).sum().backward()
        optimizer.step()
        assert torch.equal(weight, before) == (num_pairs == 0)


def test_a_copied_module_has_gradients_of_its_own():
    table = FusedFullEmbedding(5, 4)
    optim.SGD(table.parameters())
    copied = copy.deepcopy(table)
    copied.pair_scores(torch.tensor([[0, 1]]), copied, 0.0).sum().backward()
    assert copied.weight.grad is not None
    assert table.weight.touched.is_empty


def test_closures_and_state_dicts_work():
    weight = nn.Parameter(torch.ones(5, 4))
    optimizer = optim.Adagrad([weight], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = ops.pair_scores(weight, torch.tensor([[0, 1]]), FullSpec(5, 4)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    state = copy.deepcopy(optimizer.state_dict())
    resumed = optim.Adagrad([weight], lr=0.5)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.state[weight]["sum"], optimizer.state[weight]["sum"])
    assert optimizer.state[weight]["sum"].count_nonzero() == 8


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (
            torch.ones(3, dtype=torch.bfloat16),
            "float32 and float64 parameters on the CPU, got torch.bfloat16",
        ),
        (torch.ones(3, device="meta"), "got torch.float32 on meta; use torch.optim"),
        (torch.ones(4, 3).T, r"parameters must be contiguous, got strides \(1, 3\)"),
    ],
)
def test_what_cannot_be_updated_is_refused(parameter, message):
    with pytest.raises(ValueError, match=message):
        optim.SGD([nn.Parameter(parameter)])


def test_too_many_pairs_are_refused():
    spec = HashSpec(5, 2**20, 2**21, block_size=8)
    with pytest.raises(ValueError, match="16384 pairs of 131072 blocks are too many for one gradient"):
        conflicts.Workspace.fitting(None, 2**14, spec, np.dtype(np.float32), 1)


def test_memory_is_kept_for_batches_that_fit():
    spec, single, double = HashSpec(50, 100, 4000, block_size=25), np.dtype(np.float32), np.dtype(np.float64)
    workspace = conflicts.Workspace.fitting(None, 20, spec, single, 2)
    assert conflicts.Workspace.fitting(workspace, 10, spec, single, 2) is workspace
    for wanted in ((21, spec, single, 2), (20, spec, double, 2), (20, spec, single, 3)):
        other = conflicts.Workspace.fitting(workspace, *wanted)
        assert (len(other.ranks), other.terms.dtype, len(other.counts)) == (wanted[0], *wanted[2:])


@pytest.mark.parametrize("first", [torch.float64, *long(torch.float32)])
def test_batches_may_shrink_and_parameters_change_their_type(first):
    spec = HashSpec(50, 100, 4000, block_size=25)
    start = 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    pairs = torch.randint(50, (40, 2), generator=torch.Generator().manual_seed(1))
    optimizers = optim.SGD([ours], 0.1), torch.optim.SGD([theirs], 0.1)
    for count, dtype in ((40, first), (15, first), (15, torch.float64), (20, torch.float64)):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.data = parameter.data.to(dtype)
            ops.pair_scores(parameter, pairs[:count], spec).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ours.data, theirs.data)


def test_huge_pages_are_advice_only():
    tensor = torch.empty(2**23)
    assert advise_huge_pages(tensor) is tensor
    assert advise_huge_pages(torch.empty(2**23, device="meta")).device.type == "meta"
    assert TouchedGradient().is_empty


ONE_PASS_SPECS = [
    *SPECS,
    HashSpec(
        3000, 100, cpu.threads.PRIVATE_POOL_LIMIT + 50, block_size=25, signed=True
    ),  # few blocks overlap
    HashSpec(60, 100, cpu.threads.PRIVATE_POOL_LIMIT + 1, signed=True),
    HashSpec(60, 7, 300, signed=True, table_offset=2**40),
]
ONE_PASS_IDS = [f"{type(spec).__name__}-{spec.block_size}-{spec.pool_size}" for spec in ONE_PASS_SPECS]
OFFSET = 10**6


def _fit(make, spec, *, steps=4, num_pairs=70, dtype=torch.float64, one_pass=True):
    """Weights and losses of steps on squared errors; by naive PyTorch if not `one_pass`."""
    generator = torch.Generator().manual_seed(0)
    start = (0.3 * torch.randn(spec.pool_size, generator=generator)).to(dtype)
    weight = nn.Parameter(start.view(60, 100) if spec == FullSpec(60, 100) else start)
    optimizer, losses = make([weight]), []
    offset = 0 if isinstance(spec, FullSpec) else OFFSET
    for step in range(steps):
        pairs = torch.randint(spec.num_embeddings, (num_pairs, 2), generator=generator)
        values, weights = torch.rand(2, num_pairs, generator=generator).to(dtype)
        options = {"dropout": 0.1, "context_offset": offset, "sample_weights": weights if step % 2 else None}
        torch.manual_seed(step)
        if one_pass:
            losses.append(optimizer.squared_error_step(weight, pairs, values, spec, **options))
            continue
        dropout = PairDropout(0.1, int(torch.randint(2**62, ())))
        errors = reference.pair_scores(weight.view(-1), pairs, spec, offset, dropout) - values
        loss = (weights * errors.square()).sum() if step % 2 else errors.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return weight.detach().view(-1), torch.stack(losses)


@pytest.mark.parametrize("spec", ONE_PASS_SPECS, ids=ONE_PASS_IDS)
@pytest.mark.parametrize("name", ["Adam", *long("SGD", "Adagrad")])
def test_a_step_in_one_pass_is_that_of_naive_pytorch(spec, name):
    found = _fit(lambda p: getattr(optim, name)(p, lr=0.05), spec)
    expected = _fit(lambda p: getattr(torch.optim, name)(p, lr=0.05), spec, one_pass=False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("spec", ONE_PASS_SPECS, ids=ONE_PASS_IDS)
def test_a_step_in_one_pass_in_float32(spec):
    found = _fit(lambda p: optim.SGD(p, lr=0.05), spec, dtype=torch.float32)
    expected = _fit(lambda p: optim.SGD(p, lr=0.05), spec)
    torch.testing.assert_close(found, tuple(x.float() for x in expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (optim.RowwiseAdagrad, FullSpec(60, 100)),
        *(pytest.param(optim.LazyAdam, spec, marks=pytest.mark.long) for spec in ONE_PASS_SPECS),
    ],
    ids=["RowwiseAdagrad", *ONE_PASS_IDS],
)
def test_a_step_in_one_pass_is_a_backward_pass_and_a_step(make, spec):
    shape = (spec.num_embeddings, -1) if isinstance(spec, FullSpec) else (-1,)
    start = torch.randn(spec.pool_size, generator=torch.Generator().manual_seed(0))
    ours, theirs = (nn.Parameter(start.clone().view(shape)) for _ in range(2))
    optimizers = make([ours], 0.1), make([theirs], 0.1)
    for step in range(3):
        pairs = torch.randint(spec.num_embeddings, (40, 2), generator=torch.Generator().manual_seed(step))
        values = torch.linspace(-1, 1, 40)
        torch.manual_seed(step)
        loss = optimizers[0].squared_error_step(ours, pairs, values, spec, dropout=0.2)
        torch.manual_seed(step)
        expected = (ops.pair_scores(theirs, pairs, spec, dropout=0.2) - values).square().mean()
        expected.backward()
        optimizers[1].step()
        torch.testing.assert_close((ours, loss), (theirs, expected), rtol=1e-9, atol=1e-9)
    for name, state in optimizers[0].state[ours].items():
        torch.testing.assert_close(state, optimizers[1].state[theirs][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", ONE_PASS_SPECS, ids=ONE_PASS_IDS)
def test_steps_in_one_pass_on_any_number_of_threads(spec, monkeypatch):
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cpu.threads, "_set_threads", lambda threads=threads: threads)
        found.append(_fit(lambda p: optim.Adam(p, 0.5), spec, num_pairs=200))
    for other in found[1:]:
        if isinstance(spec, HashSpec) and spec.pool_size <= cpu.threads.PRIVATE_POOL_LIMIT:
            torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)
        else:
            assert all(map(torch.equal, other, found[0]))


def test_a_step_in_one_pass_clears_the_memory_it_finds():
    for block_size in (25, 1):
        spec = HashSpec(60, 100, 3000, block_size=block_size)
        expected = _fit(lambda p: optim.Adam(p, 0.5), spec, steps=1)
        cpu.threads._pools.fill(np.nan)
        assert all(map(torch.equal, _fit(lambda p: optim.Adam(p, 0.5), spec, steps=1), expected))


def test_adam_visits_what_a_backward_pass_does_not_touch():
    spec = FullSpec(4, 6)
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [optim.Adam(weights[:1], lr=0.1, eps=0.01), torch.optim.Adam(weights[1:], lr=0.1, eps=0.01)]
    for pairs in ([[0, 1]], [[0, 2]], [[2, 2]]):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            (ops.pair_scores(weight, torch.tensor(pairs), spec) - 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)


def test_a_step_in_one_pass_refuses_what_it_cannot_do():
    weight, spec = nn.Parameter(torch.ones(5, 4)), FullSpec(5, 4)
    optimizer, pairs, values = optim.Adam([weight], lr=1.0), torch.tensor([[0, 1], [4, 4]]), torch.zeros(2)
    with pytest.raises(ValueError, match=r"a parameter of this optimizer, got another of shape \[5, 4\]"):
        optimizer.squared_error_step(nn.Parameter(torch.ones(5, 4)), pairs, values, spec)
    for name, options in (("targets", {}), ("sample_weights", {"sample_weights": torch.ones(2, 1)})):
        wanted = torch.zeros(3) if name == "targets" else values
        with pytest.raises(ValueError, match=rf"{name} must have shape \[2\], one for each pair, got \["):
            optimizer.squared_error_step(weight, pairs, wanted, spec, **options)
    with pytest.raises(IndexError, match=r"ids must lie in \[0, 5\), .* got ids from 1 to 5"):
        optimizer.squared_error_step(weight, pairs + 1, values, spec)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        optimizer.squared_error_step(weight, pairs, values, spec, dropout=1.0)
    with pytest.raises(ValueError, match="a full table has no context offset, got 7"):
        optimizer.squared_error_step(weight, pairs, values, spec, context_offset=7)
    ops.pair_scores(weight, pairs, spec).sum().backward()
    with pytest.raises(RuntimeError, match="a gradient that no step has used: step or zero_grad first"):
        optimizer.squared_error_step(weight, pairs, values, spec)
    optimizer.zero_grad()
    weight.requires_grad_(False)
    with pytest.raises(ValueError, match="does not require a gradient, so there is none to step by"):
        optimizer.squared_error_step(weight, pairs, values, spec)
    weight.requires_grad_()
    assert torch.equal(weight, torch.ones(5, 4))
    assert optimizer.state[weight] == {}
    loss = ops.pair_scores(weight, pairs, spec).sum()
    assert optimizer.squared_error_step(weight, pairs, values, spec) == 16
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_that_fails_is_not_counted():
    spec = HashSpec(5, 4, 30)
    weight = nn.Parameter(torch.ones(30))
    optimizer, pairs = optim.Adam([weight]), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="context_offset must not be negative, got -1"):
        optimizer.squared_error_step(weight, pairs, torch.ones(1), spec, context_offset=-1)
    with pytest.raises(OverflowError):
        optimizer.squared_error_step(weight, pairs, torch.ones(1), spec, context_offset=2**64)
    assert optimizer.state[weight].get("step", 0) == 0
    optimizer.squared_error_step(weight, pairs, torch.ones(1), spec)
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize("make", [optim.RowwiseAdagrad, optim.Adam, *long(optim.SGD)])
def test_a_step_in_one_pass_is_of_one_parameter(make):
    weights = [nn.Parameter(torch.ones(5, 4)) for _ in range(2)]
    optimizer = make(weights)
    weights[1].sum().backward()
    optimizer.squared_error_step(weights[0], torch.tensor([[0, 1]]), torch.zeros(1), FullSpec(5, 4))
    assert not torch.equal(weights[0], torch.ones(5, 4))
    assert torch.equal(weights[1], torch.ones(5, 4))
    optimizer.step()
    assert not torch.equal(weights[1], torch.ones(5, 4))


@pytest.mark.long
def test_adagrad_without_eps_leaves_alone_what_no_step_touched():
    spec = HashSpec(50, 8, 3000, block_size=4)
    weight = nn.Parameter(torch.ones(3000))
    optimizer = optim.Adagrad([weight], 0.1, eps=0.0)
    optimizer.squared_error_step(weight, torch.tensor([[0, 1]]), torch.zeros(1), spec)
    assert (weight == 1).sum() >= 3000 - 16
    assert (weight < 1).any()


def test_the_loss_of_a_step_in_one_pass_is_summed_in_double_precision():
    torch.set_default_dtype(torch.float32)
    weight, spec = nn.Parameter(torch.full((2, 1), 0.1)), FullSpec(2, 1)
    pairs = torch.tensor([[0, 1]]).expand(2**20, 2)
    loss = optim.SGD([weight], 1e-9).squared_error_step(weight, pairs, torch.zeros(2**20), spec)
    assert loss.item() == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("spec", [FullSpec(5, 4), HashSpec(5, 4, 30, block_size=2), HashSpec(5, 4, 30)])
def test_a_step_in_one_pass_of_no_pairs_changes_nothing(spec):
    weight = nn.Parameter(torch.ones(spec.pool_size))
    none = torch.empty((0, 2), dtype=torch.int64)
    assert optim.Adam([weight]).squared_error_step(weight, none, torch.empty(0), spec) == 0
    assert torch.equal(weight, torch.ones(spec.pool_size))
