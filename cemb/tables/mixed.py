"""Rows of falling length for words of falling frequency."""

import itertools
import math
from typing import Any

from cemb.checks import check_integers, check_reals
from cemb.tables.checks import check_budget
from cemb.tables.full import FullEmbedding
from cemb.tables.lowrank import LowRankEmbedding
from cemb.tables.tiered import TieredEmbedding


def _tiers(num_embeddings: int, embedding_dim: int, temperature: float) -> list[tuple[int, float]]:
    """Rows of each tier, and the length of its rows as a share of the first tier's."""
    borders = [num_embeddings]
    while borders[-1] // 2 >= embedding_dim:
        borders.append(borders[-1] // 2)
    borders = [0, *reversed(borders)]
    ranges = list(itertools.pairwise(borders))
    # The integral of 1 / (rank + 1), close to its sum.
    means = [math.log((last + 0.5) / (first + 0.5)) / (last - first) for first, last in ranges]
    return [
        (last - first, (mean / means[0]) ** temperature)
        for (first, last), mean in zip(ranges, means, strict=True)
    ]


def _layout(tiers: list[tuple[int, float]], embedding_dim: int, base_dim: float) -> list[tuple[int, int]]:
    """Rows of each tier and their length, which is `embedding_dim` where a projection saves nothing."""
    dims = [max(1, math.floor(base_dim * share + 1e-9)) for _, share in tiers]
    return [
        (rows, dim if dim * (rows + embedding_dim) < rows * embedding_dim else embedding_dim)
        for (rows, _), dim in zip(tiers, dims, strict=True)
    ]


class MixedDimensionEmbedding(TieredEmbedding):
    """Tiers of ids, each with rows of its own length and a projection to `embedding_dim`.

    Ginart et al., "Mixed dimension embeddings with application to memory-efficient recommendation systems",
    2019. Ids must be ranks by falling frequency: the last tier is the rarer half, the one before it the rarer
    half of the rest and so on, down to `embedding_dim` rows, which are what a projection costs. The length
    of a tier's rows is ``base_dim · (p / p₀)^temperature``, rounded down, where p is their mean probability
    by Zipf's law and p₀ the first tier's. Tiers which a projection would not make smaller have none.

    Args:
        base_dim: length of the rows of the first tier, before rounding; at least 1.
        temperature: 0 makes all tiers alike.

    Raises ValueError for impossible sizes and IndexError for ids out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        base_dim: float,
        *,
        temperature: float = 0.3,
        init_std: float = 0.1,
    ):
        check_integers(1, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        check_reals("[1, inf)", base_dim=base_dim)
        check_reals("[0, inf)", temperature=temperature)
        layout = _layout(_tiers(num_embeddings, embedding_dim, temperature), embedding_dim, base_dim)
        super().__init__(
            [
                FullEmbedding(rows, embedding_dim, init_std=init_std)
                if dim == embedding_dim
                else LowRankEmbedding(rows, embedding_dim, dim, init_std=init_std)
                for rows, dim in layout
            ]
        )
        self.base_dim, self.temperature, self.init_std = base_dim, temperature, init_std

    @property
    def arguments(self) -> dict[str, Any]:
        names = ("num_embeddings", "embedding_dim", "base_dim", "temperature", "init_std")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def within(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        max_bytes: int,
        *,
        seed: int = 0,
        temperature: float = 0.3,
    ) -> "MixedDimensionEmbedding":
        """The table of the largest `base_dim` within `max_bytes`; `seed` is not used, there is no hash.

        Raises ValueError if not even rows of length 1 fit.
        """
        check_reals("[0, inf)", temperature=temperature)
        tiers = _tiers(num_embeddings, embedding_dim, temperature)

        def size(base_dim: float) -> int:
            return 4 * sum(
                rows * dim + (dim * embedding_dim if dim < embedding_dim else 0)
                for rows, dim in _layout(tiers, embedding_dim, base_dim)
            )

        check_budget(max_bytes, size(1))
        # Where the length of some tier's rows grows by one.
        steps = {1, *(dim / share for _, share in tiers for dim in range(1, embedding_dim + 1))}
        base_dim = max(step for step in steps if size(step) <= max_bytes)
        return cls(num_embeddings, embedding_dim, base_dim, temperature=temperature)
