import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cemb.tables import RowQuantizedEmbedding, TransformCodedEmbedding, all_rows, num_bytes
from cemb.tables.transform_coded import allocate_bits, overhead_bytes
from cemb.train import alternating
from cemb.train import objective as train_objective
from cemb.train.alternating import STORES, principal, solve, train_alternating, transform_code

RANK = 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def objective(random_matrix):
    return train_objective.AllCellsLoss(random_matrix)


@pytest.fixture
def best(random_matrix):
    return train_objective.optimum(random_matrix, RANK)


@pytest.fixture
def factors(best):
    return tuple(torch.from_numpy(side) for side in best.factors())


def dense_loss(matrix, words, contexts):
    product = words.double().numpy() @ contexts.double().numpy().T
    return np.square(matrix.toarray().astype(np.float64) - product).sum()


def test_principal_axes_are_those_of_the_svd():
    words, contexts = torch.randn(40, 5) @ torch.randn(5, 5), torch.randn(30, 5) + 1
    found_words, found_contexts, s = principal(words, contexts)
    product = words @ contexts.T
    assert torch.allclose(found_words @ found_contexts.T, product, atol=1e-4)
    for side in (found_words, found_contexts):
        assert torch.allclose(side.T @ side, s.diag(), atol=1e-4 * s[0].item())
    assert (s[:-1] >= s[1:]).all()
    np.testing.assert_allclose(s, np.linalg.svd(product.double().numpy(), compute_uv=False)[:5], rtol=1e-5)


def test_principal_axes_of_fewer_components_than_columns():
    words, contexts = torch.randn(40, 2) @ torch.randn(2, 5), torch.randn(30, 5)
    found_words, found_contexts, s = principal(words, contexts)
    assert torch.allclose(found_words @ found_contexts.T, words @ contexts.T, atol=1e-3)
    assert s[2] < 1e-5 * s[0]


