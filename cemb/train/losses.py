"""Losses of pair scores on mini-batches."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def mse_loss(scores: Tensor, values: Tensor) -> Tensor:
    """Mean squared error between scores and matrix values, both ``[batch]``."""
    return F.mse_loss(scores, values)


def glove_weight(values: Tensor, value_max: float = 100.0, exponent: float = 0.75) -> Tensor:
    """GloVe's weight ``min(1, (value / value_max)^exponent)``; 0 for values ≤ 0.

    Pennington, Socher and Manning, "GloVe: Global vectors for word representation", EMNLP 2014, eq. 9.
    """
    return (values.clamp(min=0) / value_max).pow(exponent).clamp(max=1)


def weighted_mse_loss(scores: Tensor, values: Tensor, value_max: float = 100.0) -> Tensor:
    """Squared error of the value itself, weighted as GloVe does: mean of ``w(x) (score − x)²``."""
    return (glove_weight(values, value_max) * (scores - values).square()).mean()


def glove_loss(scores: Tensor, values: Tensor, value_max: float = 100.0) -> Tensor:
    """GloVe's loss: mean of ``w(x) (score − log x)²``; cells with x ≤ 0 weigh nothing."""
    logs = torch.where(values > 0, values, torch.ones_like(values)).log()
    return (glove_weight(values, value_max) * (scores - logs).square()).mean()


def all_cells_loss(scores: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """``Σ w (score − x)²``: with the weights of `PairBatches`, an estimate of all cells' error."""
    return (weights * (scores - values).square()).sum()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "all-cells": all_cells_loss,
    "mse": mse_loss,
    "weighted-mse": weighted_mse_loss,
    "glove": glove_loss,
}
