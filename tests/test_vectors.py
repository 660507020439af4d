"""Vectors in other tools' formats: what gensim and numpy read back is what was written, bit for bit."""

import gzip
import itertools
import re
import struct

import numpy as np
import pytest
from conftest import long
from gensim.models import KeyedVectors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cemb import vectors
from cemb.vectors import FORMATS, Vectors, read, write

LINES = ("word2vec-text", "word2vec-binary", "glove")
# No white space and nothing that no encoding has: what all formats take.
WORDS = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=8)
ODD_WORDS = ["3", "2 2", "naïve", "日本", "\ufeffbom", "#hash", "nan", "-1e5", "\u200d", '"quoted"', "a_b"]
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 16777216, 0.1, 1 / 3, 5]


def bits(values):
    return values.shape, values.dtype, values.tobytes()


def check_same(found, expected):
    assert found.words == expected.words
    assert bits(found.values) == bits(expected.values)


def by_gensim(path, format):
    if format == "keyedvectors":
        keyed = KeyedVectors.load(str(path))
    else:
        options = {"binary": format == "word2vec-binary", "no_header": format == "glove"}
        keyed = KeyedVectors.load_word2vec_format(str(path), **options)
    return Vectors(keyed.index_to_key, keyed.vectors)


def by_numpy(path, format, dim):
    if format == "npy":
        values = np.load(path / "vectors.npy", allow_pickle=False)
        names = path / "words.txt"
    elif format == "tsv":
        values = np.loadtxt(path / "vectors.tsv", np.float32, delimiter="\t", ndmin=2)
        names = path / "metadata.tsv"
    else:
        options = {"comments": None, "encoding": "utf-8", "delimiter": " ", "ndmin": 2}
        options["skiprows"] = int(format == "word2vec-text")
        values = np.loadtxt(path, np.float32, usecols=range(1, dim + 1), **options)
        return Vectors(np.loadtxt(path, str, usecols=0, **options)[:, 0].tolist(), values)
    return Vectors(names.read_text(encoding="utf-8").split("\n")[:-1], values)


def random_vectors(num_words, dim, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(2**32, size=(num_words, dim), dtype=np.uint32).view(np.float32)
    values = np.where(np.isfinite(values), values, rng.normal(size=values.shape).astype(np.float32))
    values.flat[: len(SPECIAL)] = np.float32(SPECIAL[: values.size])
    words = [word.replace(" ", "") for word in ODD_WORDS]
    return Vectors([*words, *(f"w{i}" for i in range(num_words))][:num_words], values)


# gensim opens a file without a first line twice, and closes it once.
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (2, 2), (400, 30)])
@pytest.mark.parametrize("format", FORMATS)
def test_what_others_read_is_what_was_written(tmp_path, format, shape):
    """Of all bits that are finite, subnormal ones too, and words that look like something else."""
    expected = random_vectors(*shape)
    write(tmp_path / "out", expected, format)
    if format in (*LINES, "keyedvectors"):
        check_same(by_gensim(tmp_path / "out", format), expected)
    if format in ("word2vec-text", "glove", "npy", "tsv"):
        check_same(by_numpy(tmp_path / "out", format, shape[1]), expected)
    if format in LINES:
        check_same(read(tmp_path / "out"), expected)


@pytest.mark.parametrize("num_examples", [60, *long(3000)])
def test_what_is_read_is_what_was_written(tmp_path, num_examples):
    @settings(max_examples=num_examples, deadline=None)
    @given(st.data())
    def check(data):
        words = data.draw(st.lists(WORDS, min_size=1, max_size=5, unique=True))
        shape = len(words), data.draw(st.integers(1, 4))
        finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
        expected = Vectors(words, data.draw(hnp.arrays(np.float32, shape, elements=finite)))
        for format in LINES:
            write(tmp_path / "out", expected, format)
            check_same(read(tmp_path / "out"), expected)
            (tmp_path / "out.gz").write_bytes(gzip.compress((tmp_path / "out").read_bytes()))
            check_same(read(tmp_path / "out.gz"), expected)

    check()


