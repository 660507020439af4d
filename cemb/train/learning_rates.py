"""Learning rates: those that training starts with, and how they are searched. Does without torch."""

import math
from collections.abc import Callable

from cemb.checks import check_integers, check_reals

# Found by `python -m cemb rates` on the default corpus; where training diverges, `halve_until_stable` of
# `cemb.train.loops` lowers them. The 2021 project's rates (0.01, 0.05, 0.001) are the speed study's.
FULL_BATCH_LEARNING_RATES = {"sgd": 20.0, "adagrad": 0.07, "adam": 0.2, "lbfgs": 1.0}
MINI_BATCH_LEARNING_RATES = {"sgd": 0.3, "adagrad": 0.05, "adam": 0.01}
# Adam's on full batches for tables whose values do not stand for one entry each.
TABLE_LEARNING_RATES = {
    "hashed": 0.1,
    "hybrid": 0.1,
    "mixed-dimension": 0.02,
    "quotient-remainder": 0.1,
    "multi-hash": 0.05,
    "low-rank": 0.02,
    "clustered": 0.02,
}


def default_learning_rate(table: str, optimizer: str, training: str) -> float:
    """The rate a quality run starts with if it is given none."""
    if training == "mini-batch":
        return MINI_BATCH_LEARNING_RATES[optimizer]
    if optimizer == "adam":
        return TABLE_LEARNING_RATES.get(table, FULL_BATCH_LEARNING_RATES["adam"])
    return FULL_BATCH_LEARNING_RATES[optimizer]


def search_learning_rate(
    final_loss: Callable[[float], float], start: float, *, factor: float = 2.0, max_trials: int = 12
) -> dict[float, float]:
    """Rates tried, rising, and what ``final_loss(rate)`` says of each; the best is neither first nor last.

    Goes from `start` in steps of `factor` until losses rise on both sides. Infinite and NaN losses are
    as bad as any. Raises RuntimeError if `max_trials` do not suffice.
    """
    check_reals("(0, inf)", start=start)
    check_reals("(1, inf)", factor=factor)
    check_integers(1, max_trials=max_trials)
    found: dict[float, float] = {}

    def try_rate(rate: float) -> None:
        loss = final_loss(rate)
        found[rate] = loss if math.isfinite(loss) else math.inf

    try_rate(start)
    while True:
        rates = sorted(found)
        best = min(rates, key=found.__getitem__)
        if best not in (rates[0], rates[-1]):
            return {rate: found[rate] for rate in rates}
        if len(found) >= max_trials:
            raise RuntimeError(f"no best learning rate within {rates[0]:g} to {rates[-1]:g}: {found}")
        try_rate(best / factor if best == rates[0] else best * factor)
