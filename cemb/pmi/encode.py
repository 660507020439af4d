"""Text to token ids on disk: tokenization, vocabulary, shards.

Tokens are maximal runs of letters with the marks on them, apostrophes and joiners inside a word included,
after NFKC normalization and case folding; digits and punctuation separate, and what is not seen, such as a
soft hyphen, is as if it were not there. A corpus is one stream of tokens.
Tokens outside the vocabulary are removed before windows are laid, as word2vec does.

`tokenize` says what a token is. `encode` gives the same tokens by a pass over the bytes in Numba
(`cemb.pmi.tokenizer`), which asks `tokenize` once about every distinct run that is not ASCII.
"""

import functools
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cemb import files
from cemb.checks import check_integers
from cemb.pmi import corpora, npy, readers, tokenizer
from cemb.pmi.npy import StoredArray
from cemb.pmi.threads import in_order

BORDERS = {"document": tokenizer.DOCUMENTS, "line": tokenizer.LINES, "sentence": tokenizer.SENTENCES}
Borders: TypeAlias = Literal[*BORDERS]  # type: ignore[valid-type]

_LETTER = r"[^\W\d_]"
# Where Unicode 15 has combining marks, but for variation selectors.
_MARK_RANGES = (range(0x300, 0x1F000),)
# What is not seen and parts no word (Unicode's Default_Ignorable_Code_Point), but for the zero-width space,
# which does, and the zero-width joiners, which may be all that tells two words apart.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_IDEOGRAPHIC_STOP = re.compile("[。！？]")
_SENTENCE_END = re.compile(
    r"""[.!?][.!?"'’”»)\]}]*[ \t\n\r\v\f]  # a terminator, closing marks, white space
    | \n[ \t\r\v\f]*\n  # an empty line
    | [。！？]""",
    re.VERBOSE,
)
_FORMAT = "cemb encoded corpus"
_VERSION = 2
_TALLY = tuple(each.name for each in fields(readers.Tally))
_FIELDS = {
    "num_tokens": int,
    "num_words": int,
    "shard_sizes": list,
    "fingerprint": str,
    "min_count": int,
    "max_vocab": int | None,
    "borders": str | None,
    "text_field": str | None,
    "encoding_errors": str,
    **dict.fromkeys(_TALLY, int),
}
# What words and ids follow from, besides the corpus.
OPTIONS = ("min_count", "max_vocab", "borders", "text_field", "encoding_errors")
_REMEDY = "remove it, and encode the corpus again"
_BLOCK_BYTES = 8 << 20
# Runs that are not ASCII are remembered up to this; text without spaces hardly repeats one.
_MAX_REMEMBERED_BYTES = 64 << 20


def tokenize(text: str) -> list[str]:
    """The tokens of a text, in order.

    >>> tokenize("Don't Panic: ﬁfty-two towels!")
    ["don't", 'panic', 'fifty', 'two', 'towels']
    """
    return _word().findall(_folded(text))


@functools.cache
def _word() -> re.Pattern[str]:
    """What a token looks like once folded.

    Python's own letters leave out marks, and with them the vowel signs of Indic scripts; a zero-width joiner
    or non-joiner stands inside words of Persian and others (Unicode Standard Annex 29, rule WB4).
    """
    marks = "".join(
        c for codes in _MARK_RANGES for c in map(chr, codes) if unicodedata.category(c).startswith("M")
    )
    part = rf"{_LETTER}(?:{_LETTER}|[{marks}]|[\u200c\u200d](?={_LETTER}|[{marks}]))*"
    return re.compile(rf"{part}(?:'{part})*")


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", _IGNORABLE.sub("", text)).casefold().replace("’", "'")


def split_sentences(text: str) -> list[str]:
    """Cut a text where sentences end, by marks alone: "Mr. Smith" is cut too. Some may hold no token.

    A sentence ends at white space after ``.``, ``!`` or ``?`` and what closes quotes or brackets there, at an
    empty line, and at ``。``, ``！`` or ``？``.

    >>> split_sentences('He said: "No!" Then he left.')
    ['He said: "No', 'Then he left.']
    """
    return _SENTENCE_END.split(text)


