"""Word vectors judged by similarity and analogy sets, and their nearest neighbours."""

import math
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse.linalg
import scipy.special
from tqdm import tqdm

from cemb.checks import check_integers
from cemb.train.evaluation_sets import AnalogySet, SimilaritySet, unmarked
from cemb.vectors import check_finite

# Cosines of the analogies' words with the vocabulary that are computed at once.
_MOST_COSINES = 2**28


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


class _Vocabulary:
    """Rows of words: as written, else case-folded, of several then the first."""

    def __init__(self, words: list[str]):
        self._exact = {word: row for row, word in enumerate(words)}
        self._folded = {words[row].casefold(): row for row in reversed(range(len(words)))}

    def row(self, word: str) -> int | None:
        row = self._exact.get(word)
        return self._folded.get(word.casefold()) if row is None else row


def similarity(
    vectors: npt.NDArray[Any], words: list[str], test_set: SimilaritySet, *, num_bootstrap: int = 500
) -> dict[str, Any]:
    """Spearman correlation of cosines with human judgements, in per cent, with a bootstrap interval.

    A word of the set is looked up as written, else case-folded; if it is not there and all words of the set
    have part-of-speech marks, so again without its mark. Pairs with a word that is not there are left out.

    Args:
        vectors: ``[words, dim]``.

    Returns:
        ``score``, the 95% interval ``low`` and ``high`` over pairs resampled with a seed that the set's name
        gives, ``pairs`` evaluated of ``pairs_total``, and ``coverage``, their ratio in per cent. Where there
        is no score, the three are NaN and ``no_score`` says why, which is None otherwise: ``too few pairs``,
        if fewer than 3 are in the vocabulary, or ``no variation``, if all cosines or all judgements are the
        same.

    Raises ValueError for vectors that are not finite.
    """
    check_integers(1, num_bootstrap=num_bootstrap)
    check_finite(vectors)
    vocabulary = _Vocabulary(words)

    def row(word: str) -> int | None:
        found = vocabulary.row(word)
        return vocabulary.row(unmarked(word)) if found is None and test_set.is_marked else found

    rows = [(row(a), row(b), score) for a, b, score in test_set.pairs]
    known = [(a, b, score) for a, b, score in rows if a is not None and b is not None]
    result: dict[str, Any] = dict.fromkeys(("score", "low", "high"), math.nan)
    result |= {"pairs": len(known), "pairs_total": len(rows)}
    result |= {"coverage": 100 * len(known) / max(1, len(rows)), "no_score": None}
    if len(known) < 3:
        return result | {"no_score": f"too few pairs: {len(known)} in the vocabulary, and 3 are needed"}
    left, right, human = (np.array(column) for column in zip(*known, strict=True))
    cosines = np.einsum("ij,ij->i", normalized(vectors[left]), normalized(vectors[right]))
    for what, is_constant in (("cosines", _do_not_vary(cosines)), ("judgements", np.ptp(human) == 0)):
        if is_constant:  # there is no correlation with what does not vary
            return result | {"no_score": f"no variation: all {what} are the same"}
    rng = np.random.default_rng(zlib.crc32(test_set.name.encode()))
    samples = rng.integers(len(known), size=(num_bootstrap, len(known)))
    low, high = np.nanpercentile(_correlations(human, cosines, samples), [2.5, 97.5])
    (score,) = _correlations(human, cosines, np.arange(len(known))[None])
    return result | {"score": 100 * float(score), "low": 100 * float(low), "high": 100 * float(high)}


def _do_not_vary(values: npt.NDArray[Any]) -> bool:
    """Whether cosines are the same but for rounding."""
    return bool(np.ptp(values) <= 8 * np.finfo(values.dtype).eps)


def _is_best_alone(scores: npt.NDArray[np.float32], place: int) -> bool:
    """Whether one of the scores is above all others; it is overwritten."""
    own = scores[place]
    scores[place] = -np.inf
    return bool(scores.max() < own)


def analogies(
    vectors: npt.NDArray[Any],
    words: list[str],
    test_set: AnalogySet,
    *,
    batch_size: int = 512,
    max_questions: int | None = None,
) -> dict[str, Any]:
    """Analogy questions, answered over the whole vocabulary but for the three words given.

    3CosAdd and 3CosMul answer them (Levy and Goldberg, 2014), the latter on cosines shifted to [0, 1] and
    with 0.001 added to the divisor. An answer is right if its word alone scores highest. Words are looked up
    as written, else case-folded; questions with a word that is not there are left out.

    Args:
        vectors: ``[words, dim]``.
        batch_size: questions answered at once, at most; fewer in a large vocabulary.
        max_questions: an even sample of the questions with all words; None: all.

    Returns:
        The shares answered rightly in per cent, by 3CosAdd as ``score`` and by 3CosMul as ``mul_score``;
        the bootstrap 95% interval ``low`` and ``high`` of the former over resampled questions;
        ``questions`` evaluated of ``questions_total``; ``coverage``, the share in per cent that has all its
        words in the vocabulary. Where there is no score, shares are NaN and ``no_score`` says why, which is
        None otherwise: ``too few questions``, if none has all its words in the vocabulary, or ``no
        variation``, if all cosines of the vocabulary are the same.

    Raises ValueError for vectors that are not finite.
    """
    check_integers(1, batch_size=batch_size, max_questions=max_questions)
    check_finite(vectors)
    vocabulary = _Vocabulary(words)
    rows = [[vocabulary.row(word) for word in question] for question in test_set.questions]
    known = np.array([question for question in rows if None not in question], dtype=np.int64)
    coverage = 100 * len(known) / max(1, len(rows))
    if max_questions is not None and len(known) > max_questions:
        known = known[np.linspace(0, len(known) - 1, max_questions).astype(int)]
    result = {"questions": len(known), "questions_total": len(rows), "coverage": coverage, "no_score": None}
    no_score = dict.fromkeys(("score", "mul_score", "low", "high"), math.nan) | result
    if len(known) == 0:
        return no_score | {"no_score": "too few questions: none has all its words in the vocabulary"}
    unit = normalized(vectors).astype(np.float32, copy=False)
    if _do_not_vary(unit @ unit[unit.any(axis=1).argmax()]):  # with one that is not zero, if there is any
        return no_score | {"no_score": "no variation: all cosines are the same"}
    batch_size = max(1, min(batch_size, _MOST_COSINES // (3 * len(unit))))
    # Made anew for each question, arrays of a large vocabulary cost more than what is computed in them.
    sums, products, divisors = np.empty((3, len(unit)), np.float32)
    added = multiplied = 0
    for first in tqdm(range(0, len(known), batch_size), desc="analogies", unit="batch", delay=2):
        batch = known[first : first + batch_size]
        # Questions share their words, so a batch needs far fewer rows of cosines than it has words.
        given, places = np.unique(batch[:, :3], return_inverse=True)
        cosines = unit[given] @ unit.T
        cosines += 1
        cosines /= 2
        for (*given_words, answer), (i, j, k) in zip(batch, places.reshape(-1, 3), strict=True):
            a, b, c = cosines[i], cosines[j], cosines[k]
            np.add(np.subtract(b, a, out=sums), c, out=sums)
            np.divide(np.multiply(b, c, out=products), np.add(a, 1e-3, out=divisors), out=products)
            sums[given_words] = products[given_words] = -np.inf
            added += _is_best_alone(sums, answer)
            multiplied += _is_best_alone(products, answer)
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
