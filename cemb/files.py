"""Files and folders written whole or not at all, told when damaged, and folders for one process at a time.

A folder that `atomic_directory` makes holds ``SHA256SUMS`` of its other files, which ``sha256sum -c`` reads
too. A temporary name is locked while its writer lives: so what a killed one left is told from what is at
work, and the next writer beside it removes it.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SUMS = "SHA256SUMS"
_TEMPORARY = ".cemb-tmp"
# Within this time a file may change twice and keep its times, which the system counts in ticks.
_CLOCK_TICK_NS = 50_000_000
_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file is too large",
}


class DamagedError(ValueError):
    """A folder does not hold what was written into it."""


def damaged(folder: Path, what: str, remedy: str) -> DamagedError:
    """The error for a folder: what is wrong in it, and what helps."""
    return DamagedError(f"{str(folder)!r} is damaged: {what}; {remedy}")


def _lock(path: Path, *, wait: bool) -> int | None:
    """A handle that locks a file or folder until it is closed, or its process dies.

    None if whoever held it before has removed it. Raises BlockingIOError if it is held and this shall not
    `wait`.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder."""
    for left in folder.glob(f".*{_TEMPORARY}"):
        with suppress(OSError):  # it is another user's, or at work
            if not left.is_symlink() and (handle := _lock(left, wait=False)) is not None:
                try:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                finally:
                    os.close(handle)


@contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside `path`, locked, and removed at the end if it still has that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    handle = None
    while handle is None:
        work = path.with_name(f".{path.name}-{secrets.token_hex(8)}{_TEMPORARY}")
        make(work)
        try:
            handle = _lock(work, wait=True)
        except FileNotFoundError:  # swept before it was locked
            continue
        except OSError:  # no locks here, so nothing is swept either
            break
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True) if work.is_dir() else work.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


@contextmanager
def atomic_directory(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A new directory to fill, which takes the name `path` only if the block succeeds, with its sums.

    Args:
        durable: flush all to the disk first, so that not even a failing machine leaves a name without
            content. Without it the sums tell what is not whole.

    Raises FileExistsError if `path` exists by then.
    """
    with _temporary(path, Path.mkdir) as work:
        yield work
        _write_sums(work)
        if durable:
            for inside in (*work.rglob("*"), work):
                _flush(inside)
        try:
            work.rename(path)
        except OSError:
            if path.exists():
                raise FileExistsError(f"{str(path)!r} exists already: it was made meanwhile") from None
            raise
        if durable:
            _flush(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the name `path`, whatever file has it, if the block succeeds."""
    with _temporary(path, lambda new: new.touch(exist_ok=False)) as work:
        yield work
        _flush(work)
        work.replace(path)
        _flush(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic_file(path) as work:
        work.write_text(text, encoding="utf-8")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say what could not be written where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"{_FULL[error.errno]} while writing {str(path)!r}; nothing half-written is used: "
            "make room and run it again",
        ) from error


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def exclusive(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on a folder, made if need be.

    Raises RuntimeError if another process holds it and this one shall not `wait`.
    """
    handle = None
    while handle is None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = _lock(folder, wait=wait)
        except BlockingIOError:
            raise RuntimeError(f"another process is at work in {str(folder)!r}") from None
    try:
        yield
    finally:
        os.close(handle)


_hashes: dict[tuple[int | str, ...], str] = {}


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """A file's hash as ``algorithm:hex``, computed once while its inode and times stay what they are."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, algorithm)
        if key in _hashes:
            return _hashes[key]
        digest = f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"
    if time.time_ns() - found.st_ctime_ns > _CLOCK_TICK_NS:
        _hashes[key] = digest
    return digest


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 in hexadecimal of each file below a folder, hidden ones and `SUMS` left out."""
    paths = sorted(path for path in folder.rglob("[!.]*") if path.is_file() and path != folder / SUMS)
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(file_hash, paths)
        return {
            str(path.relative_to(folder)): found.partition(":")[2]
            for path, found in zip(paths, hashes, strict=True)
        }


def _write_sums(folder: Path) -> None:
    lines = "".join(f"{digest}  {name}\n" for name, digest in _sums(folder).items())
    (folder / SUMS).write_text(lines, encoding="utf-8")


def verify(folder: Path, remedy: str) -> None:
    """Raise DamagedError, which says the `remedy`, unless a folder's files are those that were written."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise damaged(folder, f"it has no {SUMS}, which is written last", remedy) from None
    except UnicodeDecodeError as error:
        raise damaged(folder, f"{SUMS} is no text: {error}", remedy) from None
    written = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    there = _sums(folder)
    for name in sorted({*written, *there}):
        if name not in there:
            raise damaged(folder, f"{name} is missing", remedy)
        if name not in written:
            raise damaged(folder, f"{name} is not among the files of its {SUMS}", remedy)
        if there[name] != written[name]:
            raise damaged(folder, f"the SHA-256 of {name} is not that of its {SUMS}", remedy)


def read_manifest(folder: Path, version: int, fields: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """``manifest.json`` of a folder whose files are whole; `fields` are what it must have, and their types.

    Raises:
        FileNotFoundError: it has none, as a folder whose writing was stopped.
        DamagedError: a file is not what was written, or a field is missing or of another type.
        ValueError: it is of another version.
    """
    try:
        manifest = read_json(folder / "manifest.json")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{str(folder)!r} has no manifest.json, which is written last; {remedy}"
        ) from None
    except ValueError as error:
        raise damaged(folder, str(error), remedy) from None
    if not isinstance(manifest, dict):
        raise damaged(folder, "manifest.json is no JSON object", remedy)
    if (seen := manifest.get("version")) != version:
        raise ValueError(f"{str(folder)!r} has version {seen!r}, and this reads version {version}; {remedy}")
    verify(folder, remedy)
    for name, kind in fields.items():
        if not isinstance(value := manifest.get(name, ...), kind) or isinstance(value, bool):
            seen = "is missing" if value is ... else f"is {str(value)[:40]!r}"
            raise damaged(folder, f"{name} of manifest.json {seen}, which should be {kind}", remedy)
    return manifest


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError names one that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
