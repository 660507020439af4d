"""Read and write pages on all processors: an option of Sphinx that Jupyter Book's command line lacks."""

import os


def setup(app):
    app.parallel = os.cpu_count() or 1
    # It numbers sections once all pages are read, and does not say that pages may be read at once.
    app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True
    return {"parallel_read_safe": True, "parallel_write_safe": True}
