"""Sparse matrices in folders: written row block by row block, read by blocks or mapped into memory.

A folder holds ``indptr.npy`` (int64), ``indices.npy`` (int32, or int64 from 2^31 cells on, as scipy wants
it), ``data.npy`` and ``manifest.json``, which is written last.
"""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from cemb.files import write_atomic

VERSION = 1
_WIDE_FROM = 2**31
_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file is too large",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say what could not be written where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"{_FULL[error.errno]} while writing {str(path)!r}; nothing half-written is used: "
            "make room and run it again",
        ) from error


def _header(file: BinaryIO, size: int, dtype: np.dtype[Any]) -> int:
    # numpy leaves room in it for the size to grow, so it can be written again over itself.
    description = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": (size,),
    }
    np.lib.format.write_array_header_1_0(file, description)
    return file.tell()


class NpyWriter:
    """A one-dimensional .npy file of a length that is not known beforehand."""

    def __init__(self, path: Path, dtype: np.dtype[Any] | type[np.generic]):
        self.dtype, self.size = np.dtype(dtype), 0
        self._file = path.open("wb")
        self._start = _header(self._file, 0, self.dtype)

    def append(self, values: npt.NDArray[Any]) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        self._file.write(values.data)
        self.size += len(values)

    def finish(self) -> None:
        self._file.seek(0)
        if _header(self._file, self.size, self.dtype) != self._start:
            raise RuntimeError("the header of a .npy file has grown")
        self._file.close()

    def abandon(self) -> None:
        with suppress(OSError):  # a full disk, which whoever abandons it has heard of
            self._file.close()


class CsrWriter:
    """Writes a matrix into an existing folder, rows in order; a context, which closes its files.

    Args:
        max_cells: bound on the number of cells; says how wide indices must be.
    """

    def __init__(
        self, folder: Path, num_columns: int, dtype: np.dtype[Any] | type[np.generic], max_cells: int
    ):
        self._folder, self._num_columns = folder, num_columns
        self._indptr = NpyWriter(folder / "indptr.npy", np.int64)
        self._indptr.append(np.zeros(1, np.int64))
        self._indices = NpyWriter(folder / "indices.npy", np.int32 if max_cells < _WIDE_FROM else np.int64)
        self._data = NpyWriter(folder / "data.npy", dtype)

    def __enter__(self) -> "CsrWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for writer in (self._indptr, self._indices, self._data):
            writer.abandon()

    @property
    def num_cells(self) -> int:
        """Cells written so far."""
        return self._data.size

    def append(
        self, row_cells: npt.NDArray[Any], columns: npt.NDArray[Any], values: npt.NDArray[Any]
    ) -> None:
        """Add rows of so many cells ``[rows]``; columns and values ``[cells]`` may follow by `extend`."""
        self._indptr.append(self.num_cells + np.cumsum(row_cells, dtype=np.int64))
        self.extend(columns, values)

    def extend(self, columns: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Add cells ``[cells]`` to the rows last added."""
        self._indices.append(columns)
        self._data.append(values)

    def finish(self, **manifest: object) -> None:
        """Close the files and write the manifest, which makes the folder whole."""
        for writer in (self._indptr, self._indices, self._data):
            writer.finish()
        fields = {
            "version": VERSION,
            "shape": [self._indptr.size - 1, self._num_columns],
            "num_cells": self.num_cells,
            "data_dtype": self._data.dtype.name,
            **manifest,
        }
        write_atomic(self._folder / "manifest.json", json.dumps(fields, indent=1) + "\n")


class CsrFolder:
    """A matrix in a folder.

    Raises:
        FileNotFoundError: there is no manifest, as in a folder whose writing was stopped.
        ValueError: the files are not those that the manifest tells of.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{str(self.folder)!r} holds no matrix: it has no manifest.json, which is written last"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(self.folder / 'manifest.json')!r} is not JSON: {error}") from None
        if self.manifest.get("version") != VERSION or "num_cells" not in self.manifest:
            raise ValueError(
                f"{str(self.folder)!r} holds no matrix of version {VERSION}: its manifest has version "
                f"{self.manifest.get('version')!r}"
            )
        self.shape: tuple[int, int] = tuple(self.manifest["shape"])
        self.num_cells: int = self.manifest["num_cells"]
        self._headers: dict[str, tuple[int, np.dtype[Any]]] = {}
        sizes = {"indptr": self.shape[0] + 1, "indices": self.num_cells, "data": self.num_cells}
        for name, size in sizes.items():
            path = self.folder / f"{name}.npy"
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                (found,), _, dtype = np.lib.format.read_array_header_1_0(file)
                self._headers[name] = file.tell(), dtype
            held = (path.stat().st_size - self._headers[name][0]) // dtype.itemsize
            if not found == held == size:
                raise ValueError(
                    f"{str(path)!r} is damaged: the manifest tells of {size:,} values, its header of "
                    f"{found:,}, and it holds {held:,}"
                )

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._headers["data"][1]

    def read(self, name: str, first: int, last: int) -> npt.NDArray[Any]:
        """Values ``[first:last]`` of ``"indptr"``, ``"indices"`` or ``"data"``, in memory of their own."""
        start, dtype = self._headers[name]
        return np.fromfile(
            self.folder / f"{name}.npy", dtype, last - first, offset=start + first * dtype.itemsize
        )

    def blocks(self, max_cells: int) -> Iterator[tuple[int, sp.csr_array]]:
        """Blocks of whole rows of at most `max_cells` cells, or of one row, each with its first row."""
        indptr = self.read("indptr", 0, self.shape[0] + 1)
        for first, last in row_blocks(indptr, max_cells):
            start, end = indptr[first], indptr[last]
            indices, data = self.read("indices", start, end), self.read("data", start, end)
            rows = (indptr[first : last + 1] - start).astype(indices.dtype)
            yield first, sp.csr_array((data, indices, rows), shape=(last - first, self.shape[1]))

    def matrix(self) -> sp.csr_array:
        """The matrix with its cells mapped into memory: only what is used is read, and nothing is copied.

        Writing to it changes the mapping, never the files.
        """
        paths = (self.folder / f"{name}.npy" for name in ("indices", "data"))
        indices, data = (np.asarray(np.load(path, mmap_mode="c")) for path in paths)
        indptr = self.read("indptr", 0, self.shape[0] + 1).astype(indices.dtype)
        return sp.csr_array((data, indices, indptr), shape=self.shape, copy=False)


def row_blocks(indptr: npt.NDArray[Any], max_cells: int) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of blocks of at most `max_cells` cells, or of one row."""
    first, num_rows = 0, len(indptr) - 1
    while first < num_rows:
        last = int(np.searchsorted(indptr, indptr[first] + max_cells, side="right")) - 1
        last = min(max(last, first + 1), num_rows)
        yield first, last
        first = last
