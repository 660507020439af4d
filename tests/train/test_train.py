import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import zipf_text

from cemb.model import COMPRESSED_TABLES, PairModel, build_compressed_model, build_model
from cemb.study import quality
from cemb.study.dataset import PmiConfig, load_pmi
from cemb.study.quality import QualityCase, measure_quality
from cemb.tables import ClusteredEmbedding, num_bytes
from cemb.train import evaluation_sets, similarity
from cemb.train import objective as train_objective
from cemb.train.batches import PairBatches
from cemb.train.loops import (
    ADAM_BETAS,
    OPTIMIZERS,
    DivergenceError,
    halve_until_stable,
    make_optimizer,
    optimizer_bytes,
    train_full_batch,
    train_mini_batches,
)
from cemb.train.losses import all_cells_loss, mse_loss


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
    optimizer = make_optimizer(name, table.parameters(), 0.1, sparse_gradients=sparse)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"learning_rate": math.nan}, r"learning_rate must lie in \[0, inf\), got nan"),
        ({"optimizer": "lbfgs", "learning_rate": -1.0}, r"learning_rate must lie in \[0, inf\), got -1.0"),
    ],
)
def test_full_batches_that_make_no_step_are_refused(options, message, random_matrix):
    arguments = {"optimizer": "sgd", "learning_rate": 0.1, "num_steps": 1, **options}
    with pytest.raises(ValueError, match=message):
        train_full_batch(small_model(), train_objective.AllCellsLoss(random_matrix), **arguments)


@pytest.mark.parametrize("options", [{"num_epochs": 0}, {"num_epochs": 1, "reports_per_epoch": 0}])
def test_mini_batches_that_make_no_step_are_refused(options, random_matrix):
    batches = PairBatches(random_matrix, 64)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        train_mini_batches(small_model(), batches, mse_loss, optimizer="sgd", learning_rate=0.1, **options)


def test_a_last_step_that_diverges_is_noticed(random_matrix):
    objective = train_objective.AllCellsLoss(random_matrix)
    with pytest.raises(DivergenceError, match=r"diverged at step 1: loss (inf|nan)"):
        train_full_batch(small_model(), objective, optimizer="sgd", learning_rate=1e38, num_steps=1)
    with pytest.raises(ValueError, match=r"learning_rate must lie in \[0, inf\), got nan"):
        halve_until_stable(lambda rate: [], math.nan)


def test_adam_reaches_the_optimum(random_matrix):
    torch.manual_seed(0)
    objective, best = train_objective.AllCellsLoss(random_matrix), train_objective.optimum(random_matrix, 4)
    model = build_model("full", 40, 4, shared_table=False)
    model.context_table = type(model.context_table)(30, 4)
    history = train_full_batch(model, objective, optimizer="adam", learning_rate=0.1, num_steps=600)
    assert [entry["step"] for entry in history] == [*range(0, 600, 10), 600]
    assert -1e-4 < best.gap(history[-1]["loss"]) < 0.01


def small_model(seed=0):
    torch.manual_seed(seed)
    model = build_model("full", 40, 4, shared_table=False)
    model.context_table = type(model.context_table)(30, 4)
    return model


class Counted:
    """An objective that notes its values."""

    def __init__(self, objective):
        self.objective, self.losses = objective, []

    def __call__(self, words, contexts):
        loss = self.objective(words, contexts)
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("seed", range(3))
def test_lbfgs_reaches_the_optimum(seed, random_matrix):
    objective, best = (
        Counted(train_objective.AllCellsLoss(random_matrix)),
        train_objective.optimum(random_matrix, 4),
    )
    history = train_full_batch(
        small_model(seed), objective, optimizer="lbfgs", learning_rate=1.0, num_steps=120
    )
    assert -1e-5 < best.gap(history[-1]["loss"]) < 1e-4
    seconds = [entry["seconds"] for entry in history]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 20, 21, 30])
def test_lbfgs_evaluates_as_often_as_it_is_told(num_steps, random_matrix):
    objective = Counted(train_objective.AllCellsLoss(random_matrix))
    history = train_full_batch(
        small_model(), objective, optimizer="lbfgs", learning_rate=1.0, num_steps=num_steps
    )
    *losses, last = objective.losses
    assert max(1, num_steps - 1) <= len(losses) <= num_steps
    assert [entry["step"] for entry in history] == [*range(0, len(losses), 10), num_steps]
    assert [entry["loss"] for entry in history] == [*losses[::10], last]
    assert last <= losses[0]


def test_lbfgs_bears_bad_points_on_a_line_but_no_infinite_ones(random_matrix):
    objective = Counted(train_objective.AllCellsLoss(random_matrix))
    train_full_batch(small_model(), objective, optimizer="lbfgs", learning_rate=1.0, num_steps=20)
    assert max(objective.losses) > 10 * objective.losses[0]
    model = small_model()
    with torch.no_grad():
        model.word_table.weight[0, 0] = math.nan
    with pytest.raises(DivergenceError, match="diverged at step 0: loss nan"):
        train_full_batch(model, objective, optimizer="lbfgs", learning_rate=1.0, num_steps=20)


