"""Rows as products of a quotient's row and a remainder's."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cemb.checks import check_integers
from cemb.reference import check_ids
from cemb.tables.checks import check_budget


class QuotientRemainderEmbedding(nn.Module):
    """Row i is ``quotients[i // num_remainders] * remainders[i % num_remainders]``, which differs for all i.

    Shi et al., "Compositional embeddings using complementary partitions for memory-efficient recommendation
    systems", KDD 2020. Ids should be ranks by falling frequency: the first `num_remainders` then have a
    remainder's row each. Quotients start as random signs, so that rows which share one start uncorrelated.

    Shape: ids of any shape, int32 or int64, to ``[*ids.shape, embedding_dim]``.

    Raises ValueError for impossible sizes and IndexError for ids out of range.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, num_remainders: int, *, init_std: float = 0.1
    ):
        super().__init__()
        check_integers(
            1, num_embeddings=num_embeddings, embedding_dim=embedding_dim, num_remainders=num_remainders
        )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.num_remainders, self.init_std = num_remainders, init_std
        self.quotients = nn.Parameter(torch.empty(-(-num_embeddings // num_remainders), embedding_dim))
        self.remainders = nn.Parameter(torch.empty(num_remainders, embedding_dim))
        self.reset_parameters()

    @property
    def arguments(self) -> dict[str, Any]:
        names = ("num_embeddings", "embedding_dim", "num_remainders", "init_std")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def within(
        cls, num_embeddings: int, embedding_dim: int, max_bytes: int, *, seed: int = 0
    ) -> "QuotientRemainderEmbedding":
        """The table of the most remainders within `max_bytes`; `seed` is not used, there is no hash.

        With r rows in all, m remainders or r − m serve equally many ids a row. The larger number shares less
        where it matters: frequent ids share a remainder's row with rare ones only, while with the smaller
        number neighbours in frequency would share a quotient's, the most frequent ones first.

        Raises ValueError if not even ⌈2√num_embeddings⌉ rows fit.
        """
        root = math.isqrt(num_embeddings - 1) + 1
        least = root + -(-num_embeddings // root)
        check_budget(max_bytes, 4 * embedding_dim * least)
        num_rows = max_bytes // (4 * embedding_dim)
        num_remainders = min(num_rows - 1, num_embeddings)
        while num_remainders + -(-num_embeddings // num_remainders) > num_rows:
            num_remainders -= 1
        return cls(num_embeddings, embedding_dim, num_remainders)

    def reset_parameters(self) -> None:
        """Draw both tables anew from torch's default generator."""
        nn.init.normal_(self.remainders, std=self.init_std)
        with torch.no_grad():
            self.quotients.bernoulli_().mul_(2).sub_(1)

    def forward(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.num_embeddings)
        quotients = F.embedding(ids // self.num_remainders, self.quotients)
        return quotients * F.embedding(ids % self.num_remainders, self.remainders)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, num_remainders={self.num_remainders}"
