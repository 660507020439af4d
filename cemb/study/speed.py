"""The speed study: one training step of a pair model, by phase, for the tables and optimizers compared.

As in the 2021 project: uniform random pairs, one table shared by words and contexts, no bias, dropout 0.1,
mean squared error. `forward` is the scores, `gradient` the backward pass from the loss, `step` the
optimizer's update and the clearing of gradients (what that project calls the backward pass). The loss
itself is not timed, but in steps that make all of it in one pass.
"""

import csv
import io
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from cemb import ops, optim
from cemb.checks import check_integers, check_reals
from cemb.hashing import FullSpec, HashSpec, Spec
from cemb.kernels import cpu
from cemb.memory import advise_huge_pages
from cemb.model import TABLES, build_model
from cemb.study import records, rivals, sizes, timing
from cemb.train.loops import ADAM_BETAS, OPTIMIZERS, make_optimizer
from cemb.train.losses import mse_loss

LEARNING_RATES = {"sgd": 0.01, "adagrad": 0.05, "adam": 0.001}
ORIGINAL_FULL_POOL_SIZES = (1, 8, 64, 512, *(32_768 * 8**i for i in range(5)), 100_000_000)
ORIGINAL_FULL_BATCH_SIZES = (64, 512, 4096, 32_768)
GRIDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # sizes of pools and batches
    "original": (sizes.POOL_SIZES, (32_768,)),
    "original-full": (ORIGINAL_FULL_POOL_SIZES, ORIGINAL_FULL_BATCH_SIZES),
}
IDS = ("uniform", "zipf")
# What options may be, for whoever reads types.
Grid: TypeAlias = Literal[*GRIDS]  # type: ignore[valid-type]
Ids: TypeAlias = Literal[*IDS]  # type: ignore[valid-type]
Table: TypeAlias = Literal[*TABLES, *rivals.NAMES]  # type: ignore[valid-type]
_NUM_BATCHES = 4  # drawn beforehand and used in turn


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a timed step trains on, whatever its table."""

    embedding_dim: int = 100
    """Dimension of the vectors."""
    batch_size: int = 32_768
    """Pairs a step."""
    dropout: float = 0.1
    """Share of vector components zeroed."""
    ids: Ids = "uniform"
    """Rows are drawn all alike, or (zipf) row i in proportion to 1/(i + 1)."""
    device: str = "cpu"
    """As torch names it, such as cuda."""

    def __post_init__(self) -> None:
        check_integers(1, embedding_dim=self.embedding_dim, batch_size=self.batch_size)
        check_reals("[0, 1)", dropout=self.dropout)


@dataclass(frozen=True)
class SpeedCase(Task):
    """What one record of the speed study measures: a training step."""

    table: Table = "hashed"
    """Of `cemb.model.TABLES` or `cemb.study.rivals.NAMES`."""
    optimizer: sizes.Optimizer = "sgd"
    """The rule of the step."""
    pool_size: int | None = None
    """Values in a hashed table's pool, by default 262,144; a full table has none."""
    block_size: int = 1
    """Consecutive columns that read consecutive values of the pool."""
    sparse_gradients: bool = False
    """Of torch's full table, only the rows of a batch have gradients, and Adam is lazy."""
    one_pass: bool | None = None
    """Scores, loss, gradient and update in one call, `cemb.optim.PairStepOptimizer.pair_step`, whose time is
    that of the phase step; of our tables on the CPU. By default where `cemb.optim.plan` says so."""
    num_embeddings: int = sizes.ROWS
    """Rows of the table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool_size is None and self.table.startswith("hashed"):
            object.__setattr__(self, "pool_size", sizes.SMALL)
        tables = (*TABLES, *rivals.NAMES)
        if self.table not in tables:
            raise ValueError(f"table must be one of {', '.join(tables)}, got {self.table!r}")
        if self.ids not in IDS:
            raise ValueError(f"ids must be one of {', '.join(IDS)}, got {self.ids!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} was asked for, and torch sees no CUDA device")
        check_integers(1, num_embeddings=self.num_embeddings, block_size=self.block_size)
        way = self.plan.way  # refuses sizes that no table has
        has_one_pass = self.table in ("full-fused", "full-fused-rowwise", "hashed") and self.device == "cpu"
        if self.one_pass and not has_one_pass:
            raise ValueError(
                "a step in one pass is for the tables full-fused and hashed on the CPU, got "
                f"{self.table!r} on {self.device!r}"
            )
        if self.one_pass is None:
            object.__setattr__(self, "one_pass", has_one_pass and way == "pair_step")

    @property
    def label(self) -> str:
        """A short name, distinct among the cases of one run."""
        if self.table == "full":
            return f"full, {'sparse' if self.sparse_gradients else 'dense'} gradients"
        name = self.table
        if self.pool_size is not None:
            name += f", pool {self.pool_size:,}, block {self.block_size}"
        return f"{name}, one pass" if self.one_pass else name

    @property
    def plan(self) -> optim.Plan:
        """How the table is trained."""
        rows, dim = self.num_embeddings, self.embedding_dim
        spec: Spec = FullSpec(rows, dim)
        if self.pool_size is not None:
            spec = HashSpec(rows, dim, self.pool_size, self.block_size)
        return optim.plan(spec, self.device)


def _ids(case: SpeedCase, generator: torch.Generator) -> torch.Tensor:
    shape = (case.batch_size, 2)
    if case.ids == "uniform":
        return torch.randint(case.num_embeddings, shape, generator=generator)
    # The inverse of the cumulative sum of 1/(i + 1), which is close to a logarithm.
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    rows = torch.exp(uniform * torch.log(torch.tensor(case.num_embeddings + 1.0, dtype=torch.float64))) - 1
    return rows.long().clamp_(max=case.num_embeddings - 1)


def _batches(case: SpeedCase) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            _ids(case, generator).to(case.device),
            torch.rand(case.batch_size, generator=generator).to(case.device),
        )
        for _ in range(_NUM_BATCHES)
    ]


class Timed:
    """A case made ready to be timed: its model, optimizer and batches. Call it with a `measure.Clock`."""

    num_parameters: int
    _score: Any
    _optimizer: Any

    def __init__(self, case: SpeedCase):
        self.case = case
        self._batches = _batches(case)
        self._calls = 0
        torch.manual_seed(0)
        rate = LEARNING_RATES[case.optimizer]
        if case.table in rivals.NAMES:
            self._score, self._optimizer, self.num_parameters = rivals.build(case, rate)
            return
        model = build_model(
            case.table,
            case.num_embeddings,
            case.embedding_dim,
            pool_size=case.pool_size,
            block_size=case.block_size,
            sparse_gradients=case.sparse_gradients,
            dropout=case.dropout,
            device="meta",
        ).to_empty(device=case.device)
        with torch.no_grad():
            for parameter in model.parameters():
                if case.table in ("hashed", "full-fused"):  # as their constructors do
                    advise_huge_pages(parameter)
                # Drawing normal deviates would take longer than the measurement; no time depends on values.
                parameter.uniform_(-0.1, 0.1)
        self._score = model.train()
        self.num_parameters = model.num_parameters
        self._optimizer = make_optimizer(
            case.optimizer,
            model.parameters(),
            rate,
            sparse_gradients=case.sparse_gradients,
            pair_steps=bool(case.one_pass),
            lazy=case.plan.way == "pair_step",
        )

    def __call__(self, clock: timing.Clock) -> None:
        pairs, values = self._batches[self._calls % _NUM_BATCHES]
        self._calls += 1
        if self.case.one_pass:
            with clock.phase("step"):
                self._score.pair_step(self._optimizer, pairs, mse_loss(values))
            return
        with clock.phase("forward"):
            scores = self._score(pairs)
        loss = mse_loss(values)(scores)
        with clock.phase("gradient"):
            loss.backward()
        with clock.phase("step"):
            self._optimizer.step()
            self._optimizer.zero_grad()

    def graph_ms(self, *, repeats: int = 40) -> float | None:
        """Median time of the step, loss included, replayed as a CUDA graph; None for sparse gradients.

        These wait for the device to learn their size, which a graph cannot. No launch is waited for in a
        replay, so it is what a step takes where Python is not in its way.
        """
        if self.case.sparse_gradients:
            return None
        pairs, values = (tensor.clone() for tensor in self._batches[0])

        def step() -> None:
            mse_loss(values)(self._score(pairs)).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()

        for group in self._optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True

        def feed() -> None:
            batch, wanted = self._batches[self._calls % _NUM_BATCHES]
            self._calls += 1
            pairs.copy_(batch)
            values.copy_(wanted)

        return timing.graph_ms(step, feed, repeats=repeats)

    @property
    def backend(self) -> str:
        """What computes the step, as `cemb.ops.backend` says; ``"torch"`` for torch's tables, or a rival."""
        if self.case.table in rivals.NAMES:
            return rivals.NAMES[self.case.table]
        if self.case.table in ("hashed", "full-fused"):
            return ops.backend(torch.device(self.case.device), torch.float32)
        return "torch"

    def _device_times(self) -> dict[str, float | None]:
        found = {"device_ms": timing.device_ms(self, self.case.device), "graph_ms": self.graph_ms()}
        return {name: None if value is None else round(value, 4) for name, value in found.items()}

    def record(self, times_ms: dict[str, list[float]], **options: object) -> records.Record:
        """The record of these times; takes more steps, to see the memory one needs and the GPU's own time."""
        case = self.case
        cpu.release_memory()
        peak = timing.peak_mib(self, case.device)
        return {
            "kind": "speed",
            "label": case.label,
            **asdict(case),
            "backend": self.backend,
            "learning_rate": LEARNING_RATES[case.optimizer],
            "adam_betas": ADAM_BETAS if case.optimizer == "adam" else None,
            **options,
            "parameters_mib": self.num_parameters * 4 / 2**20,
            **timing.summarize(times_ms),
            "peak_mib": None if peak is None else round(peak, 2),
            **(self._device_times() if case.device != "cpu" else {}),
            **records.provenance(case.device),
        }


