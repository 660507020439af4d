"""Triton kernels: the hash is computed where it is used; neither indices nor vectors of pairs reach memory.

Tensors are contiguous and on one device; `cemb.ops` has checked their ids. Pools and vectors are float32,
bfloat16 or float16; arithmetic is in float32. Gradients are summed in a pool of their own, in float32 (few
GPUs add bfloat16 atomically) or, where `deterministic`, in fixed point. With ``TRITON_INTERPRET=1`` in the
environment before Triton is imported, the kernels run on the CPU, slowly.

A row is cut into pieces: each block, or each `MAX_WIDTH` columns of a longer one. One hash serves a piece,
whose pool values are consecutive.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cemb import hashing
from cemb.hashing import PairDropout, Spec
from cemb.kernels.checks import check_array

MULTIPLIER_1 = tl.constexpr(hashing.MULTIPLIER_1)
MULTIPLIER_2 = tl.constexpr(hashing.MULTIPLIER_2)
GOLDEN = tl.constexpr(hashing.GOLDEN)

# Found on an H200, where other sizes cost up to a tenth more.
MAX_WIDTH = 256  # columns of a piece
TILE = 1024  # values of a program that looks up or scatters
PAIR_TILE = 512  # values of a program that scores pairs
PAIR_COLUMNS = 128  # of them, columns of one pair
PAIR_WARPS = 2
_FLOATS = torch.float32, torch.bfloat16, torch.float16


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    """`cemb.hashing.mix` of uint64."""
    x = (x ^ (x >> 30)) * MULTIPLIER_1
    x = (x ^ (x >> 27)) * MULTIPLIER_2
    return x ^ (x >> 31)


@triton.jit
def _locate(
    row: tl.tensor,
    block: tl.tensor,
    base: tl.tensor,
    num_starts: tl.tensor,
    DIM: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    SIGNED: tl.constexpr,
    HASHED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """First pool index of a block, int64, and the sign of its values, float32; `base` is that of `_base`."""
    key = row.to(tl.uint64) * NUM_BLOCKS + block.to(tl.uint64) + tl.cast(base, tl.uint64)
    if not HASHED:
        return (key * DIM).to(tl.int64), tl.where(key >= 0, 1.0, 1.0)
    h = _mix(key)
    start = ((h >> 32) * tl.cast(num_starts, tl.uint64)) >> 32
    return start.to(tl.int64), tl.where((h & SIGNED) != 0, -1.0, 1.0)


@triton.jit
def _columns(
    piece: tl.tensor, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Block of each of the pieces ``[..., 1]``; within it and within the row, columns ``[..., WIDTH]``."""
    block = piece // CHUNKS
    within = (piece % CHUNKS) * WIDTH + tl.arange(0, WIDTH)
    column = block * BLOCK_SIZE + within
    return block, within, column, (within < BLOCK_SIZE) & (column < DIM)


@triton.jit
def _add(pool: tl.tensor, index: tl.tensor, value: tl.tensor, scale: tl.tensor, mask: tl.tensor) -> None:
    """Add to a float32 pool or, where there is a `scale`, to an int64 pool in units of 1/scale."""
    if scale is not None:
        value = tl.floor(value.to(tl.float64) * tl.load(scale) + 0.5).to(tl.int64)
    # Relaxed, since the end of the kernel orders the sums before whatever reads them.
    tl.atomic_add(pool + index, value, mask=mask, sem="relaxed")


