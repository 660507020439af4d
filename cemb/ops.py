"""torch.library ops: schema, validation, device dispatch, fake kernels and autograd.

`hashed_lookup` turns ids into vectors, `pair_scores` pairs of ids into dot products after dropout, and
`vector_scores` pairs of vectors into the same. `hashed_lookup` and `hashed_scatter` are linear in their
first argument and each other's transpose, so each one's backward is the other and derivatives of any order
exist, as they do of the scores, which are bilinear. `torch.func` transforms all of them.

In schemas a table is int64 ``[7 + embedding_dim]`` on the CPU: rows, columns, values of the pool or table,
block size (0 for a full table), hash seed, signed, table offset, and zeros, whose number tells compiled code
the columns.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cemb import reference
from cemb.hashing import FullSpec, HashSpec, PairDropout, Spec
from cemb.kernels import cpu
from cemb.kernels.cpu import rules
from cemb.kernels.cpu.pairs import Batch

_ID_DTYPES = (torch.int32, torch.int64)
_NO_PAIRS = np.empty((0, 2), np.int64)
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


def encode(spec: Spec) -> Tensor:
    """A table as schemas have it: a tensor, so that compiled code does not depend on its numbers."""
    rows, dim = spec.num_embeddings, spec.embedding_dim
    numbers = [rows, dim, spec.pool_size, 0, 0, 0, 0]
    if isinstance(spec, HashSpec):
        numbers[3:] = [spec.block_size, spec.hash_seed, int(spec.signed), spec.table_offset]
    return torch.tensor([*numbers, *[0] * dim], dtype=torch.int64, device="cpu")


def _decode(table: Tensor) -> Spec:
    return _spec(*table[:7].tolist())


@functools.lru_cache(maxsize=64)  # making one takes a noticeable part of a small lookup
def _spec(
    num_embeddings: int,
    embedding_dim: int,
    pool_size: int,
    block_size: int,
    hash_seed: int,
    signed: int,
    offset: int,
) -> Spec:
    if block_size == 0:
        return FullSpec(num_embeddings, embedding_dim)
    return HashSpec(num_embeddings, embedding_dim, pool_size, block_size, hash_seed, bool(signed), offset)


def _dropout(p: float, seed: Tensor) -> PairDropout:
    """The dropout of a share and a seed; a seed on a GPU stays there, for kernels to read, without a sync."""
    return PairDropout(p, 0 if seed.is_cuda else int(seed))


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """The values as a contiguous numpy array, without a copy if they are; bfloat16 as uint16 of its bits.

    `Tensor.numpy` would keep the tensor from being resized from then on.
    """
    tensor = tensor.detach().contiguous()
    return np.from_dlpack(tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels compute and accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Setup = Callable[[Any, tuple[Any, ...], Any], None]


def _differentiable(op: Any, setup: Setup, backward: Callable[..., Any], jvp: Callable[..., Tensor]) -> Any:
    """The op with derivatives in both modes and `torch.vmap`.

    `setup`, `backward` and `jvp` are as in `torch.autograd.Function`. Compiled code takes the first two from
    the op itself: it has no forward mode.
    """
    op.register_autograd(backward, setup_context=setup)

    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """One call after another, since kernels take one table."""
        calls = [
            [
                value.select(dim, n) if isinstance(dim, int) else value
                for value, dim in zip(inputs, in_dims, strict=True)
            ]
            for n in range(info.batch_size)
        ]
        return torch.stack([call(*arguments) for arguments in calls]), 0

    methods: dict[str, Any] = {
        "forward": lambda *inputs: op(*inputs),
        "setup_context": setup,
        "backward": backward,
        "jvp": jvp,
        "vmap": vmap,
    }
    members = {name: staticmethod(method) for name, method in methods.items()}
    function: Any = type(op._name, (torch.autograd.Function,), members)

    def call(*inputs: Any) -> Any:
        return op(*inputs) if torch.compiler.is_compiling() else function.apply(*inputs)

    return call


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep all inputs, for `_inputs`."""
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _save_rest(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep all inputs but the first, which an op is linear in, and that one's size."""
    first, *rest = inputs
    ctx.size = first.numel()
    _save(ctx, tuple(rest), output)


def _inputs(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if value is None else value for value in ctx.others]


def _quadratic(scores: Any, sums: Any, changes: Any) -> Any:
    """The op ``scores(w, ...)``, quadratic in w, with derivatives of any order.

    They are made of ``sums(g, w, ...)``, the gradient of ``Σ g · scores``, and ``changes(u, w, ...)``, those
    of the scores along u, which are linear in each of their first two arguments.
    """

    def scores_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *rest = _inputs(ctx)
        return summed(grad, weight, *rest), *[None] * len(rest)

    def scores_jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        change: Tensor = changed(tangent, *_inputs(ctx))
        return change

    def sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes, weight, *rest = _inputs(ctx)
        return changed(grad, weight, *rest), summed(slopes, grad, *rest), *[None] * len(rest)

    def changes_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tangent, weight, *rest = _inputs(ctx)
        return summed(grad, weight, *rest), summed(grad, tangent, *rest), *[None] * len(rest)

    def jvp(call: Callable[..., Tensor], ctx: Any, first: Any, weight: Any, *_: None) -> Tensor:
        own, own_weight, *rest = _inputs(ctx)
        both = [(first, own_weight), (own, weight)]
        found = [call(*pair, *rest) for pair in both if pair[0] is not None and pair[1] is not None]
        return found[0] if len(found) == 1 else found[0] + found[1]

    summed = _differentiable(sums, _save, sums_backward, lambda *inputs: jvp(summed, *inputs))
    changed = _differentiable(changes, _save, changes_backward, lambda *inputs: jvp(changed, *inputs))
    return _differentiable(scores, _save, scores_backward, scores_jvp)


@torch.library.custom_op("cemb::hashed_lookup", mutates_args=())
def _hashed_lookup(weight: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    spec = _decode(table)
    _check_shape(weight, spec)
    kind = backend(weight.device, weight.dtype)
    if kind == "torch":
        return reference.hashed_lookup(weight.reshape(-1), ids, spec)
    flat = ids.reshape(-1).long().contiguous()
    if kind == "triton":
        _cuda().check_ids(flat, spec.num_embeddings)
        out = weight.new_empty((*ids.shape, spec.embedding_dim))
        _cuda().lookup(
            weight.reshape(-1).contiguous(), flat, spec, out.view(flat.numel(), spec.embedding_dim)
        )
        return out
    reference.check_ids(flat, spec.num_embeddings)
    out = weight.new_empty((*ids.shape, spec.embedding_dim), dtype=_wide(weight.dtype))
    values, rows = weight.reshape(-1), out.view(flat.numel(), spec.embedding_dim)
    cpu.lookup.lookup(array(values), array(flat), spec, array(rows))
    return out.to(weight.dtype)


@torch.library.custom_op("cemb::hashed_scatter", mutates_args=())
def _hashed_scatter(grad: Tensor, ids: Tensor, pool_size: int, table: Tensor) -> Tensor:
    spec = _decode(table)
    if pool_size != spec.pool_size or grad.shape != (*ids.shape, spec.embedding_dim):
        raise ValueError(
            f"grad must have shape {[*ids.shape, spec.embedding_dim]} and pool_size be {spec.pool_size}, "
            f"got {list(grad.shape)} and {pool_size}"
        )
    flat_ids = ids.reshape(-1).long().contiguous()
    flat_grad = grad.reshape(flat_ids.numel(), spec.embedding_dim).contiguous()
    kind = backend(grad.device, grad.dtype)
    if kind == "torch":
        indices, signs = reference.locate(flat_ids, spec)
        values = flat_grad if signs is None else flat_grad * signs
        return grad.new_zeros(pool_size).index_add_(0, indices.reshape(-1), values.reshape(-1))
    _check_full_ids(flat_ids, spec, kind)
    if kind == "triton":
        deterministic = torch.are_deterministic_algorithms_enabled()
        pool: Tensor = _cuda().scatter(flat_grad, flat_ids, spec, deterministic)
        return pool.to(grad.dtype)
    pool = grad.new_zeros(pool_size, dtype=_wide(grad.dtype))
    cpu.lookup.scatter(array(flat_grad.to(pool.dtype)), array(flat_ids), spec, array(pool))
    return pool.to(grad.dtype)


@_hashed_lookup.register_fake
def _(weight: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, table.shape[0] - 7))


@_hashed_scatter.register_fake
def _(grad: Tensor, ids: Tensor, pool_size: int, table: Tensor) -> Tensor:
    return grad.new_empty(pool_size)


def _lookup_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, table = _inputs(ctx)
    return _scatter(grad, ids, ctx.size, table), None, None


def _lookup_jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    ids, table = _inputs(ctx)
    rows: Tensor = _lookup(tangent, ids, table)
    return rows


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, _, table = _inputs(ctx)
    return _lookup(grad, ids, table), None, None, None


def _scatter_jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    ids, pool_size, table = _inputs(ctx)
    sums: Tensor = _scatter(tangent, ids, pool_size, table)
    return sums


_lookup = _differentiable(_hashed_lookup, _save_rest, _lookup_backward, _lookup_jvp)
_scatter = _differentiable(_hashed_scatter, _save_rest, _scatter_backward, _scatter_jvp)


def _check(weight: Tensor, ids: Tensor, name: str) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if type(weight).__name__ == "DTensor" or type(ids).__name__ == "DTensor":
        raise TypeError(f"weight and {name} must not be DTensors: a hash spreads a row over all of the pool")
    if ids.dtype not in _ID_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if ids.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got layout {ids.layout}; give the values of a jagged one"
        )
    if not weight.dtype.is_floating_point:
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.device != ids.device:
        raise ValueError(f"weight and {name} must be on one device, got {weight.device} and {ids.device}")


