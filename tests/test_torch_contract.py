"""Modules and optimizers keep torch's contract: each test does the same in plain PyTorch and compares."""

import copy
import functools
import inspect
import io
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cemb import ops, optim, reference
from cemb.hashing import FullSpec, HashSpec
from cemb.kernels.cpu import updates
from cemb.model import build_model
from cemb.tables import HashedEmbedding, HashedEmbeddingBag, all_rows

NAMES = ["SGD", "Adagrad", "Adam"]
every_optimizer = pytest.mark.parametrize("name", NAMES)
# Torch's own: it compiles functions so when the first derivative in forward mode is taken.
ignoring_torchscript = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True)
def float64():
    """Results are compared closely, and kernels are compiled for one type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make_table(**options):
    torch.manual_seed(0)
    return HashedEmbedding(50, 8, **{"pool_size": 64, "block_size": 4, "init_std": 1.0, **options})


def draw_pairs(seed=0, n=12, rows=50):
    return torch.randint(rows, (n, 2), generator=torch.Generator().manual_seed(seed))


def plain_rows(weight, ids, spec):
    indices, signs = reference.locate(ids, spec)
    return weight.reshape(-1)[indices] if signs is None else weight.reshape(-1)[indices] * signs


def plain_scores(weight, pairs, spec):
    vectors = plain_rows(weight, pairs, spec)
    return (vectors[:, 0] * vectors[:, 1]).sum(-1)


def square(scores):
    return scores.square().sum()


def fused_loss(weight, pairs, spec):
    return square(ops.pair_scores(weight, pairs, spec))


def plain_loss(weight, pairs, spec):
    return square(plain_scores(weight, pairs, spec))


class Side:
    """A pool with an optimizer and a loss: ours, or the same pool in plain PyTorch under torch's."""

    def __init__(self, name, is_ours, options=(), **table_options):
        self.table = make_table(**table_options)
        self.weight, self.spec = self.table.weight, self.table.spec
        if not is_ours:
            self.weight = nn.Parameter(self.weight.detach().clone())
        self.loss_of = fused_loss if is_ours else plain_loss
        options = {"lr": 0.01, **dict(options)}
        self.optimizer = getattr(optim if is_ours else torch.optim, name)([self.weight], **options)

    def loss(self, seed):
        return self.loss_of(self.weight, draw_pairs(seed, rows=self.spec.num_embeddings), self.spec)

    def step(self, seed):
        self.optimizer.zero_grad()
        self.loss(seed).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def pair_step(self, seed):
        pairs = draw_pairs(seed, rows=self.spec.num_embeddings)
        return self.optimizer.pair_step(self.weight, pairs, square, self.spec)


def sides(name, options=(), **table_options):
    return [Side(name, is_ours, options, **table_options) for is_ours in (True, False)]


def state_of(optimizer):
    """Tensors of the state of its only parameter."""
    return {key: value.clone() for key, value in optimizer.state_dict()["state"].get(0, {}).items()}


def saved(value, weights_only=True):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@every_optimizer
def test_gradients_are_clipped_as_by_torch(name):
    ours, theirs = sides(name)
    for seed in range(4):
        norms = []
        for side in (ours, theirs):
            side.optimizer.zero_grad()
            side.loss(seed).backward()
            norms.append(nn.utils.clip_grad_norm_([side.weight], 0.1))
            close(side.weight.grad.norm(), torch.tensor(0.1), rtol=1e-5)
            side.optimizer.step()
        assert norms[0] > 1  # so that clipping did something
        close(*norms)
        close(ours.weight, theirs.weight)
    clipped = ours.weight.detach().clone()
    unclipped = Side(name, True)
    for seed in range(4):
        unclipped.step(seed)
    assert not torch.allclose(clipped, unclipped.weight)


@every_optimizer
def test_a_gradient_scaler_does_as_with_torch_and_skips_infinite_gradients(name):
    ours, theirs = sides(name)
    scales = []
    for side in (ours, theirs):
        side.dense = nn.Parameter(torch.ones(3))
        side.optimizer.add_param_group({"params": [side.dense], "lr": 0.1})
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        history = []
        for seed, factor in enumerate((1.0, 1.0, float("inf"), 1.0)):
            side.optimizer.zero_grad()
            before = side.weight.detach().clone(), side.dense.detach().clone()
            loss = side.loss(seed) * factor + side.dense.square().sum()
            scaler.scale(loss).backward()
            scaler.step(side.optimizer)
            scaler.update()
            history.append(scaler.get_scale())
            is_skipped = factor == float("inf")
            assert torch.equal(before[0], side.weight) == is_skipped
            assert torch.equal(before[1], side.dense) == is_skipped
        scales.append(history)
    assert scales[0] == scales[1] == [1024, 2048, 1024, 1024]
    close(ours.weight, theirs.weight)
    close(ours.dense, theirs.dense)


class Net(nn.Module):
    """A table of which pairs are scored and rows are looked up, and a dense head."""

    def __init__(self):
        super().__init__()
        self.table = make_table(init_std=0.5)
        self.head = nn.Linear(8, 1)

    def forward(self, pairs):
        scores = self.table.pair_scores(pairs, self.table, 0.0)
        return scores + self.head(self.table(pairs)).sum((1, 2))


class PlainNet(Net):
    def forward(self, pairs):
        rows = plain_rows(self.table.weight, pairs, self.table.spec)
        return (rows[:, 0] * rows[:, 1]).sum(-1) + self.head(rows).sum((1, 2))


def train_net(net, optimizer, steps, part=slice(None)):
    for seed in range(steps):
        optimizer.zero_grad()
        (net(draw_pairs(seed)[part]) - 1).square().mean().backward()
        optimizer.step()


