import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import zipf_text

from cemb import evaluate, quality
from cemb.batches import PairBatches
from cemb.dataset import PmiConfig, load_pmi
from cemb.model import build_model, mse_loss
from cemb.quality import QualityCase, measure_quality
from cemb.train import (
    ADAM_BETAS,
    OPTIMIZERS,
    DivergenceError,
    halve_until_stable,
    make_optimizer,
    train_full_batch,
    train_mini_batches,
)


def _two_steps(name, gradients, rate):
    """Where a weight at 0 is after two steps, by the formulas of the papers."""
    weight, squares, first, second = 0.0, 0.0, 0.0, 0.0
    beta_1, beta_2 = ADAM_BETAS
    for step, gradient in enumerate(gradients, 1):
        if name == "sgd":
            weight -= rate * gradient
        elif name == "adagrad":
            squares += gradient**2
            weight -= rate * gradient / math.sqrt(squares)
        else:
            first = beta_1 * first + (1 - beta_1) * gradient
            second = beta_2 * second + (1 - beta_2) * gradient**2
            weight -= rate * (first / (1 - beta_1**step)) / math.sqrt(second / (1 - beta_2**step))
    return weight


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_as_their_formulas(name, sparse):
    table = torch.nn.Embedding(5, 3, sparse=sparse)
    torch.nn.init.zeros_(table.weight)
    optimizer = make_optimizer(name, table.parameters(), 0.1, sparse=sparse)
    for gradient in (1.0, -3.0):
        optimizer.zero_grad()
        (gradient * table(torch.tensor([1, 4]))).sum().backward()
        optimizer.step()
    expected = torch.zeros(5, 3)
    expected[[1, 4]] = _two_steps(name, (1.0, -3.0), 0.1)
    torch.testing.assert_close(table.weight.detach(), expected, atol=1e-6, rtol=1e-5)


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adagrad, adam, got 'adamw'"):
        make_optimizer("adamw", [torch.zeros(1)], 0.1)


def test_adam_reaches_the_optimum(random_matrix):
    torch.manual_seed(0)
    objective, best = evaluate.AllCellsLoss(random_matrix), evaluate.optimum(random_matrix, 4)
    model = build_model("full", 40, 4, shared_table=False)
    model.context_table = type(model.context_table)(30, 4)
    history = train_full_batch(model, objective, optimizer="adam", learning_rate=0.1, num_steps=600)
    assert [entry["step"] for entry in history] == [*range(0, 600, 10), 600]
    assert -1e-4 < best.gap(history[-1]["loss"]) < 0.01


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("table", ["full", "hashed"])
def test_mini_batches_lower_their_loss(optimizer, table, random_matrix):
    torch.manual_seed(0)
    is_full = table == "full"
    model = build_model(
        table, 40, 8, pool_size=None if is_full else 300, shared_table=False, sparse_gradients=is_full
    )
    history = train_mini_batches(
        model,
        PairBatches(random_matrix, 64),
        mse_loss,
        optimizer=optimizer,
        learning_rate={"sgd": 2.0, "adagrad": 0.2, "adam": 0.03}[optimizer],
        num_epochs=20,
        reports_per_epoch=1,
        sparse=is_full,
    )
    assert [entry["epoch"] for entry in history] == list(range(1, 21))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert not model.training


def test_divergence_is_noticed_and_the_rate_halved(random_matrix):
    objective = evaluate.AllCellsLoss(random_matrix)
    rates = []

    def train(rate):
        rates.append(rate)
        torch.manual_seed(0)
        model = build_model("full", 40, 4, shared_table=False)
        model.context_table = type(model.context_table)(30, 4)
        return train_full_batch(model, objective, optimizer="sgd", learning_rate=rate, num_steps=50)

    with pytest.raises(DivergenceError, match=r"diverged at step \d+: loss .* with learning_rate=1000"):
        train(1000.0)
    history, rate = halve_until_stable(train, 1000.0)
    assert rates[-1] == rate < 1000
    assert rates[1:] == [1000.0 / 2**k for k in range(len(rates) - 1)]
    assert history[-1]["loss"] < history[0]["loss"]
    with pytest.raises(DivergenceError):
        halve_until_stable(train, 1e9, max_halvings=2)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(zipf_text(20_000, 150))
    return load_pmi(PmiConfig(corpus=str(path), min_count=2, rank=6))


