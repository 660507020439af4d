import math

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

from cemb import evaluate


@pytest.mark.parametrize("block_columns", [7, 4096])
def test_all_cells_loss_equals_the_dense_one(random_matrix, block_columns, monkeypatch):
    monkeypatch.setattr(evaluate.SparseMatrix, "BLOCK_COLUMNS", block_columns)
    matrix = random_matrix.astype(np.float64)
    objective = evaluate.AllCellsLoss(matrix)
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
    assert evaluate.AllCellsLoss(random_matrix)(words, contexts).item() == pytest.approx(
        dense.sum().item(), rel=1e-5
    )


def test_optimum_equals_the_dense_svd(random_matrix):
    best = evaluate.optimum(random_matrix, 5)
    values = np.linalg.svd(random_matrix.toarray().astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(best.singular_values, values[:5], rtol=1e-4)
    assert best.loss == pytest.approx(np.square(values[5:]).sum(), rel=1e-4)
    for power in (0, 0.5, 1):
        words, contexts = best.factors(power)
        error = np.square(random_matrix.toarray() - words @ contexts.T).sum()
        assert best.gap(error) == pytest.approx(0, abs=1e-4)
    assert best.gap(np.square(random_matrix.data).sum()) == pytest.approx(1, rel=1e-5)


def test_bad_rank_is_refused(random_matrix):
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 30\) .* got 30"):
        evaluate.optimum(random_matrix, 30)


@pytest.fixture
def wordsim():
    """The words of WordSim-353 and vectors under which cosines follow the human scores."""
    lines = [line.casefold().split("\t") for line in evaluate._test_data("wordsim353.tsv")]
    words = sorted({word for a, b, _ in lines for word in (a, b)})
    return lines, words


def test_similarity_equals_scipys_and_lies_in_its_interval(wordsim):
    lines, words = wordsim
    vectors = np.random.default_rng(0).normal(size=(len(words), 10))
    found = evaluate.similarity(vectors, words, "wordsim353")
    unit = evaluate.normalized(vectors)
    cosines = [unit[words.index(a)] @ unit[words.index(b)] for a, b, _ in lines]
    expected = scipy.stats.spearmanr([float(s) for *_, s in lines], cosines).statistic
    assert found["score"] == pytest.approx(100 * expected)
    assert found["pairs"] == found["pairs_total"] == 353
    assert found["low"] < found["score"] < found["high"]
    # The interval's width is that of a correlation near 0 over 353 pairs.
    assert 0.7 < (found["high"] - found["low"]) / (100 * 2 * 1.96 / math.sqrt(353)) < 1.3


def test_similarity_of_uncovered_words_is_nan(wordsim):
    found = evaluate.similarity(np.eye(2), ["zzz", "king"], "wordsim353")
    assert math.isnan(found["score"])
    assert found["pairs"] == 0


def test_analogies_answers_a_built_vocabulary_and_not_noise():
    base = {"athens": (1, 0, 0, 0), "greece": (1, 0, 0, 1), "baghdad": (0, 1, 0, 0), "iraq": (0, 1, 0, 1)}
    base |= {"bangkok": (0, 0, 1, 0), "thailand": (0, 0, 1, 1)}
    vectors = np.array(list(base.values()), float)
    found = evaluate.analogies(vectors, list(base), batch_size=2)
    assert found["score"] == 100
    assert 0 < found["questions"] < found["questions_total"]
    assert evaluate.analogies(vectors, list(base), max_questions=2)["questions"] == 2
    assert math.isnan(evaluate.analogies(np.eye(2), ["a", "b"])["score"])


def test_neighbours():
    vectors = np.array([[1, 0], [0.9, 0.1], [0, 1], [0, 0]])
    found = evaluate.neighbours(vectors, ["a", "b", "c", "zero"], "a", 2)
    assert [word for word, _ in found] == ["b", "c"]
    assert found[0][1] == pytest.approx(0.9 / math.hypot(0.9, 0.1))
    with pytest.raises(KeyError, match="'x' is not among the 4 words"):
        evaluate.neighbours(vectors, ["a", "b", "c", "zero"], "x")


def test_sparse_products_accept_a_matrix_without_cells():
    empty = sp.csr_array((5, 4), dtype=np.float32)
    assert torch.equal(evaluate.SparseMatrix(empty) @ torch.ones(4, 3), torch.zeros(5, 3))


def test_scores_without_the_sets_are_nan(monkeypatch):
    def missing(name):
        raise evaluate.PackageNotFoundError(name)

    monkeypatch.setattr(evaluate, "distribution", missing)
    assert math.isnan(evaluate.similarity(np.eye(2), ["tiger", "cat"], "wordsim353")["score"])
    assert math.isnan(evaluate.analogies(np.eye(2), ["tiger", "cat"])["score"])
