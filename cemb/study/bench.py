"""The benchmark: every table and rival side by side, with huge pages for PyTorch and without.

PyTorch reads ``THP_MEM_ALLOC_ENABLE`` when it starts, so each setting has a process of its own; their turns
alternate, one measuring while the other waits. What is compared is measured in one run, and times are
medians.
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from cemb.checks import check_integers
from cemb.processes import end_with_parent
from cemb.study import records, rivals, speed, timing
from cemb.study.sizes import BLOCK, GPU_BLOCK, HUGE_TABLE, LARGE, OPTIMIZERS, SMALL, Optimizer

_THP = "THP_MEM_ALLOC_ENABLE"


def cases(optimizer: str, ids: str = "uniform", device: str = "cpu", **sizes: Any) -> list[speed.SpeedCase]:
    """All that is measured with an optimizer: torch's full tables, rivals, ours, and the hashed ones."""
    full = speed.SpeedCase("full", optimizer, ids=ids, device=device, **sizes)
    fused = replace(full, table="full-fused", one_pass=None)
    found = [full, replace(full, sparse_gradients=True), fused]
    if device == "cpu":
        for table in ("full-fused-rowwise", "full-fbgemm", "full-fbgemm-rowwise"):
            if rivals.available(table, optimizer):
                found.append(replace(full, table=table, one_pass=None))
    block = BLOCK if device == "cpu" else GPU_BLOCK
    for pool_size in (SMALL, LARGE):
        hashed = replace(full, table="hashed", pool_size=pool_size, one_pass=None)
        found += [hashed, replace(hashed, block_size=block)]
        if rivals.available("hashed-compiled", optimizer) and (pool_size == SMALL or optimizer == "sgd"):
            found.append(replace(hashed, table="hashed-compiled", one_pass=None))
    small = replace(full, table="hashed", pool_size=SMALL, block_size=block)
    found.append(replace(small, num_embeddings=HUGE_TABLE))
    # Small pools train either way.
    either = [case for case in found if device == "cpu" and case.table == "hashed" and not case.one_pass]
    return [*found, *(replace(case, one_pass=True) for case in either)]


def _serve(connection: Any) -> None:
    """A process that holds cases and measures them when told to; it is killed in the end."""
    end_with_parent()
    # By default it is a semaphore of the system's, which a killed process leaves there.
    tqdm.set_lock(threading.RLock())
    steps: dict[Hashable, speed.Timed] = {}
    times: dict[Hashable, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    while True:
        command, *arguments = connection.recv()
        if command == "build":
            steps = {case: speed.Timed(case) for case in arguments[0]}
            for step in steps.values():
                for _ in range(2):
                    step(timing.Clock(step.case.device))
            connection.send(None)
        elif command == "measure":
            (device,) = {step.case.device for step in steps.values()}
            found = timing.interleave(steps, repeats=arguments[0], warmup=1, rounds=1, device=device)
            for case, phases in found.items():
                for phase, values in phases.items():
                    times[case][phase] += values
            connection.send(None)
        else:
            connection.send([step.record(times[case], **arguments[0]) for case, step in steps.items()])
            return


class _Process:
    """A `_serve` process under a setting of `_THP`."""

    def __init__(self, thp: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # tqdm reads its setting when it is imported; the parent shows the progress.
        settings = {_THP: thp, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    def __call__(self, *command: object) -> Any:
        try:
            self._connection.send(command)
            return self._connection.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise RuntimeError(
                f"the measuring process ended with status {self._process.exitcode} during {command[0]!r}"
            ) from None

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def run(
    *,
    optimizers: Sequence[Optimizer] = OPTIMIZERS,
    ids: Sequence[speed.Ids] = speed.IDS,
    device: str = "cpu",
    repeats: int = 2,
    rounds: int = 8,
    threads: int | None = None,
    **sizes: Any,
) -> list[records.Record]:
    """Measure all cases; returns one record of the machine's bandwidths, ``kind: rates``, then theirs.

    Each case is timed ``repeats · rounds`` times; many rounds of few, so that what slows the machine for some
    seconds hits all alike. Rates are measured after each round of cases, and their
    medians count, so that a machine whose speed changes is not judged by its best minute. Needs some 20 GB of
    memory at the original's sizes.

    Args:
        optimizers: rules of the steps.
        ids: how rows are drawn: all alike, or (zipf) row i in proportion to 1/(i + 1).
        device: as torch names it, such as cuda.
        repeats: timed steps a turn.
        rounds: turns.
        threads: of torch and the kernels; None: as many as torch takes by itself.
        sizes: other fields of the cases.
    """
    check_integers(1, repeats=repeats, rounds=rounds, threads=threads)
    threads = torch.get_num_threads() if threads is None else threads
    # All of them first, so that a case that cannot be is refused before any is measured.
    parts = {
        (optimizer, kind): cases(optimizer, kind, device, **sizes) for optimizer in optimizers for kind in ids
    }
    settings = ("0", "1") if device == "cpu" else ("0",)  # it is of the CPU's memory
    measured: dict[str, list[float]] = defaultdict(list)
    provenance = records.provenance(device)  # of the start: pages tell from records how long a benchmark took
    found = []
    with tqdm(total=len(parts) * rounds * len(settings), desc="benchmark", unit="turn") as progress:
        for (optimizer, kind), wanted in parts.items():
            progress.set_postfix_str(f"{optimizer}, {kind} ids")
            processes: list[_Process] = []
            try:
                processes += (_Process(setting, threads) for setting in settings)
                for process in processes:
                    process("build", wanted)
                for _ in range(rounds):
                    for process in processes:
                        process("measure", repeats)
                        progress.update()
                    for name, value in _measure_bandwidths(device, threads).items():
                        measured[name].append(value)
                for process in processes:
                    found += process("finish", {"repeats": repeats * rounds, "rounds": rounds})
            finally:
                for process in processes:
                    process.close()
    medians = {name: statistics.median(values) for name, values in measured.items()}
    in_rounds = {f"{name}_rounds": values for name, values in measured.items()}
    return [{"kind": "rates", **medians, **in_rounds, **provenance}, *found]


def _measure_bandwidths(device: str, threads: int) -> dict[str, float]:
    if device == "cpu":
        from cemb.study import bandwidths

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return bandwidths.measure_bandwidths()
        finally:
            torch.set_num_threads(before)
    from cemb.study import bandwidths_gpu

    return bandwidths_gpu.measure_bandwidths(device)


def op_tests_pass() -> bool:
    """Run the tests of ops and optimizers; FileNotFoundError where there are none to run."""
    folder = records.of_checkout("tests", "a ratio, which is reported only if the ops' tests pass,")
    tests = [folder / name for name in ("test_ops.py", "test_optim.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)]
    done = subprocess.run(
        command, cwd=records.ROOT, stdout=sys.stderr, check=False, preexec_fn=end_with_parent
    )
    return done.returncode == 0