def train_in_process(rank, folder, ways):
    """Train `Net` in each way of two processes, and write what became of it."""
    from torch import distributed as dist

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part, found = slice(6 * rank, 6 * rank + 6), {}

    def train(way, name, steps, wrap, parameters_of):
        wrapped = wrap(Net())
        train_net(wrapped, getattr(optim, name)(wrapped.parameters(), lr=0.1), steps, part)
        found[way, name] = {key: value.detach().clone() for key, value in parameters_of(wrapped)}

    if "DDP" in ways:
        from torch.nn.parallel import DistributedDataParallel

        for name in NAMES:
            train("DDP", name, 5, DistributedDataParallel, lambda net: net.module.named_parameters())
    if "FSDP1" in ways:
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

        sharded = functools.partial(
            FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True
        )
        fully = functools.partial(fully_shard, mesh=dist.init_device_mesh("cpu", (2,)))

        def gathered(net):
            with FullyShardedDataParallel.summon_full_params(net):
                return [(key, value.detach().clone()) for key, value in net.module.named_parameters()]

        for name in ("SGD", "Adam"):
            train("FSDP1", name, 2, sharded, gathered)
            train(
                "FSDP2", name, 2, fully, lambda net: [(k, v.full_tensor()) for k, v in net.named_parameters()]
            )
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def train_in_two(tmp_path_factory):
    """What each of two processes found in some way; ways that import alike are tried at once."""

    @functools.cache
    def spawn(ways):
        folder = tmp_path_factory.mktemp("gloo")
        torch.multiprocessing.spawn(train_in_process, (folder, ways), nprocs=2)
        return [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    return lambda way: spawn(("DDP",) if way == "DDP" else ("FSDP1", "FSDP2"))


@pytest.mark.parametrize(
    ("way", "name", "steps"),
    [
        *(("DDP", name, 5) for name in NAMES),
        *(
            pytest.param(way, name, 2, marks=pytest.mark.long)
            for way in ("FSDP1", "FSDP2")
            for name in ("SGD", "Adam")
        ),
    ],
)
def test_two_processes_train_as_one_on_the_whole_batch(way, name, steps, train_in_two):
    first, second = (found[way, name] for found in train_in_two(way))
    net = PlainNet()
    start = {key: value.detach().clone() for key, value in net.named_parameters()}
    train_net(net, getattr(torch.optim, name)(net.parameters(), lr=0.1), steps)
    assert first.keys() == start.keys()
    for key, value in net.named_parameters():
        assert torch.equal(first[key], second[key])
        assert not torch.allclose(first[key], start[key])
        close(first[key], value.detach())


@every_optimizer
@pytest.mark.parametrize("how", ["zero_grad", "None"])
def test_a_step_without_a_gradient_moves_nothing(name, how):
    side = Side(name, True)
    side.step(0)
    side.pair_step(1)
    side.loss(2).backward()
    assert side.weight.grad.abs().sum() > 0
    if how == "zero_grad":
        side.table.zero_grad()
    else:
        side.table.weight.grad = None
    before, state = side.weight.detach().clone(), state_of(side.optimizer)
    side.optimizer.step()
    assert torch.equal(side.weight, before)
    assert all(torch.equal(value, state[key]) for key, value in state_of(side.optimizer).items())


@every_optimizer
def test_a_gradient_of_zeros_is_stepped_as_by_torch(name):
    ours, theirs = sides(name)
    for side in (ours, theirs):
        side.step(0)
        side.loss(1).backward()
        side.optimizer.zero_grad(set_to_none=False)
        before = side.weight.detach().clone()
        side.optimizer.step()
        assert torch.equal(before, side.weight) == (name != "Adam")
    close(ours.weight, theirs.weight)


@every_optimizer
def test_an_optimizer_that_is_gone_leaves_nothing_to_the_next(name):
    ours, theirs = sides(name)
    ours.loss(0).backward()
    ours.weight.grad = None
    del ours.optimizer
    for side in (ours, theirs):
        side.optimizer = torch.optim.Adam([side.weight], lr=0.1)
        for seed in range(3):
            side.step(seed)
    close(ours.weight, theirs.weight)


@every_optimizer
def test_a_copy_of_module_and_optimizer_steps_by_itself(name):
    ours, theirs = sides(name)
    ours.pair_step(0)
    ours.step(1)
    before, state = ours.weight.detach().clone(), state_of(ours.optimizer)
    copied = copy.copy(ours)
    copied.table, copied.optimizer = copy.deepcopy((ours.table, ours.optimizer))
    copied.weight = copied.table.weight
    assert copied.optimizer.param_groups[0]["params"][0] is copied.weight
    copied.step(2)
    copied.pair_step(3)
    assert torch.equal(ours.weight, before)
    assert all(torch.equal(value, state[key]) for key, value in state_of(ours.optimizer).items())
    for seed in range(4):
        theirs.step(seed)
    close(copied.weight, theirs.weight)


@every_optimizer
def test_a_module_saved_whole_takes_little_more_than_its_pool(name, tmp_path):
    side = Side(name, True, pool_size=100_000)
    side.step(0)
    side.pair_step(1)
    side.loss(2).backward()
    torch.save(side.table, tmp_path / "table.pt")
    assert (tmp_path / "table.pt").stat().st_size < 8 * 100_000 + 16 * 1024
    loaded = torch.load(tmp_path / "table.pt", weights_only=False)
    ids = torch.arange(50)
    assert torch.equal(loaded(ids), plain_rows(side.weight, ids, side.spec))
    assert loaded.spec == side.spec


OPTIONS = [
    ("SGD", {"weight_decay": 0.3}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.2}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"maximize": True}),
    ("Adagrad", {"weight_decay": 0.3}),
    ("Adagrad", {"lr_decay": 0.3}),
    ("Adagrad", {"maximize": True}),
    ("Adam", {"weight_decay": 0.3}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"maximize": True}),
    ("Adam", {"weight_decay": 0.3, "decoupled_weight_decay": True}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_options_of_groups_act_as_in_torch_and_pair_step_names_them(name, options):
    ours, theirs = sides(name)
    for side in (ours, theirs):
        side.other = nn.Parameter(side.weight.detach().clone())
        side.optimizer.add_param_group({"params": [side.other], **options})
        for seed in range(4):
            side.optimizer.zero_grad()
            (side.loss(seed) + side.loss_of(side.other, draw_pairs(seed), side.spec)).backward()
            side.optimizer.step()
        side.optimizer.zero_grad()
    assert not torch.allclose(ours.weight, ours.other)
    close(ours.weight, theirs.weight)
    close(ours.other, theirs.other)
    before, state = ours.other.detach().clone(), copy.deepcopy(ours.optimizer.state_dict()["state"])
    for option in options:
        if option != "decoupled_weight_decay":  # which is no more than a way of the other
            with pytest.raises(ValueError, match=f"pair_step has no.* {option}="):
                ours.optimizer.pair_step(ours.other, draw_pairs(), square, ours.spec)
    assert torch.equal(ours.other, before)
    after = ours.optimizer.state_dict()["state"]
    for n in state:
        assert all(torch.equal(after[n][k], v) for k, v in state[n].items() if torch.is_tensor(v))
    ours.pair_step(5)  # the first group has no such option
    theirs.step(5)
    close(ours.weight, theirs.weight)


def outcome(call):
    """The message of the error of a call, None if it has none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", [*NAMES, "SparseAdam"])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"eps": -1.0},
        {"betas": (1.5, 0.9)},
        {"betas": (0.9, float("nan"))},
    ],
    ids=str,
)
def test_impossible_options_are_refused_as_in_torch(name, options):
    own = {"SparseAdam": "LazyAdam"}.get(name, name)
    theirs, ours = getattr(torch.optim, name), getattr(optim, own)
    if not set(options) <= set(inspect.signature(theirs).parameters):
        pytest.skip("not an option of this optimizer")
    found, expected = (
        outcome(lambda kind=kind: kind([nn.Parameter(torch.ones(3))], **options)) for kind in (ours, theirs)
    )
    assert found == expected
    if (name, set(options)) != ("SGD", {"lr"}) or options["lr"] < 0:  # torch's SGD takes a rate that is NaN
        assert found is not None


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"lr": float("nan")}, {"eps": -1.0}, {"initial_accumulator_value": float("nan")}],
    ids=str,
)
def test_impossible_options_of_rowwise_adagrad_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        optim.RowwiseAdagrad([nn.Parameter(torch.ones(3, 2))], **options)


@every_optimizer
def test_schedulers_take_pair_step_for_a_step(name):
    ours, theirs = sides(name)
    rates = []
    for side, step in ((ours, ours.pair_step), (theirs, theirs.step)):
        scheduler = torch.optim.lr_scheduler.LinearLR(side.optimizer, 1.0, 0.1, total_iters=3)
        for seed in range(4):
            step(seed)
            scheduler.step()
        rates.append(scheduler.get_last_lr())
    assert rates[0] == rates[1] == [pytest.approx(0.001)]
    close(ours.weight, theirs.weight)


@pytest.mark.parametrize("step", ["step", "pair_step"])
def test_a_graph_of_before_a_step_cannot_be_used_after_it(step):
    side = Side("SGD", True)
    loss = side.loss(0)
    getattr(side, step)(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_optimizer
def test_a_rate_may_be_a_tensor(name):
    options = {} if name == "SGD" else {"foreach": False}
    ours, theirs = sides(name, {"lr": torch.tensor(0.05), **options})
    for seed in range(3):
        ours.pair_step(seed)
        theirs.step(seed)
    close(ours.weight, theirs.weight)


FUNC_SPECS = [HashSpec(20, 5, 17), HashSpec(20, 5, 17, block_size=2, signed=True)]
FUNC = {
    "grad": lambda f, w, x: torch.func.grad(lambda w: f(w, x).pow(3).sum())(w[0]),
    "vjp": lambda f, w, x: torch.func.vjp(lambda w: f(w, x).pow(3), w[0])[1](f(w[1], x))[0],
    "jvp": lambda f, w, x: torch.func.jvp(lambda w: f(w, x).pow(3), (w[0],), (w[1],))[1],
    "jacrev": lambda f, w, x: torch.func.jacrev(lambda w: f(w, x).pow(3))(w[0]),
    "jacfwd": lambda f, w, x: torch.func.jacfwd(lambda w: f(w, x).pow(3))(w[0]),
    "vmap of pools": lambda f, w, x: torch.func.vmap(lambda w: f(w, x))(w),
    "vmap of last dimensions": lambda f, w, x: torch.func.vmap(lambda w: f(w, x), 1, -1)(w.T),
    "vmap of ids": lambda f, w, x: torch.func.vmap(lambda x: f(w[0], x))(x.view(2, 3, 2)),
    "vmap of both": lambda f, w, x: torch.func.vmap(f)(w, x.view(2, 3, 2)),
    "vmap of vmap": lambda f, w, x: torch.func.vmap(
        lambda w: torch.func.vmap(lambda x: f(w, x))(x.view(2, 3, 2))
    )(w),
    "gradients of samples": lambda f, w, x: torch.func.vmap(
        torch.func.grad(lambda w, x: f(w, x).pow(3).sum()), (None, 0)
    )(w[0], x.view(2, 3, 2)),
    "changes of samples": lambda f, w, x: torch.func.vmap(
        lambda x: torch.func.jvp(lambda w: f(w, x).pow(3), (w[0],), (w[1],))[1]
    )(x.view(2, 3, 2)),
}
SECOND = {
    "hessian": lambda f, w, x: torch.func.hessian(lambda w: f(w, x).pow(3).sum())(w[0]),
    "jacrev of jacrev": lambda f, w, x: torch.func.jacrev(torch.func.jacrev(lambda w: f(w, x).pow(3).sum()))(
        w[0]
    ),
    "jacrev of jacfwd": lambda f, w, x: torch.func.jacrev(torch.func.jacfwd(lambda w: f(w, x).pow(3).sum()))(
        w[0]
    ),
    "jacfwd of jacfwd": lambda f, w, x: torch.func.jacfwd(torch.func.jacfwd(lambda w: f(w, x).pow(3).sum()))(
        w[0]
    ),
    "backward of backward": lambda f, w, x: grad_of_grad(f, w[0], x),
}
every_func_spec = pytest.mark.parametrize("spec", FUNC_SPECS, ids=["values", "signed blocks"])


def grad_of_grad(function, weight, x):
    weight = weight.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(weight, x).pow(3).sum(), weight, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), weight)[0]


def func_inputs(spec):
    generator = torch.Generator().manual_seed(0)
    pools = torch.randn(2, spec.pool_size, generator=generator)
    return pools, torch.randint(spec.num_embeddings, (6, 2), generator=generator)


@ignoring_torchscript
@every_func_spec
@pytest.mark.parametrize("transform", [*FUNC, *SECOND])
@pytest.mark.parametrize("kind", ["lookup", "module", "padded"])
def test_transforms_of_lookups_are_those_of_plain_indexing(transform, kind, spec):
    weights, ids = func_inputs(spec)
    padding = int(ids[0, 0]) if kind == "padded" else None
    table = HashedEmbedding(20, 5, padding, pool_size=17, block_size=spec.block_size, signed=spec.signed)

    def plain(weight, ids):
        rows = plain_rows(weight, ids, spec)
        return rows if padding is None else torch.where((ids == padding).unsqueeze(-1), 0.0, rows)

    def ours(weight, ids):
        if kind == "lookup":
            return ops.hashed_lookup(weight, ids, spec)
        return torch.func.functional_call(table, {"weight": weight}, (ids,))

    call = {**FUNC, **SECOND}[transform]
    expected = call(plain, weights, ids)
    assert expected.count_nonzero() > 0
    close(call(ours, weights, ids), expected)


@ignoring_torchscript
@every_func_spec
@pytest.mark.parametrize("transform", FUNC)
def test_transforms_of_pair_scores_are_those_of_plain_indexing(transform, spec):
    weights, pairs = func_inputs(spec)
    expected = FUNC[transform](lambda w, x: plain_scores(w, x, spec), weights, pairs)
    close(FUNC[transform](lambda w, x: ops.pair_scores(w, x, spec), weights, pairs), expected)


@ignoring_torchscript
@every_func_spec
@pytest.mark.parametrize("transform", SECOND)
def test_second_derivatives_of_pair_scores_are_right_or_refused(transform, spec):
    weights, pairs = func_inputs(spec)
    expected = SECOND[transform](lambda w, x: plain_scores(w, x, spec), weights, pairs)
    try:
        found = SECOND[transform](lambda w, x: ops.pair_scores(w, x, spec), weights, pairs)
    except (RuntimeError, NotImplementedError) as error:
        assert "pair_scores" in str(error) or "differentiable" in str(error)
    else:
        close(found, expected)


@ignoring_torchscript
@pytest.mark.parametrize("transform", SECOND)
def test_second_derivatives_of_vector_scores_are_right_or_refused(transform):
    vectors = torch.randn(2, 6, 2, 5, generator=torch.Generator().manual_seed(0))
    expected = SECOND[transform](lambda v, x: (v[:, 0] * v[:, 1]).sum(-1), vectors, None)
    try:
        found = SECOND[transform](lambda v, x: ops.vector_scores(v), vectors, None)
    except (RuntimeError, NotImplementedError) as error:
        assert "vector_scores" in str(error) or "differentiable" in str(error)
    else:
        close(found, expected)


@every_func_spec
def test_vmap_may_draw_another_dropout_for_each(spec):
    weights, pairs = func_inputs(spec)
    call = torch.func.vmap(lambda w: ops.pair_scores(w, pairs, spec, dropout=0.5), randomness="different")
    first, second = call(weights[:1].expand(2, -1))
    assert not torch.allclose(first, second)


@ignoring_torchscript
@every_func_spec
def test_ops_pass_gradcheck_in_both_modes(spec):
    (weight, _), pairs = func_inputs(spec)
    weight = weight.clone().requires_grad_()
    vectors = torch.randn(6, 2, 5, requires_grad=True)
    check = functools.partial(torch.autograd.gradcheck, check_forward_ad=True, check_batched_grad=True)
    assert check(lambda w: ops.hashed_lookup(w, pairs, spec), weight)
    assert check(lambda w: ops.pair_scores(w, pairs, spec), weight)
    assert check(ops.vector_scores, vectors)

    def dropped(call):
        torch.manual_seed(0)
        return call(dropout=0.3)

    assert check(lambda w: dropped(functools.partial(ops.pair_scores, w, pairs, spec)), weight)
    assert check(lambda v: dropped(functools.partial(ops.vector_scores, v)), vectors)


@ignoring_torchscript
@every_func_spec
def test_lookups_pass_gradcheck_twice(spec):
    (weight, _), ids = func_inputs(spec)
    weight = weight.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda w: ops.hashed_lookup(w, ids, spec).pow(3), weight, check_fwd_over_rev=True
    )


class Lookups(torch.utils.data.Dataset):
    def __init__(self, table):
        self.table = table

    def __len__(self):
        return 50

    def __getitem__(self, i):
        with torch.no_grad():
            return os.getpid(), self.table(torch.tensor(i))


def test_a_forked_worker_looks_up_what_its_parent_does(two_threads):
    table = make_table()
    expected = table(torch.arange(50)).detach()
    loader = torch.utils.data.DataLoader(
        Lookups(table), batch_size=10, num_workers=1, multiprocessing_context="fork", timeout=120
    )
    pids, rows = zip(*loader, strict=True)
    assert os.getpid() not in torch.cat(pids).tolist()
    assert torch.equal(torch.cat(rows), expected)
    assert torch.equal(table(torch.arange(50)), expected)  # the parent works on


def exit_code_of_fork(call, limit=240):
    """The exit code of a forked child: 0 if the call is true, negative if a signal ended it."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            code = 0 if call() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "no end"


def test_a_forked_process_computes_what_its_parent_does(two_threads):
    table, pairs = make_table(), draw_pairs()

    def compute():
        side = Side("Adagrad", True)
        side.pair_step(0)
        scores = ops.pair_scores(table.weight, pairs, table.spec).detach()
        return table(pairs).detach(), scores, side.weight.detach()

    expected = compute()

    def agrees():
        return all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(compute(), expected, strict=True))

    assert exit_code_of_fork(agrees) == 0
    assert exit_code_of_fork(lambda: exit_code_of_fork(agrees) == 0) == 0  # a child's child
    assert agrees()


