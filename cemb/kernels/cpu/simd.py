"""Vector operations on 16 lanes under a bit mask, for Numba kernels.

A block of a hashed row is a short segment of values at any position. LLVM turns a loop over one into scalar
code, since its length is unknown and arrays might overlap; these intrinsics state the vectors themselves.
Bit l of a mask stands for lane l: lanes outside a mask are neither read nor written, so a segment may end
anywhere. A `mask` has the first few lanes set; `selected`, the lanes whose product counts, and `accumulated`,
those that add to what `out` holds, may have any of them. Arrays are one-dimensional: float32, float64, or
uint16 for the bits of bfloat16 (read only).

A segment of 16 values or more needs no mask: its last vector ends where it ends, and overlaps the one before.
Where that adds to what it finds, the two go together, in operations whose name ends in ``_two``: they load
both vectors before they store either, and so store the lanes they share twice, with the same values.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from cemb import hashing

LANES = 16
ALL_LANES = (1 << LANES) - 1
# Sums may be reassociated, so that they use vector registers.
FASTMATH = {"reassoc", "nsz", "contract"}

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_BITS = ir.VectorType(ir.IntType(1), LANES)
_SUFFIX = {"i16": "i16", "float": "f32", "double": "f64"}


def _pointer(context, builder, array_type, array, index):
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _bits(builder, mask):
    """The lanes of an integer mask."""
    return builder.bitcast(builder.trunc(mask, _I16), _BITS)


def select_bits(context, builder, mask):
    """The lanes of an integer mask as a condition of selects; without AVX-512 in half the instructions."""
    if _has_masked_access(context):
        return _bits(builder, mask)
    words = ir.VectorType(_I32, LANES)
    each = ir.Constant(words, [1 << lane for lane in range(LANES)])
    lanes = builder.and_(splat(builder, builder.trunc(mask, _I32), words), each)
    return builder.icmp_signed("!=", lanes, ir.Constant(words, [0] * LANES))


def splat(builder, value, vector):
    """A vector of the type `vector`, all of whose lanes are `value`."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _has_masked_access(context):
    """Whether the processor has fast masked loads and stores of all types, which means AVX-512BW.

    AVX2 has none of 16 bits; its masked stores are slow: with them a Zen 3 scaled 25 values in 28 ns, without
    in 7; and its masked loads wait for cache lines of which all lanes are masked.
    """
    return "+avx512bw" in context.codegen().magic_tuple()[2]


def on_lanes(context, builder, mask, generate):
    """Generate code for the lanes of `mask`, and where that pays, a branch of its own for all lanes.

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


def _is_full(builder, mask):
    return builder.icmp_unsigned("==", mask, ir.Constant(mask.type, (1 << LANES) - 1))


def load(context, builder, array_type, array, index, bits, selected=None):
    """Lanes of ``array[index:]`` inside `bits` and `selected`; zero elsewhere.

    None stands for all lanes; bfloat16 becomes float32.
    """
    pointer = _pointer(context, builder, array_type, array, index)
    vector = ir.VectorType(pointer.type.pointee, LANES)
    align = array_type.dtype.bitwidth // 8
    zero = ir.Constant(vector, [0 if vector.element == _I16 else 0.0] * LANES)
    if bits is None:
        loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=align)
        if selected is not None:
            loaded = builder.select(selected, loaded, zero)
    elif _has_masked_access(context):
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [pointer.type, _I32, _BITS, vector]),
            f"llvm.masked.load.v{LANES}{_SUFFIX[str(vector.element)]}.p0",
        )
        bits = bits if selected is None else selected
        loaded = builder.call(function, [pointer, ir.Constant(_I32, align), bits, zero])
    else:
        loaded = _load_first(builder, pointer, vector, bits, align)
        if selected is not None:
            loaded = builder.select(selected, loaded, zero)
    if vector.element != _I16:
        return loaded
    words = ir.VectorType(_I32, LANES)
    shifted = builder.shl(builder.zext(loaded, words), ir.Constant(words, [16] * LANES))
    return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), LANES))


def _load_first(builder, pointer, vector, bits, align):
    """The first few lanes, those of `bits`, and zeros; cache lines of the others are not accessed."""
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


def _lanes_of(builder, a, b, lanes):
    """Lanes of two vectors by their numbers, those of `b` after those of `a`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _has_bit(builder, count, bit):
    return builder.icmp_unsigned("!=", builder.and_(count, ir.Constant(_I16, bit)), ir.Constant(_I16, 0))


def store(context, builder, array_type, array, index, bits, value):
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


