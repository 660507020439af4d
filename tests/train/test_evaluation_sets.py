"""Evaluation sets in the forms they are published in; scores against gensim's."""

import io
import itertools
import math
import re

import numpy as np
import pytest
import scipy.stats
from gensim.models import KeyedVectors

from cemb.train import evaluation_sets, similarity
from cemb.train.evaluation_sets import (
    AnalogySet,
    SimilaritySet,
    bundled_analogies,
    bundled_similarity,
    read_analogies,
    read_similarity,
)

PAIRS = [("sun", "sunlight", 50.0), ("Car", "auto", 49.5), ("sea", "ocean", 0.25)]
SIMLEX = "word1\tword2\tPOS\tSimLex999\tconc(w1)\tconc(w2)\tconcQ\tAssoc(USF)\tSimAssoc333\tSD(SimLex)\n"
RARE = "\t".join("1234567890")
# Files, as MEN, RG-65, WordSim, SimLex, SimVerb and RareWords are published, and as tools write them.
FORMS = {
    "tabs": "sun\tsunlight\t50.0\nCar\tauto\t49.5\nsea\tocean\t.25\n",
    "spaces": "sun sunlight 50.000000\nCar   auto  49.5\n  sea ocean 2.5e-1  \n",
    "spaces and a tab": "sun sunlight\t50\nCar auto\t49.5\nsea ocean\t0.25",
    "commas": "sun,sunlight,50\nCar, auto, 49.5\nsea,ocean,+0.25\n",
    "quoted": '"sun","sunlight","50"\n"Car",auto,49.5\n"sea","ocean",0.25\n',
    "line ends": "sun\tsunlight\t50\r\nCar\tauto\t49.5\r\nsea\tocean\t0.25\r\n",
    "old line ends": "sun sunlight 50\rCar auto 49.5\rsea ocean 0.25\r",
    "a byte order mark": "\ufeffsun\tsunlight\t50\nCar\tauto\t49.5\nsea\tocean\t0.25\n",
    "comments": "# a set\n#word1\tscore\n\nsun\tsunlight\t50\nCar\tauto\t49.5\n \n#\nsea\tocean\t0.25\n",
    "WordSim's header": "Word 1,Word 2,Human (mean)\nsun,sunlight,50\nCar,auto,49.5\nsea,ocean,0.25\n",
    "WordSim's judgements": (
        "Word 1,Word 2,Human (mean),1,2\nsun,sunlight,50,4,5\nCar,auto,49.5,1,1\nsea,ocean,0.25,1,9\n"
    ),
    "SimLex's header": SIMLEX
    + "".join(f"{a}\t{b}\tN\t{score}\t4\t4.5\t2\t7\t1\t1.2\n" for a, b, score in PAIRS),
    "no header, with a class": "".join(f"{a}\t{b}\tV\t{score}\tSYNONYMS\n" for a, b, score in PAIRS),
    "RareWords": "".join(f"{a}\t{b}\t{score}\t{RARE}\n" for a, b, score in PAIRS),
    "the score named last": "word1 word2 id similarity\n"
    + "".join(f"{a} {b} 7 {score}\n" for a, b, score in PAIRS),
    "numbers for names": "w1 w2 1 2 mean\n" + "".join(f"{a} {b} 7 8 {score}\n" for a, b, score in PAIRS),
    "a header of other names": "first,second,gold\nsun,sunlight,50\nCar,auto,49.5\nsea,ocean,0.25\n",
}


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_read(tmp_path, form):
    found = read_similarity(write(tmp_path / "a set.tsv", FORMS[form]))
    assert found == SimilaritySet("a set", PAIRS, False)


