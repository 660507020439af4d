import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from conftest import zipf_text
from torch import nn

from cemb.study import frontier, quality
from cemb.study.dataset import PmiConfig, load_pmi
from cemb.study.frontier import FIXED_RATIO, METHODS, QUANTIZED, TRAINED, Frontier, measure
from cemb.study.quality import QualityCase, measure_quality
from cemb.tables.transform_coded import overhead_bytes
from cemb.train import objective as train_objective
from cemb.train.limits import gap_limit, hashed_gap, water_filling

RANK = 8


@pytest.mark.parametrize("bits", [0.5, 1, 3.25])
def test_equal_variances_are_coded_alike(bits):
    assert water_filling(np.full((5, 4), 2.5), bits) == pytest.approx(20 * 2.5 * 4**-bits)


def test_water_filling_by_hand():
    variances = np.array([16.0, 1.0])
    assert water_filling(variances, 0) == 17
    # Bits: 1 a value are 2, all for the 16, which leaves 1. Then each further pair halves both deviations.
    assert water_filling(variances, 0.5) == pytest.approx(16 / 4 + 1)
    assert water_filling(variances, 1) == pytest.approx(2)
    assert water_filling(variances, 2) == pytest.approx(0.5)
    # A value of no variance brings bits for the others.
    assert water_filling(np.array([16.0, 1.0, 0.0, 0.0]), 1) == pytest.approx(0.5)
    assert water_filling(np.zeros(3), 1) == 0


@pytest.mark.parametrize("bits", [0.1, 1, 2.5])
def test_water_filling_finds_the_level(bits):
    variances = np.random.default_rng(0).gamma(0.3, size=200)

    def surplus(log_level):
        return np.maximum(0, np.log2(variances) / 2 - log_level / 2).mean() - bits

    level = 2 ** scipy.optimize.brentq(surplus, -60, 20, xtol=1e-13)
    assert water_filling(variances, bits) == pytest.approx(np.minimum(level, variances).sum(), rel=1e-9)


@pytest.mark.parametrize("bits", [-0.1, math.nan])
def test_negative_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits must lie in \[0, inf\), got"):
        water_filling(np.ones(3), bits)


def test_limits_of_the_gap(random_matrix):
    best = train_objective.optimum(random_matrix, 5)
    # Without bits the first-order cost is that of losing each side beside the other, so all of it twice.
    for by_row in (False, True):
        assert gap_limit(best, 0, by_row=by_row) == pytest.approx(2, rel=1e-5)
    limits = np.array(
        [[gap_limit(best, b, by_row=by_row) for b in (0.5, 1, 2, 4)] for by_row in (False, True)]
    )
    assert (limits > 0).all()
    assert (np.diff(limits, axis=1) < 0).all()
    assert (limits[1] < limits[0]).all()
    # At many bits the limit is 4^-b of the geometric means.
    assert limits[0, 3] / gap_limit(best, 5, by_row=False) == pytest.approx(4, rel=1e-6)


def test_limits_equal_their_formula(random_matrix):
    best = train_objective.optimum(random_matrix, 5)
    squares = np.square(best.singular_values)
    plain, by_row = [], []
    for side in (best.left, best.right):
        shares = np.square(side) @ squares / squares.sum()
        by_row += [share * square for share in shares for square in squares]
        plain += [square / len(side) for _ in shares for square in squares]
    for variances, is_by_row in ((plain, False), (by_row, True)):
        expected = water_filling(np.array(variances), 1.5) / squares.sum()
        assert gap_limit(best, 1.5, by_row=is_by_row) == pytest.approx(expected, rel=1e-5)


