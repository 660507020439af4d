"""Timing: phases of a step, several steps interleaved, peak memory. Knows nothing of embeddings."""

import ctypes
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cemb.checks import check_integers
from cemb.study.records import CONTENDED_SHARE


class Clock:
    """Times named phases of one step in milliseconds; waits for the device at each border."""

    def __init__(self, device: str = "cpu"):
        self.phases_ms: dict[str, float] = defaultdict(float)
        self._is_cuda = str(device).startswith("cuda")

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.phases_ms[name] += (self._now() - start) * 1e3


def set_threads(threads: int | None) -> None:
    """Have torch, and the kernels with it, use so many threads; None leaves it to torch."""
    check_integers(1, threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)


Step = Callable[[Clock], None]
_TASKS = Path("/proc/self/task")


def cpu_wait_ms() -> float | None:
    """Milliseconds that this process's threads have been ready to run and had no processor, all together.

    None where the system does not count it; Linux does. What a hypervisor takes from the whole machine is
    not in it.
    """
    total_ns, counted = 0, False
    for task in _TASKS.glob("*/schedstat"):
        try:
            total_ns += int(task.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended, or the kernel keeps no count
            continue
        counted = True
    return total_ns / 1e6 if counted else None


def cpu_wait_share(wait_ms: float, total_ms: float) -> float:
    """Share of a step that each of torch's threads waited for a processor, on average."""
    return wait_ms / (total_ms * torch.get_num_threads())


def check_turns(repeats: int, warmup: int, rounds: int) -> None:
    """Raise ValueError for numbers of steps that `interleave` cannot take."""
    check_integers(1, repeats=repeats, rounds=rounds)
    check_integers(0, warmup=warmup)


def interleave(
    steps: Mapping[Hashable, Step],
    *,
    repeats: int,
    warmup: int = 2,
    rounds: int = 3,
    device: str = "cpu",
) -> dict[Hashable, dict[str, list[float]]]:
    """Time each step `repeats` times, in `rounds` turns, so that slow drift of the machine hits all alike.

    The first `warmup` calls are not counted, nor is the first of each later turn, which finds its data
    evicted by the others. The garbage collector is off meanwhile. A step that had to wait for a processor, by
    `CONTENDED_SHARE`, is timed once more, and the run of the two that waited less counts.

    Returns:
        For each step, the milliseconds of each of its phases in order of measurement, their ``total``, and
        where the system tells, ``cpu_wait``, what all its threads waited for a processor.
    """
    check_turns(repeats, warmup, rounds)
    rounds = min(rounds, repeats)
    times: dict[Hashable, dict[str, list[float]]] = {name: defaultdict(list) for name in steps}
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # so that the collections below look at what the steps left alone
    gc.disable()
    try:
        with tqdm(total=repeats * len(steps), desc="timed steps", unit="step") as progress:
            for turn in range(rounds):
                for name, step in steps.items():
                    for _ in range(warmup if turn == 0 else 1):
                        step(Clock(device))
                    for _ in range(repeats * (turn + 1) // rounds - repeats * turn // rounds):
                        phases_ms = _timed(step, device)
                        if _is_contended(phases_ms):
                            again = _timed(step, device)
                            phases_ms = min(phases_ms, again, key=lambda phases: phases["cpu_wait"])
                        for phase, value in phases_ms.items():
                            times[name][phase].append(value)
                        progress.update()
                    gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return {name: dict(phases) for name, phases in times.items()}


def _timed(step: Step, device: str) -> dict[str, float]:
    clock = Clock(device)
    before_ms = cpu_wait_ms()
    step(clock)
    after_ms = cpu_wait_ms()
    waited = {} if before_ms is None or after_ms is None else {"cpu_wait": max(after_ms - before_ms, 0.0)}
    return {**clock.phases_ms, "total": sum(clock.phases_ms.values()), **waited}


def _is_contended(phases_ms: Mapping[str, float]) -> bool:
    if "cpu_wait" not in phases_ms:
        return False
    return cpu_wait_share(phases_ms["cpu_wait"], phases_ms["total"]) > CONTENDED_SHARE


def summarize(phases_ms: Mapping[str, list[float]]) -> dict[str, Any]:
    """Record fields of one step's times: ``{phase}_ms``, the median, and ``{phase}_ms_repeats``.

    Where waiting for a processor was counted, ``cpu_wait_share`` is its share of all repeats together, and
    ``is_contended`` whether that is more than `CONTENDED_SHARE`.
    """
    fields: dict[str, Any] = {}
    for phase, values in phases_ms.items():
        fields[f"{phase}_ms"] = round(statistics.median(values), 4)
        fields[f"{phase}_ms_repeats"] = [round(value, 4) for value in values]
    if "cpu_wait" in phases_ms:
        share = cpu_wait_share(sum(phases_ms["cpu_wait"]), sum(phases_ms["total"]))
        fields |= {"cpu_wait_share": round(share, 4), "is_contended": share > CONTENDED_SHARE}
    return fields


def device_ms(step: Step, device: str, *, steps: int = 10) -> float:
    """Milliseconds a step that a GPU's kernels, copies and fills take by themselves, by torch's profiler.

    Times of a `Clock` contain what Python and the launches take besides, wherever the GPU waits for them.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(steps):
            step(Clock(device))
        torch.cuda.synchronize()
    total_us: float = sum(event.self_device_time_total for event in profile.key_averages())
    return total_us / 1e3 / steps


def graph_ms(step: Callable[[], object], feed: Callable[[], object], *, repeats: int) -> float:
    """Median milliseconds of a step replayed as a CUDA graph, after ``feed()`` has put its input in place.

    Both must write and read the same memory at each call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times: list[float] = []
    for _ in range(repeats):
        feed()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_mib(step: Step, device: str = "cpu") -> float | None:
    """Memory one step takes beyond what is held before it, in MiB; None where the system cannot tell.

    On the CPU: the resident set's high-water mark, which Linux can reset, after the allocator has given back
    what it kept of earlier steps.
    """
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(Clock(device))
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
        step(Clock(device))
        return (_status_kib("VmHWM") - before) / 2**10
    except (OSError, KeyError, AttributeError):
        return None


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)
