from dataclasses import replace

from numba.core.dispatcher import Dispatcher

from cemb.kernels.cpu import buckets, conflicts, lookup, pairs, sparse_product, updates
from cemb.study import speed
from cemb.study.precompile import precompile
from cemb.study.timing import Clock


def _compiled():
    kernels = [
        (f"{module.__name__}.{value.py_func.__qualname__}", value)
        for module in (buckets, conflicts, lookup, pairs, sparse_product, updates)
        for name, function in vars(module).items()
        for value in getattr(function, "kernels", (function,))
        if isinstance(value, Dispatcher)
    ]
    return {name: set(value.signatures) for name, value in kernels}


def test_the_steps_of_a_study_find_their_kernels_compiled():
    precompile()
    before = _compiled()
    assert before["cemb.kernels.cpu.pairs._score"] and before["cemb.kernels.cpu.sparse_product._product"]
    task = speed.Task(embedding_dim=100, batch_size=300)
    for optimizer in speed.OPTIMIZERS:
        for pool_size in (262_144, 5_000_000):
            study = speed.Comparison(task, optimizer, pool_size, num_embeddings=3000, eager=False)
            hashed = [case for case in study.cases if case.table == "hashed"]
            for case in [*study.cases, *(replace(case, one_pass=True) for case in hashed)]:
                speed.Timed(case)(Clock())
    assert _compiled() == before