@dataclass(frozen=True)
class EncodedCorpus:
    """A corpus as ids in a folder: ``words[i]`` occurs ``word_counts[i]`` times and has id i.

    Frequent words come first, ties in alphabetical order. The shards are one stream, in order; windows go
    across them. -1 in it is a border that windows do not cross: never first, last or beside another.
    """

    folder: Path
    words: list[str]
    word_counts: npt.NDArray[np.int64]  # int64 [vocabulary]
    num_tokens: int  # before words outside the vocabulary were removed
    shard_sizes: tuple[int, ...]
    borders: str | None = None  # of BORDERS
    fingerprint: str = ""  # of words and ids
    tally: readers.Tally = field(default_factory=readers.Tally)  # what reading left out or replaced

    def shard(self, i: int) -> npt.NDArray[np.int32]:
        """Ids of one shard, int32 ``[shard_sizes[i]]``, mapped from disk, to be read only."""
        return StoredArray.of_npy(self.folder / _shard_name(i), np.int32, self.shard_sizes[i]).map()

    def shards(self) -> list[npt.NDArray[np.int32]]:
        """Ids of all shards in order, each as `shard` gives it."""
        return [self.shard(i) for i in range(len(self.shard_sizes))]

    @classmethod
    def open(cls, folder: str | Path) -> "EncodedCorpus":
        """The corpus that `encode` put into a folder; its files are checked against their sums.

        Raises:
            FileNotFoundError: there is none.
            DamagedError: its files are not those that were written, or do not fit one another.
            ValueError: it has another version of the format.
        """
        folder = Path(folder)
        manifest = files.read_manifest(folder, _VERSION, _FIELDS, _REMEDY)
        sizes = manifest["shard_sizes"]
        try:
            words = (folder / "words.txt").read_text(encoding="utf-8").split("\n")[:-1]
            counts = StoredArray.of_npy(folder / "word_counts.npy", np.int64, manifest["num_words"]).read(
                0, manifest["num_words"]
            )
            if len(words) != len(counts):
                raise ValueError(f"{len(words):,} words in words.txt and {len(counts):,} in word_counts.npy")
            num_borders = sum(size if type(size) is int else -math.inf for size in sizes) - counts.sum()
            if num_borders < 0 or (num_borders and manifest["borders"] is None):
                raise ValueError(
                    f"shard_sizes of manifest.json are {sizes}, for {counts.sum():,} ids of words"
                )
            found = cls(
                folder, words, counts, manifest["num_tokens"], tuple(sizes), manifest["borders"],
                manifest["fingerprint"], readers.Tally(*(manifest[name] for name in _TALLY)),
            )  # fmt: skip
            found.shards()
        except (OSError, ValueError) as error:
            raise files.damaged(folder, str(error), _REMEDY) from None
        return found

    @property
    def options(self) -> dict[str, Any]:
        """Those of `OPTIONS` that it was encoded with."""
        manifest = files.read_json(self.folder / "manifest.json")
        return {name: manifest[name] for name in OPTIONS}


def open_encoded(corpus: str | Sequence[str]) -> EncodedCorpus | None:
    """The corpus in a folder that `encode` made, as `EncodedCorpus.open`; None if this is no such folder."""
    return EncodedCorpus.open(corpus) if isinstance(corpus, str) and readers.is_encoded(corpus) else None


def _shard_name(i: int) -> str:
    return f"ids-{i:05d}.npy"


