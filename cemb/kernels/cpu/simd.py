"""Vector operations on segments of arrays, for Numba kernels.

A block of a hashed row is a short segment of values at any position. LLVM turns a loop over one into scalar
code, since its length is unknown and arrays might overlap; these intrinsics state the vectors themselves, of
16 lanes. No value outside a segment is read or written. Arrays are one-dimensional: float32, float64, or
uint16 for the bits of bfloat16 (read only). Factors have the arrays' dtype, float32 beside bfloat16.

A segment of 16 values or more needs no masks: its last vector ends where it ends, and overlaps the one
before. Where an operation changes what it reads, the two go together: both are loaded before either is
stored, so lanes that they share are stored twice, with the same values.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from cemb import hashing
from cemb.kernels.cpu.threads import jit

LANES = 16

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_BITS = ir.VectorType(ir.IntType(1), LANES)
SIDES = types.UniTuple(types.intp, 4)
_SUFFIX = {"i16": "i16", "float": "f32", "double": "f64"}


class Vector:
    """Code of `LANES` lanes of float32 or float64; formulas combine vectors, and numbers that are scalars."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value):
        self._builder, self.value = builder, value

    def _other(self, other: Any) -> ir.Value:
        if isinstance(other, Vector):
            return other.value
        kind = self.value.type
        return ir.Constant(kind, [float(other)] * LANES)

    def __add__(self, other: Any) -> "Vector":
        return Vector(self._builder, self._builder.fadd(self.value, self._other(other)))

    def __sub__(self, other: Any) -> "Vector":
        return Vector(self._builder, self._builder.fsub(self.value, self._other(other)))

    def __rsub__(self, other: Any) -> "Vector":
        return Vector(self._builder, self._builder.fsub(self._other(other), self.value))

    def __mul__(self, other: Any) -> "Vector":
        return Vector(self._builder, self._builder.fmul(self.value, self._other(other)))

    def __truediv__(self, other: Any) -> "Vector":
        return Vector(self._builder, self._builder.fdiv(self.value, self._other(other)))

    def sqrt(self) -> "Vector":
        """Square roots of the lanes."""
        kind = self.value.type
        name = f"llvm.sqrt.v{LANES}{_SUFFIX[str(kind.element)]}"
        function = cgutils.get_or_insert_function(self._builder.module, ir.FunctionType(kind, [kind]), name)
        return Vector(self._builder, self._builder.call(function, [self.value]))


