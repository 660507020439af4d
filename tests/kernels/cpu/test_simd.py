"""Vector operations under masks, with masked instructions and with what stands in for them."""

import numpy as np
import pytest
from numba import njit

from cemb.kernels.cpu import simd

WIDTH = simd.LANES
COUNTS = range(WIDTH + 1)


def _kernel(out, a, b, factor, selected, old, mask):
    simd.multiply(out[0], 1, a, 2, b, 3, factor, selected, mask)
    simd.scale(out[1], 1, a, 2, factor, mask)
    simd.add_scaled(out[2], 1, a, 2, factor, selected, mask)
    simd.append_scaled(out[3], 1, a, 2, factor, selected, old, mask)


@pytest.fixture(params=[True, False], ids=["masked", "plain"])
def compiled(request, monkeypatch):
    monkeypatch.setattr(simd, "_has_masked_access", lambda context: request.param)
    return njit


@pytest.fixture
def kernel(compiled):
    return compiled(_kernel)


def _float32(values):
    """Values as kernels see them: bfloat16 comes as the upper halves of float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16])
def test_lanes_of_a_mask_are_written_and_no_other(kernel, dtype):
    rng = np.random.default_rng(0)
    computed = np.float32 if dtype == np.uint16 else dtype
    a, b = (rng.integers(0x3F00, 0x4000, 2 * WIDTH).astype(np.uint16) for _ in range(2))
    if dtype != np.uint16:
        a, b = (rng.standard_normal(2 * WIDTH).astype(dtype) for _ in range(2))
    lane = np.arange(WIDTH)
    factor = computed(1.7)
    for count in COUNTS:
        for old in {0, count // 2, count}:
            mask, selected = (1 << count) - 1, int(rng.integers(1 << WIDTH)) & ((1 << count) - 1)
            before = rng.standard_normal((4, 2 * WIDTH)).astype(computed)
            before[0], before[1] = np.nan, np.nan  # never read
            before[3, 1 + old : 1 + WIDTH] = np.nan
            out = before.copy()
            kernel(out, a, b, factor, selected, (1 << old) - 1, mask)
            is_selected = (selected >> lane & 1).astype(bool)
            term = factor * _float32(a)[2 : 2 + WIDTH]
            wanted = before.copy()
            for row, values in enumerate(
                (
                    np.where(is_selected, term * _float32(b)[3 : 3 + WIDTH], 0),
                    term,
                    before[2, 1 : 1 + WIDTH] + np.where(is_selected, term, 0),
                    np.where(lane < old, before[3, 1 : 1 + WIDTH], 0) + np.where(is_selected, term, 0),
                )
            ):
                wanted[row, 1 : 1 + count] = values[:count]
            np.testing.assert_array_equal(out, wanted, err_msg=f"{count} lanes, {old} of them old")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16])
@pytest.mark.parametrize("step", [0, 1, 9, 15, 16])
def test_what_two_vectors_share_is_added_to_once(compiled, step, dtype):
    @compiled
    def kernel(out, a, factor, selected, old, step, next_selected, next_accumulated):
        simd.add_scaled_two(out[0], 1, a, 2, factor, selected, step, next_selected)
        simd.append_scaled_two(out[1], 1, a, 2, factor, selected, old, step, next_selected, next_accumulated)

    rng = np.random.default_rng(0)
    computed = np.float32 if dtype == np.uint16 else dtype
    a = rng.integers(0x3F00, 0x4000, 3 * WIDTH).astype(np.uint16)
    if dtype != np.uint16:
        a = rng.standard_normal(3 * WIDTH).astype(dtype)
    length, factor = WIDTH + step, computed(1.7)
    for overlap in range(length + 1):
        bits = int(rng.integers(1 << length))
        before = rng.standard_normal((2, 3 * WIDTH)).astype(computed)
        before[1, 1 + overlap : 1 + length] = np.nan
        out, old, all_lanes = before.copy(), (1 << overlap) - 1, (1 << WIDTH) - 1
        kernel(out, a, factor, bits & all_lanes, old & all_lanes, step, bits >> step, old >> step & all_lanes)
        is_selected = (bits >> np.arange(length) & 1).astype(bool)
        term = np.where(is_selected, factor * _float32(a)[2 : 2 + length], 0)
        before[1, 1 + overlap : 1 + length] = 0
        wanted = before.copy()
        wanted[:, 1 : 1 + length] += term
        np.testing.assert_array_equal(out, wanted, err_msg=f"{overlap} of {length} values are old")


@pytest.mark.parametrize(("is_masked", "expected"), [(True, 16), (False, 9)])
def test_loads_under_a_mask_wait_for_all_their_lanes(is_masked, expected, monkeypatch):
    monkeypatch.setattr(simd, "_has_masked_access", lambda context: is_masked)
    count = njit(lambda count: simd.num_read(count))
    assert count(9) == expected
    assert count(25) == 25


@pytest.mark.parametrize("is_masked", [True, False])
def test_gathers_are_of_processors_with_masked_instructions(is_masked, monkeypatch):
    monkeypatch.setattr(simd, "_has_masked_access", lambda context: is_masked)
    assert njit(lambda: simd.has_gather())() is is_masked


def test_what_is_not_kept_is_not_read(kernel):
    values = np.full(2 * WIDTH, np.nan, np.float32)
    out = np.zeros((4, 2 * WIDTH), np.float32)
    kernel(out, values, values, np.float32(1), 0, 0, (1 << WIDTH) - 1)
    assert np.isnan(out[1, 1 : 1 + WIDTH]).all()
    assert not out[[0, 2, 3]].any()