def test_the_limit_of_one_component_is_that_of_its_rows():
    rows = np.sqrt(np.array([0.5, 0.25, 0.25], np.float32))[:, None]
    best = train_objective.Optimum(rows, np.array([3], np.float32), np.ones((1, 1), np.float32), 10)
    # Words: 9 shared by 3 values; contexts: 9 in 1. In all 4 values and 12 bits: 27 + 9 = 36 at level θ.
    level = (3**3 * 9 / 4**12) ** 0.25
    assert gap_limit(best, 3, by_row=False) == pytest.approx(4 * level / 9, rel=1e-5)
    level = (4.5 * 2.25**2 * 9 / 4**12) ** 0.25
    assert gap_limit(best, 3, by_row=True) == pytest.approx(4 * level / 9, rel=1e-5)


@pytest.mark.parametrize("compression_ratio", [0.25, 1, 4, 16])
def test_the_gap_of_a_hashed_factor_is_that_of_means_of_what_collides(compression_ratio):
    rng = np.random.default_rng(1)
    values = rng.normal(size=400_000)
    places = rng.integers(round(len(values) / compression_ratio), size=len(values))
    means = np.bincount(places, values) / np.maximum(np.bincount(places), 1)
    lost = np.square(values - means[places]).sum() / np.square(values).sum()
    assert hashed_gap(compression_ratio) == pytest.approx(lost, abs=0.005)


def test_a_hashed_factor_needs_a_ratio():
    with pytest.raises(ValueError, match=r"compression_ratio must lie in \(0, inf\), got 0"):
        hashed_gap(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("frontier") / "text.txt"
    path.write_text(zipf_text(15_000, 290))
    return load_pmi(PmiConfig(corpus=str(path), min_count=2, rank=RANK))


@pytest.fixture(scope="module")
def objective(data):
    return train_objective.AllCellsLoss(data.matrix)


@pytest.fixture
def scored(monkeypatch):
    """The factors that are scored from now on; their word vectors are not tested on sets of words."""
    seen = []
    score = quality.score

    def noted(words, contexts, *arguments):
        seen.append((words, contexts))
        return score(words, contexts, *arguments)

    monkeypatch.setattr(quality, "score_vectors", lambda *arguments: {})
    for module in (quality, frontier):
        monkeypatch.setattr(module, "score", noted)
    return seen


def bytes_of(module):
    tensors = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())


