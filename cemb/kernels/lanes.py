"""Vector operations on 16 lanes under a bit mask, for Numba kernels.

A block of a hashed row is a short run of values at any position. LLVM turns a loop over one into scalar
code, since its length is unknown and arrays might overlap; these intrinsics say outright what is meant.
Bit l of a mask stands for lane l: lanes outside a mask are neither read nor written, so a run may end
anywhere. A `mask` is of the first few lanes, `kept` and `old` of any among them. Arrays are one-dimensional:
float32, float64, or uint16 for the bits of bfloat16 (read only).

A run of 16 values or more needs no mask: its last vector ends where it ends, and overlaps the one before.
Where that adds to what it finds, the two go together, in operations whose name ends in ``_two``: they read
both vectors before they write either, and so write what they share twice, the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from cemb import hashing

LANES = 16
_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_BITS = ir.VectorType(ir.IntType(1), LANES)
_SUFFIX = {"i16": "i16", "float": "f32", "double": "f64"}

_Array = tuple[Any, Any]  # its type, and what stands for it in generated code


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _bits(builder: Any, mask: Any) -> Any:
    """The lanes of an integer mask."""
    return builder.bitcast(builder.trunc(mask, _I16), _BITS)


def _choice(context: Any, builder: Any, mask: Any) -> Any:
    """The lanes of an integer mask, to choose values by: without AVX-512, in half of LLVM's instructions."""
    if _has_masked_access(context):
        return _bits(builder, mask)
    words = ir.VectorType(_I32, LANES)
    each = ir.Constant(words, [1 << lane for lane in range(LANES)])
    lanes = builder.and_(_splat(builder, builder.trunc(mask, _I32), words), each)
    return builder.icmp_signed("!=", lanes, ir.Constant(words, [0] * LANES))


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _has_masked_access(context: Any) -> bool:
    """Whether masked loads and stores of all types are instructions of the processor, and fast ones.

    AVX2 alone has none of 16 bits, its masked stores are slow, by them a Zen 3 scaled 25 values, 16 and 9, in
    28 ns and without in 7, and its masked loads wait for cache lines of which they want nothing.
    """
    return "+avx512bw" in context.codegen().magic_tuple()[2]


def _on_lanes(context: Any, builder: Any, mask: Any, generate: Callable[[Any], None]) -> None:
    """Generate code for the lanes of `mask`, and where that pays, code for all lanes apart.

    `generate` is given the lanes, None for all of them.
    """
    if _has_masked_access(context):
        generate(_bits(builder, mask))
        return
    with builder.if_else(_is_full(builder, mask), likely=True) as (full, partial):
        with full:
            generate(None)
        with partial:
            generate(_bits(builder, mask))


def _is_full(builder: Any, mask: Any) -> Any:
    return builder.icmp_unsigned("==", mask, ir.Constant(mask.type, (1 << LANES) - 1))


def _load(
    context: Any, builder: Any, array_type: Any, array: Any, index: Any, bits: Any, kept: Any = None
) -> Any:
    """Lanes of ``array[index:]`` inside `bits`, of them those of `kept`; zero elsewhere.

    None stands for all lanes; bfloat16 becomes float32.
    """
    pointer = _pointer(context, builder, array_type, array, index)
    vector = ir.VectorType(pointer.type.pointee, LANES)
    align = array_type.dtype.bitwidth // 8
    zero = ir.Constant(vector, [0 if vector.element == _I16 else 0.0] * LANES)
    if bits is None:
        loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=align)
        if kept is not None:
            loaded = builder.select(kept, loaded, zero)
    elif _has_masked_access(context):
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [pointer.type, _I32, _BITS, vector]),
            f"llvm.masked.load.v{LANES}{_SUFFIX[str(vector.element)]}.p0",
        )
        bits = bits if kept is None else kept
        loaded = builder.call(function, [pointer, ir.Constant(_I32, align), bits, zero])
    else:
        loaded = _load_first(builder, pointer, vector, bits, align)
        if kept is not None:
            loaded = builder.select(kept, loaded, zero)
    if vector.element != _I16:
        return loaded
    words = ir.VectorType(_I32, LANES)
    shifted = builder.shl(builder.zext(loaded, words), ir.Constant(words, [16] * LANES))
    return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), LANES))


