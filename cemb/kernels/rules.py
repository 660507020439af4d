"""What optimizers do with a gradient, on the lanes of `cemb.kernels.lanes`: weights and states are read once,
moved in vector registers, and written once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cemb.kernels import lanes

# A type for each rule, so that kernels are compiled for one: with all in a loop, registers would not suffice.


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
    """As `Adagrad`, but that ``sum`` grows by the mean of g² over a row, see `cemb.kernels.rowwise`."""

    rate: float
    eps: float


Rule = SGD | Adagrad | Adam | RowwiseAdagrad

_NUM_STATES = {SGD: 0, Adagrad: 1, Adam: 2}  # of those that move each value by itself


@intrinsic
def num_states(typing: Any, rule: Any) -> tuple[Any, Any]:
    """How many states a rule has for each weight; known when a kernel is compiled."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.intp, _NUM_STATES[rule.instance_class])

    return types.intp(rule), generate


def _moved(
    builder: Any, rule_type: Any, rule: Any, gradient: Any, weight: Any, states: Sequence[Any]
) -> list[Any]:
    """The weight and the states after a step; all but the rule are vectors."""
    add, subtract, multiply = builder.fadd, builder.fsub, builder.fmul

    def towards(state: Any, value: Any, beta: Any) -> Any:
        one = ir.Constant(weight.type, [1.0] * lanes.LANES)
        return add(state, multiply(subtract(one, beta), subtract(value, state)))

    kind = rule_type.instance_class
    constants = [
        lanes._splat(builder, builder.extract_value(rule, n), weight.type) for n in range(len(kind._fields))
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
    root = lanes._root(builder, states[-1])
    return [subtract(weight, multiply(rate, builder.fdiv(direction, add(root, eps)))), *states]


def _moved_arrays(rule_type: Any, types: Sequence[Any], arrays: Sequence[Any]) -> list[lanes._Array]:
    """Of the weights and two states, those that a rule moves, each after its type."""
    return list(zip(types, arrays, strict=True))[: 1 + _NUM_STATES[rule_type.instance_class]]


@intrinsic
def update(
    typing: Any,
    rule: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    i: Any,
    gradient: Any,
    j: Any,
    mask: Any,
) -> tuple[Any, Any]:
    """Step lanes ``i + l`` of weights and states with ``gradient[j + l]``, for the lanes l of `mask`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        rule_type, *array_types, _, gradient_type, _, _ = signature.args
        rule, *arrays, i, gradient, j, mask = arguments
        moved = _moved_arrays(rule_type, array_types, arrays)

        def on(bits: Any) -> None:
            g = lanes._load(context, builder, gradient_type, gradient, j, bits)
            before = [lanes._load(context, builder, *array, i, bits) for array in moved]
            after = _moved(builder, rule_type, rule, g, before[0], before[1:])
            for array, value in zip(moved, after, strict=True):
                lanes._store(context, builder, *array, i, bits, value)

        lanes._on_lanes(context, builder, mask, on)

    ints = types.intp
    return types.void(rule, weight, first_state, second_state, ints, gradient, ints, ints), generate


def _exchange(
    context: Any,
    builder: Any,
    signature: Any,
    arguments: Sequence[Any],
    vectors: Sequence[tuple[Any, Any]],
    bits: Any,
) -> None:
    """Code for vectors of `exchange`: each is a step to it from `i` and `j`, and what it keeps.

    Types and arguments are those up to `j_term`.
    """
    rule_type, *array_types, _, _, _, terms_type, _, _ = signature
    rule, *arrays, i, j, factor, terms, i_term, j_term = arguments
    moved = _moved_arrays(rule_type, array_types, arrays)
    sides = [[lanes._at(builder, side, step) for step, _ in vectors] for side in (i, j)]
    weights = [[lanes._load(context, builder, *moved[0], at, bits) for at in side] for side in sides]

    def gradient(other: Any, kept: Any) -> Any:
        product = builder.fmul(lanes._splat(builder, factor, other.type), other)
        return builder.select(kept, product, ir.Constant(other.type, [0.0] * lanes.LANES))

    for side, term in enumerate((i_term, j_term)):
        others = weights[1 - side]
        gradients = [gradient(other, kept) for other, (_, kept) in zip(others, vectors, strict=True)]
        is_alone = builder.icmp_signed("<", term, ir.Constant(term.type, 0))
        with builder.if_else(is_alone, likely=True) as (alone, otherwise):
            with alone:
                after = []
                for at, own, g in zip(sides[side], weights[side], gradients, strict=True):
                    states = [lanes._load(context, builder, *array, at, bits) for array in moved[1:]]
                    after.append((at, _moved(builder, rule_type, rule, g, own, states)))
                for at, values in after:
                    for array, value in zip(moved, values, strict=True):
                        lanes._store(context, builder, *array, at, bits, value)
            with otherwise:
                for (step, _), g in zip(vectors, gradients, strict=True):
                    at = lanes._at(builder, term, step)
                    lanes._store(context, builder, terms_type, terms, at, bits, g)


@intrinsic
def exchange(
    typing: Any,
    rule: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    i: Any,
    j: Any,
    factor: Any,
    terms: Any,
    i_term: Any,
    j_term: Any,
    kept: Any,
    mask: Any,
) -> tuple[Any, Any]:
    """Step two runs of lanes, each with the other's weights times a factor as its gradient.

    For the lanes l of `mask`, ``i + l`` are stepped by ``factor * weight[j + l] if l in kept else 0``, and
    ``j + l`` by weights at i. A side whose place in `terms` is not negative is not stepped: its gradient is
    written there instead. Those to be stepped must not overlap.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        *places, kept, mask = arguments
        vectors = [(None, lanes._choice(context, builder, kept))]
        lanes._on_lanes(
            context,
            builder,
            mask,
            lambda bits: _exchange(context, builder, signature.args[:-2], places, vectors, bits),
        )

    ints, sides = types.intp, _exchanged(rule, weight, first_state, second_state, terms)
    return types.void(*sides, ints, ints), generate


@intrinsic
def exchange_two(
    typing: Any,
    rule: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    i: Any,
    j: Any,
    factor: Any,
    terms: Any,
    i_term: Any,
    j_term: Any,
    kept: Any,
    step: Any,
    kept_after: Any,
) -> tuple[Any, Any]:
    """`exchange` for all lanes, at `i` and `j` and `step` behind; what they share is stepped once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        *places, kept, step, kept_after = arguments
        kept, kept_after = (lanes._choice(context, builder, mask) for mask in (kept, kept_after))
        vectors = [(None, kept), (step, kept_after)]
        _exchange(context, builder, signature.args[:-3], places, vectors, None)

    ints, sides = types.intp, _exchanged(rule, weight, first_state, second_state, terms)
    return types.void(*sides, ints, ints, ints), generate


def _exchanged(rule: Any, weight: Any, first_state: Any, second_state: Any, terms: Any) -> tuple[Any, ...]:
    """Types of the arguments of `exchange` up to `j_term`."""
    ints, number = types.intp, lanes._factor_type(weight)
    return rule, weight, first_state, second_state, ints, ints, number, terms, ints, ints
