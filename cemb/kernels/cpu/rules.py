"""What optimizers do with a gradient, on the lanes of `cemb.kernels.cpu.simd`: weights and states are loaded
once, stepped in vector registers, and stored once.
"""

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cemb.kernels.cpu import simd

# A type for each rule, so that kernels are compiled for one: with all in a loop, registers would spill.


class SGD(NamedTuple):
    """``weight -= rate · g``, where g is the gradient."""

    rate: float


class Adagrad(NamedTuple):
    """``sum += g²; weight -= rate · g / (√sum + eps)``."""

    rate: float
    eps: float


class Adam(NamedTuple):
    """``mean`` and ``square`` move by ``1 − beta`` of the way to g and g².

    Then ``weight -= rate · mean / (√square + eps)``.
    """

    rate: float
    eps: float
    beta1: float
    beta2: float


class RowwiseAdagrad(NamedTuple):
    """As `Adagrad`, but that ``sum`` grows by the mean of g² over a row, see `cemb.kernels.cpu.rowwise`."""

    rate: float
    eps: float


Rule = SGD | Adagrad | Adam | RowwiseAdagrad

_NUM_STATES = {SGD: 0, Adagrad: 1, Adam: 2}  # of those that step each value by itself


@intrinsic
def num_states(typing, rule):
    """How many states a rule has for each weight; known when a kernel is compiled."""

    def generate(context, builder, signature, arguments):
        return context.get_constant(types.intp, _NUM_STATES[rule.instance_class])

    return types.intp(rule), generate


def _stepped(builder, rule_type, rule, gradient, weight, states):
    """The weight and the states after a step, as code; all but the rule are vectors of `LANES`."""
    add, subtract, multiply = builder.fadd, builder.fsub, builder.fmul

    def towards(state, value, beta):
        one = ir.Constant(weight.type, [1.0] * simd.LANES)
        return add(state, multiply(subtract(one, beta), subtract(value, state)))

    kind = rule_type.instance_class
    constants = [
        simd.splat(builder, builder.extract_value(rule, n), weight.type) for n in range(len(kind._fields))
    ]
    if kind is SGD:
        (rate,) = constants
        return [subtract(weight, multiply(rate, gradient))]
    square = multiply(gradient, gradient)
    if kind is Adagrad:
        rate, eps = constants
        states, direction = [add(states[0], square)], gradient
    else:
        rate, eps, beta1, beta2 = constants
        states = [towards(states[0], gradient, beta1), towards(states[1], square, beta2)]
        direction = states[0]
    root = simd.sqrt(builder, states[-1])
    return [subtract(weight, multiply(rate, builder.fdiv(direction, add(root, eps)))), *states]


def _stepped_arrays(rule_type, types, arrays):
    """Numba type and generated value of each array that a rule steps, of the weights and two states."""
    return list(zip(types, arrays, strict=True))[: 1 + _NUM_STATES[rule_type.instance_class]]


@intrinsic
def update(typing, rule, weight, first_state, second_state, i, gradient, j, mask):
    """Step ``i + l`` of weights and states ``[n]`` by ``gradient[j + l]``, for the lanes l of `mask`."""

    def generate(context, builder, signature, arguments):
        rule_type, *array_types, _, gradient_type, _, _ = signature.args
        rule, *arrays, i, gradient, j, mask = arguments
        stepped = _stepped_arrays(rule_type, array_types, arrays)

        def on(bits):
            g = simd.load(context, builder, gradient_type, gradient, j, bits)
            before = [simd.load(context, builder, *array, i, bits) for array in stepped]
            after = _stepped(builder, rule_type, rule, g, before[0], before[1:])
            for array, value in zip(stepped, after, strict=True):
                simd.store(context, builder, *array, i, bits, value)

        simd.on_lanes(context, builder, mask, on)

    ints = types.intp
    return types.void(rule, weight, first_state, second_state, ints, gradient, ints, ints), generate


def _exchange(context, builder, signature, arguments, vectors, bits):
    """Code of `exchange` for `vectors`, each an offset from `i` and `j` (None for 0) and its selected lanes.

    `signature` and `arguments` are those of `exchange` up to `j_term`.
    """
    rule_type, *array_types, _, _, _, terms_type, _, _ = signature
    rule, *arrays, i, j, factor, terms, i_term, j_term = arguments
    stepped = _stepped_arrays(rule_type, array_types, arrays)
    sides = [[simd.offset_by(builder, side, step) for step, _ in vectors] for side in (i, j)]
    weights = [[simd.load(context, builder, *stepped[0], at, bits) for at in side] for side in sides]

    def gradient(other, selected):
        product = builder.fmul(simd.splat(builder, factor, other.type), other)
        return builder.select(selected, product, ir.Constant(other.type, [0.0] * simd.LANES))

    for side, term in enumerate((i_term, j_term)):
        others = weights[1 - side]
        gradients = [gradient(other, selected) for other, (_, selected) in zip(others, vectors, strict=True)]
        is_free = builder.icmp_signed("<", term, ir.Constant(term.type, 0))
        with builder.if_else(is_free, likely=True) as (free, conflicting):
            with free:
                after = []
                for at, own, g in zip(sides[side], weights[side], gradients, strict=True):
                    states = [simd.load(context, builder, *array, at, bits) for array in stepped[1:]]
                    after.append((at, _stepped(builder, rule_type, rule, g, own, states)))
                for at, values in after:
                    for array, value in zip(stepped, values, strict=True):
                        simd.store(context, builder, *array, at, bits, value)
            with conflicting:
                for (step, _), g in zip(vectors, gradients, strict=True):
                    at = simd.offset_by(builder, term, step)
                    simd.store(context, builder, terms_type, terms, at, bits, g)


@intrinsic
def exchange(
    typing, rule, weight, first_state, second_state, i, j, factor, terms, i_term, j_term, selected, mask
):
    """Step two segments, each with the other's weights times a factor as its gradient.

    For the lanes l of `mask`, ``i + l`` are stepped by ``factor * weight[j + l] if l in selected else 0``,
    and ``j + l`` by the weights at i. A side whose place in `terms` is not negative conflicts: its gradient
    is stored there instead. Segments that are stepped must not overlap.
    """

    def generate(context, builder, signature, arguments):
        *places, selected, mask = arguments
        vectors = [(None, simd.select_bits(context, builder, selected))]
        simd.on_lanes(
            context,
            builder,
            mask,
            lambda bits: _exchange(context, builder, signature.args[:-2], places, vectors, bits),
        )

    ints, sides = types.intp, _exchange_types(rule, weight, first_state, second_state, terms)
    return types.void(*sides, ints, ints), generate


@intrinsic
def exchange_two(
    typing, rule, weight, first_state, second_state, i, j, factor, terms, i_term, j_term, selected, step,
    next_selected,
):  # fmt: skip
    """`exchange` for all lanes, of two vectors, the second `step` behind; shared lanes are stepped once."""

    def generate(context, builder, signature, arguments):
        *places, selected, step, next_selected = arguments
        selected, next_selected = (
            simd.select_bits(context, builder, mask) for mask in (selected, next_selected)
        )
        vectors = [(None, selected), (step, next_selected)]
        _exchange(context, builder, signature.args[:-3], places, vectors, None)

    ints, sides = types.intp, _exchange_types(rule, weight, first_state, second_state, terms)
    return types.void(*sides, ints, ints, ints), generate


def _exchange_types(rule, weight, first_state, second_state, terms):
    """Types of the arguments of `exchange` up to `j_term`."""
    ints, number = types.intp, simd.factor_type(weight)
    return rule, weight, first_state, second_state, ints, ints, number, terms, ints, ints