def sqrt(builder, vector):
    """Square roots of the lanes."""
    name = f"llvm.sqrt.v{LANES}{_SUFFIX[str(vector.type.element)]}"
    kind = ir.FunctionType(vector.type, [vector.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [vector])


def _scaled(context, builder, source_type, source, index, factor, bits, selected=None):
    loaded = load(context, builder, source_type, source, index, bits, selected)
    return builder.fmul(loaded, splat(builder, factor, loaded.type))


def factor_type(array_type):
    return types.float64 if array_type.dtype == types.float64 else types.float32


@intrinsic
def _bfloat16_at(typing, array, i):
    def generate(context, builder, signature, arguments):
        value = builder.load(_pointer(context, builder, signature.args[0], *arguments))
        word = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
        return builder.bitcast(word, ir.FloatType())

    return types.float32(array, types.intp), generate


def value_at(array, i):
    """``array[i]``; bfloat16 becomes float32."""
    raise NotImplementedError("for use in kernels only")


# Not strict, since Numba would compare annotations too, and lambdas have none.
@overload(value_at, inline="always", strict=False)
def _value_at(array, i):
    if array.dtype == types.uint16:
        return lambda array, i: _bfloat16_at(array, i)
    return lambda array, i: array[i]


@intrinsic
def multiply(typing, out, i, a, j, b, k, factor, selected, mask):
    """``out[i + l] = factor * a[j + l] * b[k + l] if l in selected else 0`` for the lanes l of `mask`."""

    def generate(context, builder, signature, arguments):
        out_type, _, a_type, _, b_type, _, _, _, _ = signature.args
        out, i, a, j, b, k, factor, selected, mask = arguments
        selected = select_bits(context, builder, selected)

        def on(bits):
            left = _scaled(context, builder, a_type, a, j, factor, bits)
            right = load(context, builder, b_type, b, k, bits)
            product = builder.fmul(left, right)
            zero = ir.Constant(product.type, [0.0] * LANES)
            store(context, builder, out_type, out, i, bits, builder.select(selected, product, zero))

        on_lanes(context, builder, mask, on)

    ints = types.intp
    return types.void(out, ints, a, ints, b, ints, factor_type(a), ints, ints), generate


@intrinsic
def finish_hash(typing, out, i, first, steps, row, num_starts):
    """Write to ``out[i + l]``, for all lanes l, where a block starts, from a half-finished hash.

    ``first + steps[row, l]`` is the product by the hash's first multiplier, see `cemb.hashing`.
    """

    def generate(context, builder, signature, arguments):
        out_type, _, _, steps_type, _, _ = signature.args
        out, i, first, steps, row, num_starts = arguments
        words, starts = ir.VectorType(ir.IntType(64), LANES), ir.VectorType(_I32, LANES)

        def shifted(value, count):
            return builder.lshr(value, ir.Constant(words, [count] * LANES))

        pointer = _pointer(
            context, builder, steps_type, steps, builder.mul(row, ir.Constant(row.type, LANES))
        )
        step = builder.load(builder.bitcast(pointer, words.as_pointer()), align=8)
        product = builder.add(splat(builder, first, words), step)
        mixed = builder.xor(product, shifted(product, 27))
        product = builder.mul(mixed, ir.Constant(words, [hashing.MULTIPLIER_2] * LANES))
        # The upper half of ``product ^ (product >> 31)``.
        half = builder.xor(shifted(product, 32), shifted(product, 63))
        scaled = builder.mul(half, splat(builder, builder.zext(num_starts, words.element), words))
        pointer = _pointer(context, builder, out_type, out, i)
        start = builder.trunc(shifted(scaled, 32), starts)
        builder.store(start, builder.bitcast(pointer, starts.as_pointer()), align=4)

    ints, word = types.intp, types.uint64
    return types.void(out, ints, word, steps, ints, types.uint32), generate


@intrinsic
def scale(typing, out, i, source, j, factor, mask):
    """``out[i + l] = factor * source[j + l]`` for the lanes l of `mask`."""

    def generate(context, builder, signature, arguments):
        out_type, _, source_type, _, _, _ = signature.args
        out, i, source, j, factor, mask = arguments

        def on(bits):
            value = _scaled(context, builder, source_type, source, j, factor, bits)
            store(context, builder, out_type, out, i, bits, value)

        on_lanes(context, builder, mask, on)

    ints = types.intp
    return types.void(out, ints, source, ints, factor_type(source), ints), generate


def _sum_scaled(context, builder, out, i, source, j, factor, vectors, bits):
    """Code that adds vectors, each an offset from `i` and `j`, its selected and its accumulated lanes."""
    totals = []
    for step, selected, accumulated in vectors:
        value = _scaled(context, builder, *source, offset_by(builder, j, step), factor, bits, selected)
        before = load(context, builder, *out, offset_by(builder, i, step), bits, accumulated)
        totals.append(builder.fadd(before, value))
    for (step, _, _), total in zip(vectors, totals, strict=True):
        store(context, builder, *out, offset_by(builder, i, step), bits, total)


def offset_by(builder, index, step):
    return index if step is None else builder.add(index, step)


@intrinsic
def add_scaled(typing, out, i, source, j, factor, selected, mask):
    """``out[i + l] += factor * source[j + l] if l in selected else 0`` for the lanes l of `mask`."""

    def generate(context, builder, signature, arguments):
        out_type, _, source_type, _, _, _, _ = signature.args
        out, i, source, j, factor, selected, mask = arguments
        arrays = (out_type, out), i, (source_type, source), j
        vector = None, select_bits(context, builder, selected), None
        on_lanes(
            context,
            builder,
            mask,
            lambda bits: _sum_scaled(context, builder, *arrays, factor, [vector], bits),
        )

    ints = types.intp
    return types.void(out, ints, source, ints, factor_type(source), ints, ints), generate


@intrinsic
def add_scaled_two(typing, out, i, source, j, factor, selected, step, next_selected):
    """`add_scaled` for all lanes, of two vectors, the second `step` behind; shared lanes count once."""

    def generate(context, builder, signature, arguments):
        out_type, _, source_type, *_ = signature.args
        out, i, source, j, factor, selected, step, next_selected = arguments
        selected, next_selected = (select_bits(context, builder, mask) for mask in (selected, next_selected))
        arrays = (out_type, out), i, (source_type, source), j
        vectors = [(None, selected, None), (step, next_selected, None)]
        _sum_scaled(context, builder, *arrays, factor, vectors, None)

    ints = types.intp
    return types.void(out, ints, source, ints, factor_type(source), ints, ints, ints), generate


@intrinsic
def add_gathered(typing, out, i, source, columns, values, first, last):
    """``out[i + l] += Σ values[t] * source[16 * columns[t] + l]`` for all 16 lanes, t from `first` to `last`.

    Even and odd terms are summed apart, so that no addition waits for the one before it.
    """

    def generate(context, builder, signature, arguments):
        out_type, _, source_type, columns_type, values_type, _, _ = signature.args
        out, i, source, columns, values, first, last = arguments
        one, two = (ir.Constant(first.type, step) for step in (1, 2))
        before = load(context, builder, out_type, out, i, None)
        sums = [cgutils.alloca_once(builder, before.type) for _ in range(2)]
        builder.store(before, sums[0])
        builder.store(ir.Constant(before.type, [0.0] * LANES), sums[1])

        def add(t, total):
            column = builder.zext(builder.load(_pointer(context, builder, columns_type, columns, t)), t.type)
            value = builder.load(_pointer(context, builder, values_type, values, t))
            place = builder.mul(column, ir.Constant(t.type, LANES))
            row = load(context, builder, source_type, source, place, None)
            # Rounded once, where the processor can.
            fused = ("contract",)
            term = builder.fmul(splat(builder, value, row.type), row, flags=fused)
            builder.store(builder.fadd(builder.load(total), term, flags=fused), total)

        pairs_end = builder.sub(last, builder.and_(builder.sub(last, first), one))
        with cgutils.for_range_slice(builder, first, pairs_end, two, inc=True) as (t, _):
            add(t, sums[0])
            add(builder.add(t, one), sums[1])
        with builder.if_then(builder.icmp_signed("<", pairs_end, last)):
            add(pairs_end, sums[0])
        total = builder.fadd(builder.load(sums[0]), builder.load(sums[1]))
        store(context, builder, out_type, out, i, None, total)

    ints = types.intp
    return types.void(out, ints, source, columns, values, ints, ints), generate


@intrinsic
def append_scaled(typing, out, i, source, j, factor, selected, accumulated, mask):
    """For l in `mask`, ``out[i + l]`` if l is accumulated, plus ``factor * source[j + l]`` if selected."""

    def generate(context, builder, signature, arguments):
        out_type, _, source_type, _, _, _, _, _ = signature.args
        out, i, source, j, factor, selected, accumulated, mask = arguments
        arrays = (out_type, out), i, (source_type, source), j
        vector = None, *(select_bits(context, builder, lanes) for lanes in (selected, accumulated))
        on_lanes(
            context,
            builder,
            mask,
            lambda bits: _sum_scaled(context, builder, *arrays, factor, [vector], bits),
        )

    ints = types.intp
    return types.void(out, ints, source, ints, factor_type(source), ints, ints, ints), generate


@intrinsic
def append_scaled_two(
    typing, out, i, source, j, factor, selected, accumulated, step, next_selected, next_accumulated
):
    """`append_scaled` for all lanes, of two vectors, the second `step` behind; shared lanes count once."""

    def generate(context, builder, signature, arguments):
        out_type, _, source_type, *_ = signature.args
        out, i, source, j, factor, selected, accumulated, step, next_selected, next_accumulated = arguments
        arrays = (out_type, out), i, (source_type, source), j
        vectors = [
            (place, *(select_bits(context, builder, lanes) for lanes in masks))
            for place, masks in ((None, (selected, accumulated)), (step, (next_selected, next_accumulated)))
        ]
        _sum_scaled(context, builder, *arrays, factor, vectors, None)

    ints = types.intp
    arguments = (out, ints, source, ints, factor_type(source), ints, ints, ints, ints, ints)
    return types.void(*arguments), generate


@intrinsic
def at_least(typing, values, i, threshold):
    """Mask of the lanes l with ``values[i + l] >= threshold``, of an array of uint16."""

    def generate(context, builder, signature, arguments):
        values, i, threshold = arguments
        vector = ir.VectorType(_I16, LANES)
        pointer = _pointer(context, builder, signature.args[0], values, i)
        loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=2)
        bound = splat(builder, builder.trunc(threshold, _I16), vector)
        bits = builder.icmp_unsigned(">=", loaded, bound)
        return builder.zext(builder.bitcast(bits, _I16), ir.IntType(64))

    return types.intp(values, types.intp, types.intp), generate


