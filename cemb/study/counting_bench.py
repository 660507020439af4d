"""Counting beside its rivals in one run, and counting of ever more tokens: seconds and peak memory."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from numba import get_num_threads, prange
from tqdm import tqdm

from cemb.checks import check_integers
from cemb.kernels.cache import cached
from cemb.pmi import encode, out_of_core
from cemb.pmi.cooccurrence import count_cooccurrences
from cemb.pmi.csr import CsrFolder
from cemb.pmi.matrix import write_pmi
from cemb.processes import end_with_parent
from cemb.study import records, timing

# What counting is to reach on two cores: times faster than each rival, and tokens a second from text to PMI.
TARGETS = {"polars": 2.5, "numba row-wise": 1.2}
TEXT_TARGET = 4.5e6
_BURST_WORDS, _BURST_SHARE, _DOCUMENT_TOKENS = 16, 0.25, 400


def zipf_ids(
    num_tokens: int, vocab_size: int, *, seed: int = 0, bursts: bool = False
) -> npt.NDArray[np.int32]:
    """Made-up ids int32 ``[num_tokens]``, id k with a frequency near 1/(k + 1), the same for the same seed.

    With `bursts`, a quarter of the tokens of each document of 400 are of 16 words that are its own.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> npt.NDArray[np.int32]:
        drawn: npt.NDArray[np.float64] = np.exp(rng.random(shape) * np.log(vocab_size + 1)) - 1
        return drawn.astype(np.int32)

    ids = draw(num_tokens)
    if bursts:
        own = draw(-(-num_tokens // _DOCUMENT_TOKENS), _BURST_WORDS)
        places = np.flatnonzero(rng.random(num_tokens) < _BURST_SHARE)
        ids[places] = own[places // _DOCUMENT_TOKENS, rng.integers(_BURST_WORDS, size=places.size)]
    return ids


@cached()
def _positions(ids: npt.NDArray[np.int32], row_ptr: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    positions = np.empty(ids.shape[0], np.int64)
    place = row_ptr.copy()
    for p in range(ids.shape[0]):
        positions[place[ids[p]]] = p
        place[ids[p]] += 1
    return positions


@cached(parallel=True)
def _row_wise(
    ids: npt.NDArray[np.int32],
    positions: npt.NDArray[np.int64],
    row_ptr: npt.NDArray[np.int64],
    window_size: int,
    workers: int,
    indptr: npt.NDArray[np.int64],
    indices: npt.NDArray[np.int32],
    data: npt.NDArray[np.float64],
    fill: bool,
) -> None:
    """Distinct contexts of each word into ``indptr[1:]``, or with `fill` its columns and counts."""
    vocab_size = row_ptr.shape[0] - 1
    for worker in prange(workers):
        total = np.zeros(vocab_size, np.float64)
        seen = np.empty(vocab_size, np.int32)
        for row in range(worker, vocab_size, workers):
            found = 0
            for p in positions[row_ptr[row] : row_ptr[row + 1]]:
                for q in range(max(0, p - window_size), min(ids.shape[0], p + window_size + 1)):
                    if q != p:
                        if total[ids[q]] == 0.0:
                            seen[found] = ids[q]
                            found += 1
                        total[ids[q]] += 1.0
            if fill:
                columns = np.sort(seen[:found])
                for k in range(found):
                    indices[indptr[row] + k] = columns[k]
                    data[indptr[row] + k] = total[columns[k]]
            else:
                indptr[row + 1] = found
            for k in range(found):
                total[seen[k]] = 0.0


def count_row_wise(ids: npt.NDArray[np.int32], vocab_size: int, window_size: int = 5) -> sp.csr_array:
    """A rival: flat symmetric counts by a position index and a dense row, in Numba and nothing more."""
    row_ptr = np.zeros(vocab_size + 1, np.int64)
    np.cumsum(np.bincount(ids, minlength=vocab_size), out=row_ptr[1:])
    window = (ids, _positions(ids, row_ptr), row_ptr, window_size, get_num_threads())
    indptr = np.zeros(vocab_size + 1, np.int64)
    _row_wise(*window, indptr, np.empty(0, np.int32), np.empty(0), False)
    np.cumsum(indptr, out=indptr)
    indices, data = np.empty(indptr[-1], np.int32), np.empty(indptr[-1])
    _row_wise(*window, indptr, indices, data, True)
    return sp.csr_array((data, indices, indptr), shape=(vocab_size, vocab_size))


def count_polars(ids: npt.NDArray[np.int32], window_size: int = 5) -> Any:
    """A rival: polars' streaming group-by over shifted columns; a frame of (word, context, count).

    It counts only the contexts that follow, to its advantage, and returns them in no order.
    """
    import polars as pl

    words = pl.Series("word", ids)
    pairs = [pl.LazyFrame({"word": words[:-k], "context": words[k:]}) for k in range(1, window_size + 1)]
    return pl.concat(pairs).group_by("word", "context").len("count").collect(engine="streaming")


def write_text(path: Path, ids: npt.NDArray[np.int32]) -> None:
    """A text of made-up words, some twelve to a line."""
    rng = np.random.default_rng(0)
    size = int(ids.max()) + 1
    letters = rng.integers(97, 123, (size, 9)).astype(np.uint8).tobytes().decode()
    words = np.array([letters[9 * i : 9 * i + 2 + i % 8] for i in range(size)], dtype=object)
    with path.open("w") as file:
        for first in range(0, len(ids), 12_000):
            part = words[ids[first : first + 12_000]].tolist()
            file.writelines(" ".join(part[k : k + 12]) + "\n" for k in range(0, len(part), 12))


def run(
    *, num_tokens: int = 16_000_000, vocab_size: int = 70_000, text_mb: int = 100, repeats: int = 5
) -> list[records.Record]:
    """Time counting, its rivals, counting to disk, and all from text to PMI in turns; a record for each.

    polars is left out where it is not installed.

    Args:
        num_tokens: of the stream.
        vocab_size: distinct ids, at most.
        text_mb: megabytes of text, at most, that PMI is made from.
        repeats: turns.
    """
    check_integers(1, num_tokens=num_tokens, vocab_size=vocab_size, text_mb=text_mb, repeats=repeats)
    ids = zipf_ids(num_tokens, vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        folder, text = Path(scratch), Path(scratch) / "text.txt"
        turns = iter(range(10**6))
        write_text(text, ids[: min(num_tokens, text_mb * 10**6 // 6)])
        cases: dict[str, Callable[[], Any]] = {
            "cemb": lambda: count_cooccurrences(ids, vocab_size=vocab_size),
            "cemb on disk": lambda: out_of_core.count(
                [ids], folder / f"{next(turns)}", vocab_size=vocab_size
            ),
            "numba row-wise": lambda: count_row_wise(ids, vocab_size),
            "text to PMI": lambda: _text_to_pmi(text, folder / f"{next(turns)}"),
        }
        try:
            import polars  # noqa: F401

            cases["polars"] = lambda: count_polars(ids)
        except ImportError:
            pass
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        count_row_wise(ids[:1000], vocab_size)
        count_cooccurrences(ids[:1000], vocab_size=vocab_size)
        tokens = dict.fromkeys(cases, num_tokens)
        with tqdm(total=repeats * len(cases), desc="counting side by side", unit="run") as progress:
            for _ in range(repeats):
                for name, case in cases.items():
                    start = time.perf_counter()
                    found = case()
                    seconds[name].append(time.perf_counter() - start)
                    if name == "text to PMI":
                        tokens[name] = found
                    progress.update()
    return [
        {
            "kind": "counting",
            "case": name,
            "num_tokens": tokens[name],
            "vocab_size": vocab_size,
            "window_size": 5,
            "count_s": round(statistics.median(times), 4),
            "count_s_repeats": [round(value, 4) for value in times],
            "tokens_per_s": round(tokens[name] / statistics.median(times)),
            **records.provenance(),
        }
        for name, times in seconds.items()
    ]


def _text_to_pmi(text: Path, folder: Path) -> int:
    encoded = encode.encode(str(text), folder / "corpus")
    counts = out_of_core.count(encoded.shards(), folder / "counts", vocab_size=len(encoded.words))
    write_pmi(counts, folder / "pmi")
    return encoded.num_tokens


def check_targets(found: list[records.Record], say: Callable[[str], None] = print) -> bool:
    """Say of each target whether it is reached; returns whether all are, unmeasured ones not."""
    times = {record["case"]: record for record in found if record["kind"] == "counting"}
    reached = []
    for rival, wanted in TARGETS.items():
        if "cemb" not in times or rival not in times:
            say(f"not measured  counting / {rival}")
            continue
        ratio = times[rival]["count_s"] / times["cemb"]["count_s"]
        reached.append(ratio >= wanted)
        verdict = "pass" if reached[-1] else "FAIL"
        say(f"{verdict}  counting / {rival}: {ratio:.2f} times as fast (at least {wanted})")
    if "text to PMI" in times:
        rate = times["text to PMI"]["tokens_per_s"]
        reached.append(rate >= TEXT_TARGET)
        verdict = "pass" if reached[-1] else "FAIL"
        say(f"{verdict}  text to PMI: {rate:,} tokens/s (at least {TEXT_TARGET:,.0f})")
    say(f"{sum(reached)} of {len(reached)} reached")
    return len(reached) == len(TARGETS) + 1 and all(reached)


def measure_scaling(
    num_tokens: int,
    folder: Path,
    *,
    vocab_size: int = 1_000_000,
    memory: int | str = "512MiB",
    workers: int | None = None,
) -> records.Record:
    """Make a stream of `zipf_ids` with bursts in shards, count it and take its PMI in a process of its own.

    `folder` takes some 150 bytes a token meanwhile. Peak memory is beyond what the process held before.

    Args:
        vocab_size: distinct ids, at most.
        memory: bytes, or a size such as 512MiB, that counting and PMI may take.
        workers: tasks at once; None: one a core.
    """
    check_integers(1, num_tokens=num_tokens, vocab_size=vocab_size, workers=workers)
    memory = out_of_core.parse_memory(memory)
    folder.mkdir(parents=True, exist_ok=True)
    shard_tokens = 2**22
    firsts = range(0, num_tokens, shard_tokens)
    for i, first in enumerate(tqdm(firsts, desc="making ids", unit="shard")):
        size = min(shard_tokens, num_tokens - first)
        np.save(folder / f"ids-{i:05d}.npy", zipf_ids(size, vocab_size, seed=i, bursts=True))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as process:
        measured = process.submit(_measure_scaling, folder, vocab_size, memory, workers).result()
    return {
        "kind": "scaling",
        "num_tokens": num_tokens,
        "vocab_size": vocab_size,
        "window_size": 5,
        "memory_mib": memory / 2**20,
        "workers": workers,
        **measured,
        **records.provenance(),
    }


def _measure_scaling(folder: Path, vocab_size: int, memory: int, workers: int | None) -> records.Record:
    warm = out_of_core.count([np.arange(99, dtype=np.int32) % 7], folder / "warm", vocab_size=7)
    write_pmi(warm, folder / "warm-pmi")
    shards = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("ids-*.npy"))]
    seconds: list[float] = []

    def timed(work: Callable[[], object]) -> float | None:
        def step(_: object) -> None:
            start = time.perf_counter()
            work()
            seconds.append(round(time.perf_counter() - start, 3))

        return timing.peak_mib(step)

    options: dict[str, Any] = {"vocab_size": vocab_size, "memory": memory, "workers": workers}
    count_mib = timed(lambda: out_of_core.count(shards, folder / "counts", **options))
    pmi_mib = timed(lambda: write_pmi(CsrFolder(folder / "counts"), folder / "pmi", memory=memory))
    return {
        "count_s": seconds[0],
        "count_peak_mib": count_mib,
        "pmi_s": seconds[1],
        "pmi_peak_mib": pmi_mib,
        "num_counted_cells": CsrFolder(folder / "counts").num_cells,
        "num_stored_cells": CsrFolder(folder / "pmi").num_cells,
    }


def scaling(
    sizes: Iterable[int] = (10**6, 10**7, 10**8), folder: Path | None = None, **options: Any
) -> Iterable[records.Record]:
    """The record of `measure_scaling` for each number of tokens, in a temporary folder inside `folder`."""
    for num_tokens in sizes:
        with tempfile.TemporaryDirectory(dir=folder, prefix="scaling-") as scratch:
            yield measure_scaling(num_tokens, Path(scratch), **options)
