"""The uncompressed table."""

from torch import nn


class FullEmbedding(nn.Embedding):
    """`nn.Embedding` with the initialization of the other tables: normal, mean 0, deviation `init_std`.

    The default of torch, deviation 1, makes the scores of a random pair of dimension d spread by √d.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, init_std: float = 0.1, **kwargs):
        self.init_std = init_std
        super().__init__(num_embeddings, embedding_dim, **kwargs)

    def reset_parameters(self) -> None:
        """Draw the weights anew from torch's default generator."""
        nn.init.normal_(self.weight, std=self.init_std)
