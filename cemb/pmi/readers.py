"""Corpora as streams of bytes: files, directories, globs and standard input, in the formats text comes in.

Plain UTF-8 text, compressed by gzip, bzip2, xz or zstd or not; JSON lines and Parquet, of which one field is
the text of one document; zip archives of plain text. Compression is told by a file's first bytes, the rest by
its name. Nothing is read whole: some MiB are in memory at a time, more only for a word, a line of JSON or a
text of Parquet that is longer.
"""

import bz2
import codecs
import fnmatch
import functools
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import reprlib
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, TypeAlias, cast

import numpy as np

from cemb.files import file_hash

STDIN = "-"
DEFAULT_FIELD = "text"
EncodingErrors: TypeAlias = Literal["strict", "replace"]

# Stands between documents. Byte 255 is never part of UTF-8, so text cannot hold it.
DOCUMENT_BREAK = b"\n\xff\n"

_SPACES = (b" ", b"\n", b"\t", b"\r", b"\v", b"\f")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# What cut or damaged data raise: of gzip, bzip2, xz and zstd; and of zip, also for what it cannot read.
DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)
_ZIP_ERRORS = (*DECOMPRESSION_ERRORS, zipfile.BadZipFile, struct.error, RuntimeError, UnicodeDecodeError)
# Names of files and folders that lie beside data and hold none: hidden ones, and by the custom of data tools
# those that start with an underscore, but for partitions such as _day=1; what systems leave; checksums.
_NO_DATA = re.compile(
    r"\..*|_[^=]*|(eh)?thumbs\.db|desktop\.ini|icon\r|lost\+found|\$recycle\.bin|system volume information"
    r"|(md5|sha\d+)sums|.*\.(crc|md5|sha1|sha256|sha512)",
    re.IGNORECASE | re.DOTALL,
)

_PIECE = 1 << 20
_LONGEST_WORD = 1 << 28
_LONGEST_LINE = 1 << 28
_LONGEST_BLANK = 1 << 16
# A row group of Parquet up to this is read with each of its strings once; batches of others take so much.
_PARQUET_GROUP = 1 << 25
_PARQUET_BATCH = 1 << 29
# The decoder takes no more memory than this, unless told.
_ZSTD_WINDOW = 1 << 27


class Source(Protocol):
    """One part of a corpus: its name, and its bytes on disk or None where they are not known."""

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int | None: ...

    def fingerprint(self) -> str:
        """A string that changes when the content does."""

    def pieces(self, advance: Callable[[int], object]) -> Iterator[bytes]:
        """UTF-8 in pieces of any length, with `DOCUMENT_BREAK` between documents.

        `advance` is called with the bytes on disk that were read since it was called last.
        """


@dataclass
class Tally:
    """What reading left out or replaced; finding files and reading them add to it."""

    num_left_out: int = 0  # files and folders that hold no data
    num_replacements: int = 0  # U+FFFD that stand for bytes that are not UTF-8


