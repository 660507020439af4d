"""What optimizers do to segments, with masked instructions and with what stands in for them."""

import functools
import itertools

import numpy as np
import pytest
import torch
from llvmlite import ir
from numba import njit, typeof

from cemb.kernels.cpu import rules, simd

WIDTH = simd.LANES
LENGTHS = [*range(71), 100]
SIZE = 340
BY_VALUE = {
    "add": rules.Add(),
    "sgd": rules.SGD(0.3),
    "adagrad": rules.Adagrad(0.3, 0.01),
    "adam": rules.Adam(0.3, 0.01, 0.8, 0.9),
}
ROWWISE = rules.RowwiseAdagrad(0.3, 0.01)
RULES = {**BY_VALUE, "rowwise": ROWWISE}
# Places of terms for two sides: where a place is negative, the side is stepped.
SIDES = ((-1, -1), (-25, 10), (120, -1), (0, 120))
SPARE = 230

by_value = pytest.mark.parametrize("rule", BY_VALUE.values(), ids=BY_VALUE)
floats = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def _update(rule, stepped, i, gradient, j, length):
    rules.update(rule, stepped, i, gradient, j, length)


def _update_segment(rule, stepped, i, gradient, j, length, dim):
    rules.update_segment(rule, stepped, i, gradient, j, length, dim)


def _exchange(rule, stepped, weight, sides, factor, mask, length, terms):
    rules.exchange(rule, stepped, weight, sides, factor, mask, length, terms)


@pytest.fixture(params=[True, False], ids=["masked", "plain"])
def is_masked(request, monkeypatch):
    monkeypatch.setattr(simd, "_has_masked_access", lambda context: request.param)
    return request.param


def _compile(is_masked, function):
    # What is not inlined, Numba keeps by types and options, so the two differ in an option; and both in one
    # from the kernels, which would keep what was made here in their files.
    return njit(nogil=is_masked, error_model="python")(function)


_compile_once = functools.cache(_compile)


@pytest.fixture
def compiled(is_masked):
    """Compiles a function, for each combination of types in the first test that calls it."""
    return functools.partial(_compile_once, is_masked)


def _arrays(dtype, size=SIZE):
    """Weights, and what serves as a mean and a sum of squares."""
    weight, mean, square = np.random.default_rng(0).standard_normal((3, size)).astype(dtype)
    return weight, mean, np.abs(square)


def _states(rule, mean, square):
    return {rules.Adagrad: [square], rules.Adam: [mean, square]}.get(type(rule), [])


def _stepped(rule, weight, *states):
    """What the rule steps; in the place of states that it does not have, NaN."""
    nothing = np.full_like(weight, np.nan)
    return rules.Stepped(*[weight, *states, nothing, nothing][:3])


def _typed(rule, dtype):
    return type(rule)(*map(dtype, rule))


def _formula(rule, g, w, *states):
    """What becomes of weights and states."""
    if isinstance(rule, rules.Add):
        return (w + g,)
    if isinstance(rule, rules.SGD):
        return (w - rule.rate * g,)
    if isinstance(rule, rules.Adagrad):
        total = states[0] + g**2
        return w - rule.rate * g / (np.sqrt(total) + rule.eps), total
    if isinstance(rule, rules.Adam):
        mean = rule.beta1 * states[0] + (1 - rule.beta1) * g
        square = rule.beta2 * states[1] + (1 - rule.beta2) * g**2
        return w - rule.rate * mean / (np.sqrt(square) + rule.eps), mean, square
    total = states[0] + np.mean(g**2)
    return w - rule.rate * g / (np.sqrt(total) + rule.eps), total


def _expect(rule, place, gradient, arrays):
    """Step a place of weights and states by the formula, in float64."""
    before = [array[place].astype(np.float64) for array in arrays]
    for array, after in zip(arrays, _formula(rule, gradient.astype(np.float64), *before), strict=True):
        array[place] = after


def _expect_row(rule, row, dim, gradient, weight, totals):
    """Step a row by the formula, in float64."""
    place, g = slice(row * dim, row * dim + dim), gradient.astype(np.float64)
    weight[place], totals[row] = _formula(rule, g, weight[place].astype(np.float64), float(totals[row]))


def _check(found, expected, message, roundings=16):
    for a, b in zip(found, expected, strict=True):
        bound = roundings * np.finfo(a.dtype).eps
        assert np.isclose(a, b, rtol=bound, atol=bound, equal_nan=True).all(), message


