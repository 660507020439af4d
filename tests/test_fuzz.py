"""Inputs and records with random faults: read, or refused by the name of the file, in bounded memory."""

import bz2
import gc
import gzip
import io
import json
import lzma
import resource
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import long, zipf_text
from hypothesis import given, settings
from hypothesis import strategies as st

from cemb import cli, vectors
from cemb.commands import COMMANDS
from cemb.pmi import readers
from cemb.pmi.corpora import find_sources
from cemb.pmi.events import read_events
from cemb.study import records
from cemb.train.evaluation_sets import read_analogies, read_similarity

TEXT = ("Der Löwe, der 3. von 4, “isst”…\nnoch eine Zeile\r\n\u00adwords\u200c and 日本語。 " * 9).encode()
LINES = b"".join(json.dumps({"text": f"line {i} ü", "n": i}).encode() + b"\n" for i in range(40))
PAIRS = b"word1\tword2\tscore\n" + b"".join(f"w\u00f6rd-n\tb{i}-v\t{i / 7}\tx\n".encode() for i in range(30))
EVENTS = b"user,item,plays\n" + b"".join(f'u{i % 7},"i,{i % 5}",{i % 3}\n'.encode() for i in range(60))


def _parquet(compression):
    frame = {"text": ["one two", None, "drei " * 30] * 5, "item": ["a", "b", None] * 5, "user": ["x"] * 15}
    out = io.BytesIO()
    pa.parquet.write_table(pa.table(frame), out, compression=compression)
    return out.getvalue()


def _zip(compression):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name in ("one.txt", "folder/two.txt", "__MACOSX/._one.txt"):
            archive.writestr(name, TEXT)
    return out.getvalue()


def _zstd(data):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def read_text(path):
    return b"".join(readers.read_blocks(find_sources(str(path)), 1000))


def events_of(path):
    counts, users, items = read_events(str(path), "user,item")
    return counts.shape == (len(users), len(items))


def _vectors(format):
    values = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out"
        vectors.write(path, vectors.Vectors([f"wörd{i}" for i in range(60)], values), format)
        return path.read_bytes()


def read_vectors(path):
    words, values = vectors.read(path)
    assert len({*words}) == len(words) == len(values)
    assert np.isfinite(values).all()
    return words


INPUTS = {
    "a.txt": (TEXT, read_text),
    "a.txt.gz": (gzip.compress(TEXT), read_text),
    "b.txt.gz": (gzip.compress(TEXT) + gzip.compress(TEXT), read_text),
    "a.txt.bz2": (bz2.compress(TEXT), read_text),
    "a.txt.xz": (lzma.compress(TEXT), read_text),
    "a.txt.zst": (_zstd(TEXT), read_text),
    "a.jsonl": (LINES, read_text),
    "a.jsonl.gz": (gzip.compress(LINES), read_text),
    "a.parquet": (_parquet("snappy"), read_text),
    "b.parquet": (_parquet("none"), read_text),
    "a.zip": (_zip(zipfile.ZIP_DEFLATED), read_text),
    "b.zip": (_zip(zipfile.ZIP_STORED), read_text),
    "a.csv": (EVENTS, events_of),
    "a.tsv": (EVENTS.replace(b",", b"\t"), events_of),
    "a.csv.gz": (gzip.compress(EVENTS), events_of),
    "c.parquet": (_parquet("snappy"), events_of),
    "set.tsv": (PAIRS, read_similarity),
    "set.csv": (PAIRS.replace(b"\t", b","), read_similarity),
    "questions.txt": (b": s\n" + b"athens greece oslo norway\n" * 20, read_analogies),
    "records.jsonl": (LINES, records.read),
    "text.vec": (_vectors("word2vec-text"), read_vectors),
    "text.vec.gz": (gzip.compress(_vectors("word2vec-text")), read_vectors),
    "vectors.bin": (_vectors("word2vec-binary"), read_vectors),
    "vectors.bin.gz": (gzip.compress(_vectors("word2vec-binary")), read_vectors),
    "glove.txt": (_vectors("glove"), read_vectors),
}
OTHERS = (
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b'"',
    b",",
    b"{",
    b"[",
    b"\x80",
    b"999999999",
    b"\x1f\x8b",
)


def mutated(data, rng):
    """Some bytes of `data` flipped, cut, doubled, zeroed, or in place of others."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        first, size = int(rng.integers(len(data) + 1)), int(rng.geometric(0.2))
        piece = data[first : first + size]
        kind = rng.integers(6)
        if kind == 0:
            data[first : first + size] = bytes(byte ^ (1 << int(rng.integers(8))) for byte in piece)
        elif kind == 1:
            del data[first : first + size]
        elif kind == 2:
            data[first:first] = piece * int(rng.integers(1, 50))
        elif kind == 3:
            data[first : first + size] = bytes(len(piece))
        elif kind == 4:
            data[first:first] = OTHERS[rng.integers(len(OTHERS))]
        else:
            del data[first:]
    return bytes(data)


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("num_inputs", [100, *long(5900)])
@pytest.mark.parametrize("name", INPUTS)
def test_faulty_input_is_read_or_refused_by_name(tmp_path, record_property, name, num_inputs):
    data, read = INPUTS[name]
    (tmp_path / name).write_bytes(data)
    assert read(tmp_path / name)
    before = peak_mib()
    for seed in range(num_inputs):
        path = tmp_path / f"{seed}-{name}"
        path.write_bytes(mutated(data, np.random.default_rng([seed, num_inputs])))
        try:
            read(path)
        except ValueError as error:
            assert path.name in str(error), f"seed {seed}: {error}"
        path.unlink()
    assert peak_mib() - before < 300
    record_property("faulty inputs", num_inputs)


_OPTIONS = ["--out", "--rank", "--seeds", "--corpus", "--num-steps", "--memory", "--table", "--threads"]
_VALUES = ["-1", "0", "nan", "1e400", "8.5", "None", "hashed", "--", "-h", "=", "/dev/null", "2GiB"]
_WORDS = st.sampled_from([*_OPTIONS, *_VALUES])
_ARGUMENTS = st.lists(st.one_of(_WORDS, st.text(max_size=5), st.integers().map(str)), max_size=5)


@pytest.mark.parametrize("num_inputs", [100, *long(3000)])
def test_faulty_arguments_are_one_line(record_property, capsys, num_inputs):
    @settings(max_examples=num_inputs, deadline=None)
    @given(st.sampled_from(sorted(COMMANDS)), _ARGUMENTS)
    def parse(name, arguments):
        try:
            cli.parse([name, *arguments])
        except ValueError as error:
            assert str(error).strip()
        except SystemExit as ended:
            assert not ended.code
        capsys.readouterr()

    # tyro parses sources, and CPython 3.11's parser fails if a collection calls hypothesis meanwhile.
    gc.disable()
    try:
        parse()
    finally:
        gc.enable()
    record_property("faulty arguments", num_inputs)


def test_some_mutations_are_refused_and_some_are_text(tmp_path):
    """Where all were refused, or none, the tests above would try little."""
    (tmp_path / "a.txt").write_text(zipf_text(2000, 50))
    refused = 0
    for seed in range(50):
        path = tmp_path / f"{seed}.txt"
        path.write_bytes(mutated((tmp_path / "a.txt").read_bytes(), np.random.default_rng(seed)))
        try:
            read_text(path)
        except ValueError:
            refused += 1
    assert 5 < refused < 45
