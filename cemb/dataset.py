"""The study's data: a corpus's PMI matrix with its vocabulary and its optimum, built once and kept.

The optimum is kept too since the truncated SVD takes longer than all the rest.
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from cemb import corpus as corpora
from cemb import records
from cemb.counting import DEFAULT_MEMORY, count
from cemb.csr import CsrFolder
from cemb.evaluate import Optimum, optimum
from cemb.pmi import write_pmi


@dataclass(frozen=True)
class PmiConfig:
    """How text becomes a PMI matrix; see `encode`, `count` and `write_pmi`."""

    corpus: str = corpora.DEFAULT_CORPUS
    text_field: str | None = None
    borders: str | None = None
    min_count: int = 5
    max_vocab: int | None = None
    window_size: int = 5
    distance_weighting: str = "flat"
    subsample_threshold: float | None = None
    context_smoothing: float = 0.75
    num_negative: int = 1
    top_k: int | None = None
    rank: int = 100


@dataclass(frozen=True)
class PmiDataset:
    """A PMI matrix ``[words, words]``, its words by falling count, and its best factorization.

    The matrix's cells are mapped from disk.
    """

    matrix: sp.csr_array
    words: list[str]
    word_counts: np.ndarray
    optimum: Optimum
    summary: dict[str, object]  # the record of how it was built


def load_pmi(config: PmiConfig | None = None, *, memory: int = DEFAULT_MEMORY) -> PmiDataset:
    """The data set of a configuration, from results/local/data or built anew and put there.

    What is kept is found by the configuration, the corpus's content and this package's code, so a changed
    file or version is built again. A build that was stopped goes on from the tokens, counts or matrix it had
    finished. `memory` bounds the bytes that counting and PMI take; reading needs some for each distinct word
    besides, and the optimum some for each word. Raises what its stages raise for a corpus that cannot be
    used, and leaves nothing behind then.
    """
    config = config or PmiConfig()
    identity = {
        **asdict(config),
        "corpus_fingerprint": corpora.fingerprint(config.corpus, config.text_field),
        "code_hash": records.code_hash(Path(__file__).read_text(encoding="utf-8")),
        **{name: value for name, value in records.environment().items() if name.endswith("_version")},
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = records.results_dir() / "local" / "data" / f"pmi-{key}"
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        with records.exclusive(partial, wait=True):
            try:
                if not path.exists():
                    _build(config, identity, partial, path, memory)
                shutil.rmtree(partial)
            except (ValueError, FileNotFoundError):  # would be raised again
                shutil.rmtree(partial)
                raise
    return _read(path)


def _build(config: PmiConfig, identity: dict[str, object], partial: Path, path: Path, memory: int) -> None:
    lap = time.perf_counter()
    seconds = {}

    def done(stage: str) -> None:
        nonlocal lap
        now = time.perf_counter()
        seconds[f"{stage}_s"] = round(now - lap, 3)
        lap = now

    if not (partial / "corpus").exists():
        corpora.encode(
            config.corpus,
            partial / "corpus",
            min_count=config.min_count,
            max_vocab=config.max_vocab,
            text_field=config.text_field,
            borders=config.borders,
        )
    encoded = corpora.EncodedCorpus.open(partial / "corpus")
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
    if not (partial / "matrix").exists():
        write_pmi(
            counts,
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
        "num_tokens": encoded.num_tokens,
        "num_tokens_in_vocabulary": int(encoded.word_counts.sum()),
        "num_words": len(encoded.words),
        "num_counted_cells": counts.num_cells,
        "total_count": counts.total,
        "num_stored_cells": int(matrix.nnz),
        "density": matrix.nnz / (matrix.shape[0] * matrix.shape[1]),
        "mean_stored_value": float(matrix.data.mean(dtype=np.float64)),
        "squared_norm": best.squared_norm,
        "optimum_loss": best.loss,
        "optimum_explained_share": 1 - best.loss / best.squared_norm,
        **seconds,
        **records.provenance(),
    }
    with records.atomic_directory(path) as work:
        np.savez(work / "optimum.npz", left=best.left, singular_values=best.singular_values, right=best.right)
        np.save(work / "word_counts.npy", encoded.word_counts)
        (work / "words.txt").write_text("\n".join(encoded.words), encoding="utf-8")
        records.write([summary], work / "records.jsonl")
        (partial / "matrix").rename(work / "matrix")


def _read(path: Path) -> PmiDataset:
    summary = records.read(path / "records.jsonl")[0]
    with np.load(path / "optimum.npz") as stored:
        best = Optimum(**stored, squared_norm=summary["squared_norm"])
    return PmiDataset(
        CsrFolder(path / "matrix").matrix(),
        (path / "words.txt").read_text(encoding="utf-8").split("\n"),
        np.load(path / "word_counts.npy"),
        best,
        summary,
    )
