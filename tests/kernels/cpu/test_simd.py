"""Vector operations on segments, with masked instructions and with what stands in for them."""

import ctypes
import functools
import itertools
import mmap

import numpy as np
import pytest
from llvmlite import ir
from numba import njit

from cemb import hashing
from cemb.kernels.cpu import simd

WIDTH = simd.LANES
LENGTHS = [*range(71), 100]
SIZE = 320
DTYPES = [np.float32, np.float64, np.uint16]


def _kernel(out, a, b, places, sides, factor, mask, length, old):
    i, j = places
    simd.multiply(out[0], i, a, sides, factor, mask, length)
    simd.copy_scaled(out[1], i, b, j, factor, mask, length)
    simd.copy_scaled(out[2], i, b, j, factor, None, length)
    simd.add_scaled(out[3], i, b, j, factor, length, None)
    simd.add_scaled(out[4], i, b, j, factor, length, old)


@pytest.fixture(params=[True, False], ids=["masked", "plain"])
def is_masked(request, monkeypatch):
    monkeypatch.setattr(simd, "_has_masked_access", lambda context: request.param)
    return request.param


@pytest.fixture
def kernel(is_masked):
    return _kernel_of(is_masked)


@functools.cache
def _kernel_of(is_masked):
    """Compiled for each type by the first test that calls it, which has set what is masked."""
    return njit(_kernel)


