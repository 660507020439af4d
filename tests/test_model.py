import math

import pytest
import torch

from cemb import PairModel, optim
from cemb.model import build_model
from cemb.tables import FullEmbedding, HashedEmbedding
from cemb.train.losses import LOSSES, all_cells_loss, glove_loss, glove_weight, mse_loss, weighted_mse_loss


@pytest.mark.parametrize("shared_table", [True, False])
@pytest.mark.parametrize("bias", ["none", "shared", "separate"])
@pytest.mark.parametrize("table", ["full", "full-fused", "hashed", "hashed-reference"])
def test_scores_are_dot_products_plus_biases(table, bias, shared_table):
    pool = None if table.startswith("full") else 40
    model = build_model(table, 12, 5, pool_size=pool, bias=bias, shared_table=shared_table).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    pairs = torch.tensor([[0, 11], [3, 3], [7, 2]])
    words, contexts = model.factors()
    expected = (words[pairs[:, 0]] * contexts[pairs[:, 1]]).sum(1)
    if bias != "none":
        expected = expected + model.word_bias[pairs[:, 0]] + model.context_bias[pairs[:, 1]]
    torch.testing.assert_close(model(pairs), expected)
    assert (model.word_bias is model.context_bias) == (bias != "separate")
    if table != "full-fused":  # which keeps both sides' rows in one parameter
        assert (model.word_table is model.context_table) == shared_table


def test_words_and_contexts_of_one_parameter_are_apart():
    model = build_model("full-fused", 12, 5, shared_table=False)
    words, contexts = model.factors()
    torch.testing.assert_close(torch.cat((words, contexts)), model.word_table.weight)
    assert (model.num_words, model.num_parameters) == (12, 120)
    for pair in ([12, 0], [0, 12], [-1, 0]):
        with pytest.raises(IndexError, match=r"ids must lie in \[0, 12\)"):
            model(torch.tensor([pair]))
    with pytest.raises(ValueError, match="first_context is for one shared table"):
        PairModel(model.word_table, model.word_table, first_context=12)
    with pytest.raises(ValueError, match="first_context must be a row of the table, got 24"):
        PairModel(model.word_table, first_context=24)


@pytest.mark.parametrize("shared_table", [True, False])
@pytest.mark.parametrize("table", ["full-fused", "hashed"])
def test_a_pair_step_is_that_of_the_scores(table, shared_table):
    pool = {"pool_size": 200, "block_size": 8} if table == "hashed" else {}
    options = {"dropout": 0.2, "shared_table": shared_table, **pool}
    models = [build_model(table, 12, 40, **options) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    pairs, values = torch.tensor([[0, 11], [3, 3], [7, 2]]), torch.tensor([1.0, -1, 3])
    weights = torch.tensor([0.5, 2, 1])
    torch.manual_seed(0)
    optimizer = optim.SGD(models[0].parameters(), 0.1)
    loss = models[0].pair_step(optimizer, pairs, all_cells_loss(values, weights))
    torch.manual_seed(0)
    expected = (weights * (models[1](pairs) - values).square()).sum()
    expected.backward()
    torch.optim.SGD(models[1].parameters(), 0.1).step()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(models[0].word_table.weight, models[1].word_table.weight)
    with pytest.raises(IndexError):
        models[0].pair_step(optimizer, torch.tensor([[12, 0]]), mse_loss(values[:1]))


@pytest.mark.parametrize(("table", "bias"), [("full", "none"), ("full-fused", "shared")])
def test_other_models_have_no_pair_step(table, bias):
    model = build_model(table, 12, 5, bias=bias)
    assert not model.has_pair_step
    name = "FullEmbedding" if table == "full" else "FusedFullEmbedding"
    with pytest.raises(ValueError, match=f"one pool or fused full table without biases, got {name} and"):
        model.pair_step(optim.SGD(model.parameters()), torch.tensor([[0, 1]]), mse_loss(torch.ones(1)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"table": "full"}, 60),
        ({"table": "full", "shared_table": False, "bias": "separate"}, 120 + 24),
        ({"table": "full", "bias": "shared"}, 60 + 12),
        ({"table": "hashed", "pool_size": 40, "shared_table": False}, 40),
    ],
)
def test_parameters_are_counted_once(options, expected):
    assert build_model(num_embeddings=12, embedding_dim=5, **options).num_parameters == expected


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    model = build_model("full", 4, 2000, dropout=0.3)
    with torch.no_grad():
        model.word_table.weight.fill_(1.0)
    pairs = torch.tensor([[0, 1]]).expand(50, 2)
    assert torch.equal(model.eval()(pairs), torch.full((50,), 2000.0))
    scores = model.train()(pairs)
    assert scores.std() > 0
    # Each of 100,000 products is 1/0.49 with probability 0.49: deviation about 1.02.
    assert abs(scores.mean() / 2000 - 1) < 5 * 1.02 / math.sqrt(100_000)


