"""The quality study: train one table with one optimizer both ways, and score what came out."""

import math
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from cemb import processes, vectors
from cemb.checks import check_integers, check_reals
from cemb.model import COMPRESSED_TABLES, TABLES, PairModel, build_compressed_model, build_model
from cemb.pmi import encode
from cemb.study import dataset, records, timing
from cemb.study.dataset import PmiConfig, PmiDataset
from cemb.study.identity import Code
from cemb.tables import num_bytes
from cemb.train import checkpoints as training_checkpoints
from cemb.train import distributed, evaluation_sets, similarity
from cemb.train.batches import PairBatches
from cemb.train.checkpoints import Checkpoints
from cemb.train.learning_rates import default_learning_rate, search_learning_rate
from cemb.train.loops import (
    ADAM_BETAS,
    FULL_BATCH_OPTIMIZERS,
    MINI_BATCH_ADAM_BETAS,
    OPTIMIZERS,
    DivergenceError,
    halve_until_stable,
    optimizer_bytes,
    train_full_batch,
    train_mini_batches,
)
from cemb.train.losses import LOSSES
from cemb.train.objective import AllCellsLoss, Optimum, WeightedLoss, frequency_weights

TRAININGS = ("full-batch", "mini-batch")
# What options may be, for whoever reads types.
Loss: TypeAlias = Literal[*LOSSES]  # type: ignore[valid-type]
Optimizer: TypeAlias = Literal[*FULL_BATCH_OPTIMIZERS]  # type: ignore[valid-type]
Table: TypeAlias = Literal[*TABLES, *COMPRESSED_TABLES]  # type: ignore[valid-type]
Training: TypeAlias = Literal[*TRAININGS]  # type: ignore[valid-type]
_PMI_FIELDS = (
    "corpus_fingerprint",
    "min_count",
    "max_vocab",
    "window_size",
    "distance_weighting",
    "context_smoothing",
    "num_negative",
)


