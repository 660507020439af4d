"""Events of users and items, as recommender data hold them, counted into a sparse matrix."""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from tqdm import tqdm

from cemb.pmi import readers

# A row of CSV must fit.
_CSV_BLOCK = 1 << 22
# Beyond, sums of float64 are not exact.
_MOST_EVENTS = 2**53


class _Names:
    """Names numbered as they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def add(self, column: Any) -> npt.NDArray[np.int32]:
        """The numbers of the names in an Arrow array without nulls; UUIDs as they are written."""
        import pyarrow

        is_uuid = column.type == pyarrow.uuid()
        encoded = (column.storage if is_uuid else column).dictionary_encode()
        places = encoded.indices.to_numpy()
        is_used = np.zeros(len(encoded.dictionary), np.bool_)
        is_used[places] = True
        values = encoded.dictionary.filter(pyarrow.array(is_used))
        if is_uuid:
            names = [str(uuid.UUID(bytes=value)) for value in values.to_pylist()]
        else:
            names = values.cast(pyarrow.string()).to_pylist()
        numbers = np.empty(len(is_used), np.int32)
        numbers[is_used] = [self.numbers.setdefault(name, len(self.numbers)) for name in names]
        found: npt.NDArray[np.int32] = numbers[places]
        return found

    def ordered(self, counts: npt.NDArray[Any]) -> tuple[list[str], npt.NDArray[np.int32]]:
        """Names by falling count, ties alphabetical, and the place of each number in that order."""
        names = list(self.numbers)
        order = sorted(range(len(names)), key=lambda i: (-counts[i], names[i]))
        final = np.empty(len(names), np.int32)
        final[order] = np.arange(len(names), dtype=np.int32)
        return [names[i] for i in order], final


def read_events(
    corpus: str | Sequence[str],
    columns: str | tuple[str, str] = "user,item",
    *,
    count_column: str | None = None,
    tally: readers.Tally | None = None,
) -> tuple[sp.csr_array, list[str], list[str]]:
    """How often each user met each item: ``(counts, users, items)`` of CSV, TSV or Parquet, one event a row.

    `corpus` names files, directories or globs, as `cemb.pmi.readers.find_files` takes them, which counts in
    `tally` what it leaves out; CSV may be compressed and starts with a line of names. `columns` are the two
    names, users first; their values are taken as strings, and a row that lacks one is no event. A row counts
    as one event, or as many as `count_column` says, a whole number; 0 or nothing there is none. `counts` is
    float64 ``[users, items]`` with sorted indices, rows and columns by falling count, ties alphabetical. It
    goes to `cemb.pmi.matrix.pmi_matrix` as counts of words and contexts do. Memory is some 30 bytes an event,
    and the names.

    Raises ValueError for a column that is not there, a count that is negative or no whole number, a damaged
    file, a row of CSV of more than 4 MiB, or no event at all, and what `find_files` does.
    """
    names = tuple(columns.split(",")) if isinstance(columns, str) else tuple(columns)
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise ValueError(f"events need two columns, as in user,item, got {columns!r}")
    if count_column is not None:
        names += (count_column,)
    if len(set(names)) < len(names):
        raise ValueError(f"count_column={count_column!r} is one of the columns {columns!r} already")
    users, items = _Names(), _Names()
    pairs, weights = [np.empty((2, 0), np.int32)], [np.empty(0)]
    with tqdm(desc="events read", unit="", unit_scale=True) as progress:
        for path in _paths(corpus, tally):
            for user, item, *weight in _batches(path, names):
                pairs.append(np.stack([users.add(user), items.add(item)]))
                weights += weight
                progress.update(len(user))
    rows, places = np.concatenate(pairs, axis=1)
    if not len(rows):
        wanted = " and ".join(map(repr, names[:2])) + (f", and {count_column!r} above 0" if names[2:] else "")
        raise ValueError(f"there is no event in {corpus!r}: no row has both {wanted}")
    numbers = np.ones(len(rows)) if count_column is None else np.concatenate(weights)
    if numbers.sum() >= _MOST_EVENTS:
        raise ValueError(f"the column {count_column!r} counts 2**53 events or more, which cannot be summed")
    ordered_users, row_of = users.ordered(np.bincount(rows, numbers))
    ordered_items, place_of = items.ordered(np.bincount(places, numbers))
    shape = (len(ordered_users), len(ordered_items))
    counts = sp.coo_array((numbers, (row_of[rows], place_of[places])), shape=shape).tocsr()
    counts.sort_indices()
    return counts, ordered_users, ordered_items


def fingerprint(corpus: str | Sequence[str]) -> str:
    """A string that changes when the files of `read_events` do. Raises what `find_files` does."""
    return readers.fingerprint(map(readers.File, _paths(corpus)))


def _paths(corpus: str | Sequence[str], tally: readers.Tally | None = None) -> list[Path]:
    names = [corpus] if isinstance(corpus, str) else list(corpus)
    paths = []
    for file in (file for name in names for file in readers.find_files(name, tally=tally)):
        if file.path is None or file.is_stream:
            raise ValueError(f"events are read from files, not from standard input or a stream: {file.name}")
        paths.append(file.path)
    return paths


def _batches(path: Path, names: Sequence[str]) -> Iterator[list[Any]]:
    """Users and items, as Arrow arrays without nulls, and, if there is a column of them, counts above 0."""
    pyarrow = readers.import_pyarrow("events")
    from pyarrow import compute

    read = _parquet_batches if path.suffix.lower() == ".parquet" else _csv_batches
    done = 0
    try:
        for batch in read(path, names):
            batch.validate(full=True)  # Arrow itself hands on places outside a dictionary
            columns = [batch.column(name) for name in names]
            is_event = compute.and_(columns[0].is_valid(), columns[1].is_valid())
            if columns[2:]:
                columns[2] = _counts(columns[2], f"{path}, column {names[2]!r}", done)
                is_event = compute.and_(is_event, compute.greater(columns[2], 0))
            done += len(batch)
            user, item, *counts = (column.filter(is_event) for column in columns)
            yield [user, item, *(column.to_numpy() for column in counts)]
    except (pyarrow.ArrowException, UnicodeDecodeError, *readers.DECOMPRESSION_ERRORS) as error:
        hint = ""
        if "straddling" in str(error):
            hint = f"; a row is longer than {_CSV_BLOCK >> 20} MiB, or a quote is left open"
        raise ValueError(f"{path} cannot be read: {error}{hint}") from None


def _counts(column: Any, where: str, num_before: int) -> Any:
    """An Arrow array of numbers as float64, 0 for null. ValueError naming the row if one is no count."""
    import pyarrow
    from pyarrow import compute

    def cast(values: Any) -> Any:
        try:
            whole = values.cast(pyarrow.int64())
        except pyarrow.ArrowException:  # "3.0" and 3.0 are whole, too
            whole = values.cast(pyarrow.float64()).cast(pyarrow.int64())
        if (compute.min(whole).as_py() or 0) < 0:
            raise pyarrow.ArrowInvalid("negative")
        return whole.fill_null(0).cast(pyarrow.float64())

    try:
        return cast(column)
    except pyarrow.ArrowException:
        for k in range(len(column)):
            try:
                cast(column[k : k + 1])
            except pyarrow.ArrowException:
                raise ValueError(
                    f"{where}, row {num_before + k + 1}: expected a whole number of events, 0 or more, got "
                    f"{column[k].as_py()!r}"
                ) from None
        raise


def _parquet_batches(path: Path, names: Sequence[str]) -> Iterator[Any]:
    with readers.open_parquet(path, names, shares=True) as file:
        yield from file.iter_batches(columns=list(names))


def _csv_batches(path: Path, names: Sequence[str]) -> Iterator[Any]:
    import pyarrow.csv

    delimiter = "\t" if {".tsv", ".tab"} & set(path.suffixes) else ","
    reading = {
        "read_options": pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK),
        "parse_options": pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
    }
    converting = pyarrow.csv.ConvertOptions(
        include_columns=list(names),
        column_types=dict.fromkeys(names, pyarrow.string()),
        strings_can_be_null=True,
        null_values=[""],
    )
    with _opened(path) as stream:
        try:
            batches = pyarrow.csv.open_csv(stream, convert_options=converting, **reading)
        except pyarrow.ArrowKeyError:
            with _opened(path) as again:
                readers.check_columns(str(path), names, pyarrow.csv.open_csv(again, **reading).schema.names)
            raise
        yield from batches


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file as a stream of Arrow's own, as its readers go on in the background when Python ends."""
    import pyarrow

    with path.open("rb") as file, tempfile.NamedTemporaryFile() as whole:
        compression, content = readers.decompressor(file, str(path))
        if compression == "xz":  # which Arrow does not know
            shutil.copyfileobj(content, whole)
            whole.flush()
            path, compression = Path(whole.name), None
        codec = {"bzip2": "bz2"}.get(compression or "", compression)
        with pyarrow.OSFile(str(path)) as native:
            yield pyarrow.CompressedInputStream(native, codec) if codec else native