def test_losses_equal_their_formulas():
    scores, values = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([50.0, 200.0, 0.0])
    weights = [0.5**0.75, 1.0, 0.0]
    assert mse_loss(values)(scores).item() == pytest.approx((49**2 + 202**2 + 0.25) / 3)
    assert glove_weight(values).tolist() == pytest.approx(weights)
    squares = [(1 - 50) ** 2, (-2 - 200) ** 2, 0.25]
    expected = sum(w * s for w, s in zip(weights, squares, strict=True)) / 3
    assert weighted_mse_loss(values)(scores).item() == pytest.approx(expected)
    logs = [(1 - math.log(50)) ** 2, (-2 - math.log(200)) ** 2, 0]
    expected = sum(w * s for w, s in zip(weights, logs, strict=True)) / 3
    assert glove_loss(values)(scores).item() == pytest.approx(expected)
    found = all_cells_loss(values, torch.tensor([0.5, 2, 3]))(scores)
    assert found.item() == pytest.approx(0.5 * 49**2 + 2 * 202**2 + 3 * 0.25)


@pytest.mark.parametrize("loss", LOSSES.values())
def test_losses_have_exact_gradients_also_at_zero(loss):
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    values = torch.tensor([0.0, 0.5, 3.0, 99.0, 100.0, 150.0], dtype=torch.float64)
    more = [torch.rand(6, dtype=torch.float64)] if loss is all_cells_loss else []
    assert torch.autograd.gradcheck(loss(values, *more), scores)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: build_model("fool", 3, 2),
            "table must be one of full, full-fused, hashed, hashed-reference, got 'fool'",
        ),
        (lambda: build_model("hashed", 3, 2), "table 'hashed' needs a pool_size"),
        (lambda: build_model("full", 3, 2, pool_size=4), "a full table has no pool; got pool_size=4"),
        (lambda: build_model("hashed", 3, 2, pool_size=4, sparse_gradients=True), "has no sparse gradients"),
        (
            lambda: build_model("full-fused", 3, 2, sparse_gradients=True),
            "has no sparse gradients; cemb.optim",
        ),
        (
            lambda: build_model("full", 3, 2, bias="both"),
            "bias must be one of none, shared, separate, got 'both'",
        ),
        (lambda: build_model("full", 3, 2, dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (
            lambda: PairModel(FullEmbedding(3, 2), HashedEmbedding(3, 4, pool_size=9)),
            "one length, got 2 and 4",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("table", ["full-fused", "hashed"])
def test_fused_models_score_and_learn_as_lookups_do(table):
    options = {} if table == "full-fused" else {"pool_size": 40, "block_size": 3, "signed": True}
    fused = build_model(table, 12, 7, **options)
    pairs = torch.tensor([[0, 11], [3, 3], [7, 2]])
    scores = fused(pairs)
    vectors = fused.word_table(pairs)
    expected = (vectors[:, 0] * vectors[:, 1]).sum(-1)
    torch.testing.assert_close(scores, expected)
    (grad,) = torch.autograd.grad(scores.square().sum(), fused.word_table.weight)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), fused.word_table.weight)
    torch.testing.assert_close(grad, expected_grad)


def test_tables_that_differ_in_more_than_their_place_score_by_vectors():
    words = HashedEmbedding(12, 6, pool_size=40, block_size=2)
    contexts = HashedEmbedding(9, 6, block_size=3, weight=words.weight)
    model = PairModel(words, contexts)
    pairs = torch.tensor([[11, 8], [0, 1]])
    expected = (words(pairs[:, 0]) * contexts(pairs[:, 1])).sum(-1)
    torch.testing.assert_close(model(pairs), expected)


def test_a_compiled_model_is_one_graph():
    model = build_model("hashed", 50, 8, pool_size=64, block_size=4, dropout=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    pairs = torch.tensor([[3, 49], [0, 7]])
    torch.manual_seed(1)
    expected = model(pairs)
    torch.manual_seed(1)
    scores = compiled(pairs)
    torch.testing.assert_close(scores, expected)
    scores.sum().backward()
    assert model.word_table.weight.grad.count_nonzero() > 0
