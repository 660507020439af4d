"""Co-occurrence counts of any number of tokens in bounded memory, on threads, processes or a cluster.

Counting is a map over pieces of the stream, then a merge over blocks of rows. A task of the map counts the
words of its piece, whose windows reach into the pieces beside it, and writes its cells as a sorted run; a
task of the merge adds up its rows of all runs. Each is a pure function of what it is given, writes its
folder whole or not at all, and may run twice or anywhere that sees the same folders. Totals are integers,
so the result is the same bits however the work is cut and wherever it runs.

While it is being made, a result ``OUT`` lies in ``OUT.partial``: running it again goes on after the last
task that was finished.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cemb import files
from cemb.checks import check_integers, check_reals
from cemb.kernels.cache import cached
from cemb.pmi import npy
from cemb.pmi.cooccurrence import (
    BORDER,
    DistanceWeighting,
    PositionIndex,
    Row,
    Windows,
    add_cells,
    check_ids,
    emit,
    keep_thresholds,
    subsample,
    total_dtype,
)
from cemb.pmi.csr import CsrFolder, CsrWriter, row_blocks
from cemb.pmi.npy import StoredArray

DEFAULT_MEMORY = "2GiB"
# More would show progress too rarely, and memory that is used again is faster than new memory.
LARGEST_TASK = 2**24  # tokens
_LARGEST_MERGE = 2**22  # cells
_CHUNK = 2**18  # tokens or cells read at once
_SLACK = 16 * 2**20  # bytes of a task besides its arrays: Python's, the allocator's, rounding to pages
_NARROW = np.dtype(np.uint32)  # of totals, where they fit
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_memory(text: str | int) -> int:
    """Bytes of ``"2GiB"``, ``"512 MiB"`` or ``"2g"``; a unit is 1024 of the one before it.

    >>> parse_memory("2GiB")
    2147483648

    Raises ValueError for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", str(text), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"memory must be a size such as 512MiB or 2GiB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].lower()])


@dataclass(frozen=True)
class _Memory:
    values: npt.NDArray[Any]

    @property
    def size(self) -> int:
        return len(self.values)

    def read(self, first: int, last: int) -> npt.NDArray[Any]:
        return self.values[first:last]


@dataclass(frozen=True)
class _Stream:
    """All ids, one shard after another, after subsampling if there is any."""

    shards: tuple[StoredArray | _Memory, ...]
    vocab_size: int
    thresholds: StoredArray | None = None  # of `keep_thresholds`
    seed: int = 0

    @cached_property
    def starts(self) -> npt.NDArray[Any]:
        return np.cumsum([0, *(shard.size for shard in self.shards)])

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def _thresholds(self) -> npt.NDArray[Any]:
        assert self.thresholds is not None
        return self.thresholds.read(0, self.thresholds.size)

    def pieces(self, first: int, last: int) -> Iterable[npt.NDArray[Any]]:
        """What is left of the tokens ``[first, last)``, piece by piece; positions outside are left out."""
        first, last = max(first, 0), min(last, self.num_tokens)
        while first < last:
            shard = int(np.searchsorted(self.starts, first, side="right")) - 1
            end = min(last, first + _CHUNK, int(self.starts[shard + 1]))
            ids = self.shards[shard].read(first - self.starts[shard], end - self.starts[shard])
            try:
                check_ids(ids, self.vocab_size)
            except ValueError as error:
                raise ValueError(f"shard {shard}: {error}") from None
            if self.thresholds is not None:
                ids = subsample(ids, self._thresholds, seed=self.seed, first_position=first)
            yield ids
            first = end

    def beside(self, position: int, size: int, direction: int) -> npt.NDArray[Any]:
        """The `size` tokens left before `position` (direction −1) or from it on; fewer at the ends."""
        reach = size
        while True:
            span = (position - reach, position) if direction < 0 else (position, position + reach)
            found = np.concatenate([np.empty(0, np.int32), *self.pieces(*span)])
            at_end = span[0] <= 0 if direction < 0 else span[1] >= self.num_tokens
            if at_end or len(found) >= size:
                return found[-size:] if direction < 0 else found[:size]
            reach *= 4


