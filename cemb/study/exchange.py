"""Bytes that a machine hands over in a training step on several, and how long a network takes for them.

Does without torch. What is counted is what `cemb.train.distributed.gradient_bytes` measures.
"""

import math

from cemb.checks import check_integers, check_reals

_VALUE_BYTES, _ROW_NUMBER_BYTES = 4, 8


def dense_bytes(num_values: int) -> int:
    """Bytes of a dense float32 gradient: of a pool, or of all of a full table."""
    return _VALUE_BYTES * num_values


def sparse_bytes(num_rows: float, embedding_dim: int) -> float:
    """Bytes of a sparse gradient of so many distinct rows: their numbers and their float32 values."""
    return num_rows * (_ROW_NUMBER_BYTES + _VALUE_BYTES * embedding_dim)


def expected_rows(num_rows: int, num_drawn: int) -> float:
    """Expected distinct rows among `num_drawn` uniform draws, two of which are a pair's."""
    check_integers(1, num_rows=num_rows)
    check_integers(0, num_drawn=num_drawn)
    return (
        -num_rows * math.expm1(num_drawn * math.log1p(-1 / num_rows)) if num_rows > 1 else min(1, num_drawn)
    )


def exchange_s(num_bytes: float, num_machines: int, gb_per_s: float, *, is_sparse: bool) -> float:
    """Seconds in which n machines, of `num_bytes` each, sum a gradient, by the bandwidth of each one's link.

    A dense one goes around a ring, ``2 (n − 1) / n`` times; sparse rows go to every other machine, ``n − 1``
    times, since their union grows. Latency, the sums themselves, and what may overlap with computing are
    left out. Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009, have the ring.
    """
    check_integers(1, num_machines=num_machines)
    check_reals("(0, inf)", gb_per_s=gb_per_s)
    times = num_machines - 1 if is_sparse else 2 * (num_machines - 1) / num_machines
    return times * num_bytes / (gb_per_s * 1e9)
