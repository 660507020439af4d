"""What `notebooks/tour.ipynb` shows: neighbours in a small hashed table, its collisions, one id's hash.

Everything here is small enough to be worked out anew at each move of a slider. Figures and tables are made by
plain functions; `live` puts controls over any of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import scipy.stats
import torch
from IPython.display import display
from matplotlib.figure import Figure

from cemb import files, reference
from cemb.hashing import HashSpec
from cemb.pmi import corpora
from cemb.report.figures import BLUE, GREY, ORANGE, RED, STYLE
from cemb.study import records
from cemb.study.dataset import PmiConfig, PmiDataset, load_pmi
from cemb.study.quality import QualityCase, measure_quality
from cemb.train.similarity import neighbours

SYNTHETIC = "synthetic"
# A synthetic word is its topic's name and two letters, so that neighbours show whether topics were found.
TOPICS = (
    *("bird", "cloud", "fish", "grain", "harbour", "king"),
    *("metal", "music", "river", "stone", "tree", "water"),
)
COMMON = ("the", "of", "and", "to", "in", "that", "is", "with")


def synthetic_text(num_sentences: int = 12_000, words_per_topic: int = 60, seed: int = 0) -> str:
    """A text whose sentences, a line each, keep to one of `TOPICS`; the same for the same arguments.

    A sentence has eight words of its topic, drawn with Zipf frequencies, and four of `COMMON`.
    Raises ValueError for more than 676 words per topic, which two letters cannot tell apart.
    """
    if not 1 <= words_per_topic <= 26**2:
        raise ValueError(f"words_per_topic must lie in [1, 676], got {words_per_topic}")
    rng = np.random.default_rng(seed)
    endings = [chr(97 + i // 26) + chr(97 + i % 26) for i in range(words_per_topic)]
    shares = 1 / np.arange(1, words_per_topic + 1)
    topics = rng.integers(len(TOPICS), size=num_sentences)
    own = rng.choice(words_per_topic, (num_sentences, 8), p=shares / shares.sum())
    common = rng.choice(COMMON, (num_sentences, 4))
    lines = []
    for topic, ids, others in zip(topics, own, common, strict=True):
        words = [*(TOPICS[topic] + endings[i] for i in ids), *map(str, others)]
        lines.append(" ".join(rng.permutation(words)))
    return "\n".join(lines) + "\n"


def load_data(corpus: str | None = None, *, max_vocab: int = 2000, rank: int = 32) -> PmiDataset:
    """The PMI matrix of a corpus's `max_vocab` most frequent words, kept as `load_pmi` keeps it.

    `corpus` is a name or path, None for the study's own, or ``"synthetic"``, which also stands in where the
    packages of the study's own are not installed. Raises what `load_pmi` does.
    """
    if corpus is None:
        try:
            corpora.find_sources(corpora.DEFAULT_CORPUS)
            corpus = corpora.DEFAULT_CORPUS
        except FileNotFoundError:
            corpus = SYNTHETIC
    if corpus == SYNTHETIC:
        path = records.results_dir() / "local" / "tour" / "synthetic.txt"
        files.write_atomic(path, synthetic_text())
        corpus = str(path)
    return load_pmi(PmiConfig(corpus=corpus, max_vocab=max_vocab, rank=rank))


def table_spec(
    data: PmiDataset, pool_size: int, block_size: int = 1, *, signed: bool = False, seed: int = 0
) -> HashSpec:
    """How `hashed_vectors` hashes: rows ``[0, words)`` are words, ``[words, 2 * words)`` contexts."""
    rank = len(data.optimum.singular_values)
    return HashSpec(2 * len(data.words), rank, pool_size, block_size, seed, signed)


def full_vectors(data: PmiDataset) -> tuple[float, npt.NDArray[np.float32]]:
    """Gap 0 and the word vectors, float32 ``[words, rank]``, of the best factorization there is."""
    return 0.0, data.optimum.factors()[0]


def hashed_vectors(
    data: PmiDataset, pool_size: int, block_size: int = 1, *, signed: bool = False, num_steps: int = 30
) -> tuple[float, npt.NDArray[np.float32]]:
    """Gap and word vectors, float32 ``[words, rank]``, of one pool trained on full batches by Adam.

    The gap is that of `cemb.train.objective.Optimum.gap`. Deterministic for the same number of threads.
    Raises ValueError for sizes that no `HashSpec` has, and RuntimeError if training diverges.
    """
    table_spec(data, pool_size, block_size)  # refuses before any training
    case = QualityCase(
        "hashed", "adam", pool_size=pool_size, block_size=block_size, signed=signed, num_steps=num_steps
    )
    record, model = measure_quality(case, data)
    if model is None:
        raise RuntimeError(record["failure"])
    with torch.no_grad():
        return record["gap"], model.factors()[0].numpy()


def nearest(
    data: PmiDataset, found: tuple[float, npt.NDArray[np.float32]], probes: Sequence[str], count: int = 8
) -> pd.DataFrame:
    """The `count` nearest words of each probe in a column of its own, captioned with the gap.

    `found` is what `full_vectors` and `hashed_vectors` return. Raises KeyError for a word that the vocabulary
    lacks.
    """
    gap, vectors = found
    columns = {word: [near for near, _ in neighbours(vectors, data.words, word, count)] for word in probes}
    frame = pd.DataFrame(columns, index=pd.RangeIndex(1, count + 1))
    frame.columns.name = f"gap {gap:.3f}"
    return frame


def known_words(data: PmiDataset, wanted: Sequence[str], count: int = 4) -> list[str]:
    """The first `count` of the wanted words that the vocabulary has, filled up with frequent ones.

    The most frequent quarter is passed over: its words go with everything.
    """
    known = set(data.words)
    others = data.words[len(data.words) // 4 :]
    return list(dict.fromkeys([*(word for word in wanted if word in known), *others]))[:count]


def row_of(data: PmiDataset, word: str) -> int:
    """The row of a word; KeyError if the vocabulary lacks it."""
    if word not in data.words:
        raise KeyError(f"{word!r} is not among the {len(data.words):,} words of the vocabulary")
    return data.words.index(word)


def slots(spec: HashSpec, rows: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Pool slots that rows are read from, int64 ``[rows, embedding_dim]``; IndexError if out of range."""
    ids = torch.as_tensor(np.asarray(rows, dtype=np.int64))
    reference.check_ids(ids, spec.num_embeddings)
    return reference.locate(ids, spec)[0].numpy()


