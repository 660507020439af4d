"""The frontier: what a byte is worth, in tables trained small and in tables made small after training.

Two budgets, both measured on the tensors there are: *inference* bytes, what is shipped (values, codes and
codebooks of words' and contexts' tables), and *training* bytes, the same while training plus the
optimizer's state. Ratios are to full float32 tables, for training to full tables with Adam, 12 bytes a value.
Gradients and other temporary memory are counted for no method.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cemb import records
from cemb.alternating import STORES, Store, train_alternating, transform_code
from cemb.dataset import PmiDataset
from cemb.evaluate import AllCellsLoss
from cemb.limits import gap_limit
from cemb.model import COMPRESSED_TABLES
from cemb.quality import QualityCase, measure_quality, score
from cemb.tables import (
    ProductQuantizedEmbedding,
    RowQuantizedEmbedding,
    TransformCodedEmbedding,
    all_rows,
    num_bytes,
)
from cemb.tables.transform_coded import allocate_bits

Pair = tuple[nn.Module, nn.Module]

TRAINED = {
    "full": QualityCase("full", "adam"),
    "hashed": QualityCase("hashed", "adam", compression_ratio=1),
    "hashed, blocks of 25": QualityCase("hashed", "adam", compression_ratio=1, block_size=25),
    "hashed, blocks of 100": QualityCase("hashed", "adam", compression_ratio=1, block_size=100),
    "hashed, signed": QualityCase("hashed", "adam", compression_ratio=1, signed=True),
    **{name: QualityCase(name, "adam", compression_ratio=1) for name in COMPRESSED_TABLES},
}


def _rounded(store: Store) -> Callable[..., Pair]:
    def compress(objective: AllCellsLoss, words: Tensor, contexts: Tensor, max_bytes: int) -> Pair:
        importance = torch.ones(words.shape[1])
        return store(words, importance), store(contexts, importance)

    return compress


def _lower_rank(objective: AllCellsLoss, words: Tensor, contexts: Tensor, max_bytes: int) -> Pair:
    rank = max_bytes // (4 * (len(words) + len(contexts)))
    if rank < 1:
        raise ValueError(f"rank 1 needs {4 * (len(words) + len(contexts))} bytes, got {max_bytes}")
    # The columns come by falling singular value.
    return tuple(nn.Embedding.from_pretrained(side[:, :rank].clone()) for side in (words, contexts))


def _product_quantized(objective: AllCellsLoss, words: Tensor, contexts: Tensor, max_bytes: int) -> Pair:
    dim = words.shape[1]
    codebooks = 2 * 256 * dim * torch.float16.itemsize
    groups = min(dim, (max_bytes - codebooks) // (len(words) + len(contexts)))
    return tuple(ProductQuantizedEmbedding.from_vectors(side, groups) for side in (words, contexts))


# From the truncated SVD's factors, which came out of full tables of float32.
COMPRESSED_AFTER: dict[str, Callable[..., Pair]] = {
    "lower rank": _lower_rank,
    "int8": _rounded(lambda vectors, _: RowQuantizedEmbedding.from_vectors(vectors, 8)),
    "int4": _rounded(lambda vectors, _: RowQuantizedEmbedding.from_vectors(vectors, 4)),
    "product quantization": _product_quantized,
    "transform coding": transform_code,
}
ALTERNATING = {f"alternating, {name}": name for name in (*STORES, "transform coding")}
FIXED_RATIO = ("full", "int8", "int4", *(f"alternating, {name}" for name in STORES))
METHODS = (*TRAINED, *COMPRESSED_AFTER, *ALTERNATING)


def _coded(max_bytes: int) -> Store:
    """Stores a side in `max_bytes` by transform coding."""

    def store(vectors: Tensor, importance: Tensor) -> TransformCodedEmbedding:
        (bits,) = allocate_bits([(vectors, importance)], max_bytes)
        return TransformCodedEmbedding.from_vectors(vectors, importance, bits)

    return store


def _record(
    method: str,
    data: PmiDataset,
    seed: int,
    tables: Pair | None,
    objective: AllCellsLoss,
    **fields: object,
) -> dict[str, object]:
    full = 4 * len(data.optimum.singular_values) * sum(data.matrix.shape)
    if tables is not None:
        inference = sum(num_bytes(table) for table in tables)
        fields = {"inference_bytes": inference, "training_bytes": inference, **fields}
        fields |= score(*(all_rows(table) for table in tables), data, objective)
    else:
        fields = {"inference_bytes": None, "training_bytes": None, "gap": None, **fields}
    inference, training = fields["inference_bytes"], fields["training_bytes"]
    return {
        "kind": "frontier",
        "method": method,
        "seed": seed,
        "failure": None,
        **fields,
        "inference_ratio": inference and full / inference,
        "training_ratio": training and 3 * full / training,
        "num_words": data.matrix.shape[0],
        "embedding_dim": len(data.optimum.singular_values),
        "corpus_fingerprint": data.summary["corpus_fingerprint"],
        **records.provenance(),
    }


def cases(
    methods: Iterable[str], compression_ratios: Iterable[float], seeds: Iterable[int]
) -> list[tuple[str, float, int]]:
    """Arguments of `measure`: each method at each ratio, if it has any, with each seed, if it draws any."""
    compression_ratios, seeds = list(compression_ratios), list(seeds)
    return [
        (method, ratio, seed)
        for method in methods
        for ratio in (compression_ratios[:1] if method in FIXED_RATIO else compression_ratios)
        for seed in (seeds[:1] if method in COMPRESSED_AFTER else seeds)
    ]


def limits(data: PmiDataset) -> list[dict[str, float]]:
    """Rate-distortion limits of the data's optimum: ``ratio``, ``components`` and ``rows``, gaps both.

    Bits are those of both factors' values, and of nothing else; see `cemb.limits.gap_limit`.
    """
    return [
        {
            "ratio": ratio,
            "components": gap_limit(data.optimum, 32 / ratio, by_row=False),
            "rows": gap_limit(data.optimum, 32 / ratio, by_row=True),
        }
        for ratio in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
    ]


def measure(
    method: str,
    data: PmiDataset,
    objective: AllCellsLoss,
    *,
    compression_ratio: float = 1,
    seed: int = 0,
    num_steps: int = 50,
    learning_rate: float | None = None,
) -> dict[str, object]:
    """The record of one of `METHODS` at a ratio of full inference bytes to its own.

    Where no such table fits or its training diverges, the record says why in ``failure``. Methods of
    `FIXED_RATIO` take no heed of the ratio; `num_steps` and `learning_rate` are for methods that train.
    ValueError for an unknown method or a ratio that is not positive.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not compression_ratio > 0:
        raise ValueError(f"compression_ratio must be positive, got {compression_ratio}")
    asked = {"asked_ratio": None if method in FIXED_RATIO else compression_ratio}
    try:
        if method in TRAINED:
            case = replace(TRAINED[method], seed=seed, num_steps=num_steps, learning_rate=learning_rate)
            if method not in FIXED_RATIO:
                case = replace(case, compression_ratio=compression_ratio)
            record, _ = measure_quality(case, data)
            kept = {
                name: value
                for name, value in record.items()
                if name not in ("kind", "seed", "compression_ratio") and not name.startswith("pmi_")
            }
            return _record(method, data, seed, None, objective, **asked, **kept)
        start = time.perf_counter()
        history = None
        rank = len(data.optimum.singular_values)
        full = 4 * rank * sum(data.matrix.shape)
        if method in COMPRESSED_AFTER:
            factors = (torch.from_numpy(factor) for factor in data.optimum.factors())
            tables = COMPRESSED_AFTER[method](objective, *factors, int(full / compression_ratio))
            asked["training_bytes"] = full
        else:
            store = STORES.get(ALTERNATING[method]) or _coded(int(full / compression_ratio / 2))
            *tables, history = train_alternating(
                objective, rank, store, num_steps=max(1, num_steps // 3), seed=seed
            )
            history = [{**entry, "gap": data.optimum.gap(entry["loss"])} for entry in history]
        seconds = time.perf_counter() - start
        return _record(method, data, seed, tables, objective, **asked, train_s=seconds, history=history)
    except ValueError as error:
        return _record(method, data, seed, None, objective, **asked, failure=str(error))
