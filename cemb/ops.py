"""torch.library ops: schema, validation, device dispatch, fake kernels and autograd.

`hashed_lookup` turns ids into vectors, `pair_scores` pairs of vectors into dot products after dropout.
`hashed_lookup` and `hashed_scatter` are linear in their first argument and each other's transpose, so each
one's backward is the other and derivatives of any order exist.
"""

import torch
from torch import Tensor

from cemb import reference
from cemb.hashing import HashSpec, PairDropout
from cemb.kernels import cpu

_ID_DTYPES = (torch.int32, torch.int64)


def backend(device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation serves tensors of this device and dtype: ``"numba"`` or ``"torch"``."""
    return "numba" if device.type == "cpu" and dtype in (torch.float32, torch.float64) else "torch"


@torch.library.custom_op("cemb::hashed_lookup", mutates_args=())
def _hashed_lookup(
    weight: Tensor,
    ids: Tensor,
    num_embeddings: int,
    embedding_dim: int,
    block_size: int,
    hash_seed: int,
    signed: bool,
    table_offset: int,
) -> Tensor:
    spec = HashSpec(
        num_embeddings, embedding_dim, weight.numel(), block_size, hash_seed, signed, table_offset
    )
    if backend(weight.device, weight.dtype) == "torch":
        return reference.hashed_lookup(weight, ids, spec)
    reference.check_ids(ids, num_embeddings)
    flat = ids.reshape(-1).contiguous()
    out = weight.new_empty((*ids.shape, embedding_dim))
    cpu.lookup(
        weight.detach().contiguous().numpy(),
        flat.numpy(),
        spec,
        out.view(flat.numel(), embedding_dim).numpy(),
    )
    return out


@torch.library.custom_op("cemb::hashed_scatter", mutates_args=())
def _hashed_scatter(
    grad: Tensor,
    ids: Tensor,
    pool_size: int,
    num_embeddings: int,
    embedding_dim: int,
    block_size: int,
    hash_seed: int,
    signed: bool,
    table_offset: int,
) -> Tensor:
    spec = HashSpec(num_embeddings, embedding_dim, pool_size, block_size, hash_seed, signed, table_offset)
    flat_ids = ids.reshape(-1).contiguous()
    flat_grad = grad.reshape(flat_ids.numel(), embedding_dim).contiguous()
    if backend(grad.device, grad.dtype) == "torch":
        indices, signs = reference.locate(flat_ids, spec)
        values = flat_grad if signs is None else flat_grad * signs
        return grad.new_zeros(pool_size).index_add_(0, indices.reshape(-1), values.reshape(-1))
    pool = grad.new_zeros(pool_size)
    cpu.scatter(flat_grad.detach().numpy(), flat_ids.numpy(), spec, pool.numpy())
    return pool


@_hashed_lookup.register_fake
def _(weight, ids, num_embeddings, embedding_dim, block_size, hash_seed, signed, table_offset):
    return weight.new_empty((*ids.shape, embedding_dim))


@_hashed_scatter.register_fake
def _(grad, ids, pool_size, num_embeddings, embedding_dim, block_size, hash_seed, signed, table_offset):
    return grad.new_empty(pool_size)


def _lookup_setup(ctx, inputs, output):
    weight, ids, *ctx.table = inputs
    ctx.pool_size = weight.numel()
    ctx.save_for_backward(ids)


def _lookup_backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    return _hashed_scatter(grad, ids, ctx.pool_size, *ctx.table), *[None] * 7


def _scatter_setup(ctx, inputs, output):
    _, ids, _, *ctx.table = inputs
    ctx.save_for_backward(ids)


def _scatter_backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    return _hashed_lookup(grad, ids, *ctx.table), *[None] * 8


_hashed_lookup.register_autograd(_lookup_backward, setup_context=_lookup_setup)
_hashed_scatter.register_autograd(_scatter_backward, setup_context=_scatter_setup)


def hashed_lookup(weight: Tensor, ids: Tensor, spec: HashSpec) -> Tensor:
    """Rows of the table that `spec` hashes into a pool.

    Args:
        weight: the pool, floating point, ``[spec.pool_size]``.
        ids: row numbers, int32 or int64, of any shape and stride, on the device of `weight`.
        spec: the table's shape and hash.

    Returns:
        ``[*ids.shape, spec.embedding_dim]`` in weight's dtype. The forward is the same on every machine,
        bit for bit; on the CPU the gradient is deterministic for a given number of threads, elsewhere it
        is what torch's `index_add_` is.

    Raises:
        IndexError: an id is negative or at least `spec.num_embeddings` (on a GPU: a device assert).
        TypeError: `ids` is not of an integer type, or `weight` not of a floating one.
        ValueError: `weight` does not have the shape that `spec` asks for, or is on another device.
    """
    if ids.dtype not in _ID_DTYPES:
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.shape != (spec.pool_size,):
        raise ValueError(f"weight must have shape [{spec.pool_size}], the pool, got {list(weight.shape)}")
    if weight.device != ids.device:
        raise ValueError(f"weight and ids must be on one device, got {weight.device} and {ids.device}")
    return _hashed_lookup(
        weight,
        ids,
        spec.num_embeddings,
        spec.embedding_dim,
        spec.block_size,
        spec.hash_seed,
        spec.signed,
        spec.table_offset,
    )


@torch.library.custom_op("cemb::pair_scores", mutates_args=())
def _pair_scores(vectors: Tensor, dropout: float, seed: Tensor) -> Tensor:
    drop = PairDropout(dropout, int(seed))
    if backend(vectors.device, vectors.dtype) == "torch":
        return reference.pair_scores(vectors, drop)
    scores = vectors.new_empty(len(vectors))
    cpu.pair_scores(vectors.detach().contiguous().numpy(), drop, scores.numpy())
    return scores


@torch.library.custom_op("cemb::pair_scores_backward", mutates_args=())
def _pair_scores_backward(grad: Tensor, vectors: Tensor, dropout: float, seed: Tensor) -> Tensor:
    drop = PairDropout(dropout, int(seed))
    if backend(vectors.device, vectors.dtype) == "torch":
        weights = grad.unsqueeze(-1) * reference.pair_weights(vectors, drop)
        return weights.unsqueeze(1) * vectors.flip(1)
    out = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    cpu.pair_scores_backward(
        grad.detach().contiguous().numpy(), vectors.detach().contiguous().numpy(), drop, out.numpy()
    )
    return out


@_pair_scores.register_fake
def _(vectors, dropout, seed):
    return vectors.new_empty(vectors.shape[0])


@_pair_scores_backward.register_fake
def _(grad, vectors, dropout, seed):
    return torch.empty_like(vectors, memory_format=torch.contiguous_format)


def _pair_setup(ctx, inputs, output):
    vectors, ctx.dropout, seed = inputs
    ctx.save_for_backward(vectors, seed)


def _pair_backward(ctx, grad):
    vectors, seed = ctx.saved_tensors
    return _pair_scores_backward(grad, vectors, ctx.dropout, seed), None, None


_pair_scores.register_autograd(_pair_backward, setup_context=_pair_setup)


def pair_scores(vectors: Tensor, dropout: float = 0.0) -> Tensor:
    """Dot product of each pair of vectors, with dropout on both.

    Has the distribution of ``(F.dropout(u, p) * F.dropout(v, p)).sum(-1)``, without a stored mask: masks are
    hashed from a seed drawn from torch's default generator, see `cemb.hashing.PairDropout`. On the CPU,
    torch's own dropout draws its mask on one thread, which takes longer than the rest of a step.

    Args:
        vectors: ``[n, 2, dim]``.
        dropout: share of components zeroed in each vector, in [0, 1).

    Returns:
        ``[n]``. Deterministic for a state of the generator; differentiable once.

    Raises ValueError for another shape or share.
    """
    if vectors.dim() != 3 or vectors.shape[1] != 2:
        raise ValueError(f"vectors must have shape [n, 2, dim], got {list(vectors.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.int64)
    return _pair_scores(vectors, dropout, seed)
