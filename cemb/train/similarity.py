"""Word vectors judged by similarity and analogy sets, and their nearest neighbours."""

import math
import zlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse.linalg
import scipy.special

from cemb.checks import check_integers
from cemb.vectors import check_finite


def normalized(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows scaled to length 1; zero rows stay zero. ValueError for rows that are not finite."""
    check_finite(vectors)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _centred_ranks(values: npt.NDArray[Any], samples: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Ranks in each row of ``values[samples]``, those of equal values averaged, less their mean.

    Counting serves where rows are drawn from the same few values, and needs none of `scipy.stats`, which
    takes a second to import.
    """
    distinct, places = np.unique(values, return_inverse=True)
    places = places[samples]
    counts = np.stack([np.bincount(row, minlength=len(distinct)) for row in places])
    by_value: npt.NDArray[np.float64] = counts.cumsum(axis=1) - (counts - 1) / 2 - (samples.shape[1] + 1) / 2
    return np.take_along_axis(by_value, places, axis=1)


def _correlations(
    left: npt.NDArray[Any], right: npt.NDArray[Any], samples: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Spearman's rank correlation in each row of resampled pairs; NaN where one side does not vary."""
    ranks, others = (_centred_ranks(values, samples) for values in (left, right))
    spread = np.sqrt(np.square(ranks).sum(axis=1) * np.square(others).sum(axis=1))
    found: npt.NDArray[np.float64] = (ranks * others).sum(axis=1) / np.where(spread > 0, spread, np.nan)
    return found


SIMILARITY_SETS = {"wordsim353": "wordsim353.tsv", "simlex999": "simlex999.txt"}


def _test_data(name: str) -> list[str]:
    """Lines of an evaluation set that ships in gensim's wheel; none if gensim is not installed."""
    try:
        path = Path(str(distribution("gensim").locate_file(f"gensim/test/test_data/{name}")))
    except PackageNotFoundError:
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def similarity(
    vectors: npt.NDArray[Any], words: list[str], name: str, *, num_bootstrap: int = 500
) -> dict[str, float]:
    """Spearman correlation of cosines with human judgements, in per cent, with a bootstrap interval.

    Args:
        vectors: ``[words, dim]``.
        name: ``"wordsim353"`` (Finkelstein et al., 2002) or ``"simlex999"`` (Hill et al., 2015).

    Returns:
        ``score``, the 95% interval ``low`` and ``high`` over pairs resampled with a fixed seed, ``pairs``
        evaluated and ``pairs_total``. Scores are NaN where fewer than 3 pairs are in the vocabulary, or all
        cosines are the same.

    Raises ValueError for vectors that are not finite.
    """
    check_integers(1, num_bootstrap=num_bootstrap)
    index = {word: i for i, word in enumerate(words)}
    pairs = [line.casefold().split("\t") for line in _test_data(SIMILARITY_SETS[name])]
    known = [(index[a], index[b], float(s)) for a, b, s in pairs if a in index and b in index]
    result = {"pairs": len(known), "pairs_total": len(pairs)}
    if len(known) < 3:
        return {"score": math.nan, "low": math.nan, "high": math.nan, **result}
    left, right, human = (np.array(column) for column in zip(*known, strict=True))
    unit = normalized(vectors)
    cosines = np.einsum("ij,ij->i", unit[left], unit[right])
    if np.ptp(cosines) == 0:  # there is no correlation with what does not vary
        return {"score": math.nan, "low": math.nan, "high": math.nan, **result}
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    samples = rng.integers(len(known), size=(num_bootstrap, len(known)))
    low, high = np.nanpercentile(_correlations(human, cosines, samples), [2.5, 97.5])
    (score,) = _correlations(human, cosines, np.arange(len(known))[None])
    return {"score": 100 * float(score), "low": 100 * float(low), "high": 100 * float(high), **result}


def analogies(
    vectors: npt.NDArray[Any],
    words: list[str],
    *,
    batch_size: int = 512,
    max_questions: int | None = None,
) -> dict[str, float]:
    """Google's analogy questions (Mikolov et al., 2013), answered over the whole vocabulary.

    3CosAdd and 3CosMul answer them (Levy and Goldberg, 2014), the latter on cosines shifted to [0, 1] and
    with 0.001 added to the divisor.

    Returns:
        The shares answered rightly in per cent, by 3CosAdd as ``score`` and by 3CosMul as ``mul_score``;
        the bootstrap 95% interval ``low`` and ``high`` of the former over resampled questions;
        ``questions`` evaluated of ``questions_total``. Shares are NaN if no question is covered.
        `max_questions` takes an even sample.

    Raises ValueError for vectors that are not finite.
    """
    check_integers(1, batch_size=batch_size, max_questions=max_questions)
    index = {word: i for i, word in enumerate(words)}
    questions = [line.casefold().split() for line in _test_data("questions-words.txt") if line[0] != ":"]
    known = np.array([[index[w] for w in q] for q in questions if all(w in index for w in q)])
    if max_questions is not None and len(known) > max_questions:
        known = known[np.linspace(0, len(known) - 1, max_questions).astype(int)]
    result: dict[str, float] = {"questions": len(known), "questions_total": len(questions)}
    if len(known) == 0:
        return dict.fromkeys(("score", "mul_score", "low", "high"), math.nan) | result
    unit = normalized(vectors).astype(np.float32)
    added = multiplied = 0
    for first in range(0, len(known), batch_size):
        batch = known[first : first + batch_size]
        # Questions share their words, so a batch needs far fewer rows of cosines than it has words.
        given, rows = np.unique(batch[:, :3], return_inverse=True)
        cosines = (unit[given] @ unit.T + 1) / 2
        for (*given_words, answer), (i, j, k) in zip(batch, rows.reshape(-1, 3), strict=True):
            a, b, c = cosines[i], cosines[j], cosines[k]
            sums, products = b - a + c, b * c / (a + 1e-3)
            sums[given_words] = products[given_words] = -np.inf
            added += sums.argmax() == answer
            multiplied += products.argmax() == answer
    # The quantiles of resampling the questions without end, which is a binomial distribution's.
    at_most = scipy.special.bdtr(np.arange(len(known) + 1), len(known), added / len(known))
    low, high = np.searchsorted(at_most, [0.025, 0.975])
    counts = {"score": added, "mul_score": multiplied, "low": low, "high": high}
    return {name: 100 * float(count) / len(known) for name, count in counts.items()} | result


def neighbours(
    vectors: npt.NDArray[Any], words: list[str], word: str, count: int = 10
) -> list[tuple[str, float]]:
    """The `count` words of highest cosine with `word`; KeyError if it is not in the vocabulary."""
    check_integers(1, count=count)
    if word not in words:
        raise KeyError(f"{word!r} is not among the {len(words):,} words of the vocabulary")
    unit = normalized(vectors)
    cosines = unit @ unit[words.index(word)]
    best = [i for i in np.argsort(-cosines) if words[i] != word][:count]
    return [(words[i], float(cosines[i])) for i in best]
