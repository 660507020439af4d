"""torch.library ops: schema, validation, device dispatch, fake kernels and autograd.

`hashed_lookup` turns ids into vectors, `pair_scores` pairs of ids into dot products after dropout, and
`vector_scores` pairs of vectors into the same. `hashed_lookup` and `hashed_scatter` are linear in their
first argument and each other's transpose, so each one's backward is the other and derivatives of any order
exist; the scores are differentiable once.

In schemas a table is a list of integers: rows, columns, block size (0 for a full table), hash seed, signed,
table offset.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from cemb import reference
from cemb.hashing import FullSpec, HashSpec, PairDropout, Spec
from cemb.kernels import cpu
from cemb.touched import TouchedGradient

_ID_DTYPES = (torch.int32, torch.int64)
_BACKENDS: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "cpu": ("numba", (torch.float32, torch.float64, torch.bfloat16)),
    "cuda": ("triton", (torch.float32, torch.bfloat16, torch.float16)),
}


def backend(device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation serves tensors of this device and dtype: ``"numba"``, ``"triton"`` or ``"torch"``.

    The last is `cemb.reference`; it serves what the kernels do not, float16 on the CPU, float64 on a GPU and
    other devices.
    """
    name, dtypes = _BACKENDS.get(device.type, ("torch", ()))
    return name if dtype in dtypes else "torch"


def _cuda() -> ModuleType:
    from cemb.kernels import triton  # Triton is there on GPU hosts alone

    return triton


def _encode(spec: Spec) -> list[int]:
    """A table as schemas have it."""
    if isinstance(spec, FullSpec):
        return [spec.num_embeddings, spec.embedding_dim, 0, 0, 0, 0]
    return [
        spec.num_embeddings,
        spec.embedding_dim,
        spec.block_size,
        spec.hash_seed,
        int(spec.signed),
        spec.table_offset,
    ]


def _decode(table: Sequence[int], pool_size: int) -> Spec:
    num_embeddings, embedding_dim, block_size, hash_seed, signed, table_offset = table
    if block_size == 0:
        return FullSpec(num_embeddings, embedding_dim)
    return HashSpec(
        num_embeddings, embedding_dim, pool_size, block_size, hash_seed, bool(signed), table_offset
    )


