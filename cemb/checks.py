"""Checks of numbers that are asked for: errors name what was asked, its range, and what was got."""

import functools
from numbers import Integral, Real
from typing import Any


def check_integers(least: int, largest: int | None = None, /, **values: Any) -> None:
    """Raise ValueError for the first of `values` that is no integer from `least` to `largest`.

    None stands for an option that is not used, and passes.
    """
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, (int, Integral)) or isinstance(value, bool):  # int first, which is quick
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if int(value) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if largest is not None and int(value) > largest:
            raise ValueError(f"{name} must be at most {largest}, got {value}")


def check_reals(interval: str, /, **values: Any) -> None:
    """Raise ValueError for the first of `values` outside an interval such as ``"[0, 1)"`` or ``"(0, inf)"``.

    NaN lies in none, and infinity in none that is open there. None passes, as for `check_integers`.
    """
    low, high = _ends(interval)
    for name, value in values.items():
        if value is None:
            continue
        is_real = isinstance(value, (float, int, Real)) and not isinstance(value, bool)
        if not (
            is_real
            and (value > low if interval[0] == "(" else value >= low)
            and (value < high if interval[-1] == ")" else value <= high)
        ):
            raise ValueError(f"{name} must lie in {interval}, got {value!r}")


@functools.cache
def _ends(interval: str) -> tuple[float, float]:
    low, high = map(float, interval[1:-1].split(","))
    return low, high
