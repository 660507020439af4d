import math

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


def test_svd_record_is_the_optimum(data):
    record = quality.svd_record(data)
    assert record["gap"] == pytest.approx(0, abs=1e-4)


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
