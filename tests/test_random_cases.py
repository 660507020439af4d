"""Small random tables and batches, against plain PyTorch in float64: for what nobody thought of."""

import numpy as np
import pytest
import torch
from torch import nn

from cemb import ops, optim, reference
from cemb.hashing import FullSpec, HashSpec, PairDropout
from cemb.kernels import cpu
from cemb.kernels.cpu import locate

CASES_A_SEED = 10_000


def _draw_spec(rng):
    dim = int(rng.choice([rng.integers(1, 12), rng.integers(1, 258)]))
    rows = int(rng.integers(1, 40))
    if rng.random() < 0.15:
        return FullSpec(rows, dim)
    block = int(rng.choice([1, dim, rng.integers(1, dim + 1)]))
    pool = int(block + rng.choice([0, rng.integers(0, 20), rng.integers(0, 3000)]))
    offset = int(rng.choice([0, 7, 2**40]))
    return HashSpec(rows, dim, pool, block, int(rng.integers(2**62)), bool(rng.random() < 0.5), offset)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_random_small_cases_are_those_of_naive_pytorch(seed, monkeypatch, record_property):
    record_property("lookups, scores and steps against naive PyTorch", CASES_A_SEED)
    rng = np.random.default_rng(seed)
    for case in range(CASES_A_SEED):
        spec = _draw_spec(rng)
        # Pools are small, so that the limit of private ones stands for that of large pools.
        limit = int(rng.choice([0, 500, 2**22]))
        monkeypatch.setattr(locate, "PRIVATE_POOL_LIMIT", limit)
        number = int(rng.integers(1, 3))
        monkeypatch.setattr(cpu.threads, "_set_threads", lambda number=number: number)
        n = int(rng.choice([0, 1, rng.integers(1, 70)]))
        pairs = torch.from_numpy(rng.integers(spec.num_embeddings, size=(n, 2)))
        if rng.random() < 0.2:
            pairs[:, 1] = pairs[:, 0]
        offset = 0 if isinstance(spec, FullSpec) else int(rng.choice([0, spec.table_offset + 3]))
        p = float(rng.choice([0.0, 0.3]))
        start = torch.from_numpy(rng.standard_normal(spec.pool_size))
        targets, weights = torch.from_numpy(rng.random((2, n)))
        what = (
            f"case {case}: {spec}, {n} pairs, offset {offset}, dropout {p}, limit {limit}, {number} threads"
        )
        options = {"context_offset": offset, "dropout": p}

        naive = start.clone().requires_grad_()
        torch.manual_seed(case)
        drop = PairDropout(p, int(torch.randint(2**62, ())) if p else 0)
        expected = reference.pair_scores(naive, pairs, spec, offset, drop)
        loss = (weights * (expected - targets).square()).sum()
        (gradient,) = torch.autograd.grad(loss, naive)

        kind = rng.choice(["gradient", "bfloat16", "step", "lookup"], p=[0.3, 0.2, 0.4, 0.1])
        if kind in ("gradient", "bfloat16"):
            dtype = torch.float64 if kind == "gradient" else torch.bfloat16
            pool = start.to(dtype).requires_grad_()
            exact = pool.detach().double().requires_grad_()
            torch.manual_seed(case)
            scores = ops.pair_scores(pool, pairs, spec, **options)
            (found,) = torch.autograd.grad((weights.to(dtype) * scores).sum(), pool)
            wanted = reference.pair_scores(exact, pairs, spec, offset, drop)
            (slope,) = torch.autograd.grad((weights.to(dtype).double() * wanted).sum(), exact)
            error = 1e-9 if kind == "gradient" else 1e-2
            for ours, truth in ((scores, wanted), (found, slope)):
                # Sums of rounded products err by the size of the largest.
                scale = 1 + float(truth.detach().abs().max()) if truth.numel() else 1.0
                torch.testing.assert_close(ours.double(), truth, rtol=error, atol=error * scale, msg=what)
        elif kind == "step":
            shape = (spec.num_embeddings, -1) if isinstance(spec, FullSpec) else (-1,)
            weight = nn.Parameter(start.clone().view(shape))
            optimizer = optim.Adagrad([weight], 0.1, eps=1e-3)
            torch.manual_seed(case)
            labels = optim.SquaredError(targets, weights)
            found_loss = optimizer.pair_step(weight, pairs, labels, spec, **options)
            moved = start - 0.1 * gradient / (gradient.abs() + 1e-3)
            torch.testing.assert_close(weight.detach().view(-1), moved, rtol=1e-7, atol=1e-7, msg=what)
            torch.testing.assert_close(found_loss, loss.detach(), rtol=1e-9, atol=1e-9, msg=what)
        elif isinstance(spec, HashSpec):
            rows = ops.hashed_lookup(start, pairs, spec)
            assert torch.equal(rows, reference.hashed_lookup(start, pairs, spec)), what