def _load_first(builder: Any, pointer: Any, vector: Any, bits: Any, align: int) -> Any:
    """The first few lanes, those of `bits`, from memory, and zeros; lines of others are left alone."""
    count = builder.ctpop(builder.bitcast(bits, _I16))
    loaded = ir.Constant(vector, [0 if vector.element == _I16 else 0.0] * LANES)
    width = 1
    while width <= LANES:
        # Where the count has this bit, the next `width` lanes are read, and stand before those read already.
        before = builder.block
        with builder.if_then(_has_bit(builder, count, width)):
            first = builder.and_(count, ir.Constant(_I16, 2 * LANES - 2 * width))
            part_type = ir.VectorType(vector.element, width)
            place = builder.gep(pointer, [builder.zext(first, _I32)])
            part = builder.load(builder.bitcast(place, part_type.as_pointer()), align=align)
            wide = _lanes_of(builder, part, part, [lane % width for lane in range(LANES)])
            joined = _lanes_of(builder, wide, loaded, [*range(width), *range(LANES, 2 * LANES - width)])
            inside = builder.block
        either = builder.phi(vector)
        either.add_incoming(loaded, before)
        either.add_incoming(joined, inside)
        loaded, width = either, 2 * width
    return loaded


def _lanes_of(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Lanes of two vectors by their numbers, those of `b` after those of `a`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _has_bit(builder: Any, count: Any, bit: int) -> Any:
    return builder.icmp_unsigned("!=", builder.and_(count, ir.Constant(_I16, bit)), ir.Constant(_I16, 0))


def _store(
    context: Any, builder: Any, array_type: Any, array: Any, index: Any, bits: Any, value: Any
) -> None:
    """Write the lanes of `bits`, which must be the first few; None stands for all lanes."""
    pointer = _pointer(context, builder, array_type, array, index)
    align = array_type.dtype.bitwidth // 8
    if bits is None:
        builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)
    elif _has_masked_access(context):
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [value.type, pointer.type, _I32, _BITS]),
            f"llvm.masked.store.v{LANES}{_SUFFIX[str(value.type.element)]}.p0",
        )
        builder.call(function, [value, pointer, ir.Constant(_I32, align), bits])
    else:
        count = builder.ctpop(builder.bitcast(bits, _I16))

        with builder.if_then(_has_bit(builder, count, LANES)):
            builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)
        width = LANES // 2
        while width:
            # Where the count has this bit, the next `width` lanes are written; what follows moves down.
            is_next = _has_bit(builder, count, width)
            low, high = (
                _lanes_of(builder, value, value, list(range(first, first + width))) for first in (0, width)
            )
            with builder.if_then(is_next):
                builder.store(low, builder.bitcast(pointer, low.type.as_pointer()), align=align)
            pointer = builder.gep(
                pointer, [builder.select(is_next, ir.Constant(_I32, width), ir.Constant(_I32, 0))]
            )
            value = builder.select(is_next, high, low)
            width //= 2


