"""The study's data: the PMI matrix of a corpus, or of events, with names and optimum, built once and kept.

The optimum is kept too since the truncated SVD takes longer than all the rest.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from cemb import files
from cemb.pmi import corpora, encode, events
from cemb.pmi.cooccurrence import DistanceWeighting
from cemb.pmi.corpora import CorpusName
from cemb.pmi.csr import CsrFolder, CsrWriter, disk_errors
from cemb.pmi.matrix import write_pmi
from cemb.pmi.out_of_core import DEFAULT_MEMORY, count, parse_memory
from cemb.study import records
from cemb.study.identity import Code
from cemb.train.objective import Optimum, optimum

_TEXT_OPTIONS = (
    "text_field",
    "borders",
    "min_count",
    "max_vocab",
    "window_size",
    "distance_weighting",
    "subsample_threshold",
)

# What the key of a data set stands for.
_BUILDS = "from cemb.study.dataset import load_pmi\nload_pmi"


@dataclass(frozen=True)
class PmiConfig:
    """How text becomes a PMI matrix, see `encode`, `count` and `write_pmi`; or events, see `read_events`.

    Raises ValueError if options of text are given with `events`.
    """

    corpus: CorpusName | tuple[CorpusName, ...] = corpora.DEFAULT_CORPUS
    """Names, files, directories or quoted globs of UTF-8 text, JSON lines, Parquet, plain or compressed."""
    events: str | None = None
    """Columns of users and items, as user,item, if the corpus is CSV, TSV or Parquet with an event a row."""
    text_field: str | None = None
    """Field of JSON lines or column of Parquet, by default text."""
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
        if self.events is None:
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


def load_pmi(config: PmiConfig | None = None, *, memory: int | str = DEFAULT_MEMORY) -> PmiDataset:
    """The data set of a configuration, from results/local/data or built anew and put there.

    What is kept is found by the configuration, the corpus's content and the meaning of the code that builds
    it, so a changed constant or version is built again. A build that was stopped goes on from the tokens,
    counts or matrix it had finished. Raises what its stages raise for a corpus that cannot be used, and
    leaves nothing behind then.

    Args:
        memory: bytes, or a size such as 512MiB, that counting and PMI take at most; reading needs some for
            each distinct word, or for each event, besides, and the optimum some for each word.
    """
    config, memory = config or PmiConfig(), parse_memory(memory)
    if config.events is None:
        options, fingerprint = asdict(config), corpora.fingerprint(config.corpus, config.text_field)
    else:
        options = {name: value for name, value in asdict(config).items() if name not in _TEXT_OPTIONS}
        fingerprint = events.fingerprint(config.corpus)
    identity = {
        **options,
        "corpus_fingerprint": fingerprint,
        "code_hash": Code.of_folder(records.PACKAGE).reach(_BUILDS).hash,
        **{name: value for name, value in records.environment().items() if name.endswith("_version")},
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = records.results_dir() / "local" / "data" / f"pmi-{key}"
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        with files.exclusive(partial, wait=True):
            try:
                if not path.exists():
                    _build(config, identity, partial, path, memory)
                shutil.rmtree(partial)
            except (ValueError, FileNotFoundError):  # would be raised again
                shutil.rmtree(partial)
                raise
    return _read(path)


@dataclass(frozen=True)
class _Counted:
    matrix: CsrFolder
    words: list[str]
    word_counts: npt.NDArray[np.int64]
    contexts: list[str]
    context_counts: npt.NDArray[np.int64]
    sizes: records.Record  # fields of the record


def _count_text(config: PmiConfig, partial: Path, memory: int, done: Callable[[str], None]) -> _Counted:
    if not (partial / "corpus").exists():
        encode.encode(
            config.corpus,
            partial / "corpus",
            min_count=config.min_count,
            max_vocab=config.max_vocab,
            text_field=config.text_field,
            borders=config.borders,
        )
    encoded = encode.EncodedCorpus.open(partial / "corpus")
    done("encode")
    counts = count(
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
    }
    return _Counted(counts, encoded.words, encoded.word_counts, encoded.words, encoded.word_counts, sizes)


def _count_events(config: PmiConfig, partial: Path, memory: int, done: Callable[[str], None]) -> _Counted:
    assert config.events is not None
    folder = partial / "counts"
    if not folder.exists():
        counts, users, items = events.read_events(config.corpus, config.events)
        with (
            disk_errors(folder),
            files.atomic_directory(folder) as work,
            CsrWriter(work, counts.shape[1], np.int64, counts.nnz) as writer,
        ):
            _write_names(work / "names.json", users, items)
            writer.append(np.diff(counts.indptr), counts.indices, counts.data)
            writer.finish(kind="counts", events=config.events)
    counts = CsrFolder(folder)
    users, items = _read_names(folder / "names.json")
    matrix = counts.matrix()
    done("count")
    sizes = {"num_events": int(matrix.data.sum())}
    return _Counted(counts, users, matrix.sum(axis=1), items, matrix.sum(axis=0), sizes)


def _write_names(path: Path, words: list[str], contexts: list[str]) -> None:
    # As JSON, for names of users may hold line breaks.
    path.write_text(json.dumps([words, contexts], ensure_ascii=False), encoding="utf-8")


def _read_names(path: Path) -> tuple[list[str], list[str]]:
    words, contexts = json.loads(path.read_text(encoding="utf-8"))
    return words, contexts


def _build(config: PmiConfig, identity: records.Record, partial: Path, path: Path, memory: int) -> None:
    lap = time.perf_counter()
    seconds: dict[str, float] = {}

    def done(stage: str) -> None:
        nonlocal lap
        now = time.perf_counter()
        seconds[f"{stage}_s"] = round(now - lap, 3)
        lap = now

    counted = (_count_text if config.events is None else _count_events)(config, partial, memory, done)
    if not (partial / "matrix").exists():
        write_pmi(
            counted.matrix,
            partial / "matrix",
            context_smoothing=config.context_smoothing,
            num_negative=config.num_negative,
            top_k=config.top_k,
            memory=memory,
        )
    matrix = CsrFolder(partial / "matrix").matrix()
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
    with files.atomic_directory(path) as work:
        np.savez(work / "optimum.npz", left=best.left, singular_values=best.singular_values, right=best.right)
        np.savez(work / "counts.npz", words=counted.word_counts, contexts=counted.context_counts)
        _write_names(work / "names.json", counted.words, counted.contexts)
        records.write([summary], work / "records.jsonl")
        (partial / "matrix").rename(work / "matrix")


def _read(path: Path) -> PmiDataset:
    summary = records.read(path / "records.jsonl")[0]
    with np.load(path / "optimum.npz") as stored:
        best = Optimum(**stored, squared_norm=summary["squared_norm"])
    with np.load(path / "counts.npz") as stored:
        word_counts, context_counts = stored["words"], stored["contexts"]
    words, contexts = _read_names(path / "names.json")
    matrix = CsrFolder(path / "matrix").matrix()
    return PmiDataset(matrix, words, word_counts, contexts, context_counts, best, summary, path)
