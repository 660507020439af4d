"""Corpora as streams of bytes: files, directories, globs and standard input, in the formats text comes in.

Plain UTF-8 text, compressed by gzip, bzip2, xz or zstd or not; JSON lines and Parquet, of which one field is
the text of one document; zip archives of plain text. Compression is told by a file's first bytes, the rest by
its name. Nothing is read whole: at most some MiB are in memory at a time.
"""

import bz2
import functools
import glob
import gzip
import hashlib
import json
import lzma
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any, Protocol, cast

STDIN = "-"
DEFAULT_FIELD = "text"

# Stands between documents. Byte 255 is never part of UTF-8, so text cannot hold it.
DOCUMENT_BREAK = b"\n\xff\n"

_SPACES = (b" ", b"\n", b"\t", b"\r", b"\v", b"\f")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# What cut or damaged data raise, of gzip, bzip2, xz and zstd.
DECOMPRESSION_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)

_PIECE = 1 << 20
_LONGEST_WORD = 1 << 28


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


@dataclass(frozen=True)
class File:
    """A file as a `Source`; `path` is None for standard input, `member` one file of a zip archive."""

    path: Path | None
    kind: str = "text"  # or json-lines, parquet, zip
    text_field: str = DEFAULT_FIELD
    member: str | None = None

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)

    @property
    def num_bytes(self) -> int | None:
        return None if self.path is None else self.path.stat().st_size

    def fingerprint(self) -> str:
        """SHA-256 of the file, with what else decides on its text."""
        if self.path is None:
            raise ValueError(
                "standard input cannot be read twice, which this needs; encode it to a folder first: "
                "python -m cemb encode - --out FOLDER"
            )
        digest = file_hash(self.path)
        field = self.text_field if self.kind in ("json-lines", "parquet") else self.member
        return " ".join(filter(None, (self.kind if self.kind != "text" else "", field, digest)))

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
        pieces = self._checked(self._decompressed(file, advance))
        return _json_texts(pieces, self.text_field, self.name) if self.kind == "json-lines" else pieces

    def _decompressed(self, file: BufferedReader, advance: Callable[[int], object]) -> Iterator[bytes]:
        compression, opened = decompressor(file)
        reached = 0
        try:
            while piece := opened.read(_PIECE):
                now = file.tell() if self.path else reached + len(piece)
                advance(now - reached)
                reached = now
                yield piece
        except DECOMPRESSION_ERRORS as error:
            if compression is None:
                raise
            is_short = isinstance(error, EOFError) or "runcated" in str(error)
            what = "is cut short: its compressed data end too early" if is_short else f"is damaged: {error}"
            raise ValueError(f"{self.name} {what} ({compression})") from None

    def _checked(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        offset = 0
        for piece in pieces:
            if offset == 0 and b"\0" in piece:
                raise ValueError(
                    f"{self.name} is not a text file: byte {piece.index(0)} is NUL; expected UTF-8 text, "
                    "plain or compressed by gzip, bzip2, xz or zstd"
                )
            if b"\xff" in piece:
                raise ValueError(
                    f"{self.name} is not UTF-8 text: byte 0xff at position {offset + piece.index(255)}"
                )
            offset += len(piece)
            yield piece

    def _zip(self, advance: Callable[[int], object]) -> Iterator[bytes]:
        assert self.path is not None
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = [
                    m for m in archive.infolist() if not m.is_dir() and self.member in (None, m.filename)
                ]
                if not members:
                    raise ValueError(f"{self.name} holds no {self.member or 'file'}")
                for member in members:
                    with archive.open(member) as file:
                        yield from self._checked(iter(functools.partial(file.read, _PIECE), b""))
                    advance(member.compress_size)
                    yield DOCUMENT_BREAK
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.name} is cut short or damaged (zip): {error}") from None

    def _parquet(self, advance: Callable[[int], object]) -> Iterator[bytes]:
        pyarrow = import_pyarrow("Parquet")
        from pyarrow import parquet

        assert self.path is not None
        try:
            with parquet.ParquetFile(self.path) as file:
                schema = file.schema_arrow
                if self.text_field not in schema.names:
                    raise ValueError(
                        f"{self.name} has no column {self.text_field!r}; it has {', '.join(schema.names)}"
                    )
                type_ = schema.field(self.text_field).type
                value = type_.value_type if pyarrow.types.is_dictionary(type_) else type_
                if value not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                    raise ValueError(
                        f"{self.name}: column {self.text_field!r} must hold strings, and holds {type_}"
                    )
                done = reached = 0
                for batch in file.iter_batches(batch_size=1024, columns=[self.text_field]):
                    column = batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary())
                    documents = column.drop_null().to_pylist()
                    joined = DOCUMENT_BREAK.join(documents)
                    if joined.count(b"\xff") >= max(len(documents), 1):
                        raise ValueError(
                            f"{self.name}: column {self.text_field!r} holds a byte 0xff, not UTF-8"
                        )
                    done += len(batch)
                    now = self.path.stat().st_size * done // file.metadata.num_rows
                    advance(now - reached)
                    reached = now
                    yield joined + DOCUMENT_BREAK
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.name} is not a whole Parquet file: {error}") from None