def measure_cases(
    cases: Sequence[SpeedCase], *, repeats: int = 15, warmup: int = 2, rounds: int = 3
) -> list[records.Record]:
    """Measure cases side by side, their repeats interleaved; one record each, ratios between them fair.

    Args:
        repeats: timed steps of each case.
        warmup: steps before them.
        rounds: turns that the repeats are dealt out to.

    Raises:
        ValueError: they are not of one device; a number of steps is out of range.
    """
    timing.check_turns(repeats, warmup, rounds)
    devices = {case.device for case in cases}
    if len(devices) != 1:
        raise ValueError(f"cases measured together must share a device, got {sorted(devices)}")
    options = {"repeats": repeats, "warmup": warmup, "rounds": rounds}
    steps: dict[Hashable, Timed] = {case: Timed(case) for case in cases}
    times = timing.interleave(steps, **options, device=devices.pop())
    return [step.record(times[case], **options) for case, step in steps.items()]


@dataclass(frozen=True)
class SpeedStudy:
    """What notebooks of timed steps have alike."""

    task: Task
    optimizer: sizes.Optimizer = "sgd"
    """The rule of the step."""
    pool_size: int = sizes.SMALL
    """Values in the pool."""
    block_sizes: Sequence[int] = (1, sizes.BLOCK)
    """Consecutive columns that read consecutive values of the pool, of each hashed table."""
    repeats: int = 9
    """Timed steps of each table."""
    threads: int | None = None
    """Of torch and the kernels, by default as many as torch takes by itself."""

    def __post_init__(self) -> None:
        check_integers(1, repeats=self.repeats, threads=self.threads)
        _ = self.cases  # which refuse what they cannot be

    @property
    def cases(self) -> list[SpeedCase]:
        """The steps that are timed."""
        raise NotImplementedError

    def measure(self) -> list[records.Record]:
        """A record of each case, measured side by side."""
        timing.set_threads(self.threads)
        return measure_cases(self.cases, repeats=self.repeats)