NO_CACHE = """
import warnings
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from cemb import HashedEmbedding, reference
    table = HashedEmbedding(50, 8, pool_size=64, block_size=4)
    ids = torch.arange(50)
    assert torch.equal(table(ids), reference.hashed_lookup(table.weight, ids, table.spec))
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")
"""


@pytest.mark.long
def test_without_a_folder_for_kernels_they_are_compiled_in_memory_with_one_warning():
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", NO_CACHE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("RuntimeWarning")]
    assert len(found) == 1, done.stdout
    assert "NUMBA_CACHE_DIR" in found[0]


@ignoring_torchscript
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("block_size", [1, 4])
def test_scores_of_a_parameter_of_an_optimizer_compile_whole(backend, block_size, fresh_dynamo):
    ours, theirs = sides("Adam", block_size=block_size)
    ours.loss_of = torch.compile(fused_loss, fullgraph=True, backend=backend)
    for seed in range(3):
        ours.step(seed)
        theirs.step(seed)
        close(ours.weight, theirs.weight)


CHANGES = {
    "block_size": 8,
    "hash_seed": 7,
    "signed": True,
    "table_offset": 3,
    "pool_size": 65,
    "embedding_dim": 16,
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_states_of_another_hash_are_refused_with_both_named(change, strict):
    sizes = {
        "embedding_dim": 8,
        "pool_size": 64,
        "block_size": 4,
        "hash_seed": 0,
        "signed": 0,
        "table_offset": 0,
    }
    found = {**sizes, change: int(CHANGES[change])}
    saved_from = nn.Sequential(HashedEmbedding(50, **found))
    module = nn.Sequential(make_table())
    before = module[0].weight.detach().clone()
    with pytest.raises(RuntimeError) as caught:
        module.load_state_dict(saved(saved_from.state_dict()), strict=strict)
    for numbers in (sizes, found):
        assert ", ".join(f"{name}={value}" for name, value in numbers.items()) in str(caught.value)
    assert "0.weight" in str(caught.value)
    assert torch.equal(module[0].weight, before)


def test_states_of_version_0_1_0_load_with_one_warning():
    other, module = make_table(init_std=3.0), make_table()
    with pytest.warns(UserWarning, match="did not save the hash") as caught:
        module.load_state_dict({"weight": other.weight.detach()})
    assert len(caught) == 1
    assert torch.equal(module.weight, other.weight)


def test_states_load_into_other_numbers_of_rows():
    other = make_table(init_std=3.0)
    module = HashedEmbedding(500, 8, pool_size=64, block_size=4)
    assert not module.load_state_dict(saved(other.state_dict())).missing_keys
    ids = torch.arange(50)
    assert torch.equal(module(ids), other(ids))
    assert module.num_embeddings == 500


def test_states_are_strict_about_the_rest():
    state = make_table().state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make_table().load_state_dict({**state, "more": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        make_table().load_state_dict({key: value for key, value in state.items() if key != "weight"})


@pytest.mark.parametrize("assign", [True, False])
def test_models_load_what_they_saved(assign):
    options = {"pool_size": 64, "block_size": 4, "signed": True, "shared_table": False, "bias": "shared"}
    first, second = (build_model("hashed", 50, 8, **options) for _ in range(2))
    with torch.no_grad():
        first.word_bias.normal_()
    second.load_state_dict(saved(first.state_dict()), assign=assign)
    pairs = draw_pairs()
    assert torch.equal(first(pairs), second(pairs))


@pytest.mark.parametrize("block_size", [1, 4])
def test_inputs_and_outputs_may_be_resized_afterwards(block_size):
    table = make_table(block_size=block_size)
    optimizer = optim.SGD(table.parameters(), 0.1)
    ids, pairs, targets, flat = torch.tensor([1, 2, 3]), draw_pairs(), torch.ones(12), torch.arange(24)
    with torch.no_grad():
        rows, scores = table(ids), ops.pair_scores(table.weight, pairs, table.spec)
        viewed = table(flat.view(2, 12))
    vectors = torch.randn(3, 2, 4)
    dots = ops.vector_scores(vectors)
    optimizer.pair_step(table.weight, pairs, optim.SquaredError(targets), table.spec)
    bag = HashedEmbeddingBag(50, 8, weight=table.weight)
    bag_ids = torch.tensor([[1, 2]])
    sums = bag(bag_ids).detach()
    for tensor in (ids, pairs, targets, flat, rows, scores, viewed, vectors, dots, bag_ids, sums):
        before = tensor.clone().flatten()
        tensor.resize_(tensor.numel() + 50)
        assert torch.equal(tensor[: len(before)], before)


def test_weights_may_be_resized_after_a_step():
    table = make_table()
    optimizer = optim.Adagrad(table.parameters(), 0.1)
    optimizer.pair_step(table.weight, draw_pairs(), square, table.spec)
    weight = table.weight.detach().clone()
    table.weight.data.resize_(100)
    assert torch.equal(table.weight.data[:64], weight)


def assorted_tables(*, pool_step):
    """Twelve tables that differ in everything, in the size of the pool only by a step."""
    for n in range(12):
        padding = n if n in (5, 6) else None
        yield HashedEmbedding(
            *(20 + n, 4 + n, padding),
            pool_size=60 + pool_step * n,
            block_size=1 + n % 4,
            hash_seed=n,
            signed=bool(n % 2),
            table_offset=5 * n,
        )


def padded_rows(table, ids):
    rows = plain_rows(table.weight, ids, table.spec)
    if table.padding_idx is None:
        return rows
    return torch.where((ids == table.padding_idx).unsqueeze(-1), 0.0, rows)


# Torch recompiles for every shape of a parameter, eight times at most, for `nn.Embedding` too.
@ignoring_torchscript
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_many_tables_compile_whole_one_by_one(backend, fresh_dynamo):
    ids = torch.arange(9).view(3, 3)
    for table in assorted_tables(pool_step=0):
        found = torch.compile(table, fullgraph=True, backend=backend)(ids)
        expected = padded_rows(table, ids)
        assert torch.equal(found, expected), table
        close(*(torch.autograd.grad(out.pow(3).sum(), table.weight)[0] for out in (found, expected)))


@ignoring_torchscript
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_many_tables_compile_whole_in_one_model(backend, fresh_dynamo):
    class Concatenated(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(assorted_tables(pool_step=3))

        def forward(self, ids):
            return torch.cat([table(ids) for table in self.tables], -1)

    model, ids = Concatenated(), torch.arange(9).view(3, 3)
    found = torch.compile(model, fullgraph=True, backend=backend)(ids)
    expected = torch.cat([padded_rows(table, ids) for table in model.tables], -1)
    assert torch.equal(found, expected)
    for grads in zip(
        *(torch.autograd.grad(o.pow(3).sum(), [*model.parameters()]) for o in (found, expected)), strict=True
    ):
        close(*grads)


def test_initializers_for_matrices_raise_their_own_error():
    with pytest.raises(ValueError, match="Fan in and fan out can not be computed"):
        nn.init.xavier_uniform_(make_table().weight)


@pytest.mark.parametrize("field", ["num_embeddings", "embedding_dim", "pool_size", "block_size"])
def test_empty_tables_are_refused_by_name(field):
    sizes = {"num_embeddings": 50, "embedding_dim": 8, "pool_size": 64, "block_size": 4, field: 0}
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        HashedEmbedding(**sizes)


def jagged():
    with warnings.catch_warnings(action="ignore"):  # torch's, of a prototype
        return torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [1, 2], "ids must be a tensor, got list"),
        (lambda: 3, "ids must be a tensor, got int"),
        (lambda: torch.tensor([1.0]), "ids must be int32 or int64, got torch.float64"),
        (jagged, "ids must be a dense tensor, got layout torch.jagged"),
        (lambda: torch.tensor([1, 2]).to_sparse(), "ids must be a dense tensor, got layout torch.sparse_coo"),
    ],
    ids=["list", "int", "float", "jagged", "sparse"],
)
@pytest.mark.parametrize(
    "make_module", [make_table, lambda: HashedEmbeddingBag(50, 8, pool_size=64)], ids=["rows", "bag"]
)
def test_what_are_no_ids_is_refused(make, message, make_module):
    with pytest.raises(TypeError, match=message):
        make_module()(make())


@ignoring_torchscript
@pytest.mark.parametrize("wrap", [lambda table: table, nn.Sequential], ids=["alone", "inside"])
def test_torchscript_is_refused_for_export(wrap):
    with pytest.raises(NotImplementedError, match=r"use torch\.export"):
        torch.jit.script(wrap(make_table()))


@pytest.mark.parametrize("padding", [None, 3])
def test_symbolic_traces_are_the_module(padding):
    table = make_table(padding_idx=padding)
    traced = torch.fx.symbolic_trace(table)
    for ids in (torch.arange(50), torch.tensor([[3], [4]])):
        assert torch.equal(traced(ids), table(ids))
    with torch.no_grad():
        table.weight.add_(1)  # of one parameter still
    assert torch.equal(traced(torch.arange(50)), table(torch.arange(50)))


def test_distributed_tensors_are_refused_by_name(tmp_path):
    from torch import distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        table, ids = make_table(), torch.arange(3)
        with pytest.raises(TypeError, match="ids must not be DTensors"):
            table(distribute_tensor(ids, mesh, [Replicate()]))
        table.weight = nn.Parameter(distribute_tensor(table.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(TypeError, match="weight and ids must not be DTensors"):
            table(ids)
        with pytest.raises(TypeError, match="weight and pairs must not be DTensors"):
            table.pair_scores(draw_pairs(), table, 0.0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", [HashedEmbedding, nn.Embedding])
def test_all_rows_asks_for_ids_where_the_table_is(kind):
    options = {"pool_size": 64} if kind is HashedEmbedding else {}
    table, seen = kind(50, 8, device="meta", **options), []
    table.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].device))
    rows = all_rows(table)
    assert [device.type for device in seen] == ["meta"]
    assert (rows.device.type, rows.shape, rows.dtype) == ("meta", (50, 8), torch.float32)


@pytest.mark.parametrize("padding", [0, 7, 49, -1, -50])
def test_padding_is_a_row_of_zeros_without_a_gradient(padding):
    table = make_table(padding_idx=padding)
    row = nn.Embedding(50, 8, padding_idx=padding).padding_idx
    assert table.padding_idx == row
    ids = torch.tensor([[row, 1, row], [2, 3, 48]])
    weight = nn.Parameter(table.weight.detach().clone())
    full = plain_rows(weight, torch.arange(50), table.spec).index_fill(0, torch.tensor(row), 0.0)
    found, expected = table(ids), F.embedding(ids, full, padding_idx=row)
    assert torch.equal(found, expected)
    assert (found[0, 0] == 0).all()
    for out in (found, expected):
        (out + 1).pow(3).sum().backward()
    close(table.weight.grad, weight.grad)
    table.zero_grad()
    (table(torch.tensor([row])) + 1).sum().backward()
    assert not table.weight.grad.any()


@pytest.mark.parametrize("padding", [50, -51])
def test_padding_outside_the_table_is_refused(padding):
    with pytest.raises(AssertionError):
        nn.Embedding(50, 8, padding_idx=padding)
    with pytest.raises(ValueError, match="padding_idx must be one of the 50 rows"):
        make_table(padding_idx=padding)


def design(spec, rows):
    """The matrix that takes a pool to the values of the rows, from the specification."""
    matrix = torch.zeros(len(rows) * spec.embedding_dim, spec.pool_size)
    for n, row in enumerate(rows):
        for column in range(spec.embedding_dim):
            index, sign = spec.locate(row, column)
            matrix[n * spec.embedding_dim + column, index] = sign
    return matrix


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"pool_size": 30},
        {"pool_size": 200, "signed": True},
        {"pool_size": 40, "block_size": 3, "signed": True},
        {"compression_ratio": 4, "block_size": 7, "hash_seed": 3, "table_offset": 9},
    ],
    ids=str,
)
def test_pretrained_pools_are_least_squares(options, padding):
    rows = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    table = HashedEmbedding.from_pretrained(rows, padding_idx=padding, **options)
    kept = [row for row in range(20) if row != padding]
    values = rows[kept].reshape(-1, 1)
    expected = torch.linalg.lstsq(design(table.spec, kept), values, driver="gelsd").solution[:, 0]
    close(table.weight.detach(), expected)
    assert not table.weight.requires_grad
    assert table.padding_idx == padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pretrained_tables_have_the_type_of_the_rows(dtype):
    rows = torch.randn(20, 7).to(dtype)
    table = HashedEmbedding.from_pretrained(rows, freeze=False, pool_size=10_000)
    assert table.weight.dtype == dtype
    assert table.weight.requires_grad
    # A pool so large that hardly a value has two readers.
    torch.testing.assert_close(
        table(torch.arange(20)).float().mean(), rows.float().mean(), rtol=0.05, atol=0.01
    )


