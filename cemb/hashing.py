"""The hash specification, version 1: which pool value stands for entry (row, column) of a table.

All arithmetic is on unsigned 64-bit integers and wraps. `mix` is the finalizer of splitmix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). With
``blocks = ceil(embedding_dim / block_size)`` and ``block = column // block_size``::

    h     = mix((row + table_offset) * blocks + block + mix(hash_seed + 0x9E3779B97F4A7C15))
    start = ((h >> 32) * (pool_size - block_size + 1)) >> 32
    sign  = 1 - 2 * (h & 1)            # 1 throughout unless signed
    value = sign * pool[start + column % block_size]

``block_size=1`` is HashedNets (Chen et al., ICML 2015), larger blocks are ROBE-Z (Desai, Chou and
Shrivastava, MLSys 2022). The multiply-shift replaces a 64-bit remainder (Lemire, "Fast random integer
generation in an interval", 2019). This file states the specification in plain Python integers; every
other implementation is tested against it, bit for bit.
"""

from dataclasses import dataclass

from cemb.checks import check_integers, check_reals

HASH_VERSION = 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
MASK = 2**64 - 1


def mix(x: int) -> int:
    """The splitmix64 finalizer: a bijection of the integers below 2^64."""
    x &= MASK
    x = ((x ^ (x >> 30)) * MULTIPLIER_1) & MASK
    x = ((x ^ (x >> 27)) * MULTIPLIER_2) & MASK
    return x ^ (x >> 31)


@dataclass(frozen=True)
class HashSpec:
    """How a ``[num_embeddings, embedding_dim]`` table hashes into a pool of `pool_size` scalars.

    `table_offset` shifts the row numbers, so that tables sharing a pool do not share their pattern of
    collisions. Raises ValueError, naming the value and its bound, where no such table can exist.
    """

    num_embeddings: int
    embedding_dim: int
    pool_size: int
    block_size: int = 1
    hash_seed: int = 0
    signed: bool = False
    table_offset: int = 0

    def __post_init__(self) -> None:
        sizes = ("num_embeddings", "embedding_dim", "pool_size", "block_size")
        check_integers(1, **{name: getattr(self, name) for name in sizes})
        check_integers(0, table_offset=self.table_offset)
        check_integers(0, 2**63 - 1, hash_seed=self.hash_seed)
        if self.signed not in (True, False):
            raise ValueError(f"signed must be True or False, got {self.signed!r}")
        if self.block_size > self.embedding_dim:
            raise ValueError(
                f"block_size must be at most embedding_dim={self.embedding_dim}, got {self.block_size}: "
                "a block is a segment of one row's columns"
            )
        if self.pool_size < self.block_size:
            raise ValueError(
                f"pool_size must be at least block_size={self.block_size}, got {self.pool_size}: "
                "a block is read from consecutive pool values"
            )
        if self.pool_size >= 2**32:
            raise ValueError(
                f"pool_size must be below 2^32, got {self.pool_size}: "
                "hash version 1 scales 32 bits of the hash to the pool"
            )
        if (self.num_embeddings + self.table_offset) * self.num_blocks >= 2**63:
            raise ValueError(
                f"(num_embeddings + table_offset) * blocks must be below 2^63, got "
                f"({self.num_embeddings} + {self.table_offset}) * {self.num_blocks}"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks per row; the last is read short where block_size does not divide embedding_dim."""
        return -(-self.embedding_dim // self.block_size)

    @property
    def is_single(self) -> bool:
        """Whether each value is located by itself, as in the original scheme."""
        return self.block_size == 1

    @property
    def num_starts(self) -> int:
        """Pool positions at which a block may start."""
        return self.pool_size - self.block_size + 1

    @property
    def salt(self) -> int:
        """The seed's contribution to every key, in [0, 2^64)."""
        return mix(self.hash_seed + GOLDEN)

    def locate(self, row: int, column: int) -> tuple[int, int]:
        """``(pool index, sign)`` of the table's entry (row, column)."""
        if not (0 <= row < self.num_embeddings and 0 <= column < self.embedding_dim):
            raise IndexError(
                f"entry ({row}, {column}) lies outside the table of "
                f"{self.num_embeddings} rows and {self.embedding_dim} columns"
            )
        block, within = divmod(column, self.block_size)
        h = mix((row + self.table_offset) * self.num_blocks + block + self.salt)
        start = ((h >> 32) * self.num_starts) >> 32
        sign = 1 - 2 * (h & 1) if self.signed else 1
        return start + within, sign


@dataclass(frozen=True)
class FullSpec:
    """A table that is not compressed, as kernels see it: row i is the i-th segment of `embedding_dim` values.

    It has the fields of a `HashSpec` with one block a row and no hash. ValueError for impossible sizes.
    """

    num_embeddings: int
    embedding_dim: int

    table_offset = hash_seed = salt = num_starts = 0
    signed = is_single = False
    num_blocks = 1

    def __post_init__(self) -> None:
        check_integers(1, embedding_dim=self.embedding_dim)
        check_integers(0, 2**32, num_embeddings=self.num_embeddings)  # kernels number rows in 32 bits

    @property
    def block_size(self) -> int:
        return self.embedding_dim

    @property
    def pool_size(self) -> int:
        """Values of the whole table."""
        return self.num_embeddings * self.embedding_dim

    def locate(self, row: int, column: int) -> tuple[int, int]:
        """``(index, 1)`` of the table's entry (row, column), as `HashSpec.locate`."""
        return row * self.embedding_dim + column, 1


Spec = HashSpec | FullSpec  # what the kernels take


@dataclass(frozen=True)
class PairDropout:
    """Dropout on both vectors of a pair, as it acts on their dot product; masks are hashed, not stored.

    Component j of a dot product survives if it does in both vectors, which has probability (1 − p)², and is
    then scaled by 1/(1 − p)². So one mask a pair stands for two, exactly in distribution up to the rounding
    of that probability to 16 bits. One hash serves four components: with q = ceil(d/4), component j of pair i
    is kept if 16-bit part j mod 4, least significant first, of ``mix(i·q + j div 4 + mix(seed + GOLDEN))``
    reaches `threshold`. Raises ValueError for a share outside [0, 1).
    """

    p: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_reals("[0, 1)", dropout=self.p)

    @property
    def threshold(self) -> int:
        """Share of components dropped from the dot product, in units of 2^-16."""
        return min(round((1 - (1 - self.p) ** 2) * 2**16), 2**16 - 1)

    @property
    def scale(self) -> float:
        """Factor of the components that are kept."""
        return 1 / (1 - self.p) ** 2

    @property
    def salt(self) -> int:
        """The seed's contribution to every key, in [0, 2^64)."""
        return mix(self.seed + GOLDEN)
