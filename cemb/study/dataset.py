"""The study's data: the PMI matrix of a corpus, or of events, with names and optimum, built once and kept.

The optimum is kept too since the truncated SVD takes longer than all the rest.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from cemb import files
from cemb.checks import check_integers, check_reals
from cemb.pmi import corpora, encode, events, readers
from cemb.pmi.cooccurrence import DistanceWeighting, Windows
from cemb.pmi.corpora import CorpusName
from cemb.pmi.csr import CsrFolder, CsrWriter
from cemb.pmi.matrix import PmiOptions, write_pmi
from cemb.pmi.out_of_core import DEFAULT_MEMORY, CooccurrenceCounts, check_memory, count, parse_memory
from cemb.study import records
from cemb.study.identity import Code
from cemb.train.objective import Optimum, optimum

_Stage = TypeVar("_Stage")
_TEXT_OPTIONS = (
    *encode.OPTIONS,
    "window_size",
    "distance_weighting",
    "subsample_threshold",
)

# What the key of a data set stands for.
_BUILDS = "from cemb.study.dataset import load_pmi\nload_pmi"


@dataclass(frozen=True)
class PmiConfig:
    """How text becomes a PMI matrix, see `encode`, `count` and `write_pmi`; or events, see `read_events`.

    Raises ValueError for numbers out of range, or if options of text are given with `events`, or options of
    events without.
    """

    corpus: CorpusName | tuple[CorpusName, ...] = corpora.DEFAULT_CORPUS
    """Names, files, directories or quoted globs of UTF-8 text, JSON lines, Parquet, plain or compressed; or a
    folder that encode made, which has its own options of encoding."""
    events: str | None = None
    """Columns of users and items, as user,item, if the corpus is CSV, TSV or Parquet with an event a row."""
    count_column: str | None = None
    """Column of how many events a row stands for, or each for one."""
    text_field: str | None = None
    """Field of JSON lines or column of Parquet, by default text."""
    encoding_errors: readers.EncodingErrors = "strict"
    """Bytes that are not UTF-8 are refused, or replaced by U+FFFD and counted."""
    borders: encode.Borders | None = None
    """Windows stay inside such a part of the text, which else is one stream."""
    min_count: int = 5
    """Occurrences a word needs."""
    max_vocab: int | None = None
    """Keep so many frequent words, or all."""
    window_size: int = 5
    """Tokens to each side."""
    distance_weighting: DistanceWeighting = "flat"
    """Pairs count 1, or (harmonic) 1 over their distance."""
    subsample_threshold: float | None = None
    """As word2vec's; without it all tokens count."""
    context_smoothing: float = 0.75
    """Exponent on context counts."""
    num_negative: int = 1
    """PMI is shifted down by its logarithm."""
    top_k: int | None = None
    """Largest cells kept of a row, or all."""
    rank: int = 100
    """Dimension of the vectors, and of the best factorization."""

    def __post_init__(self) -> None:
        check_integers(1, min_count=self.min_count, max_vocab=self.max_vocab, rank=self.rank)
        check_reals("(0, inf)", subsample_threshold=self.subsample_threshold)
        Windows(self.window_size, self.distance_weighting)
        PmiOptions(self.context_smoothing, self.num_negative, top_k=self.top_k)
        if self.events is None:
            if self.count_column is not None:
                raise ValueError(f"count_column={self.count_column!r} goes with events, which are not given")
            return
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name in _TEXT_OPTIONS and getattr(self, field.name) != field.default
        ]
        if given:
            raise ValueError(f"events={self.events!r} take no options of text, got {', '.join(given)}")
        names = [self.corpus] if isinstance(self.corpus, str) else self.corpus
        if texts := [name for name in names if name in corpora.CORPORA]:
            raise ValueError(
                f"events={self.events!r} are read from files, and the corpus {texts[0]!r} is text"
            )


@dataclass(frozen=True)
class PmiDataset:
    """A PMI matrix ``[words, contexts]``, the names of both by falling count, and its best factorization.

    Of text, contexts are the words; of events, words are the users and contexts the items. The matrix's cells
    are mapped from disk.
    """

    matrix: sp.csr_array
    words: list[str]
    word_counts: npt.NDArray[np.int64]  # int64 [words]
    contexts: list[str]
    context_counts: npt.NDArray[np.int64]  # int64 [contexts]
    optimum: Optimum
    summary: records.Record  # the record of how it was built
    folder: Path  # where it is kept

    def check_is_text(self, what: str) -> None:
        """Raise ValueError unless the matrix is of text, so that its contexts are its words."""
        if (columns := self.summary["events"]) is not None:
            raise ValueError(
                f"{what} needs a matrix of words by words, and this one is of events={columns!r}, "
                f"{self.matrix.shape[0]:,} × {self.matrix.shape[1]:,}"
            )


