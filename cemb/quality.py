"""The quality study: train one table with one optimizer both ways, and score what came out."""

from dataclasses import asdict, dataclass

import torch

from cemb import evaluate, records
from cemb.batches import PairBatches
from cemb.dataset import PmiDataset
from cemb.model import LOSSES, TABLES, PairModel, build_model
from cemb.train import (
    ADAM_BETAS,
    FULL_BATCH_LEARNING_RATES,
    MINI_BATCH_LEARNING_RATES,
    OPTIMIZERS,
    halve_until_stable,
    train_full_batch,
    train_mini_batches,
)

TRAININGS = ("full-batch", "mini-batch")
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
    """What one record of the quality study measures.

    `compression_ratio` is table values (words' and contexts' together) per pool value and sets the pool's
    size; `pool_size` sets it directly. A full table has neither. `num_steps` is for full batches,
    `num_epochs`, `batch_size`, `negative_share` and `loss` for mini-batches. A `learning_rate` of None takes
    the training's default, which for SGD is divided by the compression ratio.
    """

    table: str
    optimizer: str
    training: str = "full-batch"
    pool_size: int | None = None
    compression_ratio: float | None = None
    block_size: int = 1
    signed: bool = False
    learning_rate: float | None = None
    num_steps: int = 45
    num_epochs: int = 1
    batch_size: int = 32_768
    negative_share: float = 0.5
    loss: str = "mse"
    seed: int = 0

    def __post_init__(self):
        choices = {"table": TABLES, "optimizer": OPTIMIZERS, "training": TRAININGS, "loss": LOSSES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.table != "full" and (self.pool_size is None) == (self.compression_ratio is None):
            raise ValueError(
                f"a {self.table} table needs pool_size or compression_ratio, not both; got "
                f"pool_size={self.pool_size}, compression_ratio={self.compression_ratio}"
            )
        if self.compression_ratio is not None and not self.compression_ratio > 0:
            raise ValueError(f"compression_ratio must be positive, got {self.compression_ratio}")
        if self.table == "full" and not self.pool_size is self.compression_ratio is None:
            raise ValueError(
                f"a full table has no pool; got pool_size={self.pool_size}, "
                f"compression_ratio={self.compression_ratio}"
            )

    def resolved_pool_size(self, table_values: int) -> int | None:
        """Values in the pool, for a table of `table_values` in all."""
        if self.compression_ratio is None:
            return self.pool_size
        return max(1, round(table_values / self.compression_ratio))


def score(
    words: torch.Tensor, contexts: torch.Tensor, data: PmiDataset, objective: evaluate.AllCellsLoss
) -> dict[str, object]:
    """Record fields of a factorization: gap to the optimum, similarity and analogy scores.

    Similarity and analogies are those of the word vectors; null where gensim, which brings the sets, is not
    installed or the vocabulary does not cover them.
    """
    loss = objective(words, contexts).item()
    fields: dict[str, object] = {"all_cells_loss": loss, "gap": data.optimum.gap(loss)}
    vectors = words.numpy()
    for name in evaluate.SIMILARITY_SETS:
        found = evaluate.similarity(vectors, data.words, name)
        fields |= {f"{name}_{field}": value for field, value in found.items()}
    analogies = evaluate.analogies(vectors, data.words, max_questions=2000)
    fields |= {f"analogies_{k}": v for k, v in analogies.items()}
    return fields


def svd_record(data: PmiDataset) -> dict[str, object]:
    """The record of the optimum itself, its singular values shared evenly by U and C."""
    words, contexts = (torch.from_numpy(factor) for factor in data.optimum.factors())
    rank = len(data.optimum.singular_values)
    return {
        "kind": "quality",
        "table": "svd",
        "embedding_dim": rank,
        "num_parameters": rank * sum(data.matrix.shape),
        **score(words, contexts, data, evaluate.AllCellsLoss(data.matrix)),
        **records.provenance(),
    }


def measure_quality(case: QualityCase, data: PmiDataset) -> tuple[dict[str, object], PairModel]:
    """Train the case on the data; its record, with the learning curve as ``history``, and the model.

    Words and contexts have tables of their own, which read one pool if hashed. Deterministic for a seed and
    a number of threads.
    """
    num_words, rank = data.matrix.shape[0], len(data.optimum.singular_values)
    pool_size = case.resolved_pool_size(2 * num_words * rank)
    objective = evaluate.AllCellsLoss(data.matrix)
    is_full_batch = case.training == "full-batch"
    rates = FULL_BATCH_LEARNING_RATES if is_full_batch else MINI_BATCH_LEARNING_RATES
    model = None

    def train(learning_rate: float):
        nonlocal model
        torch.manual_seed(case.seed)
        model = build_model(
            case.table,
            num_words,
            rank,
            pool_size=pool_size,
            block_size=case.block_size,
            signed=case.signed,
            shared_table=False,
        )
        if is_full_batch:
            return train_full_batch(
                model,
                objective,
                optimizer=case.optimizer,
                learning_rate=learning_rate,
                num_steps=case.num_steps,
            )
        batches = PairBatches(
            data.matrix, case.batch_size, negative_share=case.negative_share, seed=case.seed
        )
        return train_mini_batches(
            model,
            batches,
            LOSSES[case.loss],
            optimizer=case.optimizer,
            learning_rate=learning_rate,
            num_epochs=case.num_epochs,
        )

    asked = case.learning_rate
    if asked is None:
        asked = rates[case.optimizer]
        if case.optimizer == "sgd" and pool_size is not None:
            # A pool value's gradient sums those of the table's values that read it; only SGD minds.
            asked *= min(1, pool_size / (2 * num_words * rank))
    history, learning_rate = halve_until_stable(train, asked)
    if is_full_batch:
        history = [{**entry, "gap": data.optimum.gap(entry["loss"])} for entry in history]
    with torch.no_grad():
        words, contexts = model.factors()
    record = {
        "kind": "quality",
        **asdict(case),
        "pool_size": pool_size,
        "learning_rate": learning_rate,
        "adam_betas": ADAM_BETAS if case.optimizer == "adam" else None,
        **{f"pmi_{name}": data.summary[name] for name in _PMI_FIELDS},
        "num_words": num_words,
        "embedding_dim": rank,
        "num_parameters": model.num_parameters,
        "compression_ratio": 2 * num_words * rank / model.num_parameters,
        "history": history,
        **score(words, contexts, data, objective),
        **records.provenance(),
    }
    return record, model