def import_pyarrow(what: str) -> Any:
    """The module pyarrow; ValueError says that reading `what` needs it."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"reading {what} needs pyarrow, which is not installed; pip installs it") from None
    return pyarrow


def decompressor(file: BufferedReader) -> tuple[str | None, BufferedIOBase]:
    """How a file is compressed, told by its first bytes, and a reader of what it holds."""
    head = file.peek(6)[:6]
    if head.startswith(b"\x1f\x8b"):
        return "gzip", gzip.GzipFile(fileobj=file)
    if head.startswith(b"BZh"):
        return "bzip2", bz2.BZ2File(file)
    if head.startswith(b"\xfd7zXZ"):
        return "xz", lzma.LZMAFile(file)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd", import_pyarrow("zstd").CompressedInputStream(file, "zstd")
    return None, file


def _json_texts(pieces: Iterable[bytes], field: str, name: str) -> Iterator[bytes]:
    rest, number = b"", 0
    texts: list[bytes] = []
    size = 0
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            number += 1
            texts.append(_json_text(line, field, f"{name}, line {number}"))
            size += len(texts[-1])
        if size >= _PIECE:
            yield DOCUMENT_BREAK.join(texts) + DOCUMENT_BREAK
            texts, size = [], 0
    texts.append(_json_text(rest, field, f"{name}, line {number + 1}"))
    yield DOCUMENT_BREAK.join(texts)


def _json_text(line: bytes, field: str, where: str) -> bytes:
    """The text of one line; empty for an empty line and for null."""
    if not line.strip():
        return b""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); JSON lines hold one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {line[:40].decode(errors='replace')}")
    if field not in record:
        raise ValueError(f"{where}: no field {field!r}; it has {', '.join(record)}")
    text = record[field]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} must be a string, got {json.dumps(text)[:40]}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {field!r} is not Unicode text: {error}") from None


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """A file's hash as ``algorithm:hex``, computed once while its size and time stay what they are."""
    found = path.stat()
    return _file_hash(path.resolve(), found.st_size, found.st_mtime_ns, algorithm)


@functools.cache
def _file_hash(path: Path, size: int, mtime_ns: int, algorithm: str) -> str:
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


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


def find_files(corpus: str, text_field: str | None = None) -> list[File]:
    """The files that a path, a directory, a glob or ``-`` names, in the order of their names.

    Directories are walked to their bottom, hidden files left out. `text_field` is the field of JSON lines or
    the column of Parquet that holds the text, `DEFAULT_FIELD` unless given; with it, standard input is JSON
    lines. Raises FileNotFoundError or ValueError with the reason if there is nothing to read.
    """
    if corpus == STDIN:
        return [File(None, "json-lines" if text_field else "text", text_field or DEFAULT_FIELD)]
    path = Path(corpus)
    if path.is_dir():
        if (path / "manifest.json").exists() and (path / "word_counts.npy").exists():
            raise ValueError(f"{corpus!r} is an encoded corpus, and no text; EncodedCorpus.open reads it")
        paths = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
        if not paths:
            raise ValueError(f"the directory {corpus!r} holds no file")
    elif path.exists():
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"corpus {corpus!r} is an empty file")
        paths = [path]
    elif glob.has_magic(corpus):
        names = glob.glob(corpus, recursive=True)  # noqa: PTH207  Path takes no absolute pattern
        paths = sorted(path for path in map(Path, names) if path.is_file())
        if not paths:
            raise FileNotFoundError(f"no file matches {corpus!r}")
    else:
        raise FileNotFoundError(f"there is no file or directory {corpus!r}")
    files = [File(path, _kind(path), text_field or DEFAULT_FIELD) for path in paths]
    if text_field and all(file.kind in ("text", "zip") for file in files):
        raise ValueError(
            f"text_field={text_field!r} was asked for, and {corpus!r} is plain text; JSON lines are told by "
            f"the suffixes {', '.join(_JSON_SUFFIXES)}, Parquet by .parquet"
        )
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@dataclass(frozen=True)
class Block:
    """Consecutive bytes of a corpus that begin and end between words.

    From byte ``starts[i]`` on they are of the source ``names[i]``, from its byte ``offsets[i]`` on.
    """

    data: bytes
    starts: tuple[int, ...]
    names: tuple[str, ...]
    offsets: tuple[int, ...]

    def place(self, position: int) -> str:
        """Where in which source a byte of the block is, in words."""
        i = max(k for k, start in enumerate(self.starts) if start <= position)
        return f"{self.names[i]}, byte {self.offsets[i] + position - self.starts[i]} of its text"


def read_blocks(
    sources: Iterable[Source], num_bytes: int, advance: Callable[[int], object] | None = None
) -> Iterator[Block]:
    """Sources one after the other, documents between `DOCUMENT_BREAK`, in blocks of about `num_bytes`.

    Blocks are cut where white space ends, so that words, and white space, stay whole. Raises ValueError if
    there is none in 256 MiB, and what the sources do.
    """
    held: list[bytes] = []
    size = 0
    origins: list[tuple[int, str, int]] = []
    for source in sources:
        offset = 0
        for piece in source.pieces(advance or (lambda _: None)):
            origins.append((size, source.name, offset))
            held.append(piece)
            size += len(piece)
            offset += len(piece)
            if size < num_bytes:
                continue
            data = b"".join(held)
            if cut := _last_word(data):
                yield Block(data[:cut], *zip(*(o for o in origins if o[0] < cut), strict=True))
                before = [o for o in origins if o[0] <= cut][-1]
                kept = (0, before[1], before[2] + cut - before[0])
                origins = [kept, *((start - cut, name, at) for start, name, at in origins if start > cut)]
                held, size = [data[cut:]], size - cut
            else:
                if size > _LONGEST_WORD:
                    raise ValueError(f"{source.name} has no white space in {size >> 20} MiB: is it text?")
                held = [data]
        held.append(DOCUMENT_BREAK)
        size += len(DOCUMENT_BREAK)
    if origins:
        yield Block(b"".join(held), *zip(*origins, strict=True))


def _last_word(data: bytes) -> int:
    """Where the last word starts that follows white space; 0 if none does."""
    stop = len(data.rstrip(b"".join(_SPACES)))
    return max(data.rfind(space, 0, stop) for space in _SPACES) + 1
