"""Read and write pages side by side: an option of Sphinx that Jupyter Book's command line lacks."""

import multiprocessing
import os
from pathlib import Path

from nbclient import NotebookClient
from sphinx.util.parallel import make_chunks

# Kernels started by several processes at once may be given one TCP port. One of them dies then, and whoever
# started it waits for ever. So they are started one after the other, until each has its ports.
_starting = multiprocessing.Lock()
_start, _connect = NotebookClient.async_start_new_kernel, NotebookClient.async_start_new_kernel_client


async def start_alone(client, **options):
    _starting.acquire()
    try:
        await _start(client, **options)
    except BaseException:
        _starting.release()
        raise


async def connect(client):
    try:
        return await _connect(client)
    finally:
        _starting.release()


def deal_out(app, env, docnames):
    """Spread chapters, which run code, over the chunks of pages read at once: long ones first, runs last."""
    docnames.sort(key=lambda name: (name.startswith("runs/"), -Path(env.doc2path(name)).stat().st_size))
    chunks = len(make_chunks(docnames, app.parallel))
    docnames[:] = [name for first in range(chunks) for name in docnames[first::chunks]]


def setup(app):
    # Even where there are fewer processors: some chapters take ten times as long as others, and of few large
    # shares the last would be worked on alone.
    app.parallel = max(8, os.cpu_count() or 1)
    app.connect("env-before-read-docs", deal_out)
    NotebookClient.async_start_new_kernel = start_alone
    NotebookClient.async_start_new_kernel_client = connect
    # A chapter's output is there when its kernel is told to stop; waiting for it to tidy up takes a second.
    NotebookClient.shutdown_kernel.default_value = "immediate"
    # It numbers sections once all pages are read, and does not say that pages may be read at once.
    app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True
    return {"parallel_read_safe": True, "parallel_write_safe": True}
