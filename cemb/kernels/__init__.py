"""Compiled kernels: Numba's for CPUs, Triton's for GPUs."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def discard_outdated(sources: Iterable[Path], folders: Iterable[Path]) -> None:
    """Remove what Numba compiled in `folders` before the newest of `sources` was written.

    Numba itself looks only at the file a kernel is in, and kernels inline functions of other files.
    """
    changed = max((path.stat().st_mtime for path in sources), default=0)
    for folder in folders:
        for index in folder.glob("__pycache__/*.nbi"):
            with suppress(OSError):  # another process was first, or the folder is not ours
                if index.stat().st_mtime < changed:
                    index.unlink()


_PACKAGE = Path(__file__).parent.parent
# These folders have kernels, which inline functions of `hashing` and of the first two.
FOLDERS = [_PACKAGE / name for name in ("kernels/cpu", "pmi", "train", "study")]
SOURCES = [_PACKAGE / "hashing.py", *(path for folder in FOLDERS[:2] for path in folder.glob("*.py"))]
discard_outdated(SOURCES, FOLDERS)