def _reads(spec: HashSpec) -> sp.csr_array:
    """1 where a row reads a slot, however often, int64 ``[num_embeddings, pool_size]``."""
    located = slots(spec, np.arange(spec.num_embeddings))
    matrix = sp.csr_array(
        (np.ones(located.size, np.int64), located.ravel(), np.arange(len(located) + 1) * spec.embedding_dim),
        shape=(spec.num_embeddings, spec.pool_size),
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def readers(spec: HashSpec) -> npt.NDArray[np.int64]:
    """How many different rows read each slot, int64 ``[pool_size]``; for tables small enough to write out."""
    return np.asarray(_reads(spec).sum(axis=0))


def sharers(data: PmiDataset, spec: HashSpec, word: str, count: int = 8) -> pd.DataFrame:
    """The `count` rows that share most slots with a word: ``row``, ``word``, ``side`` and ``shared`` slots.

    `spec` is that of `table_spec`. Ties go to the more frequent, words first. Raises KeyError for a word that
    the vocabulary lacks.
    """
    own = row_of(data, word)
    reads = _reads(spec)
    shared = reads @ reads[[own]].toarray()[0]
    shared[own] = -1
    best = np.argsort(-shared, kind="stable")[:count]
    sides = np.where(best < len(data.words), "word", "context")
    names = [data.words[row % len(data.words)] for row in best]
    return pd.DataFrame({"row": best, "word": names, "side": sides, "shared": shared[best]})


def row_blocks(spec: HashSpec, row: int) -> pd.DataFrame:
    """Where a row's blocks lie, by `HashSpec.locate`: ``columns``, ``slots`` (both inclusive) and ``sign``.

    One line a block. Raises IndexError for a row out of range.
    """
    lines = []
    for first in range(0, spec.embedding_dim, spec.block_size):
        last = min(first + spec.block_size, spec.embedding_dim) - 1
        start, sign = spec.locate(row, first)
        columns, places = (
            f"{low:,}" if low == high else f"{low:,} to {high:,}"
            for low, high in ((first, last), (start, start + last - first))
        )
        lines.append({"columns": columns, "slots": places, "sign": "+" if sign > 0 else "−"})
    return pd.DataFrame(lines)


def _panels(widths: Sequence[float], size: tuple[float, float]) -> tuple[Figure, npt.NDArray[Any]]:
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(widths), figsize=size, width_ratios=widths, squeeze=False)
    plt.close(figure)  # a cell shows what it returns, once
    return figure, axes[0]


