"""Tokens, vocabularies and encoded corpora, against `tokenize` and a counter."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cemb.pmi import corpora, readers
from cemb.pmi import encode as pmi_encode
from cemb.pmi.encode import EncodedCorpus, encode, tokenize

# Letters of many kinds, marks that combine, marks of punctuation, all that is special to the tokenizer.
CHARACTERS = (
    "abAB '’\n\t\r.!?-_190\"”»)<=>\0"
    "éÉßſKﬁ①²ⅷ½ŉİıΐΣςЖж中。！？﹒가\u1100\u1161\u11a8ガｶﾞ＇ʼ"
    "\u0300\u0301\u0338\u0345\u0327\u3099\u200d\u00a0\u2028\u0085\u3000\ufeff𝐀😀𐐀ǆᾳ\u00ad\u200b\u2060\ufe0f\u034f"
)


def stream(encoded):
    """The words of an encoded corpus in order, None for a border."""
    ids = np.concatenate(encoded.shards())
    return [encoded.words[i] if i >= 0 else None for i in ids]


def expected_stream(parts, kept):
    """The same from the tokens of the parts between borders."""
    found = []
    for part in parts:
        words = [word for word in part if word in kept]
        found += ([None] if found and words else []) + words
    return found


def vocabulary(tokens, min_count=1, max_vocab=None):
    counts = Counter(tokens)
    kept = sorted((w for w in counts if counts[w] >= min_count), key=lambda w: (-counts[w], w))[:max_vocab]
    return kept, [counts[w] for w in kept]


def check(text, borders=None, min_count=1, **options):
    """Encode a text from a file and compare with the reference."""
    parts = {"line": text.split("\n"), "sentence": pmi_encode.split_sentences(text)}.get(borders, [text])
    tokens = [tokenize(part) for part in parts]
    kept, counts = vocabulary(chain(*tokens), min_count)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(text, encoding="utf-8", newline="")
        if not kept:
            with pytest.raises(ValueError, match=r"empty file|no token|vocabulary is empty|is NUL"):
                encode(str(path), Path(folder) / "ids", min_count=min_count, borders=borders, **options)
            return
        encoded = encode(str(path), Path(folder) / "ids", min_count=min_count, borders=borders, **options)
        assert encoded.words == kept
        assert encoded.word_counts.tolist() == counts
        assert encoded.num_tokens == sum(map(len, tokens))
        assert stream(encoded) == expected_stream(tokens, set(kept))


def test_tokens():
    text = "Straße, naïve; Ελλάδα 42 Москва_1 rock’n’roll 'quoted' e-mail ②"
    words = ["strasse", "naïve", "ελλάδα", "москва", "rock'n'roll", "quoted", "e", "mail"]
    assert tokenize(text) == words
    check(text)


@pytest.mark.parametrize(
    "words",
    [
        ["हिन्दी", "भाषा"],  # vowel signs and a virama
        ["தமிழ்", "மொழி"],
        ["ที่นี่"],
        ["مُحَمَّد"],
        ["x̌y"],  # Unicode has no such letter in one
        ["می\u200cخواهم", "بروم"],  # a non-joiner inside a word
    ],
)
def test_marks_and_joiners_stay_in_their_words(words):
    text = " ".join(words) + " 5\u030c\u200d' \u0301"
    assert tokenize(text) == words
    assert tokenize(" ".join(f"{word}\u200d," for word in words)) == words
    check(text)


def test_what_is_not_seen_parts_no_word():
    """Default_Ignorable_Code_Point, as the Unicode Character Database derives it, and marks."""
    of_category = {}
    for code in range(sys.maxunicode + 1):
        of_category.setdefault(unicodedata.category(chr(code)), set()).add(code)
    numerals = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
    seen = {*numerals, *range(0xFFF9, 0xFFFC), *range(0x13430, 0x13441)}
    others = {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2065, 0x3164, 0xFFA0, *range(0xFFF0, 0xFFF9)}
    variations = {*range(0x180B, 0x180E), 0x180F, *range(0xFE00, 0xFE10)}
    ignorable = of_category["Cf"] - seen | others | variations | {*range(0xE0000, 0xE1000)}
    for code in ignorable - {0x200B, 0x200C, 0x200D}:
        assert tokenize(f"q{chr(code)}q") == ["qq"], hex(code)
    # A later Unicode may put some marks beyond the ranges that are searched.
    for code in set.union(*(of_category[kind] for kind in ("Mn", "Mc", "Me"))) - ignorable:
        text = f"q{chr(code)}q"
        assert tokenize(text) == [unicodedata.normalize("NFKC", text).casefold()]
    # A zero-width space is a place to break a line, and joiners may tell words apart.
    assert tokenize("a\u200bb c\u200cd e\u200df") == ["a", "b", "c\u200cd", "e\u200df"]
    assert tokenize("e\u00ad\u0301t\u200fe\ufe0f.") == ["éte"]
    check("co\u00adoperate, na\u2060ïve\u200e's \ufeffa\u200bb \u00ad \u00adc")


def test_no_letter_is_composed_of_what_separates():
    """Why runs may be tokenized by themselves: of all of Unicode, only these are composed so."""
    composed = {}
    for code in range(sys.maxunicode + 1):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and parts[0][0] != "<":
            composed.setdefault(chr(int(parts[0], 16)), []).append(chr(code))
    separators = {first for first in composed if first.isascii() and not first.isalpha()}
    assert separators == {"<", "=", ">"}
    assert not any(tokenize(character) for first in separators for character in composed[first])


@settings(deadline=None, max_examples=300)
@given(
    st.text(st.one_of(st.sampled_from(CHARACTERS), st.characters(exclude_categories=["Cs"]))),
    st.sampled_from([None, "line", "sentence"]),
    st.integers(1, 2),
)
@example("it''s 'tis o'er' a''b c'é'd ''", None, 1)
@example("e\u0301 =\u0338a \u0301b 1\u0327c _\u0345", None, 1)
@example('He said: "No." Yes! No.” A.b 1.5 c?\n\n \t\nd\n\ne。f！g ? h.é i.’ j', "sentence", 1)
@example("a.\n\n.b 'c' .' d .'e f", "sentence", 1)
def test_encoding_is_that_of_the_reference(text, borders, min_count):
    check(text.replace("\0", ""), borders, min_count)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.sampled_from(["a", "B", "c'd", "é", "É.", "中。中", "x. ", "\n", " ", "\t \r "]), max_size=60
    ),
    st.sampled_from([None, "line", "sentence"]),
    st.integers(1, 40),
    st.integers(2, 9),
    st.integers(1, 3),
)
def test_blocks_shards_and_threads_change_nothing(pieces, borders, block_bytes, shard_tokens, threads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmi_encode, "_BLOCK_BYTES", block_bytes)
        patch.setattr(pmi_encode, "_MAX_REMEMBERED_BYTES", 3)
        patch.setattr(readers, "_PIECE", 1 + block_bytes // 2)
        patch.setattr(readers, "_LONGEST_BLANK", 1)
        check(" ".join(pieces), borders, shard_tokens=shard_tokens, threads=threads)


def test_many_words_are_numbered_as_a_counter_does(tmp_path):
    """Enough distinct words, of ASCII and not, that all tables grow."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdeéжß"))
    words = ["".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(30_000)]
    tokens = [words[i] for i in rng.zipf(1.1, 120_000) % len(words)]
    (tmp_path / "text.txt").write_text(" ".join(tokens), encoding="utf-8")
    folded = [tokenize(token)[0] for token in tokens]
    kept, counts = vocabulary(folded, 2, 5000)
    encoded = encode(
        str(tmp_path / "text.txt"), tmp_path / "ids", min_count=2, max_vocab=5000, shard_tokens=2**14
    )
    assert encoded.words == kept
    assert encoded.word_counts.tolist() == counts
    assert encoded.num_tokens == 120_000
    known = set(kept)
    assert stream(encoded) == [word for word in folded if word in known]
    assert set(encoded.shard_sizes[:-1]) == {2**14}
    assert isinstance(encoded.shard(0), np.memmap)
    assert encoded.shard(0).dtype == np.int32


