"""How few bits a factorization could do with: rate–distortion limits, in gap to the optimum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cemb.checks import check_reals

if TYPE_CHECKING:  # evaluate imports torch, which takes seconds
    from cemb.train.objective import Optimum


def water_filling(variances: npt.NDArray[Any], bits: float) -> float:
    """Least squared error, summed over independent Gaussians, of a code of `bits` bits a value on average.

    Reverse water-filling (Cover and Thomas, "Elements of information theory", 2nd ed., theorem 10.3.3):
    ``Σ min(θ, σ²)`` where θ is such that the mean of ``max(0, ½ log₂(σ²/θ))`` is `bits`.
    `variances` may be of any shape.
    """
    check_reals("[0, inf)", bits=bits)
    falling = np.sort(variances[variances > 0].astype(np.float64).ravel())[::-1]
    logs = np.log2(falling)
    counts = np.arange(1, len(falling) + 1)
    # With the n largest coded, log₂ θ is the mean of their logarithms less twice the bits each gets.
    levels = (np.cumsum(logs) - 2 * bits * variances.size) / counts
    coded = np.count_nonzero(levels < logs)
    if coded == 0:
        return float(falling.sum())
    level = 2.0 ** levels[coded - 1]
    return float(coded * level + falling[coded:].sum())


def gap_limit(optimum: Optimum, bits: float, *, by_row: bool) -> float:
    """Gap that no code of `bits` bits a value for both factors of `optimum` could go below, if they were so.

    In principal axes an error δU costs ``Σ_k s_k ‖δU_k‖²``, U's error weighed by C's Gram matrix, and C's
    likewise; the product of both errors is left out. Assumes independent Gaussian values: of one variance
    in each component, or with `by_row` of a variance that also follows the row's own energy, known to the
    decoder for nothing. Real factors are neither Gaussian nor independent, so a table may go below the
    first, which knows less of them than the table does.
    """
    s = optimum.singular_values.astype(np.float64)
    energies = []
    for side in optimum.factors():
        weighted = np.square(side, dtype=np.float64) * s
        rows = weighted.sum(axis=1) if by_row else np.full(len(side), weighted.sum() / len(side))
        energies.append(np.outer(rows / rows.sum(), np.square(s)))
    return float(water_filling(np.concatenate(energies), bits) / np.square(s).sum())


def hashed_gap(compression_ratio: float) -> float:
    """Expected gap of one factor read from a pool beside the other exact, if its values were alike.

    For independent values of one variance and one weight, c to a pool value on average: a pool value is at
    best the mean of those that read it, and k of them keep a k-th of their energy. Poisson's distribution
    of k leaves ``1 − (1 − e^−c) / c``.
    """
    check_reals("(0, inf)", compression_ratio=compression_ratio)
    return 1 + math.expm1(-compression_ratio) / compression_ratio