def test_pretrained_pools_are_shared_as_by_torch():
    pool, rows = torch.randn(64), torch.randn(5, 2)
    table = HashedEmbedding.from_pretrained(pool, num_embeddings=50, embedding_dim=8, block_size=4)
    assert torch.equal(table(torch.arange(50)), plain_rows(pool, torch.arange(50), table.spec))
    assert nn.Embedding.from_pretrained(rows).weight.data_ptr() == rows.data_ptr()
    assert table.weight.data_ptr() == pool.data_ptr()
    assert not table.weight.requires_grad
    with pytest.raises(ValueError, match="rows or a pool, got shape"):
        HashedEmbedding.from_pretrained(torch.ones(2, 3, 4), pool_size=8)


def test_a_compression_ratio_takes_the_place_of_a_pool_size():
    table = HashedEmbedding(1000, 16, compression_ratio=10, block_size=8)
    assert (table.pool_size, table.weight.shape, table.compression_ratio) == (1600, (1600,), 10)
    assert HashedEmbedding(10, 16, compression_ratio=1000, block_size=8).pool_size == 8
    for ratio in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=r"compression_ratio must lie in \(0, inf\)"):
            HashedEmbedding(1000, 16, compression_ratio=ratio)
    with pytest.raises(ValueError, match="pool_size and compression_ratio"):
        HashedEmbedding(1000, 16, compression_ratio=10, pool_size=64)
    with pytest.raises(ValueError, match="got none"):
        HashedEmbedding(1000, 16)


