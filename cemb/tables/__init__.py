"""Embedding tables under one protocol.

A table is an `nn.Module` with the integers `num_embeddings` and `embedding_dim` whose forward takes ids of
any shape to ``[*ids.shape, embedding_dim]``. All its parameters are what it costs to store.
"""

from cemb.tables.full import FullEmbedding
from cemb.tables.hashed import HashedEmbedding, ReferenceHashedEmbedding

__all__ = ["FullEmbedding", "HashedEmbedding", "ReferenceHashedEmbedding"]
