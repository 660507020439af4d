"""Naive PyTorch versions of the ops: obviously right, differentiated by autograd's own indexing.

Tests and benchmarks compare with these. They materialize one int64 index per looked-up value, which is
what makes hashed embeddings slow in eager PyTorch. They run on any device and dtype.
"""

import torch
from torch import Tensor

from cemb.hashing import MULTIPLIER_1, MULTIPLIER_2, FullSpec, PairDropout, Spec


def _as_int64(x: int) -> int:
    """The signed integer with the same 64 bits; torch wraps int64 products as unsigned ones."""
    return x - 2**64 if x >= 2**63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 copies the sign bit."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def mix(x: Tensor) -> Tensor:
    """`cemb.hashing.mix` of each element of an int64 tensor, read as unsigned."""
    x = (x ^ _shift_right(x, 30)) * _as_int64(MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _as_int64(MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def locate(ids: Tensor, spec: Spec, table_offset: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Pool indices of the rows `ids` ``[...]``, int64 ``[..., embedding_dim]``, and their signs or None."""
    columns = torch.arange(spec.embedding_dim, device=ids.device)
    if isinstance(spec, FullSpec):
        return ids.long().unsqueeze(-1) * spec.embedding_dim + columns, None
    offset = spec.table_offset if table_offset is None else table_offset
    block, within = columns // spec.block_size, columns % spec.block_size
    keys = (ids.long().unsqueeze(-1) + offset) * spec.num_blocks + block + _as_int64(spec.salt)
    h = mix(keys)
    indices = _shift_right(_shift_right(h, 32) * spec.num_starts, 32) + within
    return indices, (1 - 2 * (h & 1)) if spec.signed else None


def check_ids(ids: Tensor, num_embeddings: int) -> None:
    """Raise IndexError (on the CPU) or trip a device assert (elsewhere) if an id is out of range."""
    if ids.numel() == 0:
        return
    if ids.device.type != "cpu":
        torch._assert_async(((ids >= 0) & (ids < num_embeddings)).all())
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= num_embeddings:
        raise IndexError(
            f"ids must lie in [0, {num_embeddings}), the rows of the table, got ids from {low} to {high}"
        )


def hashed_lookup(weight: Tensor, ids: Tensor, spec: Spec, table_offset: int | None = None) -> Tensor:
    """Rows `ids` ``[...]`` of the table that `spec` hashes into `weight` ``[pool_size]``.

    Returns ``[..., embedding_dim]`` of weight's dtype; the gradient is autograd's scatter-add.
    """
    check_ids(ids, spec.num_embeddings)
    indices, signs = locate(ids, spec, table_offset)
    values = weight[indices]
    return values if signs is None else values * signs


def pair_weights(vectors: Tensor, dropout: PairDropout) -> Tensor:
    """Factors ``[n, dim]`` by which dropout scales the terms of the dot products of pairs ``[n, 2, dim]``."""
    n, _, dim = vectors.shape
    quads = -(-dim // 4)
    keys = torch.arange(n * quads, device=vectors.device).reshape(n, quads) + _as_int64(dropout.salt)
    shifts = 16 * torch.arange(4, device=vectors.device)
    parts = ((mix(keys).unsqueeze(-1) >> shifts) & 0xFFFF).reshape(n, 4 * quads)[:, :dim]
    return (parts >= dropout.threshold).to(vectors.dtype) * dropout.scale


def vector_scores(vectors: Tensor, dropout: PairDropout) -> Tensor:
    """Dot products ``[n]`` of the pairs ``[n, 2, dim]`` after dropout on both vectors."""
    return (vectors[:, 0] * vectors[:, 1] * pair_weights(vectors, dropout)).sum(-1)


def vector_scores_jvp(tangent: Tensor, vectors: Tensor, dropout: PairDropout) -> Tensor:
    """Change ``[n]`` of `vector_scores` where `vectors` change by `tangent`, both ``[n, 2, dim]``."""
    product = tangent[:, 0] * vectors[:, 1] + vectors[:, 0] * tangent[:, 1]
    return (product * pair_weights(vectors, dropout)).sum(-1)


def _pair_vectors(weight: Tensor, pairs: Tensor, spec: Spec, context_offset: int) -> Tensor:
    words = hashed_lookup(weight, pairs[:, 0], spec)
    return torch.stack((words, hashed_lookup(weight, pairs[:, 1], spec, context_offset)), dim=1)


def pair_scores(
    weight: Tensor, pairs: Tensor, spec: Spec, context_offset: int, dropout: PairDropout
) -> Tensor:
    """`vector_scores` ``[n]`` of the rows `pairs` ``[n, 2]``; contexts hash under an offset of their own."""
    return vector_scores(_pair_vectors(weight, pairs, spec, context_offset), dropout)


def pair_scores_backward(
    grad: Tensor,
    weight: Tensor,
    pairs: Tensor,
    spec: Spec,
    context_offset: int,
    dropout: PairDropout,
) -> Tensor:
    """Gradient ``[pool_size]`` of `pair_scores` by `weight`, given `grad` ``[n]``; without autograd."""
    vectors = _pair_vectors(weight, pairs, spec, context_offset)
    factors = grad.unsqueeze(-1) * pair_weights(vectors, dropout)
    pool = torch.zeros_like(weight)
    for side, offset in ((0, None), (1, context_offset)):
        indices, signs = locate(pairs[:, side], spec, offset)
        values = factors * vectors[:, 1 - side]
        values = values if signs is None else values * signs
        pool.index_add_(0, indices.reshape(-1), values.reshape(-1))
    return pool


def pair_scores_jvp(
    tangent: Tensor,
    weight: Tensor,
    pairs: Tensor,
    spec: Spec,
    context_offset: int,
    dropout: PairDropout,
) -> Tensor:
    """Change ``[n]`` of `pair_scores` where `weight` changes by `tangent`."""
    moved, vectors = (_pair_vectors(values, pairs, spec, context_offset) for values in (tangent, weight))
    return vector_scores_jvp(moved, vectors, dropout)
