"""The tour: its counts against sets, its vectors against their hash, and its notebook, still and live."""

import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib as mpl
import nbformat
import numpy as np
import papermill
import pytest
from conftest import ROOT, SCRATCH

from cemb.hashing import HashSpec
from cemb.pmi import corpora
from cemb.report import tour

NOTEBOOK = ROOT / "notebooks" / "tour.ipynb"
SPECS = [
    HashSpec(40, 8, 64),
    HashSpec(40, 8, 64, block_size=4, signed=True),
    HashSpec(30, 7, 50, block_size=3, hash_seed=5, table_offset=11),
    HashSpec(5, 6, 100_000),
    HashSpec(9, 4, 1),
]


def slot_sets(spec):
    """Each row's slots, by the specification in plain Python."""
    return [
        {spec.locate(row, column)[0] for column in range(spec.embedding_dim)}
        for row in range(spec.num_embeddings)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CEMB_RESULTS", str(tmp_path_factory.mktemp("tour")))
        return tour.load_data("synthetic", max_vocab=150, rank=16)


@pytest.mark.parametrize("spec", SPECS)
def test_readers_are_counted_as_sets_count_them(spec):
    expected = Counter(slot for slots in slot_sets(spec) for slot in slots)
    assert tour.readers(spec).tolist() == [expected[slot] for slot in range(spec.pool_size)]


@pytest.mark.parametrize("spec", SPECS)
def test_blocks_of_a_row_are_where_the_specification_puts_them(spec):
    def ends(numbers):
        parts = [int(part.replace(",", "")) for part in numbers.split(" to ")]
        return parts[0], parts[-1]

    located = []
    for columns, places, sign in tour.row_blocks(spec, 3).itertuples(index=False):
        (low, high), (first, last) = ends(columns), ends(places)
        assert last - first == high - low
        located += [(first + i, 1 if sign == "+" else -1) for i in range(high - low + 1)]
    assert located == [spec.locate(3, column) for column in range(spec.embedding_dim)]


def test_rows_out_of_range_are_refused():
    spec = SPECS[0]
    with pytest.raises(IndexError, match="40 rows"):
        tour.row_blocks(spec, 40)
    with pytest.raises(IndexError, match="got ids from 3 to 40"):
        tour.draw_rows(spec, (3, 40), ("a", "b"))


def test_sharers_are_those_of_sets(data):
    spec = tour.table_spec(data, 300, 4)
    sets = slot_sets(spec)
    words = data.words
    own = words.index("riveraa")
    shared = {row: len(sets[own] & slots) for row, slots in enumerate(sets) if row != own}
    expected = sorted(shared, key=lambda row: (-shared[row], row))[:6]
    frame = tour.sharers(data, spec, "riveraa", 6)
    assert frame["row"].tolist() == expected
    assert frame["shared"].tolist() == [shared[row] for row in expected]
    assert frame["word"].tolist() == [words[row % len(words)] for row in expected]
    assert frame["side"].tolist() == ["word" if row < len(words) else "context" for row in expected]
    with pytest.raises(KeyError, match="'absent' is not among the 150 words"):
        tour.sharers(data, spec, "absent")


def test_the_map_has_a_place_for_each_slot():
    spec = HashSpec(40, 8, 61, block_size=2)
    figure = tour.draw_readers(spec)
    counts = np.asarray(figure.axes[0].images[0].get_array()).ravel()
    np.testing.assert_array_equal(counts[:61], tour.readers(spec))
    assert np.isnan(counts[61:].astype(float)).all()
    bars = [bar.get_height() for bar in figure.axes[1].patches]
    assert bars == [np.count_nonzero(tour.readers(spec) == number) for number in range(len(bars))]


def test_two_rows_are_drawn_at_their_slots():
    spec = HashSpec(40, 8, 30, block_size=2)
    sets = slot_sets(spec)
    axes = tour.draw_rows(spec, (4, 9), ("four", "nine")).axes[0]
    width = round(axes.get_xlim()[1] + 0.5)
    drawn = [
        {round(x) + width * round(y) for x, y in points.get_offsets().tolist()} for points in axes.collections
    ]
    assert drawn == [sets[4] - sets[9], sets[9] - sets[4], sets[4] & sets[9]]
    assert sets[4] & sets[9]  # else it shows little
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"{name}: {len(s)}" for name, s in zip(("four", "nine", "both"), drawn, strict=True)]


def test_figures_leave_settings_and_pyplot_alone():
    before = dict(mpl.rcParams), mpl.pyplot.get_fignums()
    tour.draw_readers(SPECS[0])
    assert (dict(mpl.rcParams), mpl.pyplot.get_fignums()) == before