def test_the_default_corpus_is_encoded_as_ever(tmp_path, monkeypatch):
    """Part of it, with documents that hold what JSON and speeches hold."""
    dictionary, speeches = corpora.find_sources("gcide-sotu")
    parts = [
        corpora.Documents("gcide", dictionary.paths[:1], dictionary.documents),
        corpora.Documents("sotu", speeches.paths[:40], speeches.documents),
    ]
    monkeypatch.setattr(corpora, "find_sources", lambda *_: parts)
    encoded = encode("part", tmp_path / "ids")
    tokens = [
        token
        for part in parts
        for path in part.paths
        for text in part.documents(path)
        for token in tokenize(text)
    ]
    kept, counts = vocabulary(tokens, 5)
    assert encoded.num_tokens == len(tokens) > 200_000
    assert encoded.words == kept
    assert encoded.word_counts.tolist() == counts
    known = set(kept)
    assert stream(encoded) == [token for token in tokens if token in known]


def test_documents_are_parted_where_asked(tmp_path):
    for name, text in {"a.txt": "one two", "b.txt": "rare", "c.txt": "two. One\none"}.items():
        (tmp_path / name).write_text(text)
    found = {}
    for borders in (None, "document", "line", "sentence"):
        names = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")]
        found[borders] = stream(encode(names, tmp_path / f"{borders}", min_count=2, borders=borders))
    assert found == {
        None: ["one", "two", "two", "one", "one"],
        "document": ["one", "two", None, "two", "one", "one"],
        "line": ["one", "two", None, "two", "one", None, "one"],
        "sentence": ["one", "two", None, "two", None, "one", "one"],
    }