def _check_shape(weight: Tensor, spec: Spec) -> None:
    if isinstance(spec, HashSpec) and weight.shape != (spec.pool_size,):
        raise ValueError(f"weight must have shape [{spec.pool_size}], the pool, got {list(weight.shape)}")
    if weight.numel() != spec.pool_size:
        raise ValueError(
            f"weight must hold the {spec.num_embeddings} × {spec.embedding_dim} values of the table, "
            f"got shape {list(weight.shape)}"
        )


def _check_full_ids(ids: Tensor, spec: Spec, kind: str) -> None:
    """Check ids again in the backward pass where one outside the table would be outside the memory, too."""
    if isinstance(spec, FullSpec):
        (_cuda() if kind == "triton" else reference).check_ids(ids, spec.num_embeddings)


def lookup(weight: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """`hashed_lookup` in a table that `encode` made."""
    _check(weight, ids, "ids")
    rows: Tensor = _lookup(weight, ids, table)
    return rows


def scatter(grad: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """The transpose of `lookup`: sums ``[pool_size]`` of the rows `grad` ``[*ids.shape, embedding_dim]``."""
    sums: Tensor = _scatter(grad, ids, int(table[2]), table)
    return sums


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
    return lookup(weight, ids, encode(spec))


@torch.library.custom_op("cemb::pair_scores", mutates_args=())
def _pair_scores(
    weight: Tensor, pairs: Tensor, table: Tensor, context_offset: int, dropout: float, seed: Tensor
) -> Tensor:
    spec, drop = _decode(table), _dropout(dropout, seed)
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
    out = array(scores)
    cpu.pairs.score(array(weight), Batch.of(array(pairs), drop, out.dtype), spec, context_offset, out)
    return scores.to(weight.dtype)


@torch.library.custom_op("cemb::pair_scores_backward", mutates_args=())
def _pair_scores_backward(
    grad: Tensor,
    weight: Tensor,
    pairs: Tensor,
    table: Tensor,
    context_offset: int,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    spec, drop = _decode(table), _dropout(dropout, seed)
    kind = backend(weight.device, weight.dtype)
    if kind == "torch":
        return reference.pair_scores_backward(grad, weight, pairs, spec, context_offset, drop)
    pairs = pairs.long().contiguous()
    _check_full_ids(pairs, spec, kind)
    if kind == "triton":
        deterministic = torch.are_deterministic_algorithms_enabled()
        arguments = (grad.contiguous(), weight.contiguous(), pairs, spec, context_offset, drop, seed)
        pool: Tensor = _cuda().pair_scores_backward(*arguments, deterministic)
        return pool.to(weight.dtype)
    pool = weight.new_zeros(weight.numel(), dtype=_wide(weight.dtype))
    sums, slopes = array(pool), array(grad.to(pool.dtype))
    batch = Batch.of(array(pairs), drop, sums.dtype, slopes=slopes)
    how = cpu.updates.plan(spec)
    cpu.updates.step([sums], rules.Add(), array(weight), batch, spec, context_offset, how)
    return pool.to(weight.dtype)


@torch.library.custom_op("cemb::pair_scores_jvp", mutates_args=())
def _pair_scores_jvp(
    tangent: Tensor,
    weight: Tensor,
    pairs: Tensor,
    table: Tensor,
    context_offset: int,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    spec, drop = _decode(table), _dropout(dropout, seed)
    return reference.pair_scores_jvp(tangent, weight, pairs, spec, context_offset, drop)


@_pair_scores_jvp.register_fake
def _(tangent: Tensor, weight: Tensor, pairs: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(pairs.shape[0])


@_pair_scores.register_fake
def _(weight: Tensor, pairs: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(pairs.shape[0])


@_pair_scores_backward.register_fake
def _(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.numel())


_pairs = _quadratic(_pair_scores, _pair_scores_backward, _pair_scores_jvp)


def check_pairs(weight: Tensor, pairs: Tensor, spec: Spec, context_offset: int) -> None:
    """Raise what `pair_scores` raises, but for ids outside the table."""
    _check(weight, pairs, "pairs")
    _check_shape(weight, spec)
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

    Nothing of size [n, 2, dim] is made, forward or backward: both hash again what they need. The exception is
    the gradient at block size 1 in a large pool, see `cemb.kernels.cpu.buckets`.

    Args:
        weight: the pool ``[spec.pool_size]``, or a full table ``[num_embeddings, embedding_dim]``.
        pairs: ids (word, context), int32 or int64, ``[n, 2]``.
        spec: shape and hash of the table; both ids lie in [0, spec.num_embeddings).
        context_offset: takes the place of ``spec.table_offset`` for contexts.
        dropout: share of components zeroed in each vector, in [0, 1), as in `vector_scores`.

    Returns:
        ``[n]`` in weight's dtype, accumulated in float32 (float64 for a float64 pool); determinism and
        errors are those of `hashed_lookup`. Derivatives of any order exist.
    """
    check_pairs(weight, pairs, spec, context_offset)
    seed = draw_seed(dropout, weight)
    scores: Tensor = _pairs(weight.reshape(-1), pairs, encode(spec), context_offset, dropout, seed)
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
        out = array(scores)
        cpu.vectors.score(array(vectors), Batch.of(_NO_PAIRS, drop, out.dtype), out)
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
        batch = Batch.of(_NO_PAIRS, drop, array(out).dtype, slopes=array(grad))
        cpu.vectors.gradient(array(vectors), batch, array(out))
    return out


@torch.library.custom_op("cemb::vector_scores_jvp", mutates_args=())
def _vector_scores_jvp(tangent: Tensor, vectors: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return reference.vector_scores_jvp(tangent, vectors, _dropout(dropout, seed))


@_vector_scores_jvp.register_fake
def _(tangent: Tensor, vectors: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return vectors.new_empty(vectors.shape[0])


@_vector_scores.register_fake
def _(vectors: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return vectors.new_empty(vectors.shape[0])


@_vector_scores_backward.register_fake
def _(grad: Tensor, vectors: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return torch.empty_like(vectors, memory_format=torch.contiguous_format)


_vectors = _quadratic(_vector_scores, _vector_scores_backward, _vector_scores_jvp)


def vector_scores(vectors: Tensor, dropout: float = 0.0) -> Tensor:
    """Dot product of each pair of vectors, with dropout on both.

    Has the distribution of ``(F.dropout(u, p) * F.dropout(v, p)).sum(-1)``, without a stored mask: masks are
    hashed from a seed drawn from torch's default generator, see `cemb.hashing.PairDropout`. On the CPU,
    torch's own dropout draws its mask on one thread, which takes longer than the rest of a step.

    Args:
        vectors: ``[n, 2, dim]``.
        dropout: share of components zeroed in each vector, in [0, 1).

    Returns:
        ``[n]``. Deterministic for a state of the generator; derivatives of any order exist.

    Raises ValueError for another shape or share.
    """
    if vectors.dim() != 3 or vectors.shape[1] != 2:
        raise ValueError(f"vectors must have shape [n, 2, dim], got {list(vectors.shape)}")
    scores: Tensor = _vectors(vectors, dropout, draw_seed(dropout, vectors))
    return scores