def test_blocks_join(tmp_path, monkeypatch):
    expected = random_vectors(50, 3)
    for block in (1, 7, 3 * 50, 10**6):
        monkeypatch.setattr(vectors, "_BLOCK_VALUES", block)
        monkeypatch.setattr(vectors, "_PIECE", 40)
        for format in LINES:
            write(tmp_path / "out", expected, format)
            check_same(read(tmp_path / "out"), expected)


@pytest.mark.parametrize("binary", [True, False])
def test_what_gensim_and_word2vec_write_is_read(tmp_path, binary):
    expected = random_vectors(40, 5)
    keyed = KeyedVectors(5, count=0)
    keyed.add_vectors(expected.words, expected.values)
    keyed.save_word2vec_format(str(tmp_path / "gensim"), binary=binary)
    check_same(read(tmp_path / "gensim"), by_gensim(tmp_path / "gensim", LINES[binary]))
    # word2vec.c ends rows with a line break, and numbers with a space.
    rows = [
        b"%s %s\n"
        % (word.encode(), row.tobytes() if binary else b"".join(b"%.9e " % number for number in row))
        for word, row in zip(*expected, strict=True)
    ]
    (tmp_path / "word2vec").write_bytes(b"40 5\n" + b"".join(rows))
    check_same(read(tmp_path / "word2vec"), expected)


def test_text_of_other_systems(tmp_path):
    (tmp_path / "dos").write_bytes(b"2 2\r\na 1 2\r\nb 3 -4e0\r\n\r\n")
    found = read(tmp_path / "dos")
    assert (found.words, found.values.tolist()) == (["a", "b"], [[1, 2], [3, -4]])
    (tmp_path / "unended").write_bytes(b"a 1 2\nb 3 4")
    assert read(tmp_path / "unended").values.tolist() == [[1, 2], [3, 4]]


def test_one_column_is_not_taken_for_text_or_a_first_line(tmp_path):
    """Its four bytes may be digits and line breaks; with one at the end, the same file is text and binary."""
    for raw in map(bytes, itertools.product(b"1\n .\x80A", repeat=4)):
        (value,) = struct.unpack("<f", raw)
        expected = Vectors(["a", "b"], np.float32([[value], [value]]))
        write(tmp_path / "out", expected, "word2vec-binary")
        found = read(tmp_path / "out")
        if re.fullmatch(rb"(\d+\.?\d*|\.\d+) *\n", raw):
            expected = Vectors(["a", "b"], np.float32([[float(raw)]] * 2))
        check_same(found, expected)
    expected = Vectors(["12", "3"], np.float32([[5], [7]]))
    write(tmp_path / "out", expected, "glove")
    check_same(read(tmp_path / "out"), expected)


def one(word):
    return Vectors(["first", word], np.float32([[1, 2], [3, 4]]))


NOT_IN_LINES = ["a b", "a\tb", "a\nb", "a\rb", " a", "a\u00a0b", "a\u3000", "\u2028", "a\x1cb", "\x85"]
NOT_IN_FOLDERS = ["a\tb", "a\nb", "a\rb", "\u2028", "a\x1cb", "\x85", "a\n"]


@pytest.mark.parametrize(
    ("format", "refused"),
    [*((format, NOT_IN_LINES) for format in LINES), ("npy", NOT_IN_FOLDERS), ("tsv", NOT_IN_FOLDERS)],
)
def test_words_that_a_format_cannot_have(tmp_path, format, refused):
    for word in refused:
        with pytest.raises(ValueError, match=f"{format} has no words with") as error:
            write(tmp_path / "out", one(word), format)
        assert repr(word) in str(error.value)
        assert not list(tmp_path.iterdir())
    for i, word in enumerate(refused):
        write(tmp_path / f"{i}", one(word), format, escape=True)
        escaped = "_".join(word.split()) or "_"
        if word.strip() == word:
            names = (
                read(tmp_path / f"{i}") if format in LINES else by_numpy(tmp_path / f"{i}", format, 2)
            ).words
            assert names == ["first", escaped]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("", "a word has 1 to 65,536 bytes, and one is ''"),
        ("ü" * 40_000, "a word has 1 to 65,536 bytes, and one is 'üü"),
        ("a\ud800", "'a\\\\ud800' holds a lone surrogate"),
        ("first", "'first' is there twice$"),
    ],
)
def test_words_that_no_format_has(tmp_path, format, word, what):
    with pytest.raises(ValueError, match=what):
        write(tmp_path / "out", one(word), format)
    assert not list(tmp_path.iterdir())