def test_positional_arguments_are_those_of_torch():
    ours, theirs = (inspect.signature(kind).parameters.values() for kind in (HashedEmbedding, nn.Embedding))
    positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = [p for p in theirs if not p.name.startswith("_") and p.name not in ("device", "dtype")]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in expected]
    ours, theirs = (
        list(inspect.signature(kind.from_pretrained).parameters)[:3]
        for kind in (HashedEmbedding, nn.Embedding)
    )
    assert ours == theirs


@pytest.mark.parametrize("kind", [HashedEmbedding, HashedEmbeddingBag])
@pytest.mark.parametrize(
    "option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str
)
def test_options_of_torch_that_a_pool_cannot_have_are_refused_by_name(option, kind):
    with pytest.raises(ValueError, match=next(iter(option))):
        kind(50, 8, pool_size=64, **option)
    kind(50, 8, pool_size=64, **{name: type(value)() for name, value in option.items() if value is True})


BAGS = {
    "2-d": ([[1, 2, 2], [7, 7, 7], [3, 49, 0]], None, False),
    "offsets": ([1, 2, 2, 7, 3, 49, 7], [0, 2, 3], False),
    "empty bags": ([1, 2, 7], [0, 0, 2, 3, 3], False),
    "no ids": ([], [0, 0], False),
    "last offset": ([1, 2, 2, 7, 3], [0, 2, 2, 5], True),
}


