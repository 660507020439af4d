"""The grids: which notebooks run with which parameters."""

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from cemb.pmi import corpora
from cemb.study import records
from cemb.study.sizes import OPTIMIZERS, POOL_SIZES, SMALL

NOTEBOOKS = records.ROOT / "notebooks"
# What each notebook builds from its parameters, see `cemb.study.parameters`. By name, to do without torch.
PARAMETERS = {
    "pmi.ipynb": "cemb.study.quality:Baselines",
    "speed.ipynb": "cemb.study.speed:Comparison",
    "growth.ipynb": "cemb.study.speed:Growth",
    "quality.ipynb": "cemb.study.quality:Trainings",
    "frontier.ipynb": "cemb.study.frontier:Frontier",
}
OPTIMIZER_NAMES = {"sgd": "SGD", "adagrad": "Adagrad", "adam": "Adam", "lbfgs": "L-BFGS"}
GRIDS = ("default", "full", "smoke")
Grid: TypeAlias = Literal[*GRIDS]  # type: ignore[valid-type]
COMPRESSION_RATIOS = (1, 4, 16)
# Mini-batches whose expected loss is that of all cells; most samples go where most cells are.
MINI_BATCH = {"training": "mini-batch", "loss": "all-cells", "negative_share": 0.8, "negative_power": 0.5}
# Tables in fewer bytes that train on mini-batches beside full ones.
SMALL_TABLES = (
    "hashed",
    "hybrid",
    "mixed-dimension",
    "low-rank",
    "quotient-remainder",
    "multi-hash",
    "clustered",
)
WEIGHT_POWER = 0.5


@dataclass(frozen=True)
class Run:
    """One notebook with its parameters, by flat names: its variables and what goes into its ``options``.

    `name` is unique in a study, `title` heads the run's page.

    Timed runs have the machine to themselves; others share it.
    """

    name: str
    title: str
    notebook: str
    parameters: dict[str, Any] = field(hash=False)
    is_timed: bool = False


def _speed_runs(repeats: int, **sizes: object) -> list[Run]:
    return [
        Run(
            f"speed-{optimizer}-{pool_size}",
            f"Speed: {OPTIMIZER_NAMES[optimizer]}, pool {pool_size:,}",
            "speed.ipynb",
            {
                "optimizer": optimizer,
                "pool_size": pool_size,
                "repeats": repeats,
                # Once is enough to see what eager PyTorch costs; on the large pool it takes half the run.
                "eager": pool_size == SMALL,
                **sizes,
            },
            is_timed=True,
        )
        for optimizer in OPTIMIZERS
        for pool_size in POOL_SIZES
    ]


def _quality_runs(seeds: list[int], mini_batch: dict[str, dict[str, Any]], **settings: object) -> list[Run]:
    """The mission's grid, optimizer by pool, and beside it L-BFGS, mini-batches and a weighted loss."""
    pools: list[tuple[str, dict[str, Any]]] = [("full", {"table": "full"})]
    pools += [
        (f"hashed-{ratio}-times", {"table": "hashed", "compression_ratio": ratio})
        for ratio in COMPRESSION_RATIOS
    ]
    pools += [(f"hashed-{SMALL}", {"table": "hashed", "pool_size": SMALL})]
    pools = [(name, {**pool, "training": "full-batch"}) for name, pool in pools]
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (o, "full-mini-batch", {"table": "full-fused", **MINI_BATCH, "seeds": seeds, **mini_batch.get(o, {})})
        for o in OPTIMIZERS
    ]
    cases += [(o, f"{name}-full-batch", {**pool, "seeds": seeds}) for o in OPTIMIZERS for name, pool in pools]
    cases += [("lbfgs", "full-full-batch", {"table": "full", "seeds": seeds})]
    cases += [
        ("adam", f"{name}-weighted", {**pool, "weight_power": WEIGHT_POWER, "seeds": seeds})
        for name, pool in pools[:-1]
    ]
    return [
        Run(
            f"quality-{optimizer}-{name}",
            f"Quality: {OPTIMIZER_NAMES[optimizer]}, {name.replace('-', ' ')}",
            "quality.ipynb",
            {"optimizer": optimizer, **case, **settings},
        )
        for optimizer, name, case in cases
    ]