def _dropout(p: float, seed: Tensor) -> PairDropout:
    """The dropout of a share and a seed; a seed on a GPU stays there, for kernels to read, without a sync."""
    return PairDropout(p, 0 if seed.is_cuda else int(seed))


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """The values as a contiguous numpy array; bfloat16 as the uint16 of its bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute and accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("cemb::hashed_lookup", mutates_args=())
def _hashed_lookup(weight: Tensor, ids: Tensor, table: Sequence[int]) -> Tensor:
    spec = _decode(table, weight.numel())
    kind = backend(weight.device, weight.dtype)
    if kind == "torch":
        return reference.hashed_lookup(weight, ids, spec)
    flat = ids.reshape(-1).long().contiguous()
    if kind == "triton":
        _cuda().check_ids(flat, spec.num_embeddings)
        out = weight.new_empty((*ids.shape, spec.embedding_dim))
        _cuda().lookup(weight.contiguous(), flat, spec, out.view(flat.numel(), spec.embedding_dim))
        return out
    reference.check_ids(flat, spec.num_embeddings)
    out = weight.new_empty((*ids.shape, spec.embedding_dim), dtype=_wide(weight.dtype))
    cpu.lookup.lookup(_array(weight), flat.numpy(), spec, out.view(flat.numel(), spec.embedding_dim).numpy())
    return out.to(weight.dtype)


@torch.library.custom_op("cemb::hashed_scatter", mutates_args=())
def _hashed_scatter(grad: Tensor, ids: Tensor, pool_size: int, table: Sequence[int]) -> Tensor:
    spec = _decode(table, pool_size)
    flat_ids = ids.reshape(-1).long().contiguous()
    flat_grad = grad.reshape(flat_ids.numel(), spec.embedding_dim).contiguous()
    kind = backend(grad.device, grad.dtype)
    if kind == "torch":
        indices, signs = reference.locate(flat_ids, spec)
        values = flat_grad if signs is None else flat_grad * signs
        return grad.new_zeros(pool_size).index_add_(0, indices.reshape(-1), values.reshape(-1))
    if kind == "triton":
        deterministic = torch.are_deterministic_algorithms_enabled()
        pool: Tensor = _cuda().scatter(flat_grad, flat_ids, spec, deterministic)
        return pool.to(grad.dtype)
    pool = grad.new_zeros(pool_size, dtype=_wide(grad.dtype))
    cpu.lookup.scatter(flat_grad.detach().to(pool.dtype).numpy(), flat_ids.numpy(), spec, pool.numpy())
    return pool.to(grad.dtype)


@_hashed_lookup.register_fake
def _(weight: Tensor, ids: Tensor, table: Sequence[int]) -> Tensor:
    return weight.new_empty((*ids.shape, table[1]))


@_hashed_scatter.register_fake
def _(grad: Tensor, ids: Tensor, pool_size: int, table: Sequence[int]) -> Tensor:
    return grad.new_empty(pool_size)


def _lookup_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, ctx.table = inputs
    ctx.pool_size = weight.numel()
    ctx.save_for_backward(ids)


def _lookup_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return _hashed_scatter(grad, ids, ctx.pool_size, ctx.table), None, None


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, _, ctx.table = inputs
    ctx.save_for_backward(ids)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return _hashed_lookup(grad, ids, ctx.table), None, None, None


_hashed_lookup.register_autograd(_lookup_backward, setup_context=_lookup_setup)
_hashed_scatter.register_autograd(_scatter_backward, setup_context=_scatter_setup)


def _check(weight: Tensor, ids: Tensor, spec: Spec, name: str) -> None:
    if ids.dtype not in _ID_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if isinstance(spec, HashSpec) and weight.shape != (spec.pool_size,):
        raise ValueError(f"weight must have shape [{spec.pool_size}], the pool, got {list(weight.shape)}")
    if weight.numel() != spec.pool_size:
        raise ValueError(
            f"weight must hold the {spec.num_embeddings} × {spec.embedding_dim} values of the table, "
            f"got shape {list(weight.shape)}"
        )
    if weight.device != ids.device:
        raise ValueError(f"weight and {name} must be on one device, got {weight.device} and {ids.device}")


def hashed_lookup(weight: Tensor, ids: Tensor, spec: HashSpec) -> Tensor:
    """Rows of the table that `spec` hashes into a pool.

    Args:
        weight: the pool, floating point, ``[spec.pool_size]``.
        ids: row numbers, int32 or int64, of any shape and stride, on the device of `weight`.
        spec: the table's shape and hash.

    Returns:
        ``[*ids.shape, spec.embedding_dim]`` in weight's dtype. The forward is the same on every machine,
        bit for bit. The gradient is deterministic on the CPU, for a given number of threads, and on a GPU
        under `torch.use_deterministic_algorithms`.

    Raises:
        IndexError: an id is negative or at least `spec.num_embeddings` (on a GPU: a device assert).
        TypeError: `ids` is not of an integer type, or `weight` not of a floating one.
        ValueError: `weight` does not have the shape that `spec` has, or is on another device.
    """
    _check(weight, ids, spec, "ids")
    rows: Tensor = _hashed_lookup(weight, ids, _encode(spec))
    return rows


@torch.library.custom_op("cemb::pair_scores", mutates_args=())
def _pair_scores(
    weight: Tensor, pairs: Tensor, table: Sequence[int], context_offset: int, dropout: float, seed: Tensor
) -> Tensor:
    spec, drop = _decode(table, weight.numel()), _dropout(dropout, seed)
    kind = backend(weight.device, weight.dtype)
    if kind == "torch":
        return reference.pair_scores(weight, pairs, spec, context_offset, drop)
    pairs = pairs.long().contiguous()
    if kind == "triton":
        _cuda().check_ids(pairs, spec.num_embeddings)
        scores = weight.new_empty(len(pairs))
        _cuda().pair_scores(weight.contiguous(), pairs, spec, context_offset, drop, seed, scores)
        return scores
    reference.check_ids(pairs, spec.num_embeddings)
    scores = weight.new_empty(len(pairs), dtype=_wide(weight.dtype))
    cpu.pairs.pair_scores(_array(weight), pairs.numpy(), spec, context_offset, drop, scores.numpy())
    return scores.to(weight.dtype)


@torch.library.custom_op("cemb::pair_scores_backward", mutates_args=())
def _pair_scores_backward(
    grad: Tensor,
    weight: Tensor,
    pairs: Tensor,
    table: Sequence[int],
    context_offset: int,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    spec, drop = _decode(table, weight.numel()), _dropout(dropout, seed)
    kind = backend(weight.device, weight.dtype)
    if kind == "torch":
        return reference.pair_scores_backward(grad, weight, pairs, spec, context_offset, drop)
    pairs = pairs.long().contiguous()
    if kind == "triton":
        deterministic = torch.are_deterministic_algorithms_enabled()
        arguments = (grad.contiguous(), weight.contiguous(), pairs, spec, context_offset, drop, seed)
        pool: Tensor = _cuda().pair_scores_backward(*arguments, deterministic)
        return pool.to(weight.dtype)
    pool = weight.new_zeros(weight.numel(), dtype=_wide(weight.dtype))
    wide_grad = grad.detach().to(pool.dtype).contiguous().numpy()
    ids = pairs.numpy()
    cpu.pairs.pair_scores_backward(wide_grad, _array(weight), ids, spec, context_offset, drop, pool.numpy())
    return pool.to(weight.dtype)


@_pair_scores.register_fake
def _(
    weight: Tensor, pairs: Tensor, table: Sequence[int], context_offset: int, dropout: float, seed: Tensor
) -> Tensor:
    return weight.new_empty(pairs.shape[0])


@_pair_scores_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    pairs: Tensor,
    table: Sequence[int],
    context_offset: int,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    return weight.new_empty(weight.numel())


def _pair_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, pairs, ctx.table, ctx.context_offset, ctx.dropout, seed = inputs
    ctx.save_for_backward(weight, pairs, seed)


def _pair_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, pairs, seed = ctx.saved_tensors
    arguments = (grad, weight, pairs, ctx.table, ctx.context_offset, ctx.dropout, seed)
    return _pair_scores_backward(*arguments), *[None] * 5


_pair_scores.register_autograd(_pair_backward, setup_context=_pair_setup)


class _TouchedPairScores(torch.autograd.Function):
    """`pair_scores` whose gradient goes to the `TouchedGradient` of an optimizer in `cemb.optim`."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        pairs: Tensor,
        spec: Spec,
        context_offset: int,
        dropout: float,
        seed: Tensor,
        touched: TouchedGradient,
    ) -> Any:
        drop = _dropout(dropout, seed)
        ctx.save_for_backward(weight, pairs)
        ctx.constants = spec, context_offset, drop
        reference.check_ids(pairs, spec.num_embeddings)
        pool, ids = _array(weight.reshape(-1)), pairs.long().contiguous().numpy()
        scores = weight.new_empty(len(pairs))
        out = scores.numpy()
        ctx.touched, ctx.values = touched, touched.values_workspace(len(pairs), spec, pool.dtype)
        if ctx.values is None:
            cpu.pairs.pair_scores(pool, ids, spec, context_offset, drop, out)
        else:
            cpu.buckets.pair_scores(pool, ids, spec, context_offset, drop, out, ctx.values)
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        weight, pairs = ctx.saved_tensors
        ctx.touched.add(*grads, weight, pairs, *ctx.constants, ctx.values)
        return (None,) * 7


