"""Rows quantized while they are learned: clusters of vectors plus hashed corrections."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cemb import reference
from cemb.checks import check_integers
from cemb.hashing import HashSpec
from cemb.tables.checks import check_budget
from cemb.tables.kmeans import k_means, nearest

_CODES = (torch.uint8, torch.int16, torch.int32)


def _code_dtype(num_clusters: int) -> torch.dtype:
    return next(dtype for dtype in _CODES if num_clusters - 1 <= torch.iinfo(dtype).max)


class ClusteredEmbedding(nn.Module):
    """A row is `num_columns` segments, each the sum of a cluster's centroid and a hashed helper's row.

    Tsang and Ahle, "Clustering the sketch: dynamic compression for embedding tables", NeurIPS 2023. Clusters
    start as hashed ones; `recluster`, called from time to time in training, makes them those of the vectors
    learned so far. Codes are stored in the smallest integers, and the seed of the helper's hash with them,
    since it changes.

    Args:
        num_clusters: rows of the table of centroids, and of the helper, in each column group.
        num_columns: column groups, a divisor of `embedding_dim`.
        hash_seed: picks the first hashes, in [0, 2^62).

    Shape: ids of any shape, int32 or int64, to ``[*ids.shape, embedding_dim]``.

    Raises ValueError for impossible sizes and IndexError for ids out of range.
    """

    hash_seed: Tensor
    codes: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_clusters: int,
        num_columns: int,
        *,
        hash_seed: int = 0,
        init_std: float = 0.1,
    ):
        super().__init__()
        check_integers(
            1,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            num_clusters=num_clusters,
            num_columns=num_columns,
        )
        check_integers(0, 2**62 - 1, hash_seed=hash_seed)
        if embedding_dim % num_columns:
            raise ValueError(f"num_columns must divide embedding_dim={embedding_dim}, got {num_columns}")
        self.num_embeddings, self.embedding_dim, self.init_std = num_embeddings, embedding_dim, init_std
        self.num_clusters, self.num_columns = num_clusters, num_columns
        shape = num_columns, num_clusters, embedding_dim // num_columns
        self.centroids = nn.Parameter(torch.empty(shape))
        self.helper = nn.Parameter(torch.empty(shape))
        codes = self._hashes(torch.arange(num_embeddings), hash_seed)
        self.register_buffer("codes", codes.to(_code_dtype(num_clusters)))
        self.register_buffer("hash_seed", torch.tensor(hash_seed + 1))
        self.reset_parameters()

    @property
    def arguments(self) -> dict[str, Any]:
        names = ("num_embeddings", "embedding_dim", "num_clusters", "num_columns", "init_std")
        return {name: getattr(self, name) for name in names}  # the seed of the hash is a value

    @classmethod
    def within(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        max_bytes: int,
        *,
        seed: int = 0,
        num_columns: int | None = None,
    ) -> "ClusteredEmbedding":
        """The table of `num_columns` groups and the most clusters within `max_bytes`.

        By default there are as many groups as codes in a quarter of the bytes allow, of at least four
        values each, since finer groups lose less when they are clustered. Raises ValueError if one cluster
        in one group does not fit.
        """
        check_integers(1, num_columns=num_columns)
        groups = [g for g in range(1, embedding_dim + 1) if embedding_dim % g == 0 and embedding_dim >= 4 * g]
        groups = [num_columns] if num_columns else groups or [1]
        fixed, per_cluster = torch.int64.itemsize, 2 * 4 * embedding_dim
        check_budget(max_bytes, fixed + num_embeddings * groups[0] + per_cluster)
        found = []
        for columns, dtype in itertools.product(groups, _CODES):
            codes = num_embeddings * columns * dtype.itemsize
            most = min(torch.iinfo(dtype).max + 1, num_embeddings)
            clusters = min((max_bytes - fixed - codes) // per_cluster, most)
            if clusters > 0 and _code_dtype(clusters) == dtype:
                is_used = fixed + codes + clusters * per_cluster >= 0.9 * max_bytes
                is_lean = 4 * codes <= max_bytes
                found.append((is_used, is_lean, columns if is_lean else -columns, clusters))
        *_, columns, clusters = max(found)
        return cls(num_embeddings, embedding_dim, clusters, abs(columns), hash_seed=seed)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        *_, errors = others
        if not 0 <= int(self.codes.min()) <= int(self.codes.max()) < self.num_clusters:
            errors.append(f"{prefix}codes are of other clusters than the {self.num_clusters} there are")

    def reset_parameters(self) -> None:
        """Draw centroids and helper anew from torch's default generator; codes stay."""
        nn.init.normal_(self.centroids, std=self.init_std / 2**0.5)
        nn.init.normal_(self.helper, std=self.init_std / 2**0.5)

    def _hashes(self, ids: Tensor, seed: int) -> Tensor:
        """Rows of the helper ``[..., num_columns]``, as ids and the seed of the hash have them."""
        spec = HashSpec(self.num_embeddings, self.num_columns, self.num_clusters, hash_seed=seed)
        return reference.locate(ids, spec)[0]

    def _look_up(self, table: Tensor, codes: Tensor) -> Tensor:
        """Rows `codes` ``[..., num_columns]`` of each group's part of the table, joined."""
        offsets = self.num_clusters * torch.arange(self.num_columns, device=codes.device)
        return F.embedding(codes + offsets, table.flatten(0, 1)).flatten(-2)

    def forward(self, ids: Tensor) -> Tensor:
        reference.check_ids(ids, self.num_embeddings)
        ids = ids.long()
        centroids = self._look_up(self.centroids, self.codes[ids].long())
        return centroids + self._look_up(self.helper, self._hashes(ids, int(self.hash_seed)))

    @torch.no_grad()
    def recluster(self, *, num_steps: int = 3, max_samples: int = 16_384) -> None:
        """Set codes and centroids by k-means on the present vectors, the helper to 0 under a new hash.

        Each group has clusters of its own, found in `num_steps` iterations on at most `max_samples` rows, but
        no fewer than there are clusters. Deterministic for the table's state and a number of threads. An
        optimizer's moments for the table are about what was there before.
        """
        check_integers(0, num_steps=num_steps, max_samples=max_samples)
        seed = int(self.hash_seed) + 1
        generator = torch.Generator().manual_seed(seed)
        vectors = self(torch.arange(self.num_embeddings, device=self.codes.device))
        num_samples = min(self.num_embeddings, max(max_samples, self.num_clusters))
        sample = torch.randperm(self.num_embeddings, generator=generator)[:num_samples]
        for column, group in enumerate(vectors.chunk(self.num_columns, dim=1)):
            self.centroids[column] = k_means(group[sample], self.num_clusters, num_steps, generator)
            self.codes[:, column] = nearest(group, self.centroids[column])
        self.helper.zero_()
        self.hash_seed.fill_(seed)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, num_clusters={self.num_clusters}, "
            f"num_columns={self.num_columns}"
        )