def _root(builder: Any, vector: Any) -> Any:
    """Square roots of the lanes."""
    name = f"llvm.sqrt.v{LANES}{_SUFFIX[str(vector.type.element)]}"
    kind = ir.FunctionType(vector.type, [vector.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [vector])


def _scaled(
    context: Any,
    builder: Any,
    source_type: Any,
    source: Any,
    index: Any,
    factor: Any,
    bits: Any,
    kept: Any = None,
) -> Any:
    loaded = _load(context, builder, source_type, source, index, bits, kept)
    return builder.fmul(loaded, _splat(builder, factor, loaded.type))


def _factor_type(array_type: Any) -> Any:
    return types.float64 if array_type.dtype == types.float64 else types.float32


@intrinsic
def _bfloat16_at(typing: Any, array: Any, i: Any) -> tuple[Any, Any]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(_pointer(context, builder, signature.args[0], *arguments))
        word = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
        return builder.bitcast(word, ir.FloatType())

    return types.float32(array, types.intp), generate


def value_at(array: Any, i: Any) -> Any:
    """``array[i]``; bfloat16 becomes float32."""
    raise NotImplementedError("for use in kernels only")


# Not strict, since Numba would compare annotations too, and lambdas have none.
@overload(value_at, inline="always", strict=False)
def _value_at(array: Any, i: Any) -> Callable[[Any, Any], Any]:
    if array.dtype == types.uint16:
        return lambda array, i: _bfloat16_at(array, i)
    return lambda array, i: array[i]


@intrinsic
def multiply(
    typing: Any, out: Any, i: Any, a: Any, j: Any, b: Any, k: Any, factor: Any, kept: Any, mask: Any
) -> tuple[Any, Any]:
    """``out[i + l] = factor * a[j + l] * b[k + l] if l in kept else 0`` for the lanes l of `mask`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        out_type, _, a_type, _, b_type, _, _, _, _ = signature.args
        out, i, a, j, b, k, factor, kept, mask = arguments
        kept = _choice(context, builder, kept)

        def on(bits: Any) -> None:
            left = _scaled(context, builder, a_type, a, j, factor, bits)
            right = _load(context, builder, b_type, b, k, bits)
            product = builder.fmul(left, right)
            zero = ir.Constant(product.type, [0.0] * LANES)
            _store(context, builder, out_type, out, i, bits, builder.select(kept, product, zero))

        _on_lanes(context, builder, mask, on)

    ints = types.intp
    return types.void(out, ints, a, ints, b, ints, _factor_type(a), ints, ints), generate


@intrinsic
def finish_hash(
    typing: Any, out: Any, i: Any, first: Any, steps: Any, row: Any, num_starts: Any
) -> tuple[Any, Any]:
    """Write to ``out[i + l]``, for all lanes l, where a block starts whose hash is half done.

    ``first + steps[row, l]`` is the product by the hash's first multiplier, see `cemb.hashing`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        out_type, _, _, steps_type, _, _ = signature.args
        out, i, first, steps, row, num_starts = arguments
        words, starts = ir.VectorType(ir.IntType(64), LANES), ir.VectorType(_I32, LANES)

        def shifted(value: Any, count: int) -> Any:
            return builder.lshr(value, ir.Constant(words, [count] * LANES))

        pointer = _pointer(
            context, builder, steps_type, steps, builder.mul(row, ir.Constant(row.type, LANES))
        )
        step = builder.load(builder.bitcast(pointer, words.as_pointer()), align=8)
        product = builder.add(_splat(builder, first, words), step)
        mixed = builder.xor(product, shifted(product, 27))
        product = builder.mul(mixed, ir.Constant(words, [hashing.MULTIPLIER_2] * LANES))
        # The upper half of ``product ^ (product >> 31)``.
        half = builder.xor(shifted(product, 32), shifted(product, 63))
        scaled = builder.mul(half, _splat(builder, builder.zext(num_starts, words.element), words))
        pointer = _pointer(context, builder, out_type, out, i)
        start = builder.trunc(shifted(scaled, 32), starts)
        builder.store(start, builder.bitcast(pointer, starts.as_pointer()), align=4)

    ints, word = types.intp, types.uint64
    return types.void(out, ints, word, steps, ints, types.uint32), generate


@intrinsic
def scale(typing: Any, out: Any, i: Any, source: Any, j: Any, factor: Any, mask: Any) -> tuple[Any, Any]:
    """``out[i + l] = factor * source[j + l]`` for the lanes l of `mask`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        out_type, _, source_type, _, _, _ = signature.args
        out, i, source, j, factor, mask = arguments

        def on(bits: Any) -> None:
            value = _scaled(context, builder, source_type, source, j, factor, bits)
            _store(context, builder, out_type, out, i, bits, value)

        _on_lanes(context, builder, mask, on)

    ints = types.intp
    return types.void(out, ints, source, ints, _factor_type(source), ints), generate


def _sum_scaled(
    context: Any,
    builder: Any,
    out: _Array,
    i: Any,
    source: _Array,
    j: Any,
    factor: Any,
    vectors: Sequence[tuple[Any, Any, Any]],
    bits: Any,
) -> None:
    """Code for vectors of sums: each is a step to it from `i` and `j`, what it keeps, and what it adds to."""
    totals = []
    for step, kept, old in vectors:
        value = _scaled(context, builder, *source, _at(builder, j, step), factor, bits, kept)
        before = _load(context, builder, *out, _at(builder, i, step), bits, old)
        totals.append(builder.fadd(before, value))
    for (step, _, _), total in zip(vectors, totals, strict=True):
        _store(context, builder, *out, _at(builder, i, step), bits, total)


def _at(builder: Any, index: Any, step: Any) -> Any:
    return index if step is None else builder.add(index, step)


@intrinsic
def add_scaled(
    typing: Any, out: Any, i: Any, source: Any, j: Any, factor: Any, kept: Any, mask: Any
) -> tuple[Any, Any]:
    """``out[i + l] += factor * source[j + l] if l in kept else 0`` for the lanes l of `mask`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        out_type, _, source_type, _, _, _, _ = signature.args
        out, i, source, j, factor, kept, mask = arguments
        arrays = (out_type, out), i, (source_type, source), j
        vector = None, _choice(context, builder, kept), None
        _on_lanes(
            context,
            builder,
            mask,
            lambda bits: _sum_scaled(context, builder, *arrays, factor, [vector], bits),
        )

    ints = types.intp
    return types.void(out, ints, source, ints, _factor_type(source), ints, ints), generate


@intrinsic
def add_scaled_two(
    typing: Any, out: Any, i: Any, source: Any, j: Any, factor: Any, kept: Any, step: Any, kept_after: Any
) -> tuple[Any, Any]:
    """`add_scaled` for all lanes, at `i` and `j` and `step` behind; what they share is added to once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        out_type, _, source_type, *_ = signature.args
        out, i, source, j, factor, kept, step, kept_after = arguments
        kept, kept_after = (_choice(context, builder, mask) for mask in (kept, kept_after))
        arrays = (out_type, out), i, (source_type, source), j
        vectors = [(None, kept, None), (step, kept_after, None)]
        _sum_scaled(context, builder, *arrays, factor, vectors, None)

    ints = types.intp
    return types.void(out, ints, source, ints, _factor_type(source), ints, ints, ints), generate


@intrinsic
def add_gathered(
    typing: Any, out: Any, i: Any, source: Any, columns: Any, values: Any, first: Any, last: Any
) -> tuple[Any, Any]:
    """``out[i + l] += Σ values[t] * source[16 * columns[t] + l]`` for all 16 lanes, t from `first` to `last`.

    Even and odd terms are summed apart, so that no addition waits for the one before it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        out_type, _, source_type, columns_type, values_type, _, _ = signature.args
        out, i, source, columns, values, first, last = arguments
        one, two = (ir.Constant(first.type, step) for step in (1, 2))
        before = _load(context, builder, out_type, out, i, None)
        sums = [cgutils.alloca_once(builder, before.type) for _ in range(2)]
        builder.store(before, sums[0])
        builder.store(ir.Constant(before.type, [0.0] * LANES), sums[1])

        def add(t: Any, total: Any) -> None:
            column = builder.zext(builder.load(_pointer(context, builder, columns_type, columns, t)), t.type)
            value = builder.load(_pointer(context, builder, values_type, values, t))
            place = builder.mul(column, ir.Constant(t.type, LANES))
            row = _load(context, builder, source_type, source, place, None)
            # Rounded once, where the processor can.
            fused = ("contract",)
            term = builder.fmul(_splat(builder, value, row.type), row, flags=fused)
            builder.store(builder.fadd(builder.load(total), term, flags=fused), total)

        pairs_end = builder.sub(last, builder.and_(builder.sub(last, first), one))
        with cgutils.for_range_slice(builder, first, pairs_end, two, inc=True) as (t, _):
            add(t, sums[0])
            add(builder.add(t, one), sums[1])
        with builder.if_then(builder.icmp_signed("<", pairs_end, last)):
            add(pairs_end, sums[0])
        total = builder.fadd(builder.load(sums[0]), builder.load(sums[1]))
        _store(context, builder, out_type, out, i, None, total)

    ints = types.intp
    return types.void(out, ints, source, columns, values, ints, ints), generate


@intrinsic
def append_scaled(
    typing: Any, out: Any, i: Any, source: Any, j: Any, factor: Any, kept: Any, old: Any, mask: Any
) -> tuple[Any, Any]:
    """``out[i + l] = (out[i + l] if l in old) + (factor * source[j + l] if l in kept)`` for l in `mask`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        out_type, _, source_type, _, _, _, _, _ = signature.args
        out, i, source, j, factor, kept, old, mask = arguments
        arrays = (out_type, out), i, (source_type, source), j
        vector = None, *(_choice(context, builder, lanes) for lanes in (kept, old))
        _on_lanes(
            context,
            builder,
            mask,
            lambda bits: _sum_scaled(context, builder, *arrays, factor, [vector], bits),
        )

    ints = types.intp
    return types.void(out, ints, source, ints, _factor_type(source), ints, ints, ints), generate


@intrinsic
def append_scaled_two(
    typing: Any,
    out: Any,
    i: Any,
    source: Any,
    j: Any,
    factor: Any,
    kept: Any,
    old: Any,
    step: Any,
    kept_after: Any,
    old_after: Any,
) -> tuple[Any, Any]:
    """`append_scaled` for all lanes, at `i` and `j` and `step` behind; what they share is added to once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        out_type, _, source_type, *_ = signature.args
        out, i, source, j, factor, kept, old, step, kept_after, old_after = arguments
        arrays = (out_type, out), i, (source_type, source), j
        vectors = [
            (place, *(_choice(context, builder, lanes) for lanes in masks))
            for place, masks in ((None, (kept, old)), (step, (kept_after, old_after)))
        ]
        _sum_scaled(context, builder, *arrays, factor, vectors, None)

    ints = types.intp
    arguments = (out, ints, source, ints, _factor_type(source), ints, ints, ints, ints, ints)
    return types.void(*arguments), generate


@intrinsic
def at_least(typing: Any, values: Any, i: Any, threshold: Any) -> tuple[Any, Any]:
    """Mask of the lanes l with ``values[i + l] >= threshold``, of an array of uint16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, i, threshold = arguments
        vector = ir.VectorType(_I16, LANES)
        pointer = _pointer(context, builder, signature.args[0], values, i)
        loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=2)
        bound = _splat(builder, builder.trunc(threshold, _I16), vector)
        bits = builder.icmp_unsigned(">=", loaded, bound)
        return builder.zext(builder.bitcast(bits, _I16), ir.IntType(64))

    return types.intp(values, types.intp, types.intp), generate


@intrinsic
def bits_from(typing: Any, words: Any, position: Any) -> tuple[Any, Any]:
    """16 bits of an array of uint16 from bit `position` on; reads up to the end of the word after."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, position = arguments
        pointer = _pointer(context, builder, signature.args[0], words, ir.Constant(position.type, 0))
        byte = builder.lshr(position, ir.Constant(position.type, 3))
        pointer = builder.gep(builder.bitcast(pointer, _I8.as_pointer()), [byte])
        loaded = builder.load(builder.bitcast(pointer, _I32.as_pointer()), align=1)
        shift = builder.and_(builder.trunc(position, _I32), ir.Constant(_I32, 7))
        return builder.zext(builder.trunc(builder.lshr(loaded, shift), _I16), ir.IntType(64))

    return types.intp(words, types.intp), generate


@intrinsic
def prefetch(typing: Any, array: Any, i: Any) -> tuple[Any, Any]:
    """Ask for the cache line of ``array[i]``; any index is safe."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        pointer = builder.bitcast(_pointer(context, builder, signature.args[0], *arguments), _I8.as_pointer())
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32]),
            "llvm.prefetch.p0",
        )
        read, keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
        builder.call(function, [pointer, read, keep, data])

    return types.void(array, types.intp), generate


@intrinsic
def num_read(typing: Any, count: Any) -> tuple[Any, Any]:
    """How many values vectors over a run of `count`, the last of which ends with it, wait for.

    Under the mask of a shorter run, they wait for values outside it, too.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (count,) = arguments
        if not _has_masked_access(context):
            return count
        least = ir.Constant(count.type, LANES)
        return builder.select(builder.icmp_signed("<", count, least), least, count)

    return types.intp(types.intp), generate


@intrinsic
def has_gather(typing: Any) -> tuple[Any, Any]:
    """Whether a vector of values is gathered by one instruction, as with AVX-512, not better one by one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), _has_masked_access(context))

    return types.boolean(), generate