def _mini_batch_runs(
    tables: Sequence[str], ratios: list[int], seeds: list[int], **settings: object
) -> list[Run]:
    """A full table and tables in fewer bytes, each for one pass by Adam."""
    cases: list[tuple[str, dict[str, Any]]] = [("full", {"table": "full-fused"})]
    cases += [
        (f"{table}-{ratio}-times", {"table": table, "compression_ratio": ratio})
        for table in tables
        for ratio in ratios
    ]
    return [
        Run(
            f"mini-batch-{name}",
            f"Mini-batches: {name.replace('-', ' ')}",
            "quality.ipynb",
            {"optimizer": "adam", **case, **MINI_BATCH, "seeds": seeds, **settings},
        )
        for name, case in cases
    ]


def _growth_runs(
    vocabularies: list[int], seeds: list[int], sizes: dict[str, Any], **settings: object
) -> list[Run]:
    """A pool of one size for more and more rows: its quality where there is data, its speed beyond."""
    pool: dict[str, Any] = {"table": "hashed", "pool_size": SMALL}
    return [
        Run("growth-speed", "Growth: speed by the number of rows", "growth.ipynb", sizes, is_timed=True),
        *(
            Run(
                f"growth-{case['table']}-{words}",
                f"Growth: {case['table']}, {words:,} words",
                "quality.ipynb",
                {"optimizer": "adam", **case, "max_vocab": words, "seeds": seeds, **settings},
            )
            for words in vocabularies
            for case in ({"table": "full"}, pool)
        ),
    ]


# Methods of `cemb.study.frontier` that share a run, since loading takes as long as one of them.
FRONTIER = {
    "hashed": ["full", "hashed", "hashed, blocks of 25", "hashed, blocks of 100", "hashed, signed"],
    "tiers": ["hybrid", "mixed-dimension", "low-rank"],
    "composed": ["quotient-remainder", "multi-hash", "clustered"],
    "int8": [f"{table}, then int8" for table in ("hashed", "low-rank")],
    "int8-others": [f"{table}, then int8" for table in SMALL_TABLES if table not in ("hashed", "low-rank")],
    "trivial": ["lower rank, then int8"],
    "axes": ["product quantization, random axes", "product quantization, balanced axes"],
    "after": ["lower rank", "int8", "int4", "product quantization", "transform coding"],
    "alternating": [f"alternating, {store}" for store in ("float32", "bfloat16", "int8", "int4")]
    + ["alternating, transform coding"],
}


def _frontier_runs(
    methods: dict[str, list[str]], ratios: dict[str, list[int]], seeds: list[int], **settings: object
) -> list[Run]:
    return [
        Run(
            f"frontier-{group}",
            f"Frontier: {group}",
            "frontier.ipynb",
            {
                "methods": methods[group],
                "compression_ratios": ratios[group],
                "seeds": seeds,
                **settings,
            },
        )
        for group in FRONTIER
        if group in ratios
    ]


# Names of runs that a grid leaves out of all those that its settings make.
_LEFT_OUT: dict[str, tuple[str, ...]] = {
    "full": (),
    # So that it takes a quarter of an hour on two processors.
    "default": (
        "quality-*-full-mini-batch",
        *(f"quality-*-hashed-{ratio}-times-full-batch" for ratio in (1, 16)),
        *(f"quality-*-hashed-{ratio}-times-weighted" for ratio in (1, 16)),
        "quality-*-full-weighted",
    ),
    # They try no code that others of the smoke grid do not.
    "smoke": (
        *(f"quality-{optimizer}-hashed-*" for optimizer in ("sgd", "adagrad")),
        *("quality-*-full-mini-batch", "quality-adam-hashed-1-times-full-batch"),
        *(f"quality-adam-hashed-{ratio}-times-weighted" for ratio in (1, 16)),
    ),
}


def asked() -> tuple[str, str]:
    """Grid and corpus that the environment names: $CEMB_GRID and $CORPUS, or else the defaults."""
    return os.environ.get("CEMB_GRID") or "default", os.environ.get("CORPUS") or corpora.DEFAULT_CORPUS


