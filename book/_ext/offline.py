"""Keep the built site free of network requests, so that it also opens from ``file://``."""

import shutil
from importlib.metadata import distribution
from pathlib import Path

from sphinx.util import logging

# One file with every TeX extension and SVG glyphs: no fonts and no parts to fetch at run time.
MATHJAX = "tex-svg-full.js"


def use_local_mathjax(app):
    if app.builder.format != "html":
        return
    wheel = distribution("sphinx-mathjax-offline")
    static = Path(app.outdir, "_static")
    static.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(wheel.locate_file(f"sphinx-mathjax-offline/static/mathjax/{MATHJAX}"), static / MATHJAX)
    app.config.mathjax_path = MATHJAX
    app.config.mathjax3_config = {"options": {"enableMenu": False}}


def refuse_remote_assets(app, pagename, templatename, context, doctree):
    for asset in [*context.get("script_files", []), *context.get("css_files", [])]:
        name = str(getattr(asset, "filename", asset) or "")
        if "://" in name or name.startswith("//"):
            logging.getLogger(__name__).warning("%s loads %s from the network", pagename, name)


def setup(app):
    app.connect("builder-inited", use_local_mathjax, priority=100)
    app.connect("html-page-context", refuse_remote_assets, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
