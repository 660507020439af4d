"""Compiled kernels: Numba's for CPUs, Triton's for GPUs."""

from contextlib import suppress
from pathlib import Path


def discard_outdated(folder: Path) -> None:
    """Remove what Numba has compiled from earlier sources in `folder`.

    Numba itself looks only at the file a kernel stands in, and kernels inline functions of other files.
    """
    changed = max((path.stat().st_mtime for path in folder.glob("*.py")), default=0)
    for index in folder.glob("__pycache__/*.nbi"):
        with suppress(OSError):  # another process was first, or the folder is not ours
            if index.stat().st_mtime < changed:
                index.unlink()


discard_outdated(Path(__file__).parent)