# Not specialized: arguments that differ from table to table or step to step would each cost a compilation.
@triton.jit(do_not_specialize=["n", "base", "num_starts"])
def _row_kernel(
    weight: tl.tensor,
    ids: tl.tensor,
    grad: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    n: tl.tensor,
    base: tl.tensor,
    num_starts: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    SIGNED: tl.constexpr,
    HASHED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Look PIECES x WIDTH values up in `weight` or, where there is a `grad`, add them to the pool `out`."""
    # One division in 64 bits for the program, one in 32 bits for each piece.
    per_row = NUM_BLOCKS * CHUNKS
    first = tl.program_id(0).to(tl.int64) * PIECES
    first_row = first // per_row
    offset = (first - first_row * per_row).to(tl.int32) + tl.arange(0, PIECES)[:, None]
    row = first_row + offset // per_row
    block, within, column, mask = _columns(offset % per_row, DIM, BLOCK_SIZE, WIDTH, CHUNKS)
    mask = mask & (row < n)
    row_id = tl.load(ids + row, mask=row < n, other=0)
    start, sign = _locate(row_id, block, base, num_starts, DIM, NUM_BLOCKS, SIGNED, HASHED)
    index, position = start + within, row * DIM + column
    if grad is None:
        value = tl.load(weight + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + position, sign * value, mask=mask)
    else:
        value = tl.load(grad + position, mask=mask, other=0.0).to(tl.float32)
        _add(out, index, sign * value, scale, mask)


@triton.jit
def _salt(seed: tl.tensor) -> tl.tensor:
    """`PairDropout.salt` of a seed that is a scalar in memory."""
    return _mix(tl.load(seed).to(tl.uint64) + GOLDEN)


@triton.jit
def _survives(
    pair: tl.tensor, column: tl.tensor, salt: tl.tensor, threshold: tl.tensor, DIM: tl.constexpr
) -> tl.tensor:
    """The dropout mask at `pair` and `column`, broadcast; a hash has four parts of 16 bits."""
    key = pair.to(tl.uint64) * ((DIM + 3) // 4) + (column // 4).to(tl.uint64) + salt
    part = _mix(key) >> ((column % 4) * 16).to(tl.uint64)
    return (part & 0xFFFF).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["n", "word_base", "context_base", "num_starts", "threshold", "factor"])
def _pair_kernel(
    weight: tl.tensor,
    pairs: tl.tensor,
    grad: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    n: tl.tensor,
    word_base: tl.tensor,
    context_base: tl.tensor,
    num_starts: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    factor: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    SIGNED: tl.constexpr,
    HASHED: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """Score PAIRS pairs or, where there is a `grad`, add their gradient to the pool `out`."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    word = tl.load(pairs + 2 * pair, mask=pair < n, other=0)[:, None, None]
    context = tl.load(pairs + 2 * pair + 1, mask=pair < n, other=0)[:, None, None]
    tile_pair = pair[:, None, None]
    if seed is not None:
        salt = _salt(seed)
    if grad is None:
        total = tl.zeros([PAIRS, PIECES, WIDTH], tl.float32)
    else:
        upstream = tl.load(grad + pair, mask=pair < n, other=0.0).to(tl.float32)[:, None, None] * factor
    for first in range(0, NUM_BLOCKS * CHUNKS, PIECES):
        piece = first + tl.arange(0, PIECES)[None, :, None]
        block, within, column, mask = _columns(piece, DIM, BLOCK_SIZE, WIDTH, CHUNKS)
        mask = mask & (tile_pair < n)
        if seed is not None:
            mask = mask & _survives(tile_pair, column, salt, threshold, DIM)
        word_start, word_sign = _locate(word, block, word_base, num_starts, DIM, NUM_BLOCKS, SIGNED, HASHED)
        context_start, context_sign = _locate(
            context, block, context_base, num_starts, DIM, NUM_BLOCKS, SIGNED, HASHED
        )
        sign = word_sign * context_sign
        word_index, context_index = word_start + within, context_start + within
        word_value = tl.load(weight + word_index, mask=mask, other=0.0).to(tl.float32)
        context_value = tl.load(weight + context_index, mask=mask, other=0.0).to(tl.float32)
        if grad is None:
            total += sign * word_value * context_value
        else:
            _add(out, word_index, sign * upstream * context_value, scale, mask)
            _add(out, context_index, sign * upstream * word_value, scale, mask)
    if grad is None:
        score = tl.sum(tl.sum(total, axis=2), axis=1) * factor
        tl.store(out + pair, score, mask=pair < n)


@triton.jit(do_not_specialize=["n", "threshold", "factor"])
def _vector_kernel(
    vectors: tl.tensor,
    grad: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    factor: tl.tensor,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    """Score PAIRS pairs of vectors or, where there is a `grad`, write their gradient to `out`."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    tile_pair = pair[:, None]
    if seed is not None:
        salt = _salt(seed)
    if grad is None:
        total = tl.zeros([PAIRS, COLUMNS], tl.float32)
    else:
        upstream = tl.load(grad + pair, mask=pair < n, other=0.0).to(tl.float32)[:, None] * factor
    for first in range(0, DIM, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        inside = (tile_pair < n) & (column < DIM)
        live = inside
        if seed is not None:
            live = inside & _survives(tile_pair, column, salt, threshold, DIM)
        word = 2 * tile_pair * DIM + column
        word_value = tl.load(vectors + word, mask=live, other=0.0).to(tl.float32)
        context_value = tl.load(vectors + word + DIM, mask=live, other=0.0).to(tl.float32)
        if grad is None:
            total += word_value * context_value
        else:
            tl.store(out + word, upstream * context_value, mask=inside)
            tl.store(out + word + DIM, upstream * word_value, mask=inside)
    if grad is None:
        tl.store(out + pair, tl.sum(total, axis=1) * factor, mask=pair < n)


# The only kernel whose assertions are compiled: they would slow the others down.
@triton.jit(debug=True, do_not_specialize=["n", "num_embeddings"])
def _check_kernel(ids: tl.tensor, n: tl.tensor, num_embeddings: tl.tensor, COUNT: tl.constexpr) -> None:
    i = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    row_id = tl.load(ids + i, mask=i < n, other=0)
    inside = (row_id >= 0) & (row_id < num_embeddings)
    tl.device_assert(inside, "ids must lie in [0, num_embeddings), the rows of the table")


def check_ids(ids: Tensor, num_embeddings: int) -> None:
    """Trip a device assert if one of `ids`, int64 and contiguous, is out of range; in a single launch."""
    check_array("ids", ids, ids.shape, torch.int64)
    if ids.numel():
        with torch.cuda.device_of(ids):
            _check_kernel[(triton.cdiv(ids.numel(), TILE),)](ids, ids.numel(), num_embeddings, COUNT=TILE)


def _check_device(*tensors: Tensor | None) -> None:
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors must be on one device, got {', '.join(sorted(devices))}")


def _int64(x: int) -> int:
    """The signed integer with the same lower 64 bits, which launches can pass."""
    return (x + 2**63) % 2**64 - 2**63


def _base(spec: Spec, table_offset: int) -> int:
    """What is added to every key of a table, as int64."""
    return _int64(table_offset * spec.num_blocks + spec.salt)


def _device_seed(dropout: PairDropout, seed: Tensor | None) -> Tensor | None:
    """The seed for kernels: None where dropout is 0, for which they compile without it."""
    return seed if dropout.threshold else None


def _constants(spec: Spec) -> dict[str, int]:
    """What kernels are compiled for."""
    width = min(triton.next_power_of_2(spec.block_size), MAX_WIDTH)
    return {
        "DIM": spec.embedding_dim,
        "BLOCK_SIZE": spec.block_size,
        "NUM_BLOCKS": spec.num_blocks,
        "SIGNED": int(spec.signed),
        "HASHED": spec.num_starts > 0,
        "WIDTH": width,
        "CHUNKS": triton.cdiv(spec.block_size, width),
    }


def _largest(x: Tensor) -> Tensor:
    """Largest magnitude, a float64 scalar that stays on the device."""
    largest: Tensor = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).double()
    return largest


def _fixed_point_scale(bound: Tensor, terms: int) -> Tensor:
    """Power of two that keeps sums of `terms` values up to `bound` below 2^62; NaN if bound is not finite."""
    exponent = torch.frexp(bound).exponent
    return torch.exp2(62.0 - terms.bit_length() - exponent.double()) + 0 * bound


def _new_pool(spec: Spec, like: Tensor, scale: Tensor | None) -> Tensor:
    """Zeros ``[pool_size]``, float32, or int64 for sums in fixed point."""
    dtype = torch.float32 if scale is None else torch.int64
    return torch.zeros(spec.pool_size, dtype=dtype, device=like.device)


def _to_float(pool: Tensor, scale: Tensor | None) -> Tensor:
    return pool if scale is None else pool.double().div_(scale).float()


def _launch_rows(
    weight: Tensor | None,
    ids: Tensor,
    spec: Spec,
    out: Tensor,
    grad: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    constants = _constants(spec)
    pieces = TILE // constants["WIDTH"]
    programs = triton.cdiv(len(ids) * spec.num_blocks * constants["CHUNKS"], pieces)
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(ids):
        _row_kernel[(programs,)](
            weight,
            ids,
            grad,
            out,
            scale,
            len(ids),
            _base(spec, spec.table_offset),
            spec.num_starts,
            PIECES=pieces,
            **constants,
        )


def lookup(weight: Tensor, ids: Tensor, spec: Spec, out: Tensor) -> None:
    """Write rows `ids` ``[n]`` (int64) of the table in `weight` ``[pool_size]`` into `out` ``[n, dim]``.

    `out` is of weight's dtype. Nothing is rounded, so results are those of `cemb.reference`, bit for bit.
    """
    check_array("weight", weight, (spec.pool_size,), *_FLOATS)
    check_array("ids", ids, (len(ids),), torch.int64)
    check_array("out", out, (len(ids), spec.embedding_dim), weight.dtype)
    _check_device(weight, ids, out)
    if len(ids):
        _launch_rows(weight, ids, spec, out)


def scatter(grad: Tensor, ids: Tensor, spec: Spec, deterministic: bool) -> Tensor:
    """The transpose of `lookup`: the sum of `grad` ``[n, dim]`` into a new float32 pool ``[pool_size]``.

    By default float32 atomics add in any order, so results differ by rounding from run to run. Where
    `deterministic`, they are the same bits in every run and for any order of the rows: terms are rounded to
    a unit of fixed point and summed in int64. With m the largest magnitude in `grad`, the unit is at most
    ``n * dim * m * 2^-60``, so each term errs by at most half of that (``m * 2^-33`` for 2^28 terms). It
    takes 16 more bytes per pool value; a value that is not finite makes the whole pool NaN.
    """
    check_array("ids", ids, (len(ids),), torch.int64)
    check_array("grad", grad, (len(ids), spec.embedding_dim), *_FLOATS)
    _check_device(grad, ids)
    scale = _fixed_point_scale(_largest(grad), grad.numel()) if deterministic and len(ids) else None
    pool = _new_pool(spec, grad, scale)
    if len(ids):
        _launch_rows(None, ids, spec, pool, grad, scale)
    return _to_float(pool, scale)


def _launch_pairs(
    weight: Tensor,
    pairs: Tensor,
    spec: Spec,
    context_offset: int,
    dropout: PairDropout,
    seed: Tensor | None,
    out: Tensor,
    grad: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    constants = _constants(spec)
    per_row = spec.num_blocks * constants["CHUNKS"]
    pieces = min(triton.next_power_of_2(per_row), max(1, PAIR_COLUMNS // constants["WIDTH"]))
    tile_pairs = max(1, PAIR_TILE // (pieces * constants["WIDTH"]))
    with torch.cuda.device_of(pairs):
        _pair_kernel[(triton.cdiv(len(pairs), tile_pairs),)](
            weight,
            pairs,
            grad,
            out,
            scale,
            len(pairs),
            _base(spec, spec.table_offset),
            _base(spec, context_offset),
            spec.num_starts,
            _device_seed(dropout, seed),
            dropout.threshold,
            dropout.scale,
            PIECES=pieces,
            PAIRS=tile_pairs,
            num_warps=PAIR_WARPS,
            **constants,
        )


def pair_scores(
    weight: Tensor,
    pairs: Tensor,
    spec: Spec,
    context_offset: int,
    dropout: PairDropout,
    seed: Tensor | None,
    scores: Tensor,
) -> None:
    """Write the dot product of both rows of each of `pairs` ``[n, 2]`` (int64) into `scores` ``[n]``.

    Row numbers are relative to `spec.table_offset` in column 0, words, and to `context_offset` in column 1,
    contexts; both tables are otherwise as `spec` says, in `weight` ``[pool_size]``. `seed`, an int64
    scalar on the device, takes the place of the dropout's own, so that a captured graph can draw it anew; it
    may be None where nothing is dropped. Sums are in float32, in an order that depends on shapes alone, so
    results are deterministic; `scores` is of weight's dtype.
    """
    check_array("weight", weight, (spec.pool_size,), *_FLOATS)
    check_array("pairs", pairs, (len(pairs), 2), torch.int64)
    check_array("scores", scores, (len(pairs),), weight.dtype)
    _check_device(weight, pairs, scores, _device_seed(dropout, seed))
    if len(pairs):
        _launch_pairs(weight, pairs, spec, context_offset, dropout, seed, scores)


def pair_scores_backward(
    grad: Tensor,
    weight: Tensor,
    pairs: Tensor,
    spec: Spec,
    context_offset: int,
    dropout: PairDropout,
    seed: Tensor | None,
    deterministic: bool,
) -> Tensor:
    """Gradient of `pair_scores` for `weight`, given `grad` ``[n]``: a new float32 pool ``[pool_size]``.

    Default and `deterministic` are those of `scatter`; here m is the product of the largest magnitudes in
    `grad` and in `weight` and of the dropout's scale, and there are ``2 * n * dim`` terms.
    """
    check_array("weight", weight, (spec.pool_size,), *_FLOATS)
    check_array("pairs", pairs, (len(pairs), 2), torch.int64)
    check_array("grad", grad, (len(pairs),), *_FLOATS)
    _check_device(weight, pairs, grad, _device_seed(dropout, seed))
    scale = None
    if deterministic and len(pairs):
        bound = _largest(grad) * _largest(weight) * dropout.scale
        scale = _fixed_point_scale(bound, pairs.numel() * spec.embedding_dim)
    pool = _new_pool(spec, weight, scale)
    if len(pairs):
        _launch_pairs(weight, pairs, spec, context_offset, dropout, seed, pool, grad, scale)
    return _to_float(pool, scale)


def _launch_vectors(
    vectors: Tensor, dropout: PairDropout, seed: Tensor | None, out: Tensor, grad: Tensor | None
) -> None:
    n, dim = len(vectors), vectors.shape[-1]
    check_array("vectors", vectors, (n, 2, dim), *_FLOATS)
    if grad is not None:
        check_array("grad", grad, (n,), *_FLOATS)
    check_array("out", out, (n,) if grad is None else (n, 2, dim), vectors.dtype)
    _check_device(vectors, out, grad, _device_seed(dropout, seed))
    columns = min(triton.next_power_of_2(dim), PAIR_COLUMNS)
    pairs = TILE // columns
    if n:
        with torch.cuda.device_of(vectors):
            _vector_kernel[(triton.cdiv(n, pairs),)](
                vectors,
                grad,
                out,
                n,
                _device_seed(dropout, seed),
                dropout.threshold,
                dropout.scale,
                DIM=dim,
                COLUMNS=columns,
                PAIRS=pairs,
            )


def vector_scores(vectors: Tensor, dropout: PairDropout, seed: Tensor | None, scores: Tensor) -> None:
    """Write the dot products of the pairs of `vectors` ``[n, 2, dim]`` into `scores` ``[n]``, deterministic.

    `scores` is of the vectors' dtype; sums are in float32; `seed` is that of `pair_scores`.
    """
    _launch_vectors(vectors, dropout, seed, scores, None)


def vector_scores_backward(
    grad: Tensor, vectors: Tensor, dropout: PairDropout, seed: Tensor | None, out: Tensor
) -> None:
    """Write the gradient of `vector_scores` with respect to `vectors` into `out` ``[n, 2, dim]``."""
    _launch_vectors(vectors, dropout, seed, out, grad)