def test_words_with_spaces_stand_between_separators(tmp_path):
    text = 'new york,"Paris, Texas",5\n"a ""b""",c,1\n'
    found = read_similarity(write(tmp_path / "set.csv", text)).pairs
    assert found == [("new york", "Paris, Texas", 5), ('a "b"', "c", 1)]
    assert read_similarity(write(tmp_path / "set.tsv", 'new york\t"\t5\n"a"\t"b\t1\n')).pairs == [
        ("new york", '"', 5),
        ('"a"', '"b', 1),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no pairs of words"),
        ("# nothing\n\n", "holds no pairs of words"),
        ("word1 word2 score\n", "holds a header and no pairs of words"),
        ("a b 5\nc d\ne f 6\n", "line 2: wants two words and a score in column 3"),
        ("a b 5\n\n# x\nc d five\ne f 6\n", "line 4: wants two words and a score in column 3"),
        ("a b 5O\nc d 4\ne f 6\n", "line 1: wants two words"),  # no header
        ("a\tb\t5\nc d 6\n", "line 2: wants"),
        ("a,b,5\nc;d;6\ne,f,1\n", "line 2: wants"),
        ("a,b,5\nc,,6\n", "line 2: wants"),
        ("a b 5,5\nc d 6,5\n", "line 1: wants"),
        ("a b nan\nc d 1\ne f 2\n", "line 1: wants"),
        ("a b 1\nc d inf\ne f 2\n", "line 2: wants"),
        ("a b 1_0\nc d 1\ne f 2\n", "line 1: wants"),
        ('a,b,1\n"c,d,2\ne,f,3\n', "line 2: unexpected end of data"),
        ("1 brandy 5\n2 gin 6\n", "column 1 should hold words, and holds numbers alone"),
        (": capitals\nAthens Greece Baghdad Iraq\n", "line 1: wants"),
        ("a b 1\nc d\x001\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        ("a b 1\r\nc d 2\r\ncafé d 2\r\n".encode("cp1252"), "line 3: byte 0xe9 is not UTF-8"),
        (b"\xef\xbb\xbfa b 1\rc d\x96 2", "line 2: byte 0x96 is not UTF-8"),
    ],
)
def test_what_is_no_pair_is_refused_by_line(tmp_path, text, message):
    path = write(tmp_path / "set.txt", text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        read_similarity(path)


def test_questions_are_read(tmp_path):
    text = "\ufeff: capitals\r\nAthens Greece Baghdad Iraq\r\n\r\n# x\r\n: gram\r\na\tb c d\r\n"
    found = read_analogies(write(tmp_path / "questions.txt", text))
    assert found == AnalogySet("questions", [("Athens", "Greece", "Baghdad", "Iraq"), ("a", "b", "c", "d")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (": section\n", "holds no questions"),
        ("a b c d\na b c\n", "line 2: a question has four words, got 3: 'a b c'"),
        ("good better rough JJ_JJR rougher\n", "line 1: a question has four words, got 5"),
        ("able\tunable/incapable\n", "line 1: .*got 2: .*; pairs of words, as BATS has them, are not read"),
        (b"a b c d\n\xe9 b c d\n", "line 2: byte 0xe9 is not UTF-8"),
    ],
)
def test_what_is_no_question_is_refused_by_line(tmp_path, text, message):
    path = write(tmp_path / "set.txt", text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}"):
        read_analogies(path)


@pytest.mark.parametrize("read", [read_similarity, read_analogies])
def test_a_large_file_is_no_set(tmp_path, monkeypatch, read):
    monkeypatch.setattr(evaluation_sets, "_LARGEST_BYTES", 2**20)
    path = tmp_path / "vectors.bin"
    with path.open("wb") as file:
        file.truncate(2**40)  # of which nothing is on the disk
    with pytest.raises(ValueError, match="is no evaluation set: it has more than 1 MiB"):
        read(path)


@pytest.mark.parametrize(
    ("word", "bare"),
    [
        ("sun-n", "sun"),
        ("sun_NN", "sun"),
        ("runs_VBZ", "runs"),
        ("well-known/ADJ", "well-known"),
        ("well-known", "well-known"),
        ("t-shirt", "t-shirt"),
        ("_NN", "_NN"),
    ],
)
def test_marks_end_words(word, bare):
    assert evaluation_sets.unmarked(word) == bare


def score(words, pairs, vectors=None):
    if vectors is None:
        vectors = np.random.default_rng(0).normal(size=(len(words), 5))
    return similarity.similarity(vectors, words, pairs)


def test_marks_are_removed_only_if_all_words_have_them(tmp_path):
    text = "sun-n sunlight-n 50\ncar-n auto-n 49\nsea-n ocean-n 2\nlove-n hate-v 1\n"
    marked = read_similarity(write(tmp_path / "marked.txt", text))
    plain = read_similarity(write(tmp_path / "plain.txt", text.replace("hate-v", "hate")))
    assert (marked.is_marked, plain.is_marked) == (True, False)
    words = [word.partition("-")[0] for pair in marked.pairs for word in pair[:2]]
    assert score(words, marked)["pairs"] == 4
    assert score(words, plain)["pairs"] == 0
    # A vocabulary that has them is taken at its word: love-n is not love.
    vectors = np.random.default_rng(0).normal(size=(9, 5))
    found = score([*words, "love-n"], marked, vectors)
    rows = [(0, 1), (2, 3), (4, 5), (8, 7)]
    unit = similarity.normalized(vectors)
    expected = scipy.stats.spearmanr([unit[a] @ unit[b] for a, b in rows], [50, 49, 2, 1]).statistic
    assert found["score"] == pytest.approx(100 * expected)


def test_words_are_found_as_written_and_else_folded():
    words = ["us", "US", "PARIS", "Paris", "straße", "one"]
    vectors = np.random.default_rng(0).normal(size=(6, 4))
    pairs = [("US", "one", 3.0), ("Us", "one", 2.0), ("paris", "one", 1.0), ("STRASSE", "one", 5.0)]
    found = score(words, SimilaritySet("set", pairs), vectors)
    unit = similarity.normalized(vectors)
    rows = [1, 0, 2, 4]
    expected = scipy.stats.spearmanr([unit[row] @ unit[5] for row in rows], [3, 2, 1, 5]).statistic
    assert (found["pairs"], found["coverage"]) == (4, 100)
    assert found["score"] == pytest.approx(100 * expected)


def test_no_score_says_why():
    words = [chr(97 + i) for i in range(6)]
    pairs = [(a, b, float(i)) for i, (a, b) in enumerate(itertools.pairwise(words))]
    pairs += [("x", "y", 1.0), ("a", "x", 2.0), ("y", "a", 2.0)]
    few = score(words[:3], SimilaritySet("set", pairs))
    assert math.isnan(few["score"])
    assert few["no_score"] == "too few pairs: 2 in the vocabulary, and 3 are needed"
    assert (few["pairs"], few["pairs_total"], few["coverage"]) == (2, 8, 25)
    # All in one direction, at lengths whose cosines differ by rounding.
    line = np.outer(np.sqrt(np.arange(3.0, 9)), np.cbrt(np.arange(1.0, 40)))
    for dtype in (np.float32, np.float64):
        unit = similarity.normalized(line.astype(dtype))
        assert np.ptp(np.einsum("ij,ij->i", unit[1:], unit[:-1])) > 0
        for vectors in (line.astype(dtype), np.ones((6, 3), dtype), np.zeros((6, 3), dtype)):
            found = score(words, SimilaritySet("set", pairs), vectors)
            assert found["no_score"] == "no variation: all cosines are the same"
            assert math.isnan(found["score"])
            assert found["pairs"] == 5
    same = [(a, b, 4.0) for a, b, _ in pairs]
    assert score(words, SimilaritySet("set", same))["no_score"] == "no variation: all judgements are the same"
    assert score(words, SimilaritySet("set", pairs))["no_score"] is None
    questions = AnalogySet("set", [("b", "c", "d", "a"), ("a", "b", "c", "d"), ("a", "b", "c", "x")])
    for dtype in (np.float32, np.float64):
        for vectors in (line.astype(dtype), np.ones((6, 3), dtype), np.zeros((6, 3), dtype)):
            found = similarity.analogies(vectors, words, questions)
            assert found["no_score"] == "no variation: all cosines are the same"
            assert all(math.isnan(found[name]) for name in ("score", "mul_score", "low", "high"))
            assert (found["questions"], found["questions_total"]) == (2, 3)
    assert similarity.analogies(np.eye(6)[[5, 1, 5, 5, 5, 5]], words, questions)["no_score"] is None
    assert (
        similarity.analogies(np.outer([0, 1, 1, 1, 1, 1], np.ones(3)), words, questions)["no_score"] is None
    )
    none = similarity.analogies(np.eye(6), words, AnalogySet("set", [("a", "b", "c", "x")]))
    assert none["no_score"] == "too few questions: none has all its words in the vocabulary"
    assert (none["questions"], none["coverage"]) == (0, 0)


def test_an_answer_that_others_equal_is_not_right():
    """Whichever of its equals comes first."""
    words = ["a", "b", "c", "d", "e", "other"]
    vectors = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [0, 1, 1], [1, 0, 1]], np.float32)
    for answer in "de":
        found = similarity.analogies(vectors, words, AnalogySet("set", [("a", "b", "c", answer)]))
        assert (found["score"], found["mul_score"]) == (0, 0)
        alone = [words.index(word) for word in ("a", "b", "c", answer, "other")]
        names = [words[row] for row in alone]
        found = similarity.analogies(vectors[alone], names, AnalogySet("set", [("a", "b", "c", answer)]))
        assert (found["score"], found["mul_score"]) == (100, 100)


