"""Least squares, one side after the other: training without a gradient or an optimizer's state.

With one factor given, the all-cells error is least squares in each row of the other, so alternating between
the two solves is block coordinate descent; on an unweighted matrix it is subspace iteration, and converges to
the truncated SVD (Golub and Van Loan, "Matrix computations", 4th ed., section 8.2). Each solve starts from
the other factor alone, so factors may be *stored* in few bits between solves: what rounding loses in one is
made good, as far as it can be, by the next solve of the other.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cemb.checks import check_integers
from cemb.tables import RowQuantizedEmbedding, TransformCodedEmbedding, all_rows
from cemb.tables.transform_coded import allocate_bits
from cemb.train.objective import AllCellsLoss

# Makes a table of vectors [n, dim], given what a unit of squared error costs in each column [dim].
Store = Callable[[Tensor, Tensor], nn.Module]
_Table = TypeVar("_Table", bound=nn.Module)


def _in_dtype(dtype: torch.dtype) -> Store:
    return lambda vectors, importance: nn.Embedding.from_pretrained(vectors.to(dtype))


STORES: dict[str, Store] = {
    "float32": _in_dtype(torch.float32),
    "bfloat16": _in_dtype(torch.bfloat16),
    "int8": lambda vectors, importance: RowQuantizedEmbedding.from_vectors(vectors, 8),
    "int4": lambda vectors, importance: RowQuantizedEmbedding.from_vectors(vectors, 4),
}


def principal(words: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same product in its principal axes: ``U'`` and ``C'``, where ``U'ᵀU' = C'ᵀC' = diag(s)``; and s.

    Factors are ``[words, dim]`` and ``[contexts, dim]``; s ``[dim]`` falls. Computed from the Gram matrices
    in float64, so components below 1e-8 of the largest are noise.
    """
    values, vectors = torch.linalg.eigh(contexts.T.double() @ contexts.double())
    values = values.clamp(min=values[-1] * 1e-16)
    root = vectors * values.sqrt() @ vectors.T
    inverse_root = vectors / values.sqrt() @ vectors.T
    squares, axes = torch.linalg.eigh(root @ (words.T.double() @ words.double()) @ root)
    s = squares.flip(0).clamp(min=squares[-1] * 1e-16).sqrt()
    axes = axes.flip(1)
    to_words, to_contexts = root @ axes / s.sqrt(), inverse_root @ axes * s.sqrt()
    return words @ to_words.to(words.dtype), contexts @ to_contexts.to(contexts.dtype), s.to(words.dtype)


def solve(products: Tensor, fixed: Tensor) -> Tensor:
    """The factor ``[n, dim]`` of least error beside `fixed` ``[m, dim]``, from ``M @ fixed`` ``[n, dim]``.

    ValueError where `fixed` is zero, as of a table without bits.
    """
    gram = fixed.T.double() @ fixed.double()
    if not gram.any():
        raise ValueError("the stored factor is zero; too few bytes leave no bits for its values")
    ridge = 1e-12 * gram.diagonal().mean()
    gram.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    solved: Tensor = products.double() @ inverse
    return solved.to(products.dtype)


def train_alternating(
    objective: AllCellsLoss, rank: int, store: Store, *, num_steps: int, seed: int = 0
) -> tuple[nn.Module, nn.Module, list[dict[str, float]]]:
    """Word and context tables from a random start, each kept by `store` whenever it is not being solved for.

    Costs two sparse products a step. Deterministic for the same seed and number of threads.

    Returns:
        The two tables, and ``{"step", "loss", "seconds"}`` after each step: the all-cells error of the stored
        tables, and the time since the start.
    """
    check_integers(1, rank=rank, num_steps=num_steps)
    _, num_contexts = objective.matrix.shape
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randn(num_contexts, rank, generator=generator)
    history = []
    start = time.perf_counter()
    for step in tqdm(range(1, num_steps + 1), desc="alternating least squares", unit="step"):
        words = solve(objective.matrix @ contexts, contexts)
        # In principal axes, so that a store may spend its bits by column.
        words, _, importance = principal(words, contexts)
        word_table = store(words, importance)
        words = all_rows(word_table)
        context_table, contexts, loss = _store_solved(objective, words, store)
        history.append({"step": step, "loss": loss, "seconds": time.perf_counter() - start})
    return word_table, context_table, history


def _store_solved(
    objective: AllCellsLoss, words: Tensor, store: Callable[[Tensor, Tensor], _Table]
) -> tuple[_Table, Tensor, float]:
    """The contexts' table for given words, its vectors, and the error of both."""
    products = objective.transposed @ words
    gram = words.T @ words
    table = store(solve(products, words), gram.diagonal())
    contexts = all_rows(table)
    loss = objective.squared_norm - 2 * torch.sum(contexts.double() * products)
    loss += torch.sum(gram.double() * (contexts.T @ contexts).double())
    return table, contexts, loss.item()


def transform_code(
    objective: AllCellsLoss, words: Tensor, contexts: Tensor, max_bytes: int, *, num_rounds: int = 2
) -> tuple[TransformCodedEmbedding, TransformCodedEmbedding]:
    """Trained factors ``[words, dim]``, ``[contexts, dim]`` as transform-coded tables of `max_bytes` in all.

    After the first coding, each side is solved for again beside the coded other and coded again, `num_rounds`
    times, which takes back part of what rounding lost.
    """
    check_integers(0, num_rounds=num_rounds)
    words, contexts, s = principal(words, contexts)
    word_bits, context_bits = allocate_bits([(words, s), (contexts, s)], max_bytes)
    word_table = TransformCodedEmbedding.from_vectors(words, s, word_bits)

    def code(vectors: Tensor, importance: Tensor) -> TransformCodedEmbedding:
        return TransformCodedEmbedding.from_vectors(vectors, importance, context_bits)

    context_table, contexts, _ = _store_solved(objective, all_rows(word_table), code)
    for _ in range(num_rounds):
        words = solve(objective.matrix @ contexts, contexts)
        importance = contexts.square().sum(dim=0)
        word_table = TransformCodedEmbedding.from_vectors(words, importance, word_bits)
        context_table, contexts, _ = _store_solved(objective, all_rows(word_table), code)
    return word_table, context_table