def identity(config: PmiConfig) -> records.Record:
    """All that a data set depends on: options, the corpus's content, the meaning of code, and versions."""
    options = asdict(config)
    if config.events is not None:
        options = {name: value for name, value in options.items() if name not in _TEXT_OPTIONS}
    return {
        **options,
        "corpus_fingerprint": _fingerprint(config),
        "code_hash": Code.of_folder(records.PACKAGE).reach(_BUILDS).hash,
        **{name: value for name, value in records.environment().items() if name.endswith("_version")},
    }


def load_pmi(config: PmiConfig | None = None, *, memory: int | str = DEFAULT_MEMORY) -> PmiDataset:
    """The data set of a configuration, from results/local/data or built anew and put there.

    What is kept is found by the configuration, the corpus's content and the meaning of the code that builds
    it, so a changed constant or version is built again. A build that was stopped, or
    that lacked memory or disk, goes on from the tokens, counts or matrix it had finished. Raises what its
    stages raise for a corpus that cannot be used, and leaves nothing behind then; DamagedError for a data set
    whose files are not those that were written; RuntimeError if the corpus changes meanwhile.

    Args:
        memory: bytes, or a size such as 512MiB, that counting and PMI take at most; reading needs some for
            each distinct word, or for each event, besides, and the optimum some for each word.
    """
    config, memory = _with_options_of_encoding(config or PmiConfig()), parse_memory(memory)
    if config.events is None:
        check_memory(memory, config.max_vocab or 1, 0)
    found = identity(config)
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    path = records.results_dir() / "local" / "data" / f"pmi-{key}"
    partial = path.with_name(path.name + ".partial")
    if not path.exists() or partial.exists():  # of a build that was killed in its last moment
        with files.exclusive(partial, wait=True):
            try:
                if not path.exists():
                    _build(config, found, partial, path, memory)
                shutil.rmtree(partial)
            finally:
                with suppress(OSError):  # it is gone, or holds what was finished
                    partial.rmdir()
    return read(path)


def _with_options_of_encoding(config: PmiConfig) -> PmiConfig:
    """The configuration with the options that its corpus was encoded with, if it is encoded already.

    ValueError for options of encoding that are neither those nor left out.
    """
    encoded = None if config.events else encode.open_encoded(config.corpus)
    if encoded is None:
        return config
    own, default = encoded.options, PmiConfig()
    for name, value in own.items():
        given = getattr(config, name)
        if given not in (value, getattr(default, name)):
            raise ValueError(
                f"the corpus {config.corpus!r} is encoded already, with {name}={value!r}, and got "
                f"{name}={given!r}; leave it out, or encode the corpus again"
            )
    return replace(config, **own)


def _fingerprint(config: PmiConfig) -> str:
    if config.events is None:
        return corpora.fingerprint(config.corpus, config.text_field)
    return events.fingerprint(config.corpus)


def _kept(folder: Path, read: Callable[[Path], _Stage]) -> _Stage | None:
    """What an earlier build finished; None if there is nothing, or if it is damaged, and then removed."""
    if not folder.exists():
        return None
    try:
        return read(folder)
    except files.DamagedError as error:
        print(f"cemb: {error}; it is made again", file=sys.stderr)
        shutil.rmtree(folder)
        return None


def _check_unchanged(config: PmiConfig, identity: records.Record, read: Path) -> None:
    """RuntimeError if the corpus is no longer what it was when its content was looked at; removes `read`."""
    if _fingerprint(config) != identity["corpus_fingerprint"]:
        shutil.rmtree(read)
        raise RuntimeError(f"the corpus {config.corpus!r} changed while it was read; run it again")


@dataclass(frozen=True)
class _Counted:
    matrix: CsrFolder
    words: list[str]
    word_counts: npt.NDArray[np.int64]
    contexts: list[str]
    context_counts: npt.NDArray[np.int64]
    sizes: records.Record  # fields of the record


def _check_rank(config: PmiConfig, shape: tuple[int, ...], partial: Path) -> None:
    """ValueError, before counting, if the corpus is too small for the rank; leaves nothing then."""
    if config.rank >= min(shape):
        shutil.rmtree(partial)
        raise ValueError(f"rank must lie in [1, {min(shape)}) for a matrix {shape}, got {config.rank}")


def _count_text(
    config: PmiConfig, identity: records.Record, partial: Path, memory: int, done: Callable[[str], None]
) -> _Counted:
    encoded = encode.open_encoded(config.corpus) or _kept(partial / "corpus", encode.EncodedCorpus.open)
    if encoded is None:
        options = {name: getattr(config, name) for name in encode.OPTIONS}
        encoded = encode.encode(config.corpus, partial / "corpus", **options)
        _check_unchanged(config, identity, partial / "corpus")
    _check_rank(config, 2 * (len(encoded.words),), partial)
    done("encode")
    counts = _kept(partial / "counts", CooccurrenceCounts) or count(
        encoded.shards(),
        partial / "counts",
        vocab_size=len(encoded.words),
        window_size=config.window_size,
        distance_weighting=config.distance_weighting,
        subsample_threshold=config.subsample_threshold,
        word_counts=encoded.word_counts,
        memory=memory,
    )
    done("count")
    sizes = {
        "num_tokens": encoded.num_tokens,
        "num_tokens_in_vocabulary": int(encoded.word_counts.sum()),
        "total_count": counts.total,
        **asdict(encoded.tally),
    }
    return _Counted(counts, encoded.words, encoded.word_counts, encoded.words, encoded.word_counts, sizes)