@pytest.fixture(scope="module")
def keyed():
    """Vectors of the sets' words in lower case, most frequent first, in gensim's own form."""
    questions = bundled_analogies().questions[:9000:7]
    words = [word for q in questions for word in q]
    words += [word for pairs in bundled_similarity() for a, b, _ in pairs.pairs[::2] for word in (a, b)]
    words = [*dict.fromkeys(word.casefold() for word in words)]
    found = KeyedVectors(20)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(words), 20)).astype(np.float32)
    row = {word: i for i, word in enumerate(words)}
    for a, b, c, d in questions[::3]:
        a, b, c, d = (row[word.casefold()] for word in (a, b, c, d))
        vectors[d] = vectors[c] - vectors[a] + vectors[b]
    found.add_vectors(words, vectors)
    return found


@pytest.mark.parametrize("place", [0, 1])
def test_similarity_equals_gensims(keyed, place, tmp_path):
    test_set = bundled_similarity()[place]
    path = write(tmp_path / "set.tsv", "".join(f"{a}\t{b}\t{score}\n" for a, b, score in test_set.pairs))
    _, (expected, _), out_of_vocabulary = keyed.evaluate_word_pairs(str(path))
    found = similarity.similarity(keyed.vectors, keyed.index_to_key, read_similarity(path))
    assert found["score"] == pytest.approx(100 * expected, abs=1e-3)
    assert found["coverage"] == pytest.approx(100 - out_of_vocabulary)
    assert 3 < found["pairs"] < found["pairs_total"]


