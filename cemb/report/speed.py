"""The chapter on speed: the study's steps beside those of 2021."""

from importlib import resources

import pandas as pd

from cemb.report import labels
from cemb.report.provenance import Numbers, of
from cemb.report.select import frame, of_runs, pick
from cemb.report.stats import Ratio, time_ratio
from cemb.report.text import NOT_MEASURED, contended_mark, machine, quartiles_text
from cemb.study import sizes
from cemb.study.grid import OPTIMIZER_NAMES
from cemb.study.records import CONTENDED_SHARE, Record

PHASES = ("forward", "gradient", "step")
SMALL, LARGE = sizes.POOL_SIZES


def numbers(found: list[Record]) -> Numbers:
    """What the page's text says, by name."""
    first = speed_record(found, "hashed", "sgd", SMALL)
    names = ("num_embeddings", "embedding_dim", "batch_size", "repeats", "dropout")
    num_contended = sum(record.get("is_contended", False) for record in found)
    given = {
        **of(None, **{name: first[name] for name in names}),
        **of(None, small=SMALL, large=LARGE, machine=machine(found), contended_share=100 * CONTENDED_SHARE),
        **of(None, num_timed=len(frame(found, "speed")), num_contended=num_contended),
        **of(first, small_mib=first["parameters_mib"]),
        **of(first, full_mib=best_full(found, "sgd", SMALL)["parameters_mib"]),
    }
    for name in sizes.OPTIMIZERS:
        for size, pool in (("small", SMALL), ("large", LARGE)):
            for block in (1, sizes.BLOCK):
                hashed = speed_record(found, "hashed", name, pool, block_size=block)
                ratio = time_ratio(hashed, best_full(found, name, pool))
                given[f"{name}_{size}_{block}"] = ratio.verdict, hashed
            given[f"{name}_then_{size}"] = original_ratio(name, pool), None
        eager = speed_record(found, "hashed-reference", name, SMALL)
        given[f"{name}_eager"] = time_ratio(eager, best_full(found, name, SMALL)).verdict, eager
    return given


def run_records(found: list[Record], optimizer: str, pool_size: int) -> list[Record]:
    """What one run compares: full tables, and hashed ones of this pool size."""
    return of_runs(found, "speed.ipynb", optimizer=optimizer, pool_size=pool_size)


def run_frames(found: list[Record]) -> dict[tuple[str, int], pd.DataFrame]:
    """`run_records` as frames, by optimizer and pool size."""
    keys = [(optimizer, pool_size) for optimizer in sizes.OPTIMIZERS for pool_size in sizes.POOL_SIZES]
    return {key: pd.DataFrame(run_records(found, *key)) for key in keys}


def speed_record(
    found: list[Record], table: str, optimizer: str, pool_size: int, *, block_size: int = 1, **more: object
) -> Record:
    """A record from the run of this optimizer and pool size, of a hashed or a full table."""
    size = (None, 1) if table == "full" else (pool_size, block_size)
    wanted = {"table": table, "pool_size": size[0], "block_size": size[1], **more}
    return pick(run_records(found, optimizer, pool_size), **wanted)


def best_full(found: list[Record], optimizer: str, pool_size: int) -> Record:
    """The faster of the full tables, dense and sparse gradients, in the run of this pool size."""
    both = (
        speed_record(found, "full", optimizer, pool_size, sparse_gradients=sparse) for sparse in (False, True)
    )
    return min(both, key=lambda record: record["total_ms"])


def over_full(found: list[Record], optimizer: str, pool_size: int) -> Ratio:
    """Time of a hashed step at block size 1 over that of the faster full table."""
    hashed = speed_record(found, "hashed", optimizer, pool_size)
    return time_ratio(hashed, best_full(found, optimizer, pool_size))


def original_2021() -> pd.DataFrame:
    """The nine published rows of the TensorFlow project `compressed-embeddings` (2021), in milliseconds."""
    with resources.files("cemb").joinpath("data/original_2021.csv").open() as file:
        return pd.read_csv(file, dtype={"pool_size": "Int64"})


def original_ratio(optimizer: str, pool_size: int) -> float:
    """The 2021 project's hashed total over its full total."""
    rows = original_2021().query("optimizer == @optimizer")
    full: float = rows[rows.table == "full"].total_ms.item()
    hashed: float = rows[rows.pool_size == pool_size].total_ms.item()
    return hashed / full