class Segments:
    """Code that loads from and stores to arrays, at places that are counted from where segments start."""

    def __init__(self, context: Any, builder: ir.IRBuilder):
        self.context, self.builder = context, builder

    def pointer(self, array_type: Any, array: ir.Value, index: ir.Value) -> ir.Value:
        """Of ``array[index]``."""
        return self.builder.gep(
            self.context.make_array(array_type)(self.context, self.builder, array).data, [index]
        )

    def splat(self, value: ir.Value) -> Vector:
        """A vector, all of whose lanes are `value`."""
        return Vector(self.builder, _splat(self.builder, value))

    def bits(self, mask_type: Any, mask: ir.Value, x: ir.Value) -> ir.Value | None:
        """Lanes that a mask has from its position plus `x` on; all, None, if there is no mask.

        Reads the two words behind the position's, too.
        """
        if isinstance(mask_type, types.NoneType):
            return None
        builder = self.builder
        words, first = (builder.extract_value(mask, n) for n in range(2))
        position, zero = builder.add(first, x), ir.Constant(x.type, 0)
        pointer = builder.bitcast(self.pointer(mask_type[0], words, zero), _I8.as_pointer())
        byte = builder.gep(pointer, [builder.lshr(position, ir.Constant(position.type, 3))])
        loaded = builder.load(builder.bitcast(byte, _I32.as_pointer()), align=1)
        shift = builder.and_(builder.trunc(position, _I32), ir.Constant(_I32, 7))
        return self.lanes(builder.lshr(loaded, shift))

    def lanes(self, mask: ir.Value) -> ir.Value:
        """The lanes of an integer mask as a condition of `where`; in few instructions without AVX-512."""
        if _has_masked_access(self.context):
            return self.builder.bitcast(self.builder.trunc(mask, _I16), _BITS)
        words = ir.VectorType(_I32, LANES)
        each = ir.Constant(words, [1 << lane for lane in range(LANES)])
        mask = mask if mask.type == _I32 else self.builder.trunc(mask, _I32)
        set_lanes = self.builder.and_(_splat(self.builder, mask), each)
        return self.builder.icmp_signed("!=", set_lanes, ir.Constant(words, [0] * LANES))

    def where(self, condition: ir.Value | None, vector: Vector) -> Vector:
        """The vector, with zeros where the condition does not hold."""
        if condition is None:
            return vector
        zero = ir.Constant(vector.value.type, [0.0] * LANES)
        return Vector(self.builder, self.builder.select(condition, vector.value, zero))

    def load(self, array_type: Any, array: ir.Value, index: ir.Value, inside: ir.Value | None) -> Vector:
        """Lanes of ``array[index:]`` that are `inside` the segment; zero elsewhere. bfloat16 becomes float32.

        None stands for all lanes.
        """
        builder, pointer = self.builder, self.pointer(array_type, array, index)
        vector = ir.VectorType(pointer.type.pointee, LANES)
        align = array_type.dtype.bitwidth // 8
        zero = ir.Constant(vector, [0 if vector.element == _I16 else 0.0] * LANES)
        if inside is None:
            loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=align)
        elif _has_masked_access(self.context):
            function = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(vector, [pointer.type, _I32, _BITS, vector]),
                f"llvm.masked.load.v{LANES}{_SUFFIX[str(vector.element)]}.p0",
            )
            loaded = builder.call(function, [pointer, ir.Constant(_I32, align), inside, zero])
        else:
            loaded = _load_first(builder, pointer, zero, inside, align)
        if vector.element != _I16:
            return Vector(builder, loaded)
        words = ir.VectorType(_I32, LANES)
        shifted = builder.shl(builder.zext(loaded, words), ir.Constant(words, [16] * LANES))
        return Vector(builder, builder.bitcast(shifted, ir.VectorType(ir.FloatType(), LANES)))

    def store(
        self, array_type: Any, array: ir.Value, index: ir.Value, inside: ir.Value | None, vector: Vector
    ) -> None:
        """Write the lanes that are `inside`."""
        builder, value, pointer = self.builder, vector.value, self.pointer(array_type, array, index)
        align = array_type.dtype.bitwidth // 8
        if inside is None:
            builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)
        elif _has_masked_access(self.context):
            function = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(ir.VoidType(), [value.type, pointer.type, _I32, _BITS]),
                f"llvm.masked.store.v{LANES}{_SUFFIX[str(value.type.element)]}.p0",
            )
            builder.call(function, [value, pointer, ir.Constant(_I32, align), inside])
        else:
            _store_first(builder, pointer, value, inside, align)

    def prefetch(self, array_type: Any, array: ir.Value, index: ir.Value) -> None:
        """Prefetch the cache line of ``array[index]``; any index is safe."""
        pointer = self.builder.bitcast(self.pointer(array_type, array, index), _I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
        self.builder.call(function, [pointer, read, keep, data])

    def sides(self, sides: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        """Of the integers that stand for two segments: where they start, and where to prefetch others."""
        starts = [self.builder.extract_value(sides, n) for n in range(4)]
        return starts[:2], starts[2:]

    def prefetch_sides(
        self, arrays: Sequence[tuple[Any, ir.Value]], sides: Sequence[ir.Value], offsets: Sequence[ir.Value]
    ) -> None:
        """Prefetch from all arrays what lies at some offsets behind `sides`."""
        for (kind, array), side, x in itertools.product(arrays, sides, offsets):
            self.prefetch(kind, array, self.builder.add(side, x))

    def last_read(self, length: ir.Value) -> ir.Value:
        """The last value of a segment that vectors access: masked ones wait for all their lanes."""
        least = ir.Constant(length.type, LANES)
        if _has_masked_access(self.context):
            length = self.builder.select(self.builder.icmp_signed("<", length, least), least, length)
        return self.builder.sub(length, ir.Constant(length.type, 1))

    def each(self, length: ir.Value, generate: Callable[[Sequence[ir.Value], ir.Value | None], None]) -> None:
        """Generate code for all vectors of segments of this length, which is not 0.

        `generate` is given where in the segments vectors start, and the lanes that are inside, None for all.
        The last two vectors come together, and are the same ones where 16 values are left.
        """
        builder, kind = self.builder, length.type
        zero, one, width = (ir.Constant(kind, value) for value in (0, 1, LANES))
        with builder.if_else(builder.icmp_signed("<", length, width)) as (short, long):
            with short:
                first = builder.sub(builder.shl(one, length), one)
                generate([zero], builder.bitcast(builder.trunc(first, _I16), _BITS))
            with long:
                # Of two vectors no loop is made: LLVM would prepare for many turns.
                last = builder.sub(length, width)
                before = builder.and_(builder.sub(last, one), ir.Constant(kind, -LANES))
                before = builder.select(builder.icmp_signed("<", before, zero), zero, before)
                with cgutils.for_range_slice(builder, zero, before, width, inc=True) as (start, _):
                    generate([start], None)
                generate([before, last], None)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    vector = ir.VectorType(value.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _has_masked_access(context: Any) -> bool:
    """Whether the processor has fast masked loads and stores of all types, which means AVX-512BW.

    AVX2 has none of 16 bits; its masked stores are slow: with them a Zen 3 scaled 25 values in 28 ns, without
    in 7; and its masked loads wait for cache lines of which all lanes are masked.
    """
    return "+avx512bw" in context.codegen().magic_tuple()[2]


def _load_first(
    builder: ir.IRBuilder, pointer: ir.Value, zero: ir.Constant, inside: ir.Value, align: int
) -> ir.Value:
    """The first few lanes, those `inside`, and zeros; cache lines of the others are not accessed."""
    count = builder.ctpop(builder.bitcast(inside, _I16))
    loaded, vector, width = zero, zero.type, 1
    while width <= LANES:
        # Where the count has this bit, the next `width` lanes are read, and stand before those read already.
        before = builder.block
        with builder.if_then(_has_bit(builder, count, width)):
            first = builder.and_(count, ir.Constant(_I16, 2 * LANES - 2 * width))
            place = builder.gep(pointer, [builder.zext(first, _I32)])
            part_type = ir.VectorType(vector.element, width)
            part = builder.load(builder.bitcast(place, part_type.as_pointer()), align=align)
            wide = _shuffle(builder, part, part, [lane % width for lane in range(LANES)])
            joined = _shuffle(builder, wide, loaded, [*range(width), *range(LANES, 2 * LANES - width)])
            block = builder.block
        either = builder.phi(vector)
        either.add_incoming(loaded, before)
        either.add_incoming(joined, block)
        loaded, width = either, 2 * width
    return loaded


def _store_first(
    builder: ir.IRBuilder, pointer: ir.Value, value: ir.Value, inside: ir.Value, align: int
) -> None:
    """Write the first few lanes, those `inside`."""
    count = builder.ctpop(builder.bitcast(inside, _I16))
    with builder.if_then(_has_bit(builder, count, LANES)):
        builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)
    width = LANES // 2
    while width:
        # Where the count has this bit, the next `width` lanes are written; what follows moves down.
        is_next = _has_bit(builder, count, width)
        low, high = (_shuffle(builder, value, value, range(first, first + width)) for first in (0, width))
        with builder.if_then(is_next):
            builder.store(low, builder.bitcast(pointer, low.type.as_pointer()), align=align)
        step = builder.select(is_next, ir.Constant(_I32, width), ir.Constant(_I32, 0))
        pointer, value = builder.gep(pointer, [step]), builder.select(is_next, high, low)
        width //= 2


def _shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: Sequence[int]) -> ir.Value:
    """Lanes of two vectors by their numbers, those of `b` after those of `a`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


def _has_bit(builder: ir.IRBuilder, count: ir.Value, bit: int) -> ir.Value:
    return builder.icmp_unsigned("!=", builder.and_(count, ir.Constant(_I16, bit)), ir.Constant(_I16, 0))


def factor_type(array_type: Any) -> Any:
    """The type that arithmetic on an array is in."""
    return types.float64 if array_type.dtype == types.float64 else types.float32


@intrinsic
def multiply(typing, out, i, weight, sides, factor, mask, length):
    """``out[i + x] = factor * weight[sides[0] + x] * weight[sides[1] + x]`` for x < `length`, under a mask.

    The mask is an array of uint16 and a position: where bit ``position + x`` is not set, 0 is written.
    Segments from ``sides[2]`` and ``sides[3]`` on are prefetched.
    """

    def generate(context, builder, signature, arguments):
        out_type, _, weight_type, _, _, mask_type, _ = signature.args
        out, i, weight, sides, factor, mask, length = arguments
        code, array = Segments(context, builder), (weight_type, weight)
        scale = code.splat(factor)
        here, ahead = code.sides(sides)
        code.prefetch_sides([array], ahead, [code.last_read(length)])

        def vectors(starts, inside):
            code.prefetch_sides([array], ahead, starts)
            for x in starts:
                left, right = (code.load(*array, builder.add(side, x), inside) for side in here)
                product = code.where(code.bits(mask_type, mask, x), scale * left * right)
                code.store(out_type, out, builder.add(i, x), inside, product)

        code.each(length, vectors)

    ints = types.intp
    return types.void(out, ints, weight, SIDES, factor_type(weight), mask, ints), generate


@intrinsic
def copy_scaled(typing, out, i, source, j, factor, mask, length):
    """``out[i + x] = factor * source[j + x]`` for x < `length`, under a mask as in `multiply`, or None."""

    def generate(context, builder, signature, arguments):
        out_type, _, source_type, _, _, mask_type, _ = signature.args
        out, i, source, j, factor, mask, length = arguments
        code = Segments(context, builder)
        scale = code.splat(factor)

        def vectors(starts, inside):
            for x in starts:
                value = scale * code.load(source_type, source, builder.add(j, x), inside)
                selected = code.where(code.bits(mask_type, mask, x), value)
                code.store(out_type, out, builder.add(i, x), inside, selected)

        code.each(length, vectors)

    ints = types.intp
    return types.void(out, ints, source, ints, factor_type(source), mask, ints), generate


@intrinsic
def add_scaled(typing, out, i, source, j, factor, length, old):
    """``out[i + x] += factor * source[j + x]`` for x < `length`; what was there counts for x < `old` only.

    An `old` of None is the whole length.
    """

    def generate(context, builder, signature, arguments):
        out_type, _, source_type, _, _, _, old_type = signature.args
        out, i, source, j, factor, length, old = arguments
        code = Segments(context, builder)
        scale = code.splat(factor)
        lanes = ir.Constant(ir.VectorType(length.type, LANES), list(range(LANES)))

        def vectors(starts, inside):
            sums, is_old = [], None
            for x in starts:
                if not isinstance(old_type, types.NoneType):
                    is_old = builder.icmp_signed("<", lanes, _splat(builder, builder.sub(old, x)))
                before = code.where(is_old, code.load(out_type, out, builder.add(i, x), inside))
                sums.append(before + scale * code.load(source_type, source, builder.add(j, x), inside))
            for x, total in zip(starts, sums, strict=True):
                code.store(out_type, out, builder.add(i, x), inside, total)

        code.each(length, vectors)

    ints = types.intp
    return types.void(out, ints, source, ints, factor_type(source), ints, old), generate


@intrinsic
def add_gathered(typing, out, i, source, columns, values, first, last):
    """``out[i + l] += Σ values[t] * source[16 * columns[t] + l]`` for all 16 lanes, t from `first` to `last`.

    Even and odd terms are summed apart, so that no addition waits for the one before it.
    """

    def generate(context, builder, signature, arguments):
        out_type, _, source_type, columns_type, values_type, _, _ = signature.args
        out, i, source, columns, values, first, last = arguments
        code = Segments(context, builder)
        one, two = (ir.Constant(first.type, step) for step in (1, 2))
        before = code.load(out_type, out, i, None).value
        sums = [cgutils.alloca_once(builder, before.type) for _ in range(2)]
        builder.store(before, sums[0])
        builder.store(ir.Constant(before.type, [0.0] * LANES), sums[1])

        def add(t, total):
            column = builder.zext(builder.load(code.pointer(columns_type, columns, t)), t.type)
            value = builder.load(code.pointer(values_type, values, t))
            row = code.load(source_type, source, builder.mul(column, ir.Constant(t.type, LANES)), None).value
            # Rounded once, where the processor can.
            fused = ("contract",)
            term = builder.fmul(_splat(builder, value), row, flags=fused)
            builder.store(builder.fadd(builder.load(total), term, flags=fused), total)

        pairs_end = builder.sub(last, builder.and_(builder.sub(last, first), one))
        with cgutils.for_range_slice(builder, first, pairs_end, two, inc=True) as (t, _):
            add(t, sums[0])
            add(builder.add(t, one), sums[1])
        with builder.if_then(builder.icmp_signed("<", pairs_end, last)):
            add(pairs_end, sums[0])
        total = builder.fadd(builder.load(sums[0]), builder.load(sums[1]))
        code.store(out_type, out, i, None, Vector(builder, total))

    ints = types.intp
    return types.void(out, ints, source, columns, values, ints, ints), generate


@intrinsic
def finish_hash(typing, out, i, first, steps, row, num_starts):
    """Write to ``out[i + l]``, for all lanes l, where a block starts, from a half-finished hash.

    ``first + steps[row, l]`` is the product by the hash's first multiplier, see `cemb.hashing`.
    """

    def generate(context, builder, signature, arguments):
        out_type, _, _, steps_type, _, _ = signature.args
        out, i, first, steps, row, num_starts = arguments
        code = Segments(context, builder)
        words, starts = ir.VectorType(ir.IntType(64), LANES), ir.VectorType(_I32, LANES)

        def shifted(value, count):
            return builder.lshr(value, ir.Constant(words, [count] * LANES))

        pointer = code.pointer(steps_type, steps, builder.mul(row, ir.Constant(row.type, LANES)))
        step = builder.load(builder.bitcast(pointer, words.as_pointer()), align=8)
        product = builder.add(_splat(builder, first), step)
        mixed = builder.xor(product, shifted(product, 27))
        product = builder.mul(mixed, ir.Constant(words, [hashing.MULTIPLIER_2] * LANES))
        # The upper half of ``product ^ (product >> 31)``.
        half = builder.xor(shifted(product, 32), shifted(product, 63))
        scaled = builder.mul(half, _splat(builder, builder.zext(num_starts, words.element)))
        start = builder.trunc(shifted(scaled, 32), starts)
        pointer = code.pointer(out_type, out, i)
        builder.store(start, builder.bitcast(pointer, starts.as_pointer()), align=4)

    ints, word = types.intp, types.uint64
    return types.void(out, ints, word, steps, ints, types.uint32), generate


@intrinsic
def at_least(typing, values, i, threshold):
    """Mask of the lanes l with ``values[i + l] >= threshold``, of an array of uint16."""

    def generate(context, builder, signature, arguments):
        values, i, threshold = arguments
        vector = ir.VectorType(_I16, LANES)
        pointer = Segments(context, builder).pointer(signature.args[0], values, i)
        loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=2)
        bits = builder.icmp_unsigned(">=", loaded, _splat(builder, builder.trunc(threshold, _I16)))
        return builder.zext(builder.bitcast(bits, _I16), ir.IntType(64))

    return types.intp(values, types.intp, types.intp), generate


@intrinsic
def prefetch(typing, array, i):
    """Prefetch the cache line of ``array[i]``; any index is safe."""

    def generate(context, builder, signature, arguments):
        Segments(context, builder).prefetch(signature.args[0], *arguments)

    return types.void(array, types.intp), generate


@intrinsic
def _bfloat16_at(typing, array, i):
    def generate(context, builder, signature, arguments):
        value = builder.load(Segments(context, builder).pointer(signature.args[0], *arguments))
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


@jit()
def prefetch_segment(array, start, length):
    """Prefetch all cache lines of a segment of float32."""
    for k in range(0, length, LANES):
        prefetch(array, start + k)
    prefetch(array, start + length - 1)
