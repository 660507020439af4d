"""Compiling the CPU's kernels before they are needed: a study does it while runs go on that nobody times."""

from dataclasses import replace

import scipy.sparse as sp

from cemb.kernels import cpu
from cemb.model import build_model
from cemb.study.speed import Comparison, Task, Timed
from cemb.study.timing import Clock
from cemb.train.loops import OPTIMIZERS
from cemb.train.objective import AllCellsLoss


def precompile() -> None:
    """Compile the kernels of training steps, where they are not yet, by using each on small tables."""
    for optimizer in OPTIMIZERS:
        for pool_size in (1000, cpu.locate.PRIVATE_POOL_LIMIT + 1):
            small = Task(embedding_dim=32, batch_size=64)
            cases = Comparison(small, optimizer, pool_size, num_embeddings=100, eager=False).cases
            # Mini-batches train small pools in one call, too.
            either = [replace(case, one_pass=True) for case in cases if case.table == "hashed"]
            for case in dict.fromkeys([*cases, *either]):
                Timed(case)(Clock())
    model = build_model("hashed", 100, 32, pool_size=1000, shared_table=False)
    AllCellsLoss(sp.eye_array(100, format="csr", dtype="float32"))(*model.factors()).backward()