def test_tables_recluster_as_often_as_the_loss_is_noted(random_matrix, monkeypatch):
    calls = []
    monkeypatch.setattr(ClusteredEmbedding, "recluster", lambda table: calls.append(table))
    torch.manual_seed(0)
    model = PairModel(ClusteredEmbedding(40, 4, 5, 2), ClusteredEmbedding(30, 4, 5, 2))
    objective = train_objective.AllCellsLoss(random_matrix)
    history = train_full_batch(
        model, objective, optimizer="adam", learning_rate=0.02, num_steps=25, evaluate_every=5
    )
    assert [entry["step"] for entry in history] == [0, 5, 10, 15, 20, 25]
    assert calls == [model.word_table, model.context_table] * 4


@pytest.mark.parametrize(("optimizer", "per_value"), [("sgd", 0), ("adagrad", 4), ("adam", 8)])
def test_bytes_of_optimizers(optimizer, per_value):
    model = small_model()
    counters = 0 if optimizer == "sgd" else 4 * 2
    before = [p.clone() for p in model.parameters()]
    assert optimizer_bytes(model, optimizer) == per_value * 70 * 4 + counters
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True))


def test_bytes_of_lbfgs_are_those_of_its_state(random_matrix, monkeypatch):
    made = []

    class Noted(torch.optim.LBFGS):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(torch.optim, "LBFGS", Noted)
    model, objective = small_model(), train_objective.AllCellsLoss(random_matrix)
    train_full_batch(model, objective, optimizer="lbfgs", learning_rate=1.0, num_steps=60)
    (state,) = made[0].state.values()
    vectors = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in state.values())
    kept = sum(v.nbytes for v in vectors if torch.is_tensor(v) and v.numel() > 1)
    assert optimizer_bytes(model, "lbfgs") == kept


@pytest.mark.parametrize("table", COMPRESSED_TABLES)
def test_compressed_models_keep_their_budget(table):
    torch.manual_seed(0)
    model = build_compressed_model(table, 300, 10, 12_001)
    assert 0.8 * 12_000 <= num_bytes(model) <= 12_000
    words, contexts = model.factors()
    assert words.shape == contexts.shape == (300, 10)
    assert model.word_table is not model.context_table
    assert num_bytes(model.word_table) == num_bytes(model.context_table) == num_bytes(model) / 2
    with pytest.raises(ValueError, match="max_bytes must be at least"):
        build_compressed_model(table, 300, 10, 7)


def test_unknown_compressed_models_are_refused():
    with pytest.raises(ValueError, match=r"table must be one of hybrid, .* got 'full'"):
        build_compressed_model("full", 300, 10, 12_000)


class Enumerated:
    """In place of a random generator: the stored cells in their order, then all cells of a matrix."""

    def __init__(self, shape):
        rows, columns = np.indices(shape)
        self.columns = iter([rows.ravel(), columns.ravel()])

    def permutation(self, count):
        return np.arange(count)

    def integers(self, high, size):
        cells = next(self.columns)
        assert len(cells) == size
        return cells

    def random(self, size):
        """What falls in the middle of each context's share of [0, 1)."""
        cells = next(self.columns)
        assert len(cells) == size
        return (cells + 0.5) / (cells.max() + 1)


def test_weighted_batches_of_all_cells_have_the_loss_of_all_cells(random_matrix):
    num_words, num_contexts = random_matrix.shape
    cells, stored = num_words * num_contexts, random_matrix.nnz
    batches = PairBatches(
        random_matrix, cells + stored, negative_share=cells / (cells + stored), weighted=True
    )
    enumerated = Enumerated(random_matrix.shape)
    batches._rng = lambda *place: enumerated
    ((pairs, values, weights),) = batches.epoch(0)
    scores = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    dense = (scores - torch.from_numpy(random_matrix.toarray())).square().sum() / num_words
    loss = all_cells_loss(values, weights)(scores[tuple(pairs.T)])
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5)
    hits = values[stored:] != 0
    assert hits.sum() == stored
    assert not weights[stored:][hits].any()
    assert torch.allclose(weights[stored:][~hits], torch.tensor(1 / num_words))
    assert torch.allclose(weights[:stored], torch.tensor(1 / num_words))


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("negative_share", [0.2, 0.5, 0.9])
def test_weighted_batches_expect_the_loss_of_all_cells(negative_share, is_uniform, random_matrix):
    scores = 1 + torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    dense = (scores - torch.from_numpy(random_matrix.toarray())).square().sum().item() / 40
    batches = PairBatches(
        random_matrix,
        100,
        negative_share=negative_share,
        context_shares=None if is_uniform else np.linspace(3, 1, 30),  # need not sum to 1
        weighted=True,
        seed=1,
    )
    losses = np.array(
        [
            [all_cells_loss(v, w)(scores[tuple(p.T)]).item() for p, v, w in batches.epoch(number)]
            for number in range(600)
        ]
    )
    assert losses.shape == (600, len(batches))
    # Each batch of an epoch by itself, also the last, which is smaller.
    errors = (losses.mean(axis=0) - dense) / (losses.std(axis=0) / np.sqrt(600))
    assert np.abs(errors).max() < 4


