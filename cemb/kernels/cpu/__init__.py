"""The CPU's kernels, in Numba: cached on disk, launched on as many threads as torch uses.

Kernels and what they inline take arrays and numbers only; the functions below them without an underscore,
which take a `cemb.hashing.Spec`, are for the library.
"""

from cemb.kernels.cpu import (
    buckets,
    conflicts,
    dropout,
    lookup,
    pairs,
    rules,
    sparse_product,
    threads,
    updates,
)

__all__ = [
    "buckets",
    "conflicts",
    "dropout",
    "lookup",
    "pairs",
    "release_memory",
    "rules",
    "sparse_product",
    "threads",
    "updates",
]


def release_memory() -> None:
    """Free the workspaces that are kept from call to call."""
    threads.release_memory()
    dropout.release_memory()
