"""Frequent rows exact, rare ones hashed."""

from typing import Any, cast

from cemb.checks import check_integers, check_reals
from cemb.tables.checks import check_budget
from cemb.tables.full import FullEmbedding
from cemb.tables.hashed import HashedEmbedding
from cemb.tables.tiered import TieredEmbedding


class HybridEmbedding(TieredEmbedding):
    """The first `num_exact` rows in full, the others in a `HashedEmbedding` of `pool_size` values.

    Ids must be ranks by falling frequency, so that what is exact is what is used most. At least one row is
    hashed; `num_exact` may be 0. The other arguments are those of `HashedEmbedding`.

    Raises ValueError for impossible sizes and IndexError for ids out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        num_exact: int,
        pool_size: int,
        block_size: int = 1,
        *,
        hash_seed: int = 0,
        signed: bool = False,
        init_std: float = 0.1,
    ):
        check_integers(1, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        check_integers(0, num_exact=num_exact)
        if not num_exact < num_embeddings:
            raise ValueError(f"num_exact must lie in [0, {num_embeddings}), got {num_exact}")
        exact = [FullEmbedding(num_exact, embedding_dim, init_std=init_std)] if num_exact else []
        hashed = HashedEmbedding(
            num_embeddings - num_exact,
            embedding_dim,
            pool_size=pool_size,
            block_size=block_size,
            hash_seed=hash_seed,
            signed=signed,
            init_std=init_std,
        )
        super().__init__([*exact, hashed])

    @property
    def arguments(self) -> dict[str, Any]:
        hashed = cast(HashedEmbedding, self.tiers[-1])
        names = ("embedding_dim", "pool_size", "block_size", "hash_seed", "signed", "init_std")
        sizes = {
            "num_embeddings": self.num_embeddings,
            "num_exact": self.num_embeddings - hashed.num_embeddings,
        }
        return sizes | {name: hashed.arguments[name] for name in names}

    @classmethod
    def within(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        max_bytes: int,
        *,
        seed: int = 0,
        exact_share: float = 0.5,
        block_size: int = 1,
        signed: bool = False,
    ) -> "HybridEmbedding":
        """`exact_share` of `max_bytes` go to exact rows, the rest to the pool, no more than it has rows for.

        Raises ValueError if the pool cannot hold a block.
        """
        check_integers(1, block_size=block_size)
        check_reals("[0, 1]", exact_share=exact_share)
        check_budget(max_bytes, 4 * block_size)
        num_values = max_bytes // 4
        num_exact = min(int(exact_share * num_values) // embedding_dim, num_embeddings - 1)
        num_exact = min(num_exact, (num_values - block_size) // embedding_dim)
        pool_size = min(num_values - num_exact * embedding_dim, (num_embeddings - num_exact) * embedding_dim)
        return cls(
            num_embeddings, embedding_dim, num_exact, pool_size, block_size, hash_seed=seed, signed=signed
        )
