"""The arithmetic of optimizers on lanes, with masked instructions and with what stands in for them."""

import numpy as np
import pytest
import torch
from numba import njit

from cemb.kernels.cpu import rules, simd

WIDTH = simd.LANES
RULES = {
    "sgd": rules.SGD(0.3),
    "adagrad": rules.Adagrad(0.3, 0.01),
    "adam": rules.Adam(0.3, 0.01, 0.8, 0.9),
}


def _update(rule, weight, first, second, gradient, mask):
    rules.update(rule, weight, first, second, 3, gradient, 2, mask)


def _exchange(rule, weight, first, second, factor, terms, i_term, j_term, selected, mask):
    rules.exchange(rule, weight, first, second, 3, 25, factor, terms, i_term, j_term, selected, mask)


def _exchange_two(rule, weight, first, second, factor, terms, i_term, j_term, selected, step, next_selected):
    sides = i_term, j_term
    rules.exchange_two(
        rule, weight, first, second, 3, 40, factor, terms, *sides, selected, step, next_selected
    )


# Places of terms for two sides: where a place is negative, the side is stepped.
SIDES = ((-1, -1), (-25, 10), (60, -1), (60, 10))


@pytest.fixture(params=[True, False], ids=["masked", "plain"])
def compiled(request, monkeypatch):
    monkeypatch.setattr(simd, "_has_masked_access", lambda context: request.param)
    return njit


def _arrays(dtype):
    rng = np.random.default_rng(0)
    weight, mean, square = rng.standard_normal((3, 80)).astype(dtype)
    return weight, mean, np.abs(square)


def _call(kernel, rule, weight, mean, square, *arguments):
    """Call a kernel of the rule; what it must not touch is NaN there."""
    nothing = np.full_like(weight, np.nan)
    states = {rules.SGD: (nothing, nothing), rules.Adagrad: (square, nothing), rules.Adam: (mean, square)}
    kernel(type(rule)(*map(weight.dtype.type, rule)), weight, *states[type(rule)], *arguments)


def _expect(rule, places, gradient, weight, mean, square):
    """What the formulas say, in float64, written where `places` are."""
    g = gradient.astype(np.float64)
    w, m, s = (array[places].astype(np.float64) for array in (weight, mean, square))
    if isinstance(rule, rules.SGD):
        move = g
    elif isinstance(rule, rules.Adagrad):
        s = s + g**2
        move = g / (np.sqrt(s) + rule.eps)
    else:
        m = rule.beta1 * m + (1 - rule.beta1) * g
        s = rule.beta2 * s + (1 - rule.beta2) * g**2
        move = m / (np.sqrt(s) + rule.eps)
    weight[places], mean[places], square[places] = w - rule.rate * move, m, s


def _check(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5 if a.dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_updates_are_the_formulas_on_the_lanes_of_a_mask(compiled, rule, dtype):
    kernel = compiled(_update)
    gradient = np.random.default_rng(1).standard_normal(2 * WIDTH).astype(dtype)
    for count in range(WIDTH + 1):
        found, expected = _arrays(dtype), _arrays(dtype)
        poisoned = gradient.copy()
        poisoned[2 + count :] = np.nan
        _call(kernel, rule, *found, poisoned, (1 << count) - 1)
        _expect(rule, slice(3, 3 + count), gradient[2 : 2 + count], *expected)
        _check(found, expected)


def _expect_sides(rule, places, gradients, sides, terms, expected):
    """Step what is stepped of `expected`; checks that `terms` has the gradients of all else, and no more."""
    written = np.zeros(len(terms), bool)
    for place, gradient, term in zip(places, gradients, sides, strict=True):
        if term < 0:
            _expect(rule, place, gradient, *expected)
            continue
        written[term : term + len(gradient)] = True
        np.testing.assert_array_equal(terms[term : term + len(gradient)], gradient)
    np.testing.assert_array_equal(np.isnan(terms), ~written)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_exchanges_step_each_side_by_the_other_of_before(compiled, rule, dtype):
    kernel = compiled(_exchange)
    factor = dtype(-1.7)
    rng = np.random.default_rng(2)
    for count in range(WIDTH + 1):
        for sides in SIDES:
            mask, selected = (1 << count) - 1, int(rng.integers(1 << WIDTH))
            found, expected = _arrays(dtype), _arrays(dtype)
            for array in found:
                array[3 + count : 3 + WIDTH] = array[25 + count : 25 + WIDTH] = np.nan
            terms = np.full(80, np.nan, dtype)
            _call(kernel, rule, *found, factor, terms, *sides, selected, mask)
            assert all(np.isnan(a[3 + count : 3 + WIDTH]).all() for a in found)
            assert all(np.isnan(a[25 + count : 25 + WIDTH]).all() for a in found)
            is_selected = (selected >> np.arange(count) & 1).astype(bool)
            places = slice(3, 3 + count), slice(25, 25 + count)
            gradients = [np.where(is_selected, factor * expected[0][place], 0) for place in reversed(places)]
            _expect_sides(rule, places, gradients, sides, terms, expected)
            for array in expected:
                array[3 + count : 3 + WIDTH] = array[25 + count : 25 + WIDTH] = np.nan
            _check(found, expected)


@pytest.mark.parametrize("step", [0, 1, 9, 16])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_two_vectors_share_is_stepped_once(compiled, rule, step):
    rng = np.random.default_rng(3)
    length, factor = WIDTH + step, np.float32(-1.7)
    kernel = compiled(_exchange_two)
    for sides in SIDES:
        bits = int(rng.integers(1 << length))
        found, expected = _arrays(np.float32), _arrays(np.float32)
        terms = np.full(100, np.nan, np.float32)
        _call(kernel, rule, *found, factor, terms, *sides, bits & ((1 << WIDTH) - 1), step, bits >> step)
        is_selected = (bits >> np.arange(length) & 1).astype(bool)
        places = slice(3, 3 + length), slice(40, 40 + length)
        gradients = [np.where(is_selected, factor * expected[0][place], 0) for place in reversed(places)]
        _expect_sides(rule, places, gradients, sides, terms, expected)
        _check(found, expected)


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (RULES["sgd"], lambda p: torch.optim.SGD(p, 0.3)),
        (RULES["adagrad"], lambda p: torch.optim.Adagrad(p, 0.3, eps=0.01)),
    ],
    ids=["sgd", "adagrad"],
)
def test_updates_are_those_of_torch(compiled, rule, make):
    kernel = compiled(_update)
    weight, mean, square = _arrays(np.float64)
    square[:] = 0
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = make([parameter])
    for step in range(3):
        gradient = np.random.default_rng(step).standard_normal(2 * WIDTH)
        _call(kernel, rule, weight, mean, square, gradient, (1 << WIDTH) - 1)
        parameter.grad = torch.zeros(80, dtype=torch.float64)
        parameter.grad[3 : 3 + WIDTH] = torch.from_numpy(gradient[2 : 2 + WIDTH])
        optimizer.step()
    np.testing.assert_allclose(weight, parameter.detach().numpy(), rtol=1e-12)
