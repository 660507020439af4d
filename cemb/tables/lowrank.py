"""The table as a product of two thin matrices."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cemb.checks import check_integers
from cemb.reference import check_ids
from cemb.tables.checks import check_budget


class LowRankEmbedding(nn.Module):
    """Row i is ``rows[i] @ projection``, of ``[num_embeddings, rank]`` and ``[rank, embedding_dim]``.

    The embedding factorization of ALBERT (Lan et al., ICLR 2020). The projection starts as the first `rank`
    rows of a cosine transform, orthogonal and of mean square 1, so that all tables start in the same
    directions: the scores of two random subspaces' vectors are ill-conditioned. Steps of Adam, which are of
    one size for all parameters, then are small beside the projection, and learning rates must be lower than
    for other tables.

    Shape: ids of any shape, int32 or int64, to ``[*ids.shape, embedding_dim]``.

    Raises ValueError for impossible sizes and IndexError for ids out of range.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, *, init_std: float = 0.1):
        super().__init__()
        check_integers(1, num_embeddings=num_embeddings, embedding_dim=embedding_dim, rank=rank)
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.init_std = init_std
        self.rows = nn.Parameter(torch.empty(num_embeddings, rank))
        self.projection = nn.Parameter(torch.empty(rank, embedding_dim))
        self.reset_parameters()

    @property
    def arguments(self) -> dict[str, Any]:
        names = ("num_embeddings", "embedding_dim", "rank", "init_std")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def within(
        cls, num_embeddings: int, embedding_dim: int, max_bytes: int, *, seed: int = 0
    ) -> "LowRankEmbedding":
        """The table of the largest rank within `max_bytes`; `seed` is not used, there is no hash.

        Raises ValueError if not even rank 1 fits.
        """
        bytes_per_rank = 4 * (num_embeddings + embedding_dim)
        check_budget(max_bytes, bytes_per_rank)
        rank = min(max_bytes // bytes_per_rank, num_embeddings, embedding_dim)
        return cls(num_embeddings, embedding_dim, rank)

    def reset_parameters(self) -> None:
        """Draw the rows anew from torch's default generator and set the projection to cosines."""
        nn.init.normal_(self.rows, std=self.init_std / self.rank**0.5)
        frequencies = torch.arange(self.rank, dtype=torch.float64).unsqueeze(1)
        places = (torch.arange(self.embedding_dim, dtype=torch.float64) + 0.5) / self.embedding_dim
        cosines = 2**0.5 * torch.cos(math.pi * frequencies * places)
        cosines[0] = 1
        with torch.no_grad():
            self.projection.copy_(cosines)

    def forward(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.num_embeddings)
        return F.embedding(ids, self.rows) @ self.projection

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
