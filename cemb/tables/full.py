"""The uncompressed table."""

from typing import Any

from torch import Tensor, nn

from cemb import ops
from cemb.hashing import FullSpec
from cemb.memory import advise_huge_pages


class FullEmbedding(nn.Embedding):
    """`nn.Embedding` with the initialization of the other tables: normal, mean 0, deviation `init_std`.

    The default of torch, deviation 1, makes the scores of a random pair of dimension d spread by √d.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, init_std: float = 0.1, **kwargs: Any):
        self.init_std = init_std
        super().__init__(num_embeddings, embedding_dim, **kwargs)

    @property
    def arguments(self) -> dict[str, Any]:
        own = ("num_embeddings", "embedding_dim", "init_std")
        of_torch = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        return {name: getattr(self, name) for name in (*own, *of_torch)}

    def reset_parameters(self) -> None:
        """Draw the weights anew from torch's default generator."""
        nn.init.normal_(self.weight, std=self.init_std)


class FusedFullEmbedding(FullEmbedding):
    """A full table whose pairs are scored by the kernels of the hashed ones, with no hash.

    Made to be trained by `cemb.optim`, which updates only the rows of a batch.
    """

    def reset_parameters(self) -> None:
        """Draw the weights anew from torch's default generator, on huge pages where there are any."""
        advise_huge_pages(self.weight)
        super().reset_parameters()

    @property
    def spec(self) -> FullSpec:
        return FullSpec(self.num_embeddings, self.embedding_dim)

    def pair_scores(self, pairs: Tensor, context_table: "FusedFullEmbedding", dropout: float) -> Tensor:
        """Scores ``[n]`` of the pairs ``[n, 2]``, contexts from a table over the same weight."""
        return ops.pair_scores(self.weight, pairs, self.spec, dropout=dropout)