def test_the_manifest_tells_what_was_done(tmp_path):
    (tmp_path / "text.txt").write_text("b a a c")
    encoded = encode(str(tmp_path / "text.txt"), tmp_path / "ids", min_count=1)
    manifest = json.loads((tmp_path / "ids" / "manifest.json").read_text())
    assert manifest["sources"] == [{"name": str(tmp_path / "text.txt"), "num_bytes": 7}]
    assert (manifest["num_tokens"], manifest["num_words"], manifest["shard_sizes"]) == (4, 3, [4])
    digest = hashlib.sha256(b"a\nb\nc" + np.array([1, 0, 0, 2], np.int32).tobytes())
    assert encoded.fingerprint == f"sha256:{digest.hexdigest()}"
    assert sorted(p.name for p in (tmp_path / "ids").iterdir()) == [
        "SHA256SUMS",
        "ids-00000.npy",
        "manifest.json",
        "word_counts.npy",
        "words.txt",
    ]
    again = EncodedCorpus.open(tmp_path / "ids")
    assert (again.words, again.fingerprint) == (["a", "b", "c"], encoded.fingerprint)
    # The fingerprint is of words and ids, wherever they come from.
    (tmp_path / "other.txt").write_text("B A-A? C!")
    assert encode(str(tmp_path / "other.txt"), tmp_path / "2", min_count=1).fingerprint == encoded.fingerprint
    (tmp_path / "third.txt").write_text("a b a c")
    assert encode(str(tmp_path / "third.txt"), tmp_path / "3", min_count=1).fingerprint != encoded.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
        ({"max_vocab": 0}, "max_vocab must be at least 1, got 0"),
        ({"borders": "page"}, "borders must be one of document, line, sentence or None, got 'page'"),
        ({"shard_tokens": 1}, "shard_tokens must be at least 2, got 1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"min_count": 5}, r"none of the corpus's 2 words .* min_count=5 times \(the most frequent occurs 2"),
    ],
)
def test_bad_encoding_is_refused(tmp_path, options, message):
    (tmp_path / "text.txt").write_text("one two two")
    with pytest.raises(ValueError, match=message):
        encode(str(tmp_path / "text.txt"), tmp_path / "ids", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_the_manifest_counts_what_was_left_out_and_replaced(tmp_path):
    (tmp_path / "d").mkdir()
    name = os.fsdecode(b"caf\xe9.txt")  # no UTF-8 itself
    (tmp_path / "d" / name).write_bytes("one \ufffd one tw".encode() + b"\xf6")
    (tmp_path / "d" / "_SUCCESS").touch()
    encoded = encode(str(tmp_path / "d"), tmp_path / "ids", min_count=1, encoding_errors="replace")
    assert encoded.words == ["one", "tw"]
    assert encoded.tally == readers.Tally(num_left_out=1, num_replacements=1)
    text = (tmp_path / "ids" / "manifest.json").read_bytes().decode()
    assert "caf\\udce9.txt" in text
    assert json.loads(text)["sources"][0]["name"] == str(tmp_path / "d" / name)
    with pytest.raises(ValueError, match="encoding_errors must be one of strict, replace, got 'ignore'"):
        encode(str(tmp_path / "d"), tmp_path / "2", encoding_errors="ignore")


def test_a_folder_is_not_written_twice(tmp_path):
    (tmp_path / "text.txt").write_text("one two two")
    with pytest.raises(FileExistsError, match="exists already"):
        encode(str(tmp_path / "text.txt"), tmp_path, min_count=1)


def test_invalid_utf8_is_found_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(pmi_encode, "_BLOCK_BYTES", 40)
    monkeypatch.setattr(readers, "_PIECE", 16)
    content = "naïve words ".encode() * 9
    (tmp_path / "good.txt").write_bytes(content)
    (tmp_path / "latin.txt").write_bytes(content + "a café".encode("latin-1"))
    names = [str(tmp_path / name) for name in ("good.txt", "latin.txt")]
    message = rf"latin\.txt, line 1: not UTF-8 text: byte 0xe9 at position {len(content) + 5}, unexpected end"
    with pytest.raises(ValueError, match=message):
        encode(names, tmp_path / "ids")
    assert not (tmp_path / "ids").exists()


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    opened = Path.open
    (tmp_path / "text.txt").write_text("one two two")

    def full(path, mode="r", **options):
        return opened(Path("/dev/full") if path.name.startswith("ids-") else path, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"no space is left while writing .*make room"):
        encode(str(tmp_path / "text.txt"), tmp_path / "ids", min_count=1)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_a_killed_encoding_leaves_no_corpus(tmp_path):
    code = (
        "import sys; from cemb.pmi import encode, readers; encode._BLOCK_BYTES = readers._PIECE = 1000; "
        "encode.encode('-', sys.argv[1], min_count=1, shard_tokens=64)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "ids")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        process.stdin.write(b"some words to encode " * 1000)
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".ids-*/part-00003")):
            assert process.poll() is None
            assert time.monotonic() < deadline
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(FileNotFoundError, match=r"ids' has no manifest\.json, .* encode the corpus again"):
        EncodedCorpus.open(tmp_path / "ids")
    (left,) = tmp_path.glob(".ids-*")
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        EncodedCorpus.open(left)
    (tmp_path / "text.txt").write_text("one two two")
    assert encode(str(tmp_path / "text.txt"), tmp_path / "ids", min_count=1).words == ["two", "one"]
    assert not left.exists()


