"""Formats of text and of events: what was written is read, and what is damaged is refused."""

import bz2
import gzip
import io
import json
import lzma
import sys
import zipfile
from itertools import pairwise

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from cemb.pmi import readers
from cemb.pmi.events import read_events
from cemb.pmi.matrix import pmi_matrix

TEXT = "".join(f"wörd{k} and more, " for k in range(9000)).encode()


def texts(corpus, text_field=None):
    """The documents of a corpus, empty ones left out."""
    blocks = readers.read_blocks(readers.find_files(str(corpus), text_field), 1 << 16)
    documents = b"".join(block.data for block in blocks).split(b"\xff")
    return [document.strip(b"\n") for document in documents if document.strip()]


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_text_is_read_whole_or_refused(tmp_path, suffix):
    compress = COMPRESSORS[suffix]
    path = tmp_path / "text"  # told by its first bytes, not by its name
    path.write_bytes(compress(TEXT))
    assert texts(path) == [TEXT]
    path.write_bytes(compress(TEXT) + compress(b"and again"))
    assert texts(path) == [TEXT + b"and again"]
    for cut in (9, 400):
        path.write_bytes(compress(TEXT)[:-cut])
        with pytest.raises(ValueError, match=r"text is cut short: its compressed data end too early \("):
            texts(path)
    damaged = bytearray(compress(TEXT))
    damaged[12:60] = bytes(48)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"text is (damaged|cut short): .*\("):
        texts(path)


@given(st.lists(st.sampled_from(["a", "é", " ", "\n", "word", "\t "])), st.integers(1, 9), st.integers(1, 9))
def test_blocks_are_the_text_cut_between_words(parts, piece, num_bytes):
    class Text:
        name, num_bytes = "text", None

        def pieces(self, advance):
            data = "".join(parts).encode()
            yield from (data[k : k + piece] for k in range(0, len(data), piece))

    blocks = list(readers.read_blocks([Text(), Text()], num_bytes))
    document = "".join(parts).encode() + readers.DOCUMENT_BREAK
    assert b"".join(block.data for block in blocks) == (2 * document if parts else b"")
    for block, following in pairwise(blocks):
        assert block.data[-1:].isspace()
        assert not following.data[:1].isspace()
    # Each byte knows where it comes from.
    seen = [block.place(k) for block in blocks for k in range(len(block.data))]
    where = [f"text, byte {k} of its text" for k in range(len(document))]
    assert seen == (2 * where if parts else [])


def test_a_text_without_white_space_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_WORD", 1 << 17)
    (tmp_path / "text").write_bytes(b"x" * (1 << 22))
    with pytest.raises(ValueError, match="has no white space in 1 MiB: is it text"):
        texts(tmp_path / "text")


def test_directories_and_globs_are_read_in_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/.hidden", ".git/config", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}')
    assert texts(tmp_path) == [b'{"text": "a/z.txt"}', b'{"text": "b.txt"}', b"c.jsonl"]
    assert texts(tmp_path / "**" / "*.txt") == [b'{"text": "a/z.txt"}', b'{"text": "b.txt"}']