@dataclass(frozen=True)
class File:
    """A file as a `Source`; `path` is None for standard input, `member` one file of a zip archive."""

    path: Path | None
    kind: str = "text"  # or json-lines, parquet, zip
    text_field: str = DEFAULT_FIELD
    member: str | None = None
    encoding_errors: EncodingErrors = "strict"
    tally: Tally = field(default_factory=Tally, compare=False)

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once, as standard input, a pipe or a device can."""
        return self.path is None or not self.path.is_file()

    @property
    def num_bytes(self) -> int | None:
        return None if self.path is None or self.is_stream else self.path.stat().st_size

    def fingerprint(self) -> str:
        """SHA-256 of the file, with what else decides on its text. ValueError for what `is_stream`."""
        if self.path is None or self.is_stream:
            raise ValueError(
                f"{self.name} cannot be read twice, which this needs; encode it to a folder first: "
                f"python -m cemb encode {self.path or STDIN} --out FOLDER"
            )
        digest = file_hash(self.path)
        within = self.text_field if self.kind in ("json-lines", "parquet") else self.member
        return " ".join(filter(None, (self.kind if self.kind != "text" else "", within, digest)))

    def pieces(self, advance: Callable[[int], object]) -> Iterator[bytes]:
        """Raises ValueError with the reason for a file that is cut short, damaged or not UTF-8 text."""
        if self.kind == "parquet":
            yield from self._parquet(advance)
        elif self.kind == "zip":
            yield from self._zip(advance)
        elif self.path is None:
            yield from self._stream(cast(BufferedReader, sys.stdin.buffer), advance)
        else:
            with self.path.open("rb") as file:
                yield from self._stream(file, advance)

    def _stream(self, file: BufferedReader, advance: Callable[[int], object]) -> Iterator[bytes]:
        pieces = self._checked(self._decompressed(file, advance), self.name)
        return _json_texts(pieces, self.text_field, self.name) if self.kind == "json-lines" else pieces

    def _decompressed(self, file: BufferedReader, advance: Callable[[int], object]) -> Iterator[bytes]:
        compression, opened = decompressor(file, self.name)
        is_stream = self.is_stream
        reached = 0
        try:
            while piece := opened.read(_PIECE):
                now = reached + len(piece) if is_stream else file.tell()
                advance(now - reached)
                reached = now
                yield piece
        except DECOMPRESSION_ERRORS as error:
            if compression is None:
                raise OSError(f"{self.name} cannot be read: {error}") from None
            if "too much memory" in str(error):
                _refuse_window(self.name, None)
            is_short = isinstance(error, EOFError) or "runcated" in str(error)
            what = "is cut short: its compressed data end too early" if is_short else f"is damaged: {error}"
            raise ValueError(f"{self.name} {what} ({compression})") from None

    def _checked(self, pieces: Iterator[bytes], name: str) -> Iterator[bytes]:
        """UTF-8 in whole characters; what is none is refused with its place, or replaced."""
        offset, line, rest = 0, 1, b""
        for piece in itertools.chain(pieces, (b"",)):  # the empty one ends the text
            if offset == 0 and b"\0" in piece:
                raise ValueError(
                    f"{name} is not a text file: byte {piece.index(0)} is NUL; expected UTF-8 text, "
                    "plain or compressed by gzip, bzip2, xz or zstd"
                )
            data, rest = rest + piece, b""
            try:
                data, rest = self._valid(data, is_last=not piece)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{name}, line {line + data.count(10, 0, error.start)}: not UTF-8 text: byte "
                    f"{data[error.start]:#04x} at position {offset + error.start}, {error.reason}; {_REMEDY}"
                ) from None
            offset += len(data)
            line += data.count(10)
            if data:
                yield data

    def _valid(self, data: bytes, is_last: bool = True) -> tuple[bytes, bytes]:
        """Whole characters of UTF-8, replaced where asked, and the bytes after them. UnicodeDecodeError."""
        if data.isascii():
            return data, b""
        text, used = codecs.utf_8_decode(data, self.encoding_errors, is_last)
        if self.encoding_errors == "strict":
            return data[:used], data[used:]
        self.tally.num_replacements += text.count("\ufffd") - data.count("\ufffd".encode(), 0, used)
        return text.encode(), data[used:]

    def _zip(self, advance: Callable[[int], object]) -> Iterator[bytes]:
        assert self.path is not None
        with self.path.open("rb") as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    for member in self._members(archive):
                        with archive.open(member) as content:
                            pieces = iter(functools.partial(content.read, _PIECE), b"")
                            yield from self._checked(pieces, f"{self.name}, {member.filename}")
                        advance(member.compress_size)
                        yield DOCUMENT_BREAK
            except _ZIP_ERRORS as error:
                what = "cannot be read" if isinstance(error, RuntimeError) else "is cut short or damaged"
                raise ValueError(f"{self.name} {what} (zip): {error}") from None

    def _members(self, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        files = [m for m in archive.infolist() if not m.filename.endswith("/")]
        members = [m for m in files if m.filename == self.member]
        if self.member is None:
            members = [m for m in files if not any(map(_is_no_data, m.filename.split("/")))]
            self.tally.num_left_out += len(files) - len(members)
        if not members:
            raise ValueError(f"{self.name} holds no {self.member or 'file'}{_but(len(files))}")
        return members

    def _parquet(self, advance: Callable[[int], object]) -> Iterator[bytes]:
        pyarrow = import_pyarrow("Parquet")
        assert self.path is not None
        num_bytes = self.path.stat().st_size
        try:
            with open_parquet(self.path, [self.text_field]) as file:
                type_ = file.schema_arrow.field(self.text_field).type
                if pyarrow.types.is_null(type_):
                    advance(num_bytes)
                    return
                value = type_.value_type if pyarrow.types.is_dictionary(type_) else type_
                if value not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                    raise ValueError(
                        f"{self.name}: column {self.text_field!r} must hold strings, and holds {type_}"
                    )
                done = reached = 0
                for batch in _parquet_batches(self.path, file, self.text_field):
                    yield from self._documents(batch.column(0), done)
                    done += len(batch)
                    now = num_bytes * done // max(file.metadata.num_rows, done, 1)
                    advance(now - reached)
                    reached = now
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.name} is not a whole Parquet file: {error}") from None

    def _documents(self, column: Any, first_row: int) -> Iterator[bytes]:
        """The texts of an Arrow array of strings in pieces of a MiB, or of one text."""
        import pyarrow
        from pyarrow import compute

        rows = np.flatnonzero(column.is_valid())
        texts, places = column, rows
        if pyarrow.types.is_dictionary(column.type):
            texts, places = column.dictionary, column.indices.fill_null(0).to_numpy()[rows]
            if len(places) and not 0 <= places.min() <= places.max() < len(texts):
                raise ValueError(f"{self.name} is not a whole Parquet file: rows are outside its dictionary")
        texts = texts.cast(pyarrow.large_string())
        try:
            texts.validate(full=True)
            is_utf8 = True
        except pyarrow.ArrowInvalid:
            is_utf8 = False
        texts = texts.cast(pyarrow.large_binary())
        ends = np.cumsum(compute.binary_length(texts).fill_null(0).to_numpy()[places])
        cuts = np.flatnonzero(np.diff(ends // _PIECE)) + 1
        for some, numbers in zip(np.split(places, cuts), np.split(rows, cuts), strict=True):
            documents = texts.take(pyarrow.array(some)).to_pylist()
            if not is_utf8:
                where = (f"{self.name}, row {first_row + k + 1}" for k in numbers)
                documents = list(map(self._valid_document, documents, where))
            yield DOCUMENT_BREAK.join(documents) + DOCUMENT_BREAK

    def _valid_document(self, document: bytes, where: str) -> bytes:
        try:
            return self._valid(document)[0]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: column {self.text_field!r} is not UTF-8 text: byte {document[error.start]:#04x} "
                f"at position {error.start}, {error.reason}; {_REMEDY}"
            ) from None


_REMEDY = "encoding_errors='replace' (--encoding-errors replace) reads U+FFFD there"


def import_pyarrow(what: str) -> Any:
    """The module pyarrow; ValueError says that reading `what` needs it."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"reading {what} needs pyarrow, which is not installed; pip installs it") from None
    return pyarrow


