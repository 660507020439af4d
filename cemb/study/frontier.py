"""The frontier: what a byte is worth, in tables trained small and in tables made small after training.

Two budgets, both measured on the tensors there are: *inference* bytes, what is shipped (values, codes and
codebooks of words' and contexts' tables), and *training* bytes, the same while training plus the
optimizer's state. Ratios are to full float32 tables, for training to full tables with Adam, 12 bytes a value.
Gradients and other temporary memory are counted for no method.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from cemb.checks import check_integers, check_reals
from cemb.model import COMPRESSED_TABLES
from cemb.study import records, timing
from cemb.study.dataset import PmiConfig, PmiDataset, load_pmi
from cemb.study.quality import QualityCase, measure_quality, score
from cemb.tables import (
    ProductQuantizedEmbedding,
    RowQuantizedEmbedding,
    TransformCodedEmbedding,
    all_rows,
    num_bytes,
)
from cemb.tables.checks import check_budget
from cemb.tables.transform_coded import allocate_bits
from cemb.train.alternating import STORES, Store, train_alternating, transform_code
from cemb.train.limits import gap_limit
from cemb.train.objective import AllCellsLoss

Pair = tuple[nn.Module, nn.Module]

TRAINED = {
    "full": QualityCase("full", "adam"),
    "hashed": QualityCase("hashed", "adam", compression_ratio=1),
    "hashed, blocks of 25": QualityCase("hashed", "adam", compression_ratio=1, block_size=25),
    "hashed, blocks of 100": QualityCase("hashed", "adam", compression_ratio=1, block_size=100),
    "hashed, signed": QualityCase("hashed", "adam", compression_ratio=1, signed=True),
    **{name: QualityCase(name, "adam", compression_ratio=1) for name in COMPRESSED_TABLES},
}
# Trained small, then every value in a byte.
QUANTIZED = {f"{name}, then int8": name for name in ("hashed", *COMPRESSED_TABLES)}
_INT8_RUN = 64  # values that share a scale


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
    first, second = (nn.Embedding.from_pretrained(side[:, :rank].clone()) for side in (words, contexts))
    return first, second


def _lower_rank_int8(objective: AllCellsLoss, words: Tensor, contexts: Tensor, max_bytes: int) -> Pair:
    num_rows = len(words) + len(contexts)
    rank = max_bytes // num_rows - torch.float16.itemsize
    if rank < 1:
        raise ValueError(f"rank 1 needs {num_rows * (1 + torch.float16.itemsize)} bytes, got {max_bytes}")
    first, second = (
        RowQuantizedEmbedding.from_vectors(side[:, :rank].contiguous()) for side in (words, contexts)
    )
    return first, second


def _product_quantized(axes: Callable[[Tensor, int], Tensor]) -> Callable[..., Pair]:
    """Product quantization, both sides turned before by the orthogonal ``axes(variances, groups)``."""

    def compress(objective: AllCellsLoss, words: Tensor, contexts: Tensor, max_bytes: int) -> Pair:
        dim = words.shape[1]
        codebooks = 2 * 256 * dim * torch.float16.itemsize
        groups = min(dim, (max_bytes - codebooks) // (len(words) + len(contexts)))
        if groups < 1:
            raise ValueError(
                f"one group's codes need {codebooks + len(words) + len(contexts)} bytes, got {max_bytes}"
            )
        turn = axes(words.square().sum(dim=0), groups)
        first, second = (
            ProductQuantizedEmbedding.from_vectors(side @ turn, groups) for side in (words, contexts)
        )
        return first, second

    return compress


def _principal_axes(variances: Tensor, groups: int) -> Tensor:
    # The truncated SVD's factors are in them.
    return torch.eye(len(variances))


def _random_axes(variances: Tensor, groups: int) -> Tensor:
    dim = len(variances)
    turn: Tensor = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))).Q
    return turn


def _balanced_axes(variances: Tensor, groups: int) -> Tensor:
    """Principal axes dealt out so that groups have like products of variances.

    The parametric solution of Ge, He, Ke and Sun, "Optimized product quantization", CVPR 2013: each axis, by
    falling variance, goes to the group of the smallest product that still has room.
    """
    dim = len(variances)
    room = [len(part) for part in torch.arange(dim).tensor_split(groups)]
    logs = (variances / variances.max()).clamp(min=1e-12).log().tolist()
    members: list[list[int]] = [[] for _ in range(groups)]
    products = [0.0] * groups
    least = min(logs)  # the unit of variance: no product is to fall when an axis is added
    for axis in variances.argsort(descending=True, stable=True).tolist():
        group = min((g for g in range(groups) if len(members[g]) < room[g]), key=products.__getitem__)
        members[group].append(axis)
        products[group] += logs[axis] - least
    return torch.eye(dim)[:, [axis for group in members for axis in group]]


# From the truncated SVD's factors, which came out of full tables of float32.
COMPRESSED_AFTER: dict[str, Callable[..., Pair]] = {
    "lower rank": _lower_rank,
    "lower rank, then int8": _lower_rank_int8,
    "int8": _rounded(lambda vectors, _: RowQuantizedEmbedding.from_vectors(vectors, 8)),
    "int4": _rounded(lambda vectors, _: RowQuantizedEmbedding.from_vectors(vectors, 4)),
    "product quantization": _product_quantized(_principal_axes),
    "product quantization, random axes": _product_quantized(_random_axes),
    "product quantization, balanced axes": _product_quantized(_balanced_axes),
    "transform coding": transform_code,
}
ALTERNATING = {f"alternating, {name}": name for name in (*STORES, "transform coding")}
FIXED_RATIO = ("full", "int8", "int4", *(f"alternating, {name}" for name in STORES))
METHODS = (*TRAINED, *QUANTIZED, *COMPRESSED_AFTER, *ALTERNATING)
Method: TypeAlias = Literal[*METHODS]  # type: ignore[valid-type]


def _coded(max_bytes: int) -> Store:
    """Stores a side in `max_bytes` by transform coding."""

    def store(vectors: Tensor, importance: Tensor) -> TransformCodedEmbedding:
        (bits,) = allocate_bits([(vectors, importance)], max_bytes)
        return TransformCodedEmbedding.from_vectors(vectors, importance, bits)

    return store


def _full_bytes(data: PmiDataset) -> int:
    num_rows: int = sum(data.matrix.shape)
    return 4 * len(data.optimum.singular_values) * num_rows


def _int8_bytes(model: nn.Module) -> int:
    runs = sum(-(-parameter.numel() // _INT8_RUN) for parameter in model.parameters())
    floats = sum(4 * parameter.numel() for parameter in model.parameters())
    return num_bytes(model) - floats + runs * (_INT8_RUN + torch.float16.itemsize)


def _within_as_int8(case: QualityCase, data: PmiDataset, max_bytes: int) -> QualityCase:
    """The case whose tables take no more than `max_bytes` once their parameters are in int8."""
    rank = len(data.optimum.singular_values)
    check_budget(max_bytes, _INT8_RUN + torch.float16.itemsize)
    ratio = _full_bytes(data) / max_bytes / 4
    case = replace(case, compression_ratio=ratio)
    while (size := _int8_bytes(case.build(data.matrix.shape[0], rank))) > max_bytes:
        # Codes, and scales of runs that are not full, take more than a quarter.
        ratio *= max(1.001, size / max_bytes)
        case = replace(case, compression_ratio=ratio)
    return case


@torch.no_grad()
def round_to_int8(model: nn.Module) -> int:
    """Round a model's parameters in place to int8, with a float16 scale for each 64 values; its bytes then.

    Buffers stay, and count, as they are.
    """
    for parameter in model.parameters():
        count = parameter.numel()
        runs = F.pad(parameter.flatten(), (0, -count % _INT8_RUN)).view(-1, _INT8_RUN)
        rounded = all_rows(RowQuantizedEmbedding.from_vectors(runs, 8))
        parameter.copy_(rounded.flatten()[:count].view_as(parameter))
    return _int8_bytes(model)


def _record(
    method: str,
    data: PmiDataset,
    seed: int,
    tables: Pair | None,
    objective: AllCellsLoss,
    **fields: Any,
) -> records.Record:
    full = _full_bytes(data)
    if tables is not None:
        inference = sum(num_bytes(table) for table in tables)
        fields = {"inference_bytes": inference, "training_bytes": inference, **fields}
        words, contexts = (all_rows(table) for table in tables)
        fields |= score(words, contexts, data, objective)
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

    Bits are those of both factors' values, and of nothing else; see `cemb.train.limits.gap_limit`.
    """
    return [
        {
            "ratio": ratio,
            "components": gap_limit(data.optimum, 32 / ratio, by_row=False),
            "rows": gap_limit(data.optimum, 32 / ratio, by_row=True),
        }
        for ratio in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
    ]