@dataclass(frozen=True)
class Comparison(SpeedStudy):
    """What the speed notebook compares: torch's full tables, ours, the hashed ones, and eager PyTorch."""

    num_embeddings: int = sizes.ROWS
    """Rows of all tables."""
    eager: bool = True
    """Also measure the same hash in eager PyTorch."""

    @property
    def cases(self) -> list[SpeedCase]:
        common = {**asdict(self.task), "num_embeddings": self.num_embeddings}
        full = SpeedCase("full", self.optimizer, **common)
        fused = replace(full, table="full-fused", one_pass=None)
        found = [full, replace(full, sparse_gradients=True), fused]
        hashed = SpeedCase("hashed", self.optimizer, self.pool_size, **common)
        found += [replace(hashed, block_size=block) for block in self.block_sizes]
        return [*found, replace(hashed, table="hashed-reference", one_pass=None)] if self.eager else found


@dataclass(frozen=True)
class Growth(SpeedStudy):
    """What the growth notebook compares: a pool of one size for more and more rows, and full tables."""

    optimizer: sizes.Optimizer = "adam"
    """The rule of the step."""
    rows: Sequence[int] = (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
    """Of the hashed tables."""
    full_rows: Sequence[int] = (10**4, 10**5, 10**6)
    """Of full tables, with cemb's kernels."""

    @property
    def cases(self) -> list[SpeedCase]:
        full = SpeedCase("full-fused", self.optimizer, **asdict(self.task))
        hashed = replace(full, table="hashed", pool_size=self.pool_size, one_pass=None)
        return [
            *(replace(full, num_embeddings=n) for n in self.full_rows),
            *(replace(hashed, block_size=b, num_embeddings=n) for b in self.block_sizes for n in self.rows),
        ]


def grid_cases(name: str, *, device: str = "cpu") -> list[SpeedCase]:
    """The cases of a named grid, in the 2021 project's order of rows.

    ``"original"`` is the nine rows of its published table; ``"original-full"`` all its batch and pool sizes.
    """
    if name not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {name!r}")
    pool_sizes, batch_sizes = GRIDS[name]
    return [
        SpeedCase(
            "full" if pool_size is None else "hashed",
            optimizer,
            pool_size,
            batch_size=batch_size,
            device=device,
        )
        for optimizer in ("adagrad", "sgd", "adam")
        for batch_size in batch_sizes
        for pool_size in (None, *pool_sizes)
    ]


_CSV_OPTIMIZERS = {"sgd": "SGD", "adagrad": "Adagrad", "adam": "Adam"}


def original_csv(speed_records: Iterable[records.Record]) -> str:
    """Records as the 2021 project's ``benchmark.csv``, with its column names."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "Model",
            "batch_size",
            "memory_size",
            "forward_pass_ms",
            "gradient_computation_ms",
            "backward_pass_ms",
            "model size",
            "optimizer",
        ]
    )
    for record in speed_records:
        writer.writerow(
            [
                "FullEmbTableModel" if record["table"] == "full" else "CompressedEmbTableModel",
                record["batch_size"],
                "" if record["pool_size"] is None else record["pool_size"],
                record.get("forward_ms", ""),  # steps in one call have one phase
                record.get("gradient_ms", ""),
                record["step_ms"],
                f"{record['parameters_mib']:.1f}MB",
                _CSV_OPTIMIZERS[record["optimizer"]],
            ]
        )
    return out.getvalue()