@pytest.mark.parametrize(
    "case",
    [
        QualityCase("full", "adam", num_steps=40),
        QualityCase("hashed", "sgd", compression_ratio=4, num_steps=20, block_size=3, signed=True),
        QualityCase("hashed", "adagrad", "mini-batch", pool_size=100, batch_size=512, loss="glove"),
    ],
)
def test_quality_records(case, data):
    record, model = measure_quality(case, data)
    words, contexts = model.factors()
    dense = (torch.from_numpy(data.matrix.toarray()) - (words @ contexts.T).detach()).square().sum().item()
    assert record["all_cells_loss"] == pytest.approx(dense, rel=1e-4)
    assert record["gap"] == pytest.approx(data.optimum.gap(dense), abs=1e-3)
    table_values = 2 * len(data.words) * 6
    expected = {"full": table_values, "hashed": case.pool_size or round(table_values / 4)}[case.table]
    assert record["num_parameters"] == model.num_parameters == expected
    assert record["compression_ratio"] == table_values / expected
    assert record["wordsim353_pairs"] >= 3
    assert record["table"] == case.table
    again, _ = measure_quality(case, data)
    assert again["all_cells_loss"] == record["all_cells_loss"]


@pytest.fixture
def scored(monkeypatch):
    """The vectors of words and contexts that are scored from now on."""
    seen = []
    score_vectors = quality.score_vectors

    def noted(words, contexts, vocabulary):
        seen.append((words, contexts))
        return score_vectors(words, contexts, vocabulary)

    monkeypatch.setattr(quality, "score_vectors", noted)
    return seen


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_svd_record_is_the_optimum(power, data, scored):
    record = quality.svd_record(data, power)
    assert record["gap"] == pytest.approx(0, abs=1e-4)
    assert record["singular_value_power"] == power
    best = data.optimum
    np.testing.assert_allclose(scored[0][0], best.left * best.singular_values**power, rtol=1e-5)
    np.testing.assert_allclose(scored[0][1], best.right * best.singular_values ** (1 - power), rtol=1e-5)


def test_scores_are_those_of_their_vectors():
    rng = np.random.default_rng(0)
    words = sorted(
        {word for q in evaluate._test_data("wordsim353.tsv") for word in q.casefold().split("\t")[:2]}
    )
    vectors, contexts = rng.normal(size=(len(words), 5)), rng.normal(size=(20, 5)) * np.arange(1, 6)
    fields = quality.score_vectors(vectors, contexts, words)
    for name, scored in (("wordsim353", vectors), ("wordsim353_balanced", vectors @ contexts.T)):
        expected = evaluate.similarity(scored, words, "wordsim353")
        for field in ("score", "low", "high"):
            assert fields[f"{name}_{field}"] == pytest.approx(expected[field])
    assert fields["wordsim353_pairs"] == 353
    assert {f"analogies_{name}" for name in ("score", "mul_score", "low", "high", "questions")} < set(fields)


TOPICS = ("tiger cat", "money cash", "physics proton", "king queen", "professor doctor", "cabbage cucumber")


@pytest.fixture
def topical(tmp_path):
    """Data of a text whose stretches of 18 tokens each keep to one topic; all words are as frequent."""
    rng = np.random.default_rng(0)
    topics = [[*topic.split(), *(f"filler{topic[0]}{chr(97 + i)}" for i in range(4))] for topic in TOPICS]
    path = tmp_path / "topics.txt"
    stretches = [word for i in rng.permutation(3000) for word in rng.permutation(topics[i % 6] * 3)]
    path.write_text(" ".join(stretches))
    return load_pmi(PmiConfig(corpus=str(path), min_count=2, rank=8)), topics


def test_sgns_record_scores_vectors_of_the_same_words(topical, scored):
    data, topics = topical
    record = quality.sgns_record(data)
    assert record["gap"] is record["all_cells_loss"] is None
    assert record["num_parameters"] == 2 * len(data.words) * 8
    assert record["wordsim353_score"] > 50
    topic_of = np.array([next(i for i, topic in enumerate(topics) if word in topic) for word in data.words])
    alike = topic_of[:, None] == topic_of
    ((words, contexts),) = scored
    unit = evaluate.normalized(words)
    for products, margin in ((unit @ unit.T, 0.5), (words @ contexts.T, 1)):
        assert products[alike].mean() > margin + products[~alike].mean()
    quality.sgns_record(data)
    quality.sgns_record(data, seed=1)
    assert np.array_equal(words, scored[1][0])
    assert not np.array_equal(words, scored[2][0])


def test_sgns_of_a_changed_corpus_is_refused(topical):
    data, _ = topical
    Path(data.summary["corpus"]).write_text("other words other words")
    with pytest.raises(ValueError, match="has changed: its words are not those of the data"):
        quality.sgns_record(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "lbfgs"}, "optimizer must be one of sgd, adagrad, adam, got 'lbfgs'"),
        ({"training": "online"}, "training must be one of full-batch, mini-batch, got 'online'"),
        ({"loss": "hinge"}, "loss must be one of mse, weighted-mse, glove, got 'hinge'"),
        ({}, "needs pool_size or compression_ratio, not both; got pool_size=None"),
        ({"table": "full", "pool_size": 5}, "a full table has no pool; got pool_size=5"),
    ],
)
def test_bad_cases_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QualityCase(**{"table": "hashed", "optimizer": "sgd", **arguments})