def test_analogies_equal_gensims(keyed):
    path = evaluation_sets._bundled("questions-words.txt")
    expected, sections = keyed.evaluate_word_analogies(str(path))
    found = similarity.analogies(keyed.vectors, keyed.index_to_key, bundled_analogies())
    assert found["score"] == pytest.approx(100 * expected)
    assert 1 < found["score"] < 99
    assert found["questions"] == len(sections[-1]["correct"]) + len(sections[-1]["incorrect"])
    assert found["coverage"] == 100 * found["questions"] / found["questions_total"] < 100


def test_questions_at_once_are_few_where_words_are_many(keyed, monkeypatch):
    test_set = bundled_analogies()
    expected = similarity.analogies(keyed.vectors, keyed.index_to_key, test_set, max_questions=100)
    monkeypatch.setattr(similarity, "_MOST_COSINES", 3 * 7 * len(keyed.vectors))
    seen, normal = [], np.unique
    monkeypatch.setattr(np, "unique", lambda *a, **k: (seen.append(len(a[0])), normal(*a, **k))[1])
    assert similarity.analogies(keyed.vectors, keyed.index_to_key, test_set, max_questions=100) == expected
    assert seen == [7] * 14 + [2]


def test_the_bundled_sets_are_all_there():
    assert [(found.name, len(found.pairs)) for found in bundled_similarity()] == [
        ("wordsim353", 353),
        ("simlex999", 999),
    ]
    found = bundled_analogies()
    assert (found.name, len(found.questions)) == ("questions-words", 19544)
    text = evaluation_sets._bundled("wordsim353.tsv").read_text()
    expected = np.genfromtxt(io.StringIO(text), delimiter="\t", usecols=2)
    assert [score for *_, score in bundled_similarity()[0].pairs] == expected.tolist()
