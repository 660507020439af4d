"""One-dimensional .npy files that are written piece by piece, and read by pieces or mapped into memory."""

import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt


def _header(size: int, dtype: np.dtype[Any]) -> bytes:
    # numpy leaves room in it for the size to grow, so it can be written again over itself.
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


class NpyWriter:
    """A file of a length that is not known beforehand; closed by `finish` or `abandon`.

    numpy's own writing hides why the system refuses.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any] | type[np.generic]):
        self.dtype, self.size = np.dtype(dtype), 0
        self._file = path.open("wb")
        self._file.write(_header(0, self.dtype))

    def append(self, values: npt.NDArray[Any]) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        self._file.write(values.data)
        self.size += len(values)

    def finish(self) -> None:
        self._file.seek(0)
        self._file.write(_header(self.size, self.dtype))
        self._file.close()

    def abandon(self) -> None:
        with suppress(OSError):  # a full disk, which whoever abandons it has heard of
            self._file.close()


def save(path: Path, values: npt.NDArray[Any]) -> None:
    """Write a file of `values` ``[n]``."""
    writer = NpyWriter(path, values.dtype)
    try:
        writer.append(values)
        writer.finish()
    finally:
        writer.abandon()


@dataclass(frozen=True)
class StoredArray:
    """Values in a file from byte `offset` on, as every worker sees them."""

    path: str
    offset: int
    size: int
    dtype: str

    @classmethod
    def of_npy(cls, path: Path, dtype: np.dtype[Any] | type[np.generic], size: int) -> "StoredArray":
        """A .npy file of a known length and type. ValueError if it has another, or is missing."""
        dtype = np.dtype(dtype)
        header = _header(size, dtype)
        wanted = len(header) + size * dtype.itemsize
        try:
            with path.open("rb") as file:
                begin, found = file.read(len(header)), path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{path.name} is missing") from None
        if begin != header or found != wanted:
            raise ValueError(
                f"{path.name} is not the .npy file of {dtype} ({size},), which takes {wanted:,} bytes: "
                f"it has {found:,}"
            )
        return cls(str(path), len(header), size, dtype.str)

    def read(self, first: int, last: int) -> npt.NDArray[Any]:
        """Values ``[first:last]``, in memory of their own. ValueError if the file is shorter than it was."""
        dtype = np.dtype(self.dtype)
        found = np.fromfile(self.path, dtype, last - first, offset=self.offset + first * dtype.itemsize)
        if len(found) != last - first:
            raise ValueError(
                f"{self.path!r} is shorter than it was: {self.size:,} values were there when it was opened"
            )
        return found

    def map(self, mode: Literal["r", "c"] = "r") -> npt.NDArray[Any]:
        """All values, mapped into memory; modes are those of `numpy.memmap`."""
        return np.memmap(self.path, self.dtype, mode, self.offset, (self.size,))
