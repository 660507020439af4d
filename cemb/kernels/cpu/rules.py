"""What optimizers do with a gradient. To add one, write a rule here, and its class in `cemb.optim`.

A rule is a `NamedTuple` of numbers with a `step`, the formula on vectors of 16 values, from which code is
made: weights and states are loaded once, stepped in vector registers, and stored once. Kernels are compiled
for one rule: with all in a loop, registers would spill.
"""

import functools
import inspect
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from cemb.kernels.cpu import simd
from cemb.kernels.cpu.simd import SIDES, Segments, factor_type

_Vectors = tuple[Any, ...]


class Add(NamedTuple):
    """``weight += g``: sums gradients."""

    def step(self, g: Any, weight: Any) -> _Vectors:
        return (weight + g,)


class SGD(NamedTuple):
    """``weight -= rate · g``, where g is the gradient."""

    rate: float

    def step(self, g: Any, weight: Any) -> _Vectors:
        return (weight - g * self.rate,)


class Adagrad(NamedTuple):
    """``total += g²; weight -= rate · g / (√total + eps)`` (Duchi et al., JMLR 2011)."""

    rate: float
    eps: float

    def step(self, g: Any, weight: Any, total: Any) -> _Vectors:
        total = total + g * g
        return weight - g / (total.sqrt() + self.eps) * self.rate, total


class Adam(NamedTuple):
    """``mean`` and ``square`` move by ``1 − beta`` of the way to g and g² (Kingma and Ba, ICLR 2015).

    Then ``weight -= rate · mean / (√square + eps)``.
    """

    rate: float
    eps: float
    beta1: float
    beta2: float

    def step(self, g: Any, weight: Any, mean: Any, square: Any) -> _Vectors:
        mean = mean + (g - mean) * (1 - self.beta1)
        square = square + (g * g - square) * (1 - self.beta2)
        return weight - mean / (square.sqrt() + self.eps) * self.rate, mean, square


class RowwiseAdagrad(NamedTuple):
    """As `Adagrad`, but ``total``, one a row of a full table, grows by the mean of g² over the row.

    A row's whole gradient must be known before any of its values changes.
    """

    rate: float
    eps: float


Rule = Add | SGD | Adagrad | Adam | RowwiseAdagrad


class Stepped(NamedTuple):
    """What a rule steps: arrays of one shape, weights or sums ``[n]``, and states where the rule has them."""

    weight: Any
    first_state: Any
    second_state: Any


@functools.cache
def num_states(rule: Any) -> int:
    """How many states a rule has for each weight; row-wise Adagrad has one for each row."""
    if rule is RowwiseAdagrad:
        return 1
    return len(inspect.signature(rule.step).parameters) - 3  # without itself, the gradient and the weight


def _arrays(builder: Any, rule_type: Any, stepped_type: Any, stepped: Any) -> list[tuple[Any, Any]]:
    """Numba type and generated value of each array that a rule steps."""
    count = 1 + num_states(rule_type.instance_class)
    return [(stepped_type.types[n], builder.extract_value(stepped, n)) for n in range(count)]


def _formula(code: Segments, rule_type: Any, rule: Any) -> Any:
    """The rule with its numbers as vectors."""
    numbers = (code.splat(code.builder.extract_value(rule, n)) for n in range(len(rule_type.types)))
    return rule_type.instance_class(*numbers)


@intrinsic
def update(typing, rule, stepped, i, gradient, j, length):
    """Step a segment from `i` on by ``gradient[j : j + length]``."""

    def generate(context, builder, signature, arguments):
        rule_type, stepped_type, _, gradient_type, _, _ = signature.args
        rule, stepped, i, gradient, j, length = arguments
        code = Segments(context, builder)
        arrays, formula = _arrays(builder, rule_type, stepped_type, stepped), _formula(code, rule_type, rule)

        def vectors(starts, inside):
            after = []
            for x in starts:
                at = builder.add(i, x)
                before = [code.load(*array, at, inside) for array in arrays]
                g = code.load(gradient_type, gradient, builder.add(j, x), inside)
                after.append((at, formula.step(g, *before)))
            for at, values in after:
                for array, value in zip(arrays, values, strict=True):
                    code.store(*array, at, inside, value)

        code.each(length, vectors)

    ints = types.intp
    return types.void(rule, stepped, ints, gradient, ints, ints), generate


