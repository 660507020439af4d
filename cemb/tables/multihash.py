"""Rows as weighted sums of hashed rows, with weights of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cemb import reference
from cemb.checks import check_integers
from cemb.hashing import HashSpec
from cemb.tables.checks import check_budget


class MultiHashEmbedding(nn.Module):
    """Row i is the sum of `num_hashes` rows of `components`, found by hashing, times ``importance[i]``.

    Svenstrup, Hansen and Winther, "Hash embeddings for efficient word representations", NeurIPS 2017, with
    importance weights for each id and not for hashed ids. The components of id i are those of row i in a
    table of `num_hashes` columns that hashes into a pool of `num_components`, see `cemb.hashing`.

    Shape: ids of any shape, int32 or int64, to ``[*ids.shape, embedding_dim]``.

    Raises ValueError for impossible sizes and IndexError for ids out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_components: int,
        *,
        num_hashes: int = 2,
        hash_seed: int = 0,
        init_std: float = 0.1,
    ):
        super().__init__()
        check_integers(
            1,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            num_components=num_components,
            num_hashes=num_hashes,
        )
        self.num_embeddings, self.embedding_dim, self.init_std = num_embeddings, embedding_dim, init_std
        self.spec = HashSpec(num_embeddings, num_hashes, num_components, hash_seed=hash_seed)
        self.components = nn.Parameter(torch.empty(num_components, embedding_dim))
        self.importance = nn.Parameter(torch.empty(num_embeddings, num_hashes))
        self.reset_parameters()

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "num_components": self.spec.pool_size,
            "num_hashes": self.spec.embedding_dim,
            "hash_seed": self.spec.hash_seed,
            "init_std": self.init_std,
        }

    @classmethod
    def within(
        cls, num_embeddings: int, embedding_dim: int, max_bytes: int, *, seed: int = 0, num_hashes: int = 2
    ) -> "MultiHashEmbedding":
        """The table of the most components within `max_bytes`, no more than rows.

        Raises ValueError if the importance weights and one component do not fit.
        """
        check_integers(1, num_hashes=num_hashes)
        weights = 4 * num_hashes * num_embeddings
        check_budget(max_bytes, weights + 4 * embedding_dim)
        num_components = min((max_bytes - weights) // (4 * embedding_dim), num_embeddings)
        return cls(num_embeddings, embedding_dim, num_components, num_hashes=num_hashes, hash_seed=seed)

    def reset_parameters(self) -> None:
        """Draw the components anew from torch's default generator and set the importance weights to 1."""
        nn.init.ones_(self.importance)
        nn.init.normal_(self.components, std=self.init_std / self.spec.embedding_dim**0.5)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        reference.check_ids(flat, self.num_embeddings)
        components, _ = reference.locate(flat, self.spec)
        weights = F.embedding(flat, self.importance)
        vectors = F.embedding_bag(components, self.components, mode="sum", per_sample_weights=weights)
        return vectors.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, num_components={spec.pool_size}, "
            f"num_hashes={spec.embedding_dim}, hash_seed={spec.hash_seed}"
        )
