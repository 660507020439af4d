import math
import warnings
import zlib

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

from cemb.train import evaluation_sets, similarity
from cemb.train import objective as train_objective
from cemb.train.batches import PairBatches
from cemb.vectors import balanced


@pytest.mark.parametrize("block_columns", [7, 4096])
def test_all_cells_loss_equals_the_dense_one(random_matrix, block_columns, monkeypatch):
    monkeypatch.setattr(train_objective.SparseMatrix, "BLOCK_COLUMNS", block_columns)
    matrix = random_matrix.astype(np.float64)
    objective = train_objective.AllCellsLoss(matrix)
    torch.manual_seed(0)
    words = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    contexts = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    dense = (torch.from_numpy(matrix.toarray()) - words @ contexts.T).square().sum()
    loss = objective(words, contexts)
    torch.testing.assert_close(loss, dense)
    for got, expected in zip(
        torch.autograd.grad(3 * loss, (words, contexts)),
        torch.autograd.grad(3 * dense, (words, contexts)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(objective, (words, contexts))


def test_all_cells_loss_in_float32_is_accurate(random_matrix):
    words, contexts = torch.randn(40, 6), torch.randn(30, 6)
    dense = (
        torch.from_numpy(random_matrix.toarray()).double() - words.double() @ contexts.double().T
    ).square()
    assert train_objective.AllCellsLoss(random_matrix)(words, contexts).item() == pytest.approx(
        dense.sum().item(), rel=1e-5
    )


def test_optimum_equals_the_dense_svd(random_matrix):
    best = train_objective.optimum(random_matrix, 5)
    values = np.linalg.svd(random_matrix.toarray().astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(best.singular_values, values[:5], rtol=1e-4)
    assert best.loss == pytest.approx(np.square(values[5:]).sum(), rel=1e-4)
    for power in (0, 0.5, 1):
        words, contexts = best.factors(power)
        error = np.square(random_matrix.toarray() - words @ contexts.T).sum()
        assert best.gap(error) == pytest.approx(0, abs=1e-4)
    assert best.gap(np.square(random_matrix.data).sum()) == pytest.approx(1, rel=1e-5)


def _weighted_problem(random_matrix):
    rng = np.random.default_rng(1)
    matrix = random_matrix.astype(np.float64)
    a, b = rng.gamma(2.0, size=40), rng.gamma(2.0, size=30)
    return matrix, a, b, np.outer(a, b)


def test_weighted_loss_equals_the_dense_one(random_matrix):
    matrix, a, b, weights = _weighted_problem(random_matrix)
    objective = train_objective.WeightedLoss(matrix, a, b)
    torch.manual_seed(0)
    words = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    contexts = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    errors = (torch.from_numpy(matrix.toarray()) - words @ contexts.T).square()
    dense = (torch.from_numpy(weights) * errors).sum()
    loss = objective(words, contexts)
    torch.testing.assert_close(loss, dense)
    for got, expected in zip(
        torch.autograd.grad(loss, (words, contexts)),
        torch.autograd.grad(dense, (words, contexts)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(objective, (words, contexts))
    plain = train_objective.WeightedLoss(random_matrix, np.ones(40), np.ones(30))
    factors = words.detach().float(), contexts.detach().float()
    assert plain(*factors) == train_objective.AllCellsLoss(random_matrix)(*factors)


def test_weighted_optimum_is_where_descent_ends(random_matrix):
    matrix, a, b, weights = _weighted_problem(random_matrix)
    objective = train_objective.WeightedLoss(matrix, a, b)
    best = objective.optimum(4)
    # Alternating weighted least squares on the dense matrix, which knows nothing of the scaled SVD.
    dense, contexts = matrix.toarray(), np.random.default_rng(0).normal(size=(30, 4))
    for _ in range(500):
        words = np.stack(
            [
                np.linalg.lstsq(np.sqrt(w)[:, None] * contexts, np.sqrt(w) * row)[0]
                for w, row in zip(weights, dense, strict=True)
            ]
        )
        contexts = np.stack(
            [
                np.linalg.lstsq(np.sqrt(w)[:, None] * words, np.sqrt(w) * column)[0]
                for w, column in zip(weights.T, dense.T, strict=True)
            ]
        )
    loss = objective(torch.from_numpy(words), torch.from_numpy(contexts)).item()
    assert best.gap(loss) == pytest.approx(0, abs=1e-6)
    assert best.gap((weights * dense**2).sum()) == pytest.approx(1)


def test_frequency_weights():
    np.testing.assert_allclose(train_objective.frequency_weights(np.array([4, 1, 1]), 0.5), [1.5, 0.75, 0.75])
    np.testing.assert_allclose(train_objective.frequency_weights(np.array([4, 1, 1]), 0), 1)


@pytest.mark.parametrize("bad", [np.ones(29), np.zeros(30), np.full(30, np.inf), np.ones((30, 1)), 1.0])
def test_bad_weights_are_refused(bad, random_matrix):
    with pytest.raises(ValueError, match="context_weights must be 30 positive numbers, got shape"):
        train_objective.WeightedLoss(random_matrix, np.ones(40), bad)


def test_balanced_vectors_do_not_depend_on_how_factors_share():
    rng = np.random.default_rng(0)
    words, contexts, mix = (rng.normal(size=shape) for shape in ((40, 6), (30, 6), (6, 6)))

    def cosines(vectors):
        unit = similarity.normalized(vectors)
        return unit @ unit.T

    mixed = words @ mix, contexts @ np.linalg.inv(mix).T
    expected = cosines(words @ contexts.T)
    for factors in ((words, contexts), mixed):
        np.testing.assert_allclose(cosines(balanced(*factors)), expected, atol=1e-9)
    assert np.abs(cosines(mixed[0]) - cosines(words)).max() > 0.1
    single = balanced(words.astype(np.float32), contexts.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(cosines(single), expected, atol=1e-5)


def test_balanced_vectors_of_an_svd_are_scaled_by_its_singular_values(random_matrix):
    best = train_objective.optimum(random_matrix, 5)
    for power in (0, 0.5, 1):
        found = balanced(*best.factors(power))
        np.testing.assert_allclose(found, best.left * best.singular_values, rtol=1e-4, atol=1e-4)


def test_bad_matrices_and_ranks_are_refused(random_matrix):
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 30\) .* got 30"):
        train_objective.optimum(random_matrix, 30)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        train_objective.optimum(random_matrix, 0)
    with pytest.raises(ValueError, match=r"of zeros, \(4, 5\), is not determined"):
        train_objective.optimum(sp.csr_array((4, 5), dtype=np.float32), 1)
    with pytest.raises(ValueError, match="a matrix must be of float32 or float64, got int64"):
        train_objective.AllCellsLoss(random_matrix.astype(np.int64))
    random_matrix.indices[0] = 30
    with pytest.raises(ValueError, match="indices"):
        train_objective.SparseMatrix(random_matrix)
    random_matrix.indices[0], random_matrix.data[0] = 0, np.nan
    for call in (train_objective.AllCellsLoss, lambda matrix: train_objective.optimum(matrix, 2)):
        with pytest.raises(ValueError, match="a matrix must be finite, got values from nan to nan"):
            call(random_matrix)


def test_cells_listed_twice_are_summed(random_matrix):
    halves = [random_matrix / 2, random_matrix / 2]
    listed = sp.csr_array(
        (
            np.concatenate([part.data for part in halves]).reshape(2, -1).T.ravel(),
            np.repeat(random_matrix.indices, 2),
            2 * random_matrix.indptr,
        ),
        shape=random_matrix.shape,
    )
    assert listed.nnz == 2 * random_matrix.nnz
    for found, expected in zip(
        *([train_objective.AllCellsLoss(m), train_objective.optimum(m, 3)] for m in (listed, random_matrix)),
        strict=True,
    ):
        assert found.squared_norm == expected.squared_norm
    (pairs, targets), *_ = PairBatches(listed, 4 * random_matrix.nnz, negative_share=0).epoch(0)
    np.testing.assert_array_equal(random_matrix.toarray()[tuple(pairs.T.numpy())], targets.numpy())
    assert len(targets) == random_matrix.nnz


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_factors_of_a_matrix_of_lower_rank_are_zero_beyond_it(power):
    best = train_objective.Optimum(
        np.eye(4, 3, dtype=np.float32), np.array([2, 1, 0], np.float32), np.eye(5, 3, dtype=np.float32), 5.0
    )
    words, contexts = best.factors(power)
    np.testing.assert_allclose(words @ contexts.T, np.diag([2, 1, 0, 0, 0])[:4], atol=1e-6)
    low = sp.csr_array(np.outer(np.arange(1, 9), np.ones(7)).astype(np.float32))
    words, contexts = train_objective.optimum(low, 4).factors(power)
    np.testing.assert_allclose(words @ contexts.T, low.toarray(), atol=1e-2)


@pytest.fixture
def wordsim():
    """WordSim-353, case-folded, and its words."""
    found = evaluation_sets.bundled_similarity()[0]
    folded = found._replace(pairs=[(a.casefold(), b.casefold(), score) for a, b, score in found.pairs])
    return folded, sorted({word for a, b, _ in folded.pairs for word in (a, b)})


def test_similarity_equals_scipys_and_lies_in_its_interval(wordsim):
    test_set, words = wordsim
    vectors = np.random.default_rng(0).normal(size=(len(words), 10))
    found = similarity.similarity(vectors, words, test_set)
    unit = similarity.normalized(vectors)
    cosines = [unit[words.index(a)] @ unit[words.index(b)] for a, b, _ in test_set.pairs]
    expected = scipy.stats.spearmanr([s for *_, s in test_set.pairs], cosines).statistic
    assert found["score"] == pytest.approx(100 * expected)
    assert found["pairs"] == found["pairs_total"] == 353
    assert found["low"] < found["score"] < found["high"]
    # The interval's width is that of a correlation near 0 over 353 pairs.
    assert 0.7 < (found["high"] - found["low"]) / (100 * 2 * 1.96 / math.sqrt(353)) < 1.3


@pytest.mark.parametrize("num_known", [2, 3, 40])
def test_the_interval_is_that_of_resampled_pairs(wordsim, num_known):
    test_set, _ = wordsim
    lines = test_set.pairs
    known = lines[4 : 4 + num_known]  # of words that make no other pair, if they are few
    words = sorted({word for a, b, _ in known for word in (a, b)})
    covered = [(words.index(a), words.index(b), float(s)) for a, b, s in lines if {a, b} <= set(words)]
    vectors = np.random.default_rng(1).normal(size=(len(words), 10))
    found = similarity.similarity(vectors, words, test_set)
    assert found["pairs"] == len(covered) == (num_known if num_known < 4 else len(covered))
    if num_known < 3:
        assert math.isnan(found["score"])
        return
    unit = similarity.normalized(vectors)
    human = np.array([s for *_, s in covered])
    cosines = np.array([unit[a] @ unit[b] for a, b, _ in covered])
    samples = np.random.default_rng(zlib.crc32(b"wordsim353")).integers(
        len(covered), size=(500, len(covered))
    )
    with warnings.catch_warnings(action="ignore", category=scipy.stats.ConstantInputWarning):
        scores = [scipy.stats.spearmanr(human[sample], cosines[sample]).statistic for sample in samples]
    expected = 100 * np.nanpercentile(scores, [2.5, 97.5])
    np.testing.assert_allclose([found["low"], found["high"]], expected, rtol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_vectors_without_a_cosine_are_refused(wordsim, bad):
    test_set, words = wordsim
    vectors = np.random.default_rng(0).normal(size=(len(words), 4))
    vectors[[1, 3], 2] = bad
    for call in (
        lambda: similarity.similarity(vectors, words, test_set),
        lambda: similarity.neighbours(vectors, words, words[0]),
        lambda: balanced(vectors, vectors[:5]),
    ):
        with pytest.raises(ValueError, match=r"vectors must be finite, got \d of \d+ with NaN or infinity"):
            call()


def test_balanced_vectors_of_dependent_contexts_are_finite():
    # Of a Gram matrix of rank 1, some computed eigenvalues are below zero.
    contexts = np.outer(np.random.default_rng(0).normal(size=30), np.arange(1.0, 7)) / 3
    assert np.linalg.eigvalsh(contexts.T @ contexts).min() < 0
    words = np.random.default_rng(1).normal(size=(9, 6))
    found = balanced(words, contexts)
    scores = words @ contexts.T
    np.testing.assert_allclose(found @ found.T, scores @ scores.T, rtol=1e-6, atol=1e-6)


PAIRS = evaluation_sets.SimilaritySet("pairs", [("a", "b", 1.0)])
QUESTIONS = evaluation_sets.AnalogySet("questions", [("a", "b", "a", "b")])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *given: similarity.similarity(*given, PAIRS, num_bootstrap=0), "num_bootstrap must"),
        (
            lambda *given: similarity.analogies(*given, QUESTIONS, batch_size=0),
            "batch_size must be at least 1",
        ),
        (
            lambda *given: similarity.analogies(*given, QUESTIONS, max_questions=-1),
            "max_questions must be at least 1",
        ),
        (lambda *given: similarity.neighbours(*given, "a", 0), "count must be at least 1, got 0"),
    ],
)
def test_bad_evaluations_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.eye(2), ["a", "b"])


@pytest.mark.parametrize("num_values", [1, 3, 200])
def test_ranks_of_resampled_values_equal_scipys(num_values):
    rng = np.random.default_rng(2)
    values = rng.choice(rng.normal(size=num_values), 90)
    samples = rng.integers(90, size=(30, 90))
    expected = scipy.stats.rankdata(values[samples], axis=1)
    expected -= expected.mean(axis=1, keepdims=True)
    np.testing.assert_array_equal(similarity._centred_ranks(values, samples), expected)


def test_similarity_of_vectors_in_one_direction_is_nan(wordsim):
    test_set, words = wordsim
    found = similarity.similarity(np.ones((len(words), 1), np.float32), words, test_set)
    assert math.isnan(found["score"])
    assert math.isnan(found["low"])
    assert found["pairs"] == 353


def test_similarity_of_uncovered_words_is_nan(wordsim):
    found = similarity.similarity(np.eye(2), ["zzz", "king"], wordsim[0])
    assert math.isnan(found["score"])
    assert found["pairs"] == 0


def test_analogies_answers_a_built_vocabulary_and_not_noise():
    base = {"athens": (1, 0, 0, 0), "greece": (1, 0, 0, 1), "baghdad": (0, 1, 0, 0), "iraq": (0, 1, 0, 1)}
    base |= {"bangkok": (0, 0, 1, 0), "thailand": (0, 0, 1, 1)}
    vectors, google = np.array(list(base.values()), float), evaluation_sets.bundled_analogies()
    found = similarity.analogies(vectors, list(base), google, batch_size=2)
    assert found["score"] == found["mul_score"] == found["low"] == found["high"] == 100
    assert 0 < found["questions"] < found["questions_total"]
    assert similarity.analogies(vectors, list(base), google, max_questions=2)["questions"] == 2
    none = similarity.analogies(np.eye(2), ["a", "b"], google)
    assert all(math.isnan(none[name]) for name in ("score", "mul_score", "low", "high"))


@pytest.fixture(scope="module")
def noisy_capitals():
    """Capitals and countries, each pair's vectors alike and noisy, and the questions over them."""
    lines = [
        [word.casefold() for word in question] for question in evaluation_sets.bundled_analogies().questions
    ]
    questions = lines[:506]
    words = sorted({word for question in questions for word in question})
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(words), 12))
    for capital, country in {(a, b) for a, b, *_ in questions}:
        vectors[words.index(country)] = vectors[words.index(capital)] + 0.8 * rng.normal(size=12) + 0.5
    return vectors, words, [question for question in lines if set(question) <= set(words)]


