import itertools
import math

import pytest

from cemb.model import COMPRESSED_TABLES
from cemb.train.learning_rates import (
    FULL_BATCH_LEARNING_RATES,
    MINI_BATCH_LEARNING_RATES,
    TABLE_LEARNING_RATES,
    default_learning_rate,
    search_learning_rate,
)


@pytest.mark.parametrize("start", [1.0, 2**-3, 2.0**9])
def test_the_best_rate_is_found_between_others(start):
    asked = []

    def final_loss(rate):
        asked.append(rate)
        return (math.log2(rate) - 3.2) ** 2

    found = search_learning_rate(final_loss, start, max_trials=12)
    assert list(found) == sorted(found) == sorted(asked)
    rates = list(found)
    best = min(found, key=found.get)
    assert best == 8
    assert best not in (rates[0], rates[-1])
    assert {b / a for a, b in itertools.pairwise(rates)} == {2}
    assert all(found[rate] == (math.log2(rate) - 3.2) ** 2 for rate in rates)
    # As many trials as it took are enough, one less is not.
    assert search_learning_rate(final_loss, start, max_trials=len(found)) == found
    with pytest.raises(RuntimeError, match="no best learning rate within"):
        search_learning_rate(final_loss, start, max_trials=len(found) - 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rates_that_diverge_are_worst(bad):
    found = search_learning_rate(lambda rate: bad if rate > 9 else 1 / rate, 100, factor=3)
    assert min(found, key=found.get) == pytest.approx(100 / 27)
    assert set(found.values()) == {math.inf, *(1 / rate for rate in found if rate < 9)}
    with pytest.raises(RuntimeError, match="no best learning rate"):
        search_learning_rate(lambda rate: bad, 1.0, max_trials=4)


def test_the_search_for_a_rate_is_given_up():
    asked = []
    with pytest.raises(RuntimeError, match=r"no best learning rate within 0\.5 to 8: \{"):
        search_learning_rate(lambda rate: asked.append(rate) or -rate, 1.0, max_trials=5)
    assert asked == [1, 0.5, 2, 4, 8]


@pytest.mark.parametrize("options", [{"start": math.nan}, {"start": 0}, {"factor": 1.0}, {"max_trials": 0}])
def test_searches_without_end_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must "):
        search_learning_rate(lambda rate: rate, **{"start": 1.0, **options})


def test_default_rates():
    assert default_learning_rate("full", "adam", "full-batch") == FULL_BATCH_LEARNING_RATES["adam"]
    assert default_learning_rate("hashed", "lbfgs", "full-batch") == FULL_BATCH_LEARNING_RATES["lbfgs"]
    for table, rate in TABLE_LEARNING_RATES.items():
        assert table in ("hashed", *COMPRESSED_TABLES)
        assert default_learning_rate(table, "adam", "full-batch") == rate
        assert default_learning_rate(table, "sgd", "full-batch") == FULL_BATCH_LEARNING_RATES["sgd"]
        assert default_learning_rate(table, "adam", "mini-batch") == MINI_BATCH_LEARNING_RATES["adam"]
