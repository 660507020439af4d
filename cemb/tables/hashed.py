"""The hash-compressed table: every row reads its values from one shared memory pool."""

from typing import Any

import torch
from torch import Tensor, nn

from cemb import ops, reference
from cemb.hashing import HashSpec
from cemb.touched import advise_huge_pages


class HashedEmbedding(nn.Module):
    """A drop-in for `nn.Embedding` whose ``[num_embeddings, embedding_dim]`` values live in a pool.

    Args:
        num_embeddings: rows of the table; any number up to 2^63 / embedding_dim costs the same memory.
        embedding_dim: columns of the table.
        pool_size: number of scalars in the pool (not bytes), below 2^32. May be left out if `weight` is
            given.
        block_size: consecutive columns that read consecutive pool values: 1 is HashedNets, more is ROBE-Z
            (faster, since one cache line serves several columns).
        hash_seed: picks the hash function, in [0, 2^63). Not a parameter and not in the state_dict: load a
            state into a module built with the same arguments.
        signed: multiply each block by a hashed sign, which makes collisions cancel in expectation
            (Weinberger et al., ICML 2009).
        table_offset: added to ids before hashing, to keep tables apart that share a pool.
        init_std: standard deviation of the initial values, drawn from torch's default generator.
        weight: an existing pool to share, a Parameter ``[pool_size]``; it is left as it is.
        device, dtype: of a new pool.

    Shape: ids of any shape, int32 or int64, to ``[*ids.shape, embedding_dim]``.

    Raises ValueError for impossible sizes and IndexError for ids out of range. See
    `cemb.ops.hashed_lookup` for determinism and `cemb.hashing` for the hash.

    >>> import torch
    >>> from cemb import HashedEmbedding
    >>> table = HashedEmbedding(1_000_000_000, 100, pool_size=262_144, block_size=25)
    >>> table(torch.tensor([[0, 999_999_999]])).shape
    torch.Size([1, 2, 100])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        pool_size: int | None = None,
        *,
        block_size: int = 1,
        hash_seed: int = 0,
        signed: bool = False,
        table_offset: int = 0,
        init_std: float = 0.1,
        weight: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if weight is not None:
            if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
                raise ValueError(
                    f"weight must be a 1-dimensional Parameter, got {type(weight).__name__} of shape "
                    f"{list(weight.shape)}"
                )
            if pool_size not in (None, weight.numel()):
                raise ValueError(f"pool_size={pool_size} contradicts the {weight.numel()} values of weight")
            if device is not None or dtype is not None:
                raise ValueError("device and dtype are those of the given weight; leave them out")
            pool_size = weight.numel()
        elif pool_size is None:
            raise ValueError("give pool_size, or an existing pool as weight")
        self.spec = HashSpec(
            num_embeddings, embedding_dim, pool_size, block_size, hash_seed, signed, table_offset
        )
        self.init_std = init_std
        if weight is None:
            self.weight = nn.Parameter(advise_huge_pages(torch.empty(pool_size, device=device, dtype=dtype)))
            self.reset_parameters()
        else:
            self.weight = weight

    def reset_parameters(self) -> None:
        """Draw the pool anew from torch's default generator."""
        nn.init.normal_(self.weight, std=self.init_std)

    @property
    def num_embeddings(self) -> int:
        return self.spec.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.spec.embedding_dim

    @property
    def pool_size(self) -> int:
        return self.spec.pool_size

    @property
    def compression_ratio(self) -> float:
        """Values of the table per value of the pool."""
        return self.num_embeddings * self.embedding_dim / self.pool_size

    def forward(self, ids: Tensor) -> Tensor:
        return ops.hashed_lookup(self.weight, ids, self.spec)

    def pair_scores(self, pairs: Tensor, context_table: "HashedEmbedding", dropout: float) -> Tensor:
        """Scores ``[n]`` of the pairs ``[n, 2]``, contexts from a table over the same pool.

        The two tables may differ in `table_offset` alone.
        """
        offset = context_table.spec.table_offset
        return ops.pair_scores(self.weight, pairs, self.spec, context_offset=offset, dropout=dropout)

    def extra_repr(self) -> str:
        parts = [f"{self.num_embeddings}, {self.embedding_dim}, pool_size={self.pool_size}"]
        defaults = {"block_size": 1, "hash_seed": 0, "signed": False, "table_offset": 0}
        parts += [
            f"{name}={getattr(self.spec, name)}"
            for name, default in defaults.items()
            if getattr(self.spec, name) != default
        ]
        return ", ".join(parts)


class ReferenceHashedEmbedding(HashedEmbedding):
    """`HashedEmbedding` computed by `cemb.reference`: what eager PyTorch makes of the same table."""

    pair_scores: Any = None

    def forward(self, ids: Tensor) -> Tensor:
        return reference.hashed_lookup(self.weight, ids, self.spec)