def _is_done(folder: str) -> bool:
    """Whether a task's folder is there and whole; one that is damaged is removed, to be made again."""
    if not Path(folder).is_dir():
        return False
    try:
        files.verify(Path(folder), "it is made again")
    except files.DamagedError:
        shutil.rmtree(folder)
        return False
    return True


@contextmanager
def _published(folder: str) -> Iterator[Path]:
    """A task's folder to fill; one that another worker made meanwhile is as good."""
    path = Path(folder)
    with (
        files.disk_errors(path),
        suppress(FileExistsError),
        files.atomic_directory(path, durable=False) as work,
    ):
        yield work


def _write(path: Path, values: npt.NDArray[Any]) -> None:
    path.write_bytes(values.data)  # numpy's own writing hides why the system refuses


@dataclass(frozen=True)
class _CountTask:
    """Count the tokens ``[first, last)`` of a stream into the run `folder`."""

    stream: _Stream
    windows: Windows
    first: int
    last: int
    dtype: str  # of totals, as wide in all runs, so that they are merged alike
    folder: str

    @staticmethod
    def num_bytes(num_tokens: int, vocab_size: int, dtype: np.dtype[Any]) -> int:
        """Bound on what `count` needs."""
        capacity = max(vocab_size, _CHUNK)
        fixed = Row.num_bytes(vocab_size, dtype) + vocab_size * (8 + 8 + 8) + capacity * (4 + dtype.itemsize)
        return _SLACK + fixed + 16 * _CHUNK + 8 * num_tokens

    def __call__(self) -> int:
        """Returns the number of tokens that were done."""
        if _is_done(self.folder):
            return self.last - self.first
        margin, vocab_size = self.windows.window_size, self.stream.vocab_size
        padded = np.empty(self.last - self.first + 2 * margin, np.int32)
        padded[:margin] = BORDER
        before = self.stream.beside(self.first, margin, -1)
        padded[margin - len(before) : margin] = before
        end = margin
        for ids in self.stream.pieces(self.first, self.last):
            padded[end : end + len(ids)] = ids
            end += len(ids)
        after = self.stream.beside(self.last, margin, 1)
        padded[end : end + len(after)] = after
        padded[end + len(after) : end + margin] = BORDER
        dtype = np.dtype(self.dtype)
        index = PositionIndex(padded[: end + margin], vocab_size, self.windows, dtype)
        capacity = max(vocab_size, _CHUNK)
        columns, values = np.empty(capacity, np.int32), np.empty(capacity, dtype)
        row_cells, row, done = np.zeros(vocab_size, np.uint32), Row(vocab_size, dtype), 0
        with _published(self.folder) as work:
            with (work / "columns").open("wb") as column_file, (work / "values").open("wb") as value_file:
                while done < vocab_size:
                    done, found = index.count_rows(done, vocab_size, row, row_cells, columns, values)
                    column_file.write(columns[:found].data)
                    value_file.write(values[:found].data)
            _write(work / "row_cells", row_cells)
        return self.last - self.first


@cached(nogil=True)
def _merge_rows(
    row_cells: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int32],
    values: npt.NDArray[Any],
    totals: npt.NDArray[np.int64],
    bits: npt.NDArray[np.uint64],
    touched: npt.NDArray[np.uint8],
    cells: npt.NDArray[np.int64],
    out_columns: npt.NDArray[np.int32],
    out_values: npt.NDArray[np.int64],
) -> int:
    """Add up rows: run k's cells of them lie in order from ``starts[k]`` on, `row_cells` ``[runs, rows]``."""
    found = 0
    for row in range(row_cells.shape[1]):
        before = found
        for run in range(row_cells.shape[0]):
            start, size = starts[run], row_cells[run, row]
            add_cells(totals, bits, touched, columns[start : start + size], values[start : start + size])
            starts[run] += size
        found = emit(totals, bits, touched, out_columns, out_values, found)
        cells[row] = found - before
    return found