def _mask(rng, position, length):
    """Random words, with two more than have bits of the segment; and its bits."""
    words = rng.integers(1 << 16, size=-(-(position + length) // WIDTH) + 2).astype(np.uint16)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
    return words, bits[position : position + length]


def _only(values, *segments):
    """The values of some segments, each a start and a length; NaN elsewhere."""
    kept = np.full_like(values, 0x7FC0 if values.dtype == np.uint16 else np.nan)
    for start, length in segments:
        kept[start : start + length] = values[start : start + length]
    return kept


class _Array(np.ndarray):
    """An array that formulas take in the place of a vector."""

    def sqrt(self):
        return np.sqrt(self)


@by_value
def test_steps_are_the_formulas(rule):
    weight, *others = _arrays(np.float64)
    states = _states(rule, *others)
    gradient = np.random.default_rng(1).standard_normal(SIZE)
    found = rule.step(*(array.view(_Array) for array in (gradient, weight, *states)))
    np.testing.assert_allclose(found, _formula(rule, gradient, weight, *states), rtol=1e-13, atol=1e-15)


def test_rules_have_the_states_that_their_formulas_take():
    assert {name: rules.num_states(type(rule)) for name, rule in RULES.items()} == {
        "add": 0, "sgd": 0, "adagrad": 1, "adam": 2, "rowwise": 1
    }  # fmt: skip


@floats
@by_value
def test_updates_step_segments_of_all_lengths_and_nothing_else(compiled, rule, dtype):
    rng = np.random.default_rng(1)
    kernel = compiled(_update)
    for length, is_poisoned in itertools.product(LENGTHS, (True, False)):
        i, j = map(int, rng.integers(SIZE - length, size=2))
        weight, *others = _arrays(dtype)
        found = [weight, *_states(rule, *others)]
        if is_poisoned:
            found = [_only(array, (i, length)) for array in found]
        expected = [array.copy() for array in found]
        gradient = _only(rng.standard_normal(SIZE).astype(dtype), (j, length))
        kernel(_typed(rule, dtype), _stepped(rule, *found), i, gradient, j, length)
        _expect(rule, slice(i, i + length), gradient[j : j + length], expected)
        _check(found, expected, f"{length} values")


def _expect_terms(terms, gradients, sides, spare=slice(0)):
    """Check that `terms` has the gradients of the sides that conflict, and nothing else."""
    written = np.zeros(len(terms), bool)
    for gradient, term in zip(gradients, sides, strict=True):
        if term >= 0:
            written[term : term + len(gradient)] = True
            assert (terms[term : term + len(gradient)] == gradient).all()
    is_empty = np.isnan(terms)
    is_empty[spare] = ~written[spare]
    assert (is_empty == ~written).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("sgd", np.float32), ("adagrad", np.float32), ("adam", np.float32), ("adam", np.float64)),
        *(pytest.param(name, np.float64, marks=pytest.mark.long) for name in ("sgd", "adagrad")),
    ],
)
def test_exchanges_step_each_side_by_the_other_of_before(compiled, name, dtype):
    rng = np.random.default_rng(2)
    rule, kernel, factor = RULES[name], compiled(_exchange), dtype(-1.7)
    for (n, length), sides in itertools.product(enumerate(LENGTHS), SIDES):
        # Segments that are stepped do not overlap, but may touch; if both conflict, they may overlap.
        i, gap = int(rng.integers(40)), int(rng.integers(3)) * n % 5
        j = i + int(rng.integers(length + 1)) if min(sides) >= 0 else i + length + gap
        i, j = (i, j) if rng.integers(2) else (j, i)
        position = int(rng.integers(48))
        words, is_kept = _mask(rng, position, length)
        weight, *others = _arrays(dtype)
        found = [weight, *_states(rule, *others)]
        if n % 2:
            found = [_only(array, (i, length), (j, length)) for array in found]
        expected = [array.copy() for array in found]
        terms = np.full(SIZE, np.nan, dtype)
        ahead = map(int, rng.integers(-(2**62), 2**62, 2))  # prefetches are safe anywhere
        stepped, mask = _stepped(rule, *found), (words, position)
        here, out = (i, j, *ahead), (terms, *sides, SPARE)
        kernel(_typed(rule, dtype), stepped, found[0], here, factor, mask, length, out)
        places = slice(i, i + length), slice(j, j + length)
        gradients = [np.where(is_kept, factor * expected[0][place], 0) for place in reversed(places)]
        _expect_terms(terms, gradients, sides)
        for place, gradient, term in zip(places, gradients, sides, strict=True):
            if term < 0:
                _expect(rule, place, gradient, expected)
        _check(found, expected, f"{length} values, terms at {sides}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16])
def test_gradients_of_segments_that_overlap_are_both_added(compiled, dtype):
    rng = np.random.default_rng(3)
    computed = np.float32 if dtype == np.uint16 else dtype
    kernel, factor = compiled(_exchange), computed(-1.7)
    for length in LENGTHS:
        shifts = 0, 1, length // 2, length, int(rng.integers(60))
        for shift, sides in [*itertools.product(shifts, SIDES[:1]), *((length // 3, s) for s in SIDES[1:])]:
            i, j = map(int, rng.permutation([30, 30 + shift]))
            weight = rng.standard_normal(SIZE).astype(np.float32)
            # The upper halves of float32 are bfloat16.
            weight = (
                (weight.view(np.uint32) >> 16).astype(dtype) if dtype == np.uint16 else weight.astype(dtype)
            )
            weight = _only(weight, (i, length), (j, length))
            values = (weight.astype(np.uint32) << 16).view(np.float32) if dtype == np.uint16 else weight
            position = int(rng.integers(48))
            words, is_kept = _mask(rng, position, length)
            sums = rng.standard_normal(SIZE).astype(computed)
            expected, terms = sums.copy(), np.full(SIZE, np.nan, computed)
            stepped, here = _stepped(rules.Add(), sums), (i, j, -1, 2**50)
            kernel(
                rules.Add(), stepped, weight, here, factor, (words, position), length, (terms, *sides, SPARE)
            )
            gradients = [np.where(is_kept, factor * values[place : place + length], 0) for place in (j, i)]
            _expect_terms(terms, gradients, sides)
            for place, gradient, term in zip((i, j), gradients, sides, strict=True):
                if term < 0:
                    expected[place : place + length] += gradient
            message = f"{length} values, one segment {shift} behind the other, terms at {sides}"
            _check([sums], [expected], message, 4)  # where three are added, in one order or another


@floats
def test_exchanges_step_rows_by_the_mean_of_their_squares(compiled, dtype):
    rng = np.random.default_rng(4)
    kernel, factor = compiled(_exchange), dtype(-1.7)
    for dim, sides in itertools.product(LENGTHS[1:], SIDES):
        rows = 5
        word, context = map(int, rng.choice(rows, 2, replace=min(sides) >= 0))
        position = int(rng.integers(48))
        words, is_kept = _mask(rng, position, dim)
        weight = rng.standard_normal(rows * dim).astype(dtype)
        totals = rng.random(rows).astype(dtype)
        if dim % 2:
            weight = _only(weight, (word * dim, dim), (context * dim, dim))
            totals = _only(totals, (word, 1), (context, 1))
        expected = weight.copy(), totals.copy()
        terms = np.full(SPARE + 2 * dim + 10, np.nan, dtype)
        stepped = rules.Stepped(weight, totals, np.full(1, np.nan, dtype))
        here = word * dim, context * dim, 2**50, -dim
        kernel(
            _typed(ROWWISE, dtype),
            stepped,
            weight,
            here,
            factor,
            (words, position),
            dim,
            (terms, *sides, SPARE),
        )
        before = expected[0].reshape(rows, dim).copy()
        gradients = [np.where(is_kept, factor * before[row], 0) for row in (context, word)]
        _expect_terms(terms, gradients, sides, slice(SPARE, SPARE + 2 * dim))
        for row, gradient, term in zip((word, context), gradients, sides, strict=True):
            if term < 0:
                _expect_row(ROWWISE, row, dim, gradient, *expected)
        _check((weight, totals), expected, f"{dim} values, terms at {sides}", 16 + dim)


@floats
def test_segments_are_updated_row_by_row_by_a_rule_for_rows(compiled, dtype):
    rng = np.random.default_rng(5)
    kernel = compiled(_update_segment)
    for dim, count in itertools.product(LENGTHS[1:], range(4)):
        first, j, length = int(rng.integers(3)), int(rng.integers(20)), count * dim
        weight, totals = rng.standard_normal(6 * dim).astype(dtype), rng.random(6).astype(dtype)
        if dim % 2:
            weight, totals = _only(weight, (first * dim, length)), _only(totals, (first, count))
        expected = weight.copy(), totals.copy()
        gradient = _only(rng.standard_normal(j + length + 20).astype(dtype), (j, length))
        stepped = rules.Stepped(weight, totals, np.full(1, np.nan, dtype))
        kernel(_typed(ROWWISE, dtype), stepped, first * dim, gradient, j, length, dim)
        for n in range(count):
            _expect_row(ROWWISE, first + n, dim, gradient[j + n * dim :][:dim], *expected)
        _check((weight, totals), expected, f"{count} rows of {dim} values", 16 + dim)


def test_segments_are_updated_as_a_whole_by_other_rules(compiled):
    rule, kernel, whole = BY_VALUE["adam"], compiled(_update_segment), compiled(_update)
    gradient = np.random.default_rng(6).standard_normal(100)
    for length in (0, 5, 16, 37):
        found, expected = (
            [w, *_states(rule, *others)] for w, *others in (_arrays(np.float64) for _ in range(2))
        )
        kernel(rule, _stepped(rule, *found), 3, gradient, 9, length, 7)
        whole(rule, _stepped(rule, *expected), 3, gradient, 9, length)
        np.testing.assert_array_equal(found, expected)


def _adam(step):
    """The rule of a step, which moves what corrects the bias from the states to rate and eps."""
    root = np.sqrt(1 - 0.9**step)
    return rules.Adam(0.3 * root / (1 - 0.8**step), 0.01 * root, 0.8, 0.9)


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (lambda step: BY_VALUE["sgd"], lambda p: torch.optim.SGD(p, 0.3)),
        (lambda step: BY_VALUE["adagrad"], lambda p: torch.optim.Adagrad(p, 0.3, eps=0.01)),
        (_adam, lambda p: torch.optim.Adam(p, 0.3, (0.8, 0.9), 0.01)),
    ],
    ids=["sgd", "adagrad", "adam"],
)
def test_updates_are_those_of_torch(compiled, rule, make):
    kernel = compiled(_update)
    weight = _arrays(np.float64)[0]
    mean, square = np.zeros((2, SIZE))
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer, length = make([parameter]), 3 * WIDTH + 5
    for step in range(1, 4):
        gradient, now = np.random.default_rng(step).standard_normal(SIZE), rule(step)
        kernel(now, _stepped(now, weight, *_states(now, mean, square)), 3, gradient, 2, length)
        parameter.grad = torch.zeros(SIZE, dtype=torch.float64)
        parameter.grad[3 : 3 + length] = torch.from_numpy(gradient[2 : 2 + length])
        optimizer.step()
    np.testing.assert_allclose(weight, parameter.detach().numpy(), rtol=1e-12)


def _mark(code, array_type, array, index):
    """In the place of a prefetch, which nothing shows: write 0."""
    pointer = code.pointer(array_type, array, index)
    code.builder.store(ir.Constant(pointer.type.pointee, 0.0), pointer)


def _check_prefetched(array, segments):
    """Every cache line of the segments is marked, however it is aligned, and nothing outside of them."""
    marks, inside = array == 0, np.zeros(len(array), bool)
    for start, length in segments:
        here = np.flatnonzero(marks[start : start + length])
        assert here[0] == 0 and here[-1] == length - 1 and np.all(np.diff(here) <= 16)
        inside[start : start + length] = True
    assert not (marks & ~inside).any()


@pytest.mark.parametrize("name", ["add", "adam", "rowwise"])
def test_exchanges_prefetch_all_that_the_next_one_reads(name, monkeypatch):
    monkeypatch.setattr(simd, "_has_masked_access", lambda context: True)
    monkeypatch.setattr(simd.Segments, "prefetch", _mark)
    rule, kernel = RULES[name], _compile(True, _exchange)
    for length in LENGTHS[1:]:
        weight, first, second, sums, terms = np.ones((5, 7 * max(length, 50)), np.float32)
        size = len(weight)
        words = np.full(10, 0xFFFF, np.uint16)
        is_added = isinstance(rule, rules.Add)
        stepped = rules.Stepped(sums if is_added else weight, first, second)
        ahead = 3 * length, size - max(length, WIDTH) - 1
        if rule is ROWWISE:
            ahead = 3 * length, 5 * length
        mask, out = (words, 0), (terms, -1, -1, 0)
        weight[: 2 * length] = 0.5  # no gradient makes zeros of them
        kernel(
            _typed(rule, np.float32), stepped, weight, (0, length, *ahead), np.float32(0.5), mask, length, out
        )
        accessed = max(length, WIDTH)  # masked loads wait for all their lanes
        segments = [(place, accessed) for place in ahead]
        read = [weight, *([sums] if is_added else []), *(first, second)[: rules.num_states(type(rule))]]
        if rule is ROWWISE:
            np.testing.assert_array_equal(np.flatnonzero(read.pop() == 0), [3, 5])
        for array in read:
            _check_prefetched(array, segments)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "rowwise"])
def test_all_of_a_segment_that_a_rule_steps_is_prefetched(name, monkeypatch):
    monkeypatch.setattr(simd.Segments, "prefetch", _mark)
    monkeypatch.setattr(simd, "prefetch_segment", njit(simd.prefetch_segment.py_func))
    # Compiled by itself, since Numba keeps what it compiles for calls.
    rule = RULES[name]
    kernel, states = njit(rules._prefetch(typeof(rule), *[None] * 4)), rules.num_states(type(rule))
    for length in LENGTHS[1:]:
        arrays = np.ones((3, SIZE), np.float32)
        dim = 1 + length // 3
        kernel(rule, rules.Stepped(*arrays), 5 * dim, length, dim)
        _check_prefetched(arrays[0], [(5 * dim, length)])
        if rule is ROWWISE:
            np.testing.assert_array_equal(np.flatnonzero(arrays[1] == 0), [5])
            continue
        for array in arrays[1 : 1 + states]:
            _check_prefetched(array, [(5 * dim, length)])