@intrinsic
def _exchange(typing, rule, stepped, weight, sides, factor, mask, length, terms):
    """`exchange`, whatever the rule makes of single values."""

    def generate(context, builder, signature, arguments):
        rule_type, stepped_type, weight_type, _, _, mask_type, _, terms_type = signature.args
        rule, stepped, weight, sides, factor, mask, length, terms = arguments
        code = Segments(context, builder)
        arrays, formula = _arrays(builder, rule_type, stepped_type, stepped), _formula(code, rule_type, rule)
        here, ahead = code.sides(sides)
        scale = code.splat(factor)
        steps_weight = rule_type.instance_class is not Add
        read = arrays if steps_weight else [(weight_type, weight), *arrays]
        code.prefetch_sides(read, ahead, [code.last_read(length)])

        def vectors(starts, inside):
            places = [[builder.add(side, x) for x in starts] for side in here]
            code.prefetch_sides(read, ahead, starts)

            def load(side):
                return [code.load(weight_type, weight, at, inside) for at in places[side]]

            weights = [load(0), load(1)] if steps_weight else None  # of before the step
            selected = [code.bits(mask_type, mask, x) for x in starts]
            for side in range(2):
                others = weights[1 - side] if steps_weight else load(1 - side)
                gradients = [code.where(s, scale * w) for s, w in zip(selected, others, strict=True)]

                def step(side=side, gradients=gradients):
                    after = []
                    for n, (at, g) in enumerate(zip(places[side], gradients, strict=True)):
                        known = [weights[side][n]] if steps_weight else []
                        before = [*known, *(code.load(*a, at, inside) for a in arrays[len(known) :])]
                        after.append((at, formula.step(g, *before)))
                    for at, values in after:
                        for array, value in zip(arrays, values, strict=True):
                            code.store(*array, at, inside, value)

                out, term = builder.extract_value(terms, 0), builder.extract_value(terms, 1 + side)
                is_free = builder.icmp_signed("<", term, term.type(0))
                with builder.if_else(is_free, likely=True) as (free, conflicting):
                    with free:
                        step()
                    with conflicting:
                        for x, g in zip(starts, gradients, strict=True):
                            code.store(terms_type[0], out, builder.add(term, x), inside, g)

        code.each(length, vectors)

    return types.void(rule, stepped, weight, SIDES, factor_type(weight), mask, types.intp, terms), generate


def exchange(rule, stepped, weight, sides, factor, mask, length, terms):
    """Step two segments, each with the other's weights times a factor as its gradient.

    Args:
        rule, stepped: as for `update`; `stepped` has the weights themselves, or sums to `Add` to.
        weight: what gradients are made of.
        sides: where the two segments start, and two segments that are prefetched.
        factor: of the gradients.
        mask: words of a bit mask and a position in it: gradients are 0 unless bits from there on are set.
        length: of the segments. Those whose weights are stepped must not overlap.
        terms: an array, and for each side a place in it. A side whose place is not negative conflicts: its
            gradient is stored there instead. A last place has room for the segments of the others.
    """
    raise NotImplementedError("for use in kernels only")


@overload(exchange, inline="always", strict=False)
def _exchange_for(rule, stepped, weight, sides, factor, mask, length, terms):
    def by_value(rule, stepped, weight, sides, factor, mask, length, terms):
        _exchange(rule, stepped, weight, sides, factor, mask, length, terms)

    def by_row(rule, stepped, weight, sides, factor, mask, length, terms):
        out, word_term, context_term, spare = terms
        simd.prefetch(stepped.first_state, sides[2] // length)
        simd.prefetch(stepped.first_state, sides[3] // length)
        word = word_term if word_term >= 0 else spare
        context = context_term if context_term >= 0 else spare + (length if word_term < 0 else 0)
        _exchange(SGD(factor), stepped, weight, sides, factor, mask, length, (out, word, context, spare))
        if word_term < 0:
            update_segment(rule, stepped, sides[0], out, word, length, length)
        if context_term < 0:
            update_segment(rule, stepped, sides[1], out, context, length, length)

    return by_row if rule.instance_class is RowwiseAdagrad else by_value


def update_segment(rule, stepped, i, gradient, j, length, dim):
    """`update` of a segment, which for a rule by rows has whole rows of `dim` values."""
    raise NotImplementedError("for use in kernels only")


@overload(update_segment, strict=False)
def _update_segment(rule, stepped, i, gradient, j, length, dim):
    def by_value(rule, stepped, i, gradient, j, length, dim):
        update(rule, stepped, i, gradient, j, length)

    def by_row(rule, stepped, i, gradient, j, length, dim):
        for first in range(0, length, dim):
            row, squares = (i + first) // dim, gradient.dtype.type(0)
            for value in gradient[j + first : j + first + dim]:
                squares += value * value
            stepped.first_state[row] += squares / gradient.dtype.type(dim)
            rate = rule.rate / (np.sqrt(stepped.first_state[row]) + rule.eps)
            update(SGD(rate), stepped, i + first, gradient, j + first, dim)

    return by_row if rule.instance_class is RowwiseAdagrad else by_value


def prefetch(rule, stepped, start, length, dim):
    """Prefetch a segment of what a rule steps."""
    raise NotImplementedError("for use in kernels only")


@overload(prefetch, strict=False)
def _prefetch(rule, stepped, start, length, dim):
    count = 0 if rule.instance_class is RowwiseAdagrad else num_states(rule.instance_class)

    def impl(rule, stepped, start, length, dim):
        simd.prefetch_segment(stepped[0], start, length)
        if count > 0:
            simd.prefetch_segment(stepped[1], start, length)
        else:
            simd.prefetch(stepped[1], start // dim)  # a row's state, if it has one
        if count > 1:
            simd.prefetch_segment(stepped[2], start, length)

    return impl
