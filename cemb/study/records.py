"""Records: one flat JSON object per measurement, with where it comes from."""

import functools
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cemb.files import write_atomic

# Names and plain values, and lists of them for repeats.
Record = dict[str, Any]
PACKAGE = Path(__file__).parent.parent
ROOT = PACKAGE.parent
# A step whose threads waited for a processor for more than this share of it measures its neighbours, too.
CONTENDED_SHARE = 0.05
# Fields of `environment` that are of a machine, not of what is installed on it.
OF_MACHINE = ("cpu_model", "cpu_count", "transparent_huge_pages", "thp_mem_alloc_enable")
KEY_PACKAGES = ("torch", "numpy", "scipy", "numba", "gensim")


def is_checkout() -> bool:
    """Whether this package lies in its repository, and is not the copy that a wheel has installed."""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "notebooks").is_dir()


def of_checkout(name: str, what: str) -> Path:
    """A file or folder of the repository that no wheel has; FileNotFoundError if `what` needs it in vain."""
    if not (is_checkout() and (ROOT / name).exists()):
        raise FileNotFoundError(
            f"{what} needs {name}/ of the project's repository, which a wheel does not have: cemb is "
            f"installed in {str(PACKAGE)!r}; work in a checkout, installed by pip install --editable"
        )
    return ROOT / name


def results_dir() -> Path:
    """Where results go: $CEMB_RESULTS, else results/ of the repository, else of the working directory."""
    if given := os.environ.get("CEMB_RESULTS"):
        # Processes started from here may work in other folders.
        os.environ["CEMB_RESULTS"] = str(Path(given).absolute())
        return Path(os.environ["CEMB_RESULTS"])
    return (ROOT if is_checkout() else Path.cwd()) / "results"


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
    if not is_checkout():  # the repository around an installed package is another's
        return None
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
    """What may change a result besides code and parameters: machine, `OF_MACHINE`, and versions."""
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
    with Path(path).open("rb") as file:  # of text, more would end a line than what ends one of JSON
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not a record: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}, line {number}: a record is a JSON object, got {line[:40].decode().strip()}"
                )
            found.append(record)
    return found
