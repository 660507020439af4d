"""Checks where kernels are entered, which read and write memory without looking at its bounds."""

from typing import Any


def check_array(name: str, array: Any, shape: tuple[int, ...], *dtypes: Any) -> None:
    """Raise ValueError unless an array or a tensor has a shape and one of the `dtypes`, and is contiguous."""
    if array.shape != shape or array.dtype not in dtypes or not _is_contiguous(array):
        wanted = " or ".join(_name(dtype) for dtype in dtypes)
        raise ValueError(
            f"{name} must be contiguous {wanted} {list(shape)}, got {_name(array.dtype)} {list(array.shape)}"
            + ("" if _is_contiguous(array) else ", not contiguous")
        )


def _is_contiguous(array: Any) -> bool:
    return bool(array.flags.c_contiguous if hasattr(array, "flags") else array.is_contiguous())


def _name(dtype: Any) -> str:
    return getattr(dtype, "__name__", str(dtype))
