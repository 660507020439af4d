"""Formats of text and of events: what was written is read, and what is damaged is refused."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import threading
import tracemalloc
import uuid
import zipfile
from itertools import pairwise

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv, parquet

from cemb.pmi import readers
from cemb.pmi.events import read_events
from cemb.pmi.matrix import pmi_matrix

TEXT = "".join(f"wörd{k} and more, " for k in range(9000)).encode()


def texts(corpus, text_field=None, encoding_errors="strict", tally=None):
    """The documents of a corpus, empty ones left out."""
    files = readers.find_files(str(corpus), text_field, encoding_errors, tally)
    documents = b"".join(readers.read_blocks(files, 1 << 16)).split(b"\xff")
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
    padding = b"" if suffix == "zst" else bytes(8)
    path.write_bytes(compress(TEXT) + padding + compress(b"") + compress(b"and again") + padding)
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


def test_zstd_frames_without_data_are_skipped(tmp_path):
    frame, skipped = zstd(TEXT), b"\x53\x2a\x4d\x18\x04\0\0\0size"
    (tmp_path / "text").write_bytes(skipped + frame + skipped + zstd(b"") + skipped + frame + skipped)
    assert texts(tmp_path / "text") == [2 * TEXT]


@pytest.mark.parametrize(
    ("first", "needed"), [(b"", "2048 MiB"), (b"\x50\x2a\x4d\x18\0\0\0\0", "2048 MiB"), (zstd(b"a"), "more")]
)
def test_zstd_that_needs_a_longer_window_names_the_command(tmp_path, first, needed):
    frame = bytearray(zstd(TEXT))
    frame[5] = (31 - 10) << 3  # the window's exponent
    (tmp_path / "text").write_bytes(first + frame)
    message = (
        rf"text needs a zstd window of {needed}.*128 MiB can be read.* --long=31 --stdout .*text \| python"
    )
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / "text")


def test_a_zstd_file_of_one_segment_needs_a_window_of_its_size():
    header = b"\x28\xb5\x2f\xfd"
    assert readers._zstd_window(header + b"\xa0" + (200 << 20).to_bytes(4, "little") + bytes(9)) == 200 << 20
    assert readers._zstd_window(header + b"\xe1\7" + (3 << 30).to_bytes(8, "little") + bytes(9)) == 3 << 30
    assert readers._zstd_window(header + b"\0\x59" + bytes(12)) == (1 << 21) + (1 << 18)
    assert readers._zstd_window(header) == 0


@given(st.lists(st.sampled_from(["a", "é", " ", "\n", "word", "\t "])), st.integers(1, 9), st.integers(1, 9))
def test_blocks_are_the_text_cut_between_words(parts, piece, num_bytes):
    class Text:
        name, num_bytes = "text", None

        def pieces(self, advance):
            data = "".join(parts).encode()
            yield from (data[k : k + piece] for k in range(0, len(data), piece))

    blocks = list(readers.read_blocks([Text(), Text()], num_bytes))
    document = "".join(parts).encode() + readers.DOCUMENT_BREAK
    assert b"".join(blocks) == (2 * document if parts else b"")
    for block, following in pairwise(blocks):
        assert block[-1:].isspace()
        assert not following[:1].isspace()


def test_blocks_are_about_as_long_as_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_PIECE", 16)
    (tmp_path / "text").write_bytes(TEXT)
    blocks = list(readers.read_blocks(readers.find_files(str(tmp_path / "text")), 100))
    assert all(80 < len(block) < 120 for block in blocks[:-1])


def test_a_text_without_white_space_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_WORD", 1 << 17)
    (tmp_path / "text").write_bytes(b"x" * (1 << 22))
    with pytest.raises(ValueError, match="has no white space in 1 MiB: is it text"):
        texts(tmp_path / "text")


def test_blanks_are_read_in_little_memory():
    class Blanks:
        name = "blanks"

        def pieces(self, advance):
            for content in (b" ", b"\n", b"\t"):
                yield b"word"
                yield from [content * (1 << 20)] * 100

    assert b"".join(readers.read_blocks([Blanks()], 1 << 20)) == (
        b"word" + b" " * 100 + b"word" + b"\n" * 200 + b"word" + b" " * 100 + readers.DOCUMENT_BREAK
    )


def test_a_line_of_json_has_a_longest_length(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(readers, "_PIECE", 1 << 16)
    path = tmp_path / "t.jsonl"
    text = "x" * ((1 << 20) - 20)
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "end"}))
    assert texts(path) == [text.encode(), b"end"]
    path.write_text('{"text": "a"}\n\n' + json.dumps([text] * 9))
    with pytest.raises(ValueError, match=r"t\.jsonl, line 3: longer than 1 MiB; JSON lines hold one object"):
        texts(path)


def test_directories_and_globs_are_read_in_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/.hidden", ".git/config", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}')
    assert texts(tmp_path) == [b'{"text": "a/z.txt"}', b'{"text": "b.txt"}', b"c.jsonl"]
    assert texts(tmp_path / "**" / "*.txt") == [b'{"text": "a/z.txt"}', b'{"text": "b.txt"}']
    assert texts(tmp_path / "**") == texts(tmp_path)
    assert texts(tmp_path / "*" / "[a-z].txt") == [b'{"text": "a/z.txt"}']
    assert texts(tmp_path / "a" / ".h*") == [b'{"text": "a/.hidden"}']
    assert texts(tmp_path / ".git" / "*") == [b'{"text": ".git/config"}']


@pytest.mark.parametrize("corpus", ["", "**/*.txt", "**", "**/**/*.txt", "*", "[abd]/**/*.txt"])
def test_each_file_is_read_once_whatever_links_lead_to_it(tmp_path, monkeypatch, corpus):
    for name in ("data/b/two.txt", "data/three.txt", "linked/deep/one.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    data = tmp_path / "data"
    (data / "0").symlink_to(data)
    (data / "b" / "again").symlink_to("..")
    (data / "0.txt").symlink_to("b/two.txt")
    (data / "z.txt").hardlink_to(data / "three.txt")
    (data / "a").symlink_to(tmp_path / "linked")
    (data / "d").symlink_to("a")
    (data / "nothing.txt").symlink_to("gone")
    monkeypatch.chdir(data)
    found = [str(file.path) for file in readers.find_files(corpus or ".")]
    whole = ["a/deep/one.txt", "b/two.txt", "three.txt"]
    expected = {"*": ["0.txt", "three.txt"], "[abd]/**/*.txt": ["a/deep/one.txt", "b/two.txt"]}
    assert [name for name in found if "again" not in name] == expected.get(corpus, whole)
    assert len({(data / name).stat().st_ino for name in found}) == len(found)


NO_DATA = (
    *(
        "_SUCCESS",
        "_metadata",
        "_delta_log/0.json",
        "._x",
        ".part.crc",
        "part.CRC",
        "__MACOSX/x",
        "Thumbs.db",
    ),
    *("desktop.ini", "SHA256SUMS", "t.txt.md5", "lost+found/x"),
)


@pytest.mark.parametrize("kind", ["folder", "glob", "zip"])
def test_what_is_no_data_is_left_out_and_counted(tmp_path, kind):
    for name in (*NO_DATA, "_day=1/text", "x_y"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"\0" if name in NO_DATA else name.encode())
    corpus = {"folder": tmp_path / "d", "glob": tmp_path / "d" / "**", "zip": tmp_path / "d.zip"}[kind]
    if kind == "zip":
        with zipfile.ZipFile(corpus, "w") as archive:
            for path in sorted((tmp_path / "d").rglob("*")):
                archive.write(path, path.relative_to(tmp_path / "d"))
    tally = readers.Tally()
    assert texts(corpus, tally=tally) == [b"_day=1/text", b"x_y"]
    assert tally == readers.Tally(num_left_out=len(NO_DATA))


def test_what_is_left_out_is_told_where_nothing_remains(tmp_path):
    (tmp_path / "_SUCCESS").write_text("a")
    with pytest.raises(ValueError, match="holds no file, but for 1 left out as no data"):
        texts(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file matches .*, but for 1 left out as no data"):
        texts(tmp_path / "*")
    assert texts(tmp_path / "_SUCCESS") == [b"a"]
    assert texts(tmp_path / "_*") == [b"a"]


@pytest.mark.parametrize("content", [TEXT, gzip.compress(TEXT), zstd(TEXT)])
def test_a_pipe_is_read_once(tmp_path, content):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (file,) = readers.find_files(str(pipe))
    assert file.num_bytes is None
    with pytest.raises(ValueError, match=r"pipe cannot be read twice.* -m cemb encode .*pipe --out FOLDER"):
        file.fingerprint()
    with pytest.raises(ValueError, match="events are read from files, not from standard input or a stream"):
        read_events(str(pipe))
    writer = threading.Thread(target=pipe.write_bytes, args=[content])
    writer.start()
    advanced = []
    assert b"".join(file.pieces(advanced.append)) == TEXT
    assert sum(advanced) == len(TEXT)
    writer.join()
    writer = threading.Thread(target=pipe.write_bytes, args=[b'{"body": "a"}'])
    writer.start()
    assert texts(pipe, "body") == [b"a"]
    writer.join()


def test_a_stream_is_not_read_from_its_end(tmp_path):
    for name in ("t.parquet", "t.zip"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is a stream, and .* is read from its end: save it"):
            readers.find_files(str(tmp_path / name))
    with pytest.raises(ValueError, match="/dev/zero cannot be read twice"):
        readers.find_files("/dev/zero")[0].fingerprint()


def test_zip_archives_are_read_member_by_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/one", TEXT)
        archive.writestr("two", b"second")
    assert texts(tmp_path / "t.zip") == [TEXT, b"second"]
    with pytest.raises(ValueError, match=r"t\.zip holds no three"):
        list(readers.File(tmp_path / "t.zip", "zip", member="three").pieces(lambda _: None))
    (tmp_path / "t.zip").write_bytes((tmp_path / "t.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"t\.zip is cut short or damaged \(zip\)"):
        texts(tmp_path / "t.zip")


@pytest.mark.parametrize(
    ("signature", "offset", "value", "message"),
    [
        (b"PK\1\2", 8, 1, r"t\.zip cannot be read \(zip\): .* is encrypted"),
        (b"PK\1\2", 10, 99, r"t\.zip cannot be read \(zip\): That compression method is not supported"),
        (b"PK\1\2", 45, 0x7F, r"t\.zip is cut short or damaged \(zip\)"),  # where the member starts
        (b"PK\1\2", 17, 0, r"t\.zip is cut short or damaged \(zip\): Bad CRC-32"),
        (b"PK\3\4", 60, 0xFF, r"t\.zip is cut short or damaged \(zip\)"),  # what is compressed
        (b"PK\5\6", 19, 0x7F, r"t\.zip is cut short or damaged \(zip\)"),  # where the directory starts
    ],
)
def test_damaged_zip_archives_are_named(tmp_path, signature, offset, value, message):
    with zipfile.ZipFile(tmp_path / "t.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one", TEXT)
    content = bytearray((tmp_path / "t.zip").read_bytes())
    content[content.rindex(signature) + offset] = value
    (tmp_path / "t.zip").write_bytes(content)
    with pytest.raises(ValueError, match=message):
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
        ('{"text": "\udce9"}', "line 2: not UTF-8 text: byte 0xe9 at position 24, invalid continuation byte"),
        ('{"text": ' + "[" * 100_000, "line 2: not JSON .*recursion"),
        ('{"text": ' + "1" * 5000 + "}", "line 2: not JSON .*4300 digits"),
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


def test_a_parquet_column_of_nulls_holds_no_document(tmp_path):
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3)}), tmp_path / "0.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "1.parquet")
    assert texts(tmp_path) == [b"one"]


@pytest.mark.parametrize(("group", "batch"), [(1 << 25, 1 << 40), (0, 1 << 23)])
def test_a_text_that_rows_of_parquet_share_is_read_in_little_memory(tmp_path, monkeypatch, group, batch):
    monkeypatch.setattr(readers, "_PARQUET_GROUP", group)
    monkeypatch.setattr(readers, "_PARQUET_BATCH", batch)
    shared = pyarrow.DictionaryArray.from_arrays(np.zeros(300, np.int32), ["x" * (1 << 20)])
    table = pyarrow.table({"text": shared})
    parquet.write_table(table, tmp_path / "t.parquet", store_schema=False)  # which would say dictionary
    (file,) = readers.find_files(str(tmp_path / "t.parquet"))
    tracemalloc.start()
    assert sum(map(len, file.pieces(lambda _: None))) == 300 * ((1 << 20) + len(readers.DOCUMENT_BREAK))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20
    assert pyarrow.default_memory_pool().max_memory() < 64 << 20


def _not_utf8(folder, kind):
    content = b"caf\xc3\xa9\nna\xefve \xe2\x82 end"
    path = folder / {"text": "t.txt", "json": "t.jsonl", "zip": "t.zip", "parquet": "t.parquet"}[kind]
    if kind == "text":
        path.write_bytes(content)
    elif kind == "json":
        path.write_bytes(b'{"text": "caf\xc3\xa9"}\n{"text": "na\xefve \xe2\x82 end"}')
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("one", content)
    else:
        ends = np.array([0, 5, 5 + len(content[6:])], np.int32)
        buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(content[:5] + content[6:])]
        table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)})
        parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("kind", ["text", "json", "zip", "parquet"])
@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
def test_bytes_that_are_not_utf8_are_refused_or_replaced(tmp_path, monkeypatch, kind, piece):
    monkeypatch.setattr(readers, "_PIECE", piece)
    path = _not_utf8(tmp_path, kind)
    where = {"text": "line 2: .* at position 8", "json": "line 2: .* at position 30"}
    where |= {"zip": "t.zip, one, line 2: .* at position 8", "parquet": "row 2: .* at position 2"}
    with pytest.raises(ValueError, match=rf"{where[kind]}.*--encoding-errors replace"):
        texts(path)
    tally = readers.Tally()
    replaced = "caf\u00e9 na\ufffdve \ufffd end"
    assert " ".join(text.decode() for text in texts(path, None, "replace", tally)).split() == replaced.split()
    assert tally == readers.Tally(num_replacements=2)


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
        (b"abc \xff\xfe", "line 1: not UTF-8 text: byte 0xff at position 4, invalid start byte"),
        (b"abc\n\xe2\x82", "line 2: not UTF-8 text: byte 0xe2 at position 4, unexpected end of data"),
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


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", *(f"csv.{suffix}" for suffix in COMPRESSORS)])
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


@pytest.mark.parametrize(
    "content",
    [
        b"user,item\ra,x\rb,y\r",
        b'"not\nthis","user",item\r\n1,a,x\r\n"2\n",b,"y"\r\n',
        b"\xef\xbb\xbfitem,user\nx,a\ny,b",
        b"user,item,other\na,x," + b"z" * 3_000_000 + b"\nb,y,\n",
    ],
)
def test_events_are_read_by_the_rules_of_csv(tmp_path, content):
    (tmp_path / "e.csv").write_bytes(content)
    counts, users, items = read_events(str(tmp_path / "e.csv"))
    assert (counts.toarray().tolist(), users, items) == ([[1, 0], [0, 1]], ["a", "b"], ["x", "y"])


def test_columns_of_events_have_many_types(tmp_path):
    ids = [uuid.UUID(int=k << 90) for k in (3, 5)]
    users = {
        "uuid": pyarrow.array([ids[0].bytes, ids[1].bytes, None], pyarrow.uuid()),
        "null": pyarrow.nulls(3),
        "number": pyarrow.array([7, 8, None]),
        "category": pyarrow.array(["p", "q", None]).dictionary_encode(),
    }
    for name, column in users.items():
        parquet.write_table(pyarrow.table({"user": column, "item": ["x"] * 3}), tmp_path / f"{name}.parquet")
    assert read_events(str(tmp_path))[1] == sorted([*map(str, ids), "7", "8", "p", "q"])


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("plays", [[3, 0, 2, None, 1], [3.0, 0.0, 2.0, None, 1.0]])
def test_a_column_counts_events(tmp_path, suffix, plays):
    table = pyarrow.table({"user": list("abacb"), "item": list("xyxyy"), "plays": plays})
    path = tmp_path / f"e.{suffix}"
    (parquet.write_table if suffix == "parquet" else csv.write_csv)(table, path)
    counts, users, items = read_events(str(path), count_column="plays")
    assert (counts.toarray().tolist(), users, items) == ([[5, 0], [0, 1]], ["a", "b"], ["x", "y"])
    assert read_events(str(path))[0].sum() == 5


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("plays", "message"),
    [
        ([1, -2], "row 2: expected a whole number of events, 0 or more, got '?-2"),
        ([1, 0.5], r"row 2: .*, got '?0\.5"),
        (["1", "many"], "row 2: .*, got 'many'"),
        ([1, 2**53], r"the column 'plays' counts 2\*\*53 events or more"),
        ([0, None], "no row has both 'user' and 'item', and 'plays' above 0"),
    ],
)
def test_what_counts_no_events_is_refused(tmp_path, suffix, plays, message):
    path = tmp_path / f"e.{suffix}"
    table = pyarrow.table({"user": ["a", "b"], "item": ["x", "y"], "plays": plays})
    (parquet.write_table if suffix == "parquet" else csv.write_csv)(table, path)
    with pytest.raises(ValueError, match=message):
        read_events(str(path), count_column="plays")


def test_a_name_that_rows_of_parquet_share_is_read_in_little_memory(tmp_path):
    shared = pyarrow.DictionaryArray.from_arrays(np.zeros(300, np.int32), ["x" * (1 << 20)])
    table = pyarrow.table({"user": shared, "item": shared})
    parquet.write_table(table, tmp_path / "e.parquet", store_schema=False)
    counts, users, _ = read_events(str(tmp_path / "e.parquet"))
    assert (counts.toarray().tolist(), len(users[0])) == ([[300]], 1 << 20)
    assert pyarrow.default_memory_pool().max_memory() < 64 << 20


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
    with pytest.raises(ValueError, match="count_column='item' is one of the columns 'user,item' already"):
        read_events(str(path), count_column="item")
    with pytest.raises(ValueError, match=r"events\.csv has no column 'plays'; it has when, item, user"):
        read_events(str(path), count_column="plays")
    path.write_text("user,item\n,\n")
    with pytest.raises(ValueError, match=r"there is no event in .*: no row has both 'user' and 'item'"):
        read_events(str(path))
    path.write_text("user,item\na,b\nc\n")
    with pytest.raises(ValueError, match=r"events\.csv cannot be read: .*Expected 2 columns, got 1"):
        read_events(str(path))
    for content in (b"\n", b"user,item\na,\xe9\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"events\.csv cannot be read: "):
            read_events(str(path))
    path.write_bytes(b'user,item\n"' + b"a,\n" * (3 << 20))
    with pytest.raises(ValueError, match="a row is longer than 4 MiB, or a quote is left open"):
        read_events(str(path))
    for suffix in COMPRESSORS:
        damaged = _event_file(tmp_path, f"csv.{suffix}")
        damaged.write_bytes(damaged.read_bytes()[:-9])
        with pytest.raises(ValueError, match=rf"events\.csv\.{suffix} cannot be read: "):
            read_events(str(damaged))
    damaged = _event_file(tmp_path, "parquet")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"events\.parquet cannot be read: "):
        read_events(str(damaged))