def check_pairs(weight: Tensor, pairs: Tensor, spec: Spec, context_offset: int) -> None:
    """Raise what `pair_scores` raises, but for ids outside the table."""
    _check(weight, pairs, spec, "pairs")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must have shape [n, 2], got {list(pairs.shape)}")
    if context_offset and isinstance(spec, FullSpec):
        raise ValueError(f"a full table has no context offset, got {context_offset}")
    if context_offset < 0:
        raise ValueError(f"context_offset must not be negative, got {context_offset}")


def draw_seed(dropout: float, like: Tensor) -> Tensor:
    """A seed for one step. Triton's kernels find it on the GPU, so that a captured graph draws it anew.

    Raises ValueError for shares outside [0, 1).
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    is_triton = backend(like.device, like.dtype) == "triton"
    if not dropout:
        return torch.zeros((), dtype=torch.int64)
    return torch.randint(2**62, (), device=like.device if is_triton else "cpu")


def pair_scores(
    weight: Tensor, pairs: Tensor, spec: Spec, *, context_offset: int = 0, dropout: float = 0.0
) -> Tensor:
    """Dot product of the two rows of each pair of ids, with dropout on both, from the pool itself.

    Nothing of size [n, 2, dim] is made, forward or backward: both hash again what they need. The exception
    is block size 1 under an optimizer of `cemb.optim`, where the values are kept, see
    `cemb.kernels.cpu.buckets`.

    Args:
        weight: the pool ``[spec.pool_size]``, or a full table ``[num_embeddings, embedding_dim]``.
        pairs: ids (word, context), int32 or int64, ``[n, 2]``.
        spec: shape and hash of the table; both ids lie in [0, spec.num_embeddings).
        context_offset: takes the place of ``spec.table_offset`` for contexts.
        dropout: share of components zeroed in each vector, in [0, 1), as in `vector_scores`.

    Returns:
        ``[n]`` in weight's dtype, accumulated in float32 (float64 for a float64 pool); determinism and
        errors are those of `hashed_lookup`. Differentiable once. If an optimizer of `cemb.optim` holds
        `weight`, the gradient goes to it, not to ``weight.grad``.
    """
    check_pairs(weight, pairs, spec, context_offset)
    seed = draw_seed(dropout, weight)
    touched: TouchedGradient | None = getattr(weight, "touched", None)
    if touched is not None and torch.is_grad_enabled():
        arguments = (weight, pairs, spec, context_offset, dropout, seed, touched)
        scores: Tensor = _TouchedPairScores.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        scores = _pair_scores(weight.reshape(-1), pairs, _encode(spec), context_offset, dropout, seed)
    return scores


def _vector_backend(vectors: Tensor) -> str:
    """As `backend`; on the CPU there is no kernel for bfloat16 vectors."""
    kind = backend(vectors.device, vectors.dtype)
    return "torch" if kind == "numba" and vectors.dtype == torch.bfloat16 else kind


@torch.library.custom_op("cemb::vector_scores", mutates_args=())
def _vector_scores(vectors: Tensor, dropout: float, seed: Tensor) -> Tensor:
    drop = _dropout(dropout, seed)
    kind = _vector_backend(vectors)
    if kind == "torch":
        return reference.vector_scores(vectors, drop)
    scores = vectors.new_empty(len(vectors))
    if kind == "triton":
        _cuda().vector_scores(vectors.contiguous(), drop, seed, scores)
    else:
        cpu.pairs.vector_scores(_array(vectors), drop, scores.numpy())
    return scores


@torch.library.custom_op("cemb::vector_scores_backward", mutates_args=())
def _vector_scores_backward(grad: Tensor, vectors: Tensor, dropout: float, seed: Tensor) -> Tensor:
    drop = _dropout(dropout, seed)
    kind = _vector_backend(vectors)
    if kind == "torch":
        weights = grad.unsqueeze(-1) * reference.pair_weights(vectors, drop)
        return weights.unsqueeze(1) * vectors.flip(1)
    out = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    if kind == "triton":
        _cuda().vector_scores_backward(grad.contiguous(), vectors.contiguous(), drop, seed, out)
    else:
        cpu.pairs.vector_scores_backward(_array(grad), _array(vectors), drop, out.numpy())
    return out


@_vector_scores.register_fake
def _(vectors: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return vectors.new_empty(vectors.shape[0])


@_vector_scores_backward.register_fake
def _(grad: Tensor, vectors: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return torch.empty_like(vectors, memory_format=torch.contiguous_format)


def _vector_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    vectors, ctx.dropout, seed = inputs
    ctx.save_for_backward(vectors, seed)


def _vector_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    vectors, seed = ctx.saved_tensors
    return _vector_scores_backward(grad, vectors, ctx.dropout, seed), None, None


_vector_scores.register_autograd(_vector_backward, setup_context=_vector_setup)


def vector_scores(vectors: Tensor, dropout: float = 0.0) -> Tensor:
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
    scores: Tensor = _vector_scores(vectors, dropout, draw_seed(dropout, vectors))
    return scores