def expected_bytes(method, data, compression_ratio, trained_ratio=None):
    """Inference and training bytes."""
    num_rows = 2 * len(data.words)
    values = num_rows * RANK
    if method in TRAINED or method in QUANTIZED:
        case = TRAINED[QUANTIZED.get(method, method)]
        if method != "full":
            case = replace(case, compression_ratio=trained_ratio or compression_ratio)
        model = case.build(len(data.words), RANK)
        small = bytes_of(model)
        parameters = list(model.parameters())
        # Adam's two moments, and a step counter of 4 bytes for each tensor.
        training = small + sum(8 * p.numel() + 4 for p in parameters)
        if method in QUANTIZED:
            # A scale of 2 bytes for 64 values of 1 byte.
            small += sum(66 * -(-p.numel() // 64) - 4 * p.numel() for p in parameters)
        return small, training
    name = method.removeprefix("alternating, ")
    budget = 4 * values / compression_ratio
    codebooks = 2 * 256 * RANK * 2
    small = {
        "float32": 4 * values,
        "bfloat16": 2 * values,
        "int8": values + 2 * num_rows,
        "int4": values // 2 + 2 * num_rows,
        "lower rank": RANK // compression_ratio * num_rows * 4,
        "lower rank, then int8": budget // num_rows * num_rows,  # each has a scale of 2 bytes
        **dict.fromkeys(
            PRODUCT_QUANTIZED,
            (budget - codebooks) // (2 * len(data.words)) * 2 * len(data.words) + codebooks,
        ),
        # The budget is more than 8 bits a value.
        "transform coding": values + 2 * overhead_bytes(len(data.words), RANK),
    }[name]
    return small, small if name != method else 4 * values


PRODUCT_QUANTIZED = [name for name in METHODS if name.startswith("product quantization")]
IMPOSSIBLE = {"hashed, blocks of 25": 25, "hashed, blocks of 100": 100}


# What a byte a value can do at all.
RATIOS = {**dict.fromkeys(QUANTIZED, 8), "lower rank, then int8": 4}


@pytest.mark.parametrize("method", METHODS)
def test_records_of_every_method(method, data, objective, scored):
    ratio = RATIOS.get(method, 2)
    record = measure(method, data, objective, compression_ratio=ratio, num_steps=12)
    assert record["kind"] == "frontier"
    assert (record["method"], record["seed"]) == (method, 0)
    assert (record["num_words"], record["embedding_dim"]) == (len(data.words), RANK)
    assert record["asked_ratio"] == (None if method in FIXED_RATIO else ratio)
    if method in IMPOSSIBLE:
        assert f"block_size must be at most embedding_dim=8, got {IMPOSSIBLE[method]}" in record["failure"]
        assert record["gap"] is record["inference_ratio"] is record["training_ratio"] is None
        assert not scored
        return
    assert record["failure"] is None
    *as_trained, (words, contexts) = scored
    assert len(as_trained) == (method in QUANTIZED)
    dense = np.square(
        data.matrix.toarray().astype(np.float64) - (words.double() @ contexts.double().T).numpy()
    )
    assert record["all_cells_loss"] == pytest.approx(dense.sum(), rel=1e-5)
    assert record["gap"] == pytest.approx(data.optimum.gap(dense.sum()), abs=1e-4)
    assert -1e-4 < record["gap"] < 1
    if method == "lower rank":
        kept = np.square(data.optimum.singular_values[: RANK // 2]).sum()
        assert dense.sum() == pytest.approx(data.optimum.squared_norm - kept, rel=1e-4)
    inference, training = expected_bytes(method, data, ratio, record.get("float32_ratio"))
    assert record["inference_bytes"] == inference
    assert record["training_bytes"] == training
    full = 2 * len(data.words) * RANK * 4
    assert record["inference_ratio"] == pytest.approx(full / inference)
    assert record["training_ratio"] == pytest.approx(3 * full / training)
    if method not in FIXED_RATIO:
        assert 0.99 * ratio <= record["inference_ratio"] < 1.35 * ratio
    if method in QUANTIZED:
        assert ratio / 4 <= record["float32_ratio"] < ratio / 2
        assert record["inference_ratio"] >= ratio
    assert record["train_s"] > 0
    if method in TRAINED or method in QUANTIZED or method in frontier.ALTERNATING:
        assert record["history"][-1]["step"] == (4 if method in frontier.ALTERNATING else 12)
        trained_gap = record["float32_gap" if method in QUANTIZED else "gap"]
        assert record["history"][-1]["gap"] == pytest.approx(trained_gap, abs=1e-5)


def test_rounding_to_int8_is_nearest_in_each_64_values():
    model = nn.ParameterList([torch.randn(3, 50), torch.randn(7) * 100])
    model.register_buffer("codes", torch.arange(5))
    before = [p.detach().clone().numpy().ravel() for p in model.parameters()]
    assert frontier.round_to_int8(model) == 3 * 66 + 66 + 40
    for values, parameter in zip(before, model.parameters(), strict=True):
        for first in range(0, len(values), 64):
            run, rounded = (v[first : first + 64] for v in (values, parameter.detach().numpy().ravel()))
            scale = np.float32(np.float16(np.abs(run).max() / 127))
            np.testing.assert_allclose(rounded, np.clip(np.round(run / scale), -127, 127) * scale, rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 3, 5, 8])
def test_axes_of_product_quantization(groups):
    variances = torch.tensor([64.0, 16, 8, 4, 2, 1, 0.5, 0.25])
    assert frontier._principal_axes(variances, groups).equal(torch.eye(8))
    turned = frontier._random_axes(variances, groups)
    torch.testing.assert_close(turned @ turned.T, torch.eye(8))
    assert (turned.abs() < 0.99).all()
    dealt = frontier._balanced_axes(variances, groups)
    assert sorted(dealt.argmax(dim=0).tolist()) == list(range(8))
    assert dealt.sum() == 8
    if groups == 8:  # of one axis each there is nothing to balance
        return

    def spread(axes):
        parts = np.array_split((variances @ axes).log2().numpy(), groups)
        return np.ptp([part.mean() for part in parts])

    assert spread(dealt) <= spread(torch.eye(8)) / (1 if groups == 1 else 2)


def test_axes_balance_two_pairs():
    # 8 · 1 and 4 · 2 are the same product.
    dealt = frontier._balanced_axes(torch.tensor([8.0, 4, 2, 1]), 2)
    assert dealt.argmax(dim=0).tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(FIXED_RATIO) - set(IMPOSSIBLE)))
def test_a_ratio_beyond_reach_is_a_failure(method, data, objective, scored):
    record = measure(method, data, objective, compression_ratio=10**6, num_steps=2)
    if "hashed" in method and method not in QUANTIZED:
        assert record["failure"] is None  # one value serves all
        assert record["num_parameters"] == 1
        return
    assert isinstance(record["failure"], str)
    assert record["gap"] is record["inference_bytes"] is record["training_bytes"] is None
    assert record["inference_ratio"] is record["training_ratio"] is None
    assert record["asked_ratio"] == 10**6


@pytest.mark.parametrize("method", ["transform coding", "alternating, transform coding"])
@pytest.mark.parametrize("spare", [-1, 0, 60])
def test_budgets_near_the_least(method, spare, data, objective, scored):
    least = 2 * (overhead_bytes(len(data.words), RANK) + 1)
    ratio = 2 * len(data.words) * RANK * 4 / (least + 2 * spare + 0.5)
    record = measure(method, data, objective, compression_ratio=ratio, num_steps=12)
    if spare <= 0:
        expected = "max_bytes must be at least" if spare else "the stored factor is zero"
        assert record["failure"].startswith(expected)
        assert record["gap"] is None
    else:
        assert record["failure"] is None
        assert 0 < record["gap"] < 1


def test_seeds_differ_and_are_repeated(data, objective, scored):
    for method in ("hashed", "alternating, int8"):
        gaps = [measure(method, data, objective, seed=s, num_steps=6)["gap"] for s in (1, 1, 2)]
        assert gaps[0] == gaps[1] != gaps[2]


def test_unknown_methods_are_refused(data, objective):
    with pytest.raises(ValueError, match=r"method must be one of full, hashed, .* got 'magic'"):
        measure("magic", data, objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"compression_ratio": math.nan}, r"compression_ratio must lie in \(0, inf\), got nan"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused_and_no_failure(options, message, data, objective):
    with pytest.raises(ValueError, match=message):
        measure("full", data, objective, **options)
    lists = {"compression_ratio": "compression_ratios", "seed": "seeds"}
    many = {lists.get(name, name): [value] if name in lists else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        Frontier(PmiConfig(), **many)


@pytest.mark.parametrize("training", ["full-batch", "mini-batch"])
def test_a_case_that_always_diverges_is_a_failure(training, data):
    case = QualityCase("full", "sgd", training, learning_rate=1e30, num_steps=30, batch_size=512)
    record, model = measure_quality(case, data)
    assert model is None
    assert "training diverged at step" in record["failure"]
    assert record["gap"] is record["all_cells_loss"] is None
    assert record["history"] == []
    assert record["learning_rate"] == 1e30
    assert record["inference_bytes"] == record["training_bytes"] == 4 * record["num_parameters"]


def test_a_method_that_always_diverges_is_a_failure(data, objective):
    record = measure("full", data, objective, learning_rate=1e30, num_steps=30)
    assert "training diverged at step" in record["failure"]
    assert record["gap"] is None
    assert record["inference_ratio"] == 1
    assert record["training_ratio"] == pytest.approx(1, rel=1e-3)
