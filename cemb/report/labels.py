"""What pages call tables and methods; records hold their keys."""

from cemb.study.records import Record

# Of a timed step. What else a record's label says follows.
TIMED = {
    "full": "full table, PyTorch",
    "full-fused": "full table, same kernels",
    "full-fused-rowwise": "full table, same kernels, row-wise",
    "full-fbgemm": "full table, fbgemm",
    "full-fbgemm-rowwise": "full table, fbgemm, row-wise",
    "hashed-reference": "hashed, eager PyTorch",
    "hashed-compiled": "hashed, torch.compile",
}
# Of what was trained, or made of it; ", then int8" may follow.
_TRAINED = {
    "full": "full table",
    "full-fused": "full table",
    "lower rank": "rank-r SVD",
    "low-rank": "trained low-rank",
}


def timed(record: Record) -> str:
    """The name of a speed record's table, with its gradients, or its pool and block size."""
    table: str = record["table"]
    rest: str = record["label"].removeprefix(table)
    return TIMED.get(table, table) + rest


def trained(key: str) -> str:
    """The name of a method of the frontier or of a quality record's table."""
    base, comma, rest = key.partition(", ")
    return _TRAINED.get(base, base) + comma + rest
