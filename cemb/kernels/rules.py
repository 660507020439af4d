"""What optimizers do with a gradient, on the lanes of `cemb.kernels.lanes`: weights and states are read once,
moved in vector registers, and written once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cemb.kernels import lanes

SGD, ADAGRAD, ADAM, ROWWISE_ADAGRAD = range(4)

_NUM_STATES = {SGD: 0, ADAGRAD: 1, ADAM: 2}  # of those that move each value by itself


class Rule(NamedTuple):
    """What an optimizer does with a gradient g.

    - ``SGD``: ``weight -= rate · g``
    - ``ADAGRAD``, one state: ``sum += g²; weight -= rate · g / (√sum + eps)``
    - ``ADAM``, two states: the moments ``mean`` and ``square`` move by ``1 − beta`` of the way to g and g²,
      and ``weight -= rate · mean / (√square + eps)``
    - ``ROWWISE_ADAGRAD``, a state for each row: as ``ADAGRAD``, but that ``sum`` grows by the mean of g² over
      the row, see `cemb.kernels.rowwise`
    """

    kind: int
    rate: float
    eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0


def _moved(
    builder: Any, kind: int, constants: Sequence[Any], gradient: Any, weight: Any, states: Sequence[Any]
) -> list[Any]:
    """The weight and the states after a step; all are vectors."""
    add, subtract, multiply = builder.fadd, builder.fsub, builder.fmul

    def towards(state: Any, value: Any, beta: Any) -> Any:
        one = ir.Constant(weight.type, [1.0] * lanes.LANES)
        return add(state, multiply(subtract(one, beta), subtract(value, state)))

    rate, eps, beta1, beta2 = constants
    if kind == SGD:
        return [subtract(weight, multiply(rate, gradient))]
    square = multiply(gradient, gradient)
    if kind == ADAGRAD:
        states, direction = [add(states[0], square)], gradient
    else:
        states = [towards(states[0], gradient, beta1), towards(states[1], square, beta2)]
        direction = states[0]
    root = lanes._root(builder, states[-1])
    return [subtract(weight, multiply(rate, builder.fdiv(direction, add(root, eps)))), *states]


def _for_each_rule(
    builder: Any,
    rule: Any,
    constants: Any,
    arrays: Sequence[lanes._Array],
    generate: Callable[[int, Sequence[Any], Sequence[lanes._Array]], None],
) -> None:
    """Generate code for the rule that `rule` says at run time.

    `arrays` are the weights and the states, each after its type. `generate` is given a rule's kind, its
    constants, and of the arrays those it moves.
    """
    vector = _vector(arrays[0][0])
    values = [builder.extract_value(constants, n) for n in range(4)]
    for kind, num_states in _NUM_STATES.items():
        with builder.if_then(builder.icmp_signed("==", rule, ir.Constant(rule.type, kind))):
            splats = [lanes._splat(builder, value, vector) for value in values]
            generate(kind, splats, arrays[: 1 + num_states])


def _vector(array_type: Any) -> Any:
    element = ir.DoubleType() if array_type.dtype == types.float64 else ir.FloatType()
    return ir.VectorType(element, lanes.LANES)


@intrinsic
def update(
    typing: Any,
    rule: Any,
    constants: Any,
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
        _, _, *array_types, _, gradient_type, _, _ = signature.args
        rule, constants, *arrays, i, gradient, j, mask = arguments

        def by_rule(kind: int, constants: Sequence[Any], moved: Sequence[lanes._Array]) -> None:
            def on(bits: Any) -> None:
                g = lanes._load(context, builder, gradient_type, gradient, j, bits)
                before = [lanes._load(context, builder, *array, i, bits) for array in moved]
                after = _moved(builder, kind, constants, g, before[0], before[1:])
                for array, value in zip(moved, after, strict=True):
                    lanes._store(context, builder, *array, i, bits, value)

            lanes._on_lanes(context, builder, mask, on)

        _for_each_rule(builder, rule, constants, list(zip(array_types, arrays, strict=True)), by_rule)

    ints = types.intp
    arrays = (weight, first_state, second_state)
    return types.void(ints, constants, *arrays, ints, gradient, ints, ints), generate


def _exchange(
    context: Any,
    builder: Any,
    rule: Any,
    constants: Any,
    arrays: Sequence[lanes._Array],
    i: Any,
    j: Any,
    factor: Any,
    is_stepped: Sequence[Any],
    vectors: Sequence[tuple[Any, Any]],
    bits: Any,
) -> None:
    """Code for vectors of `exchange`: each is a step to it from `i` and `j`, and what it keeps."""
    vector = _vector(arrays[0][0])
    zero = ir.Constant(vector, [0.0] * lanes.LANES)

    def by_rule(kind: int, constants: Sequence[Any], moved: Sequence[lanes._Array]) -> None:
        places = [[lanes._at(builder, place, step) for step, _ in vectors] for place in (i, j)]
        weights = [[lanes._load(context, builder, *moved[0], at, bits) for at in side] for side in places]
        for side in range(2):
            with builder.if_then(builder.icmp_signed("!=", is_stepped[side], is_stepped[side].type(0))):
                after = []
                for at, (_, kept), own, other in zip(
                    places[side], vectors, weights[side], weights[1 - side], strict=True
                ):
                    term = builder.fmul(lanes._splat(builder, factor, vector), other)
                    gradient = builder.select(kept, term, zero)
                    states = [lanes._load(context, builder, *array, at, bits) for array in moved[1:]]
                    after.append((at, _moved(builder, kind, constants, gradient, own, states)))
                for at, values in after:
                    for array, value in zip(moved, values, strict=True):
                        lanes._store(context, builder, *array, at, bits, value)

    _for_each_rule(builder, rule, constants, arrays, by_rule)


@intrinsic
def exchange(
    typing: Any,
    rule: Any,
    constants: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    i: Any,
    j: Any,
    factor: Any,
    i_is_stepped: Any,
    j_is_stepped: Any,
    kept: Any,
    mask: Any,
) -> tuple[Any, Any]:
    """Step two runs of lanes, each with the other's weights times a factor as its gradient.

    For the lanes l of `mask`, ``i + l`` are stepped by ``factor * weight[j + l] if l in kept else 0`` if
    `i_is_stepped`, and ``j + l`` by weights at i if `j_is_stepped`. Those to be stepped must not overlap.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        array_types = signature.args[2:5]
        rule, constants, *arrays, i, j, factor, i_is_stepped, j_is_stepped, kept, mask = arguments
        places = list(zip(array_types, arrays, strict=True)), i, j, factor, (i_is_stepped, j_is_stepped)
        vectors = [(None, lanes._choice(context, builder, kept))]
        lanes._on_lanes(
            context,
            builder,
            mask,
            lambda bits: _exchange(context, builder, rule, constants, *places, vectors, bits),
        )

    ints, number = types.intp, lanes._factor_type(weight)
    arrays = (weight, first_state, second_state)
    return types.void(ints, constants, *arrays, ints, ints, number, ints, ints, ints, ints), generate


@intrinsic
def exchange_two(
    typing: Any,
    rule: Any,
    constants: Any,
    weight: Any,
    first_state: Any,
    second_state: Any,
    i: Any,
    j: Any,
    factor: Any,
    i_is_stepped: Any,
    j_is_stepped: Any,
    kept: Any,
    step: Any,
    kept_after: Any,
) -> tuple[Any, Any]:
    """`exchange` for all lanes, at `i` and `j` and `step` behind; what they share is stepped once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        array_types = signature.args[2:5]
        rule, constants, *arrays, i, j, factor, i_is_stepped, j_is_stepped, kept, step, kept_after = arguments
        places = list(zip(array_types, arrays, strict=True)), i, j, factor, (i_is_stepped, j_is_stepped)
        kept, kept_after = (lanes._choice(context, builder, mask) for mask in (kept, kept_after))
        _exchange(context, builder, rule, constants, *places, [(None, kept), (step, kept_after)], None)

    ints, number = types.intp, lanes._factor_type(weight)
    arrays = (weight, first_state, second_state)
    return types.void(ints, constants, *arrays, ints, ints, number, ints, ints, ints, ints, ints), generate
