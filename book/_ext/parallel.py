"""Read and write pages side by side: an option of Sphinx that Jupyter Book's command line lacks."""

import os
from pathlib import Path

from nbclient import NotebookClient
from sphinx.util.parallel import make_chunks


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
    # A chapter's output is there when its kernel is told to stop; waiting for it to tidy up takes a second.
    NotebookClient.shutdown_kernel.default_value = "immediate"
    # It numbers sections once all pages are read, and does not say that pages may be read at once.
    app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True
    return {"parallel_read_safe": True, "parallel_write_safe": True}
