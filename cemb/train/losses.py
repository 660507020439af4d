"""Losses of pair scores on mini-batches: squared errors, that differ in their targets and sample weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from cemb.optim import SquaredError


def mse_loss(targets: Tensor) -> SquaredError:
    """Mean squared error of targets ``[n]``."""
    return SquaredError(targets)


def glove_weight(targets: Tensor, value_max: float = 100.0, exponent: float = 0.75) -> Tensor:
    """GloVe's weight ``min(1, (target / value_max)^exponent)`` of targets ``[n]``; 0 for those ≤ 0.

    Pennington, Socher and Manning, "GloVe: Global vectors for word representation", EMNLP 2014, eq. 9.
    """
    return (targets.clamp(min=0) / value_max).pow(exponent).clamp(max=1)


def weighted_mse_loss(targets: Tensor, value_max: float = 100.0) -> SquaredError:
    """Squared error of the target itself, weighted as GloVe does: mean of ``w(x) (score − x)²``."""
    return SquaredError(targets, glove_weight(targets, value_max) / len(targets))


def glove_loss(targets: Tensor, value_max: float = 100.0) -> SquaredError:
    """GloVe's loss: mean of ``w(x) (score − log x)²``; cells with x ≤ 0 have weight 0."""
    logs = torch.where(targets > 0, targets, torch.ones_like(targets)).log()
    return SquaredError(logs, glove_weight(targets, value_max) / len(targets))


def all_cells_loss(targets: Tensor, sample_weights: Tensor) -> SquaredError:
    """``Σ w (score − x)²``: with the sample weights of `PairBatches`, an estimate of all cells' error."""
    return SquaredError(targets, sample_weights)


LOSSES: dict[str, Callable[..., SquaredError]] = {
    "all-cells": all_cells_loss,
    "mse": mse_loss,
    "weighted-mse": weighted_mse_loss,
    "glove": glove_loss,
}
