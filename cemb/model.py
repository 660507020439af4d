"""The pair model: the score of (word, context) is a dot product of two looked-up vectors, plus biases."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from cemb import ops, optim
from cemb.checks import check_integers, check_reals
from cemb.hashing import HashSpec
from cemb.reference import check_ids
from cemb.tables import (
    ClusteredEmbedding,
    FullEmbedding,
    FusedFullEmbedding,
    HashedEmbedding,
    HybridEmbedding,
    LowRankEmbedding,
    MixedDimensionEmbedding,
    MultiHashEmbedding,
    QuotientRemainderEmbedding,
    ReferenceHashedEmbedding,
)

TABLES: dict[str, type[Any]] = {
    "full": FullEmbedding,
    "full-fused": FusedFullEmbedding,
    "hashed": HashedEmbedding,
    "hashed-reference": ReferenceHashedEmbedding,
}
# Those of other papers, each sized by the bytes it may take.
COMPRESSED_TABLES: dict[str, type[Any]] = {
    "hybrid": HybridEmbedding,
    "mixed-dimension": MixedDimensionEmbedding,
    "quotient-remainder": QuotientRemainderEmbedding,
    "multi-hash": MultiHashEmbedding,
    "low-rank": LowRankEmbedding,
    "clustered": ClusteredEmbedding,
}
BIASES = ("none", "shared", "separate")


class PairModel(nn.Module):
    """Scores pairs by ``⟨dropout(word vector), dropout(context vector)⟩ + biases``.

    Args:
        word_table: table of the words, as in `cemb.tables`.
        context_table: table of the contexts; None shares the words' table, as the 2021 project did.
        bias: ``"none"``, ``"shared"`` (one value per id, used on both sides) or ``"separate"``.
        dropout: share of vector components zeroed in training, see `cemb.ops.vector_scores`.
        first_context: row of a shared table where contexts begin. With half of its rows, words and contexts
            have separate vectors in one parameter, so that one optimizer step and one kernel serve both.
    """

    word_table: Any
    context_table: Any
    word_bias: nn.Parameter | None
    context_bias: nn.Parameter | None

    def __init__(
        self,
        word_table: nn.Module,
        context_table: nn.Module | None = None,
        *,
        bias: str = "none",
        dropout: float = 0.0,
        first_context: int = 0,
    ):
        super().__init__()
        if first_context and context_table is not None:
            raise ValueError("first_context is for one shared table, and context_table was given too")
        check_integers(0, first_context=first_context)
        if not first_context < cast(int, word_table.num_embeddings):
            raise ValueError(f"first_context must be a row of the table, got {first_context}")
        if bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {bias!r}")
        check_reals("[0, 1)", dropout=dropout)
        self.word_table = word_table
        self.context_table = word_table if context_table is None else context_table
        if self.word_table.embedding_dim != self.context_table.embedding_dim:
            raise ValueError(
                "word and context vectors must have one length, got "
                f"{self.word_table.embedding_dim} and {self.context_table.embedding_dim}"
            )
        self.dropout = dropout
        self.first_context = first_context
        self.word_bias = self.context_bias = None
        if bias != "none":
            self.word_bias = nn.Parameter(torch.zeros(self.num_words))
            self.context_bias = self.word_bias
        if bias == "separate":
            self.context_bias = nn.Parameter(torch.zeros(self.context_table.num_embeddings - first_context))

    @property
    def _is_fused(self) -> bool:
        """Whether pairs are scored from one pool, by tables that differ in nothing but their place in it."""
        words, contexts = self.word_table, self.context_table
        return (
            getattr(words, "pair_scores", None) is not None
            and getattr(words, "padding_idx", None) is None
            and type(contexts) is type(words)
            and contexts.weight is words.weight
            and (
                contexts is words
                or replace(contexts.spec, table_offset=words.spec.table_offset) == words.spec
            )
        )

    @property
    def num_words(self) -> int:
        return self.first_context or self.word_table.num_embeddings

    @property
    def num_parameters(self) -> int:
        """Trainable scalars, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, pairs: Tensor) -> Tensor:
        """Scores ``[batch]`` of the (word, context) id pairs ``[batch, 2]``."""
        word_ids, context_ids = pairs.unbind(-1)
        pairs = self._rows(pairs)
        dropout = self.dropout if self.training else 0.0
        if self._is_fused:
            scores: Tensor = self.word_table.pair_scores(pairs, self.context_table, dropout)
        else:
            if self.context_table is self.word_table:
                vectors = self.word_table(pairs)
            else:
                vectors = torch.stack((self.word_table(word_ids), self.context_table(context_ids)), dim=-2)
            scores = ops.vector_scores(vectors, dropout)
        if self.word_bias is not None and self.context_bias is not None:
            scores = scores + self.word_bias[word_ids] + self.context_bias[context_ids]
        return scores

    def _rows(self, pairs: Tensor) -> Tensor:
        """Rows of the tables for a pair's ids."""
        if not self.first_context:
            return pairs
        check_ids(pairs[:, 0], self.first_context)
        check_ids(pairs[:, 1], self.word_table.num_embeddings - self.first_context)
        return pairs + torch.tensor([0, self.first_context], device=pairs.device)

    @property
    def has_pair_step(self) -> bool:
        """Whether the model has a `pair_step` on the CPU: one of our tables, and no biases."""
        return self._is_fused and self.word_bias is None

    def pair_step(
        self,
        optimizer: optim.PairStepOptimizer,
        pairs: Tensor,
        loss: optim.SquaredError | Callable[[Tensor], Tensor],
    ) -> Tensor:
        """A training step of `cemb.optim.PairStepOptimizer.pair_step`; returns the loss before it, a scalar.

        `pairs` are ids (word, context) ``[n, 2]``. Raises ValueError for models that do not have it, see
        `has_pair_step`, and as that does.
        """
        if not self.has_pair_step:
            raise ValueError(
                "pair_step is for models of one pool or fused full table without biases, got "
                f"{type(self.word_table).__name__} and {type(self.context_table).__name__}, "
                f"{'with' if self.word_bias is not None else 'without'} biases"
            )
        spec = self.context_table.spec
        return optimizer.pair_step(
            self.word_table.weight,
            self._rows(pairs),
            loss,
            self.word_table.spec,
            context_offset=spec.table_offset if isinstance(spec, HashSpec) else 0,
            dropout=self.dropout if self.training else 0.0,
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        """All word vectors ``[num_words, dim]`` and context vectors ``[num_contexts, dim]``."""
        device = next(itertools.chain(self.parameters(), self.buffers())).device
        words = self.word_table(torch.arange(self.word_table.num_embeddings, device=device))
        if self.first_context:
            return words[: self.first_context], words[self.first_context :]
        if self.context_table is self.word_table:
            return words, words
        return words, self.context_table(torch.arange(self.context_table.num_embeddings, device=device))


def build_model(
    table: str,
    num_embeddings: int,
    embedding_dim: int,
    *,
    pool_size: int | None = None,
    block_size: int = 1,
    signed: bool = False,
    hash_seed: int = 0,
    sparse_gradients: bool = False,
    shared_table: bool = True,
    bias: str = "none",
    dropout: float = 0.0,
    device: torch.device | str | None = None,
) -> PairModel:
    """A `PairModel` over the named kind of table: ``full``, ``full-fused``, ``hashed`` or
    ``hashed-reference``.

    A hashed model has one pool of `pool_size` values whether or not words and contexts share their table:
    separate tables read the same pool under different hashes. A ``full-fused`` model too
    keeps both sides in one parameter. `sparse_gradients` is for full tables of torch.
    """
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    if table in ("full", "full-fused"):
        if table == "full-fused" and sparse_gradients:
            raise ValueError(f"table {table!r} has no sparse gradients; cemb.optim steps what a batch reads")
        if pool_size is not None:
            raise ValueError(f"a full table has no pool; got pool_size={pool_size}")

        if table == "full-fused" and not shared_table:
            both = FusedFullEmbedding(2 * num_embeddings, embedding_dim, device=device)
            return PairModel(both, bias=bias, dropout=dropout, first_context=num_embeddings).to(device)

        def make(offset: int, weight: nn.Parameter | None) -> Any:
            return TABLES[table](num_embeddings, embedding_dim, sparse=sparse_gradients, device=device)
    else:
        if pool_size is None:
            raise ValueError(f"table {table!r} needs a pool_size")
        if sparse_gradients:
            raise ValueError(f"table {table!r} has no sparse gradients")

        def make(offset: int, weight: nn.Parameter | None) -> Any:
            return TABLES[table](
                num_embeddings,
                embedding_dim,
                pool_size=pool_size if weight is None else None,
                block_size=block_size,
                signed=signed,
                hash_seed=hash_seed,
                table_offset=offset,
                weight=weight,
                device=device if weight is None else None,
            )

    word_table = make(0, None)
    context_table = None if shared_table else make(num_embeddings, word_table.weight)
    return PairModel(word_table, context_table, bias=bias, dropout=dropout).to(device)


def build_compressed_model(table: str, num_embeddings: int, embedding_dim: int, max_bytes: int) -> PairModel:
    """A `PairModel` over two tables of one of `COMPRESSED_TABLES`, each of half of `max_bytes`.

    Hashes of the two differ. Raises ValueError for an unknown table and where none fits into the bytes.
    """
    if table not in COMPRESSED_TABLES:
        raise ValueError(f"table must be one of {', '.join(COMPRESSED_TABLES)}, got {table!r}")
    return PairModel(
        *(
            COMPRESSED_TABLES[table].within(num_embeddings, embedding_dim, max_bytes // 2, seed=seed)
            for seed in (0, 1)
        )
    )
