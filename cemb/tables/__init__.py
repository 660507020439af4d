"""Embedding tables under one protocol.

A table is an `nn.Module` with the integers `num_embeddings` and `embedding_dim` whose forward takes ids of
any shape to ``[*ids.shape, embedding_dim]``. All its parameters and buffers are what it costs to store, see
`num_bytes`. Tables that score pairs of ids without making vectors have a `pair_scores`, see
`cemb.ops.pair_scores`. Those of other papers have a `within`, which builds the largest table of a kind that
a number of bytes allows. `arguments` are those by which ``type(table)(**arguments)`` is another of the same
shape, to load values into: numbers, truth values and None, as JSON has them.
"""

import itertools
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cemb.tables.checks import num_bytes
from cemb.tables.clustered import ClusteredEmbedding
from cemb.tables.full import FullEmbedding, FusedFullEmbedding
from cemb.tables.hashed import HashedEmbedding, HashedEmbeddingBag, ReferenceHashedEmbedding
from cemb.tables.hybrid import HybridEmbedding
from cemb.tables.lowrank import LowRankEmbedding
from cemb.tables.mixed import MixedDimensionEmbedding
from cemb.tables.multihash import MultiHashEmbedding
from cemb.tables.quantized import ProductQuantizedEmbedding, RowQuantizedEmbedding
from cemb.tables.quotient import QuotientRemainderEmbedding
from cemb.tables.transform_coded import TransformCodedEmbedding

__all__ = [
    "ClusteredEmbedding",
    "FullEmbedding",
    "FusedFullEmbedding",
    "HashedEmbedding",
    "HashedEmbeddingBag",
    "HybridEmbedding",
    "LowRankEmbedding",
    "MixedDimensionEmbedding",
    "MultiHashEmbedding",
    "ProductQuantizedEmbedding",
    "QuotientRemainderEmbedding",
    "ReferenceHashedEmbedding",
    "RowQuantizedEmbedding",
    "TransformCodedEmbedding",
    "all_rows",
    "num_bytes",
]


_BLOCK_ROWS = 2**14


@torch.no_grad()
def all_rows(table: nn.Module) -> Tensor:
    """The vectors of a table, float32 ``[num_embeddings, embedding_dim]``."""
    device = next(itertools.chain(table.parameters(), table.buffers())).device
    num_rows, dim = cast(int, table.num_embeddings), cast(int, table.embedding_dim)
    out = torch.empty(num_rows, dim, dtype=torch.float32, device=device)
    ids = torch.arange(num_rows, device=device).split(_BLOCK_ROWS)
    for some, rows in zip(
        tqdm(ids, desc="making vectors", unit="block", delay=2), out.split(_BLOCK_ROWS), strict=True
    ):
        rows.copy_(table(some))
    return out