@pytest.mark.parametrize("batch_size", [7, 512])
def test_analogies_equal_the_formulas_word_by_word(noisy_capitals, batch_size):
    vectors, words, questions = noisy_capitals

    def cosine(x, y):
        x, y = vectors[words.index(x)], vectors[words.index(y)]
        return x @ y / math.sqrt((x @ x) * (y @ y))

    table = {x: {y: cosine(x, y) for y in words} for x in words}
    right = {"score": 0, "mul_score": 0}
    for a, b, c, answer in questions:
        best = {"score": (-math.inf, ""), "mul_score": (-math.inf, "")}
        for x in set(words) - {a, b, c}:
            to_a, to_b, to_c = table[x][a], table[x][b], table[x][c]
            product = (to_b + 1) / 2 * (to_c + 1) / 2 / ((to_a + 1) / 2 + 0.001)
            best["score"] = max(best["score"], (to_b - to_a + to_c, x))
            best["mul_score"] = max(best["mul_score"], (product, x))
        for name, (_, word) in best.items():
            right[name] += word == answer
    test_set = evaluation_sets.bundled_analogies()
    found = similarity.analogies(vectors, words, test_set, batch_size=batch_size)
    assert found["questions"] == len(questions)
    for name, count in right.items():
        assert found[name] == pytest.approx(100 * count / len(questions))
    counts = scipy.stats.binom.ppf([0.025, 0.975], len(questions), right["score"] / len(questions))
    assert [found["low"], found["high"]] == pytest.approx(list(100 * counts / len(questions)))
    assert 10 < found["score"] != found["mul_score"] < 90
    answers = np.arange(len(questions)) < right["score"]
    samples = np.random.default_rng(0).choice(answers, (4000, len(questions))).mean(axis=1)
    low, high = 100 * np.percentile(samples, [2.5, 97.5])
    assert found["low"] == pytest.approx(low, abs=0.5)
    assert found["high"] == pytest.approx(high, abs=0.5)


