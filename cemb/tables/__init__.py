"""Embedding tables under one protocol.

A table is an `nn.Module` with the integers `num_embeddings` and `embedding_dim` whose forward takes ids of
any shape to ``[*ids.shape, embedding_dim]``. All its parameters are what it costs to store. Tables that score
pairs of ids without making vectors have a `pair_scores`, see `cemb.ops.pair_scores`.
"""

from cemb.tables.full import FullEmbedding, FusedFullEmbedding
from cemb.tables.hashed import HashedEmbedding, ReferenceHashedEmbedding

__all__ = ["FullEmbedding", "FusedFullEmbedding", "HashedEmbedding", "ReferenceHashedEmbedding"]
