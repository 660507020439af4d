"""Records: one flat JSON object per measurement, with where it comes from."""

import ast
import fcntl
import functools
import gc
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Names and plain values, and lists of them for repeats.
Record = dict[str, Any]

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
# A step whose threads waited for a processor for more than this share of it measures its neighbours, too.
CONTENDED_SHARE = 0.05
KEY_PACKAGES = ("torch", "numpy", "scipy", "numba", "gensim")


def results_dir() -> Path:
    """Where results go: $CEMB_RESULTS, else results/ of the repository, else of the working directory."""
    if "CEMB_RESULTS" in os.environ:
        return Path(os.environ["CEMB_RESULTS"])
    return (ROOT if (ROOT / "pyproject.toml").exists() else Path.cwd()) / "results"


_parsing = threading.Lock()


def _parse(source: str) -> ast.Module:
    """`ast.parse`, which in CPython 3.11 fails if a collection starts other Python code meanwhile."""
    with _parsing:
        collecting = gc.isenabled()
        gc.disable()
        try:
            return ast.parse(source)
        finally:
            if collecting:
                gc.enable()


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements, those inside others too. They are a tenth of the nodes that `ast.walk` visits."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, part, []))
        for part in ("handlers", "cases"):
            for inner in getattr(node, part, []):
                yield from _statements(inner.body)


# Parsing is most of the time that it takes to see which of a study's runs are current.
@functools.lru_cache(maxsize=256)
def imported_modules(source: str) -> frozenset[str]:
    """Names of the modules of cemb that Python source imports directly, as ``cemb.x``.

    ``from cemb import x`` counts as importing ``cemb.x`` alone where that is a module.
    """
    names: set[str] = set()
    for node in _statements(_parse(source).body):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if is_ours(submodule) else node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return frozenset(name for name in names if is_ours(name))


def _candidates(name: str) -> tuple[Path, Path]:
    base = PACKAGE.joinpath(*name.split(".")[1:])
    return base / "__init__.py", base.with_suffix(".py")


def is_ours(name: str) -> bool:
    """Whether `name` is a module of cemb."""
    return name.split(".")[0] == "cemb" and any(path.exists() for path in _candidates(name))


def module_path(name: str) -> Path:
    """The file of a module of cemb. LookupError if it is none."""
    for path in _candidates(name):
        if path.exists():
            return path
    raise LookupError(f"cemb has no module {name!r}")


def reached_modules(source: str) -> set[str]:
    """Names of all modules of cemb that Python source reaches by imports."""
    reached: set[str] = set()
    todo = set(imported_modules(source))
    while todo:
        name = todo.pop()
        reached.add(name)
        todo |= imported_modules(module_path(name).read_text(encoding="utf-8")) - reached
    return reached


def code_hash(source: str) -> str:
    """SHA-256 of Python source and of every file of cemb it reaches by imports; 16 hex digits.

    Whole files count, comments too: simple, and never wrong in the direction that matters.
    """
    files = ((path, path.stat()) for path in sorted(PACKAGE.rglob("*.py")))
    return _code_hash(source, tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in files))


# A study's runs are of few notebooks, so most of their hashes are the same. `files` is for the cache alone.
@functools.lru_cache(maxsize=64)
def _code_hash(source: str, files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256(source.encode())
    for name in sorted(reached_modules(source)):
        digest.update(name.encode() + module_path(name).read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _transparent_huge_pages() -> str | None:
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return setting.partition("[")[2].partition("]")[0]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@functools.cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> Record:
    """What may change a result besides code and parameters: machine and versions."""
    return {
        "python_version": platform.python_version(),
        "machine": platform.machine(),
        **{f"{package}_version": _version(package) for package in KEY_PACKAGES},
        "cpu_model": cpu_model(),
        "cpu_count": os.cpu_count(),
        "transparent_huge_pages": _transparent_huge_pages(),
        "thp_mem_alloc_enable": os.environ.get("THP_MEM_ALLOC_ENABLE"),
    }


def provenance(device: str = "cpu") -> Record:
    """Fields that say where and from what a record comes."""
    import torch

    is_cuda = str(device).startswith("cuda")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        **environment(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if is_cuda else cpu_model(),
        "threads": torch.get_num_threads(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "utc_time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A new directory to fill, which takes the name `path` only if the block succeeds.

    A `path` that exists by then, put there by a concurrent run of the same content, is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield work
        work.chmod(0o755)
        try:
            work.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def exclusive(folder: Path, *, wait: bool) -> Iterator[None]:
    """Make a folder if need be, and keep all others out of it that ask so; the system lets go if we die.

    Raises RuntimeError if another has it and we shall not `wait`.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise RuntimeError(f"another process is at work in {str(folder)!r}") from None
            # Whoever had it may have removed it meanwhile.
            if folder.is_dir() and os.path.samestat(os.fstat(handle), folder.stat()):
                yield
                return
        finally:
            os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def to_json(record: Record) -> str:
    """A record as one line of JSON; NaN, which JSON does not have, as null."""
    plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def write(records: Iterable[Record], path: Path) -> None:
    """Write records as JSON lines, atomically."""
    write_atomic(Path(path), "".join(to_json(record) + "\n" for record in records))


def read(path: Path) -> list[Record]:
    """Read records written by `write`. ValueError names the line that is not a JSON object."""
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not a record: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: a record is a JSON object, got {line[:40]}")
        found.append(record)
    return found
