"""Ratios that the kernels are to reach on two cores and on a GPU, judged by records."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cemb.study.roofline import floor_ms
from cemb.study.sizes import BLOCK, GPU_BLOCK, HUGE_TABLE, LARGE, OPTIMIZERS, ROWS, SMALL

PEAK_LIMIT_MIB = 64
_FULL_PEERS = ("full", "full-fbgemm", "full-fbgemm-rowwise")
_FUSED = ("full-fused", "full-fused-rowwise")
OURS = ("hashed", *_FUSED)


@dataclass(frozen=True)
class Target:
    """A ratio to reach: the least median total among `ours` over the least among `theirs`."""

    name: str
    limit: float
    optimizer: str
    ours: dict[str, Any]
    theirs: tuple[dict[str, Any], ...]
    thp: str | None = None  # of theirs; None takes the better setting

    def evaluate(self, found: list[dict[str, Any]]) -> tuple[float, dict[str, Any], dict[str, Any]] | None:
        """The ratio and the two records, or None where one side was not measured."""
        uniform = [r for r in found if r.get("ids") == "uniform" and r["optimizer"] == self.optimizer]
        ours = _select(uniform, {**self.ours, "thp_mem_alloc_enable": "0"})
        theirs = [r for wanted in self.theirs for r in _select(uniform, wanted)]
        theirs = [r for r in theirs if self.thp in (None, r["thp_mem_alloc_enable"])]
        if not ours or not theirs:
            return None
        best = min(theirs, key=lambda r: r["total_ms"])
        # One state for a row is an easier rule: ours that has it stands against a peer that has it.
        if not best["table"].endswith("rowwise"):
            ours = [r for r in ours if not r["table"].endswith("rowwise")] or ours
        own = min(ours, key=lambda r: r["total_ms"])
        return own["total_ms"] / best["total_ms"], own, best


def _select(found: list[dict[str, Any]], wanted: dict[str, Any]) -> list[dict[str, Any]]:
    wanted = {"num_embeddings": ROWS, **wanted}
    return [
        r
        for r in found
        if all(
            r[name] in value if isinstance(value, tuple) else r[name] == value
            for name, value in wanted.items()
        )
    ]


def _hashed(pool_size: int, block_size: int, **more: object) -> dict[str, Any]:
    return {"table": "hashed", "pool_size": pool_size, "block_size": block_size, **more}


def targets() -> list[Target]:
    """What the kernels are to reach on two cores, at the original's sizes."""
    peers = tuple({"table": table} for table in _FULL_PEERS)
    fused = {"table": _FUSED}
    compiled = [{"table": "hashed-compiled", "pool_size": size} for size in (SMALL, LARGE)]
    found = []
    for o in OPTIMIZERS:
        small, blocks = _hashed(SMALL, 1), _hashed(SMALL, BLOCK)
        found += [
            Target(f"pool {SMALL:,}, block {BLOCK} / best peer", 0.20, o, blocks, peers),
            Target(f"pool {SMALL:,}, block {BLOCK} / full table, same kernels", 0.75, o, blocks, (fused,)),
            Target(f"pool {SMALL:,}, block 1 / best peer", 0.60, o, small, peers),
            Target(f"pool {SMALL:,}, block 1 / torch.compile", 0.25, o, small, (compiled[0],)),
            Target(f"pool {LARGE:,}, block {BLOCK} / best peer", 0.60, o, _hashed(LARGE, BLOCK), peers),
            Target("full table, same kernels / best peer", 0.35, o, fused, peers),
            Target("10^9 rows / 10^6 rows", 1.3, o, {**blocks, "num_embeddings": HUGE_TABLE}, (blocks,), "0"),
        ]
    large = Target(
        f"pool {LARGE:,}, block 1 / torch.compile", 0.40, "sgd", _hashed(LARGE, 1), (compiled[1],), "1"
    )
    return [*found, large]


def of_one_rule(target: Target) -> Target:
    """The target among those alone that compute the same: without Adagrad that has one state for a row."""

    def own(wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "table": "full-fused"} if wanted["table"] == _FUSED else wanted

    peers = [own(wanted) for wanted in target.theirs if wanted["table"] != "full-fbgemm-rowwise"]
    return replace(target, ours=own(target.ours), theirs=tuple(peers))


def by_autograd(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records but those of steps in one pass, see `cemb.study.speed.SpeedCase`."""
    return [record for record in found if not record.get("one_pass")]


def check_targets(found: list[dict[str, Any]], say: Callable[[str], None] = print) -> bool:
    """Say of each target whether it is reached; returns whether all measured ones are.

    Where the machine's bandwidths were measured, too, it says what the ratio would be at our `floor_ms`, and
    where ours is a step in one pass, what it is without such steps.
    """
    bandwidths = next((record for record in found if record.get("kind") == "rates"), None)
    reached = []
    for target in targets():
        result = target.evaluate(found)
        name = f"{target.optimizer:8s} {target.name}"
        if result is None:
            say(f"not measured  {name}")
            continue
        ratio, ours, best = result
        floor = floor_ms(ours, bandwidths) if bandwidths else None
        details = "" if floor is None else f", {floor / best['total_ms']:.3f} at the floor"
        stepwise = target.evaluate(by_autograd(found)) if ours.get("one_pass") else None
        details += "" if stepwise is None else f", {stepwise[0]:.3f} by autograd"
        reached.append(ratio <= target.limit)
        say(
            f"{'pass' if reached[-1] else 'FAIL'}  {name}: {ratio:.3f} (at most {target.limit}{details}), "
            f"{ours['total_ms']:.2f} ms / {best['total_ms']:.2f} ms ({best['label']}, "
            f"THP {best['thp_mem_alloc_enable']})"
        )
    for record in found:
        if (
            record.get("table") == "hashed"
            and record["pool_size"] == SMALL
            and record["peak_mib"] is not None
        ):
            reached.append(record["peak_mib"] <= PEAK_LIMIT_MIB)
            if not reached[-1]:
                say(f"FAIL  {record['optimizer']:8s} {record['label']}: {record['peak_mib']} MiB a step")
    say(f"{sum(reached)} of {len(reached)} reached")
    return bool(reached) and all(reached)


GPU_LIMIT = 0.5  # of the best full table's step, each by the GPU's own time


def gpu_ratio(
    found: list[dict[str, Any]], optimizer: str, field: str
) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """The small pool's step in blocks over the best full table's by a field of time, and both records."""
    uniform = [r for r in found if r.get("ids") == "uniform" and r["optimizer"] == optimizer]
    (ours,) = _select(uniform, _hashed(SMALL, GPU_BLOCK))
    full = [r for r in _select(uniform, {}) if r["table"].startswith("full") and r[field] is not None]
    best = min(full, key=lambda r: r[field])
    return ours[field] / best[field], ours, best