def check_columns(name: str, columns: Iterable[str], seen: Sequence[str]) -> None:
    """ValueError unless each column is among those seen, once."""
    for column in columns:
        if (number := seen.count(column)) != 1:
            raise ValueError(f"{name} has {number or 'no'} column {column!r}; it has {', '.join(seen)}")


def open_parquet(path: Path, columns: Sequence[str], *, shares: bool = False) -> Any:
    """A `ParquetFile`; ValueError if it lacks a column.

    If it `shares`, strings come as dictionaries, which hold those of a row group once.
    """
    import pyarrow
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    check_columns(str(path), columns, schema.names)
    flat = [name for name in columns if not pyarrow.types.is_nested(schema.field(name).type)]
    return parquet.ParquetFile(path, metadata=metadata, read_dictionary=flat if shares else [])


def _parquet_batches(path: Path, file: Any, column: str) -> Iterator[Any]:
    """Batches of one column of strings that take `_PARQUET_BATCH` at most, whatever rows share a string."""
    schema = file.metadata.schema
    number = [schema.column(k).path for k in range(len(schema))].index(column)
    with open_parquet(path, [column], shares=True) as shared:
        for k in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(k)
            # Of a damaged group, pyarrow's metadata end the process where its rows are an error.
            next(file.iter_batches(1, row_groups=[k], columns=[column]), None)
            chunk = group.column(number)
            num_bytes = chunk.total_uncompressed_size
            if num_bytes <= _PARQUET_GROUP:
                yield from shared.iter_batches(1 << 16, row_groups=[k], columns=[column])
                continue
            # A string is no longer than the dictionary, or else stands in the file for each of its rows.
            dictionary = 0.0
            if chunk.dictionary_page_offset:
                dictionary = chunk.data_page_offset - chunk.dictionary_page_offset
                dictionary *= num_bytes / max(chunk.total_compressed_size, 1)
            longest = max(dictionary, num_bytes / max(group.num_rows, 1))
            batch_size = min(max(int(_PARQUET_BATCH / longest), 1), 1024)
            yield from file.iter_batches(batch_size, row_groups=[k], columns=[column])