@dataclass(frozen=True)
class QualityCase:
    """What one record of the quality study measures: a table, trained."""

    table: Table = "hashed"
    """Of `cemb.model.TABLES` or `cemb.model.COMPRESSED_TABLES`."""
    optimizer: Optimizer = "adam"
    """The rule of the step; lbfgs of full batches alone."""
    training: Training = "full-batch"
    """On all cells at each step, exactly, or on pairs with negative samples."""
    pool_size: int | None = None
    """Values in a hashed table's pool."""
    compression_ratio: float | None = None
    """Bytes of both full tables per byte of these, which sets their sizes, where no pool size does."""
    block_size: int = 1
    """Consecutive columns that read consecutive values of the pool."""
    signed: bool = False
    """Hashed blocks have hashed signs."""
    learning_rate: float | None = None
    """By default that of training, table and optimizer, which for SGD is divided by the compression ratio."""
    num_steps: int = 50
    """Of full batches."""
    num_epochs: int = 1
    """Of mini-batches."""
    batch_size: int = 32_768
    """Pairs of a mini-batch."""
    negative_share: float = 0.5
    """Share of a mini-batch that is negative samples."""
    negative_power: float = 0.0
    """Contexts of negative samples are drawn uniformly, half of them by their counts to this power."""
    loss: Loss = "mse"
    """Of mini-batches."""
    weight_power: float = 0.0
    """Cells of full batches weigh as the product of their words' counts to this power, also in the gap."""
    seed: int = 0
    """Of initial values, hashes and batches."""

    def __post_init__(self) -> None:
        choices: dict[str, Collection[str]] = {
            "table": (*TABLES, *COMPRESSED_TABLES),
            "optimizer": FULL_BATCH_OPTIMIZERS if self.training == "full-batch" else OPTIMIZERS,
            "training": TRAININGS,
            "loss": LOSSES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_integers(
            1,
            pool_size=self.pool_size,
            block_size=self.block_size,
            num_steps=self.num_steps,
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
        )
        check_integers(0, 2**62 - 1, seed=self.seed)
        check_reals("(0, inf)", compression_ratio=self.compression_ratio, learning_rate=self.learning_rate)
        check_reals("[0, 1)", negative_share=self.negative_share)
        check_reals("(-inf, inf)", negative_power=self.negative_power, weight_power=self.weight_power)
        is_full = self.table in ("full", "full-fused")
        if not is_full and (self.pool_size is None) == (self.compression_ratio is None):
            raise ValueError(
                f"a {self.table} table needs pool_size or compression_ratio, not both; got "
                f"pool_size={self.pool_size}, compression_ratio={self.compression_ratio}"
            )
        if self.weight_power and self.training != "full-batch":
            raise ValueError(f"weight_power is for full batches, got training={self.training!r}")
        if self.table in COMPRESSED_TABLES and self.pool_size is not None:
            raise ValueError(f"a {self.table} table has no pool; got pool_size={self.pool_size}")
        if is_full and not self.pool_size is self.compression_ratio is None:
            raise ValueError(
                f"a full table has no pool; got pool_size={self.pool_size}, "
                f"compression_ratio={self.compression_ratio}"
            )

    def resolved_pool_size(self, table_values: int) -> int | None:
        """Values in the pool, for a table of `table_values` in all; None without a pool."""
        if self.compression_ratio is None or self.table in COMPRESSED_TABLES:
            return self.pool_size
        return max(1, round(table_values / self.compression_ratio))

    def build(self, num_words: int, embedding_dim: int) -> PairModel:
        """The untrained model, words and contexts with tables of their own, which read one pool if hashed."""
        torch.manual_seed(self.seed)
        values = 2 * num_words * embedding_dim
        if self.table in COMPRESSED_TABLES:
            assert self.compression_ratio is not None
            max_bytes = int(4 * values / self.compression_ratio)
            return build_compressed_model(self.table, num_words, embedding_dim, max_bytes)
        return build_model(
            self.table,
            num_words,
            embedding_dim,
            pool_size=self.resolved_pool_size(values),
            block_size=self.block_size,
            signed=self.signed,
            hash_seed=self.seed,
            sparse_gradients=self.table == "full" and self.training == "mini-batch",
            shared_table=False,
        )

    def check_ranks(self, num_ranks: int) -> None:
        """Raise ValueError for what several processes cannot train; says what they can."""
        if num_ranks > 1 and self.training != "mini-batch":
            raise ValueError(
                f"{num_ranks} processes share the pairs of mini-batches, got training={self.training!r}: "
                "give --training mini-batch, or train in one process"
            )
        if num_ranks > 1 and self.table == "full-fused":
            raise ValueError(
                "full-fused is stepped in one call, and its gradients are as large as the table: give "
                f"--table full, of which {num_ranks} processes exchange the rows of a batch, or train in one"
            )


def score(
    words: torch.Tensor,
    contexts: torch.Tensor,
    data: PmiDataset,
    objective: AllCellsLoss | WeightedLoss,
    optimum: Optimum | None = None,
) -> records.Record:
    """Record fields of a factorization: gap to its loss's optimum, and the scores of its word vectors."""
    loss = objective(words, contexts).item()
    return {
        "all_cells_loss": loss,
        "gap": (optimum or data.optimum).gap(loss),
        **score_vectors(words.numpy(), contexts.numpy(), data.words),
    }


def score_vectors(
    words: npt.NDArray[Any], contexts: npt.NDArray[Any], vocabulary: list[str]
) -> records.Record:
    """Record fields of word vectors: similarity, also of the `cemb.vectors.balanced` ones, and analogies.

    Null where gensim, which brings the sets, is not installed or the vocabulary does not cover them.
    """
    fields: records.Record = {}
    balanced = vectors.balanced(words, contexts)
    interval = ("score", "low", "high")
    for pairs in evaluation_sets.bundled_similarity():
        found = similarity.similarity(words, vocabulary, pairs)
        fields |= {f"{pairs.name}_{field}": found[field] for field in (*interval, "pairs", "pairs_total")}
        found = similarity.similarity(balanced, vocabulary, pairs)
        fields |= {f"{pairs.name}_balanced_{field}": found[field] for field in interval}
    found = similarity.analogies(words, vocabulary, evaluation_sets.bundled_analogies(), max_questions=2000)
    kept = ("score", "mul_score", "low", "high", "questions", "questions_total")
    return fields | {f"analogies_{field}": found[field] for field in kept}


def svd_record(data: PmiDataset, singular_value_power: float = 0.5) -> records.Record:
    """The record of the optimum itself, with U·S^p and V·S^(1−p); at ½ the two share S evenly."""
    factors = data.optimum.factors(singular_value_power)
    words, contexts = (torch.from_numpy(factor) for factor in factors)
    rank = len(data.optimum.singular_values)
    return {
        "kind": "quality",
        "table": "svd",
        "singular_value_power": singular_value_power,
        "embedding_dim": rank,
        "num_parameters": rank * sum(data.matrix.shape),
        **score(words, contexts, data, AllCellsLoss(data.matrix)),
        **records.provenance(),
    }


def sgns_record(
    data: PmiDataset, *, num_negative: int = 5, num_epochs: int = 5, seed: int = 0, num_workers: int = 1
) -> records.Record:
    """The record of skip-gram with negative sampling (Mikolov et al., 2013) on the tokens of `data`.

    By gensim, with the windows and the smoothing that the matrix was counted with, and no subsampling. Its
    gap is null, for its factors are not of this matrix. Deterministic for a seed with one worker. Raises
    ValueError if the corpus's words are no longer those of `data`, or that is of events, ImportError without
    gensim.
    """
    check_integers(1, num_negative=num_negative, num_epochs=num_epochs, num_workers=num_workers)
    from gensim.models import Word2Vec
    from gensim.models.word2vec import MAX_WORDS_IN_BATCH

    data.check_is_text("skip-gram with negative sampling")
    used = data.summary
    with tempfile.TemporaryDirectory() as scratch:
        options = {name: used[name] for name in encode.OPTIONS}
        encoded = encode.open_encoded(used["corpus"]) or encode.encode(
            used["corpus"], Path(scratch) / "corpus", **options
        )
        token_ids = np.concatenate(encoded.shards())
    if encoded.words != data.words:
        raise ValueError(f"corpus {used['corpus']!r} has changed: its words are not those of the data")
    rank = len(data.optimum.singular_values)
    model = Word2Vec(
        sg=1,
        vector_size=rank,
        window=used["window_size"],
        shrink_windows=used["distance_weighting"] != "flat",
        negative=num_negative,
        ns_exponent=used["context_smoothing"],
        sample=0,
        min_count=1,
        sorted_vocab=0,  # so that row i is that of data.words[i]
        seed=seed,
        workers=num_workers,
    )
    model.build_vocab_from_freq(dict(zip(data.words, data.word_counts.tolist(), strict=True)))
    words = np.array(data.words, dtype=object)
    # gensim cuts off what a sentence has beyond its MAX_WORDS_IN_BATCH.
    sentences = [
        words[ids[first : first + MAX_WORDS_IN_BATCH]].tolist()
        for part in np.split(token_ids, np.flatnonzero(token_ids < 0))
        for ids in [part[part >= 0]]
        for first in range(0, len(ids), MAX_WORDS_IN_BATCH)
    ]
    start = time.perf_counter()
    model.train(
        sentences,
        total_examples=len(sentences),
        total_words=np.count_nonzero(token_ids >= 0),
        epochs=num_epochs,
    )
    seconds = time.perf_counter() - start
    return {
        "kind": "quality",
        "table": "sgns",
        "num_negative": num_negative,
        "num_epochs": num_epochs,
        "seed": seed,
        "num_workers": num_workers,
        "train_s": round(seconds, 3),
        "embedding_dim": rank,
        "num_parameters": 2 * len(data.words) * rank,
        "all_cells_loss": None,
        "gap": None,
        **score_vectors(model.wv.vectors, model.syn1neg, data.words),
        **records.provenance(),
    }


def _context_shares(word_counts: npt.NDArray[Any], power: float) -> npt.NDArray[np.float64]:
    """Probabilities of negative contexts: half uniform, half as counts to `power`."""
    weights = frequency_weights(word_counts, power)
    return (0.5 + 0.5 * weights) / len(weights)


def learning_rate_cases() -> list[QualityCase]:
    """The cases whose rates `cemb.train.learning_rates` keeps, at a quarter of the bytes if not full."""
    mini_batch: dict[str, Any] = {
        "training": "mini-batch",
        "loss": "all-cells",
        "negative_share": 0.8,
        "negative_power": 0.5,
    }
    return [
        *(QualityCase("full", optimizer) for optimizer in OPTIMIZERS),
        *(QualityCase(table, "adam", compression_ratio=4) for table in ("hashed", *COMPRESSED_TABLES)),
        *(QualityCase("full-fused", optimizer, **mini_batch) for optimizer in OPTIMIZERS),
    ]


def search_learning_rates(case: QualityCase, data: PmiDataset) -> records.Record:
    """The record of `search_learning_rate` for a case, by its gap, from its default rate."""

    def final_gap(rate: float) -> float:
        record, _ = measure_quality(replace(case, learning_rate=rate), data)
        # A halved rate is another's.
        return math.inf if record["failure"] or record["learning_rate"] != rate else record["gap"]

    found = search_learning_rate(final_gap, default_learning_rate(case.table, case.optimizer, case.training))
    return {
        "kind": "rates",
        "table": case.table,
        "optimizer": case.optimizer,
        "training": case.training,
        "compression_ratio": case.compression_ratio,
        "seed": case.seed,
        "rates": list(found),
        "gaps": [gap if math.isfinite(gap) else None for gap in found.values()],
        "best_rate": min(found, key=found.__getitem__),
        **records.provenance(),
    }


def measure_quality(
    case: QualityCase,
    data: PmiDataset,
    checkpoints: Checkpoints | None = None,
    part: tuple[int, int] = (0, 1),
) -> tuple[records.Record, PairModel | None]:
    """Train the case on the data; its record, with the learning curve as ``history``, and the model.

    If training diverges at every rate tried, the record says so in ``failure``, its scores are null and there
    is no model. Deterministic for a seed and numbers of threads and ranks, also if it goes on from
    `checkpoints`. `part` is rank and number of ranks, as `cemb.train.distributed.joined` yields them; those
    other than rank 0 return no record and no model. Raises ValueError for data of events: its tables have as
    many words as contexts.
    """
    data.check_is_text("training a table")
    num_words, rank = data.matrix.shape[0], len(data.optimum.singular_values)
    table_values = 2 * num_words * rank
    pool_size = case.resolved_pool_size(table_values)
    objective: AllCellsLoss | WeightedLoss = AllCellsLoss(data.matrix)
    optimum = data.optimum
    if case.weight_power:
        weights = frequency_weights(data.word_counts, case.weight_power)
        objective = WeightedLoss(data.matrix, weights, weights)
        optimum = objective.optimum(rank)
    is_full_batch = case.training == "full-batch"
    model: PairModel

    def train(learning_rate: float) -> list[dict[str, float]]:
        nonlocal model
        if checkpoints and checkpoints.resumes_below(learning_rate):
            raise DivergenceError(f"training diverged before its checkpoint, with {learning_rate=:g}")
        model = case.build(num_words, rank)
        if is_full_batch:
            return train_full_batch(
                model,
                objective,
                optimizer=case.optimizer,
                learning_rate=learning_rate,
                num_steps=case.num_steps,
                checkpoints=checkpoints,
            )
        batches = PairBatches(
            data.matrix,
            case.batch_size,
            negative_share=case.negative_share,
            context_shares=_context_shares(data.word_counts, case.negative_power),
            weighted=case.loss == "all-cells",
            seed=case.seed,
            part=part,
        )
        return train_mini_batches(
            model,
            batches,
            LOSSES[case.loss],
            optimizer=case.optimizer,
            learning_rate=learning_rate,
            num_epochs=case.num_epochs,
            checkpoints=checkpoints,
        )

    asked = case.learning_rate
    if asked is None:
        asked = default_learning_rate(case.table, case.optimizer, case.training)
        if case.optimizer == "sgd" and pool_size is not None:
            # A pool value's gradient sums those of the table's values that read it; only SGD minds.
            asked *= min(1, pool_size / table_values)
    betas = ADAM_BETAS if is_full_batch else MINI_BATCH_ADAM_BETAS
    failure: str | None = None
    history: list[dict[str, float]] = []
    learning_rate = asked
    start = time.perf_counter()
    try:
        history, learning_rate = halve_until_stable(train, asked)
    except DivergenceError as error:
        failure = str(error)
    seconds = checkpoints.train_s if checkpoints else time.perf_counter() - start
    if part[0]:
        return {}, None
    if is_full_batch:
        history = [{**entry, "gap": optimum.gap(entry["loss"])} for entry in history]
    if failure:
        scores: records.Record = dict.fromkeys(("all_cells_loss", "gap"))
    else:
        with torch.no_grad():
            words, contexts = model.factors()
        scores = score(words, contexts, data, objective, optimum)
    inference_bytes = num_bytes(model)
    record = {
        "kind": "quality",
        **asdict(case),
        "pool_size": pool_size,
        "learning_rate": learning_rate,
        "adam_betas": betas if case.optimizer == "adam" else None,
        **{f"pmi_{name}": data.summary[name] for name in _PMI_FIELDS},
        "num_words": num_words,
        "embedding_dim": rank,
        "num_parameters": model.num_parameters,
        "inference_bytes": inference_bytes,
        "training_bytes": inference_bytes + optimizer_bytes(model, case.optimizer),
        "compression_ratio": 4 * table_values / inference_bytes,
        "num_processes": part[1],
        "bytes_sent_per_step": history[-1].get("bytes_sent_per_step") if history else None,
        "train_s": seconds,
        "failure": failure,
        "history": history,
        **scores,
        **records.provenance(),
    }
    return record, None if failure else model


def _meanings() -> dict[str, str]:
    """What the definitions mean that a training reaches, by their names, wherever they stand."""
    reached = Code.of_folder(records.PACKAGE).reach("from cemb.study.quality import Trainings\nTrainings")
    found: dict[str, str] = {}
    for name, meaning in sorted(reached.definitions().items(), key=lambda item: item[1]):
        key = f"code of {name.rpartition('.')[2]}"
        found[key] = " ".join(filter(None, (found.get(key), meaning)))
    return found


@dataclass(frozen=True)
class Trainings:
    """What the quality notebook measures: a case on a data set, for some seeds."""

    case: QualityCase
    data: PmiConfig
    seeds: Sequence[int] = ()
    """A record for each, in place of one for the case's own seed."""
    threads: int | None = None
    """Of torch and the kernels, by default as many as torch takes by itself."""

    def __post_init__(self) -> None:
        check_integers(1, threads=self.threads)
        for seed in self.seeds:
            replace(self.case, seed=seed)  # refuses what it cannot be

    @property
    def cases(self) -> list[QualityCase]:
        """The case with each seed."""
        # Named, so that runs are keyed by its definition.
        return [
            QualityCase(**{**asdict(self.case), "seed": seed}) for seed in self.seeds or (self.case.seed,)
        ]

    def measure(
        self, data: PmiDataset, checkpoints: Checkpoints | None = None
    ) -> Iterator[tuple[records.Record, PairModel | None]]:
        """What `measure_quality` returns, for each seed; nothing on torchrun's ranks other than 0."""
        timing.set_threads(self.threads)
        with distributed.joined() as part:
            if checkpoints:
                checkpoints.share()
            for case in self.cases:
                record, model = measure_quality(case, data, checkpoints, part)
                if part[0] == 0:
                    yield record, model

    @contextmanager
    def checkpoints(self, out: Path, every: int | None) -> Iterator[Checkpoints]:
        """Checkpoints of the one training, in ``OUT.partial``, see `cemb.train.checkpoints.opened`.

        They are of the case, the data set, numbers of threads and processes, machine, versions, and the
        meaning of the code. ValueError for L-BFGS with `every`, and for more seeds than one.
        """
        (case,) = self.cases
        if case.optimizer == "lbfgs" and every is not None:
            raise ValueError(
                "L-BFGS is one search over all steps, which has no checkpoints: leave out "
                "--checkpoint-every, or give another optimizer"
            )
        timing.set_threads(self.threads)
        identity = {
            **asdict(case),
            **dataset.identity(self.data),
            **records.environment(),
            "threads": torch.get_num_threads(),
            "num_processes": processes.rank_and_number()[1],
            **_meanings(),
        }
        with training_checkpoints.opened(out, identity, every) as opened:
            yield opened


@dataclass(frozen=True)
class Baselines:
    """What the data notebook measures: scores of the best factorization, and of word2vec."""

    data: PmiConfig
    sgns_epochs: int = 0
    """Of word2vec on the same tokens, to compare with, which takes minutes; none by default."""

    def __post_init__(self) -> None:
        check_integers(0, sgns_epochs=self.sgns_epochs)

    def measure(self, data: PmiDataset) -> Iterator[records.Record]:
        """Records of three splits of the singular values, and of word2vec."""
        for power in (0.0, 0.5, 1.0):
            yield svd_record(data, power)
        if self.sgns_epochs:
            yield sgns_record(data, num_epochs=self.sgns_epochs)
