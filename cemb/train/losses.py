"""Losses of pair scores on mini-batches."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def mse_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of scores ``[n]`` and targets ``[n]``."""
    return F.mse_loss(scores, targets)


def glove_weight(targets: Tensor, value_max: float = 100.0, exponent: float = 0.75) -> Tensor:
    """GloVe's weight ``min(1, (target / value_max)^exponent)`` of targets ``[n]``; 0 for those ≤ 0.

    Pennington, Socher and Manning, "GloVe: Global vectors for word representation", EMNLP 2014, eq. 9.
    """
    return (targets.clamp(min=0) / value_max).pow(exponent).clamp(max=1)


def weighted_mse_loss(scores: Tensor, targets: Tensor, value_max: float = 100.0) -> Tensor:
    """Squared error of the target itself, weighted as GloVe does: mean of ``w(x) (score − x)²``."""
    return (glove_weight(targets, value_max) * (scores - targets).square()).mean()


def glove_loss(scores: Tensor, targets: Tensor, value_max: float = 100.0) -> Tensor:
    """GloVe's loss: mean of ``w(x) (score − log x)²``; cells with x ≤ 0 have weight 0."""
    logs = torch.where(targets > 0, targets, torch.ones_like(targets)).log()
    return (glove_weight(targets, value_max) * (scores - logs).square()).mean()


def all_cells_loss(scores: Tensor, targets: Tensor, sample_weights: Tensor) -> Tensor:
    """``Σ w (score − x)²``: with the sample weights of `PairBatches`, an estimate of all cells' error."""
    return (sample_weights * (scores - targets).square()).sum()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "all-cells": all_cells_loss,
    "mse": mse_loss,
    "weighted-mse": weighted_mse_loss,
    "glove": glove_loss,
}
