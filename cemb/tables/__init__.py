"""Embedding tables under one protocol.

A table is an `nn.Module` with the integers `num_embeddings` and `embedding_dim` whose forward takes ids of
any shape to ``[*ids.shape, embedding_dim]``. All its parameters are what it costs to store. Tables that score
pairs of ids without making vectors have a `pair_scores`, see `cemb.ops.pair_scores`.
"""

import torch
from torch import Tensor, nn

from cemb.tables.full import FullEmbedding, FusedFullEmbedding
from cemb.tables.hashed import HashedEmbedding, ReferenceHashedEmbedding
from cemb.tables.quantized import ProductQuantizedEmbedding, RowQuantizedEmbedding
from cemb.tables.transform_coded import TransformCodedEmbedding

__all__ = [
    "FullEmbedding",
    "FusedFullEmbedding",
    "HashedEmbedding",
    "ProductQuantizedEmbedding",
    "ReferenceHashedEmbedding",
    "RowQuantizedEmbedding",
    "TransformCodedEmbedding",
    "all_rows",
]


@torch.no_grad()
def all_rows(table: nn.Module) -> Tensor:
    """The vectors of a table, float32 ``[num_embeddings, embedding_dim]``."""
    return table(torch.arange(table.num_embeddings)).float()
