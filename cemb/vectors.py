"""Word vectors in the formats that other tools read and write; numpy alone, and no pickle is read.

Formats, as `read` tells them by their content, and `write` by name:

- **word2vec-text**: a line with the numbers of rows and columns, then a row a line: its word and its
  numbers, parted by spaces (Mikolov et al., word2vec.c, 2013).
- **word2vec-binary**: the same first line, then for each row the word, a space, and little-endian float32
  values; word2vec.c ends rows with a line break, gensim does not.
- **glove**: word2vec-text without its first line (Pennington, Socher and Manning, 2014).
- **keyedvectors**: what `gensim.models.KeyedVectors.save` writes, in one file. It is a pickle, so it is only
  written.
- **npy**: a folder of ``vectors.npy``, float32 ``[n, dim]``, and ``words.txt``, a word a line.
- **tsv**: a folder of ``vectors.tsv`` and ``metadata.tsv``, as TensorBoard's embedding projector takes them:
  numbers parted by tabs, and a word a line with no header, since there is but one column.

Words that would be read back as something else are refused by name: of all formats empty ones, and those
that hold white space, as `str.split` has it, of word2vec-text, word2vec-binary and glove, or that hold line
breaks, as `str.splitlines` has them, or tabs, of npy and tsv. keyedvectors take any other word. Escaped, runs
of white space are written as ``_``. Numbers in text have 9 significant digits and a point, which give back
the same float32, and tell a row of one column from a first line of word2vec.
"""

import gzip
import io
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cemb import files

FORMATS = ("word2vec-text", "word2vec-binary", "glove", "keyedvectors", "npy", "tsv")
Format: TypeAlias = Literal[*FORMATS]  # type: ignore[valid-type]
FOLDERS = ("npy", "tsv")  # formats that are folders
READABLE = "word2vec text and binary and GloVe text are read, plain or compressed by gzip"
_GZIP = b"\x1f\x8b"
_MOST_DEFLATED = 1032  # bytes that one of a deflated stream stands for, at most
_LONGEST_WORD = 2**16  # bytes
_LONGEST_LINE = 2**20
_PIECE = 2**20
_LARGEST_DIM = 2**20
_BLOCK_VALUES = 2**18  # checked and written at once


class Vectors(NamedTuple):
    """Vectors of words, which are distinct."""

    words: list[str]
    values: npt.NDArray[np.float32]  # [n, dim]


def check_finite(vectors: npt.NDArray[Any]) -> None:
    """Raise ValueError if one of the vectors ``[n, dim]`` has no cosine."""
    wrong = np.count_nonzero(~np.isfinite(vectors).all(axis=1))
    if wrong:
        raise ValueError(f"vectors must be finite, got {wrong:,} of {len(vectors):,} with NaN or infinity")