@intrinsic
def bits_from(typing, words, position):
    """16 bits of an array of uint16 from bit `position` on; reads up to the end of the word after."""

    def generate(context, builder, signature, arguments):
        words, position = arguments
        pointer = _pointer(context, builder, signature.args[0], words, ir.Constant(position.type, 0))
        byte = builder.lshr(position, ir.Constant(position.type, 3))
        pointer = builder.gep(builder.bitcast(pointer, _I8.as_pointer()), [byte])
        loaded = builder.load(builder.bitcast(pointer, _I32.as_pointer()), align=1)
        shift = builder.and_(builder.trunc(position, _I32), ir.Constant(_I32, 7))
        return builder.zext(builder.trunc(builder.lshr(loaded, shift), _I16), ir.IntType(64))

    return types.intp(words, types.intp), generate


@intrinsic
def prefetch(typing, array, i):
    """Prefetch the cache line of ``array[i]``; any index is safe."""

    def generate(context, builder, signature, arguments):
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
def num_read(typing, count):
    """Values that vectors over a segment of `count` access, whose last vector ends with it.

    Masked vectors of a shorter segment wait for the cache lines of lanes outside the mask, too.
    """

    def generate(context, builder, signature, arguments):
        (count,) = arguments
        if not _has_masked_access(context):
            return count
        least = ir.Constant(count.type, LANES)
        return builder.select(builder.icmp_signed("<", count, least), least, count)

    return types.intp(types.intp), generate