@pytest.mark.parametrize("padding", [None, 7, -1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("bags", BAGS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_bags_are_those_of_torch_over_the_rows(bags, mode, weighted, padding, dtype):
    ids, offsets, include_last = BAGS[bags]
    ids = torch.tensor(ids, dtype=dtype)
    offsets = None if offsets is None else torch.tensor(offsets, dtype=dtype)
    torch.manual_seed(0)
    bag = HashedEmbeddingBag(
        *(50, 8),
        pool_size=64,
        block_size=4,
        signed=True,
        mode=mode,
        include_last_offset=include_last,
        padding_idx=padding,
    )
    weight = nn.Parameter(bag.weight.detach().clone())
    full = plain_rows(weight, torch.arange(50), bag.spec)
    factors = [
        torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)
    ]
    call = functools.partial(
        F.embedding_bag, mode=mode, include_last_offset=include_last, padding_idx=padding
    )
    if weighted and mode != "sum":
        for function in (
            lambda: call(ids, full, offsets, per_sample_weights=factors[1]),
            lambda: bag(ids, offsets, factors[0]),
        ):
            with pytest.raises(NotImplementedError, match="per_sample_weights"):
                function()
        return
    found = bag(ids, offsets, factors[0] if weighted else None)
    expected = call(ids, full, offsets, per_sample_weights=factors[1] if weighted else None)
    close(found, expected)
    for out in (found, expected):
        (out + 1).pow(3).sum().backward()
    close(bag.weight.grad, torch.zeros(64) if weight.grad is None else weight.grad)
    assert bag.weight.grad.any() == bool(ids.numel())
    if weighted:
        close(factors[0].grad, factors[1].grad)


@pytest.mark.parametrize(
    ("ids", "offsets"),
    [([1, 2], None), ([[1, 2]], [0]), ([1, 2], [[0]]), ([1, 2], [1]), ([1, 2], [0, 5])],
    ids=str,
)
def test_bags_that_torch_refuses_are_refused(ids, offsets):
    ids, offsets = torch.tensor(ids), None if offsets is None else torch.tensor(offsets)
    errors = (ValueError, RuntimeError, AssertionError)
    with pytest.raises(errors) as expected:
        nn.EmbeddingBag(50, 8)(ids, offsets)
    with pytest.raises(expected.type):
        HashedEmbeddingBag(50, 8, pool_size=64)(ids, offsets)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_ids_of_bags_lie_in_the_table(mode):
    with pytest.raises(IndexError):
        HashedEmbeddingBag(50, 8, pool_size=64, mode=mode)(torch.tensor([[50]]))


TRAINED = [
    ("SGD", {"block_size": 4}),
    ("Adagrad", {"block_size": 4}),
    ("Adam", {"block_size": 4}),
    ("Adam", {"block_size": 1}),
    ("LazyAdam", {"block_size": 4}),
]


@pytest.mark.parametrize(("name", "table_options"), TRAINED)
@pytest.mark.parametrize("order", ["pair_step", "step", "both"])
def test_training_resumes_bit_for_bit(name, table_options, order, two_threads):
    if name == "LazyAdam" and order != "pair_step":
        pytest.skip("its step is for sparse gradients")

    def train(side, seeds):
        for seed in seeds:
            is_pair_step = order == "pair_step" or (order == "both" and seed % 2 == 0)
            (side.pair_step if is_pair_step else side.step)(seed)

    whole = Side(name, True, **table_options)
    train(whole, range(7))
    first = Side(name, True, **table_options)
    train(first, range(3))
    kept = saved({"table": first.table.state_dict(), "optimizer": first.optimizer.state_dict()})
    second = Side(name, True, init_std=5.0, **table_options)
    second.table.load_state_dict(kept["table"])
    second.optimizer.load_state_dict(kept["optimizer"])
    train(second, range(3, 7))
    assert torch.equal(second.weight, whole.weight)
    states = state_of(second.optimizer), state_of(whole.optimizer)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@every_optimizer
@pytest.mark.parametrize(
    "table_options", [{}, {"block_size": 1}, {"signed": True, "pool_size": 500}], ids=str
)
def test_steps_of_both_kinds_may_follow_each_other(name, table_options):
    ours, theirs = sides(name, **table_options)
    for seed in range(8):
        (ours.pair_step if seed in (0, 3, 4, 7) else ours.step)(seed)
        theirs.step(seed)
        close(ours.weight, theirs.weight)
    states = state_of(ours.optimizer), state_of(theirs.optimizer)
    assert states[0].keys() == states[1].keys()
    for key, value in states[1].items():
        assert value.dtype == states[0][key].dtype
        close(states[0][key], value)


@every_optimizer
@pytest.mark.parametrize("is_ours_first", [True, False])
def test_checkpoints_of_optimizers_are_those_of_torch(name, is_ours_first):
    first, second = sides(name)[:: 1 if is_ours_first else -1]
    for seed in range(3):
        (first.pair_step if is_ours_first else first.step)(seed)
    with torch.no_grad():
        second.weight.copy_(first.weight)
    second.optimizer.load_state_dict(saved(first.optimizer.state_dict()))
    first.step(3)
    (second.step if is_ours_first else second.pair_step)(3)
    close(first.weight, second.weight)


@every_optimizer
def test_gradients_of_batches_add_up(name):
    ours, theirs = sides(name)
    for seed in range(3):
        for side in (ours, theirs):
            side.optimizer.zero_grad()
            side.loss(seed).backward()
            side.loss(seed + 10).backward()
        close(ours.weight.grad, theirs.weight.grad)
        with pytest.raises(RuntimeError, match="gradient that no step has used"):
            ours.pair_step(seed)
        for side in (ours, theirs):
            side.optimizer.step()
        close(ours.weight, theirs.weight)


@every_optimizer
def test_models_of_one_pool_train_it_together(name):
    ours, theirs = sides(name)
    other = HashedEmbedding(90, 6, weight=ours.weight, block_size=2, signed=True, table_offset=50)
    head = nn.Linear(6, 1)
    ids = torch.arange(0, 90, 7)
    for seed in range(3):
        for side, rows in (
            (ours, other),
            (theirs, functools.partial(plain_rows, theirs.weight, spec=other.spec)),
        ):
            side.optimizer.zero_grad()
            (side.loss(seed) + head(rows(ids)).square().sum()).backward()
            side.optimizer.step()
        close(ours.weight, theirs.weight)
        assert other.weight is ours.weight


@every_optimizer
@pytest.mark.parametrize("way", ["step", "pair_step"])
def test_words_and_contexts_may_be_tied_or_apart(name, way):
    for shared in (True, False):
        torch.manual_seed(0)
        model = build_model("hashed", 50, 8, pool_size=64, block_size=4, shared_table=shared)
        assert len(list(model.parameters())) == 1
        weight = nn.Parameter(model.word_table.weight.detach().clone())
        ours = getattr(optim, name)(model.parameters(), lr=0.01)
        theirs = getattr(torch.optim, name)([weight], lr=0.01)
        for seed in range(3):
            pairs = draw_pairs(seed)
            if way == "pair_step":
                model.pair_step(ours, pairs, lambda scores: (scores - 1).square().sum())
            else:
                ours.zero_grad()
                (model(pairs) - 1).square().sum().backward()
                ours.step()
            theirs.zero_grad()
            words = plain_rows(weight, pairs[:, 0], model.word_table.spec)
            contexts = plain_rows(weight, pairs[:, 1], model.context_table.spec)
            ((words * contexts).sum(-1) - 1).square().sum().backward()
            theirs.step()
        close(model.word_table.weight, weight)


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in NAMES), ("SGD", {"momentum": 0.9})])
def test_a_parameter_that_a_step_does_not_use_rests(name, options):
    ours, theirs = sides(name, options)
    for side in (ours, theirs):
        side.other = nn.Parameter(side.weight.detach().clone())
        side.optimizer.add_param_group({"params": [side.other]})
        side.optimizer.zero_grad()
        (side.loss(0) + side.loss_of(side.other, draw_pairs(1), side.spec)).backward()
        side.optimizer.step()
        before = side.other.detach().clone()
        side.step(2)
        assert torch.equal(side.other, before)
    close(ours.weight, theirs.weight)
    close(ours.other, theirs.other)
    if not options:
        before = ours.other.detach().clone(), copy.deepcopy(ours.optimizer.state[ours.other])
        ours.pair_step(3)
        theirs.step(3)
        close(ours.weight, theirs.weight)
        assert torch.equal(ours.other, before[0])
        assert all(
            torch.equal(ours.optimizer.state[ours.other][k], v)
            for k, v in before[1].items()
            if torch.is_tensor(v)
        )


