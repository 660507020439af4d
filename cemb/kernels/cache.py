"""Compiled kernels on disk, each kept for the contents of the sources that it is compiled from.

Numba itself looks at the file that a kernel is in, and kernels contain functions of other files.
"""

import functools
import hashlib
import inspect
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

_PACKAGE = Path(__file__).parent.parent


def sources_of(folder: Path) -> list[Path]:
    """Files that a kernel in `folder` may contain functions or constants of: the CPU's kernels and the hash.

    And its own folder's.
    """
    folders = dict.fromkeys((_PACKAGE / "kernels" / "cpu", folder))
    return [_PACKAGE / "hashing.py", *(path for own in folders for path in sorted(own.glob("*.py")))]


@functools.cache
def _stamp(folder: Path) -> bytes:
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sources_of(folder):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """Numba's files, each after a digest of it and of the sources: one of another digest is as if not there.

    So what is damaged, or of other sources, is compiled anew and overwritten.
    """

    def _load_index(self) -> Any:
        return self._read(self._index_path) or {}

    def _save_index(self, overloads: Any) -> None:
        self._write(self._index_path, overloads)

    def _load_data(self, name: str) -> Any:
        return self._read(self._data_path(name))

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data)

    def _read(self, path: str) -> Any:
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        digest, data = content[:32], content[32:]
        return pickle.loads(data) if digest == self._digest(data) else None

    def _write(self, path: str, value: Any) -> None:
        data = self._dump(value)
        with self._open_for_write(path) as file:
            file.write(self._digest(data) + data)

    def _digest(self, data: bytes) -> bytes:
        return hashlib.sha256(self._source_stamp + data).digest()


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of a function, in `_Files`."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        stamp = _stamp(Path(inspect.getfile(function)).parent)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)


def cached(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit`, cached on disk, or with a warning in memory if no folder can be written."""

    def compiled(function: Callable[..., Any]) -> Any:
        kernel = numba.njit(**options)(function)
        try:
            kernel._cache = _Cache(function)
        except RuntimeError:  # Numba's, if it finds no folder
            _warn_of_no_cache()
        return kernel

    return compiled


@functools.cache
def _warn_of_no_cache() -> None:
    warnings.warn(
        "no folder for compiled kernels can be written, so each process compiles them anew: set "
        "NUMBA_CACHE_DIR to one",
        RuntimeWarning,
        stacklevel=5,
    )