def study_runs(grid: str = "default", corpus: str = corpora.DEFAULT_CORPUS) -> list[Run]:
    """The runs of a grid: ``"default"``; ``"full"``, with more ratios, seeds and baselines; or ``"smoke"``.

    Runs of the default grid are runs of the full one, of fewer methods, ratios and seeds. The smoke grid
    tries the code of all pages on little data. `corpus` is a name, or a path or glob from the working
    directory. Raises ValueError for an unknown grid, and what `cemb.pmi.corpora.fingerprint` does.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {grid!r}")
    corpora.fingerprint(corpus)  # refuses one that cannot be read, by the name it was given
    if corpus not in corpora.CORPORA:
        corpus = os.path.relpath(corpus, NOTEBOOKS)  # kernels work there
    data: dict[str, Any] = {"corpus": corpus}
    speed: dict[str, Any] = {}
    quality, pmi, frontier_settings = data, data, data
    repeats = 6  # what the 2021 project averaged
    seeds = [0]
    mini_batch: dict[str, dict[str, Any]] = {}
    after = [4, 8, 16, 32, 64]
    ratios = {"hashed": [4], "trivial": after, "after": after, "alternating": [16]}
    methods = {**FRONTIER, "hashed": ["hashed", "hashed, blocks of 25"]}
    methods["after"] = [name for name in FRONTIER["after"] if name != "product quantization"]  # half its time
    tables: Sequence[str] = ()
    mini_batch_ratios: list[int] = []
    vocabularies: list[int] = []
    rows: dict[str, Any] = {}
    if grid == "full":
        seeds = [0, 1, 2]
        # Far enough to come near the optimum, at a lower rate than a short run's.
        mini_batch = {"adam": {"num_epochs": 8, "learning_rate": 0.005}}
        trained = [4, 8, 16]
        is_trained = {"hashed", "tiers", "composed", "int8", "int8-others"}
        methods = FRONTIER
        ratios = {group: trained if group in is_trained else after for group in FRONTIER}
        tables, mini_batch_ratios = SMALL_TABLES, [4, 16]
        vocabularies = [2_500, 5_000, 10_000, 20_000]
        pmi = {**data, "sgns_epochs": 5}
    elif grid == "smoke":
        data = pmi = {"corpus": corpus, "min_count": 2, "rank": 8}
        speed = {"num_embeddings": 3000, "embedding_dim": 32, "batch_size": 256}
        rows = {"rows": [1000, 10**9], "full_rows": [1000], "embedding_dim": 32, "batch_size": 256}
        repeats = 2
        quality = {**data, "num_steps": 30, "batch_size": 2048}
        frontier_settings = {**data, "num_steps": 6}
        # One run of each kind is enough to try its page's code.
        methods = {
            "tiers": FRONTIER["tiers"] + FRONTIER["int8"],
            "after": FRONTIER["trivial"] + FRONTIER["after"] + FRONTIER["alternating"],
        }
        ratios = {"tiers": [8], "after": [2, 4]}
        tables, mini_batch_ratios, vocabularies = ("hybrid",), [4], [300]
    runs = [
        Run("pmi", "Data: the PMI matrix", "pmi.ipynb", pmi),
        *_speed_runs(repeats, **speed),
        # The longest first, so that none is left running alone at the end.
        *_frontier_runs(methods, ratios, seeds, **frontier_settings),
        *_mini_batch_runs(tables, mini_batch_ratios, seeds, **quality),
        *_quality_runs(seeds, mini_batch, **quality),
        *_growth_runs(vocabularies, seeds, rows, **quality),
    ]
    runs = [run for run in runs if not any(fnmatchcase(run.name, name) for name in _LEFT_OUT[grid])]
    if grid == "smoke":
        # Nobody reads these times, so they need not wait for each other.
        runs = [replace(run, is_timed=False) for run in runs]
    return runs


def select(
    runs: list[Run],
    optimizers: Collection[object] | None = None,
    pool_sizes: Collection[object] | None = None,
    names: Iterable[str] | None = None,
) -> list[Run]:
    """The runs of the named optimizers and pool sizes, and of names, which may be shell patterns.

    ValueError for one that no run has.
    """
    for parameter, wanted in (("optimizer", optimizers), ("pool_size", pool_sizes)):
        known = sorted({run.parameters[parameter] for run in runs if parameter in run.parameters})
        for value in wanted or ():
            if value not in known:
                raise ValueError(
                    f"no run of this grid has {parameter}={value}; it has {', '.join(map(str, known))}"
                )
    for pattern in names or ():
        if not any(fnmatchcase(run.name, pattern) for run in runs):
            raise ValueError(
                f"no run of this grid has a name like {pattern!r}; it has {', '.join(r.name for r in runs)}"
            )
    return [
        run
        for run in runs
        if (optimizers is None or run.parameters.get("optimizer") in optimizers)
        and (pool_sizes is None or run.parameters.get("pool_size") in pool_sizes)
        and (names is None or any(fnmatchcase(run.name, pattern) for pattern in names))
    ]
