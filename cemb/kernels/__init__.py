"""Compiled kernels: Numba's for CPUs, Triton's for GPUs."""

from pathlib import Path


def discard_outdated(folder: Path) -> None:
    """Remove what Numba has compiled from earlier sources in `folder`.

    Numba itself looks only at the file a kernel stands in, and kernels inline functions of other files.
    """
    changed = max(path.stat().st_mtime for path in folder.glob("*.py"))
    for index in folder.glob("__pycache__/*.nbi"):
        if index.stat().st_mtime < changed:
            index.unlink(missing_ok=True)


discard_outdated(Path(__file__).parent)