@dataclass(frozen=True)
class _MergeTask:
    """Add up the rows ``[first, last)`` of runs into the block `folder`.

    `starts` are the places in the runs of the first of these rows, `num_cells` that of all they hold.
    """

    runs: tuple[str, ...]
    starts: tuple[int, ...]
    num_cells: int
    first: int
    last: int
    vocab_size: int
    dtype: str
    folder: str

    @staticmethod
    def num_bytes(num_cells: int, num_runs: int, num_rows: int, vocab_size: int, dtype: np.dtype[Any]) -> int:
        """Bound on what merging needs."""
        row = Row.num_bytes(vocab_size, np.dtype(np.int64)) + vocab_size * (4 + 8)
        return _SLACK + row + num_rows * (8 + 8 * num_runs) + num_cells * (4 + dtype.itemsize + 4 + 8)

    def _file(self, run: str, name: str) -> StoredArray:
        dtype = {"row_cells": "uint32", "columns": "int32", "values": self.dtype}[name]
        path = Path(run) / name
        return StoredArray(str(path), 0, path.stat().st_size // np.dtype(dtype).itemsize, dtype)

    def __call__(self) -> int:
        """Returns the number of cells that were done."""
        if _is_done(self.folder):
            return self.num_cells
        row = Row(self.vocab_size, np.dtype(np.int64))
        cells = np.zeros(self.last - self.first, np.int64)
        row_cells = np.empty((len(self.runs), len(cells)), np.int64)
        for run, sizes in zip(self.runs, row_cells, strict=True):
            sizes[:] = self._file(run, "row_cells").read(self.first, self.last)
        if self.last - self.first == 1:
            out = self._merge_row(row, row_cells[:, 0])
            cells[0] = len(out[0])
        else:
            out = self._merge_block(row, row_cells, cells)
        with _published(self.folder) as work:
            _write(work / "row_cells", cells)
            _write(work / "columns", out[0])
            _write(work / "values", out[1])
        return self.num_cells

    def _merge_block(
        self, row: Row, row_cells: npt.NDArray[np.int64], cells: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        sizes = row_cells.sum(axis=1)
        starts = np.cumsum(sizes) - sizes
        columns, values = np.empty(self.num_cells, np.int32), np.empty(self.num_cells, self.dtype)
        for run, place, start, size in zip(self.runs, self.starts, starts, sizes, strict=True):
            columns[start : start + size] = self._file(run, "columns").read(place, place + size)
            values[start : start + size] = self._file(run, "values").read(place, place + size)
        out = np.empty(self.num_cells, np.int32), np.empty(self.num_cells, np.int64)
        # Signed, as the totals are: Numba's older releases add int64 and uint64 as floats.
        values = values.view(np.int64) if values.dtype == np.uint64 else values
        found = _merge_rows(row_cells, starts, columns, values, *row.arrays, cells, *out)
        return out[0][:found], out[1][:found]

    def _merge_row(
        self, row: Row, sizes: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """One row, which may have too many cells in all runs together to hold them at once."""
        for run, place, size in zip(self.runs, self.starts, sizes, strict=True):
            for first in range(place, place + size, _CHUNK):
                last = min(first + _CHUNK, place + size)
                columns = self._file(run, "columns").read(first, last)
                add_cells(*row.arrays, columns, self._file(run, "values").read(first, last).astype(np.int64))
        bound = min(int(sizes.sum()), self.vocab_size)
        out = np.empty(bound, np.int32), np.empty(bound, np.int64)
        found = emit(*row.arrays, *out, 0)
        return out[0][:found], out[1][:found]


def _call(task: Callable[[], int]) -> int:
    return task()


def _run(tasks: Sequence[Callable[[], int]], executor: Executor, progress: tqdm, again: str) -> None:
    """Run all tasks; the first error stops the others."""
    futures = {executor.submit(_call, task) for task in tasks}
    try:
        while futures:
            done, futures = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                progress.update(future.result())
    except BrokenExecutor as error:
        raise RuntimeError(f"a worker process ended before its task did ({error}); {again}") from error
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def _identify(shards: Sequence[npt.NDArray[Any]]) -> str:
    """Of files their names, sizes and times; of arrays their contents."""
    digest = hashlib.sha256()
    for shard in shards:
        if file := _file_of(shard):
            found = Path(file.path).stat()
            digest.update(repr((file, found.st_size, found.st_mtime_ns)).encode())
        else:
            values = np.ascontiguousarray(shard)
            digest.update(repr((values.dtype.str, values.shape, zlib.crc32(values.data.cast("B")))).encode())
    return digest.hexdigest()[:16]


def _file_of(shard: npt.NDArray[Any]) -> StoredArray | None:
    """The file under an array that `numpy.load` mapped, if it is all of one."""
    if not isinstance(shard, np.memmap) or isinstance(shard.base, np.ndarray) or shard.filename is None:
        return None
    return StoredArray(str(Path(shard.filename).resolve()), shard.offset, len(shard), shard.dtype.str)


def check_memory(
    memory: int,
    vocab_size: int,
    num_tokens: int,
    workers: int | None = None,
    dtype: np.dtype[Any] = _NARROW,
) -> None:
    """ValueError unless so many bytes let `workers`, by default the processors there are, count at once."""
    workers = workers or os.cpu_count() or 1
    needed = workers * _CountTask.num_bytes(min(_CHUNK, num_tokens), vocab_size, dtype)
    if memory < needed:
        raise ValueError(
            f"memory={memory / 2**20:,.0f} MiB is too little for a vocabulary of {vocab_size:,} on "
            f"{workers} workers: {-(-needed // 2**20):,} MiB are needed, or fewer workers"
        )


def _plan(
    num_tokens: int, vocab_size: int, windows: Windows, memory: int, workers: int
) -> tuple[int, np.dtype[Any]]:
    """Tokens a task, and the type of its totals."""
    for dtype in (_NARROW, np.dtype(np.uint64)):
        spare = memory // workers - _CountTask.num_bytes(0, vocab_size, dtype)
        size = min(LARGEST_TASK, max(spare, 0) // 8, -(-num_tokens // workers))
        check_memory(memory, vocab_size, num_tokens, workers, dtype)
        if total_dtype(windows.largest_total(size)) == dtype:
            return max(size, 1), dtype
    return max(size, 1), dtype


def count(
    shards: Sequence[npt.NDArray[Any]],
    out: str | Path,
    *,
    vocab_size: int,
    window_size: int = 5,
    distance_weighting: DistanceWeighting = "flat",
    symmetric: bool = True,
    subsample_threshold: float | None = None,
    word_counts: npt.NDArray[Any] | None = None,
    seed: int = 0,
    memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    executor: Executor | None = None,
) -> "CooccurrenceCounts":
    """Count co-occurrences of a stream of ids into a folder, the same as `count_cooccurrences`.

    Args:
        shards: the stream ``[ids]`` in pieces; windows reach across their borders. Arrays that `numpy.load`
            maps into memory are read from their files, by workers too.
        out: the folder to make; ``OUT.partial`` beside it holds what is finished until all is.
        vocab_size: ids are below this.
        window_size: tokens to each side.
        distance_weighting: ``"flat"`` counts 1 per pair, ``"harmonic"`` 1/distance.
        symmetric: count contexts on both sides; otherwise only those that follow the word.
        subsample_threshold: as word2vec's; None: all tokens count.
        word_counts: ``[vocab_size]``, which subsampling needs.
        seed: of subsampling.
        memory: bytes, or a size such as 512MiB, that all tasks running at once may take, besides Python and
            its packages themselves; a cluster's machine each. It has no influence on the result.
        workers: tasks at once; by default the processors there are.
        executor: where tasks run; by default threads of this process.

    Returns:
        The counts, from `out`; if it is there already and of the same stream and options, only opened.

    Raises:
        ValueError: bad options, ids out of range, too little memory for the vocabulary, or an `out` or
            ``OUT.partial`` that is of another stream or other options.
        OverflowError: totals that 64 bits might not hold.
        OSError: the disk is full. What is finished stays, and is used by the next run.
    """
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    windows = Windows(window_size, distance_weighting, symmetric)
    memory = parse_memory(memory)
    check_integers(1, workers=workers, vocab_size=vocab_size)
    check_reals("(0, inf)", subsample_threshold=subsample_threshold)
    workers = workers or os.cpu_count() or 1
    num_tokens = sum(map(len, shards))
    windows.largest_total(num_tokens)
    if subsample_threshold is not None and word_counts is None:
        raise ValueError("subsample_threshold needs word_counts")
    size, dtype = _plan(num_tokens, vocab_size, windows, memory, workers)
    options = {
        **asdict(windows),
        "subsample_threshold": subsample_threshold,
        "seed": seed if subsample_threshold is not None else None,
        "vocab_size": vocab_size,
        "num_tokens": num_tokens,
        "stream": _identify([*shards, *([] if subsample_threshold is None else [np.asarray(word_counts)])]),
    }
    if not out.exists():
        with files.exclusive(partial, wait=False):
            if not out.exists():
                sizes = {"task_tokens": size, "task_memory": memory // workers, "dtype": dtype.name}
                _count(shards, word_counts, out, partial, options, sizes, workers, executor)
            shutil.rmtree(partial)
    found = CooccurrenceCounts(out)
    _check_same(out, found.manifest, options)
    shutil.rmtree(partial, ignore_errors=True)
    return found


def _count(
    shards: Sequence[npt.NDArray[Any]],
    word_counts: npt.NDArray[Any] | None,
    out: Path,
    partial: Path,
    options: dict[str, Any],
    sizes: dict[str, Any],
    workers: int,
    executor: Executor | None,
) -> None:
    """Count into `out`; `sizes` are those of a task: tokens, bytes of memory, and the type of its totals."""
    windows = Windows(options["window_size"], options["distance_weighting"], options["symmetric"])
    with files.disk_errors(partial):
        plan = _begin(partial, options, sizes)
        stream = _open_stream(partial, plan, shards, word_counts, executor is not None)
    size, dtype, memory = plan["task_tokens"], np.dtype(plan["dtype"]), sizes["task_memory"]
    again = f"what is finished stays in {str(partial)!r}: run it again to go on"
    firsts = range(0, stream.num_tokens, size)
    tasks = [
        _CountTask(
            stream,
            windows,
            first,
            min(first + size, stream.num_tokens),
            dtype.name,
            str(partial / f"run-{i:05d}"),
        )
        for i, first in enumerate(firsts)
    ]
    own: AbstractContextManager[Executor] = (
        ThreadPoolExecutor(workers) if executor is None else nullcontext(executor)
    )
    with own as pool:
        with tqdm(total=stream.num_tokens, desc="counting", unit=" tokens", unit_scale=True) as progress:
            _run(tasks, pool, progress, again)
        merges = _plan_merge(partial, [task.folder for task in tasks], stream.vocab_size, memory, dtype)
        cells = sum(task.num_cells for task in merges)
        with tqdm(total=cells, desc="merging", unit=" cells", unit_scale=True) as progress:
            _run(merges, pool, progress, again)
    with files.disk_errors(out), files.atomic_directory(out) as work:
        _assemble(work, merges, stream.vocab_size, {**options, "denominator": windows.denominator})


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if different := sorted(name for name in wanted if found.get(name) != wanted[name]):
        raise ValueError(
            f"{str(folder)!r} holds counts of something else; different are "
            + ", ".join(f"{name} ({found.get(name)!r} there, {wanted[name]!r} wanted)" for name in different)
            + "; remove it or name another folder"
        )


def _begin(partial: Path, options: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """The plan of unfinished work: what was begun goes on as planned, unless its tasks are now too large."""
    folder = partial / "plan"
    if _is_done(str(folder)):
        plan: dict[str, Any] = files.read_json(folder / "plan.json")
        _check_same(partial, plan, options)
        if plan["task_memory"] > sizes["task_memory"]:
            raise ValueError(
                f"{str(partial)!r} was begun with {plan['task_memory'] / 2**20:,.0f} MiB a worker, and "
                f"{sizes['task_memory'] / 2**20:,.0f} MiB are less; give as much, or remove it"
            )
    else:
        # Without its plan, nothing says what was finished.
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        plan = {**options, **sizes}
        with _published(str(folder)) as work:
            (work / "plan.json").write_text(json.dumps(plan, indent=1))
    return plan


def _saved(path: Path, values: npt.NDArray[Any]) -> StoredArray:
    npy.save(path, values)
    return StoredArray.of_npy(path.resolve(), values.dtype, len(values))


def _open_stream(
    partial: Path,
    plan: dict[str, Any],
    shards: Sequence[npt.NDArray[Any]],
    word_counts: npt.NDArray[Any] | None,
    elsewhere: bool,
) -> _Stream:
    """The stream as its tasks read it: from files if they run elsewhere."""
    seen = []
    for i, shard in enumerate(shards):
        if (file := _file_of(shard)) is None and elsewhere:
            file = _saved(partial / f"ids-{i:05d}.npy", np.asarray(shard))
        seen.append(file or _Memory(np.asarray(shard)))
    thresholds = None
    if plan["subsample_threshold"] is not None:
        assert word_counts is not None
        kept = keep_thresholds(word_counts, plan["subsample_threshold"])
        thresholds = _saved(partial / "thresholds.npy", kept)
    return _Stream(tuple(seen), plan["vocab_size"], thresholds, plan["seed"] or 0)


def _plan_merge(
    partial: Path, runs: list[str], vocab_size: int, memory: int, dtype: np.dtype[Any]
) -> list[_MergeTask]:
    """Blocks of rows that fit in `memory`, with their places in all runs."""
    cells = np.zeros(vocab_size, np.int64)
    for run in runs:
        cells += np.fromfile(Path(run) / "row_cells", np.uint32)
    # A row costs its place in each run besides its cells; both are counted in units of a cell.
    fixed = _MergeTask.num_bytes(0, len(runs), 0, vocab_size, dtype)
    cell_bytes = _MergeTask.num_bytes(1, len(runs), 0, vocab_size, dtype) - fixed
    row_bytes = _MergeTask.num_bytes(0, len(runs), 1, vocab_size, dtype) - fixed
    row_cost = -(-row_bytes // cell_bytes)
    capacity = (memory - fixed) // cell_bytes
    costs = np.concatenate([[0], np.cumsum(cells + row_cost)])
    blocks = list(row_blocks(costs, min(max(capacity, 1), _LARGEST_MERGE)))
    first_rows = np.array([first for first, _ in blocks], np.int64)
    starts = np.array(
        [
            np.add.reduceat(np.fromfile(Path(run) / "row_cells", np.uint32).astype(np.int64), first_rows)
            for run in runs
        ]
    ).reshape(len(runs), len(blocks))
    starts = np.cumsum(starts, axis=1) - starts
    return [
        _MergeTask(
            tuple(runs), tuple(starts[:, i].tolist()), int(cells[first:last].sum()), first, last, vocab_size,
            dtype.name, str(partial / f"block-{first:010d}-{last:010d}"),
        )
        for i, (first, last) in enumerate(blocks)
    ]  # fmt: skip


def _assemble(folder: Path, merges: list[_MergeTask], vocab_size: int, manifest: dict[str, Any]) -> None:
    """Put the blocks after one another."""
    num_cells = sum((Path(task.folder) / "columns").stat().st_size for task in merges) // 4
    total = 0
    with CsrWriter(folder, vocab_size, np.int64, num_cells) as writer:
        for task in tqdm(merges, desc="writing", unit="block"):
            block = Path(task.folder)
            row_cells = np.fromfile(block / "row_cells", np.int64)
            writer.append(row_cells, np.empty(0, np.int32), np.empty(0, np.int64))
            size = int(row_cells.sum())
            for first in range(0, size, _CHUNK):
                part = min(_CHUNK, size - first)
                values = np.fromfile(block / "values", np.int64, part, offset=8 * first)
                writer.extend(np.fromfile(block / "columns", np.int32, part, offset=4 * first), values)
                total += int(values.sum())
        writer.finish(kind="counts", total=total, **manifest)


class CooccurrenceCounts(CsrFolder):
    """Counts in a folder: `matrix` gives int64 ``[words, contexts]``, in units of one over `denominator`."""

    @property
    def denominator(self) -> int:
        denominator: int = self.manifest["denominator"]
        return denominator

    @property
    def total(self) -> float:
        """The sum of all counts."""
        total: int = self.manifest["total"]
        return total / self.denominator