def _count_events(
    config: PmiConfig, identity: records.Record, partial: Path, done: Callable[[str], None]
) -> _Counted:
    assert config.events is not None
    folder = partial / "counts"
    counts = _kept(folder, CsrFolder)
    if counts is None:
        tally = readers.Tally()
        cells, users, items = events.read_events(
            config.corpus, config.events, count_column=config.count_column, tally=tally
        )
        with (
            files.disk_errors(folder),
            files.atomic_directory(folder) as work,
            CsrWriter(work, cells.shape[1], np.int64, cells.nnz) as writer,
        ):
            _write_names(work / "names.json", users, items)
            writer.append(np.diff(cells.indptr), cells.indices, cells.data)
            writer.finish(kind="counts", events=config.events, num_left_out=tally.num_left_out)
        counts = CsrFolder(folder)
        _check_unchanged(config, identity, folder)
    _check_rank(config, counts.shape, partial)
    users, items = _read_names(folder / "names.json")
    matrix = counts.matrix()
    done("count")
    sizes = {"num_events": int(matrix.data.sum()), "num_left_out": counts.manifest["num_left_out"]}
    return _Counted(counts, users, matrix.sum(axis=1), items, matrix.sum(axis=0), sizes)


def _write_names(path: Path, words: list[str], contexts: list[str]) -> None:
    # As JSON, for names of users may hold line breaks.
    path.write_text(json.dumps([words, contexts], ensure_ascii=False), encoding="utf-8")


def _read_names(path: Path) -> tuple[list[str], list[str]]:
    words, contexts = files.read_json(path)
    return words, contexts


def _build(config: PmiConfig, identity: records.Record, partial: Path, path: Path, memory: int) -> None:
    lap = time.perf_counter()
    seconds: dict[str, float] = {}

    def done(stage: str) -> None:
        nonlocal lap
        now = time.perf_counter()
        seconds[f"{stage}_s"] = round(now - lap, 3)
        lap = now

    if config.events is None:
        counted = _count_text(config, identity, partial, memory, done)
    else:
        counted = _count_events(config, identity, partial, done)
    stored = _kept(partial / "matrix", CsrFolder)
    if stored is None:
        try:
            stored = write_pmi(
                counted.matrix,
                partial / "matrix",
                context_smoothing=config.context_smoothing,
                num_negative=config.num_negative,
                top_k=config.top_k,
                memory=memory,
            )
        except ValueError:  # of these counts and options, so it would be raised again
            shutil.rmtree(partial)
            raise
    matrix = stored.matrix()
    done("pmi")
    best = optimum(matrix, config.rank)
    done("optimum")
    summary = {
        "kind": "pmi",
        **identity,
        **counted.sizes,
        "num_words": len(counted.words),
        "num_contexts": len(counted.contexts),
        "num_counted_cells": counted.matrix.num_cells,
        "num_stored_cells": int(matrix.nnz),
        "density": matrix.nnz / (matrix.shape[0] * matrix.shape[1]),
        "mean_stored_value": float(matrix.data.mean(dtype=np.float64)),
        "squared_norm": best.squared_norm,
        "optimum_loss": best.loss,
        "optimum_explained_share": 1 - best.loss / best.squared_norm,
        **seconds,
        **records.provenance(),
    }
    with files.disk_errors(path), files.atomic_directory(path) as work:
        np.savez(work / "optimum.npz", left=best.left, singular_values=best.singular_values, right=best.right)
        np.savez(work / "counts.npz", words=counted.word_counts, contexts=counted.context_counts)
        _write_names(work / "names.json", counted.words, counted.contexts)
        records.write([summary], work / "records.jsonl")
        (partial / "matrix").rename(work / "matrix")


def read(path: Path) -> PmiDataset:
    files.verify(path, "remove it, and it is built again")
    summary = records.read(path / "records.jsonl")[0]
    with np.load(path / "optimum.npz") as stored:
        best = Optimum(**stored, squared_norm=summary["squared_norm"])
    with np.load(path / "counts.npz") as stored:
        word_counts, context_counts = stored["words"], stored["contexts"]
    words, contexts = _read_names(path / "names.json")
    matrix = CsrFolder(path / "matrix").matrix()
    return PmiDataset(matrix, words, word_counts, contexts, context_counts, best, summary, path)