def test_keyed_vectors_of_any_size_are_one_file(tmp_path):
    """gensim puts arrays of more than 10·2^20 values into files of their own."""
    values = np.arange(5300 * 2000, dtype=np.float32).reshape(5300, 2000)
    expected = Vectors([str(i) for i in range(5300)], values)
    write(tmp_path / "out", expected, "keyedvectors")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_same(by_gensim(tmp_path / "out", "keyedvectors"), expected)


@pytest.mark.parametrize("row", [0, 3, 8])
@pytest.mark.parametrize("binary", [True, False])
def test_a_value_that_is_not_finite_is_found_in_any_block(tmp_path, monkeypatch, binary, row):
    values = np.ones((9, 2), np.float32)
    values[row, 1] = np.inf
    keyed = KeyedVectors(2, count=0)
    keyed.add_vectors([f"w{i}" for i in range(9)], values)
    keyed.save_word2vec_format(str(tmp_path / "out"), binary=binary)
    place = f"binary row {row + 1}" if binary else f"line {row + 2}"
    for block in (1, 4, 6, 1000):
        monkeypatch.setattr(vectors, "_BLOCK_VALUES", block)
        with pytest.raises(ValueError, match=f"{place}: the vector of 'w{row}' is not finite"):
            read(tmp_path / "out")


def test_words_that_escape_alike_are_refused(tmp_path):
    both = Vectors(["a b", "c", "a_b"], np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="'a_b' is there twice when white space is escaped"):
        write(tmp_path / "out", both, "glove", escape=True)


def test_other_words_with_spaces(tmp_path):
    for format in ("npy", "tsv"):
        write(tmp_path / format, one("New York"), format)
        assert by_numpy(tmp_path / format, format, 2).words == ["first", "New York"]
    write(tmp_path / "keyed", one("New\nYork"), "keyedvectors")
    check_same(by_gensim(tmp_path / "keyed", "keyedvectors"), one("New\nYork"))


@pytest.mark.parametrize(
    "values",
    [np.zeros((2, 0)), np.zeros(2), np.zeros((3, 2)), np.zeros((2, 2)), np.float32([[1, np.nan], [0, 1]])],
)
def test_values_that_are_no_vectors_are_refused(tmp_path, values):
    dtype = np.float64 if values.shape == (2, 2) and np.isfinite(values).all() else np.float32
    with pytest.raises(ValueError, match="vectors must be"):
        write(tmp_path / "out", Vectors(["a", "b"], values.astype(dtype)), "glove")
    with pytest.raises(ValueError, match="format must be one of word2vec-text, "):
        write(tmp_path / "out", one("b"), "csv")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_and_a_folder_is_not(tmp_path):
    for format in FORMATS:
        write(tmp_path / format, one("b"), format)
        if format in vectors.FOLDERS:
            with pytest.raises(FileExistsError, match="exists already"):
                write(tmp_path / format, one("c"), format)
        else:
            write(tmp_path / format, one("c"), format)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FORMATS)
    check_same(read(tmp_path / "glove"), one("c"))