def encode(
    corpus: str | Sequence[str],
    folder: str | Path,
    *,
    min_count: int = 5,
    max_vocab: int | None = None,
    borders: Borders | None = None,
    text_field: str | None = None,
    encoding_errors: readers.EncodingErrors = "strict",
    shard_tokens: int = 2**24,
    threads: int | None = None,
) -> EncodedCorpus:
    """Tokenize a corpus, number its words by falling count, ties alphabetically, and write a new folder.

    Memory is some 60 bytes for each distinct word, and some hundred MiB; the disk holds about four bytes a
    token at any time.

    Args:
        corpus: what `cemb.pmi.corpora.find_sources` takes: names, files, directories, globs, ``-``.
        folder: the folder to make.
        min_count: occurrences a word needs.
        max_vocab: keep so many frequent words; None: all.
        borders: where -1 ends windows: between documents, or between them and lines or sentences (by
            `split_sentences`); None: nowhere. Documents are files, lines of JSON, rows of Parquet, entries of
            dictionaries.
        text_field: field of JSON lines or column of Parquet; None: text.
        encoding_errors: refuse bytes that are not UTF-8 (strict), or replace them by U+FFFD, which separates
            words, and say in the manifest how often.
        shard_tokens: ids in a file.
        threads: at work at once, of no influence on the result; None: one a core.

    Raises:
        ValueError: there is no token, or no word reaches `min_count`; or bytes are not UTF-8.
        FileExistsError: the folder exists.
        OSError: the disk is full. These, and what reading raises, leave no folder.
    """
    folder = Path(folder)
    check_integers(1, min_count=min_count, max_vocab=max_vocab, threads=threads)
    check_integers(2, shard_tokens=shard_tokens)
    if borders is not None and borders not in BORDERS:
        raise ValueError(f"borders must be one of {', '.join(BORDERS)} or None, got {borders!r}")
    if encoding_errors not in ("strict", "replace"):
        raise ValueError(f"encoding_errors must be one of strict, replace, got {encoding_errors!r}")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; an encoded corpus is written to a new folder")
    tally = readers.Tally()
    sources = corpora.find_sources(corpus, text_field, encoding_errors, tally)
    with files.disk_errors(folder), files.atomic_directory(folder) as work:
        numbering = _Numbering(work, 0 if borders is None else BORDERS[borders], shard_tokens)
        numbering.read(sources, threads or len(os.sched_getaffinity(0)))
        words, counts, final = numbering.vocabulary(min_count, max_vocab)
        digest = hashlib.sha256("\n".join(words).encode())
        shard_sizes = _write_shards(work, numbering.parts, final, shard_tokens, digest)
        (work / "words.txt").write_text("".join(word + "\n" for word in words), encoding="utf-8")
        npy.save(work / "word_counts.npy", counts)
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "num_tokens": numbering.num_tokens,
            "num_tokens_in_vocabulary": int(counts.sum()),
            "num_words": len(words),
            "shard_sizes": shard_sizes,
            "min_count": min_count,
            "max_vocab": max_vocab,
            "borders": borders,
            "text_field": text_field,
            "encoding_errors": encoding_errors,
            **asdict(tally),
            "corpus": corpus if isinstance(corpus, str) else list(corpus),
            "sources": [{"name": source.name, "num_bytes": source.num_bytes} for source in sources],
            "fingerprint": f"sha256:{digest.hexdigest()}",
        }
        # Names of files need not be UTF-8; JSON has the same escapes for what is not.
        text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
        (work / "manifest.json").write_bytes(text.encode("utf-8", "backslashreplace"))
    return EncodedCorpus.open(folder)


class _Table:
    """Distinct byte strings, numbered as they come."""

    def __init__(self) -> None:
        self.size = 0
        self.keys = np.empty(1 << 16, np.uint8)
        self.key_ends = np.empty(1 << 12, np.int64)
        self.hashes = np.empty(1 << 12, np.uint64)
        self.slots = np.zeros(1 << 13, np.int32)

    @property
    def num_bytes(self) -> int:
        return int(self.key_ends[self.size - 1]) if self.size else 0

    def add(
        self,
        keys: npt.NDArray[np.uint8],
        key_ends: npt.NDArray[np.int64],
        hashes: npt.NDArray[np.uint64],
        wanted: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.int32]:
        """The numbers of those keys that are wanted."""
        if (most := self.size + int(np.count_nonzero(wanted))) > len(self.key_ends):
            capacity = 1 << int(most - 1).bit_length()
            self.key_ends = _longer(self.key_ends, capacity)
            self.hashes = _longer(self.hashes, capacity)
            self.slots = tokenizer.rehash(self.hashes, self.size, 2 * capacity)
        if (most := self.num_bytes + len(keys)) > len(self.keys):
            self.keys = _longer(self.keys, max(most, 2 * len(self.keys)))
        numbers = np.empty(len(key_ends), np.int32)
        table = (self.slots, self.keys, self.key_ends, self.hashes, self.size)
        self.size = tokenizer.insert(*table, keys, key_ends, hashes, wanted, numbers)
        return numbers

    def strings(self, numbers: npt.NDArray[Any]) -> list[bytes]:
        starts = np.where(numbers > 0, self.key_ends[numbers - 1], 0).tolist()
        stops = self.key_ends[numbers].tolist()
        return [self.keys[start:stop].tobytes() for start, stop in zip(starts, stops, strict=True)]


