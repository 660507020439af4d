"""The CPU's kernels, in Numba: cached on disk, launched on as many threads as torch uses.

Kernels and what they inline take arrays, numbers and structs of them; the functions that take a
`cemb.hashing.Spec` are for the library.
"""

from cemb.kernels.cpu import locate, lookup, pairs, rules, sparse_product, threads, updates, vectors
from cemb.kernels.cpu.threads import release_memory

__all__ = [
    "locate",
    "lookup",
    "pairs",
    "release_memory",
    "rules",
    "sparse_product",
    "threads",
    "updates",
    "vectors",
]