ROW = b"a " + bytes(8)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is not a file of vectors"),
        (b"\n", "is not a file of vectors"),
        (b"just words\n", "is not a file of vectors, its first line is b'just words"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "is not a file of vectors"),
        (b"\x80\x05\x95gensim.models.keyedvectors", "is not a file of vectors"),
        (b"0 2\n", "tells of 0 rows of 2 numbers"),
        (b"2 0\na\nb\n", "tells of 2 rows of 0 numbers"),
        (b"1000000000000 3\na 1 2 3\n", "which take at least 8,000,000,000,000 bytes, and at most 9 can"),
        (
            b"3 1000000000000\na 1 2 3\n",
            "of 1,000,000,000,000 numbers; a file has one row or more, of at most",
        ),
        (b"3 1000000\na 1 2 3\n", "which take at least 6,000,006 bytes"),
        (gzip.compress(b"1 2000000\na " + bytes(9 * 10**6)), "of at most 1,048,576"),
        (b"%s 3\na 1 2 3\n" % (b"9" * 99), "which take at least"),
        (b"3 2\na 1 2\nb 3 4\n\n      ", "line 4: the first line tells of 3 rows, and 2 are there"),
        (b"2 2\na 1 2\nb 3 4\nc 5 6\n", "line 4: more follows the 2 rows"),
        (b"2 2\na 1 2\nb 3\n  ", "line 3: 1 numbers follow the word b'b', and should be 2"),
        (b"2 2\na 1 2\nb 3 4 5\n", "line 3: 3 numbers follow"),
        (b"2 2\na 1 2\nb 3 x\n", "line 3: what follows the word b'b' is not 2 numbers"),
        (b"2 2\na 1 2\nb 3 1_0\n", "line 3: what follows the word b'b' is not 2 numbers"),
        (b"2 2\na 1 2\na 3 4\n", "line 3: the word 'a' has a row already"),
        (b"2 2\na 1 2\n 3 4\n ", "line 3: the row has no word"),
        (b"2 2\na 1 2\nb 3 nan\n", "line 3: the vector of 'b' is not finite"),
        (b"2 2\na 1 2\nb 3 1e39\n", "line 3: the vector of 'b' is not finite"),
        (b"2 2\na 1 2\nb\xff 3 4\n", r"line 3: the word b'b\\xff' is not UTF-8: byte 0xff at its position 1"),
        (b"a 1 2\n\nb 3 4\n", "line 2: after the last row follows b'b 3 4'"),
        (b"a 1 2\nb 3\n", "line 2: 1 numbers follow the word b'b'"),
        (b"a 1 2\n" + b"b" * 2**20 + b" 1 2\n", "line 2: it has more than 1,048,576 bytes"),
        (b"2 2\n" + ROW + b"b " + bytes(7), "which take at least 20 bytes, and at most 19 can be there"),
        (b"2 2\n" + ROW + b"bcd " + bytes(7), "binary row 2: the file ends, and the first line tells of 2"),
        (b"2 2\n" + ROW + b"b " + bytes(9), r"binary row 3: after the last row follows b'\\x00'"),
        (b"2 2\n" + ROW + ROW, "binary row 2: the word 'a' has a row already"),
        (b"2 2\n" + ROW + b" " + bytes(9), "binary row 2: b'' is no word"),
        (b"2 2\n" + ROW + b"b\nc " + bytes(8), r"binary row 2: b'b\\nc' is no word"),
        (b"2 2\n" + ROW + b"\xe4 " + bytes(8), "binary row 2: the word .* is not UTF-8"),
        (b"2 2\n" + ROW + b"b " + b"\xff" * 8, "binary row 2: the vector of 'b' is not finite"),
        (b"2 2\n" + ROW + b"b" * 2**17, "binary row 2: its word has more than 65,536 bytes"),
    ],
)
def test_files_that_hold_no_vectors_are_refused_by_name(tmp_path, content, what):
    (tmp_path / "some.vec").write_bytes(content)
    with pytest.raises(ValueError, match=what) as error:
        read(tmp_path / "some.vec")
    assert str(tmp_path / "some.vec") in str(error.value)


def test_damaged_compression_is_told(tmp_path):
    whole = gzip.compress(b"a 1 2\nb 3 4\n")
    for content, what in (
        (whole[:-9], "is cut short"),
        (whole[:12] + b"\xff\xff" + whole[14:], "is damaged"),
        (gzip.compress(b"100000000000 100\na 1 2\n"), "take at least"),
        (gzip.compress(b"900 2\na 1 2\n"), "line 3: the first line tells of 900 rows, and 1 are there"),
    ):
        (tmp_path / "a.gz").write_bytes(content)
        with pytest.raises(ValueError, match=what) as error:
            read(tmp_path / "a.gz")
        assert "a.gz" in str(error.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file of vectors"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
