"""A table made of tables: frequent rows are stored in one way, rare ones in another."""

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cemb.reference import check_ids


class TieredEmbedding(nn.Module):
    """The rows of several tables after one another, each of which gets the ids that its rows are here.

    Shape: ids of any shape, int32 or int64, to ``[*ids.shape, embedding_dim]``.

    Raises IndexError for ids out of range.
    """

    def __init__(self, tiers: Sequence[nn.Module]):
        super().__init__()
        self.tiers = nn.ModuleList(tiers)
        self.embedding_dim = cast(int, tiers[0].embedding_dim)
        sizes = (cast(int, tier.num_embeddings) for tier in tiers)
        *self.firsts, self.num_embeddings = itertools.accumulate(sizes, initial=0)

    def forward(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.num_embeddings)
        flat = ids.reshape(-1).long()
        tier = cast(Tensor, sum((flat >= first).long() for first in self.firsts)) - 1
        tier, order = tier.sort(stable=True)
        parts = flat[order].split(tier.bincount(minlength=len(self.firsts)).tolist())
        vectors = [
            table(part - first) for table, part, first in zip(self.tiers, parts, self.firsts, strict=True)
        ]
        return torch.cat(vectors)[order.argsort()].view(*ids.shape, self.embedding_dim)