class _Streams:
    """Streams of bzip2 or xz, one after the other; the library's readers end silently at what parts them."""

    def __init__(self, file: BufferedReader, new: Callable[[], Any]) -> None:
        self._file, self._new = file, new
        self._stream = new()

    def read(self, size: int) -> bytes:
        """Some of the content, `size` bytes at most; none at its end."""
        found = b""
        while not found:
            data = b""
            if self._stream.eof:
                data = self._stream.unused_data.lstrip(b"\0")
                while not data and (more := self._file.read(_PIECE)):
                    data = more.lstrip(b"\0")
                if not data:
                    break
                self._stream = self._new()
            elif self._stream.needs_input and not (data := self._file.read(_PIECE)):
                raise EOFError
            found = self._stream.decompress(data, size)
        return found


def decompressor(file: BufferedReader, name: str) -> tuple[str | None, Any]:
    """How a file is compressed, told by its first bytes, and a reader of what it holds."""
    head = file.peek(18)
    if head.startswith(b"\x1f\x8b"):
        return "gzip", gzip.GzipFile(fileobj=file)
    if head.startswith(b"BZh"):
        return "bzip2", _Streams(file, bz2.BZ2Decompressor)
    if head.startswith(b"\xfd7zXZ"):
        return "xz", _Streams(file, lzma.LZMADecompressor)
    if head.startswith(b"\x28\xb5\x2f\xfd") or _is_skippable(head):
        if (window := _zstd_window(head)) > _ZSTD_WINDOW:
            _refuse_window(name, window)
        return "zstd", import_pyarrow("zstd").CompressedInputStream(file, "zstd")
    return None, file


def _is_skippable(head: bytes) -> bool:
    """Whether a zstd frame starts that holds no data; parallel compressors write some first."""
    return int.from_bytes(head[:4], "little") >> 4 == 0x184D2A5


def _zstd_window(head: bytes) -> int:
    """Bytes of memory that a zstd file's first frame needs (RFC 8878); 0 if `head` ends before it is told."""
    while _is_skippable(head):
        head = head[8 + int.from_bytes(head[4:8], "little") :]
    if len(head) < 18:
        return 0
    descriptor = head[4]
    if not descriptor & 0x20:
        exponent, mantissa = divmod(head[5], 8)
        return (8 + mantissa) << (7 + exponent)
    start = 5 + (0, 1, 2, 4)[descriptor & 3]  # one segment, as long as the content
    return int.from_bytes(head[start : start + (1, 2, 4, 8)[descriptor >> 6]], "little")


def _refuse_window(name: str, window: int | None) -> NoReturn:
    needed = f"{window >> 20} MiB" if window else "more than it says at its start"
    raise ValueError(
        f"{name} needs a zstd window of {needed}, and {_ZSTD_WINDOW >> 20} MiB can be read: pipe it, "
        f"zstd --decompress --long=31 --stdout {name} | python -m cemb encode - --out FOLDER, or compress it "
        "again with --long=27"
    )