@pytest.mark.parametrize("block_size", [1, 4])
def test_trained_vectors_hold_one_value_for_each_slot(data, block_size):
    gap, vectors = tour.hashed_vectors(data, 600, block_size, num_steps=10)
    assert 0 < gap < 1
    spec = tour.table_spec(data, 600, block_size)
    found = defaultdict(set)
    for row, column in np.ndindex(*vectors.shape):
        found[spec.locate(row, column)[0]].add(vectors[row, column].item())
    assert all(len(values) == 1 for values in found.values())
    again = tour.hashed_vectors(data, 600, block_size, num_steps=10)
    assert again[0] == gap
    np.testing.assert_array_equal(again[1], vectors)


def test_impossible_sizes_are_refused_by_name(data):
    with pytest.raises(ValueError, match="block_size must be at most embedding_dim=16, got 17"):
        tour.hashed_vectors(data, 600, 17)


def test_more_slots_come_nearer_to_the_optimum(data):
    gaps = [tour.hashed_vectors(data, pool_size)[0] for pool_size in (4000, 400, 40)]
    assert gaps == sorted(gaps)
    assert tour.full_vectors(data)[0] == 0


def test_neighbours_in_the_synthetic_text_are_of_one_topic(data):
    probes = [topic + "aa" for topic in tour.TOPICS]
    frame = tour.nearest(data, tour.full_vectors(data), probes, 4)
    assert all(near.startswith(probe[:-2]) for probe in probes for near in frame[probe])
    assert frame.columns.name == "gap 0.000"
    assert list(frame.index) == [1, 2, 3, 4]


def test_synthetic_text_is_reproducible():
    text = tour.synthetic_text(50, 30)
    assert text == tour.synthetic_text(50, 30) != tour.synthetic_text(50, 30, seed=1)
    lines = text.splitlines()
    assert len(lines) == 50
    for line in lines:
        own = [word for word in line.split() if word not in tour.COMMON]
        assert len(own) == 8
        assert len({word[:-2] for word in own}) == 1
    with pytest.raises(ValueError, match=r"must lie in \[1, 676\], got 677"):
        tour.synthetic_text(1, 677)


def test_the_synthetic_text_stands_in_for_a_corpus_that_is_missing(monkeypatch):
    def missing(corpus):
        raise FileNotFoundError(corpus)

    monkeypatch.setattr(corpora, "find_sources", missing)
    monkeypatch.setattr(tour, "load_pmi", lambda config: config)
    config = tour.load_data(max_vocab=70, rank=5)
    assert Path(config.corpus).read_text() == tour.synthetic_text()
    assert (config.max_vocab, config.rank) == (70, 5)
    assert tour.load_data("other.txt").corpus == "other.txt"
    monkeypatch.undo()


def test_wanted_words_come_first_if_they_are_known(data):
    found = tour.known_words(data, ["absent", "musicaa"], 3)
    assert found[0] == "musicaa"
    assert len(set(found)) == 3
    assert set(found) <= set(data.words) - set(tour.COMMON)


def test_the_tour_runs_without_a_browser_and_follows_its_sliders(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # What a reader's hand would do; each redraws in the outputs above it.
    notebook.cells.append(nbformat.v4.new_code_cell("pool.value, second.value = 1024, 'nowhere'"))
    small = {"corpus": "synthetic", "max_vocab": 120, "rank": 8, "num_steps": 5, "pool_size": 512}
    done = papermill.execute_notebook(
        notebook, str(tmp_path / "tour.ipynb"), small, kernel_name="python3", cwd=tmp_path, progress_bar=False
    )
    kinds = Counter(
        kind for cell in done.cells for output in cell.get("outputs", []) for kind in output.get("data", {})
    )
    assert kinds["application/vnd.jupyter.widget-view+json"] == 5
    shown = [
        output["data"]
        for cell in done.cells
        if cell.cell_type == "code" and "tour.live" in cell.source
        for output in cell.outputs
        if "application/vnd.jupyter.widget-view+json" not in output["data"]
    ]
    assert len(shown) == 5
    neighbours, readers, two, sharers, located = shown
    assert "gap" in neighbours["text/html"]
    assert readers["image/svg+xml"]
    assert "'nowhere' is not among the" in two["text/plain"]
    assert "context" in sharers["text/html"]
    spec = HashSpec(2**40, 8, 1024, signed=True)
    assert f"{spec.locate(123_456_789, 0)[0]:,}" in located["text/html"]


@pytest.mark.long
def test_the_tour_passes_as_it_is_stored():
    environment = {**os.environ, "CEMB_RESULTS": str(SCRATCH / "results"), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "pytest", "--nbmake", "-p", "no:cacheprovider", str(NOTEBOOK)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
