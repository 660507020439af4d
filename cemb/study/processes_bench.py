"""A training step on one process and on two of this machine: how long it takes, and the bytes exchanged.

This process is rank 0 and times; rank 1 makes the steps that it is told to. Steps of one process and of two
take turns, so that what slows the machine hits all alike.
"""

import itertools
import multiprocessing
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from cemb import processes
from cemb.checks import check_integers
from cemb.model import build_model
from cemb.optim import SquaredError
from cemb.study import records, timing
from cemb.study.exchange import dense_bytes, expected_rows, sparse_bytes
from cemb.study.sizes import BLOCK, ROWS, SMALL, Optimizer
from cemb.train import distributed
from cemb.train.loops import make_optimizer

_NUM_BATCHES = 8
_NUM_RANKS = 2
# For the other process to start, and for its next step to be asked for.
_TIMEOUT = timedelta(minutes=5)


class Sizes(NamedTuple):
    """What all cases share."""

    num_embeddings: int
    embedding_dim: int
    batch_size: int
    optimizer: Optimizer
    threads: int


class Case(NamedTuple):
    """A table: in a pool, or full, with a sparse gradient or a dense one."""

    pool_size: int | None = None
    block_size: int = 1
    is_sparse: bool = False

    def expected_bytes(self, sizes: Sizes) -> float:
        """Bytes that one of two ranks hands over in a step, by sizes alone."""
        if self.is_sparse:
            rows = expected_rows(sizes.num_embeddings, 2 * sizes.batch_size // _NUM_RANKS)
            return sparse_bytes(rows, sizes.embedding_dim)
        return dense_bytes(self.pool_size or sizes.num_embeddings * sizes.embedding_dim)


def _steps(cases: Sequence[Case], sizes: Sizes) -> list[Callable[[timing.Clock, int], int]]:
    """A step for each case, of one rank or of all; it returns the bytes that this one has handed over."""
    torch.set_num_threads(sizes.threads)
    generator = torch.Generator().manual_seed(0)
    shape = _NUM_BATCHES, sizes.batch_size
    pairs = torch.randint(sizes.num_embeddings, (*shape, 2), generator=generator)
    batches = list(zip(pairs, torch.rand(shape, generator=generator), strict=True))
    rank = dist.get_rank()

    def step_of(case: Case) -> Callable[[timing.Clock, int], int]:
        torch.manual_seed(0)
        model = build_model(
            "full" if case.pool_size is None else "hashed",
            sizes.num_embeddings,
            sizes.embedding_dim,
            pool_size=case.pool_size,
            block_size=case.block_size,
            sparse_gradients=case.is_sparse,
        )
        optimizer = make_optimizer(sizes.optimizer, model.parameters(), 0.01, sparse_gradients=case.is_sparse)
        turn = itertools.cycle(batches)

        def step(clock: timing.Clock, num_ranks: int) -> int:
            ids, targets = (part[rank % num_ranks :: num_ranks] for part in next(turn))
            weights = torch.full_like(targets, 1 / sizes.batch_size)
            sent = 0
            with clock.phase("gradient"):
                SquaredError(targets, weights)(model(ids)).backward()
            if num_ranks > 1:
                with clock.phase("exchange"):
                    sent = distributed.sum_gradients(model.parameters())
            with clock.phase("update"):
                optimizer.step()
                optimizer.zero_grad()
            return sent

        return step

    return [step_of(case) for case in cases]


def _join(rank: int, place: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=_NUM_RANKS, timeout=_TIMEOUT
    )


def _serve(place: str, cases: Sequence[Case], sizes: Sizes) -> None:
    """Rank 1, which makes the steps that rank 0 names by their places; it is killed in the end."""
    processes.end_with_parent()
    _join(1, place)
    steps, which = _steps(cases, sizes), torch.tensor(0)
    while True:
        dist.broadcast(which, 0)
        steps[int(which)](timing.Clock(), _NUM_RANKS)


@contextmanager
def _two_ranks(cases: Sequence[Case], sizes: Sizes) -> Iterator[None]:
    """Be rank 0 of two, the other of which serves. RuntimeError if that does not join in time."""
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as scratch:
        place = str(Path(scratch) / "ranks")
        other = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(place, cases, sizes), daemon=True
        )
        other.start()
        try:
            _join(0, place)
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            other.kill()
            other.join()
            torch.set_num_threads(before)


def run(
    *,
    num_embeddings: int = ROWS,
    embedding_dim: int = 100,
    batch_size: int = 32_768,
    pool_size: int = SMALL,
    optimizer: Optimizer = "adagrad",
    repeats: int = 15,
    rounds: int = 5,
    threads: int = 1,
) -> Iterator[records.Record]:
    """Measure a pool at block size 1 and in blocks, and a full table with sparse gradients and dense ones.

    Records of ``kind: processes``, for one process and two that share each batch: the times of a step and of
    its phases, and ``bytes_sent_per_step``, bytes of gradients that a process hands over, beside what sizes
    alone make it. Steps are those of `cemb.train.loops.train_mini_batches` by autograd. Needs some 4 GB at
    the default sizes.

    Args:
        num_embeddings: rows of the table, drawn uniformly.
        embedding_dim: its columns.
        batch_size: pairs of all processes together.
        pool_size: values in the pool.
        optimizer: the rule of the step.
        repeats: timed steps of each case.
        rounds: turns in which they are made.
        threads: of each process.
    """
    check_integers(1, num_embeddings=num_embeddings, embedding_dim=embedding_dim, batch_size=batch_size)
    check_integers(1, pool_size=pool_size, threads=threads)
    timing.check_turns(repeats, 0, rounds)
    cases = [
        Case(pool_size),
        Case(pool_size, min(BLOCK, embedding_dim, pool_size)),
        Case(is_sparse=True),
        Case(),
    ]
    sizes = Sizes(num_embeddings, embedding_dim, batch_size, optimizer, threads)
    sent: dict[Hashable, list[int]] = defaultdict(list)
    turns = [(index, n) for index in range(len(cases)) for n in (1, _NUM_RANKS)]
    with _two_ranks(cases, sizes):
        made = _steps(cases, sizes)

        def timed(index: int, num_ranks: int) -> timing.Step:
            def step(clock: timing.Clock) -> None:
                if num_ranks > 1:
                    dist.broadcast(torch.tensor(index), 0)
                sent[index, num_ranks].append(made[index](clock, num_ranks))

            return step

        found = timing.interleave({turn: timed(*turn) for turn in turns}, repeats=repeats, rounds=rounds)
        provenance = records.provenance()
    for index, num_ranks in turns:
        case, own = cases[index], sent[index, num_ranks]
        yield {
            "kind": "processes",
            "table": "full" if case.pool_size is None else "hashed",
            "sparse_gradients": case.is_sparse,
            "pool_size": case.pool_size,
            "block_size": None if case.pool_size is None else case.block_size,
            **sizes._asdict(),
            "num_processes": num_ranks,
            "bytes_sent_per_step": sum(own) / len(own),
            "expected_bytes_per_step": case.expected_bytes(sizes) if num_ranks > 1 else 0,
            **timing.summarize(found[index, num_ranks]),
            **provenance,
        }