def test_solve_is_least_squares():
    matrix, fixed = torch.randn(40, 30), torch.randn(30, 5)
    expected = np.linalg.lstsq(fixed.double().numpy(), matrix.double().numpy().T)[0].T
    np.testing.assert_allclose(solve(matrix @ fixed, fixed), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the stored factor is zero"):
        solve(matrix @ fixed, torch.zeros(30, 5))


# Gaps were 5e-8, 5e-6, 2e-5 and 5e-3 when this was written.
@pytest.mark.parametrize(
    ("store", "most"), [("float32", 1e-5), ("bfloat16", 5e-5), ("int8", 1e-4), ("int4", 0.02)]
)
def test_alternating_nears_the_optimum(store, most, objective, best, random_matrix):
    *tables, history = train_alternating(objective, RANK, STORES[store], num_steps=60)
    loss = dense_loss(random_matrix, *map(all_rows, tables))
    assert -1e-5 < best.gap(loss) < most
    assert [entry["step"] for entry in history] == list(range(1, 61))
    assert history[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    seconds = [entry["seconds"] for entry in history]
    assert seconds == sorted(seconds)
    losses = [entry["loss"] for entry in history]
    assert losses[-1] < losses[0]
    if store == "float32":
        assert (np.diff(losses) < 1e-5 * losses[0]).all()


@pytest.mark.parametrize(
    ("store", "num_bytes_expected"),
    [("float32", 70 * 16), ("bfloat16", 70 * 8), ("int8", 70 * (4 + 2)), ("int4", 70 * (2 + 2))],
)
def test_stores_take_their_bytes(store, num_bytes_expected, objective):
    *tables, _ = train_alternating(objective, RANK, STORES[store], num_steps=2)
    assert sum(map(num_bytes, tables)) == num_bytes_expected
    assert [table.num_embeddings for table in tables] == [40, 30]


def test_alternating_is_better_than_rounding_the_optimum(objective, factors, random_matrix):
    rounded = [all_rows(RowQuantizedEmbedding.from_vectors(side, 4)) for side in factors]
    *tables, _ = train_alternating(objective, RANK, STORES["int4"], num_steps=60)
    loss = dense_loss(random_matrix, *map(all_rows, tables))
    assert loss < dense_loss(random_matrix, *rounded)


def test_a_store_sees_principal_axes_and_what_errors_cost(objective):
    seen = []

    def store(vectors, importance):
        seen.append((vectors, importance))
        return STORES["float32"](vectors, importance)

    train_alternating(objective, RANK, store, num_steps=3)
    (words, word_importance), (_, context_importance) = seen[-2:]
    gram = words.T @ words
    assert torch.allclose(gram, word_importance.diag(), atol=1e-3)
    assert torch.allclose(context_importance, gram.diagonal(), rtol=1e-4)
    assert (word_importance.diff() <= 0).all()


def test_alternating_is_deterministic_for_a_seed(objective):
    runs = [train_alternating(objective, RANK, STORES["int8"], num_steps=3, seed=s) for s in (1, 1, 2)]
    first, again, other = (all_rows(words) for words, _, _ in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.fixture
def low_rank():
    """A matrix of 500 words and 400 contexts whose singular values fall, and its optimum of rank 8."""
    rng = np.random.default_rng(0)
    sides = [np.linalg.qr(rng.normal(size=(n, 30)))[0] for n in (500, 400)]
    dense = (sides[0] * 100 / np.arange(1, 31)) @ sides[1].T
    matrix = sp.csr_array(dense.astype(np.float32))
    return train_objective.AllCellsLoss(matrix), train_objective.optimum(matrix, 8), matrix


@pytest.mark.parametrize("max_bytes", [6000, 7500, 9001])
def test_transform_coding_keeps_its_budget_and_solving_again_helps(max_bytes, low_rank):
    objective, best, matrix = low_rank
    factors = [torch.from_numpy(side) for side in best.factors()]
    importance = torch.from_numpy(best.singular_values)
    sides = [(side, importance) for side in factors]
    bits = allocate_bits(sides, max_bytes)
    unsolved = [TransformCodedEmbedding.from_vectors(*side, b) for side, b in zip(sides, bits, strict=True)]
    gaps = [best.gap(dense_loss(matrix, *map(all_rows, unsolved)))]
    for num_rounds in (0, 2):
        tables = transform_code(objective, *factors, max_bytes, num_rounds=num_rounds)
        assert 0.97 * max_bytes <= sum(map(num_bytes, tables)) <= max_bytes
        gaps.append(best.gap(dense_loss(matrix, *map(all_rows, tables))))
    assert 0 < gaps[1] < gaps[0] < 1
    # Further rounds help little here, and may harm as little.
    assert 0 < gaps[2] < 1.02 * gaps[1]
    again = transform_code(objective, *factors, max_bytes)
    assert all(torch.equal(all_rows(a), all_rows(b)) for a, b in zip(tables, again, strict=True))


@pytest.mark.parametrize("num_rounds", [0, 1, 3])
def test_rounds_solve_for_both_sides(num_rounds, low_rank, monkeypatch):
    objective, best, _ = low_rank
    sides = []

    def noted(products, fixed):
        sides.append(len(products))
        return solve(products, fixed)

    monkeypatch.setattr(alternating, "solve", noted)
    factors = [torch.from_numpy(side) for side in best.factors()]
    transform_code(objective, *factors, 8000, num_rounds=num_rounds)
    assert sides == [400] + [500, 400] * num_rounds


def test_transform_coding_does_not_mind_the_axes(low_rank):
    objective, best, matrix = low_rank
    words, contexts = (torch.from_numpy(side) for side in best.factors())
    mix = torch.randn(8, 8)
    mixed = words @ mix, contexts @ torch.linalg.inv(mix).T
    losses = [
        dense_loss(matrix, *map(all_rows, transform_code(objective, *sides, 8000)))
        for sides in ((words, contexts), mixed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("options", [{"rank": 0}, {"num_steps": 0}])
def test_alternating_without_a_step_or_a_rank_is_refused(low_rank, options):
    objective, *_ = low_rank
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        train_alternating(objective, store=STORES["float32"], **{"rank": 2, "num_steps": 1, **options})


def test_more_bytes_lower_the_gap(low_rank):
    objective, best, matrix = low_rank
    factors = [torch.from_numpy(side) for side in best.factors()]
    gaps = [
        best.gap(dense_loss(matrix, *map(all_rows, transform_code(objective, *factors, max_bytes))))
        for max_bytes in (5500, 7000, 9000, 11_000)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.02
    with pytest.raises(ValueError, match="max_bytes must be at least"):
        transform_code(objective, *factors, overhead_bytes(500, 8) + overhead_bytes(400, 8) + 1)