def _grid(spec: HashSpec) -> tuple[int, int]:
    """Lines and columns of a drawing that has a place for each slot, twice as wide as high."""
    width = max(1, round((2 * spec.pool_size) ** 0.5))
    return -(-spec.pool_size // width), width


def draw_readers(spec: HashSpec) -> Figure:
    """How many rows share each slot: the pool as a map, and slots by their number of readers.

    The line is the Poisson distribution of the same mean: what slots drawn at random would give.
    """
    counts = readers(spec)
    height, width = _grid(spec)
    cells = np.full(height * width, np.nan)
    cells[: spec.pool_size] = counts
    figure, (pool, histogram) = _panels((3, 2), (8.5, 3.2))
    image = pool.imshow(cells.reshape(height, width), cmap="viridis", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=pool, label="rows that read the slot")
    pool.set(title=f"pool of {spec.pool_size:,}, blocks of {spec.block_size}", xticks=[], yticks=[])
    pool.grid(visible=False)
    numbers = np.arange(counts.max() + 1)
    found = np.bincount(counts)
    chance = scipy.stats.poisson.pmf(numbers, counts.mean()) * spec.pool_size
    histogram.bar(numbers, found, width=1, color=BLUE, label="found")
    histogram.plot(numbers, chance, color=ORANGE, label="at random")
    histogram.set(xlabel="rows that read the slot", ylabel="slots")
    histogram.legend()
    return figure


def draw_rows(spec: HashSpec, rows: tuple[int, int], names: tuple[str, str]) -> Figure:
    """The slots of two rows in the pool, and which they share. Raises IndexError for a row out of range."""
    first, second = (np.unique(own) for own in slots(spec, rows))
    shared = np.intersect1d(first, second)
    height, width = _grid(spec)
    figure, (axes,) = _panels((1,), (8.5, 3.2))
    for places, name, colour, marker in (
        (np.setdiff1d(first, shared), names[0], BLUE, "s"),
        (np.setdiff1d(second, shared), names[1], ORANGE, "o"),
        (shared, "both", RED, "D"),
    ):
        label = f"{name}: {len(places):,}"
        axes.scatter(places % width, places // width, s=28, color=colour, marker=marker, label=label)
    axes.set(
        xlim=(-0.5, width - 0.5),
        ylim=(height - 0.5, -0.5),
        xticks=[],
        yticks=[],
        title=f"slots of a pool of {spec.pool_size:,}, blocks of {spec.block_size}",
    )
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=GREY)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def slider(name: str, values: Sequence[int], value: int) -> ipywidgets.SelectionSlider:
    """A slider over the given numbers and `value`, in order."""
    options = [(f"{number:,}", number) for number in sorted({*values, value})]
    return ipywidgets.SelectionSlider(options=options, value=value, description=name, continuous_update=False)


def live(draw: Callable[..., object], **controls: ipywidgets.ValueWidget) -> None:
    """Show controls and what ``draw(**values)`` makes of them, anew whenever one changes.

    The first drawing is an ordinary output, so a notebook that runs without a browser shows it too. Of an
    error after a change, ValueError or LookupError, the message is shown.
    """

    def values() -> dict[str, object]:
        return {name: control.value for name, control in controls.items()}

    def redraw(change: dict[str, object]) -> None:
        try:
            shown.update(draw(**values()))
        except (ValueError, LookupError) as error:
            shown.update({"text/plain": str(error)}, raw=True)

    display(ipywidgets.VBox(list(controls.values())))
    shown = display(draw(**values()), display_id=True)
    for control in controls.values():
        control.observe(redraw, names="value")