def beside_original(found: list[Record]) -> pd.DataFrame:
    """The 2021 project's nine rows beside ours: milliseconds, and ratios of hashed to full."""
    rows = []
    for old in original_2021().itertuples():
        is_full = old.table == "full"
        pool_size = SMALL if is_full else int(old.pool_size)
        full = best_full(found, old.optimizer, pool_size)
        ours = full if is_full else speed_record(found, "hashed", old.optimizer, pool_size)
        name = labels.TIMED["full"] if is_full else f"pool {pool_size:,}"
        rows.append(
            {
                "optimizer": OPTIMIZER_NAMES[old.optimizer],
                "table": name + contended_mark(ours),
                "2021 (ms)": f"{old.total_ms:,.0f}",
                "2021 ÷ full": "" if is_full else f"{original_ratio(old.optimizer, pool_size):.2f}",
                "total (ms)": f"{ours['total_ms']:,.1f}",
                "÷ full": "" if is_full else str(time_ratio(ours, full)),
                **_phases(ours),
            }
        )
    return pd.DataFrame(rows)


def answer_frame(found: list[Record]) -> pd.DataFrame:
    """Hashed over full step time by optimizer and pool, in 2021 and now: what `figures.answer` draws."""
    rows = []
    for pool_size in sizes.POOL_SIZES:
        for optimizer in sizes.OPTIMIZERS:
            ratio = over_full(found, optimizer, pool_size)
            rows.append(
                {
                    "name": f"{OPTIMIZER_NAMES[optimizer]}, pool {pool_size:,}",
                    "then": original_ratio(optimizer, pool_size),
                    "now": ratio.value,
                    "low": ratio.low,
                    "high": ratio.high,
                }
            )
    return pd.DataFrame(rows)


def _phases(record: Record) -> dict[str, str]:
    """Medians by phase; a step in one call has one."""
    times = {phase: record.get(f"{phase}_ms") for phase in PHASES}
    return {phase: "" if pd.isna(time) else f"{time:,.1f}" for phase, time in times.items()}


def speed_table(found: list[Record]) -> pd.DataFrame:
    """Every speed record: medians by phase, and the quartiles of the total."""
    rows = frame(found, "speed")
    return pd.DataFrame(
        {
            "optimizer": rows.optimizer.map(OPTIMIZER_NAMES),
            "table": [labels.timed(r) + contended_mark(r) for r in rows.to_dict("records")],
            "total (ms)": rows.total_ms.map("{:,.1f}".format),
            "quartiles": rows.total_ms_repeats.map(quartiles_text),
            **{phase: [_phases(r)[phase] for r in rows.to_dict("records")] for phase in PHASES},
        }
    )


def growth_records(found: list[Record]) -> list[Record]:
    """Records of steps of tables of ever more rows; none if not run."""
    return of_runs(found, "growth.ipynb")


def growth_numbers(found: list[Record]) -> Numbers:
    """What the growth of a pool's rows costs in time and memory."""
    of_block = {block: f"growth_block_{block}" for block in (1, sizes.BLOCK)}
    names = ("growth_fewest", "growth_most", "growth_hashed_mib", "growth_full_gib", *of_block.values())
    hashed = [record for record in growth_records(found) if record["table"] == "hashed"]
    if not hashed:
        return of(None, **dict.fromkeys(names, NOT_MEASURED))
    hashed.sort(key=lambda record: record["num_embeddings"])
    fewest, most = hashed[0]["num_embeddings"], hashed[-1]["num_embeddings"]
    last, copies = hashed[-1], sizes.COPIES[hashed[-1]["optimizer"]]
    full_gib = 4 * copies * most * last["embedding_dim"] / 2**30
    values = (f"{fewest:,}", f"{most:,}", f"{copies * last['parameters_mib']:.0f}", f"{full_gib:,.0f}")
    texts = dict(zip(names, values, strict=False))
    for block, name in of_block.items():
        own = [record["total_ms"] for record in hashed if record["block_size"] == block]
        texts[name] = f"{own[0]:.1f} to {own[-1]:.1f}" if own else NOT_MEASURED
    return of(last, **texts)