def _check_numbers(compression_ratios: Sequence[float], seeds: Sequence[int], num_steps: int) -> None:
    """Raise ValueError for numbers out of range; what a method cannot do is a failure in its record."""
    for ratio in compression_ratios:
        check_reals("(0, inf)", compression_ratio=ratio)
    for seed in seeds:
        check_integers(0, 2**62 - 1, seed=seed)
    check_integers(1, num_steps=num_steps)


def measure(
    method: str,
    data: PmiDataset,
    objective: AllCellsLoss,
    *,
    compression_ratio: float = 1,
    seed: int = 0,
    num_steps: int = 50,
    learning_rate: float | None = None,
) -> records.Record:
    """The record of one of `METHODS` at a ratio of full inference bytes to its own.

    Where no such table fits or its training diverges, the record says why in ``failure``. Methods of
    `FIXED_RATIO` take no heed of the ratio; `num_steps` and `learning_rate` are for methods that train.
    ValueError for an unknown method or a number out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    _check_numbers([compression_ratio], [seed], num_steps)
    check_reals("(0, inf)", learning_rate=learning_rate)
    asked = {"asked_ratio": None if method in FIXED_RATIO else compression_ratio}
    full = _full_bytes(data)
    try:
        if method in TRAINED or method in QUANTIZED:
            case = TRAINED[QUANTIZED.get(method, method)]
            case = replace(case, seed=seed, num_steps=num_steps, learning_rate=learning_rate)
            if method in QUANTIZED:
                case = _within_as_int8(case, data, int(full / compression_ratio))
            elif method not in FIXED_RATIO:
                case = replace(case, compression_ratio=compression_ratio)
            record, model = measure_quality(case, data)
            if method in QUANTIZED and model is not None:
                record |= {"float32_gap": record["gap"], "float32_ratio": case.compression_ratio}
                record["inference_bytes"] = round_to_int8(model)
                with torch.no_grad():
                    record |= score(*model.factors(), data, objective)
            kept = {
                name: value
                for name, value in record.items()
                if name not in ("kind", "seed", "compression_ratio") and not name.startswith("pmi_")
            }
            return _record(method, data, seed, None, objective, **asked, **kept)
        start = time.perf_counter()
        history: list[dict[str, float]] | None = None
        rank = len(data.optimum.singular_values)
        if method in COMPRESSED_AFTER:
            factors = (torch.from_numpy(factor) for factor in data.optimum.factors())
            tables = COMPRESSED_AFTER[method](objective, *factors, int(full / compression_ratio))
            asked["training_bytes"] = full
        else:
            store = STORES.get(ALTERNATING[method]) or _coded(int(full / compression_ratio / 2))
            words, contexts, history = train_alternating(
                objective, rank, store, num_steps=max(1, num_steps // 3), seed=seed
            )
            tables = words, contexts
            history = [{**entry, "gap": data.optimum.gap(entry["loss"])} for entry in history]
        seconds = time.perf_counter() - start
        return _record(method, data, seed, tables, objective, **asked, train_s=seconds, history=history)
    except ValueError as error:
        return _record(method, data, seed, None, objective, **asked, failure=str(error))


@dataclass(frozen=True)
class Frontier:
    """What the frontier notebook measures: methods at some ratios, with some seeds."""

    data: PmiConfig
    methods: Sequence[Method] = METHODS
    """Ways to make tables in fewer bytes, trained small or made small after training."""
    compression_ratios: Sequence[float] = (4, 8, 16, 32)
    """Of full inference bytes to a method's; methods of one size have one record."""
    seeds: Sequence[int] = (0,)
    """A record for each, of methods that draw."""
    num_steps: int = 50
    """Of full batches."""
    threads: int | None = None
    """Of torch and the kernels, by default as many as torch takes by itself."""

    def __post_init__(self) -> None:
        _check_numbers(self.compression_ratios, self.seeds, self.num_steps)
        check_integers(1, threads=self.threads)

    def measure(self) -> Iterator[records.Record]:
        """The record of each method at each ratio, if it has any, with each seed, if it draws any."""
        timing.set_threads(self.threads)
        data = load_pmi(self.data)
        objective = AllCellsLoss(data.matrix)
        todo = cases(self.methods, self.compression_ratios, self.seeds)
        for method, ratio, seed in tqdm(todo, desc="tables", unit="table"):
            options = {"compression_ratio": ratio, "seed": seed, "num_steps": self.num_steps}
            yield measure(method, data, objective, **options)
