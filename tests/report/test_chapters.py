"""Chapters on a default study: with the rest from the reference, and on a text of one's own, without it."""

import re

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT, of_the_default_grid

from cemb.report import provenance, select

CODE = re.compile(r"^```\{code-cell\} ipython3\n((?::[^\n]*\n)*)(.*?)^```$", re.DOTALL | re.MULTILINE)
PASTED = re.compile(r"\{glue:text\}`([^`:]+)(?::([^`]*))?`")
CHAPTERS = ("index", "quality", "frontier", "records", "speed", "data", "compare", "rivals", "gpu", "tested")


@pytest.fixture(params=["the reference's corpus", "another"])
def own(request):
    _, whole = select.reference("records")
    found = of_the_default_grid(whole)
    if request.param == "another":
        found = [{**r, "num_stored_cells": 7} if r["kind"] == "pmi" else r for r in found]
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_is_made_of_a_default_study(own, chapter, monkeypatch):
    glued = {}
    monkeypatch.setattr(select, "load", lambda: own)
    monkeypatch.setattr(provenance, "glue", lambda name, value, source: glued.update({name: (value, source)}))
    text = (ROOT / "book" / f"{chapter}.md").read_text()
    cells = CODE.findall(text)
    assert cells
    hidden = [code for options, code in cells if "remove-cell" in options]
    assert all(code.count("\n") <= 15 for code in hidden)  # the page's source reads as prose
    names = {"__name__": chapter}
    for _, code in cells:
        exec(compile(code, chapter, "exec"), names)
    plt.close("all")
    pasted = PASTED.findall(text)
    assert pasted
    for name, form in pasted:
        value, _ = glued[name]
        shown = format(value, form)
        assert shown, name
        assert "nan" not in shown.lower(), name
    # A number that no run of this study stands behind leads to the reference's.
    runs = {record["run"] for record in own}
    for name, (_, source) in glued.items():
        if source is not None and not isinstance(source, str) and "run" in source:
            assert source["run"] in runs or isinstance(source.get("reference"), str), name
