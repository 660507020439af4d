"""Evaluation sets from text files: pairs of words with people's judgements, and analogy questions.

Files are UTF-8, with or without a byte order mark, and of at most 64 MiB; empty lines and those that start
with ``#`` are left out. A line that cannot be read is refused by its file and number.
"""

import csv
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

_LARGEST_BYTES = 2**26
_LINE_ENDS = re.compile(r"\r\n?|\n")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_HEADER_WORD = re.compile(r"(?:word|term|w)[ _-]?[12ab]", re.IGNORECASE)
_HEADER_SCORE = re.compile(
    r"score|mean|average|rating|similarity|relatedness|human|gold|simlex", re.IGNORECASE
)
# Of MEN, of Penn's treebank and of Universal Dependencies.
_MARKED = re.compile(
    r"(.+)[-_/](?:[nvajrs]|nns?|nnps?|vb[dgnpz]?|jj[rs]?|rb[rs]?|noun|propn|verb|adj|adv)", re.IGNORECASE
)


class SimilaritySet(NamedTuple):
    """Pairs of words as written, each with a score; whether every word has a part-of-speech mark."""

    name: str
    pairs: list[tuple[str, str, float]]
    is_marked: bool = False


class AnalogySet(NamedTuple):
    """Questions a : b = c : d of words as written."""

    name: str
    questions: list[tuple[str, str, str, str]]


def unmarked(word: str) -> str:
    """A word without its part-of-speech mark: of ``sun-n``, ``sun_NN`` and ``sun/NOUN``, ``sun``."""
    found = _MARKED.fullmatch(word)
    return found[1] if found else word


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that hold something, with their numbers."""
    with path.open("rb") as file:
        data = file.read(_LARGEST_BYTES + 1)
    if len(data) > _LARGEST_BYTES:
        raise ValueError(f"{path} is no evaluation set: it has more than {_LARGEST_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = len(_LINE_ENDS.split(error.object[: error.start].decode("utf-8")))
        raise ValueError(
            f"{path}, line {number}: byte 0x{error.object[error.start]:02x} is not UTF-8, which evaluation "
            "sets must be in"
        ) from None
    for number, line in enumerate(_LINE_ENDS.split(text), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line


def _fields(line: str, separator: str | None) -> list[str]:
    """What `separator` parts, or white space if that is None; parted by commas, fields may be quoted."""
    parts = line.split(separator)
    if separator == ",":
        parts = next(csv.reader([line], skipinitialspace=True, strict=True))
    return [field.strip() for field in parts]


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    separator: str | None = None
    for place, (number, line) in enumerate(_lines(path)):
        if place == 0:
            separator = next((mark for mark in "\t," if line.count(mark) >= 2), None)
        try:
            yield number, _fields(line, separator)
        except csv.Error as error:
            raise ValueError(f"{path}, line {number}: {error}: {line[:60]!r}") from None


def _is_number(fields: list[str], column: int) -> bool:
    return column < len(fields) and _NUMBER.fullmatch(fields[column]) is not None


def read_similarity(path: Path) -> SimilaritySet:
    """The set that a file holds, by the name of the file without its suffix.

    A line has two words, a score, and what else there may be, parted by tabs, commas or white space, as the
    first line is; with commas, fields may be in double quotes. The first line may be a header: its first two
    fields are such as ``word1`` and ``Word 2``, or one of the others is a name of a score, such as ``Human
    (mean)``, ``similarity`` or ``SimLex999``. The score's column is the first that has such a name, else the
    first after the words that is a number in most lines.

    Raises ValueError, by file and line, for what is neither pair nor header, or not UTF-8.
    """
    rows = [*_rows(path)]
    if not rows:
        raise ValueError(f"{path} holds no pairs of words")
    body = [fields for _, fields in rows[1:] or rows]
    columns = [
        column
        for column in range(2, max(map(len, body)))
        if 2 * sum(_is_number(fields, column) for fields in body) > len(body)
    ]
    number, first = rows[0]
    named = [c for c in columns if c < len(first) and _HEADER_SCORE.search(first[c])]
    is_header = named or (len(first) > 2 and all(_HEADER_WORD.fullmatch(field) for field in first[:2]))
    column = (named or columns or [2])[0]
    pairs = []
    for number, fields in rows[1:] if is_header else rows:
        if not (_is_number(fields, column) and fields[0] and fields[1]):
            raise ValueError(
                f"{path}, line {number}: wants two words and a score in column {column + 1}, as the other "
                f"lines have, got {' | '.join(fields)[:60]!r}"
            )
        pairs.append((fields[0], fields[1], float(fields[column])))
    if not pairs:
        raise ValueError(f"{path} holds a header and no pairs of words")
    for side in (0, 1):
        if all(_NUMBER.fullmatch(str(pair[side])) for pair in pairs):
            raise ValueError(f"{path}: column {side + 1} should hold words, and holds numbers alone")
    is_marked = all(_MARKED.fullmatch(word) for a, b, _ in pairs for word in (a, b))
    return SimilaritySet(path.stem, pairs, is_marked)


def read_analogies(path: Path) -> AnalogySet:
    """The questions that a file holds, four words a line; lines that start with ``:`` name sections.

    So has Google's set (Mikolov et al., 2013), and MSR's with the answer as the fourth word. BATS, pairs of
    words with several answers, is not read.

    Raises ValueError, by file and line, for a line of other than four words, or not UTF-8.
    """
    questions = []
    for number, line in _lines(path):
        if line.startswith(":"):
            continue
        words = line.split()
        if len(words) != 4:
            what = "; pairs of words, as BATS has them, are not read" if len(words) == 2 else ""
            raise ValueError(
                f"{path}, line {number}: a question has four words, got {len(words)}: {line[:60]!r}{what}"
            )
        questions.append((words[0], words[1], words[2], words[3]))
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return AnalogySet(path.stem, questions)


def _bundled(name: str) -> Path | None:
    """A file that ships in gensim's wheel; None if gensim is not installed."""
    try:
        return Path(str(distribution("gensim").locate_file(f"gensim/test/test_data/{name}")))
    except PackageNotFoundError:
        return None


def bundled_similarity() -> list[SimilaritySet]:
    """WordSim-353 (Finkelstein et al., 2002) and SimLex-999 (Hill et al., 2015); without gensim, no pairs."""
    names = ("wordsim353.tsv", "simlex999.txt")
    return [
        read_similarity(path) if (path := _bundled(name)) else SimilaritySet(Path(name).stem, [])
        for name in names
    ]


def bundled_analogies() -> AnalogySet:
    """Google's analogy questions (Mikolov et al., 2013); without gensim, none."""
    name = "questions-words.txt"
    return read_analogies(path) if (path := _bundled(name)) else AnalogySet(Path(name).stem, [])
