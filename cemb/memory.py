"""Memory of large tensors."""

import ctypes
import mmap

from torch import Tensor

_HUGE_PAGES_FROM = 2**24  # bytes


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """Ask Linux for huge pages under a large CPU tensor that has not been written yet; returns it.

    Random rows of a large table otherwise miss the address cache too. Elsewhere it does nothing.
    """
    size = tensor.numel() * tensor.element_size()
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and tensor.device.type == "cpu" and size >= _HUGE_PAGES_FROM:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice only: if the system refuses it, everything works as before.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
    return tensor
