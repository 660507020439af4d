"""Other ways to compute the same step, for the speed study to compare with.

- ``full-fbgemm``: Meta's fbgemm, whose backward pass updates the rows it touches; on the CPU it has SGD and
  Adagrad. ``full-fbgemm-rowwise`` keeps one Adagrad state a row, which is another algorithm, and faster.
  `make peers` installs it.
- ``full-fused-rowwise``: our own full table with that algorithm.
- ``hashed-compiled``: the naive hash of `cemb.reference` under `torch.compile`, dropout included; needs a
  C++ compiler.
"""

import contextlib
import importlib.util
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cemb import ops, optim, reference
from cemb.hashing import HashSpec, PairDropout
from cemb.memory import advise_huge_pages
from cemb.model import PairModel
from cemb.tables import FusedFullEmbedding
from cemb.train.loops import make_optimizer

# Names of tables, with the backend of their records.
NAMES = {
    "full-fbgemm": "fbgemm",
    "full-fbgemm-rowwise": "fbgemm",
    "full-fused-rowwise": "numba",
    "hashed-compiled": "inductor",
}


def available(table: str, optimizer: str) -> bool:
    """Whether this rival can be measured here with this optimizer."""
    if table == "hashed-compiled":
        return shutil.which("g++") is not None
    if table == "full-fused-rowwise":
        return optimizer == "adagrad"
    if importlib.util.find_spec("fbgemm_gpu") is None:
        return False
    return optimizer == "adagrad" or (optimizer == "sgd" and table == "full-fbgemm")


def build(case: Any, learning_rate: float) -> tuple[Any, Any, int]:
    """Scores of pairs as a callable, its optimizer and number of parameters; of a `SpeedCase`.

    Raises ValueError where the rival does not exist.
    """
    if not available(case.table, case.optimizer):
        raise ValueError(
            f"{case.table} with {case.optimizer} cannot be measured here: fbgemm needs `make peers` and has "
            "SGD and Adagrad, torch.compile needs g++, row-wise tables have Adagrad"
        )
    builders: dict[str, Any] = {"hashed-compiled": _compiled, "full-fused-rowwise": _fused_rowwise}
    score, optimizer, num_parameters = builders.get(case.table, _fbgemm)(case, learning_rate)
    return score, optimizer, num_parameters


def _fused_rowwise(case: Any, learning_rate: float) -> tuple[Any, Any, int]:
    table = FusedFullEmbedding(case.num_embeddings, case.embedding_dim, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        advise_huge_pages(table.weight).uniform_(-0.1, 0.1)
    optimizer = optim.RowwiseAdagrad(table.parameters(), learning_rate)
    return PairModel(table, dropout=case.dropout), optimizer, table.weight.numel()


def _compiled(case: Any, learning_rate: float) -> tuple[Callable[[Tensor], Tensor], Any, int]:
    spec = HashSpec(case.num_embeddings, case.embedding_dim, case.pool_size, case.block_size)
    weight = nn.Parameter(torch.empty(case.pool_size, device=case.device).uniform_(-0.1, 0.1))
    # One seed for all steps lets all of it be compiled into one loop, to the rival's advantage. On a GPU
    # torch's own dropout costs nothing in a compiled loop, and Inductor does not compile ours.
    dropout = PairDropout(case.dropout)

    @torch.compile
    def score(weight: Tensor, pairs: Tensor) -> Tensor:
        indices, _ = reference.locate(pairs, spec)
        if pairs.is_cuda:
            return F.dropout(weight[indices], case.dropout).prod(1).sum(-1)
        return reference.vector_scores(weight[indices], dropout)

    optimizer = make_optimizer(case.optimizer, [weight], learning_rate)
    return lambda pairs: score(weight, pairs), optimizer, weight.numel()


class _NoOptimizer:
    """fbgemm has updated the table by the end of the backward pass."""

    def step(self) -> None:
        pass

    def zero_grad(self) -> None:
        pass


def _fbgemm(case: Any, learning_rate: float) -> tuple[Callable[[Tensor], Tensor], Any, int]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(None):
        warnings.simplefilter("ignore")  # it has some of its own at import
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            EmbeddingLocation,
            PoolingMode,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    kinds = {
        ("full-fbgemm", "sgd"): EmbOptimType.EXACT_SGD,
        ("full-fbgemm", "adagrad"): EmbOptimType.EXACT_ADAGRAD,
        ("full-fbgemm-rowwise", "adagrad"): EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    }
    rows, dim = case.num_embeddings, case.embedding_dim
    # Sums over bags of one row: its lookup without sums is ten times slower on the CPU.
    table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=kinds[case.table, case.optimizer],
        learning_rate=learning_rate,
        pooling_mode=PoolingMode.SUM,
    )
    table.init_embedding_weights_uniform(-0.1, 0.1)
    offsets = torch.arange(2 * case.batch_size + 1)

    def score(pairs: Tensor) -> Tensor:
        vectors = table(pairs.reshape(-1), offsets).view(len(pairs), 2, dim)
        return ops.vector_scores(vectors, case.dropout)

    return score, _NoOptimizer(), rows * dim