@every_optimizer
def test_hooks_are_called_as_by_torch(name):
    ours, theirs = sides(name)
    calls = []
    for side in (ours, theirs):
        seen = []
        side.optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("pre"))
        side.optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("post"))
        side.weight.register_hook(lambda grad, seen=seen: [seen.append("grad"), grad * 3][1])
        side.weight.register_post_accumulate_grad_hook(
            lambda w, seen=seen: seen.append(f"grad {w.grad.norm():.6g}")
        )
        for seed in range(2):
            side.step(seed)
        calls.append(seen)
    assert calls[0] == calls[1]
    assert len(calls[0]) == 8
    close(ours.weight, theirs.weight)


@every_optimizer
def test_closures_are_called_as_by_torch(name):
    ours, theirs = sides(name)
    for seed in range(2):
        losses = []
        for side in (ours, theirs):

            def closure(side=side, seed=seed):
                side.optimizer.zero_grad()
                loss = side.loss(seed)
                loss.backward()
                return loss

            losses.append(side.optimizer.step(closure).detach())
        close(*losses)
    close(ours.weight, theirs.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookups_under_autocast_have_the_type_of_the_pool_as_in_torch(dtype):
    table = make_table(dtype=dtype)
    embedding = nn.Embedding.from_pretrained(
        plain_rows(table.weight, torch.arange(50), table.spec), freeze=False
    )
    head = nn.Linear(8, 3, dtype=dtype)
    ids, found = torch.tensor([3, 49, 3]), []
    for module in (table, embedding):
        with torch.autocast("cpu", torch.bfloat16):
            rows = module(ids)
            out = head(rows)
        out.float().square().sum().backward()
        found.append((rows.detach(), out.detach(), module.weight.grad))
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert found[0][2].dtype == dtype
    expected = design(table.spec, range(50)).T @ found[1][2].double().reshape(-1)
    torch.testing.assert_close(found[0][2].double(), expected, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        scores = ops.pair_scores(table.weight, draw_pairs(), table.spec)
    assert torch.equal(scores, ops.pair_scores(table.weight, draw_pairs(), table.spec))


@every_optimizer
def test_pools_of_bfloat16_train_as_by_torch_and_pair_step_refuses_them(name):
    ours, theirs = sides(name, dtype=torch.bfloat16)
    start = ours.weight.detach().clone()
    for seed in range(3):
        with torch.no_grad():
            ours.weight.copy_(theirs.weight)  # so that rounding does not add up
        for side in (ours, theirs):
            side.optimizer.zero_grad()
            side.loss(seed).backward()
        assert ours.weight.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0.05, atol=0.5)
        ours.weight.grad.copy_(theirs.weight.grad)
        for side in (ours, theirs):
            side.optimizer.step()
        assert torch.equal(ours.weight, theirs.weight)
    assert not torch.equal(ours.weight, start)
    ours.optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"on the CPU, got torch\.bfloat16"):
        ours.pair_step(0)