def _cut(path):
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("ids-00001.npy", Path.unlink, r"ids-00001\.npy is missing"),
        ("ids-00001.npy", _cut, r"the SHA-256 of ids-00001\.npy"),
        ("words.txt", _cut, r"the SHA-256 of words\.txt"),
        ("manifest.json", _cut, r"manifest\.json is not JSON"),
        ("manifest.json", lambda p: p.write_text('{"version": 7}'), "has version 7, and this reads"),
    ],
)
def test_damaged_corpora_are_refused(tmp_path, name, damage, message):
    (tmp_path / "text.txt").write_text("one two two")
    encode(str(tmp_path / "text.txt"), tmp_path / "ids", min_count=1, shard_tokens=2)
    damage(tmp_path / "ids" / name)
    with pytest.raises(ValueError, match=message):
        EncodedCorpus.open(tmp_path / "ids")


def test_an_encoded_corpus_is_no_text(tmp_path):
    (tmp_path / "text.txt").write_text("one two two")
    encode(str(tmp_path / "text.txt"), tmp_path / "ids", min_count=1)
    with pytest.raises(ValueError, match=r"is an encoded corpus, and no text; EncodedCorpus\.open reads it"):
        encode(str(tmp_path / "ids"), tmp_path / "again")


def test_the_command_line_encodes_standard_input(tmp_path):
    command = [
        sys.executable,
        "-m",
        "cemb",
        "encode",
        "-",
        "--out",
        str(tmp_path / "ids"),
        "--min-count",
        "1",
    ]
    done = subprocess.run(command, input=b"Hello, hello world", capture_output=True, cwd=ROOT, check=True)
    summary = json.loads(done.stdout)
    assert (summary["num_tokens"], summary["num_words"]) == (3, 2)
    assert re.search(rb"M tokens/s", done.stderr)
    assert EncodedCorpus.open(tmp_path / "ids").words == ["hello", "world"]