def _float32(values):
    """Values as kernels compute with them: uint16 has the upper halves of float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _computed(dtype):
    return np.float32 if dtype == np.uint16 else dtype


def _values(rng, dtype, size=SIZE):
    if dtype == np.uint16:
        return rng.integers(0x3F00, 0x4000, size).astype(dtype) | (rng.integers(2, size=size) << 15).astype(
            dtype
        )
    return rng.standard_normal(size).astype(dtype)


def _only(values, *segments):
    """The values of some segments, each a start and a length; NaN elsewhere."""
    kept = np.full_like(values, 0x7FC0 if values.dtype == np.uint16 else np.nan)
    for start, length in segments:
        kept[start : start + length] = values[start : start + length]
    return kept


def _mask(rng, position, length):
    """Random words, with two more than have bits of the segment; and its bits."""
    words = rng.integers(1 << 16, size=-(-(position + length) // WIDTH) + 2).astype(np.uint16)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
    return words, bits[position : position + length]


def _expect(out, a, b, places, sides, factor, is_kept, length, old):
    """What `_kernel` writes to `out`."""
    (i, j), (left, right) = places, sides[:2]
    here = slice(i, i + length)
    with np.errstate(invalid="ignore"):
        product = factor * _float32(a)[left : left + length] * _float32(a)[right : right + length]
        term = factor * _float32(b)[j : j + length]
        out[0, here] = np.where(is_kept, product, 0)
        out[1, here] = np.where(is_kept, term, 0)
        out[2, here] = term
        out[3, here] += term
        out[4, here] = np.where(np.arange(length) < old, out[4, here], 0) + term


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_of_all_lengths_are_written_and_nothing_else(kernel, dtype):
    rng = np.random.default_rng(0)
    factor = _computed(dtype)(1.7)
    for length in LENGTHS:
        for old in (-3, 0, length // 2, length, length + 40):
            i, j, left, right = map(int, rng.integers(1, SIZE - length - 20, 4))
            if old > length:
                right = left + right % 20  # they overlap, or are the same one
            position = int(rng.integers(48))
            words, is_kept = _mask(rng, position, length)
            a, b = _values(rng, dtype), _only(_values(rng, dtype), (j, length))
            a = _only(a, (left, length), (right, length))
            before = rng.standard_normal((5, SIZE)).astype(_computed(dtype))
            before[:3, i : i + length] = np.nan  # never read
            before[4, i + max(old, 0) : i + max(old, length)] = np.nan
            out, expected = before.copy(), before.copy()
            sides = left, right, *map(int, rng.integers(-(2**62), 2**62, 2))
            kernel(out, a, b, (i, j), sides, factor, (words, position), length, old)
            _expect(expected, a, b, (i, j), sides, factor, is_kept, length, old)
            assert not np.isnan(expected[:, i : i + length]).any()
            np.testing.assert_array_equal(out, expected, err_msg=f"{length} values, {old} of them old")


def test_bits_of_a_mask_are_found_at_any_position(kernel):
    rng = np.random.default_rng(1)
    a, factor = _values(rng, np.float32), np.float32(-0.3)
    for length in (1, 7, 15, 16, 17, 31, 32, 33, 70):
        for position in range(50):
            words, is_kept = _mask(rng, position, length)
            out, expected = np.zeros((2, 5, SIZE), np.float32)
            arguments = (3, 5), (7, 11, 0, 0), factor
            kernel(out, a, a, *arguments, (words, position), length, 0)
            _expect(expected, a, a, *arguments, is_kept, length, 0)
            np.testing.assert_array_equal(out, expected, err_msg=f"{length} values from bit {position} on")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_kept_is_zero_whatever_it_was(kernel, dtype):
    source, factor = _only(np.zeros(SIZE, dtype)), _computed(dtype)(1)
    for length in (1, 15, 16, 40):
        out = np.ones((5, SIZE), _computed(dtype))
        words = np.zeros(5, np.uint16)
        kernel(out, source, source, (1, 2), (3, 60, 0, 0), factor, (words, 0), length, 0)
        assert not out[:2, 1 : 1 + length].any()
        assert np.isnan(out[2:, 1 : 1 + length]).all()
        assert (out[:, :1] == 1).all() and (out[:, 1 + length :] == 1).all()


def _between_guards(values, *, is_last):
    """A copy that ends, or begins, where a page does that may not be accessed."""
    page = mmap.PAGESIZE
    assert values.nbytes <= page
    whole = np.frombuffer(mmap.mmap(-1, 3 * page), np.uint8)
    for guard in (0, 2 * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.ctypes.data + guard), page, 0) == 0
    first = 2 * page - values.nbytes if is_last else page
    copy = whole[first : first + values.nbytes].view(values.dtype)
    copy[:] = values.ravel()
    return copy.reshape(values.shape)


# Where this fails, the process ends: a load that is thrown away shows in no other way.
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_around_segments_is_not_accessed(is_masked, dtype):
    @njit
    def kernel(outs, a, factor, mask, length):
        simd.multiply(outs[0], 0, a, (0, 0, 0, 0), factor, mask, length)
        simd.copy_scaled(outs[1], 0, a, 0, factor, mask, length)
        simd.add_scaled(outs[2], 0, a, 0, factor, length, length // 2)

    rng = np.random.default_rng(2)
    for length, is_last in itertools.product((*range(1, 40), 64, 70), (True, False)):
        a = _between_guards(_values(rng, dtype, length), is_last=is_last)
        zeros = np.zeros(length, _computed(dtype))
        outs = tuple(_between_guards(zeros, is_last=is_last) for _ in range(3))
        position = length % 23
        words, _ = _mask(rng, position, length)
        mask = _between_guards(words, is_last=is_last), position
        kernel(outs, a, _computed(dtype)(2), mask, length)
        np.testing.assert_array_equal(outs[2], 2 * _float32(a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns_dtype", [np.uint16, np.uint32])
def test_gathered_rows_are_summed_with_their_values(dtype, columns_dtype):
    @njit
    def kernel(out, i, source, columns, values, first, last):
        simd.add_gathered(out, i, source, columns, values, first, last)

    rng = np.random.default_rng(3)
    computed = _computed(dtype)
    rows, terms = 40_000, 60  # numbers of rows need all 16 bits
    source = _only(np.zeros(rows * WIDTH, dtype))
    for first, last in [(t, t + n) for n in (*range(10), 50) for t in (0, 3, 10)]:
        columns = rng.integers(rows, size=terms).astype(columns_dtype)
        columns[first:last:7] = rows - 1
        values = _only(rng.standard_normal(terms).astype(computed), (first, last - first))
        read = source.copy()
        for column in columns[first:last]:
            read[WIDTH * int(column) :][:WIDTH] = _values(rng, dtype, WIDTH)
        out = rng.standard_normal(4 * WIDTH).astype(computed)
        expected, bound = out.astype(np.float64), np.abs(out).astype(np.float64)
        kernel(out, 5, read, columns, values, first, last)
        picked = _float32(read).astype(np.float64).reshape(rows, WIDTH)[columns[first:last]]
        expected[5 : 5 + WIDTH] += values[first:last].astype(np.float64) @ picked
        bound[5 : 5 + WIDTH] += np.abs(values[first:last]).astype(np.float64) @ np.abs(picked)
        # A sum of n terms is off by at most n roundings of what it adds up.
        assert np.all(np.abs(out - expected) <= (last - first) * np.finfo(computed).eps * bound)


def test_hashes_are_finished_as_the_specification_says():
    @njit
    def kernel(out, i, first, steps, row, num_starts):
        simd.finish_hash(out, i, first, steps, row, num_starts)

    rng = np.random.default_rng(4)
    for num_starts in (1, 2, 1000, 2**31 + 5, 2**32 - 1):
        keys = rng.integers(2**64, size=WIDTH, dtype=np.uint64)
        keys[:3] = 0, 2**64 - 1, 2**63
        first, steps = int(rng.integers(2**64, dtype=np.uint64)), np.zeros((3, WIDTH), np.uint64)
        for lane, key in enumerate(map(int, keys)):
            product = (key ^ key >> 30) * hashing.MULTIPLIER_1
            steps[1, lane] = (product - first) % 2**64
        out = np.full(3 * WIDTH, 7, np.uint32)
        kernel(out, 5, np.uint64(first), steps, 1, np.uint32(num_starts))
        expected = np.full(3 * WIDTH, 7, np.uint32)
        expected[5 : 5 + WIDTH] = [(hashing.mix(int(key)) >> 32) * num_starts >> 32 for key in keys]
        np.testing.assert_array_equal(out, expected)


def test_bits_say_which_values_reach_a_threshold():
    @njit
    def kernel(values, i, threshold):
        return simd.at_least(values, i, threshold)

    rng = np.random.default_rng(5)
    thresholds = [0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]
    for threshold in [*thresholds, *map(int, rng.integers(1 << 16, size=20))]:
        values = rng.integers(1 << 16, size=3 * WIDTH).astype(np.uint16)
        values[7 : 7 + len(thresholds)] = rng.permutation(thresholds)
        values[7 + len(thresholds)] = threshold
        expected = sum(1 << lane for lane in range(WIDTH) if int(values[7 + lane]) >= threshold)
        assert kernel(values, 7, threshold) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_values_are_those_of_arrays(dtype):
    @njit
    def kernel(array, i):
        return simd.value_at(array, i)

    values = _values(np.random.default_rng(6), dtype)
    if dtype == np.uint16:
        values = np.arange(1 << 16).astype(dtype)[::7].copy()
    found = np.array([kernel(values, i) for i in range(len(values))], _computed(dtype))
    np.testing.assert_array_equal(found, _float32(values))


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


def test_all_that_vectors_of_the_next_segments_access_is_prefetched(is_masked, monkeypatch):
    monkeypatch.setattr(simd.Segments, "prefetch", _mark)
    kernel = njit(lambda *arguments: simd.multiply(*arguments))
    for length in LENGTHS[1:]:
        weight, out = np.ones(SIZE, np.float32), np.ones(100, np.float32)
        words = np.full(10, 0xFFFF, np.uint16)
        kernel(out, 0, weight, (0, 0, 20, 170), np.float32(1), (words, 0), length)
        # Masked loads wait for all their lanes.
        accessed = max(length, WIDTH) if is_masked else length
        _check_prefetched(weight, [(20, accessed), (170, accessed)])


def test_whole_segments_are_prefetched(monkeypatch):
    monkeypatch.setattr(simd.Segments, "prefetch", _mark)
    kernel = njit(simd.prefetch_segment.py_func)
    for length in LENGTHS[1:]:
        array = np.ones(SIZE, np.float32)
        kernel(array, 20, length)
        _check_prefetched(array, [(20, length)])


def test_prefetches_of_any_place_are_safe():
    @njit
    def kernel(array, i):
        simd.prefetch(array, i)
        simd.prefetch_segment(array, i, 40)

    for dtype in (np.float32, np.float64, np.uint16, np.int32):
        array = np.ones(3, dtype)
        for i in (0, 2, 3, -1, 10**6, -(10**6), 2**60, -(2**60)):
            kernel(array, i)
        assert (array == 1).all()