def test_weighted_batches_need_negative_samples(random_matrix):
    with pytest.raises(ValueError, match=r"batch_size=8 with negative_share=0\.01 leaves no negative sample"):
        PairBatches(random_matrix, 8, negative_share=0.01, weighted=True)
    # The last batch of an epoch has one at least.
    batches = PairBatches(random_matrix, 242 * 3 // 2, negative_share=1 / 3, weighted=True)
    *_, (pairs, _, _) = batches.epoch(0)
    assert random_matrix.nnz == 243
    assert len(pairs) == 1 + 1


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
    )
    assert [entry["epoch"] for entry in history] == list(range(1, 21))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert not model.training


def test_reports_are_means_of_the_batches_since_the_last(random_matrix):
    batches = PairBatches(random_matrix, 33)
    options = {"optimizer": "adam", "learning_rate": 0.03, "num_epochs": 2}
    each, few = (
        train_mini_batches(small_model(), batches, mse_loss, **options, reports_per_epoch=number)
        for number in (len(batches), 4)
    )
    losses = [entry["loss"] for entry in each]
    steps = [0, *(entry["step"] for entry in few)]
    expected = [np.mean(losses[first:last]) for first, last in itertools.pairwise(steps)]
    assert [entry["loss"] for entry in few] == pytest.approx(expected)


@pytest.mark.parametrize("table", COMPRESSED_TABLES)
def test_mini_batches_train_tables_of_few_bytes(table, random_matrix):
    torch.manual_seed(0)
    model = build_compressed_model(table, 40, 8, 1500)
    before = [p.detach().clone() for p in model.parameters()]
    history = train_mini_batches(
        model,
        PairBatches(random_matrix, 64),
        mse_loss,
        optimizer="adam",
        learning_rate=0.03,
        num_epochs=20,
        reports_per_epoch=1,
    )
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))


def test_tables_recluster_between_reports_of_mini_batches(random_matrix, monkeypatch):
    calls = []
    monkeypatch.setattr(ClusteredEmbedding, "recluster", lambda table: calls.append(table))
    model = PairModel(ClusteredEmbedding(40, 4, 5, 2), ClusteredEmbedding(30, 4, 5, 2))
    history = train_mini_batches(
        model,
        PairBatches(random_matrix, 64),
        mse_loss,
        optimizer="adam",
        learning_rate=0.01,
        num_epochs=2,
        reports_per_epoch=2,
    )
    assert len(history) == 4
    assert calls == [model.word_table, model.context_table] * 3


def test_divergence_is_noticed_and_the_rate_halved(random_matrix):
    objective = train_objective.AllCellsLoss(random_matrix)
    rates = []

    def train(rate):
        rates.append(rate)
        torch.manual_seed(0)
        model = build_model("full", 40, 4, shared_table=False)
        model.context_table = type(model.context_table)(30, 4)
        return train_full_batch(model, objective, optimizer="sgd", learning_rate=rate, num_steps=50)

    with pytest.raises(DivergenceError, match=r"diverged at step \d+: loss \d.* with learning_rate=1000$"):
        train(1000.0)  # noticed while the loss is finite
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
    wordsim = evaluation_sets.bundled_similarity()[0]
    words = sorted({word.casefold() for *pair, _ in wordsim.pairs for word in pair})
    vectors, contexts = rng.normal(size=(len(words), 5)), rng.normal(size=(20, 5)) * np.arange(1, 6)
    fields = quality.score_vectors(vectors, contexts, words)
    for name, scored in (("wordsim353", vectors), ("wordsim353_balanced", vectors @ contexts.T)):
        expected = similarity.similarity(scored, words, wordsim)
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
    unit = similarity.normalized(words)
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
        ({"optimizer": "adamw"}, "optimizer must be one of sgd, adagrad, adam, lbfgs, got 'adamw'"),
        (
            {"optimizer": "lbfgs", "training": "mini-batch"},
            "optimizer must be one of sgd, adagrad, adam, got 'lbfgs'",
        ),
        ({"training": "online"}, "training must be one of full-batch, mini-batch, got 'online'"),
        ({"loss": "hinge"}, "loss must be one of all-cells, mse, weighted-mse, glove, got 'hinge'"),
        ({}, "needs pool_size or compression_ratio, not both; got pool_size=None"),
        ({"table": "full", "pool_size": 5}, "a full table has no pool; got pool_size=5"),
        ({"num_steps": -1}, "num_steps must be at least 1, got -1"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"pool_size": math.nan}, "pool_size must be an integer, got nan"),
        ({"block_size": True}, "block_size must be an integer, got True"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"compression_ratio": math.inf}, r"compression_ratio must lie in \(0, inf\), got inf"),
        ({"learning_rate": math.nan}, r"learning_rate must lie in \(0, inf\), got nan"),
        ({"negative_share": 1.0}, r"negative_share must lie in \[0, 1\), got 1.0"),
        ({"negative_power": math.nan}, r"negative_power must lie in \(-inf, inf\), got nan"),
    ],
)
def test_bad_cases_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QualityCase(**{"table": "hashed", "optimizer": "sgd", **arguments})
