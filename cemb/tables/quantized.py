"""Tables made small after training: fewer bits a value, or codes into codebooks."""

from typing import Any

import torch
from torch import Tensor, nn

from cemb.checks import check_integers
from cemb.reference import check_ids
from cemb.tables.kmeans import k_means, nearest


class RowQuantizedEmbedding(nn.Module):
    """Integers of 8 or 4 bits with a float16 scale for each row, nearest rounding, symmetric about 0.

    4-bit integers are stored two to a byte, shifted to be positive. Holds no Parameter. Made by
    `from_vectors`; a new table has zeros for all that it stores, and is to be loaded.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int = 8):
        super().__init__()
        check_integers(1, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if bits not in (8, 4):
            raise ValueError(f"bits must be 8 or 4, got {bits}")
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        width, dtype = (embedding_dim, torch.int8) if bits == 8 else (-(-embedding_dim // 2), torch.uint8)
        self.register_buffer("codes", torch.zeros(num_embeddings, width, dtype=dtype))
        self.register_buffer("scales", torch.zeros(num_embeddings, dtype=torch.float16))

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_embeddings", "embedding_dim", "bits")}

    @classmethod
    def from_vectors(cls, vectors: Tensor, bits: int = 8) -> "RowQuantizedEmbedding":
        """The table nearest to `vectors` ``[n, dim]``; ValueError for other than 8 or 4 bits."""
        num_rows, dim = vectors.shape
        table = cls(num_rows, dim, bits)
        largest = 2 ** (bits - 1) - 1
        scales = (vectors.abs().amax(dim=1) / largest).clamp(min=torch.finfo(torch.float16).tiny).half()
        codes = (vectors / scales[:, None].float()).round().clamp(-largest, largest).to(torch.int8)
        if bits == 4:
            nibbles = nn.functional.pad(codes + 8, (0, vectors.shape[1] % 2)).to(torch.uint8)
            codes = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        table.codes, table.scales = codes, scales
        return table

    def forward(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.num_embeddings)
        codes = self.codes[ids]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., : self.embedding_dim]
            codes = codes.to(torch.int8) - 8
        return codes * self.scales[ids][..., None].float()


class ProductQuantizedEmbedding(nn.Module):
    """Rows cut into groups of columns; each group is the nearest of 256 centroids, stored as one byte.

    Jégou, Douze and Schmid, "Product quantization for nearest neighbor search", PAMI 2011. Centroids are
    those of k-means, in float16. Holds no Parameter. Made by `from_vectors`; a new table has zeros for all
    that it stores, and is to be loaded.
    """

    codes: Tensor
    codebooks: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, num_groups: int):
        super().__init__()
        check_integers(1, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        check_integers(1, embedding_dim, num_groups=num_groups)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.num_groups = num_groups
        self.register_buffer("codes", torch.zeros(num_embeddings, num_groups, dtype=torch.uint8))
        self.register_buffer("codebooks", torch.zeros(256, embedding_dim, dtype=torch.float16))

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_embeddings", "embedding_dim", "num_groups")}

    @classmethod
    def from_vectors(cls, vectors: Tensor, num_groups: int, *, seed: int = 0) -> "ProductQuantizedEmbedding":
        """Fit codes and codebooks to `vectors` ``[n, dim]``; deterministic for a seed.

        ValueError unless there are 1 to dim groups and at least 256 rows.
        """
        num_rows, dim = vectors.shape
        table = cls(num_rows, dim, num_groups)
        if len(vectors) < 256:
            raise ValueError(f"256 centroids need at least 256 rows, got {len(vectors)}")
        generator = torch.Generator().manual_seed(seed)
        parts = vectors.tensor_split(num_groups, dim=1)
        codebooks = [k_means(part, 256, 10, generator).half() for part in parts]
        codes = [nearest(part, book.float()) for part, book in zip(parts, codebooks, strict=True)]
        table.codes, table.codebooks = torch.stack(codes, dim=1).to(torch.uint8), torch.cat(codebooks, dim=1)
        return table

    def forward(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.num_embeddings)
        codes = self.codes[ids].long()
        books = self.codebooks.float().tensor_split(self.num_groups, dim=1)
        return torch.cat([book[codes[..., group]] for group, book in enumerate(books)], dim=-1)
