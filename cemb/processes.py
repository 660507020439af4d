"""How programs end: by a signal, with all processes below them; with their parent; when nobody reads on."""

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from cemb import files

# Between a signal and the end of the program, for locks to be released and unfinished files to be removed.
_GRACE_S = 2.0
_PR_SET_PDEATHSIG = 1


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by a signal that ends the program."""


def end_with_parent() -> None:
    """Have a process that was just started end when its parent does, and leave SIGINT to that.

    For an ``initializer`` or a ``preexec_fn``. The parent is the thread that started the process. Only Linux
    tells of its end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _descendants() -> list[int]:
    """Ids of the processes below this one, parents first; none where the system has no /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            # The command, in parentheses, may hold anything.
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
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
    status = 0

    def end() -> None:
        _end_descendants()
        os._exit(status)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal status
        for each in stoppers:
            signal.signal(each, signal.SIG_IGN)
        status = 128 + number
        with suppress(OSError):  # by hand: what prints may be what was interrupted
            os.write(2, f"cemb: stopped by {signal.Signals(number).name}\n".encode())
            _silence(2)  # libraries have much to say of processes that end
        _end_descendants()
        timer = threading.Timer(_GRACE_S, end)
        timer.daemon = True
        timer.start()
        raise Stopped

    # One that is ignored, as by nohup, stays so.
    stoppers = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in stoppers}
    try:
        try:
            return work()
        finally:
            flush_output()
    except Stopped:
        # What else happens when Python ends takes seconds of a program with many modules, and is of no use.
        atexit._run_exitfuncs()
        os._exit(status)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    finally:
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