@intrinsic
def has_gather(typing):
    """Whether gathering by one instruction is faster than one by one, as with AVX-512."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(1), _has_masked_access(context))

    return types.boolean(), generate


@njit(inline="always")
def first_lanes(count):
    """Mask of the first `count` lanes; of none below 0, of all above `LANES`."""
    return (np.int64(1) << min(max(count, 0), LANES)) - np.int64(1)


@njit(inline="always")
def head_length(length):
    """Values of a segment to take by one vector, 0 or `LANES`, so that an even number of vectors is left.

    These are taken two at a time, by the operations whose name ends in ``_two``.
    """
    return (length + LANES - 1) // LANES % 2 * LANES


@njit(inline="always")
def prefetch_segment(array, start, length):
    """Prefetch all cache lines that vectors of float32 over a segment touch."""
    prefetch(array, start)
    prefetch(array, start + num_read(length) - 1)
    # Most blocks are too short for the loop, and a loop's overhead is more than this.
    prefetch(array, start + min(LANES, length - 1))
    for k in range(2 * LANES, length, LANES):
        prefetch(array, start + k)


@njit(inline="always")
def prefetch_pair(array, word, context):
    """Prefetch the cache lines of two values."""
    prefetch(array, word)
    prefetch(array, context)


@njit(inline="always")
def prefetch_ends(array, word, context, length):
    """Prefetch the first and the last cache line that vectors over two segments touch."""
    last = num_read(length) - 1
    prefetch_pair(array, word, context)
    prefetch_pair(array, word + last, context + last)