@pytest.mark.parametrize("padding", [None, 3])
def test_exported_programs_are_the_module(padding, tmp_path):
    table = make_table(padding_idx=padding)
    dynamic = {"ids": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(table, (torch.arange(4),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "table.pt2")
    for loaded in (program, torch.export.load(tmp_path / "table.pt2")):
        for ids in (torch.arange(50), torch.tensor([3, 4])):
            assert torch.equal(loaded.module()(ids), table(ids))


def test_modules_on_device_meta_take_their_weights_later():
    for kind in (HashedEmbedding, HashedEmbeddingBag):
        with torch.device("meta"):
            made = kind(50, 8, pool_size=64, block_size=4)
        table = kind(50, 8, pool_size=64, block_size=4)
        assert made.weight.device.type == "meta"
        ids = torch.arange(6).view(2, 3)
        on_meta = made(ids.to("meta"))
        assert (on_meta.device.type, on_meta.shape) == ("meta", table(ids).shape)
        scores = ops.pair_scores(made.weight, draw_pairs().to("meta"), made.spec, dropout=0.1)
        assert (scores.device.type, scores.shape) == ("meta", (12,))
        assigned = copy.deepcopy(made)
        assigned.load_state_dict(table.state_dict(), assign=True)
        emptied = copy.deepcopy(made).to_empty(device="cpu")
        emptied.load_state_dict(table.state_dict())
        for loaded in (assigned, emptied):
            assert torch.equal(loaded(ids), table(ids))
        optimizer = optim.SGD(assigned.parameters(), 0.1)
        optimizer.pair_step(assigned.weight, draw_pairs(), square, assigned.spec)


def test_fake_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        table = make_table()
        ids = torch.zeros(3, 4, dtype=torch.int64)
        rows, scores = table(ids), ops.pair_scores(table.weight, ids[:, :2], table.spec, dropout=0.1)
        dots = ops.vector_scores(rows[:, :2])
        (scores.sum() + rows.sum() + dots.sum()).backward()
        for tensor, shape in ((rows, (3, 4, 8)), (scores, (3,)), (dots, (3,)), (table.weight.grad, (64,))):
            assert isinstance(tensor, FakeTensor)
            assert tensor.shape == shape
            assert tensor.dtype == torch.float64


class Mixed:
    """A table whose scores a dense head reads, trained with a rate of its own."""

    def __init__(self, name, weight, head_name="Adam"):
        self.weight = nn.Parameter(weight.clone())
        torch.manual_seed(1)
        self.head = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        self.head_optimizer = getattr(torch.optim, head_name)(self.head.parameters(), lr=0.02)

    def loss(self, scores):
        found = self.head(scores.unsqueeze(-1)).squeeze(-1) + 0.1 * scores
        return (found - torch.linspace(-1, 1, len(scores))).square().mean()


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((name, HashSpec(50, 8, 64, block_size=4, signed=True)) for name in NAMES),
        *((name, HashSpec(50, 8, 64)) for name in NAMES),
        *((name, FullSpec(50, 8)) for name in ("SGD", "Adagrad")),
        ("LazyAdam", FullSpec(50, 8)),
    ],
    ids=str,
)
def test_a_dense_head_of_the_scores_trains_beside_pair_step(name, spec):
    shape = (50, 8) if isinstance(spec, FullSpec) else (spec.pool_size,)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = Mixed(name, start), Mixed(name, start)
    is_sparse = name == "LazyAdam"
    ours.optimizer = getattr(optim, name)([ours.weight], lr=0.05)
    theirs.optimizer = getattr(torch.optim, "SparseAdam" if is_sparse else name)([theirs.weight], lr=0.05)
    for seed in range(6):
        pairs = draw_pairs(seed)
        ours.head_optimizer.zero_grad()
        value = ours.optimizer.pair_step(ours.weight, pairs, ours.loss, spec)
        assert ours.weight.grad is None
        assert all(parameter.grad is not None for parameter in ours.head.parameters())
        ours.head_optimizer.step()
        theirs.head_optimizer.zero_grad()
        theirs.optimizer.zero_grad()
        if is_sparse:
            vectors = F.embedding(pairs, theirs.weight, sparse=True)
            scores = (vectors[:, 0] * vectors[:, 1]).sum(-1)
        else:
            scores = plain_scores(theirs.weight, pairs, spec)
        expected = theirs.loss(scores)
        expected.backward()
        theirs.optimizer.step()
        theirs.head_optimizer.step()
        close(value, expected.detach())
        close(ours.weight, theirs.weight)
        for a, b in zip(ours.head.parameters(), theirs.head.parameters(), strict=True):
            close(a, b)
    assert not torch.allclose(ours.weight, start)


def test_the_tables_above_are_summed_in_the_ways_of_small_ones():
    small, single = make_table().spec, make_table(block_size=1).spec
    assert updates.plan(small) == updates.plan(single) == "private"
    assert updates.plan(small, is_lazy=True) == updates.plan(FullSpec(50, 8)) == "conflicts"
