"""Timing: phases of a step, several steps interleaved, peak memory. Knows nothing of embeddings."""

import ctypes
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm


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
    def phase(self, name: str):
        start = self._now()
        yield
        self.phases_ms[name] += (self._now() - start) * 1e3


Step = Callable[[Clock], None]


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
    evicted by the others. The garbage collector is off meanwhile.

    Returns:
        For each step, the milliseconds of each of its phases in order of measurement, and their ``total``.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
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
                        clock = Clock(device)
                        step(clock)
                        for phase, value in clock.phases_ms.items():
                            times[name][phase].append(value)
                        times[name]["total"].append(sum(clock.phases_ms.values()))
                        progress.update()
                    gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return {name: dict(phases) for name, phases in times.items()}


def summarize(phases_ms: Mapping[str, list[float]]) -> dict[str, object]:
    """Record fields of one step's times: ``{phase}_ms``, the median, and ``{phase}_ms_repeats``."""
    fields: dict[str, object] = {}
    for phase, values in phases_ms.items():
        fields[f"{phase}_ms"] = round(statistics.median(values), 4)
        fields[f"{phase}_ms_repeats"] = [round(value, 4) for value in values]
    return fields


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