def _longer(array: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    new = np.zeros(length, array.dtype)
    new[: len(array)] = array
    return new


class _Numbering:
    """The first pass: ids of words in the order they come, written to `parts`, and how often they occur."""

    def __init__(self, work: Path, borders: int, part_tokens: int) -> None:
        self.num_tokens = 0
        self.parts: list[Path] = []
        self._work, self._borders, self._part_tokens = work, borders, part_tokens
        self._words = _Table()
        self._counts = np.zeros(1 << 12, np.int64)
        self._forget_runs()

    def _forget_runs(self) -> None:
        self._runs = _Table()
        self._run_words = np.empty(0, np.int32)  # of run i from _run_ends[i] to _run_ends[i + 1]
        self._run_ends = np.zeros(1, np.int64)

    def read(self, sources: list[readers.Source], threads: int) -> None:
        sizes = [source.num_bytes for source in sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        written = self._part_tokens
        with (
            tqdm(total=total, desc="encoding", unit="B", unit_scale=True, unit_divisor=1024) as progress,
            ThreadPoolExecutor(threads) as pool,
            ThreadPoolExecutor(1) as reader,
        ):
            blocks = _ahead(reader, readers.read_blocks(sources, _BLOCK_BYTES, progress.update))
            for scanned in in_order(pool, self._scan, blocks, threads + 1):
                ids = self._to_words(*scanned)
                if written >= self._part_tokens:
                    self.parts.append(self._work / f"part-{len(self.parts):05d}")
                    written = 0
                with self.parts[-1].open("ab") as file:
                    file.write(ids.data)
                written += len(ids)
                rate = self.num_tokens / max(progress.format_dict["elapsed"], 1e-3)
                progress.set_postfix_str(f"{rate / 1e6:.1f} M tokens/s", refresh=False)

    def _scan(self, block: bytes) -> tuple[npt.NDArray[Any], ...]:
        found: tuple[npt.NDArray[Any], ...] = tokenizer.scan(np.frombuffer(block, np.uint8), self._borders)
        return found

    def _to_words(
        self,
        ids: npt.NDArray[np.int32],
        keys: npt.NDArray[np.uint8],
        key_ends: npt.NDArray[np.int64],
        hashes: npt.NDArray[np.uint64],
        counts: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int32]:
        """Ids of a block's entries as ids of words, counted."""
        if self._runs.num_bytes > _MAX_REMEMBERED_BYTES:
            self._forget_runs()
        is_run = np.zeros(len(key_ends), np.bool_)
        if len(key_ends):  # runs with a byte that is not ASCII
            is_run = np.maximum.reduceat(keys, np.append(0, key_ends[:-1])) >= 128
        numbers = self._words.add(keys, key_ends, hashes, ~is_run)
        values, first, last = numbers, np.arange(len(numbers)), np.arange(1, len(numbers) + 1)
        if is_run.any():
            num_known = self._runs.size
            runs = self._runs.add(keys, key_ends, hashes, is_run)
            self._tokenize_runs(np.arange(num_known, self._runs.size))
            values = np.concatenate([self._run_words, numbers])
            first, last = first + len(self._run_words), last + len(self._run_words)
            first[is_run] = self._run_ends[runs[is_run]]
            last[is_run] = self._run_ends[runs[is_run] + 1]
        if self._words.size > len(self._counts):
            self._counts = _longer(self._counts, len(self._words.key_ends))
        out = np.empty(int(counts @ (last - first)) + np.count_nonzero(ids < 0), np.int32)
        out = out[: tokenizer.expand(ids, first, last, values, out)]
        self.num_tokens += tokenizer.add_counts(counts, first, last, values, self._counts)
        return out

    def _tokenize_runs(self, new: npt.NDArray[Any]) -> None:
        runs = self._runs.strings(new)
        text = b"\n".join(runs).decode()
        if self._borders == tokenizer.SENTENCES:
            text = _IDEOGRAPHIC_STOP.sub("\0", text)
        # Runs may be folded together: nothing composes with a line break.
        words: dict[str, int] = {}
        found: list[int] = []
        ends: list[int] = []
        for run in _folded(text).split("\n") if runs else ():
            for k, part in enumerate(run.split("\0")):
                if k:
                    found.append(-1)
                found += [words.setdefault(word, len(words)) for word in _word().findall(part)]
            ends.append(len(found))
        encoded = [word.encode() for word in words]
        keys = np.frombuffer(b"".join(encoded), np.uint8)
        key_ends = np.cumsum([len(word) for word in encoded], dtype=np.int64)
        wanted = np.ones(len(encoded), np.bool_)
        numbers = self._words.add(keys, key_ends, tokenizer.hash_keys(keys, key_ends), wanted)
        self._run_ends = np.append(self._run_ends, len(self._run_words) + np.array(ends, np.int64))
        self._run_words = np.append(
            self._run_words, np.append(numbers, np.int32(-1))[np.array(found, np.int64)]
        )

    def vocabulary(
        self, min_count: int, max_vocab: int | None
    ) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Words in their final order, their counts, and the final id of each first id, -1 for none."""
        if self.num_tokens == 0:
            raise ValueError("the corpus holds no token: no run of letters was found in it")
        counts = self._counts[: self._words.size]
        kept = np.flatnonzero(counts >= min_count)
        if not len(kept):
            raise ValueError(
                f"the vocabulary is empty: none of the corpus's {len(counts):,} words occurs at least "
                f"min_count={min_count} times (the most frequent occurs {counts.max()} times)"
            )
        # UTF-8 sorts as its characters do.
        strings = self._words.strings(kept)
        alphabetical = np.array(sorted(range(len(kept)), key=strings.__getitem__))
        order = alphabetical[np.argsort(-counts[kept[alphabetical]], kind="stable")][:max_vocab]
        final = np.full(len(counts), -1, np.int32)
        final[kept[order]] = np.arange(len(order), dtype=np.int32)
        return [strings[i].decode() for i in order], counts[kept[order]], final


def _ahead(pool: ThreadPoolExecutor, items: Iterator[bytes]) -> Iterator[bytes]:
    """Items of which the next is made while the present one is used."""
    coming = pool.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = pool.submit(next, items, None)
        yield item


def _write_shards(
    work: Path, parts: list[Path], final: npt.NDArray[np.int32], shard_tokens: int, digest: "hashlib._Hash"
) -> list[int]:
    """The second pass: ids of the vocabulary in shards of `shard_tokens`; takes `parts` away."""
    shard = np.empty(shard_tokens, np.int32)
    filled, is_border = 0, 2
    sizes: list[int] = []

    def write() -> None:
        ids = shard[:filled]
        npy.save(work / _shard_name(len(sizes)), ids)
        digest.update(ids.data)
        sizes.append(filled)

    for part in tqdm(parts, desc="numbering", unit="shard", delay=1):
        ids = np.fromfile(part, np.int32)
        part.unlink()
        while len(ids):
            taken, filled, is_border = tokenizer.renumber(ids, final, is_border, shard, filled)
            ids = ids[taken:]
            if len(ids):
                write()
                filled = 0
    if filled:
        write()
    return sizes
