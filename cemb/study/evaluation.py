"""Records of anyone's vectors: their scores on evaluation sets, and what compression costs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from cemb import files, saved, vectors
from cemb.study import records
from cemb.tables import all_rows, num_bytes
from cemb.train import compression, evaluation_sets, similarity
from cemb.train.evaluation_sets import AnalogySet, SimilaritySet

AnySet: TypeAlias = SimilaritySet | AnalogySet
_SAMPLE_ROWS = 1000


def read_vectors(path: Path, *, balanced: bool = False) -> vectors.Vectors:
    """Vectors of a model's folder, or of a file that `cemb.vectors.read` reads.

    Args:
        balanced: of folders, those that `cemb.vectors.balanced` makes with the contexts.

    ValueError for a file's balanced vectors, folders of npy and tsv, and vectors that are not finite.
    """
    if path.is_dir():
        for name in (f"vectors.{format}" for format in vectors.FOLDERS):
            if (path / name).exists():
                raise ValueError(
                    f"{str(path)!r} holds {name}: folders of {' and '.join(vectors.FOLDERS)} are written "
                    f"and not read; models' folders and {vectors.READABLE}"
                )
        found = saved.load(path).vectors(balanced)
        vectors.check_finite(found.values)
        return found
    if balanced:
        raise ValueError(f"{path} is no model's folder: balanced vectors need contexts")
    return vectors.read(path)


def check_readable(paths: Sequence[Path]) -> None:
    """Raise FileNotFoundError for the first that is not there."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no {str(path)!r}: vectors are a model's folder or a file")


def read_sets(
    similarity_files: Sequence[Path], analogy_files: Sequence[Path] = (), *, with_analogies: bool = True
) -> list[AnySet]:
    """The sets in files; without any, those that come with gensim, if that is installed.

    Args:
        with_analogies: of gensim's sets, the analogies, too.
    """
    if not (similarity_files or analogy_files):
        bundled: list[AnySet] = [*evaluation_sets.bundled_similarity()]
        if with_analogies:
            bundled.append(evaluation_sets.bundled_analogies())
        return [one for one in bundled if one[1]]  # without gensim they are empty
    pairs = [evaluation_sets.read_similarity(path) for path in similarity_files]
    questions = [evaluation_sets.read_analogies(path) for path in analogy_files]
    names = [one.name for one in pairs] + [one.name for one in questions]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sets have the name {name!r}, which is that of their files; rename one")
    return [*pairs, *questions]


def evaluate(
    given: vectors.Vectors,
    sets: Sequence[AnySet],
    *,
    max_questions: int | None = None,
) -> Iterator[records.Record]:
    """A record for each set, its name with what `similarity.similarity` or `similarity.analogies` returns."""
    for one in sets:
        size = {"num_words": len(given.words), "embedding_dim": given.values.shape[1], "set": one.name}
        if isinstance(one, SimilaritySet):
            found = similarity.similarity(given.values, given.words, one)
            yield {"kind": "similarity", **size, **found}
        else:
            found = similarity.analogies(given.values, given.words, one, max_questions=max_questions)
            yield {"kind": "analogies", **size, **found}


def line(record: records.Record) -> str:
    """A record of `evaluate` as a line of a table."""
    unit = "questions" if record["kind"] == "analogies" else "pairs"
    covered = f"{record[unit]:,} of {record[f'{unit}_total']:,} {unit}"
    if record["no_score"]:
        return f"{record['set']:20}   no score: {record['no_score']}"
    interval = f"{record['low']:.1f} to {record['high']:.1f}"
    return f"{record['set']:20} {record['score']:6.1f}  {interval:16} {covered}"


def _cosine_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """Root mean square difference of the cosines of a sample of rows."""
    rows = np.random.default_rng(0).permutation(len(before))[:_SAMPLE_ROWS]
    one, two = (similarity.normalized(side[rows].double().numpy()) for side in (before, after))
    return float(np.sqrt(np.square(one @ one.T - two @ two.T).mean()))


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _source_hash(source: Path) -> str:
    """Of a file, or of the sums of all files of a folder."""
    return files.file_hash(source / files.SUMS if source.is_dir() else source)


def _scores(
    when: str, words: list[str], values: npt.NDArray[np.float32], sets: Sequence[AnySet]
) -> records.Record:
    found = [*evaluate(vectors.Vectors(words, values), sets)]
    scores = {f"{one['set']}_{when}": None if one["no_score"] else one["score"] for one in found}
    return scores | {f"{one['set']}_pairs": one["pairs"] for one in found}


def compress(source: Path, out: Path, *, times: float, sets: Sequence[AnySet]) -> records.Record:
    """Write vectors as a `TransformCodedEmbedding` in a model's folder, and return the record of that.

    The table is in principal axes, see `cemb.train.compression`, so that what is exported of it has other
    values than `source`, and nearly its dot products and cosines.

    Args:
        source: a model's folder, or a file that `cemb.vectors.read` reads; rows by falling frequency.
        times: bytes of the vectors in float32 to those of the table, at least.
        sets: to score before and after.

    Returns:
        ``bytes_before``, ``bytes_after`` and their ratio, of values, codes, levels and scales, see
        `num_bytes`; ``source_bytes`` and ``folder_bytes``, of all files there are, words included;
        ``value_error`` and ``dot_product_error``, relative, see `compression.relative_errors`;
        ``cosine_error``, the root mean square over pairs of a sample of 1,000 rows; ``num_zero_rows``, of
        words that got no bits; for each set ``SET_before`` and ``SET_after``, its scores.

    Raises ValueError for more times than possible, and what `read_vectors` raises.
    """
    words, values = read_vectors(source)
    num_words, dim = values.shape
    max_bytes = compression.budget_bytes(num_words, dim, times)
    scores = _scores("before", words, values, sets)
    turned, _ = compression.principal_axes(torch.from_numpy(values))
    del values  # which are not needed twice
    table = compression.compress(turned, max_bytes)
    decoded = all_rows(table)
    value_error, dot_product_error = compression.relative_errors(turned, decoded)
    bytes_before, bytes_after = 4 * num_words * dim, num_bytes(table)
    record = {
        "kind": "compression",
        "vectors": str(source),
        "source_hash": _source_hash(source),
        "axes": "principal",
        "num_words": num_words,
        "embedding_dim": dim,
        "asked_ratio": times,
        "ratio": bytes_before / bytes_after,
        "bytes_before": bytes_before,
        "bytes_after": bytes_after,
        "value_error": value_error,
        "dot_product_error": dot_product_error,
        "cosine_error": _cosine_error(turned, decoded),
        "num_zero_rows": int((decoded == 0).all(dim=1).sum()),
        **scores,
        **_scores("after", words, decoded.numpy(), sets),
    }
    saved.save(out, table, words, details=record)
    sizes = {
        "source_bytes": _folder_bytes(source) if source.is_dir() else source.stat().st_size,
        "folder_bytes": _folder_bytes(out),
    }
    return {**record, "folder": str(out), **sizes, **records.provenance()}
