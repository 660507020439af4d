"""Events of users and items, as recommender data hold them, counted into a sparse matrix."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from tqdm import tqdm

from cemb.pmi import readers


class _Names:
    """Names numbered as they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def add(self, column: Any) -> npt.NDArray[np.int32]:
        """The numbers of the strings of an Arrow array without nulls."""
        encoded = column.dictionary_encode()
        numbers = [
            self.numbers.setdefault(name, len(self.numbers)) for name in encoded.dictionary.to_pylist()
        ]
        found: npt.NDArray[np.int32] = np.array(numbers, np.int32)[encoded.indices.to_numpy()]
        return found

    def ordered(self, counts: npt.NDArray[Any]) -> tuple[list[str], npt.NDArray[np.int32]]:
        """Names by falling count, ties alphabetical, and the place of each number in that order."""
        names = list(self.numbers)
        order = sorted(range(len(names)), key=lambda i: (-counts[i], names[i]))
        final = np.empty(len(names), np.int32)
        final[order] = np.arange(len(names), dtype=np.int32)
        return [names[i] for i in order], final


def read_events(
    corpus: str | Sequence[str], columns: str | tuple[str, str] = "user,item"
) -> tuple[sp.csr_array, list[str], list[str]]:
    """How often each user met each item: ``(counts, users, items)`` of CSV, TSV or Parquet, one event a row.

    `corpus` names files, directories or globs, as `cemb.pmi.readers.find_files` takes them; CSV may be
    compressed and starts with a line of names. `columns` are the two names, users first; their values are
    taken as strings, and a row that lacks one is no event. `counts` is float64 ``[users, items]`` with sorted
    indices, rows and columns by falling count, ties alphabetical. It goes to `cemb.pmi.matrix.pmi_matrix` as
    counts of words and contexts do. Memory is some 30 bytes an event, and the names.

    Raises ValueError for a column that is not there, a damaged file, or no event at all, and what
    `find_files` does.
    """
    names = tuple(columns.split(",")) if isinstance(columns, str) else tuple(columns)
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise ValueError(f"events need two columns, as in user,item, got {columns!r}")
    paths = [file.path for file in _files(corpus)]
    users, items = _Names(), _Names()
    pairs = [np.empty((2, 0), np.int32)]
    with tqdm(desc="events read", unit="", unit_scale=True) as progress:
        for path in paths:
            assert path is not None
            for user, item in _batches(path, names):
                pairs.append(np.stack([users.add(user), items.add(item)]))
                progress.update(len(user))
    rows, places = np.concatenate(pairs, axis=1)
    if not len(rows):
        raise ValueError(f"there is no event in {corpus!r}: no row has both {names[0]!r} and {names[1]!r}")
    ordered_users, row_of = users.ordered(np.bincount(rows))
    ordered_items, place_of = items.ordered(np.bincount(places))
    shape = (len(ordered_users), len(ordered_items))
    counts = sp.coo_array((np.ones(len(rows)), (row_of[rows], place_of[places])), shape=shape).tocsr()
    counts.sort_indices()
    return counts, ordered_users, ordered_items


def fingerprint(corpus: str | Sequence[str]) -> str:
    """A string that changes when the files of `read_events` do. Raises what `find_files` does."""
    return readers.fingerprint(_files(corpus))


def _files(corpus: str | Sequence[str]) -> list[readers.File]:
    names = [corpus] if isinstance(corpus, str) else list(corpus)
    if readers.STDIN in names:
        raise ValueError("events are read from files, not from standard input")
    return [file for name in names for file in readers.find_files(name)]


def _batches(path: Path, names: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    """Users and items, as Arrow arrays of strings without nulls."""
    pyarrow = readers.import_pyarrow("events")
    from pyarrow import compute

    read = _parquet_batches if path.suffix.lower() == ".parquet" else _csv_batches
    try:
        for batch in read(path, names):
            user, item = (batch.column(name).cast(pyarrow.string()) for name in names)
            is_event = compute.and_(user.is_valid(), item.is_valid())
            yield user.filter(is_event), item.filter(is_event)
    except (pyarrow.ArrowException, *readers.DECOMPRESSION_ERRORS) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _check_columns(path: Path, names: tuple[str, ...], seen: list[str]) -> None:
    for name in names:
        if name not in seen:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(seen)}")


def _parquet_batches(path: Path, names: tuple[str, ...]) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _check_columns(path, names, file.schema_arrow.names)
        yield from file.iter_batches(columns=list(names))


def _csv_batches(path: Path, names: tuple[str, ...]) -> Iterator[Any]:
    import pyarrow.csv

    delimiter = "\t" if {".tsv", ".tab"} & set(path.suffixes) else ","
    with path.open("rb") as file:
        head = readers.decompressor(file)[1].read(1 << 16)
    header = head.partition(b"\n")[0].decode("utf-8-sig", "replace").rstrip("\r")
    _check_columns(path, names, next(csv.reader([header], delimiter=delimiter), []))
    with path.open("rb") as file:
        yield from pyarrow.csv.open_csv(
            readers.decompressor(file)[1],
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=list(names),
                column_types=dict.fromkeys(names, pyarrow.string()),
                strings_can_be_null=True,
                null_values=[""],
            ),
        )
