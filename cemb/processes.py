"""How programs end: by a signal, with all processes below them; with their parent; when nobody reads on."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from cemb import files

# Between a signal and the end of the program, for locks to be released and unfinished files to be removed.
_GRACE_S = 2.0
_PR_SET_PDEATHSIG = 1


# What helps after a signal or the loss of another process, such as that the same command resumes.
_remedy = ""


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by a signal that ends the program."""


def end_with_parent() -> None:
    """Have a process that was just started end when its parent does, and leave SIGINT to that.

    For an ``initializer`` or a ``preexec_fn``. The parent is the thread that started the process. Only Linux
    tells of its end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _be_killed_with_parent()
    # Linux tells of no end that came before, while this process started.
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def _be_killed_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def rank_and_number() -> tuple[int, int]:
    """Which of how many processes torchrun has started this one is; (0, 1) without torchrun."""
    if not _is_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _is_launched() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def join_launcher() -> None:
    """Under torchrun, end when that does, and leave progress to rank 0. Call it before tqdm is imported."""
    if _is_launched():
        _be_killed_with_parent()  # of signals it passes on what it gets
        if sys.platform == "linux" and not any(map(_has_torch, _ancestors())):  # it ended before
            os._exit(1)
        if rank_and_number()[0]:
            os.environ["TQDM_DISABLE"] = "1"


def set_remedy(text: str) -> None:
    """What a program that is stopped says from now on, after what stopped it."""
    global _remedy
    _remedy = text


def with_remedy(why: str) -> str:
    """What stopped a program, and the remedy that was set."""
    return why + (_remedy and f"; {_remedy}")


def last_words(why: str) -> str:
    """The line that says on standard error why the program ends; of torchrun's processes the first has it."""
    start = ""
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # It is this process's; others' lie in folders beside that of it.
        with suppress(OSError):
            try:
                (Path(place).parent.parent / "cemb-told").touch(exist_ok=False)
            except FileExistsError:
                return ""
        start = "\n"  # another process may have left a bar of progress
    return f"{start}cemb: {why}\n"


def _parent(process: int) -> int:
    """The process that another, of /proc, is a child of; 0 for none."""
    # The command, in parentheses, may hold anything.
    stat = Path(f"/proc/{process}/stat").read_text(errors="replace")
    return int(stat.rpartition(")")[2].split()[1])


def _ancestors() -> Iterator[int]:
    """Ids of the processes above this one."""
    process = os.getppid()
    while process:
        yield process
        try:
            process = _parent(process)
        except OSError:  # it has ended
            return


def _has_torch(process: int) -> bool:
    """Whether a process of this user has loaded torch, as torchrun has."""
    with suppress(OSError):
        return b"libtorch" in Path(f"/proc/{process}/maps").read_bytes()
    return False


def _descendants() -> list[int]:
    """Ids of the processes below this one, parents first; none where the system has no /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            children.setdefault(_parent(int(path.name)), []).append(int(path.name))
    found = [os.getpid()]
    for process in found:
        found += children.get(process, [])
    return found[1:]


def _is_tracker(process: int) -> bool:
    """Whether a process is multiprocessing's, which removes what the others leave behind, and ends then."""
    with suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{process}/cmdline").read_bytes()
    return False


def _end_descendants() -> None:
    for process in _descendants():
        if not _is_tracker(process):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)


def flush_output() -> None:
    """Write out what was printed. If that fails, by OSError, nothing more is written, not even at exit."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        _silence(sys.stdout.fileno())
        raise


def _silence(descriptor: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def supervised(work: Callable[[], int]) -> int:
    """Do a program's work, on the main thread; returns its exit status.

    SIGINT and SIGTERM end all processes below this one, then the work, by `Stopped`, and this process, at the
    latest after `_GRACE_S`. As shells have it, the status is then 128 and the number of the signal. So it is
    where nobody reads the output any more.
    """
    # One that is ignored, as by nohup, stays so.
    stoppers = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    is_alone = threading.Event()  # the processes below are gone

    def stop(number: int, frame: FrameType | None) -> None:
        for each in stoppers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    def watch() -> None:
        # Python runs handlers when the main thread comes back from what it waits for: wake it, or do without.
        with open(reading, "rb", buffering=0) as numbers:  # noqa: PTH123  a descriptor
            while number := numbers.read(1):
                if number[0] in stoppers:
                    break
        if number:
            by = " of torchrun, which ends all processes when one ends" if _is_launched() else ""
            with suppress(OSError):
                why = with_remedy(f"stopped by {signal.Signals(number[0]).name}{by}")
                os.write(2, last_words(why).encode())
                _silence(2)  # libraries have much to say of processes that end
            _end_descendants()
            is_alone.set()
            signal.pthread_kill(threading.main_thread().ident or 0, number[0])  # ignored if `stop` was first
            time.sleep(_GRACE_S)
            _end_descendants()
            os._exit(128 + number[0])

    threading.Thread(target=watch, daemon=True).start()
    before = {number: signal.signal(number, stop) for number in stoppers}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        try:
            return work()
        finally:
            flush_output()
    except Stopped as stopped:
        is_alone.wait(_GRACE_S)
        # What else happens when Python ends takes seconds of a program with many modules, and is of no use.
        atexit._run_exitfuncs()
        os._exit(128 + stopped.args[0])
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(writing)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def one_at_a_time(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Have a folder to oneself; where another process has it, say so and wait until it ends."""
    with ExitStack() as held:
        try:
            held.enter_context(files.exclusive(folder, wait=False))
        except RuntimeError as error:
            say(f"{error}; waiting for it to end")
            held.enter_context(files.exclusive(folder, wait=True))
        yield
