"""The speed study: one training step of a pair model, by phase, for the tables and optimizers compared.

As in the 2021 project: uniform random pairs, one table shared by words and contexts, no bias, dropout 0.1,
mean squared error. `forward` is the scores, `gradient` the backward pass from the loss, `step` the
optimizer's update and the clearing of gradients (what that project calls the backward pass). The loss
itself is not timed.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from cemb import measure, ops, records
from cemb.model import TABLES, build_model, mse_loss
from cemb.train import ADAM_BETAS, OPTIMIZERS, make_optimizer

LEARNING_RATES = {"sgd": 0.01, "adagrad": 0.05, "adam": 0.001}
ORIGINAL_POOL_SIZES = (262_144, 100_000_000)
ORIGINAL_FULL_POOL_SIZES = (1, 8, 64, 512, *(32_768 * 8**i for i in range(5)), 100_000_000)
ORIGINAL_FULL_BATCH_SIZES = (64, 512, 4096, 32_768)
_NUM_BATCHES = 4  # drawn beforehand and used in turn


@dataclass(frozen=True)
class SpeedCase:
    """What one record of the speed study measures. `pool_size` is None for a full table.

    `sparse_gradients` is for full tables: only the rows of a batch have gradients, and Adam is lazy.
    """

    table: str
    optimizer: str
    pool_size: int | None = None
    block_size: int = 1
    sparse_gradients: bool = False
    num_embeddings: int = 1_000_000
    embedding_dim: int = 100
    batch_size: int = 32_768
    dropout: float = 0.1
    device: str = "cpu"

    def __post_init__(self):
        if self.table not in TABLES:
            raise ValueError(f"table must be one of {', '.join(TABLES)}, got {self.table!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} was asked for, and torch sees no CUDA device")
        for name in ("num_embeddings", "embedding_dim", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def label(self) -> str:
        """A short name, distinct among the cases of one run."""
        if self.table == "full":
            return f"full, {'sparse' if self.sparse_gradients else 'dense'} gradients"
        return f"{self.table}, pool {self.pool_size:,}, block {self.block_size}"


def _step(case: SpeedCase, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]):
    """A training step of the case as a callable for `measure`, and the model's number of parameters."""
    # Drawing normal deviates would take longer than the measurement; no time depends on the values.
    torch.manual_seed(0)
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
            parameter.uniform_(-0.1, 0.1)
    model.train()
    optimizer = make_optimizer(
        case.optimizer, model.parameters(), LEARNING_RATES[case.optimizer], sparse=case.sparse_gradients
    )
    calls = 0

    def step(clock: measure.Clock) -> None:
        nonlocal calls
        pairs, values = batches[calls % len(batches)]
        calls += 1
        with clock.phase("forward"):
            scores = model(pairs)
        loss = mse_loss(scores, values)
        with clock.phase("gradient"):
            loss.backward()
        with clock.phase("step"):
            optimizer.step()
            optimizer.zero_grad()

    return step, model.num_parameters


def measure_cases(
    cases: Sequence[SpeedCase], *, repeats: int = 15, warmup: int = 2, rounds: int = 3
) -> list[dict[str, object]]:
    """Measure cases side by side, their repeats interleaved; one record each, ratios between them fair.

    The cases must agree in sizes and device, since they are shown the same batches.
    """
    shared = {(c.num_embeddings, c.batch_size, c.device) for c in cases}
    if len(shared) != 1:
        raise ValueError(f"cases measured together must share sizes and device, got {sorted(shared)}")
    (num_embeddings, batch_size, device) = shared.pop()
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randint(num_embeddings, (batch_size, 2), generator=generator).to(device),
            torch.rand(batch_size, generator=generator).to(device),
        )
        for _ in range(_NUM_BATCHES)
    ]
    built = {case: _step(case, batches) for case in cases}
    steps = {case.label: step for case, (step, _) in built.items()}
    times = measure.interleave(steps, repeats=repeats, warmup=warmup, rounds=rounds, device=device)
    found = []
    for case, (step, num_parameters) in built.items():
        peak = measure.peak_mib(step, device)
        hashed = case.table == "hashed"
        found.append(
            {
                "kind": "speed",
                "label": case.label,
                **asdict(case),
                "backend": ops.backend(torch.device(device), torch.float32) if hashed else "torch",
                "learning_rate": LEARNING_RATES[case.optimizer],
                "adam_betas": ADAM_BETAS if case.optimizer == "adam" else None,
                "repeats": repeats,
                "warmup": warmup,
                "rounds": rounds,
                "parameters_mib": num_parameters * 4 / 2**20,
                **measure.summarize(times[case.label]),
                "peak_mib": None if peak is None else round(peak, 2),
                **records.provenance(device),
            }
        )
    return found


def comparison_cases(
    optimizer: str, pool_size: int, block_sizes: Iterable[int] = (1,), *, eager: bool = True, **sizes
) -> list[SpeedCase]:
    """What one notebook of the speed study compares: both full tables, the hashed one, and eager PyTorch."""
    full = SpeedCase("full", optimizer, **sizes)
    cases = [full, replace(full, sparse_gradients=True)]
    cases += [SpeedCase("hashed", optimizer, pool_size, block_size=b, **sizes) for b in block_sizes]
    if eager:
        cases.append(SpeedCase("hashed-reference", optimizer, pool_size, **sizes))
    return cases


def grid_cases(name: str, *, device: str = "cpu") -> list[SpeedCase]:
    """The cases of a named grid, in the 2021 project's order of rows.

    ``"original"`` is the nine rows of its published table; ``"original-full"`` all its batch and pool sizes.
    """
    grids = {
        "original": (ORIGINAL_POOL_SIZES, (32_768,)),
        "original-full": (ORIGINAL_FULL_POOL_SIZES, ORIGINAL_FULL_BATCH_SIZES),
    }
    if name not in grids:
        raise ValueError(f"grid must be one of {', '.join(grids)}, got {name!r}")
    pool_sizes, batch_sizes = grids[name]
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


def original_csv(speed_records: Iterable[dict]) -> str:
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
                record["forward_ms"],
                record["gradient_ms"],
                record["step_ms"],
                f"{record['parameters_mib']:.1f}MB",
                _CSV_OPTIMIZERS[record["optimizer"]],
            ]
        )
    return out.getvalue()