def balanced(words: npt.NDArray[Any], contexts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Word vectors ``U(CᵀC)^½`` ``[words, dim]``, whose dot products are those of the rows of ``UCᵀ``.

    They depend on ``UCᵀ`` alone, up to a rotation, and not on how U and C share it: UA and CA⁻ᵀ give the
    same cosines. Those of a truncated SVD are U·S. Computed in float64, returned in the type of `words`.
    ValueError for factors that are not finite.
    """
    check_finite(words)
    check_finite(contexts)
    contexts = contexts.astype(np.float64)
    values, basis = np.linalg.eigh(contexts.T @ contexts)
    root = basis * np.sqrt(values.clip(min=0)) @ basis.T
    turned: npt.NDArray[Any] = words @ root
    return turned.astype(words.dtype)


def _blocks(num_rows: int, dim: int) -> Iterator[slice]:
    rows = max(1, _BLOCK_VALUES // dim)
    return (slice(first, first + rows) for first in range(0, num_rows, rows))


class _Rows:
    """Rows as they are read, checked block by block; memory grows with what has been read.

    Args:
        unit: what a row is called in errors, and the number of the first one.
        tick: called after each block.
    """

    def __init__(self, name: str, dim: int, unit: tuple[str, int], tick: Callable[[], None]):
        self._name, self._unit, self._tick = name, unit, tick
        self._words: dict[str, None] = {}
        self._block = max(1, _BLOCK_VALUES // dim)
        self._values = np.empty((self._block, dim), np.float32)

    def error(self, what: str, row: int | None = None) -> ValueError:
        """The error for a row, by default the next one."""
        unit, first = self._unit
        number = first + (len(self._words) if row is None else row)
        return ValueError(f"{self._name}, {unit} {number}: {what}")

    def append(self, word: bytes, values: Any) -> None:
        """Add a row, or raise ValueError that says what is wrong with it."""
        number = len(self._words)
        try:
            text = word.decode()
        except UnicodeDecodeError as error:
            raise self.error(
                f"the word {word[:60]!r} is not UTF-8: byte {word[error.start]:#04x} at its position "
                f"{error.start}, {error.reason}"
            ) from None
        if not text:
            raise self.error("the row has no word")
        if text in self._words:
            raise self.error(f"the word {text!r} has a row already")
        if number == len(self._values):
            self._values.resize((2 * number, self._values.shape[1]), refcheck=False)
        self._values[number] = values
        self._words[text] = None
        if len(self._words) % self._block == 0:
            self._check(len(self._words) - self._block)

    def _check(self, first: int) -> None:
        finite = np.isfinite(self._values[first : len(self._words)]).all(axis=1)
        if not finite.all():
            row = first + int(finite.argmin())
            word = next(itertools.islice(self._words, row, None))
            raise self.error(f"the vector of {word!r} is not finite in float32", row)
        self._tick()

    def finish(self) -> Vectors:
        """All that was added; ValueError if that is nothing."""
        if not self._words:
            raise ValueError(f"{self._name} holds no vectors")
        self._check(len(self._words) // self._block * self._block)
        self._values.resize((len(self._words), self._values.shape[1]), refcheck=False)
        return Vectors(list(self._words), self._values)


def _row(line: bytes) -> tuple[bytes, list[float] | None]:
    """Word and numbers of a line of text, parted as gensim does; None if they are no numbers, or none."""
    word, _, rest = line.rstrip().partition(b" ")
    try:
        # Python's numbers may hold underscores.
        return word, None if b"_" in rest else list(map(float, rest.split(b" ")))
    except ValueError:
        return word, None


def _is_text(head: bytes, num_rows: int, dim: int) -> bool:
    """Whether what follows a first line begins as text: with a line of a word and `dim` numbers.

    The four bytes of one column may by chance be a digit and a line break, so there all lines are looked at.
    """
    whole = head if len(head) < _PIECE else head[: head.rfind(b"\n") + 1]
    lines = whole.split(b"\n", 1)[:1] if dim > 1 else whole.rstrip().split(b"\n")
    rows = [_row(line)[1] for line in lines]
    return len(rows) <= num_rows and all(row is not None and len(row) == dim for row in rows)


def _read_text(stream: IO[bytes] | gzip.GzipFile, rows: _Rows, num_rows: int | None, dim: int) -> Vectors:
    number = 0
    while (line := stream.readline(_LONGEST_LINE)).strip():
        if len(line) == _LONGEST_LINE:
            raise rows.error(f"it has more than {_LONGEST_LINE:,} bytes")
        if number == num_rows:
            raise rows.error(f"more follows the {num_rows:,} rows of the first line")
        word, values = _row(line)
        if values is None:
            raise rows.error(f"what follows the word {word[:60]!r} is not {dim:,} numbers")
        if len(values) != dim:
            raise rows.error(f"{len(values):,} numbers follow the word {word[:60]!r}, and should be {dim:,}")
        rows.append(word, values)
        number += 1
    if num_rows is not None and number < num_rows:
        raise rows.error(f"the first line tells of {num_rows:,} rows, and {number:,} are there")
    _check_end(line, stream, rows)
    return rows.finish()


def _read_binary(stream: IO[bytes] | gzip.GzipFile, rows: _Rows, num_rows: int, dim: int) -> Vectors:
    data, first, width = b"", 0, 4 * dim
    for _ in range(num_rows):
        while (end := data.find(b" ", first)) < 0 or len(data) <= end + width:
            if (end if end >= 0 else len(data)) - first > _LONGEST_WORD:
                raise rows.error(f"its word has more than {_LONGEST_WORD:,} bytes")
            more = stream.read(max(_PIECE, width))
            if not more:
                raise rows.error(f"the file ends, and the first line tells of {num_rows:,} rows of {dim:,}")
            data, first = data[first:] + more, 0
        word = data[first:end].lstrip(b"\n")
        if word.split() != [word]:
            raise rows.error(f"{word[:60]!r} is no word: it is empty, or holds white space")
        rows.append(word, np.frombuffer(data, "<f4", dim, end + 1))
        first = end + 1 + width
    _check_end(data[first:], stream, rows)
    return rows.finish()


def _check_end(rest: bytes, stream: IO[bytes] | gzip.GzipFile, rows: _Rows) -> None:
    """Raise ValueError unless nothing but white space is left."""
    while rest:
        if found := rest.strip():
            raise rows.error(f"after the last row follows {found[:40]!r}")
        rest = stream.read(_PIECE)


@contextmanager
def _decompressed(file: BufferedReader, size: int) -> Iterator[tuple[IO[bytes] | gzip.GzipFile, int]]:
    """What a file of `size` bytes holds, and the most bytes that can be."""
    if file.peek(2)[:2] != _GZIP:
        yield file, size
        return
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            yield stream, size * _MOST_DEFLATED
    except EOFError:
        raise ValueError(f"{file.name} is cut short: its compressed data end too early (gzip)") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file.name} is damaged: {error} (gzip)") from None


def _check_size(name: str, num_rows: int, dim: int, row_bytes: int, most: int) -> None:
    """Raise ValueError if so many rows, of `row_bytes` at least, are none, or more than there can be."""
    if num_rows < 1 or not 1 <= dim <= _LARGEST_DIM:
        raise ValueError(
            f"{name}: the first line tells of {num_rows:,} rows of {dim:,} numbers; a file has one row "
            f"or more, of at most {_LARGEST_DIM:,}"
        )
    if num_rows * row_bytes > most:
        raise ValueError(
            f"{name}: the first line tells of {num_rows:,} rows of {dim:,} numbers, which take at least "
            f"{num_rows * row_bytes:,} bytes, and at most {most:,} can be there"
        )


def read(path: Path | str) -> Vectors:
    """Vectors in a file of word2vec, text or binary, or of GloVe, each plain or compressed by gzip.

    Which of them it is, its content says, not its name: the first line of word2vec is two whole numbers, and
    text follows if the next line is a word and as many numbers as that says, whatever else it may be. Words
    and numbers are those that `gensim.models.KeyedVectors.load_word2vec_format` reads, in float32. Takes
    memory for what has been read, whatever a first line claims.

    Raises ValueError, which names file and line or row, for other formats, and for damaged or cut files,
    another number of rows or columns than the first line has, words that are not UTF-8, empty or there
    twice, values that are not finite, and files without rows.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file of vectors; {READABLE}")
    with path.open("rb") as file, np.errstate(over="ignore"):
        size = path.stat().st_size
        with (
            tqdm(total=size, desc="reading vectors", unit="B", unit_scale=True, delay=1) as progress,
            _decompressed(file, size) as (stream, most),
        ):

            def rows(dim: int, *unit: Any) -> _Rows:
                return _Rows(str(path), dim, unit, lambda: progress.update(file.tell() - progress.n) and None)

            line = stream.readline(_LONGEST_LINE)
            head = re.fullmatch(rb"\s*(\d{1,99})\s+(\d{1,99})\s*", line)
            if head is None:
                _, numbers = _row(line)
                if numbers is None or len(line) == _LONGEST_LINE:
                    raise ValueError(
                        f"{path} is not a file of vectors, its first line is {line[:60]!r}; {READABLE}"
                    )
                stream.seek(0)
                return _read_text(stream, rows(len(numbers), "line", 1), None, len(numbers))
            num_rows, dim = map(int, head.groups())
            start = stream.tell()
            _check_size(str(path), num_rows, dim, 2 + 2 * dim, most - start + 1)
            is_text = _is_text(stream.read(_PIECE), num_rows, dim)
            stream.seek(start)
            if is_text:
                return _read_text(stream, rows(dim, "line", 2), num_rows, dim)
            _check_size(str(path), num_rows, dim, 2 + 4 * dim, most - start)
            return _read_binary(stream, rows(dim, "binary row", 1), num_rows, dim)


def _named(words: Sequence[str], format: str, escape: bool) -> list[str]:
    """Words as a format has them; ValueError names one that it cannot have."""
    if escape:
        words = ["_".join(re.split(r"\s+", word)) for word in words]
    for word in words:
        try:
            too_long = len(word.encode()) > _LONGEST_WORD
        except UnicodeEncodeError:
            raise ValueError(f"the word {word!r} holds a lone surrogate, which UTF-8 does not have") from None
        if not word or too_long:
            raise ValueError(f"a word has 1 to {_LONGEST_WORD:,} bytes, and one is {word[:60]!r}")
        if format in FOLDERS:
            wrong = "\t" in word or word.splitlines() != [word]
        else:
            wrong = format != "keyedvectors" and word.split() != [word]
        if wrong:
            what = "tabs or line breaks" if format in FOLDERS else "white space"
            raise ValueError(
                f"{format} has no words with {what}, and one is {word[:60]!r}; escaped (--escape) it has _"
            )
    if len(set(words)) < len(words):
        word = next(word for word, count in Counter(words).items() if count > 1)
        where = " when white space is escaped" if escape else ""
        raise ValueError(f"words must be distinct, and {word[:60]!r} is there twice{where}")
    return list(words)


def _text_rows(words: Sequence[str] | None, values: npt.NDArray[np.float32], parting: str) -> Iterator[bytes]:
    row = parting.join(["%#.9g"] * values.shape[1]) + "\n"
    for block in _blocks(*values.shape):
        lines = [row % tuple(numbers) for numbers in values[block].tolist()]
        if words is not None:
            lines = [f"{word} {line}" for word, line in zip(words[block], lines, strict=True)]
        yield "".join(lines).encode()


def _binary_rows(words: Sequence[str], values: npt.NDArray[np.float32]) -> Iterator[bytes]:
    for block in _blocks(*values.shape):
        rows = zip(words[block], values[block].astype("<f4", copy=False), strict=True)
        yield b"".join(f"{word} ".encode() + row.tobytes() for word, row in rows)


def _npy_rows(values: npt.NDArray[np.float32]) -> Iterator[bytes]:
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": values.shape}
    np.lib.format.write_array_header_1_0(header, shape)
    yield header.getvalue()
    for block in _blocks(*values.shape):
        yield values[block].astype("<f4", copy=False).tobytes()


def _put(path: Path, pieces: Iterable[bytes], num_blocks: int) -> None:
    with path.open("wb") as file:
        for piece in tqdm(pieces, desc=f"writing {path.name}", total=num_blocks, unit="block", delay=1):
            file.write(piece)


def write(path: Path | str, vectors: Vectors, format: Format, *, escape: bool = False) -> None:
    """Write vectors whole or not at all; the module's head says what each format is.

    Args:
        path: a file, which is replaced if it exists, or for npy and tsv a folder to make.
        escape: write runs of white space in words as ``_``.

    Raises ValueError for words that the format cannot have, for words that are there twice, be it because
    they are escaped, and for values that are no finite float32 ``[n, dim]``, one row and column at least;
    FileExistsError if a folder exists; ModuleNotFoundError for keyedvectors without gensim.
    """
    path, values = Path(path), vectors.values
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    is_matrix = values.ndim == 2 and values.dtype == np.float32 and values.size > 0
    if not is_matrix or len(values) != len(vectors.words):
        raise ValueError(
            f"vectors must be float32 [n, dim] with a word each, got {values.dtype} {list(values.shape)} and "
            f"{len(vectors.words):,} words"
        )
    check_finite(values)
    words = _named(vectors.words, format, escape)
    first = b"" if format == "glove" else f"{len(values)} {values.shape[1]}\n".encode()
    num_blocks = len([*_blocks(*values.shape)])
    with files.disk_errors(path):
        if format in FOLDERS:
            with files.atomic_directory(path) as work:
                rows = _npy_rows(values) if format == "npy" else _text_rows(None, values, "\t")
                _put(work / f"vectors.{format}", rows, num_blocks)
                names = work / ("words.txt" if format == "npy" else "metadata.tsv")
                names.write_bytes("".join(f"{word}\n" for word in words).encode())
            return
        with files.atomic_file(path) as work:
            if format == "keyedvectors":
                _save_keyed(work, words, values)
            else:
                is_binary = format == "word2vec-binary"
                rows = _binary_rows(words, values) if is_binary else _text_rows(words, values, " ")
                _put(work, itertools.chain([first], rows), 1 + num_blocks)


def _save_keyed(path: Path, words: list[str], values: npt.NDArray[np.float32]) -> None:
    from gensim.models import KeyedVectors

    keyed = KeyedVectors(values.shape[1], count=0)
    keyed.add_vectors(words, values)
    with path.open("wb") as file:  # a file, so that gensim makes no others beside it
        keyed.save(file)