def test_zip_archives_are_read_member_by_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/one", TEXT)
        archive.writestr("two", b"second")
    assert texts(tmp_path / "t.zip") == [TEXT, b"second"]
    (tmp_path / "t.zip").write_bytes((tmp_path / "t.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"t\.zip is cut short or damaged \(zip\)"):
        texts(tmp_path / "t.zip")


@pytest.mark.parametrize("suffix", ["", *COMPRESSORS])
def test_json_lines_give_a_document_each(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(readers, "_PIECE", 7)
    lines = [{"text": "eins\nzwei", "n": 1}, {"text": None}, {"text": "“drei” \u0000"}]
    content = (
        "\n".join(json.dumps(line) for line in lines[:2]) + "\n\n" + json.dumps(lines[2], ensure_ascii=False)
    )
    path = tmp_path / f"t.jsonl{suffix and '.' + suffix}"
    path.write_bytes(COMPRESSORS.get(suffix, bytes)(content.encode()))
    assert texts(path) == [b"eins\nzwei", "“drei” \0".encode()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"t\.jsonl, line 2: not JSON \(.*\); JSON lines hold one object a line"),
        ('["a"]', r'line 2: expected a JSON object, got \["a"\]'),
        ('{"body": "a", "id": 3}', "line 2: no field 'text'; it has body, id"),
        ('{"text": 3}', "line 2: field 'text' must be a string, got 3"),
        ('{"text": "\\ud800"}', "line 2: field 'text' is not Unicode text"),
        ('{"text": "\udce9"}', "line 2: not UTF-8 text"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=message):
        texts(path)


@pytest.mark.parametrize(
    "type_", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_parquet_gives_a_document_a_row(tmp_path, type_):
    rows = ["eins\nzwei", None, "drei", *(f"wörd {k}" for k in range(3000))]
    table = pyarrow.table({"id": range(len(rows)), "body": pyarrow.array(rows, pyarrow.string()).cast(type_)})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=700)
    assert texts(tmp_path / "t.parquet", "body") == [row.encode() for row in rows if row]
    with pytest.raises(ValueError, match=r"t\.parquet has no column 'text'; it has id, body"):
        texts(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="column 'id' must hold strings, and holds int64"):
        texts(tmp_path / "t.parquet", "id")
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t\.parquet is not a whole Parquet file"):
        texts(tmp_path / "t.parquet", "body")


def test_standard_input_is_text_or_json_lines(monkeypatch):
    def feed(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))

    feed(gzip.compress(TEXT))
    assert texts("-") == [TEXT]
    feed(b'{"body": "eins"}\n{"body": "zwei"}\n')
    assert texts("-", "body") == [b"eins", b"zwei"]
    with pytest.raises(
        ValueError, match=r"standard input cannot be read twice.* encode it to a folder first"
    ):
        readers.find_files("-")[0].fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "'.*' is an empty file"),
        (b"abc\0def", "is not a text file: byte 3 is NUL"),
        (b"abc \xff\xfe", "is not UTF-8 text: byte 0xff at position 4"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / "text")


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or directory '/nowhere\.txt'"):
        readers.find_files("/nowhere.txt")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        readers.find_files(str(tmp_path / "*.txt"))
    with pytest.raises(ValueError, match=r"the directory .* holds no file"):
        readers.find_files(str(tmp_path))
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(ValueError, match=r"text_field='body' was asked for, and .* is plain text"):
        readers.find_files(str(tmp_path / "t.txt"), "body")


EVENTS = [("ann", "x"), ("bob", "y"), ("bob", "x"), ("ann", "x"), ("cid", None), ("bob", "x"), (None, "z")]


def _event_file(folder, suffix):
    path = folder / f"events.{suffix}"
    if suffix == "parquet":
        user, item = zip(*EVENTS, strict=True)
        parquet.write_table(pyarrow.table({"when": range(7), "item": item, "user": user}), path)
        return path
    separator = "\t" if "tsv" in suffix else ","
    rows = [("when", "item", "user"), *((str(k), i or "", u or "") for k, (u, i) in enumerate(EVENTS))]
    content = "".join(separator.join(row) + "\n" for row in rows).encode()
    path.write_bytes(COMPRESSORS.get(suffix.rpartition(".")[2], bytes)(content))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "csv.gz", "csv.zst"])
def test_events_are_counted(tmp_path, suffix):
    counts, users, items = read_events(str(_event_file(tmp_path, suffix)))
    assert (users, items) == (["bob", "ann"], ["x", "y"])
    assert counts.toarray().tolist() == [[2, 1], [2, 0]]
    assert counts.has_sorted_indices
    # Two files of the same events are twice the events.
    (tmp_path / "two").mkdir()
    for k in range(2):
        path = tmp_path / "two" / f"{k}.{suffix}"
        path.write_bytes(_event_file(tmp_path, suffix).read_bytes())
    assert (read_events(str(tmp_path / "two"))[0] != 2 * counts).nnz == 0


def test_events_go_the_way_of_text(tmp_path):
    rng = np.random.default_rng(0)
    user, item = rng.integers(40, size=3000), rng.zipf(1.5, 3000) % 30
    parquet.write_table(pyarrow.table({"u": user, "i": item}), tmp_path / "e.parquet")
    counts, users, items = read_events(str(tmp_path / "e.parquet"), "u,i")
    dense = np.zeros((40, 30))
    np.add.at(dense, (user, item), 1)
    assert np.array_equal(dense[np.ix_([int(u) for u in users], [int(i) for i in items])], counts.toarray())
    assert pmi_matrix(counts).shape == (len(users), len(items))
    assert (np.diff(counts.sum(0)) <= 0).all()
    assert (np.diff(counts.sum(1)) <= 0).all()


def test_bad_events_are_refused(tmp_path):
    path = _event_file(tmp_path, "csv")
    with pytest.raises(ValueError, match="events need two columns, as in user,item, got 'user'"):
        read_events(str(path), "user")
    with pytest.raises(ValueError, match=r"events\.csv has no column 'thing'; it has when, item, user"):
        read_events(str(path), "user,thing")
    with pytest.raises(ValueError, match=r"events\.parquet has no column 'thing'; it has when, item, user"):
        read_events(str(_event_file(tmp_path, "parquet")), "user,thing")
    with pytest.raises(ValueError, match="not from standard input"):
        read_events("-")
    path.write_text("user,item\n,\n")
    with pytest.raises(ValueError, match=r"there is no event in .*: no row has both 'user' and 'item'"):
        read_events(str(path))
    path.write_text("user,item\na,b\nc\n")
    with pytest.raises(ValueError, match=r"events\.csv cannot be read: .*Expected 2 columns, got 1"):
        read_events(str(path))
    damaged = _event_file(tmp_path, "csv.gz")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"events\.csv\.gz cannot be read: "):
        read_events(str(damaged))
