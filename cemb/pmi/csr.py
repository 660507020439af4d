"""Sparse matrices in folders: written row block by row block, read by blocks or mapped into memory.

A folder holds ``indptr.npy`` (int64), ``indices.npy`` (int32, or int64 from 2^31 cells on, as scipy wants
it), ``data.npy`` and ``manifest.json``, which is written last.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from cemb import files
from cemb.pmi.npy import NpyWriter, StoredArray

VERSION = 2
_WIDE_FROM = 2**31
_CHECKED_CELLS = 2**18  # at once
_FIELDS = {"shape": list, "num_cells": int, "index_dtype": str, "data_dtype": str}
_REMEDY = "remove it, and make it again"


class CsrWriter:
    """Writes a matrix into a folder of `files.atomic_directory`, rows in order; closes its files at the end.

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
            "index_dtype": self._indices.dtype.name,
            "data_dtype": self._data.dtype.name,
            **manifest,
        }
        text = json.dumps(fields, indent=1) + "\n"
        (self._folder / "manifest.json").write_text(text, encoding="utf-8")


class CsrFolder:
    """A matrix in a folder, whose files are checked against their sums, and its cells for their places.

    Raises:
        FileNotFoundError: there is no manifest, as in a folder whose writing was stopped.
        DamagedError: the files are not those that were written, or no matrix: the row pointers do not rise
            from 0 to the number of cells, or columns do not rise within a row, or are out of range.
        ValueError: the folder has another version of the format.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = files.read_manifest(self.folder, VERSION, _FIELDS, _REMEDY)
        shape, self.num_cells = self.manifest["shape"], self.manifest["num_cells"]
        try:
            if [*map(type, shape)] != [int, int]:
                raise ValueError(f"shape of manifest.json is {shape}, which should be two integers")
            index_dtype, dtype = (np.dtype(self.manifest[name]) for name in ("index_dtype", "data_dtype"))
            if index_dtype not in (np.int32, np.int64) or dtype.kind not in "iuf":
                raise ValueError(f"manifest.json tells of columns {index_dtype} and values {dtype}")
            self.shape: tuple[int, int] = tuple(shape)
            self._files = {
                name: StoredArray.of_npy(self.folder / f"{name}.npy", dtype, size)
                for name, dtype, size in (
                    ("indptr", np.dtype(np.int64), self.shape[0] + 1),
                    ("indices", index_dtype, self.num_cells),
                    ("data", dtype, self.num_cells),
                )
            }
            self._check_cells()
        except (ValueError, TypeError) as error:
            raise files.damaged(self.folder, str(error), _REMEDY) from None

    def _check_cells(self) -> None:
        indptr = self.read("indptr", 0, self.shape[0] + 1)
        if indptr[0] != 0 or indptr[-1] != self.num_cells or (np.diff(indptr) < 0).any():
            raise ValueError(f"indptr.npy does not rise from 0 to {self.num_cells:,}")
        before = np.empty(0, np.int64)
        for first in range(0, self.num_cells, _CHECKED_CELLS):
            columns = self.read("indices", first, min(first + _CHECKED_CELLS, self.num_cells))
            if columns.min() < 0 or columns.max() >= self.shape[1]:
                raise ValueError(f"indices.npy has columns outside [0, {self.shape[1]:,})")
            # Where a column is not above the one before it, a row begins.
            falls = np.flatnonzero(np.diff(np.append(before, columns)) <= 0) + first + 1 - len(before)
            if (indptr[np.searchsorted(indptr, falls)] != falls).any():
                raise ValueError("indices.npy has columns that do not rise within a row")
            before = columns[-1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._files["data"].dtype)

    def read(self, name: str, first: int, last: int) -> npt.NDArray[Any]:
        """Values ``[first:last]`` of ``"indptr"``, ``"indices"`` or ``"data"``, in memory of their own."""
        return self._files[name].read(first, last)

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
        indices, data = (np.asarray(self._files[name].map("c")) for name in ("indices", "data"))
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
