"""What a GPU's memory and caches allow at best: the bandwidths that a step's floor is made of."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values that one program handles, and its warps: the fastest counts.
_SHAPES = ((512, 2), (512, 4), (1024, 4), (2048, 4), (2048, 8))
_ROW, _BLOCK = 100, 32  # values: a row of 400 bytes, a block of 128
_REPEATS = 10


@triton.jit
def _segment_kernel(
    array: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    num_places: tl.tensor,
    STRIDE: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENTS: tl.constexpr,
) -> None:
    """Sum SEGMENTS segments of LENGTH values or, where there is no `out`, add one to each value."""
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = (segment < n) & (column < LENGTH)
    # The finalizer of MurmurHash3; reading places from memory would be traffic of its own.
    x = segment.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    x = (x ^ (x >> 16)).to(tl.uint64)
    place = array + (((x * num_places) >> 32) * STRIDE).to(tl.int64) + column
    if out is None:
        tl.atomic_add(place, tl.full([SEGMENTS, WIDTH], 1.0, tl.float32), mask=mask, sem="relaxed")
    else:
        total = tl.sum(tl.sum(tl.load(place, mask=mask, other=0.0), axis=1), axis=0)
        tl.store(out + tl.program_id(0), total)


def num_programs(n: int, length: int, shape: tuple[int, int]) -> int:
    """Programs that `launch_segments` starts for `n` segments."""
    programs: int = triton.cdiv(n, shape[0] // triton.next_power_of_2(length))
    return programs


def launch_segments(
    array: Tensor, n: int, length: int, stride: int, out: Tensor | None, shape: tuple[int, int] = _SHAPES[0]
) -> None:
    """Sum `n` segments of `length` values of the float32 `array`, a partial sum a program, or add to them.

    Segment i starts at `stride` times a hash of i. `out`, float32 ``[num_programs]``, takes the sums; without
    it, one is added to each of their values. `shape` is a program's values and warps.
    """
    width = triton.next_power_of_2(length)
    places = (array.numel() - length) // stride + 1
    _segment_kernel[(num_programs(n, length, shape),)](
        array,
        out,
        n,
        places,
        STRIDE=stride,
        LENGTH=length,
        WIDTH=width,
        SEGMENTS=shape[0] // width,
        num_warps=shape[1],
    )


def _best_s(kernel: Callable[[], object]) -> float:
    """The shortest of several launches on the device."""
    kernel()
    best = float("inf")
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kernel()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def measure_bandwidths(device: str = "cuda") -> dict[str, float]:
    """Bandwidths of a GPU, each the best of launches of several shapes that fill it.

    Returns:
        ``stream_gb_per_s``, bytes read and written by a copy of 1 GiB; ``random_rows_per_s``, rows of 400
        bytes read from 4 GiB; ``random_values_per_s``, single values of it; ``cached_blocks_per_s``,
        segments of 32 values at any place of a pool of 1 MiB, which stays in cache;
        ``cached_values_per_s``, single values of it; and each of the last four as ``..._adds_per_s``, the
        same added to atomically.
    """
    with torch.cuda.device(device):
        large, pool = torch.ones(2**30, device=device), torch.ones(2**18, device=device)
        halves = large[: 2**28], large[2**28 : 2**29]
        found = {"stream_gb_per_s": 2 * 2**30 / _best_s(lambda: halves[0].copy_(halves[1])) / 1e9}
        for name, array, length, stride, n in (
            ("random_row", large, _ROW, _ROW, 2**21),
            ("random_value", large, 1, 1, 2**25),
            ("cached_block", pool, _BLOCK, 1, 2**22),
            ("cached_value", pool, 1, 1, 2**26),
        ):
            sums = torch.empty(max(num_programs(n, length, shape) for shape in _SHAPES), device=device)
            for suffix, out in (("s", sums), ("_adds", None)):
                launches = [
                    functools.partial(launch_segments, array, n, length, stride, out, x) for x in _SHAPES
                ]
                found[f"{name}{suffix}_per_s"] = n / min(map(_best_s, launches))
    return found
