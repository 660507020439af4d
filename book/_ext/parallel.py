"""Read and write pages side by side, in a kernel for each process: Jupyter Book has no option for it."""

import itertools
import multiprocessing
import multiprocessing.util
import os
from contextlib import asynccontextmanager
from pathlib import Path

from jupyter_core.utils import ensure_async, run_sync
from nbclient import NotebookClient
from sphinx.util.parallel import make_chunks

from cemb.processes import end_with_parent

# Kernels started by several processes at once may be given one TCP port. One of them dies then, and whoever
# started it waits for ever. So they are started one after the other, until each has its ports.
_starting = multiprocessing.Lock()
_setup = NotebookClient.async_setup_kernel
_kernel = None  # of this process


@asynccontextmanager
async def setup_kernel(client, **options):
    """Let the chapters that a process reads share a kernel: what they import takes longer than what they do.

    Each finds it without the names of those before; what they drew, the kernel has closed.
    """
    global _kernel
    if _kernel is None or not await ensure_async(_kernel.is_alive()):
        client.create_kernel_manager()
        with _starting:
            await client.async_start_new_kernel(**options)
            await client.async_start_new_kernel_client()
        _kernel = client.km
        # What such a process ends with; it does not come to `atexit`.
        end = run_sync(_kernel.shutdown_kernel)
        multiprocessing.util.Finalize(None, end, kwargs={"now": True}, exitpriority=0)
    else:
        client.km = _kernel
        await client.async_start_new_kernel_client()
        await client.kc.execute_interactive("%reset -f", silent=True)
    try:
        async with _setup(client, cleanup_kc=False):
            yield
    finally:
        client.kc.stop_channels()


def cost(page):
    """How long a page takes to read, in code cells: importing torch takes as long as ten."""
    if page.suffix != ".md":  # a run, which is not run again
        return 0
    text = page.read_text(encoding="utf-8")
    imports_torch = any(sign in text for sign in ("import torch", "import cli", "automodule"))
    return text.count("{code-cell}") + 10 * imports_torch


def deal_out(app, env, docnames):
    """Spread chapters evenly over the chunks that are read from the start, and fill all with other pages."""
    costs = {name: cost(Path(env.doc2path(name))) for name in docnames}
    sizes = [len(chunk) for chunk in make_chunks(docnames, app.parallel)]
    shares = [[] for _ in sizes]
    totals = [0] * len(sizes)
    for name in sorted(docnames, key=costs.get, reverse=True):
        room = [place for place, size in enumerate(sizes) if len(shares[place]) < size]
        from_start = [place for place in room if place < app.parallel] if costs[name] else []
        place = min(from_start or room, key=totals.__getitem__)
        shares[place].append(name)
        totals[place] += costs[name]
    docnames[:] = itertools.chain(*shares)


def setup(app):
    os.register_at_fork(after_in_child=end_with_parent)
    # Even where there are fewer processors: some chapters take ten times as long as others, and of few large
    # shares the last would be worked on alone. Of more, each starts a kernel.
    app.parallel = max(4, os.cpu_count() or 1)
    app.connect("env-before-read-docs", deal_out)
    NotebookClient.async_setup_kernel = setup_kernel
    # It numbers sections once all pages are read, and does not say that pages may be read at once.
    app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True
    return {"parallel_read_safe": True, "parallel_write_safe": True}
