"""The sizes and optimizers that the studies, targets and pages share."""

from typing import Literal, TypeAlias

POOL_SIZES = SMALL, LARGE = 262_144, 100_000_000  # values in a pool, as in the 2021 project
ROWS = 1_000_000
HUGE_TABLE = 10**9  # rows
BLOCK = 25
OPTIMIZERS = ("sgd", "adagrad", "adam")
Optimizer: TypeAlias = Literal[*OPTIMIZERS]  # type: ignore[valid-type]
COPIES = {"sgd": 1, "adagrad": 2, "adam": 3}  # values in training for each of a table's, itself included
GPU_BLOCK = 32