def _lines(pieces: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Lines without their ends. ValueError for one of more than `_LONGEST_LINE` bytes."""
    held: list[bytes] = []
    size, number = 0, 1
    for piece in pieces:
        first, *others = piece.split(b"\n")
        held.append(first)
        size += len(first)
        if size > _LONGEST_LINE:
            raise ValueError(
                f"{name}, line {number}: longer than {_LONGEST_LINE >> 20} MiB; JSON lines hold one object "
                "a line"
            )
        if others:
            yield b"".join(held)
            yield from others[:-1]
            held, size, number = [others[-1]], len(others[-1]), number + len(others)
    yield b"".join(held)


def _json_texts(pieces: Iterable[bytes], field: str, name: str) -> Iterator[bytes]:
    texts: list[bytes] = []
    size = 0
    for number, line in enumerate(_lines(pieces, name), 1):
        if text := _json_text(line, field, f"{name}, line {number}"):
            texts += (text, DOCUMENT_BREAK)
            size += len(text)
        if size >= _PIECE:
            yield b"".join(texts)
            texts, size = [], 0
    yield b"".join(texts)


def _json_text(line: bytes, field: str, where: str) -> bytes:
    """The text of one line; empty for an empty line and for null."""
    if not line.strip():
        return b""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); JSON lines hold one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {line[:40].decode(errors='replace')}")
    if field not in record:
        raise ValueError(f"{where}: no field {field!r}; it has {', '.join(record)}")
    text = record[field]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} must be a string, got {reprlib.repr(text)}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {field!r} is not Unicode text: {error}") from None


def file_identity(path: Path) -> tuple[int, int]:
    """Device and inode: the same for all names of a file."""
    found = path.stat()
    return found.st_dev, found.st_ino


def fingerprint(sources: Iterable[Source]) -> str:
    """A string that changes when what the sources hold, or their order, does."""
    parts = [source.fingerprint() for source in sources]
    if len(parts) <= 2:
        return ", ".join(parts)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"{len(parts)} files, sha256:{digest}"


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED_SUFFIXES:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in _JSON_SUFFIXES:
        return "json-lines"
    return {".parquet": "parquet", ".zip": "zip"}.get(last, "text")


def is_encoded(corpus: str) -> bool:
    """Whether this is a folder that `cemb.pmi.encode` made."""
    return all((Path(corpus) / name).is_file() for name in ("manifest.json", "word_counts.npy"))


def find_files(
    corpus: str,
    text_field: str | None = None,
    encoding_errors: EncodingErrors = "strict",
    tally: Tally | None = None,
) -> list[File]:
    """The files that a path, a directory, a glob or ``-`` names, in the order of their names.

    Directories are walked to their bottom, as ``**`` of a glob does. Links are followed; a file that several
    names lead to is read once, under the first that is no link. Left out, and counted in `tally`, is what
    holds no data: names that start with a dot or an underscore, unless the glob says so, checksums, what
    systems leave beside files, and what is no regular file. A pipe or a device that is named is read once.

    `text_field` is the field of JSON lines or the column of Parquet that holds the text, `DEFAULT_FIELD`
    unless given; with it, standard input and other streams are JSON lines. `encoding_errors` says whether
    bytes that are not UTF-8 are refused (strict), or replaced by U+FFFD and counted in `tally`. Raises
    FileNotFoundError or ValueError with the reason if there is nothing to read.
    """
    tally = Tally() if tally is None else tally
    left_out: set[Path] = set()
    path = Path(corpus)
    if corpus == STDIN:
        paths: list[Path | None] = [None]
    elif path.is_dir():
        if is_encoded(corpus):
            raise ValueError(f"{corpus!r} is an encoded corpus, and no text; EncodedCorpus.open reads it")
        paths = [*_each_once(_matching(path, ["**"], left_out))]
        if not paths:
            raise ValueError(f"the directory {corpus!r} holds no file{_but(len(left_out))}")
    elif path.exists():
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"corpus {corpus!r} is an empty file")
        paths = [path]
    elif glob.has_magic(corpus):
        parts = path.relative_to(path.anchor).parts
        paths = [*_each_once(_matching(Path(path.anchor), parts, left_out))]
        if not paths:
            raise FileNotFoundError(f"no file matches {corpus!r}{_but(len(left_out))}")
    else:
        raise FileNotFoundError(f"there is no file or directory {corpus!r}")
    tally.num_left_out += len(left_out)
    kinds = ["text" if path is None else _kind(path) for path in paths]
    files = [
        File(path, kind, text_field or DEFAULT_FIELD, None, encoding_errors, tally)
        for path, kind in zip(paths, kinds, strict=True)
    ]
    if files[0].is_stream:
        return [_stream(files[0], text_field)]
    if text_field and all(file.kind in ("text", "zip") for file in files):
        raise ValueError(
            f"text_field={text_field!r} was asked for, and {corpus!r} is plain text; JSON lines are told by "
            f"the suffixes {', '.join(_JSON_SUFFIXES)}, Parquet by .parquet"
        )
    return files


def _stream(file: File, text_field: str | None) -> File:
    """A file that can be read only once and from its start."""
    if file.kind in ("parquet", "zip"):
        raise ValueError(f"{file.name} is a stream, and {file.kind} is read from its end: save it to a file")
    return replace(file, kind="json-lines") if text_field else file


def _is_no_data(name: str) -> bool:
    return _NO_DATA.fullmatch(name) is not None


def _but(num_left_out: int) -> str:
    return f", but for {num_left_out} left out as no data, such as names that start with . or _" * (
        num_left_out > 0
    )


def _matching(path: Path, parts: Sequence[str], left_out: set[Path]) -> Iterator[Path]:
    """Files below `path` that the parts of a glob match; adds what they match and is no data to a set."""
    if not parts:
        if path.is_file():
            yield path
        elif not path.is_dir():
            left_out.add(path)
        return
    part, *others = parts
    if part == "**":
        for folder in _folders(path):
            yield from _matching(folder, others or ["*"], left_out)
    elif not glob.has_magic(part):
        if os.path.lexists(path / part):
            yield from _matching(path / part, others, left_out)
    elif path.is_dir():
        for below in path.iterdir():
            if not fnmatch.fnmatchcase(below.name, part):
                continue
            if _is_no_data(below.name) and part[0] not in "._":
                left_out.add(below)
            else:
                yield from _matching(below, others, left_out)


def _folders(top: Path) -> Iterator[Path]:
    """A folder and those below it, each once however many links lead to it."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    seen: set[tuple[int, int]] = set()
    roots = [top] if top.is_dir() else []
    while roots:  # links after what lies there itself
        for name, below, _ in os.walk(roots.pop(0), onerror=refuse):
            folder = Path(name)
            if (identity := file_identity(folder)) in seen:
                below.clear()
                continue
            seen.add(identity)
            yield folder
            below[:] = sorted(itertools.filterfalse(_is_no_data, below))
            roots += [path for path in map(folder.joinpath, below) if path.is_symlink()]


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """Files in the order of their names, each under one: the first that leads through no link."""
    found: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(set(paths)):
        found.setdefault(file_identity(path), []).append(path)
    return sorted(
        names[0] if len(names) == 1 else min(names, key=lambda path: path.resolve() != path.absolute())
        for names in found.values()
    )


def read_blocks(
    sources: Iterable[Source], num_bytes: int, advance: Callable[[int], object] | None = None
) -> Iterator[bytes]:
    """Sources one after the other, documents between `DOCUMENT_BREAK`, in blocks of about `num_bytes`.

    Blocks are cut where white space ends, so that words, and white space, stay whole; of 64 KiB and more of
    white space, only line breaks are kept, two at most. Raises ValueError if there is none in 256 MiB, and
    what the sources do.
    """
    held: list[bytes] = []
    size = cut = 0  # the last word of what is held starts at `cut`, if white space stands before it
    is_space, is_empty = False, True
    for source in sources:
        for piece in source.pieces(advance or (lambda _: None)):
            if len(piece) > _LONGEST_BLANK and piece.isspace():
                piece = b"\n\n"[: piece.count(b"\n")] or b" "
            if word := _last_word(piece):
                cut = size + word
            elif is_space and not piece[:1].isspace():
                cut = size
            held.append(piece)
            size += len(piece)
            is_space = piece[-1:].isspace()
            is_empty = False
            if size >= num_bytes and cut:
                data = b"".join(held)
                yield data[:cut]
                held, size, cut = [data[cut:]], size - cut, 0
            elif size > _LONGEST_WORD:
                raise ValueError(f"{source.name} has no white space in {size >> 20} MiB: is it text?")
        held.append(DOCUMENT_BREAK)
        size += len(DOCUMENT_BREAK)
        is_space = True
    if not is_empty:
        yield b"".join(held)


def _last_word(data: bytes) -> int:
    """Where the last word starts that follows white space; 0 if none does."""
    stop = len(data.rstrip(b"".join(_SPACES)))
    return max(data.rfind(space, 0, stop) for space in _SPACES) + 1