def test_neighbours():
    vectors = np.array([[1, 0], [0.9, 0.1], [0, 1], [0, 0]])
    found = similarity.neighbours(vectors, ["a", "b", "c", "zero"], "a", 2)
    assert [word for word, _ in found] == ["b", "c"]
    assert found[0][1] == pytest.approx(0.9 / math.hypot(0.9, 0.1))
    with pytest.raises(KeyError, match="'x' is not among the 4 words"):
        similarity.neighbours(vectors, ["a", "b", "c", "zero"], "x")


def test_sparse_products_accept_a_matrix_without_cells():
    empty = sp.csr_array((5, 4), dtype=np.float32)
    assert torch.equal(train_objective.SparseMatrix(empty) @ torch.ones(4, 3), torch.zeros(5, 3))


def test_scores_without_the_sets_are_nan(monkeypatch):
    def missing(name):
        raise evaluation_sets.PackageNotFoundError(name)

    monkeypatch.setattr(evaluation_sets, "distribution", missing)
    words = ["tiger", "cat"]
    for pairs in evaluation_sets.bundled_similarity():
        assert math.isnan(similarity.similarity(np.eye(2), words, pairs)["score"])
    questions = evaluation_sets.bundled_analogies()
    assert math.isnan(similarity.analogies(np.eye(2), words, questions)["score"])
