"""What tables cost to store, and whether that is allowed."""

import itertools

from torch import nn

from cemb.checks import check_integers


def num_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module; those that share their memory count once."""
    tensors = {t.data_ptr() or id(t): t for t in itertools.chain(module.parameters(), module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_budget(max_bytes: int, least: int) -> None:
    """Raise ValueError if `max_bytes` is below `least`, the bytes of the smallest table of its kind."""
    check_integers(0, max_bytes=max_bytes)
    if max_bytes < least:
        raise ValueError(f"max_bytes must be at least {least}, the least for such a table, got {max_bytes}")
